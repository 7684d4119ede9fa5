"""The plain recipe and the classical stack are what they say, and comparisons compare like with like."""

import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from bench import plain, quality, transformers_baseline
from diffusion import nelbo
from model import ModelConfig, Transformer
from prepare_data import TokenFile, write_dataset
from tests.test_sampling import seeded

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 60
CONFIG = ModelConfig(20, 16, n_layer=2, n_head=2, n_embd=32)
TINY = ["--n_layer=1", "--n_head=1", "--n_embd=32", "--context_length=32", "--batch_size=4",
        "--warmup_steps=2", "--eval_rows=8", "--compile=false", "--device=cpu", "--precision=float32"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(iter([("train", [TEXT]), ("val", [TEXT[:2000]])]), "byte", folder, "test")
    return folder


@pytest.fixture
def model() -> plain.PlainTransformer:
    torch.manual_seed(0)
    return plain.PlainTransformer(CONFIG)


# --- The plain recipe -----------------------------------------------------------------------------


def test_the_plain_loss_is_the_mean_cross_entropy_of_the_hidden_tokens(model):
    x_0 = torch.randint(20, (3, 16), generator=seeded(0))
    mask = plain.draw_mask(3, 16, seeded(1))
    shown = torch.where(mask, 20, x_0)
    p = model(shown).softmax(-1)
    hidden = [(b, t) for b in range(3) for t in range(16) if mask[b, t]]
    by_hand = -sum(p[b, t, x_0[b, t]].log().item() for b, t in hidden) / len(hidden)
    assert plain.plain_loss(model, x_0, mask, 20).item() == pytest.approx(by_hand, abs=1e-5)
    flat = torch.tensor([b * 16 + t for b, t in hidden])
    torch.testing.assert_close(model(shown, flat), model(shown)[mask])


def test_the_plain_mask_ratio_is_uniform():
    share = plain.draw_mask(4000, 200, seeded(0)).float().mean(1).sort().values
    assert (share - torch.linspace(0, 1, 4000)).abs().max() < 0.03  # its CDF is the diagonal


def test_at_first_the_plain_network_knows_nothing_and_sees_both_ways(model):
    x_0 = torch.randint(20, (64, 16), generator=seeded(0))
    assert nelbo(model, x_0, 20).nats == pytest.approx(math.log(20), abs=0.05)
    changed = x_0[:1].clone()
    changed[0, 9] = (changed[0, 9] + 1) % 20
    differs = (model(x_0[:1]) != model(changed)).any(-1)
    assert differs.all()  # before place 9 and after it


def test_the_plain_recipe_reads_the_windows_of_train_py_and_learns(data):
    file, asked = TokenFile(data, "train"), []
    torch.manual_seed(0)
    model = plain.PlainTransformer(ModelConfig(257, 32, n_layer=1, n_head=1, n_embd=32))
    spy = SimpleNamespace(batch=lambda *key: asked.append(key) or file.batch(*key))
    losses = list(itertools.islice(plain.train_plainly(model, spy, 4, seed=7), 150))
    assert asked[:3] == [(7, 0, 4, 32), (7, 1, 4, 32), (7, 2, 4, 32)]
    assert losses[0] == pytest.approx(math.log(257), abs=0.1) and losses[-1] < 4


# --- Reading runs ---------------------------------------------------------------------------------


def write_run(folder: Path, log: list[dict], **config) -> Path:
    folder.mkdir()
    shape = dict(context_length=5, n_layer=1, n_head=1, n_embd=8)
    config = dict(objective="diffusion", data_dir="data/x", batch_size=2) | shape | config  # 10 tokens a step
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder


def trained(step: int, tokens_per_second: int) -> dict:
    return {"step": step, "loss": 1.0, "tokens_per_second": tokens_per_second}


def measured(step: int, nats: float) -> dict:
    return {"step": step, "nats": nats, "stderr": 0.1, "rows": 64, "curve": None}


def test_the_clock_is_the_sum_of_the_stretches(tmp_path):
    run = quality.read_run(write_run(tmp_path / "run", [
        trained(1, 2), measured(1, 5.0), trained(2, 10), trained(4, 5), measured(4, 4.0), trained(6, 10),
        measured(5, 3.0)]))
    assert [(p.step, p.tokens, p.seconds, p.nats) for p in run.points] == [
        (1, 10, 5.0, 5.0), (4, 40, 5 + 1 + 4, 4.0), (5, 50, 5 + 1 + 4 + 1, 3.0)]
    assert run.compiling == 5 - 1  # the other stretches have 1, 2, 1 seconds a step


def test_the_twin_is_read_at_equal_tokens_and_at_equal_time(tmp_path, capsys):
    run = write_run(tmp_path / "run", [  # 2 seconds a step
        trained(1, 5), measured(1, 5.0), trained(2, 5), measured(2, 4.5), trained(6, 5), measured(6, 4.0)])
    twin = write_run(tmp_path / "twin", objective="autoregressive", log=[  # 1 second a step
        trained(2, 10), measured(2, 4.0), trained(6, 10), measured(6, 2.0)])
    assert quality.main(["twin", str(run), str(twin)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["rows"]
    # Tokens 10, 20, 60: before the twin's first evaluation, at it, at its last. Seconds 2, 4, 12: at its
    # first, half way between the two, after its end.
    assert [row["nll_at_equal_tokens"] for row in rows] == [None, 4.0, 2.0]
    assert [row["nll_at_equal_time"] for row in rows] == [4.0, 3.0, None]
    assert table[3].split() == ["20", "0.07", "4.500", "|", "4.000", "+0.500|", "3.000", "+1.500", "64"]
    assert "ends at 2.000 +- 0.100 after 60 tokens" in table[-1]


@pytest.mark.parametrize("change, says", [
    (lambda run, twin: (run / "log.jsonl").unlink(), "log.jsonl: No such file"),
    (lambda run, twin: (run / "config.json").unlink(), "config.json: No such file"),
    (lambda run, twin: (run / "log.jsonl").write_text("{"), "no readable log"),
    (lambda run, twin: (run / "log.jsonl").write_text(""), "no readable log"),
    (lambda run, twin: (run / "log.jsonl").write_text("[1]\n2\n"), "no readable log"),
    (lambda run, twin: (run / "config.json").write_text("[]"), "no readable log"),
    (lambda run, twin: (run / "log.jsonl").write_text(json.dumps(trained(1, 5))), "was never evaluated"),
    (lambda run, twin: twin.rename(run.parent / "elsewhere"), "config.json: No such file"),
    (lambda run, twin: (twin / "config.json").write_text((run / "config.json").read_text()), "second"),
    (lambda run, twin: (run / "config.json").write_text((twin / "config.json").read_text()), "first"),
    (lambda run, twin: (twin / "config.json").write_text(
        (twin / "config.json").read_text().replace("data/x", "data/y")), "data_dir data/y is not data/x"),
])
def test_folders_that_do_not_compare_get_one_line(tmp_path, capsys, change, says):
    run = write_run(tmp_path / "run", [trained(1, 5), measured(1, 5.0)])
    twin = write_run(tmp_path / "twin", [trained(1, 5), measured(1, 4.0)], objective="autoregressive")
    change(run, twin)
    assert quality.main(["twin", str(run), str(twin)]) == 2
    output, error = capsys.readouterr()
    assert output == "" and error.count("\n") == 1 and error.startswith("bench.quality: ") and says in error


# --- Time to loss ---------------------------------------------------------------------------------


@pytest.fixture
def in_process(monkeypatch):
    """train.py runs in this process, which saves seconds of importing; the list is of its flags."""
    asked = []

    def run(command, env):
        assert command[:2] == [sys.executable, str(quality.TRAIN)]
        assert not list(Path(env["TORCHINDUCTOR_CACHE_DIR"]).iterdir())
        asked.append(command[2:])
        return SimpleNamespace(returncode=train.main(command[2:]))

    monkeypatch.setattr(quality.subprocess, "run", run)
    monkeypatch.setattr(train, "matmul_ceiling", lambda device, dtype: 1e11)
    return asked


@pytest.fixture
def config(data, tmp_path) -> str:
    (tmp_path / "tiny.toml").write_text(f'data_dir = "{data}"\n')
    return str(tmp_path / "tiny.toml")


def test_time_to_loss_says_when_train_py_is_where_the_plain_recipe_ends(config, data, tmp_path, in_process,
                                                                         capsys):
    flags = ["time-to-loss", config, *TINY, "--minutes=0.005", "--steps=40", "--measurements=4",
             f"--out-dir={tmp_path / 'out'}"]
    assert quality.main(flags) == 0
    assert len(in_process) == 1 and "--steps=40" in in_process[0]
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    ours, goal = result["ours"], result["plain"][-1]
    assert [point["step"] for point in ours] == [10, 20, 30, 40]
    assert [point["rows"] for point in ours + result["plain"]] == [8] * (4 + len(result["plain"]))
    assert goal["seconds"] >= 0.3 and result["goal"] == goal["nats"]
    assert goal["tokens"] == goal["step"] * 4 * 32
    # A fraction of a second of AdamW at 3e-4 is no match: the table marks the first evaluation below it.
    reached = next(point for point in ours if point["nats"] <= goal["nats"])
    assert result["minutes"] == reached["seconds"] / 60
    assert result["ratio"] == pytest.approx(goal["seconds"] / reached["seconds"])
    assert result["ratio_without_compiling"] >= result["ratio"]
    marked = [line.split() for line in table if "<- reached" in line]
    assert [line[:2] for line in marked] == [["ours", str(reached["step"])]]
    assert quality.read_run(tmp_path / "out").points[-1].nats == ours[-1]["nats"]
    # The plain figures are those of the same windows and masks that train.py measures on.
    x_0 = torch.from_numpy(TokenFile(data, "val").spread(8, 32))
    torch.manual_seed(1)
    model = plain.PlainTransformer(ModelConfig(257, 32, 1, 1, 32))
    for step, _ in enumerate(plain.train_plainly(model, TokenFile(data, "train"), 4, seed=1), start=1):
        if step == goal["step"]:
            break
    assert nelbo(model, x_0, 257).nats == pytest.approx(goal["nats"], abs=1e-4)


def test_the_steps_are_chosen_to_fit_the_minutes(config, in_process, tmp_path, monkeypatch, capsys):
    points = [quality.Point(6, 768, 16.0, 5.0, 0.1, 2)]
    monkeypatch.setattr(quality, "read_run", lambda folder: quality.Run({}, points, 10.0))
    # 10 seconds of compiling, then 1 second a step: 50 steps in a minute.
    assert quality.affordable_steps(Path(config), TINY, tmp_path / "six", minutes=1) == 50
    assert quality.affordable_steps(Path(config), TINY, tmp_path / "again", minutes=0.1) == 1
    assert "--max-steps=6" in in_process[0]


def test_not_reached_is_said_and_is_no_error(config, in_process, monkeypatch, capsys):
    monkeypatch.setattr(quality, "train_plain", lambda *_: [quality.Point(9, 90, 3.0, 0.5, 0.1, 8)])
    assert quality.main(["time-to-loss", config, *TINY, "--steps=4", "--measurements=1"]) == 0
    *_, said, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert "has not reached it" in said and result["minutes"] is result["ratio"] is None


def test_a_mistake_that_train_py_finds_is_said_once(config, capfd):
    with pytest.raises(SystemExit, match="2"):
        quality.main(["time-to-loss", config, *TINY, "--steps=4", "--data-dir=nowhere"])
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and error.startswith("train.py: no nowhere/meta.json")


def test_a_plain_run_that_diverges_stops(config, in_process, monkeypatch, capsys):
    monkeypatch.setattr(quality, "train_plainly", lambda *_: iter([math.nan]))
    assert quality.main(["time-to-loss", config, *TINY, "--steps=2"]) == 1
    assert capsys.readouterr().err == "bench.quality: the plain recipe's loss of step 1 is nan\n"


# --- The frontier and the command line ------------------------------------------------------------


@pytest.fixture
def checkpoints(tmp_path) -> list[str]:
    torch.manual_seed(0)
    for name, causal in (("run", False), ("twin", True)):
        model = Transformer(ModelConfig(257, 16, 1, 1, 16, causal))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        (tmp_path / name).mkdir()
        train.save(tmp_path / name / "model.pt", model.state_dict(),
                   {"format": 1, "model": vars(model.config), "tokenizer": "byte",
                    "config": {"objective": "autoregressive" if causal else "diffusion"}})
    return [f"--checkpoint={tmp_path / 'run'}", f"--judge={tmp_path / 'twin'}"]


def test_the_frontier_has_a_row_for_each_number_of_steps_and_temperature(checkpoints, data, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert quality.main(["frontier", *checkpoints, f"--data-dir={data}", "--num-samples=4", "--steps", "2",
                         "5", "--temperatures", "0.05", "1", "--order", "confidence, gumbel 1",
                         f"--picture={tmp_path / 'frontier.png'}"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    written = [("the twin", 0.05), ("the twin", 1.0), ("2 steps", 0.05), ("2 steps", 1.0), ("5 steps", 0.05),
               ("5 steps", 1.0)]
    assert [(row["writer"], row["temperature"]) for row in rows] == [("real text", 1.0), *written]
    assert rows[0]["words"] > max(row["words"] for row in rows[1:])  # real ones, those the window cuts aside
    for cold, hot in zip(rows[1::2], rows[2::2], strict=True):
        assert cold["entropy"] < hot["entropy"]
    assert rows[1]["judge"] < rows[2]["judge"] - 1  # what the judge itself writes cautiously, it finds likely
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_the_frontier_refuses_a_judge_that_is_no_twin(checkpoints, data, capsys):
    run = checkpoints[0].split("=")[1]
    assert quality.main(["frontier", checkpoints[0], f"--judge={run}", f"--data-dir={data}"]) == 2
    assert quality.main(["frontier", checkpoints[0], "--judge=nowhere", f"--data-dir={data}"]) == 2
    twin, missing = capsys.readouterr().err.splitlines()
    assert "is no autoregressive twin" in twin and "nowhere/model.pt does not exist" in missing


@pytest.mark.parametrize("arguments, says", [
    ([], "required: time-to-loss, twin or frontier"),
    (["speed"], "invalid choice: 'speed'"),
    (["time-to-loss"], "required: config"),
    (["time-to-loss", "nowhere.toml"], "nowhere.toml: No such file"),
    (["time-to-loss", "configs/quickstart.toml", "--minuts=3"], "unknown argument '--minuts=3'"),
    (["time-to-loss", "configs/quickstart.toml", "--minutes=0"], "--minutes must be positive, not 0.0"),
    (["time-to-loss", "configs/quickstart.toml", "--steps=0"], "--steps must be positive, not 0"),
    (["time-to-loss", "configs/mlm.toml"], "a new run of objective diffusion"),
    (["time-to-loss", "configs/quickstart.toml", "--picture=no/such.png"], "there is no folder no"),
    (["twin", "a"], "required: twin"),
    (["twin", "a", "b", "--steps=3"], "unknown argument '--steps=3'"),
    (["frontier", "--temperatures", "1", "-1"], "--temperatures must be positive, not -1.0"),
    (["frontier", "--order=best"], "invalid choice: 'best'"),
    (["frontier", "--checkpoint=nowhere"], "nowhere/model.pt does not exist"),
])
def test_mistakes_get_one_line_and_exit_code_2(capsys, arguments, says):
    try:
        code = quality.main(arguments)
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and error.startswith("bench.quality") and says in error


def test_a_picture_without_matplotlib_is_refused_before_the_work(monkeypatch, capsys):
    monkeypatch.setattr(quality.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        quality.main(["twin", "a", "b", "--picture=x.png"])
    assert capsys.readouterr().err == "bench.quality: --picture needs matplotlib: pip install matplotlib\n"


# --- The classical stack --------------------------------------------------------------------------


def test_the_classical_stack_hides_tokens_and_scores_them_as_we_do():
    pytest.importorskip("transformers")
    config = ModelConfig(20, 16, n_layer=1, n_head=2, n_embd=32)
    torch.manual_seed(0)
    model, collator = transformers_baseline.roberta(config, mlm_probability=0.5)
    assert model.config._attn_implementation == "sdpa"
    clean = torch.randint(20, (40, 16), generator=seeded(0)) + transformers_baseline.SPECIAL
    none = torch.zeros(16, dtype=torch.int64)
    batch = collator([{"input_ids": row, "special_tokens_mask": none} for row in clean])
    hidden = batch["labels"] != -100
    assert hidden.float().mean() == pytest.approx(0.5, abs=0.06)
    mask_token = 20 + transformers_baseline.SPECIAL
    assert torch.equal(batch["input_ids"], clean.masked_fill(hidden, mask_token))
    assert torch.equal(batch["labels"][hidden], clean[hidden])
    output = model(input_ids=batch["input_ids"], labels=batch["labels"])
    p = output.logits.softmax(-1)[hidden].gather(1, clean[hidden][:, None])
    assert output.loss.item() == pytest.approx(-p.log().mean().item(), abs=1e-5)
    ours = sum(p.numel() for p in Transformer(config).blocks.parameters())
    theirs = sum(p.numel() for p in model.roberta.encoder.parameters() if p.dim() == 2)
    assert ours == theirs  # the same matrices


def test_the_classical_stack_is_measured_beside_ours(capsys, monkeypatch):
    pytest.importorskip("transformers")
    small = {"tiny": (ModelConfig(20, 16, n_layer=1, n_head=2, n_embd=32), 4, 4)}
    monkeypatch.setattr(transformers_baseline, "SHAPES", small)
    assert transformers_baseline.main(["--shape=tiny", "--repeats=2", "--warm-up=1", "--no-compile",
                                       "--device=cpu", "--precision=float32"]) == 0
    output, progress = capsys.readouterr()
    result = json.loads(output.splitlines()[-1])
    speeds = {name: way["tokens_per_second"] for name, way in result["ways"].items()}
    assert list(speeds) == ["masked", "roberta"] and min(speeds.values()) > 0
    assert result["ratio"] == speeds["masked"] / speeds["roberta"]
    assert [line.split()[4] for line in progress.splitlines()] == ["masked:", "roberta:"] * 3


@pytest.mark.parametrize("arguments, says", [
    (["--repeats=0"], "must be at least 1"), (["--rows=0"], "must be at least 1"),
    (["--mlm-probability=1.5"], "must be in (0, 1], not 1.5"), (["--shape=huge"], "invalid choice: 'huge'"),
])
def test_the_classical_stack_answers_mistakes_in_one_line(capsys, monkeypatch, arguments, says):
    monkeypatch.setattr(transformers_baseline.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(SystemExit, match="2"):
        transformers_baseline.main(arguments)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("bench.transformers_baseline: ") and says in error


def test_without_transformers_one_line_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(transformers_baseline.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        transformers_baseline.main([])
    assert capsys.readouterr().err == ("bench.transformers_baseline: the classical stack is not installed: "
                                       "pip install transformers\n")
