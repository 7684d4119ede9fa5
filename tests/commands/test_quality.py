"""The plain recipe is what it says, and comparisons compare like with like."""

import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_runs
import torch
from oracles import seeded

from diffusion import nelbo
from experiments import quality, words
from experiments.lab import plain, runs
from model import ModelConfig
from prepare_data import TokenFile

CONFIG = ModelConfig(20, 16, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture
def model() -> plain.PlainTransformer:
    torch.manual_seed(0)
    return plain.PlainTransformer(CONFIG)


# --- The plain recipe -----------------------------------------------------------------------------


def test_the_plain_loss_is_the_mean_cross_entropy_of_the_hidden_tokens(model):
    x_0 = torch.randint(20, (3, 16), generator=seeded(0))
    mask = plain.draw_mask(3, 16, seeded(1))
    x_t = torch.where(mask, 20, x_0)
    p = model(x_t).softmax(-1)
    hidden = [(b, t) for b in range(3) for t in range(16) if mask[b, t]]
    by_hand = -sum(p[b, t, x_0[b, t]].log().item() for b, t in hidden) / len(hidden)
    assert plain.plain_loss(model, x_0, mask, 20).item() == pytest.approx(by_hand, abs=1e-5)
    flat = torch.tensor([b * 16 + t for b, t in hidden])
    torch.testing.assert_close(model(x_t, flat), model(x_t)[mask])


def test_the_plain_mask_ratio_is_uniform():
    ratio = plain.draw_mask(4000, 200, seeded(0)).float().mean(1).sort().values
    assert (ratio - torch.linspace(0, 1, 4000)).abs().max() < 0.03  # its CDF is the diagonal


def test_at_first_the_plain_network_knows_nothing_and_sees_both_ways(model):
    x_0 = torch.randint(20, (64, 16), generator=seeded(0))
    assert nelbo(model, x_0, 20).nats == pytest.approx(math.log(20), abs=0.05)
    changed = x_0[:1].clone()
    changed[0, 9] = (changed[0, 9] + 1) % 20
    differs = (model(x_0[:1]) != model(changed)).any(-1)
    assert differs.all()  # before position 9 and after it


def test_the_plain_recipe_reads_the_windows_of_train_py_and_learns(data):
    file = TokenFile(data, "train")
    wanted = []
    torch.manual_seed(0)
    model = plain.PlainTransformer(ModelConfig(257, 32, n_layer=1, n_head=1, n_embd=32))
    spy = SimpleNamespace(batch=lambda *key: wanted.append(key) or file.batch(*key))
    losses = list(itertools.islice(plain.train_plainly(model, spy, 4, seed=7), 150))
    assert wanted[:3] == [(7, 0, 4, 32), (7, 1, 4, 32), (7, 2, 4, 32)]
    assert losses[0] == pytest.approx(math.log(257), abs=0.1) and losses[-1] < 4


# --- Reading runs ---------------------------------------------------------------------------------


def trained(step: int, tokens_per_second: int) -> dict:
    return {"step": step, "loss": 1.0, "tokens_per_second": tokens_per_second}


def measured(step: int, nats: float) -> dict:
    return {"step": step, "nats": nats, "stderr": 0.1, "rows": 64, "curve": None}


def settings_of(objective: str, data_dir: str = "data/x") -> str:
    shape = dict(batch_size=2, context_length=5, n_layer=1, n_head=1, n_embd=8)  # 10 tokens a step
    return json.dumps(dict(objective=objective, data_dir=data_dir) | shape)


def write_run(folder: str, *log: dict, objective: str = "diffusion") -> Path:
    Path(folder).mkdir()
    Path(folder, "config.json").write_text(settings_of(objective))
    Path(folder, "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return Path(folder)


def test_the_clock_is_the_sum_of_the_stretches(tmp_path):
    run = runs.read_run(write_run(
        f"{tmp_path}/run", trained(1, 2), measured(1, 5.0), trained(2, 10), trained(4, 5),
        measured(4, 4.0), trained(6, 10), measured(5, 3.0)))
    assert [(p.step, p.tokens, p.seconds, p.nats) for p in run.points] == [
        (1, 10, 5.0, 5.0), (4, 40, 5 + 1 + 4, 4.0), (5, 50, 5 + 1 + 4 + 1, 3.0)]
    assert run.compiling == 5 - 1  # the other stretches have 1, 2, 1 seconds a step


def test_the_twin_is_read_at_equal_tokens_and_at_equal_time(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run("run", trained(1, 5), measured(1, 5.0), trained(2, 5), measured(2, 4.5),  # 2 s a step
              trained(6, 5), measured(6, 4.0))
    write_run("twin", trained(2, 10), measured(2, 4.0), trained(6, 10), measured(6, 2.0),  # 1 s
              objective="autoregressive")
    assert quality.main(["twin", "run", "twin"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["rows"]
    # Tokens 10, 20, 60: before the twin's first evaluation, at it, at its last. Seconds 2, 4, 12:
    # at its first, half way between the two, after its end.
    assert [row["nll_at_equal_tokens"] for row in rows] == [None, 4.0, 2.0]
    assert [row["nll_at_equal_time"] for row in rows] == [4.0, 3.0, None]
    assert table[3].split() == ["20", "0.07", "4.500", "|", "4.000", "+0.500|", "3.000", "+1.500",
                                "64"]
    assert "ends at 2.000 +- 0.100 after 60 tokens" in table[-1]


@pytest.mark.parametrize("path, text, says", [
    ("run/log.jsonl", None, "log.jsonl: No such file"),
    ("run/config.json", None, "config.json: No such file"),
    ("twin/config.json", None, "twin/config.json: No such file"),
    ("run/log.jsonl", "{", "no readable log"),
    ("run/log.jsonl", "", "no readable log"),
    ("run/log.jsonl", "[1]\n2\n", "no readable log"),
    ("run/config.json", "[]", "no readable log"),
    ("run/log.jsonl", json.dumps(trained(1, 5)), "was never evaluated"),
    ("twin/config.json", settings_of("diffusion"), "second"),
    ("run/config.json", settings_of("autoregressive"), "first"),
    ("twin/config.json", settings_of("autoregressive", "y"), "data_dir y is not data/x"),
])
def test_folders_that_do_not_compare_get_one_line(tmp_path, monkeypatch, capsys, path, text, says):
    monkeypatch.chdir(tmp_path)
    write_run("run", trained(1, 5), measured(1, 5.0))
    write_run("twin", trained(1, 5), measured(1, 4.0), objective="autoregressive")
    Path(path).unlink()
    if text is not None:
        Path(path).write_text(text)
    assert quality.main(["twin", "run", "twin"]) == 2
    output, error = capsys.readouterr()
    assert output == "" and error.count("\n") == 1
    assert error.startswith("experiments.quality: ") and says in error


# --- Time to loss ---------------------------------------------------------------------------------

SHORT = {name: value for name, value in tiny_runs.TINY.items()
         if name not in ("steps", "log_interval", "eval_interval", "final_eval_rows")}
FLAGS = ["time-to-loss", "tiny.toml", *(f"--{name}={value}" for name, value in SHORT.items())]


def test_time_to_loss_says_when_train_py_is_where_the_plain_recipe_ends(workplace, started, capsys):
    flags = ["--minutes=0.005", "--steps=40", "--measurements=4", "--out-dir=ours"]
    assert quality.main(FLAGS + flags) == 0
    assert len(started) == 1 and "--steps=40" in started[0]
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    ours = result["ours"]
    goal = result["plain"][-1]
    assert [point["step"] for point in ours] == [10, 20, 30, 40]
    assert {point["rows"] for point in ours + result["plain"]} == {8}
    assert goal["seconds"] >= 0.3 and result["goal"] == goal["nats"]
    assert goal["tokens"] == goal["step"] * 8 * 32
    # A fraction of a second of AdamW at 3e-4 is no match: the table marks where we are below it.
    reached = next(point for point in ours if point["nats"] <= goal["nats"])
    assert result["minutes"] == reached["seconds"] / 60
    assert result["ratio"] == pytest.approx(goal["seconds"] / reached["seconds"])
    assert result["ratio_without_compiling"] >= result["ratio"]
    marked = [line.split() for line in table if "<- reached" in line]
    assert [line[:2] for line in marked] == [["ours", str(reached["step"])]]
    assert runs.read_run(Path("ours")).points[-1].nats == ours[-1]["nats"]
    # What the plain recipe has is measured on the windows and masks of train.py.
    x_0 = torch.from_numpy(TokenFile("data/sotu-bytes", "val").spread(8, 32))
    torch.manual_seed(1)
    model = plain.PlainTransformer(ModelConfig(257, 32, n_layer=2, n_head=2, n_embd=32))
    steps = plain.train_plainly(model, TokenFile("data/sotu-bytes", "train"), 8, seed=1)
    next(itertools.islice(steps, goal["step"] - 1, None))
    assert nelbo(model, x_0, 257).nats == pytest.approx(goal["nats"], abs=1e-4)


def test_the_steps_are_chosen_to_fit_the_minutes(workplace, monkeypatch):
    commands = []

    def run(command, env):
        assert command[:2] == [sys.executable, str(runs.TRAIN)]
        assert not list(Path(env["TORCHINDUCTOR_CACHE_DIR"]).iterdir())  # compiles from nothing
        commands.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(quality.subprocess, "run", run)
    points = [runs.Point(6, 768, 16.0, 5.0, 0.1, 2)]
    monkeypatch.setattr(quality, "read_run", lambda folder: runs.Run({}, points, 10.0))
    # 10 seconds of compiling, then 1 second a step: 50 steps in a minute.
    assert quality.affordable_steps(Path("tiny.toml"), [], workplace / "six", minutes=1) == 50
    assert quality.affordable_steps(Path("tiny.toml"), [], workplace / "again", minutes=0.1) == 1
    assert "--max-steps=6" in commands[0]


def test_not_reached_is_said_and_is_no_error(workplace, started, monkeypatch, capsys):
    goal = [runs.Point(9, 90, 3.0, 0.5, 0.1, 8)]
    monkeypatch.setattr(quality, "train_plain", lambda *_: goal)
    assert quality.main(FLAGS + ["--steps=4", "--measurements=1"]) == 0
    *_, said, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert "has not reached it" in said and result["minutes"] is result["ratio"] is None


def test_a_mistake_that_train_py_finds_is_said_once(workplace, capfd):
    with pytest.raises(SystemExit, match="2"):
        quality.main(FLAGS + ["--steps=4", "--data-dir=nowhere"])
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and error.startswith("train.py: no nowhere/meta.json")


def test_a_plain_run_that_diverges_stops(workplace, started, monkeypatch, capsys):
    monkeypatch.setattr(quality, "train_plainly", lambda *_: iter([math.nan]))
    assert quality.main(FLAGS + ["--steps=2"]) == 1
    error = "experiments.quality: the plain recipe's loss of step 1 is nan\n"
    assert capsys.readouterr().err == error


# --- Words ---------------------------------------------------------------------------------------


def test_words_are_known_from_the_training_text(workplace, capsys):
    Path("written.txt").write_text("The lazy dog qzx'd the FOX.")
    assert words.main(["data/sotu-bytes", "written.txt"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["written"] == {"share": 5 / 7, "words": 7}
    assert result["shuffled"]["share"] < 0.5 < 0.9 < result["validation"]["share"]
