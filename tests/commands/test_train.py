"""Training: resuming, processes and evaluation change nothing, and a mistake gets one line."""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import TINY, everything, flags, log, run, state

import train
from diffusion import Bound, Curve, evaluate
from plumbing.checkpoint import load_checkpoint, read_tensors
from plumbing.machine import Machine
from plumbing.muon import Muon
from prepare_data import TokenFile, write_dataset

TRAIN = str(Path(train.__file__))


# ---- what changes nothing ------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("stop", [6, 7])  # at an evaluation, and between two lines of the log
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(data, tmp_path, optimizer, stop):
    whole = run(data, tmp_path / "whole", optimizer=optimizer)
    parts = run(data, tmp_path / "parts", optimizer=optimizer, max_steps=stop)
    assert read_tensors(parts / "state.safetensors")[1]["step"] == stop
    for _ in range(2):  # the second time it has ended, and nothing changes
        run(data, parts, optimizer=optimizer, resume=True)
        assert everything(parts) == everything(whole)


def test_evaluating_and_saving_do_not_change_training(data, tmp_path):
    often = run(data, tmp_path / "often", eval_interval=1)
    never = run(data, tmp_path / "never", eval_interval=99)
    assert everything(often)[0] == everything(never)[0]


@pytest.fixture(params=[0, 1], ids=["read at once", "read a step late"])
def steps_late(request, monkeypatch) -> int:
    """When the loss of a step is read: at once as on a CPU, or while the next computes."""
    monkeypatch.setattr(Machine, "steps_late", request.param)
    return request.param


def test_numbers_read_late_are_the_same(data, tmp_path, monkeypatch):
    at_once = run(data, tmp_path / "at_once")
    monkeypatch.setattr(Machine, "steps_late", 1)
    parts = run(data, tmp_path / "parts", max_steps=7)
    run(data, parts, resume=True)
    assert everything(parts) == everything(at_once)


