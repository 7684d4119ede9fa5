"""Training: resuming, processes and evaluation change nothing, and what fails fails in one line."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import load_checkpoint, read_checkpoint_file
from prepare_data import write_dataset
from train import Muon, TrainConfig, main, orthogonalize, save, train

ROOT = Path(__file__).parent.parent
TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 60
TINY = dict(n_layer=2, n_head=2, n_embd=32, context_length=32, batch_size=8, steps=12, warmup_steps=2,
            log_interval=4, eval_interval=6, eval_rows=8, final_eval_rows=16,
            compile=False, device="cpu", precision="float32")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(iter([("train", [TEXT]), ("val", [TEXT[:2000]])]), "byte", folder, "test")
    return folder


def run(data: Path, out_dir: Path, **changes) -> Path:
    assert train(TrainConfig(data_dir=str(data), out_dir=str(out_dir), **TINY | changes)) == 0
    return out_dir


def state(out_dir: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint_file(out_dir / "state.pt")[0]


def log(out_dir: Path) -> list[dict]:
    """The lines of log.jsonl without those fields that depend on the clock."""
    lines = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    clocked = ("seconds", "tokens_per_second", "mfu")
    return [{key: value for key, value in line.items() if key not in clocked} for line in lines]


def flags(data: Path, out_dir: Path, **changes) -> list[str]:
    settings = TINY | dict(data_dir=data, out_dir=out_dir) | changes
    return [f"--{name}={value}" for name, value in settings.items()]


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("stop", [6, 7])  # at an evaluation, and between two lines of the log
def test_resumed_run_is_the_uninterrupted_run_bit_for_bit(data, tmp_path, optimizer, stop):
    whole = run(data, tmp_path / "whole", optimizer=optimizer)
    parts = run(data, tmp_path / "parts", optimizer=optimizer, max_steps=stop)
    assert read_checkpoint_file(parts / "state.pt")[1]["step"] == stop
    run(data, parts, optimizer=optimizer, resume=True)
    assert_same(state(whole), state(parts))
    assert log(whole) == log(parts)
    assert_same(read_checkpoint_file(whole / "model.pt")[0], read_checkpoint_file(parts / "model.pt")[0])


def test_resuming_a_finished_run_changes_nothing(data, tmp_path):
    out_dir = run(data, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out_dir.glob("*.pt")} | {"log": log(out_dir)}
    run(data, out_dir, resume=True)
    assert before == {path.name: path.read_bytes() for path in out_dir.glob("*.pt")} | {"log": log(out_dir)}


def test_evaluating_and_saving_do_not_change_training(data, tmp_path):
    often = run(data, tmp_path / "often", eval_interval=1)
    never = run(data, tmp_path / "never", eval_interval=99)
    assert_same(state(often), state(never))


@pytest.mark.parametrize("masking", [
    {}, dict(prefix_length_max=9), dict(mask_levels=10), dict(objective="mlm"),
    dict(objective="autoregressive"),
], ids=str)
def test_micro_batches_add_up_to_the_batch(data, tmp_path, masking):
    whole = run(data, tmp_path / "whole", steps=4, **masking)
    parts = run(data, tmp_path / "parts", steps=4, micro_batch_size=2, **masking)
    for a, b in zip(log(whole), log(parts), strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), abs=1e-5)
    torch.testing.assert_close(state(whole), state(parts), atol=1e-4, rtol=1e-3)


def test_two_processes_train_the_same_model_as_one(data, tmp_path):
    settings = dict(steps=6, n_layer=3)  # three matrices of a shape: they do not share out evenly
    one = run(data, tmp_path / "one", **settings)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               str(ROOT / "train.py"), *flags(data, tmp_path / "two", **settings)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    for a, b in zip(log(one), log(tmp_path / "two"), strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), abs=1e-5)
        assert a.get("nats", 0) == pytest.approx(b.get("nats", 0), abs=1e-4)
    torch.testing.assert_close(state(one), state(tmp_path / "two"), atol=1e-4, rtol=1e-3)


def test_a_run_that_fails_gives_the_signals_back(data, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise FloatingPointError("while SIGTERM was caught")

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr("train.corrupt", fail)
    with pytest.raises(FloatingPointError):
        run(data, tmp_path / "out")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_step_is_compiled_once_whatever_happens_between_steps(data, tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run(data, tmp_path / "out", compile=True, steps=200, eval_interval=25, n_layer=1, prefix_length_max=5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_without_a_compiler_it_trains_uncompiled_with_one_warning(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(torch, "compile", None)
    run(data, tmp_path / "out", compile=True, steps=2)
    assert capsys.readouterr().err == (
        "train.py: no C++ compiler found, so nothing is compiled; g++ would be faster\n")


def test_the_first_loss_is_about_ln_V(data, tmp_path):
    out_dir = run(data, tmp_path / "out", steps=1, log_interval=1)
    assert log(out_dir)[0]["loss"] == pytest.approx(math.log(257), abs=0.03)


def test_it_learns_one_text_by_heart(tmp_path):
    # A corpus of exactly one context: every row of every batch is the same text. The given prefix tells
    # hidden places apart (in an all-hidden row, rotary positions make every place look the same).
    text = "Fellow citizens of the Senate a"  # and an end-of-text token
    write_dataset(iter([("train", [text]), ("val", [text])]), "byte", tmp_path / "data", "one line")
    out_dir = run(tmp_path / "data", tmp_path / "out", steps=300, prefix_length=8, weighting="nelbo",
                  muon_learning_rate=0.03, learning_rate=0.01)
    first, *_, last, _ = log(out_dir)
    assert first["loss"] > 4 and last["loss"] < 0.05


def test_averaged_weights_with_no_memory_are_the_weights(data, tmp_path):
    tensors = state(run(data, tmp_path / "out", ema_decay=0.0))
    for name in tensors:
        if name.startswith("ema."):
            torch.testing.assert_close(tensors[name], tensors[name.replace("ema.", "model.")])


def test_fine_tuning_starts_from_the_weights_it_is_given(data, tmp_path):
    first = run(data, tmp_path / "first")
    model, _ = load_checkpoint(first)
    second = run(data, tmp_path / "second", init_from=str(first), steps=1, learning_rate=1e-12,
                 muon_learning_rate=1e-12, context_length=16, prefix_length=3)
    torch.testing.assert_close(load_checkpoint(second)[0].state_dict(), model.state_dict())


def test_a_run_stopped_before_its_first_evaluation_can_be_sampled(data, tmp_path):
    _, info = load_checkpoint(run(data, tmp_path / "out", max_steps=2))
    assert info["step"] == 2 and info["evaluation"] is None


def test_learning_rates_rise_stay_and_fall():
    cfg = TrainConfig(steps=100, warmup_steps=9, decay_share=0.5)
    assert [cfg.rate(step) for step in (0, 4, 9, 49, 50, 75, 99)] == [0.1, 0.5, 1, 1, 1, 0.5, 0.02]


def test_orthogonalize_moves_singular_values_near_one_and_keeps_directions():
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 24, 64), (2, 64, 24), (1, 32, 32)):
        matrices = torch.randn(shape, generator=generator)
        U, S, V = torch.linalg.svd(matrices, full_matrices=False)
        moved = U.mT @ orthogonalize(matrices) @ V.mT  # diagonal if the directions were kept
        values = moved.diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(moved, torch.diag_embed(values), atol=1e-4, rtol=0)
        large = S > 0.1 * S[:, :1]  # five iterations cannot lift the tiniest ones all the way
        assert (0.6 < values[large]).all() and (values < 1.25).all()


def test_muon_is_the_stock_muon():
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 16), (16, 24), (24, 16)]
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    stock = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = [Muon(ours, lr=0.1, weight_decay=0.2, dtype=torch.bfloat16),
                  torch.optim.Muon(stock, lr=0.1, weight_decay=0.2, momentum=0.95)]
    for _ in range(3):
        for a, b in zip(ours, stock, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, stock, atol=5e-3, rtol=0)  # bfloat16 products


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_finish_the_step_save_and_say_how_to_go_on(data, tmp_path, number, code):
    command = [sys.executable, "-u", str(ROOT / "train.py"), *flags(data, tmp_path / "out", steps=100000)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while "loss" not in process.stdout.readline():
            pass
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "--resume" in output and errors == ""
    assert read_checkpoint_file(tmp_path / "out/state.pt")[1]["step"] > 0


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(data, tmp_path, capsys):
    out_dir = run(data, tmp_path / "out", max_steps=6)
    before = state(out_dir)
    tensors, info = read_checkpoint_file(out_dir / "state.pt")
    tensors["model.embedding.weight"][0, 0] = math.nan
    poisoned = tmp_path / "poisoned"
    poisoned.mkdir()
    (poisoned / "log.jsonl").write_bytes((out_dir / "log.jsonl").read_bytes())
    save(poisoned / "state.pt", tensors, info)
    size = (poisoned / "state.pt").stat().st_size
    capsys.readouterr()
    assert main(flags(data, poisoned, resume=True)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "loss of step 6 is nan" in error
    assert (poisoned / "state.pt").stat().st_size == size
    assert_same(before, state(out_dir))


@pytest.mark.parametrize("changes, says", [
    (dict(data_dir="nowhere"), "no nowhere/meta.json"),
    (dict(batch_size=7, micro_batch_size=2), "batch_size 7 is no multiple of 2 rows"),
    (dict(batch_size=6, micro_batch_size=3), "split an antithetic pair"),
    (dict(context_length=100000), "fewer than one context"),
    (dict(device="cuda"), "device cuda is not available here"),
    (dict(resume=True), "state.pt does not exist"),
    (dict(init_from="nowhere"), "nowhere/model.pt does not exist"),
    (dict(n_embd=30, n_head=4), "n_embd 30 must be a multiple"),
    (dict(stepz=3), "did you mean --steps"),
    (dict(steps="few"), "steps must be int, not 'few'"),
    (dict(objective="gpt"), "objective must be"),
])
def test_mistakes_get_one_line_and_exit_code_2_and_write_nothing(data, tmp_path, capsys, changes, says):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has the device whose absence is tested")
    assert main(flags(data, tmp_path / "out", **changes)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("train.py: ") and says in error
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_overwritten_nor_resumed_as_another_one(data, tmp_path, capsys):
    out_dir = run(data, tmp_path / "out", max_steps=3)
    before = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    assert main(flags(data, out_dir)) == 2
    assert "holds a run" in capsys.readouterr().err
    assert main(flags(data, out_dir, resume=True, learning_rate=0.5)) == 2
    assert "cannot resume with learning_rate 0.5: the run has 0.01" in capsys.readouterr().err
    other = dataclasses.asdict(TrainConfig(**TINY))["n_embd"] * 2
    assert main(flags(data, tmp_path / "new", init_from=out_dir, n_embd=other)) == 2
    assert "asked for is a" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in out_dir.iterdir()}
