"""The command line for writing: what is given stays, what is asked for is written, mistakes get one line."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample
from diffusion import evaluate
from model import load_checkpoint, read_checkpoint_file
from prepare_data import TokenFile, get_tokenizer, write_dataset
from train import TrainConfig, save, train

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
    ids = tokenizer.encode_ordinary("a\x1b[31mé\n") + [256] + tokenizer.encode_ordinary("b")
    assert "".join(sample.token_texts(ids, tokenizer, 257, whole=False)) == "a\\x1b[31mé\n"
    assert "".join(sample.token_texts(ids, tokenizer, 257, whole=True)) == "a\\x1b[31mé\n<|endoftext|>b"


@pytest.mark.parametrize("arguments, says", [
    (["--steps", "0"], "steps must be at least 1, not 0"),
    (["--steps", "few"], "invalid int value: 'few'"),
    (["--length", "65"], "65 tokens asked for, but the model's context is 64"),
    (["--prefix", "x" * 64], "leave nothing to write"),
    (["--length", "0"], "leave nothing to write"),
    (["--text", "no hole"], "--text has no hole"),
    (["--text", "[MASK:0]"], "nothing is hidden"),
    (["--text", "[MASK:100]"], "100 tokens asked for"),
    (["--text", "a[MASK:99999999999999]b"], "100000000000001 tokens asked for"),
    (["--length", "99999999999999"], "99999999999999 tokens asked for"),
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


# --- Samplers, the view, the record ---------------------------------------------------------------


@pytest.mark.parametrize("options, calls", [
    (("--schedule", "optimal", "--steps", "6"), 6),
    (("--order", "margin", "--gumbel", "0.5"), 30),
    (("--order", "entropy", "--block-length", "7"), 30),
    (("--remask", "renoise", "--steps", "40"), 40),
    (("--repetition-penalty", "1.5"), 30),
    (("--order", "confidence", "--threshold", "0.000001"), 1),
])
def test_every_sampler_is_a_flag(capsys, checkpoint, options, calls):
    code, text, figures = command(capsys, checkpoint, "--length", "30", "--whole", *options)
    assert code == 0 and figures.startswith(f"30 new tokens in {calls} model calls")


def test_banned_characters_are_not_written(capsys, checkpoint):
    def written(*options):
        text = command(capsys, checkpoint, "--length", "60", "--temperature", "0.5", *options)[1]
        return set(re.sub(r"\\x[0-9a-f]{2}", "", text))  # control characters are spelled with letters

    assert set("aeiou ") <= written("--num-samples", "5")
    assert not set("aeiou ") & written("--num-samples", "5", "--ban", "aeiou ")


def test_a_twin_obeys_the_ban_too(capsys, any_checkpoint):
    _, text, _ = command(capsys, any_checkpoint, "--length", "40", "--ban", "aeiou ", "--temperature", "0.5")
    assert not set("aeiou ") & set(re.sub(r"\\x[0-9a-f]{2}", "", text))


def test_the_record_holds_every_step(capsys, checkpoint, tmp_path):
    path = tmp_path / "steps.jsonl"
    _, text, _ = command(capsys, checkpoint, "--prefix", "a quick é", "--length", "9", "--steps", "3",
                         "--whole", "--num-samples", "2", "--jsonl", str(path))
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    given = len("a quick é".encode())
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    assert [sum(row.count(257) for row in step["tokens"]) for step in steps] == [18, 12, 6, 0]
    assert ["".join(row) for row in steps[-1]["texts"]] == text.removesuffix("\n").split("\n---\n")
    for step in steps:
        for tokens, texts, probability in zip(*(step[key] for key in ("tokens", "texts", "probability")),
                                              strict=True):
            assert [text is None for text in texts] == [token == 257 for token in tokens]
            assert "".join(texts[:given]) == "a quick é" and probability[:given] == [1] * given
            assert all((p == 0) == (token == 257) and 0 <= p <= 1
                       for p, token in zip(probability, tokens, strict=True))


def on_a_terminal(arguments: list[str], **environment: str) -> str:
    """What the command prints when its stdout is a terminal."""
    master, slave = pty.openpty()
    root = str(Path(__file__).parent.parent)
    process = subprocess.Popen([sys.executable, "sample.py", *arguments], cwd=root, stdout=slave,
                               stderr=subprocess.DEVNULL, env=dict(os.environ, **environment))
    os.close(slave)
    printed = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while block := os.read(master, 1 << 16):
            printed += block
    assert process.wait() == 0
    os.close(master)
    return printed.decode()


@pytest.mark.parametrize("environment, colored, in_place", [
    ({"TERM": "xterm-256color", "NO_COLOR": ""}, True, True),
    ({"TERM": "xterm-256color", "NO_COLOR": "1"}, False, True),
    ({"TERM": "dumb", "NO_COLOR": ""}, False, False),
])
def test_the_view_on_a_terminal(checkpoint, environment, colored, in_place):
    printed = on_a_terminal(["--checkpoint", str(checkpoint), "--prefix", "the ", "--length", "12", "--steps",
                             "3", "--show-steps", "--whole", "--remask", "renoise"], **environment)
    assert printed.count("--- step") == 4
    assert printed.count("\033[H\033[J") == 4 * in_place  # each frame takes the place of the one before
    assert ("\033[30;42m" in printed) == ("\033[38;5;2" in printed) == ("\033[2m" in printed) == colored
    assert re.search("\033\\[[^HJ]", printed) is None or colored


def test_the_view_marks_what_happened_to_each_place():
    def colored(*place):
        return sample.draw(*place, True)

    assert colored(None, 9, 9, 0.0) == "\033[2m\N{LIGHT SHADE}\033[0m"  # still hidden
    assert colored(None, 5, 9, 0.0) == "\033[31m\N{DARK SHADE}\033[0m"  # hidden again
    assert colored("x", 9, 5, 0.3) == "\033[30;42mx\033[0m"  # just committed
    shades = [int(re.search(r"5;(\d+)m", colored("x", 5, 5, p))[1]) for p in (0.0, 0.3, 0.6, 0.99)]
    assert shades == sorted(set(shades)) and 232 <= shades[0] and shades[-1] <= 255
    assert [sample.draw(text, *tokens, 0.5, False) for text, *tokens in
            ((None, 9, 9), (None, 5, 9), ("x", 9, 5), ("x", 5, 5))] == ["░", "▓", "x", "x"]


def test_characters_of_several_tokens_and_control_characters_are_shown_safely():
    byte, mask, unfinished = get_tokenizer("byte"), 257, "\N{REPLACEMENT CHARACTER}"
    clock = list("⏰".encode())
    assert sample.token_texts([*clock, 65], byte, mask, True) == ["", "", "⏰", "A"]
    assert sample.token_texts([clock[0], mask, 65], byte, mask, True) == [unfinished, None, "A"]
    assert sample.token_texts([27, 7, 13, 10], byte, mask, True) == ["\\x1b", "\\x07", "\\x0d", "\n"]
    assert sample.token_texts([65, 256, 66], byte, mask, False) == ["A"]
    assert sample.token_texts([65, 256, 66], byte, mask, True) == ["A", "<|endoftext|>", "B"]


@pytest.mark.parametrize("options, message", [
    (("--threshold", "0"), "threshold must be in (0, 1], not 0.0"),
    (("--threshold", "1.5"), "threshold must be in (0, 1], not 1.5"),
    (("--block-length", "0"), "block_length must be at least 1, not 0"),
    (("--block-length", "2", "--steps", "3", "--length", "20"), "steps must be at least 10"),
    (("--gumbel", "-1", "--order", "margin"), "gumbel must be 0 or positive, not -1.0"),
    (("--gumbel", "1"), "--gumbel changes nothing for order random"),
    (("--repetition-penalty", "0"), "the repetition penalty must be positive, not 0.0"),
    (("--remask", "often"), "invalid choice: 'often'"),
    (("--order", "alphabetical"), "invalid choice: 'alphabetical'"),
    (("--schedule", "optimal", "--block-length", "5"), "drop --block-length"),
    (("--jsonl", "no/such/folder/steps.jsonl"), "there is no folder no/such/folder"),
    (("--steps", "0"), "steps must be at least 1"),
    (("--steps", "0", "--schedule", "optimal"), "steps must be at least 1"),
    (("--top-p", "0"), "top_p must be in (0, 1], not 0.0"),
    (("--prefix", "x" * 64,), "leave nothing to write in a context of 64"),
])
def test_a_mistake_in_a_sampler_gets_one_line_and_code_2(capsys, checkpoint, options, message):
    code, text, error = command(capsys, checkpoint, *options)
    assert (code, text) == (2, "") and message in error
    assert len(error.strip().splitlines()) == 1


def test_a_mistake_leaves_an_older_record_alone(capsys, checkpoint, tmp_path):
    (tmp_path / "steps.jsonl").write_text("older")
    code, *_ = command(capsys, checkpoint, "--threshold", "7", "--jsonl", str(tmp_path / "steps.jsonl"))
    assert code == 2 and (tmp_path / "steps.jsonl").read_text() == "older"


def test_optimal_needs_a_measured_curve(capsys, data, tmp_path):
    checkpoint = train_briefly(data, tmp_path / "gpt", "autoregressive")
    code, _, _ = command(capsys, checkpoint, "--schedule", "optimal", "--length", "5")
    assert code == 0  # a twin writes left to right, whatever the schedule
    tensors, info = read_checkpoint_file(checkpoint / "model.pt")
    info["config"]["objective"], info["evaluation"] = "diffusion", None
    save(checkpoint / "model.pt", tensors, info)
    code, _, error = command(capsys, checkpoint, "--schedule", "optimal", "--length", "5")
    assert code == 2 and "needs a checkpoint that was evaluated" in error
