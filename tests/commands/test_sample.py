"""Writing: what is given stays, what is asked for is written, and a mistake gets one line."""

import io
import json
import os
import re
import shlex
import subprocess
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
    holes = "é[MASK:3]" if objective == "autoregressive" else "é [MASK:3] and[MASK] end"
    text, _ = write(f"--text '{holes}' --whole --top-p 0.9", objective=objective)
    assert text.startswith("é") and all(part in text for part in re.split(r"\[.*?\]", holes))
    text, _ = write("--length 60 --temperature 0.5 --ban 'aeiou '", objective=objective)
    assert not set("aeiou ") & set(text)


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
        assert "no exact price: chance" in text and text.startswith(exact.split("\nthe sampler")[0])
    assert "temperature 1" not in exact and "the sampler of --exact" in exact


def test_score_wants_text(write, tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    _, error = write(f"--score {tmp_path}/picture.png", code=2)
    assert "picture.png: it is not UTF-8 text" in error


def test_optimal_needs_a_measured_curve_except_for_a_twin(write, checkpoints):
    write("--schedule optimal --length 5", objective="autoregressive")  # is left to right anyway
    tensors, info = read_tensors(checkpoints / "diffusion/model.safetensors")
    path = checkpoints / "unmeasured/model.safetensors"
    path.parent.mkdir()
    write_tensors(path, tensors, info | {"evaluation": None})
    _, error = write("--schedule optimal --length 5", objective="unmeasured", code=2)
    assert "needs a checkpoint that was evaluated" in error


@pytest.mark.parametrize("off, plain", [
    ("--temperature 0 --top-p 1", "--temperature 0"), ("--top-k 0", ""), ("--top-p 1.0", ""),
    ("--top-p 1e-46", "--temperature 0"), ("--top-p 0", "--temperature 0"),  # only the first token
    ("--temperature 1e-38", "--temperature 0"), ("--repetition-penalty 1", ""),
])
def test_what_switches_off_elsewhere_does_so_here_and_extremes_are_greedy(write, off, plain):
    assert write("--length 12", off)[0] == write("--length 12", plain)[0]


def test_a_text_does_not_end_before_what_is_given(write, monkeypatch):
    given = "--text 'a[MASK:9]b[MASK:9]c[MASK:3]'"
    monkeypatch.setattr(sample, "load_checkpoint", ending_everywhere)
    assert re.fullmatch(r"a[^\n]*b[^\n]*c\n", write(given)[0].replace("\r", ""))
    assert write("--length 9")[0] == "\n"  # which it otherwise does


def ending_everywhere(folder, device):
    """A network that writes end-of-text wherever it may, and x otherwise."""
    model, info = load_checkpoint(folder, device)
    logits = torch.full((257,), -50.0).index_fill(0, torch.tensor(256), 50.0)
    logits[ord("x")] = 0
    model.forward = lambda tokens, positions: logits.expand(len(positions), -1)
    return model, info


def test_gpt_refuses_what_is_given_to_the_right_of_a_hole(write):
    text, error = write("--text 'a[MASK]b'", objective="autoregressive", code=2)
    assert text == "" and error.count("\n") == 1 and "does not see what follows a hole" in error


# ---- where it is written -------------------------------------------------------------------------

STRANGE = ["\u3000日本", "one\u00a0two", "a\u200cb", "👨\u200d👩\u200d👧", "co\u00adop",
           "\U0001fae9", "a\r\nb", "\ufeff", "\u2028", "שלום\u200f"]
DRIVING = ["\x1b[2J", "\x07", "\x7f", "\x9b2J", "\u202eevil", "\u2066", "\x08", "a\rb"]


@pytest.mark.parametrize("given", [*STRANGE, *DRIVING], ids=ascii)
def test_a_file_gets_the_text_as_it_was_given(write, tmp_path, given):
    path = tmp_path / "steps.jsonl"
    text, _ = write("--steps 1 --whole --jsonl", str(path), "--text", shlex.quote(given + "[MASK]"))
    assert text.startswith(given)
    last = json.loads(path.read_text().splitlines()[-1])
    assert "".join(last["texts"][0]).startswith(given)


@pytest.mark.parametrize("view", ["", "--show-steps"])
@pytest.mark.parametrize("given", [*STRANGE, *DRIVING], ids=ascii)
def test_a_terminal_gets_what_could_drive_it_spelled_out(write, monkeypatch, given, view):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    text, _ = write("--steps 1 --whole", view, "--text", shlex.quote(given + "[MASK]"))
    last = text.split("\033[H\033[J")[-1]  # the view moves the cursor itself
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", last.replace(
        "\r\n", ""))
    assert given in DRIVING or view or given in last


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_what_a_screen_cannot_show_becomes_a_question_mark(write, monkeypatch, encoding):
    screen = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", screen)
    write("--text 'שלום[MASK:2]' --show-steps --whole")
    shown = screen.buffer.getvalue().decode(encoding)
    assert ("שלום░░" if encoding == "utf-8" else "??????") in shown


class Gone(io.StringIO):
    """A stdout whose reader has left, or whose terminal is closed."""

    def __init__(self, error: OSError):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("screen, code, says", [
    (None, 0, ""), (Gone(BrokenPipeError()), 0, ""),
    (Gone(OSError(28, "No space left on device")), 1, "sample.py: [Errno 28] No space left"),
], ids=str)
def test_a_screen_that_is_gone_gets_no_traceback(write, monkeypatch, screen, code, says):
    monkeypatch.setattr(sys, "stdout", screen)
    _, error = write("--length 9", code=code)
    assert says in error.replace("9 new tokens", "") and "Traceback" not in error


@pytest.mark.reliability
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("screen", ["| head -1", "2>&1 | head -1", ">&-", "2>&-", ">&- 2>&-"])
def test_a_real_screen_that_goes_away_is_no_error(checkpoints, screen, unbuffered):
    flags = f"--checkpoint {checkpoints}/diffusion --num-samples 2000 --length 60 --steps 1"
    command = f"set -o pipefail; {sys.executable} {sample.__file__} {flags} {screen}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True,
                            env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    assert result.returncode == 0
    assert "rror" not in result.stderr and "Exception" not in result.stderr


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


def test_tokens_are_shown_whole_and_up_to_the_end_of_text():
    clock = list("⏰".encode())
    for ids, whole, texts in (
        ([*clock, 65], True, ["", "", "⏰", "A"]),
        ([clock[0], 257, 65], True, ["\N{REPLACEMENT CHARACTER}", None, "A"]),
        ([27, 7, 13, 10], True, ["\x1b", "\x07", "\r", "\n"]),  # a terminal gets them spelled out
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
    ("--text 'no hole'", "--text has no hole, or a broken one; write [MASK:20]"),
    ("--text 'a [MASK:2] and a [MASK: 3]'", "--text has no hole, or a broken one"),
    ("--text 'one that is not closed: [MASK'", "--text has no hole, or a broken one"),
    ("--text [MASK:0]", "nothing is hidden"),
    ("--text a[MASK:9999999999999999]", "tokens are too many"),
    ("--text a[MASK] --prefix b", "drop --prefix and --length"),
    (f"--prefix {'x' * 70}", "70 tokens are too many: the model's context is 64"),
    ("--top-k -1", "top_k must be at least 0, not -1"),
    ("--top-p -1", "top_p must be at least 0, not -1.0"),
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
    ("--jsonl no/such/steps.jsonl", "--jsonl no/such/steps.jsonl: name a file in a folder"),
    ("--jsonl .", "--jsonl .: name a file in a folder that exists"),
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
