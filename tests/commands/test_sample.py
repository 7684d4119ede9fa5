"""Writing: what is given stays, what is asked for is written, and a mistake gets one line."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import run

import sample
from diffusion import evaluate
from plumbing.checkpoint import load_checkpoint, read_tensors, write_tensors
from plumbing.terminal import draw_position
from plumbing.text import token_texts
from prepare_data import TokenFile, get_tokenizer
from sample import exact_nll

OBJECTIVES = ("diffusion", "mlm", "autoregressive")


@pytest.fixture(scope="module")
def checkpoints(data, tmp_path_factory) -> Path:
    """A folder with a checkpoint of each objective, of 64 tokens."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for objective in OBJECTIVES:
        run(data, folder / objective, objective=objective, n_layer=1, context_length=64, steps=20)
    return folder


@pytest.fixture
def write(checkpoints, capsys):
    """Run the command with a checkpoint, expecting its exit code: (stdout, stderr)."""

    def write(*options, objective: str = "diffusion", code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        arguments = ["--checkpoint", str(checkpoints / objective), *shlex.split(" ".join(options))]
        try:
            assert sample.main(arguments) == code
        except SystemExit as stopped:
            assert stopped.code == code
        return capsys.readouterr()

    return write


# ---- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_kind_of_model_continues_fills_holes_and_obeys_a_ban(write, objective):
    text, numbers = write("--prefix 'the quick' --length 20 --whole", objective=objective)
    assert text.startswith("the quick")
    calls = 20 if objective == "autoregressive" else 16
    assert re.search(rf"^20 new tokens in {calls} model calls, [\d,]+ tokens/s$", numbers, re.M)
    assert ("note:" in numbers) == (objective != "diffusion")
    text, _ = write("--text 'é [MASK:3] and[MASK] end' --whole --top-p 0.9", objective=objective)
    assert text.startswith("é ") and text.endswith(" end\n") and " and" in text
    text, _ = write("--length 60 --temperature 0.5 --ban 'aeiou '", objective=objective)
    assert not set("aeiou ") & set(re.sub(r"\\x[0-9a-f]{2}", "", text))  # \x1f: a control character


@pytest.mark.parametrize("options, calls", [
    ("--steps 5 --schedule cosine", 5),
    ("--steps 6 --schedule optimal", 6),
    ("", 16),
    ("--exact", 30),
    ("--order margin --gumbel 0.5", 16),
    ("--order entropy --block-length 7", 30),
    ("--order confidence --threshold 0.000001", 1),
    ("--remask renoise --steps 12", 12),
    ("--repetition-penalty 1.5 --sampling topk", 16),
])
def test_every_sampler_is_a_flag(write, options, calls):
    _, numbers = write("--length 30 --whole", options)
    assert numbers.startswith(f"30 new tokens in {calls} model calls")


def test_greedy_ignores_the_seed_and_sampling_does_not(write):
    def texts(options):
        return [write(f"--length 30 --seed {seed}", options)[0] for seed in (1, 2, 3)]

    assert len(set(texts("--sampling greedy --order confidence"))) == 1
    assert len(set(texts(""))) == 3
    assert texts("") == texts("")


def test_num_samples_are_different_texts_with_vowels_unless_banned(write):
    text, numbers = write("--length 60 --num-samples 5 --whole --temperature 0.5")
    assert len(set(text.split("\n---\n"))) == 5 and set("aeiou ") <= set(text)
    assert numbers.startswith("300 new tokens in 16 model calls")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_score_is_the_evaluation_of_the_file(write, checkpoints, data, tmp_path, objective):
    x_0 = torch.from_numpy(TokenFile(data, "val").read(range(0, 64 * 16, 64), 64))
    (tmp_path / "text.txt").write_bytes(bytes(x_0.flatten().tolist()))
    text, _ = write(f"--score {tmp_path}/text.txt", objective=objective)
    model, _ = load_checkpoint(checkpoints / objective)
    bound = evaluate(model, x_0, 257, objective, curve_points=20)
    assert f"{bound.nats:.4f} +- {bound.stderr:.4f} nats/token" in text
    assert f"{bound.nats / 0.6931472:.4f} bits/byte" in text  # one token is one byte
    assert text.startswith("NLL" if bound.curve is None else "NELBO <=")
    assert ("at temperature 1" in text) == (objective == "diffusion")


@pytest.mark.parametrize("options, how", [
    ("", {"order": "spread", "steps": 16}), ("--steps 64 --temperature 2", {"steps": 64}),
    ("--order entropy --schedule cosine --steps 8",
     {"order": "entropy", "schedule": "cosine", "steps": 8}),
    ("--block-length 32", {"block_length": 32}),
])
def test_score_says_what_the_text_costs_the_sampler(write, checkpoints, data, tmp_path, options,
                                                    how):
    x_0 = torch.from_numpy(TokenFile(data, "val").read(range(0, 64 * 8, 64), 64))
    (tmp_path / "text.txt").write_bytes(bytes(x_0.flatten().tolist()))
    text, _ = write(f"--score {tmp_path}/text.txt {options}")
    model, _ = load_checkpoint(checkpoints / "diffusion")
    nll = exact_nll(model, x_0, 257, **how)
    calls = how.get("steps", 64)
    assert (f"order {how.get('order', 'spread')} in {calls} calls, at temperature 1: "
            f"NLL {nll.nats:.4f} +- {nll.stderr:.4f}") in text


def test_score_of_a_sampler_without_an_exact_price_is_the_bound(write, data, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 9)
    exact, _ = write(f"--score {tmp_path}/text.txt --exact")
    for how in ("--order random", "--remask conf"):
        text, _ = write(f"--score {tmp_path}/text.txt {how}")
        assert "no exact price: chance" in text and text.startswith(exact.split("\n  from")[0])
    assert "temperature 1" not in exact


def test_optimal_needs_a_measured_curve_except_for_a_twin(write, checkpoints):
    write("--schedule optimal --length 5", objective="autoregressive")  # is left to right anyway
    tensors, info = read_tensors(checkpoints / "diffusion/model.safetensors")
    path = checkpoints / "unmeasured/model.safetensors"
    path.parent.mkdir()
    write_tensors(path, tensors, info | {"evaluation": None})
    _, error = write("--schedule optimal --length 5", objective="unmeasured", code=2)
    assert "needs a checkpoint that was evaluated" in error


# ---- the view and the record ---------------------------------------------------------------------


def test_show_steps_prints_every_state_from_all_hidden_to_all_written(write):
    text, _ = write("--length 8 --steps 4 --show-steps --whole")
    shown = re.findall(r"--- step (\d): (\d) tokens hidden", text)
    assert shown == [(str(i), str(8 - 2 * i)) for i in range(5)]
    assert text.splitlines()[1] == "░" * 8


def test_the_record_holds_every_step(write, tmp_path):
    path = tmp_path / "steps.jsonl"
    text, _ = write("--prefix 'a quick é' --length 9 --steps 3 --whole --num-samples 2",
                    f"--jsonl {path}")
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    given = len("a quick é".encode())
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    assert [sum(row.count(257) for row in step["tokens"]) for step in steps] == [18, 12, 6, 0]
    written = ["".join(row) for row in steps[-1]["texts"]]
    assert written == text.removesuffix("\n").split("\n---\n")
    for step in steps:
        for tokens, texts, probability in zip(step["tokens"], step["texts"], step["probability"],
                                              strict=True):
            hidden = [token == 257 for token in tokens]
            assert [text is None for text in texts] == [p == 0 for p in probability] == hidden
            assert "".join(texts[:given]) == "a quick é" and probability[:given] == [1] * given
            assert max(probability) <= 1


@pytest.mark.parametrize("environment, colored, in_place", [
    ({"TERM": "xterm-256color", "NO_COLOR": ""}, True, True),
    ({"TERM": "xterm-256color", "NO_COLOR": "1"}, False, True),
    ({"TERM": "dumb", "NO_COLOR": ""}, False, False),
])
def test_the_view_on_a_terminal(write, monkeypatch, environment, colored, in_place):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    shown, _ = write("--prefix the --length 12 --steps 3 --show-steps --whole --remask renoise")
    assert shown.count("--- step") == 4
    assert shown.count("\033[H\033[J") == 4 * in_place  # each frame covers the one before
    for style in ("30;42", "38;5;2", "2m"):
        assert (f"\033[{style}" in shown) == colored
    assert colored or not re.search("\033\\[[^HJ]", shown)


def test_the_view_marks_what_happened_at_each_position():
    def colored(*position):
        return draw_position(*position, True)

    assert colored(None, 9, 9, 0.0) == "\033[2m\N{LIGHT SHADE}\033[0m"  # still hidden
    assert colored(None, 5, 9, 0.0) == "\033[31m\N{DARK SHADE}\033[0m"  # hidden again
    assert colored("x", 9, 5, 0.3) == "\033[30;42mx\033[0m"  # just committed
    assert colored("x", 5, 5, 1.0) == "\033[0mx\033[0m"  # given
    shades = [int(re.search(r"5;(\d+)m", colored("x", 5, 5, p))[1]) for p in (0.0, 0.3, 0.6, 0.99)]
    assert shades == sorted(set(shades)) and 232 <= shades[0] and shades[-1] <= 255
    plain = [draw_position(text, *tokens, 0.5, False)
             for text, *tokens in ((None, 9, 9), (None, 5, 9), ("x", 9, 5), ("x", 5, 5))]
    assert plain == ["░", "▓", "x", "x"]


def test_tokens_are_shown_whole_safely_and_up_to_the_end_of_text():
    clock = list("⏰".encode())
    for ids, whole, texts in (
        ([*clock, 65], True, ["", "", "⏰", "A"]),
        ([clock[0], 257, 65], True, ["\N{REPLACEMENT CHARACTER}", None, "A"]),
        ([27, 7, 13, 10], True, ["\\x1b", "\\x07", "\\x0d", "\n"]),
        ([65, 256, 66], True, ["A", "<|endoftext|>", "B"]),
        ([65, 256, 66], False, ["A"]),
    ):
        assert token_texts(ids, get_tokenizer("byte"), 257, whole) == texts


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, message", [
    ("--colour", "unknown argument '--colour'"),
    ("--checkpoint nowhere", "nowhere/model.safetensors does not exist: train a model first"),
    ("--steps 0", "steps must be at least 1, not 0"),
    ("--num-samples 0", "num_samples must be at least 1, not 0"),
    ("--length 65", "65 tokens are too many: the model's context is 64"),
    ("--length 99999999999999", "tokens are too many"),
    (f"--prefix {'x' * 64}", "nothing is hidden in 64 tokens, so there is nothing to write"),
    ("--text 'no hole'", "--text has no hole; write one as [MASK:20]"),
    ("--text [MASK:0]", "nothing is hidden"),
    ("--text a[MASK:9999999999999999]", "tokens are too many"),
    ("--text a[MASK] --prefix b", "drop --prefix and --length"),
    ("--top-k -1", "top_k must be at least 1, not -1"),
    ("--top-p 0", "top_p must be at least 1e-30, not 0.0"),
    ("--threshold 1.5", "threshold must be from 1e-30 to 1, not 1.5"),
    ("--temperature -1", "temperature must be at least 0, not -1.0"),
    ("--exact --steps 9", "--exact leaves no choice: drop --steps"),
    ("--exact --sampling greedy", "--exact leaves no choice: drop --sampling"),
    ("--exact --block-length 5", "--exact leaves no choice: drop --block-length"),
    ("--gumbel 1", "gumbel changes nothing for order spread"),
    ("--order alphabetic", "order must be random or spread or left_to_right"),
    ("--remask often", "remask must be none or renoise"),
    ("--schedule optimal --block-length 5", "drop --block-length"),
    ("--block-length 2 --steps 3 --length 20", "steps must be at least 10, one per block, not 3"),
    ("--repetition-penalty 0", "repetition_penalty must be at least 1e-06, not 0.0"),
    ("--score nowhere.txt", "--score nowhere.txt: No such file"),
    ("--jsonl no/such/steps.jsonl", "--jsonl no/such/steps.jsonl: there is no such folder"),
    ("--device cuda", "device cuda is not available here"),
    ("--device mps", "device mps is not available here"),
], ids=lambda text: text[:40])
def test_a_mistake_gets_one_line_and_leaves_an_older_record_alone(write, tmp_path, monkeypatch,
                                                                  options, message):
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if there.get(options.split()[-1]):
        pytest.skip("this machine has the device whose absence is tested")
    monkeypatch.chdir(tmp_path)
    Path("steps.jsonl").write_text("older")
    text, error = write("--jsonl steps.jsonl", options, code=2)
    assert text == "" and message in error
    assert error.startswith("sample.py: ") and error.count("\n") == 1
    assert Path("steps.jsonl").read_text() == "older" and len(os.listdir()) == 1
