"""The command line for writing: what is given stays, what is asked for is written, mistakes get one line."""

import re
from pathlib import Path

import pytest
import torch

import sample
from diffusion import evaluate
from model import load_checkpoint
from prepare_data import TokenFile, get_tokenizer, write_dataset
from train import TrainConfig, train

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 20


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(iter([("train", [TEXT]), ("val", [TEXT])]), "byte", folder, "test")
    return folder


def train_briefly(data: Path, out_dir: Path, objective: str) -> Path:
    cfg = TrainConfig(data_dir=str(data), out_dir=str(out_dir), objective=objective, n_layer=1, n_head=2,
                      n_embd=32, context_length=64, steps=20, compile=False, device="cpu", final_eval_rows=8)
    assert train(cfg) == 0
    return out_dir


@pytest.fixture(scope="module", params=["diffusion", "mlm", "autoregressive"])
def any_checkpoint(request, data, tmp_path_factory) -> Path:
    return train_briefly(data, tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory) -> Path:
    return train_briefly(data, tmp_path_factory.mktemp("checkpoint"), "diffusion")


def command(capsys, checkpoint: Path, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    try:
        code = sample.main(["--checkpoint", str(checkpoint), *arguments])
    except SystemExit as stopped:
        code = stopped.code
    return code, *capsys.readouterr()


def test_every_kind_of_checkpoint_continues_a_prefix_and_counts_new_tokens_only(capsys, any_checkpoint):
    arguments = ("--prefix", "the quick", "--length", "20", "--whole")
    code, text, figures = command(capsys, any_checkpoint, *arguments)
    assert code == 0 and text.startswith("the quick")
    assert re.search(r"^20 new tokens in 20 model calls, [\d,]+ tokens/s$", figures, re.M)
    assert ("note:" in figures) == ("diffusion" not in str(any_checkpoint))


def test_every_kind_of_checkpoint_fills_holes_and_keeps_the_rest(capsys, any_checkpoint):
    template = "é [MASK:3] and[MASK] end"
    code, text, _ = command(capsys, any_checkpoint, "--text", template, "--whole", "--top-p", "0.9")
    assert code == 0 and text.startswith("é ") and text.endswith(" end\n") and " and" in text


def test_fewer_steps_are_fewer_model_calls(capsys, checkpoint):
    _, _, figures = command(capsys, checkpoint, "--length", "30", "--steps", "5", "--schedule", "cosine")
    assert figures.startswith("30 new tokens in 5 model calls")


def test_greedy_ignores_the_seed_and_sampling_does_not(capsys, checkpoint):
    def write(*options):
        return {command(capsys, checkpoint, "--length", "30", "--seed", seed, *options)[1] for seed in "123"}
    assert len(write("--sampling", "greedy", "--order", "confidence")) == 1
    assert len(write()) == 3
    assert write() == write()


def test_show_steps_prints_every_state_from_all_hidden_to_all_written(capsys, checkpoint):
    _, text, _ = command(capsys, checkpoint, "--length", "8", "--steps", "4", "--show-steps", "--whole")
    shown = re.findall(r"--- step (\d): (\d) tokens hidden", text)
    assert shown == [(str(i), str(8 - 2 * i)) for i in range(5)]
    assert text.splitlines()[1] == "░" * 8


def test_num_samples_writes_different_texts(capsys, checkpoint):
    _, text, figures = command(capsys, checkpoint, "--length", "30", "--num-samples", "3", "--whole")
    assert len(set(text.split("\n---\n"))) == 3 and figures.startswith("90 new tokens in 30 model calls")


def test_score_is_the_evaluation_of_the_file(capsys, any_checkpoint, data, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT[: 64 * 16])
    _, text, _ = command(capsys, any_checkpoint, "--score", str(path))
    model, info = load_checkpoint(any_checkpoint)
    x_0 = torch.from_numpy(TokenFile(data, "val").read(range(0, 64 * 16, 64), 64))
    bound = evaluate(model, x_0, 257, info["config"]["objective"], curve_points=20)
    assert f"{bound.nats:.4f} +- {bound.stderr:.4f} nats/token" in text
    assert f"{bound.nats / 0.6931472:.4f} bits/byte" in text  # one token is one byte
    assert text.startswith("NLL" if bound.curve is None else "NELBO <=")


def test_text_is_cut_at_the_end_of_text_token_and_control_characters_are_spelled_out():
    tokenizer = get_tokenizer("byte")
    ids = tokenizer.encode_ordinary("a\x1b[31mé\n") + [257, 256] + tokenizer.encode_ordinary("b")
    assert sample.readable(ids, tokenizer, 257, whole=False) == "a\\x1b[31mé\n░"
    assert sample.readable(ids, tokenizer, 257, whole=True) == "a\\x1b[31mé\n░<|endoftext|>b"


@pytest.mark.parametrize("arguments, says", [
    (["--steps", "0"], "steps must be at least 1, not 0"),
    (["--steps", "few"], "invalid int value: 'few'"),
    (["--length", "65"], "65 tokens asked for, but the model's context is 64"),
    (["--prefix", "x" * 64], "leave nothing to write"),
    (["--length", "0"], "leave nothing to write"),
    (["--text", "no hole"], "--text has no hole"),
    (["--text", "[MASK:0]"], "nothing is hidden"),
    (["--text", "[MASK:100]"], "100 tokens asked for"),
    (["--text", "a[MASK]", "--prefix", "b"], "drop --prefix"),
    (["--top-p", "1.5"], "top_p must be in (0, 1], not 1.5"),
    (["--top-k", "-1"], "top_k must be at least 1, not -1"),
    (["--temperature", "-1"], "temperature must be 0 (greedy) or positive, not -1.0"),
    (["--sampling", "greedy", "--top-p", "0.9"], "greedy takes the likeliest token"),
    (["--temperature", "0", "--top-k", "5"], "greedy takes the likeliest token"),
    (["--sampling", "nucleus", "--top-k", "5"], "contradicts"),
    (["--schedule", "quadratic"], "invalid choice: 'quadratic'"),
    (["--order", "alphabetic"], "invalid choice: 'alphabetic'"),
    (["--num-samples", "0"], "--num-samples must be at least 1"),
    (["--score", "nowhere.txt"], "nowhere.txt: No such file"),
    (["--checkpoint", "nowhere"], "nowhere/model.pt does not exist"),
    (["--colour"], "unrecognized arguments: --colour"),
], ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "")
def test_mistakes_get_one_line_and_exit_code_2(capsys, checkpoint, arguments, says):
    code, text, error = command(capsys, checkpoint, *arguments)
    assert (code, text) == (2, "")
    assert error.startswith("sample.py: ") and error.count("\n") == 1 and says in error


def test_a_device_that_is_not_there_is_named(capsys, checkpoint):
    absent = [name for name, there in (("cuda", torch.cuda.is_available()),
                                       ("mps", torch.backends.mps.is_available())) if not there]
    for name in absent:
        code, _, error = command(capsys, checkpoint, "--device", name)
        assert code == 2 and f"device {name} is not available here" in error