def assert_same_training(one: Path, other: Path) -> None:
    """As far as sums in another order are the same."""
    for a, b in zip(log(one), log(other), strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), abs=1e-5)
        assert a.get("nats", 0) == pytest.approx(b.get("nats", 0), abs=1e-4)
    torch.testing.assert_close(state(one), state(other), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("masking", [
    {}, dict(prefix_length_max=9), dict(mask_levels=10), dict(objective="mlm"),
    dict(objective="autoregressive"),
], ids=str)
def test_micro_batches_add_up_to_the_batch(data, tmp_path, masking):
    whole = run(data, tmp_path / "whole", steps=4, **masking)
    parts = run(data, tmp_path / "parts", steps=4, micro_batch_size=2, **masking)
    assert_same_training(whole, parts)


def test_two_processes_train_the_same_model_as_one(data, tmp_path):
    changes = dict(steps=6, n_layer=3)  # three matrices of a shape: they do not share out evenly
    one = run(data, tmp_path / "one", **changes)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               TRAIN, *flags(data, tmp_path / "two", **changes)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert_same_training(one, tmp_path / "two")


def test_the_step_is_compiled_once_whatever_happens_between_steps(data, tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run(data, tmp_path / "out", compile=True, steps=60, eval_interval=10, n_layer=1,
        prefix_length_max=5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_run_repeats_itself_bit_for_bit_compiled_and_on_two_threads(data, tmp_path):
    torch.set_num_threads(2)  # which would race to add the gradients of a token that occurs twice
    try:
        once, again = (everything(run(data, tmp_path / name, compile=True, batch_size=64, steps=8))
                       for name in ("once", "again"))
    finally:
        torch.set_num_threads(1)
    assert once == again


# ---- how it begins and ends ----------------------------------------------------------------------


def test_without_a_compiler_it_trains_with_one_warning(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(torch, "compile", None)
    run(data, tmp_path / "out", compile=True, steps=2)
    warning = "train.py: no C++ compiler found, so nothing is compiled; g++ would be faster\n"
    assert capsys.readouterr().err == warning


@pytest.mark.parametrize("said", [
    "No working C++ compiler found", "C++ compile error\n\nx.cpp:1: fatal error: Python.h: No"])
def test_a_compiler_that_does_not_work_is_one_warning(data, tmp_path, monkeypatch, capsys, said):
    def broken(function):
        def call(*arguments):
            raise torch._dynamo.exc.TorchDynamoException(said)

        return call

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr("shutil.which", lambda name: name)
    run(data, tmp_path / "out", compile=True, steps=2)
    errors = capsys.readouterr().err
    assert errors.startswith("train.py: torch.compile fails, so nothing is compiled: ")
    assert errors.count("\n") == 1 and said.splitlines()[-1] in errors


@pytest.mark.reliability
@pytest.mark.parametrize("compiler", ["/nowhere/c++", "/bin/false", "/bin/cat"])
def test_a_real_compiler_that_does_not_work_is_one_warning(data, tmp_path, compiler):
    env = os.environ | {"CXX": compiler, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "a cache")}
    command = [sys.executable, TRAIN, *flags(data, tmp_path / "out", compile=True, steps=2)]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("train.py: torch.compile fails, so nothing is compiled: ")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130),
                                          (signal.SIGHUP, 129)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(data, tmp_path, monkeypatch, capsys,
                                                                number, code, steps_late):
    average = train.average

    def interrupted(*arguments):
        if arguments[-1] == 4:  # in the middle of step 5
            signal.raise_signal(number)
        return average(*arguments)

    monkeypatch.setattr(train, "average", interrupted)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # if the tests run under nohup
    assert train.main(flags(data, tmp_path / "out")) == code
    printed = capsys.readouterr()
    assert f"stopped after step {5 + steps_late} of 12" in printed.out
    assert "--resume" in printed.out
    assert printed.err == ""
    assert read_tensors(tmp_path / "out/state.safetensors")[1]["step"] == 5 + steps_late


def test_nohup_is_obeyed(data, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(train, "report", lambda *rest: signal.raise_signal(signal.SIGHUP))
        run(data, tmp_path / "out", steps=4)
    finally:
        signal.signal(signal.SIGHUP, before)


class Exit(BaseException):
    pass


@pytest.mark.parametrize("steps", [[0], [4, 4]], ids=str)
def test_in_the_first_step_and_the_second_time_a_signal_ends_the_run_at_once(
        data, tmp_path, monkeypatch, capsys, steps):
    def leave(code):
        raise Exit(code)

    def interrupted(*arguments):
        for _ in range(steps.count(arguments[-1])):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(train, "average", interrupted)
    with pytest.raises(Exit, match="130"):
        train.main(flags(data, tmp_path / "out"))
    assert capsys.readouterr().err == "train.py: stopped\n"
    assert not (tmp_path / "out/state.safetensors").exists()


def test_a_run_goes_on_without_its_screen(data, tmp_path, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError  # or EIO, of a terminal that was closed

    for name, screen in (("closed", None), ("left", Gone())):
        monkeypatch.setattr(sys, "stdout", screen)
        run(data, tmp_path / name)
        assert read_tensors(tmp_path / name / "state.safetensors")[1]["step"] == 12


@pytest.mark.parametrize("environment", [
    {"WORLD_SIZE": "2"}, {"RANK": "1"}, {"WORLD_SIZE": "2", "RANK": "0"}, {"WORLD_SIZE": "two"},
    {"WORLD_SIZE": ""}, {"RANK": "-1"}, {"WORLD_SIZE": "0"},
], ids=str)
def test_what_another_launcher_left_in_the_environment_is_one_line(data, tmp_path, monkeypatch,
                                                                   capsys, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert train.main(flags(data, tmp_path / "out")) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("train.py: WORLD_SIZE=") and errors.count("\n") == 1
    assert "unset them, or start with torchrun" in errors and not (tmp_path / "out").exists()


def test_an_ended_run_says_so_and_changes_nothing(data, tmp_path, capsys):
    out = run(data, tmp_path / "out", max_steps=3)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    for _ in range(2):
        capsys.readouterr()
        run(data, out, max_steps=3, resume=True)
        assert "after step 3 of 12; --resume with a higher --max-steps" in capsys.readouterr().out
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    run(data, out, resume=True)
    assert capsys.readouterr().out.endswith("all 12 steps are done\n")


def test_what_changes_nothing_that_is_learned_may_change_on_resuming(data, tmp_path):
    whole = run(data, tmp_path / "whole")
    parts = run(data, tmp_path / "parts", max_steps=6)
    run(data, parts, resume=True, log_interval=1, eval_interval=3, final_eval_rows=4)
    assert everything(parts)[0] == everything(whole)[0]


def test_validation_leaves_out_the_prefix_that_is_never_hidden(data, tmp_path):
    for objective in ("diffusion", "autoregressive"):
        out = run(data, tmp_path / objective, objective=objective, prefix_length=20, steps=1)
        model, info = load_checkpoint(out)
        x_0 = torch.from_numpy(TokenFile(data, "val").spread(16, 32))
        bound = evaluate(model, x_0, 257, objective, prefix_length=20, curve_points=30)
        assert info["evaluation"]["nats"] == pytest.approx(bound.nats, abs=1e-5)
        assert objective == "autoregressive" or bound.curve.N == 12


def test_a_network_to_start_from_brings_its_shape(data, tmp_path):
    first = run(data, tmp_path / "first", n_layer=1, n_embd=16, n_head=1, context_length=16)
    short = [f"--{name}={value}" for name, value in TINY.items()
             if name not in ("n_layer", "n_embd", "n_head", "context_length")]
    assert train.main([*short, f"--data-dir={data}", f"--init-from={first}",
                       f"--out-dir={tmp_path}/second"]) == 0
    assert load_checkpoint(tmp_path / "second")[0].config == load_checkpoint(first)[0].config


def test_a_run_that_fails_gives_the_signals_back(data, tmp_path, monkeypatch):
    def fail(*arguments):
        assert signal.getsignal(signal.SIGTERM) not in before
        raise FloatingPointError("while SIGTERM was caught")

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(train, "draw_mask", fail)
    assert train.main(flags(data, tmp_path / "out")) == 1
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("limit", [dict(max_steps=1), dict(max_minutes=0)], ids=str)
def test_a_run_stopped_before_its_first_evaluation_can_be_sampled(data, tmp_path, limit, capsys):
    _, info = load_checkpoint(run(data, tmp_path / "out", **limit))
    assert (info["step"], info["evaluation"]) == (1, None)
    said = capsys.readouterr().out
    assert "stopped after step 1 of 12" in said and "--resume" in said


def test_fine_tuning_starts_from_the_weights_it_is_given(data, tmp_path):
    first = run(data, tmp_path / "first")
    model, _ = load_checkpoint(first)
    second = run(data, tmp_path / "second", init_from=first, steps=1, learning_rate=1e-12,
                 muon_learning_rate=1e-12, context_length=16, prefix_length=3)
    torch.testing.assert_close(load_checkpoint(second)[0].state_dict(), model.state_dict())


# ---- what it learns ------------------------------------------------------------------------------


def test_the_first_loss_is_about_ln_V(data, tmp_path):
    first, *_ = log(run(data, tmp_path / "out", steps=1))
    assert first["loss"] == pytest.approx(math.log(257), abs=0.03)


def test_it_learns_one_text_by_heart(tmp_path):
    # A corpus of exactly one context: every row is the same text. Its prefix tells the positions
    # apart: in a row that is all hidden, rotary positions make all of them look the same.
    text = "Fellow citizens of the Senate a"  # and an end-of-text token
    write_dataset(iter([("train", [text]), ("val", [text])]), "byte", tmp_path, "one line")
    lines = log(run(tmp_path, tmp_path / "out", steps=300, prefix_length=8, weighting="nelbo",
                    muon_learning_rate=0.03))
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] > 4 and losses[-1] < 0.05


def test_averaged_weights_with_no_memory_are_the_weights(data, tmp_path):
    tensors = state(run(data, tmp_path / "out", ema_decay=0))
    averages = {name: tensor for name, tensor in tensors.items() if name.startswith("ema.")}
    weights = {name: tensors[name.replace("ema.", "model.")] for name in averages}
    torch.testing.assert_close(averages, weights)
    assert len(averages) > 8


def test_learning_rates_rise_stay_and_fall():
    cfg = train.TrainConfig(steps=100, warmup_steps=9, decay_fraction=0.5)
    rates = [cfg.rate(step) for step in (0, 4, 9, 49, 50, 75, 99)]
    assert rates == [0.1, 0.5, 1, 1, 1, 0.5, 0.02]


def test_muon_is_the_stock_muon():
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator))
            for shape in ((24, 16), (16, 24), (24, 16))]
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


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def desk(data, tmp_path_factory) -> Path:
    """A folder with a configuration, a run that stopped in the middle, and data of two kinds."""
    desk = tmp_path_factory.mktemp("desk")
    shutil.copytree(data, desk / "data")
    shutil.copytree(data, desk / "words")
    meta = desk / "words/meta.json"
    meta.write_text(meta.read_text().replace('"byte"', '"words"'))
    run(data, desk / "begun", max_steps=3)
    (desk / "alone").mkdir()
    shutil.copy(desk / "begun/model.safetensors", desk / "alone")
    settings = TINY | {"data_dir": "data", "out_dir": "out"}
    lines = (f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
    (desk / "tiny.toml").write_text("".join(lines))
    return desk


@pytest.mark.parametrize("options, message", [
    ("--data-dir nowhere", "no nowhere/meta.json: run prepare_data.py"),
    ("--context-length 100000", "fewer than one context of 100000"),
    ("--batch-size 7 --micro-batch-size 2", "batch_size 7 must be a multiple of 2 rows"),
    ("--batch-size 6 --micro-batch-size 3", "split an antithetic pair: use an even number"),
    ("--device cuda", "device cuda is not available here; use --device auto or cpu"),
    ("--n-embd 30 --n-head 4", "n_embd 30 must be a multiple"),
    ("--objective gpt", "objective must be diffusion or mlm or autoregressive, not 'gpt'"),
    ("--steps few", "steps must be int, not 'few'"),
    ("--stepz 3", "unknown argument '--stepz'; did you mean --steps?"),
    ("--resume", "out/state.safetensors does not exist"),
    ("--init-from nowhere", "nowhere/model.safetensors does not exist"),
    ("--init-from begun --n-embd 64", "init_from has n_embd 32, not 64"),
    ("--init-from begun --objective autoregressive", "init_from has causal False, not True"),
    ("--init-from begun --data-dir words", "begun has the vocabulary byte, words words"),
    ("--out-dir begun", "begun holds a run: continue it with --resume, or choose another"),
    ("--out-dir tiny.toml", "out_dir must name a folder, not 'tiny.toml'"),
    ("--out-dir=", "out_dir must name a folder, not ''"),
    ("--out-dir alone", "alone holds a run: continue it with --resume, or choose another"),
    ("--out-dir begun --resume --steps 99", "the run has 12; to train on, --init-from it"),
    ("--out-dir begun --resume --eval-rows 9", "cannot resume with eval_rows 9: the run has 8"),
    ("--block_size 9", "did you mean --context-length?"),
    ("--out-dir begun --resume --learning-rate 0.5",
     "cannot resume with learning_rate 0.5: the run has 0.01"),
    ("--out-dir begun --resume --data-dir words", "the run has another vocabulary"),
])
def test_a_mistake_gets_one_line_and_changes_nothing_on_disk(desk, monkeypatch, capsys, options,
                                                             message):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("this machine has the device whose absence is tested")
    monkeypatch.chdir(desk)
    before = {path: path.is_file() and path.read_bytes() for path in desk.rglob("*")}
    assert train.main(["tiny.toml", *options.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and message in printed.err
    assert printed.err.startswith("train.py: ") and printed.err.count("\n") == 1
    assert before == {path: path.is_file() and path.read_bytes() for path in desk.rglob("*")}


def test_the_best_step_is_kept_by_its_loss_on_the_rows_that_all_steps_are_measured_on(
        data, tmp_path, monkeypatch):
    # On few rows the second evaluation is the best, on many rows any would look worse than that.
    nats = iter([(4, 3.0), (4, 2.0), (4, 1.9), (9, 2.5)])

    def evaluate(model, x_0, *_, **options):
        rows, value = next(nats)
        assert len(x_0) == rows
        return Bound(value, 0.1, Curve(32, [32], [value], [0.1]))

    monkeypatch.setattr(train, "evaluate", evaluate)
    out = run(data, tmp_path / "out", steps=12, eval_interval=4, eval_rows=4, final_eval_rows=9)
    _, info = read_tensors(out / "model.safetensors")
    assert info["step"] == 12
    assert (info["evaluation"]["nats"], info["evaluation"]["rows"]) == (2.5, 9)
    assert [line["nats"] for line in log(out) if "nats" in line] == [3.0, 2.0, 1.9, 2.5]
