"""Nothing is lost: runs are killed, doubled, starved of disk and data, and keep what they had.

Each promise is one test. Some have a long form, for `make test-reliability`, which prints the
numbers of docs/reliability.md.
"""

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import everything, flags, log
from torch import nn

import train
from diffusion import evaluate
from model import ModelConfig, Transformer
from plumbing import machine
from plumbing.checkpoint import load_checkpoint, read_tensors, write_tensors
from prepare_data import TokenFile

ROOT = Path(train.__file__).parent


def forms(*values):
    """The argument of a test in its short form, and in its long ones."""
    long = [pytest.param(value, marks=pytest.mark.reliability) for value in values[1:]]
    return [values[0], *long]


def command(data: Path, out_dir: Path, **changes) -> list[str]:
    """That of a tiny run which logs every step and saves every six."""
    return flags(data, out_dir, **{"log_interval": 1} | changes)


def intact(out_dir: Path) -> dict[str, bytes]:
    """The checkpoints of a folder, byte for byte, each of which can be read."""
    for path in out_dir.glob("*.safetensors"):
        read_tensors(path)
    return {path.name: path.read_bytes() for path in out_dir.glob("*.safetensors")}


def happens(condition, seconds: float = 60) -> bool:
    """Wait for it."""
    give_up = time.monotonic() + seconds
    while not condition() and time.monotonic() < give_up:
        time.sleep(1e-4)
    return condition()


def num_lines(out_dir: Path) -> int:
    """Of the log, while it is written."""
    path = out_dir / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def one_line(errors: str, *parts: str) -> bool:
    """Whether this is one line of train.py, and says all that."""
    return (errors.startswith("train.py: ") and errors.count("\n") == 1
            and all(part in errors for part in parts))


# To import torch takes seconds, too long for hundreds of runs: a server of multiprocessing does it
# once, and forks a process for each run.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["torch._dynamo", "train"])


class Run(FORK.Process):
    """`train.py` in a process of its own, whose files can have at most `file_size` bytes."""

    def __init__(self, arguments: list[str], file_size: int = 0):
        super().__init__(daemon=True)  # if a test fails, it ends with the tests
        self.arguments = arguments
        self.file_size = file_size
        self.errors, self.stderr = FORK.Pipe(duplex=False)
        self.start()
        self.stderr.close()  # that is the child's now

    def run(self) -> None:
        torch.set_num_threads(1)
        machine.matmul_ceiling = lambda device, dtype: 1e9
        os.dup2(self.stderr.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if self.file_size:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_size, self.file_size))
        os._exit(train.main(self.arguments))

    def end(self) -> tuple[int, str]:
        """Its exit code (negative: the signal that killed it) and what it wrote to stderr."""
        self.join()
        with open(self.errors.fileno(), closefd=False) as errors:
            return self.exitcode, errors.read()


# ---- killed at any moment ------------------------------------------------------------------------


@pytest.mark.parametrize("kills", forms(10, 120))
def test_a_run_killed_again_and_again_ends_as_if_nothing_happened(data, tmp_path, figure, kills):
    changes = dict(steps=6 * kills, eval_interval=3)
    assert Run(command(data, tmp_path / "whole", **changes)).end() == (0, "")
    chance = random.Random(0)
    out_dir = tmp_path / "killed"
    state = out_dir / "state.safetensors"
    while_saving = before_first = finished = 0
    for kill in range(kills):
        before_first += not state.exists()
        # (That of a first state tells the run that its model is its own.)
        names = ["state", "model"] if state.exists() else ["model"]
        part = out_dir / f"{chance.choice(names)}.safetensors.part"
        part.unlink(missing_ok=True)  # what an earlier kill left
        process = Run(command(data, out_dir, resume=state.exists(), **changes))
        if kill % 2:  # in the middle of a checkpoint, as soon as its file appears
            happens(part.exists, 2)
        time.sleep(chance.uniform(0, 0.001 if kill % 2 else 0.3))
        while_saving += part.exists()
        process.kill()
        code, errors = process.end()
        assert code in (-signal.SIGKILL, 0) and errors == ""  # no lock was left, either
        finished += code == 0
        intact(out_dir)
    assert Run(command(data, out_dir, resume=True, **changes)).end() == (0, "")
    assert everything(out_dir) == everything(tmp_path / "whole")
    figure(f"{kills - finished} kills, {while_saving} of them while a checkpoint was written, "
           f"{before_first} before there was one: bit-identical after {changes['steps']} steps")
    assert kills - finished > 0.7 * kills and while_saving


# ---- the folder: shared, full, read-only ---------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_is_refused_and_disturbs_nothing(data, tmp_path, capsys, resume):
    out_dir = tmp_path / "out"
    changes = dict(steps=10**6, eval_interval=6 if resume else 10**6)
    process = Run(command(data, out_dir, **changes))
    assert happens(lambda: num_lines(out_dir) > 20)
    assert train.main(command(data, out_dir, resume=resume, max_minutes=0, **changes)) == 2
    assert one_line(capsys.readouterr().err, "another run", "log.jsonl")
    process.terminate()
    assert process.end() == (143, "")
    steps = [line["step"] for line in log(out_dir) if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))
    intact(out_dir)


@pytest.mark.parametrize("file_size", [1500, 60_000, 200_000])  # the log, the model, the state
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(data, tmp_path, file_size):
    out_dir = tmp_path / "out"
    assert Run(command(data, tmp_path / "whole")).end()[0] == 0
    assert Run(command(data, out_dir, max_steps=4)).end()[0] == 0
    before = intact(out_dir)
    code, errors = Run(command(data, out_dir, resume=True), file_size).end()
    assert code == 1 and one_line(errors, "intact"), errors
    assert file_size == 1500 or "step 6 cannot be saved; is the disk full?" in errors
    assert intact(out_dir)["state.safetensors"] == before["state.safetensors"]
    assert Run(command(data, out_dir, resume=True)).end() == (0, "")  # there is room again
    assert everything(out_dir) == everything(tmp_path / "whole")


def mount(*arguments) -> None:
    if subprocess.run(["mount", *arguments], capture_output=True).returncode:
        pytest.skip("mounting takes root")


def test_a_disk_that_is_really_full_or_read_only_is_one_line(data, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", disk)
    try:
        assert Run(command(data, disk / "out", max_steps=4)).end()[0] == 0
        before = intact(disk / "out")
        (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - 100_000))
        code, errors = Run(command(data, disk / "out", resume=True)).end()
        assert code == 1 and one_line(errors, "step 6", "disk full"), errors
        (disk / "other").unlink()
        mount("-o", "remount,ro", disk)
        for folder, resume in (("out", True), ("new", False)):
            code, errors = Run(command(data, disk / folder, resume=resume)).end()
            assert code == 1 and one_line(errors, "Read-only", folder), errors
        assert intact(disk / "out") == before
        mount("-o", "remount,rw", disk)
        assert Run(command(data, disk / "out", resume=True)).end() == (0, "")
    finally:
        subprocess.run(["umount", disk], check=True)


# ---- the data and the clock ----------------------------------------------------------------------


def test_data_deleted_under_a_run_is_read_to_its_end(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data")
    out_dir = tmp_path / "out"
    process = Run(command(copy, out_dir, steps=10**6))
    assert happens((out_dir / "state.safetensors").exists)
    shutil.rmtree(copy)
    before = num_lines(out_dir)
    assert happens(lambda: num_lines(out_dir) > before + 50)
    process.terminate()
    assert process.end() == (143, "")
    intact(out_dir)


def test_data_cut_short_between_two_steps_is_one_line(data, tmp_path, monkeypatch, capsys):
    copy = shutil.copytree(data, tmp_path / "data")
    batch = TokenFile.batch

    def cut_before_step_8(file, seed, step, *shape):
        if step == 8:  # not at a random moment: within a read there is no check that could help
            os.truncate(copy / "train.bin", 100)
        return batch(file, seed, step, *shape)

    monkeypatch.setattr(TokenFile, "batch", cut_before_step_8)
    out_dir = tmp_path / "out"
    assert train.main(command(copy, out_dir)) == 2
    assert one_line(capsys.readouterr().err, "train.bin", "cut short")
    assert set(intact(out_dir)) == {"model.safetensors", "state.safetensors"}


def test_a_clock_that_jumps_changes_nothing(data, tmp_path, monkeypatch):
    assert train.main(command(data, tmp_path / "steady", max_minutes=5)) == 0
    jumps = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: jumps.uniform(-1e9, 4e9))
    assert train.main(command(data, tmp_path / "jumping", max_minutes=5)) == 0
    assert everything(tmp_path / "jumping") == everything(tmp_path / "steady")
    lines = map(json.loads, (tmp_path / "jumping/log.jsonl").read_text().splitlines())
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    assert seconds == sorted(seconds) and 0 < seconds[0] and seconds[-1] < 1e6


# ---- numbers -------------------------------------------------------------------------------------

# What becomes of the training loss: `w` is one weight, so `0 * w` is 0 with a gradient.
SPOILS = {
    "NaN": lambda value, w: value * math.nan,
    "infinity": lambda value, w: value * math.inf,
    "infinite gradient": lambda value, w: value + (w * 0).sqrt(),
    "explosion": lambda value, w: value * 1e38 * w.sign(),
}


@pytest.mark.parametrize("kind", SPOILS)
@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
@pytest.mark.parametrize("steps_late", [0, 1])  # as on a CPU and on a GPU
def test_what_is_not_finite_is_not_saved(data, tmp_path, monkeypatch, capsys, kind, grad_clip,
                                         steps_late):
    monkeypatch.setattr(machine.Machine, "steps_late", steps_late)
    out_dir = tmp_path / "out"
    changes = dict(grad_clip=grad_clip, eval_interval=3)
    assert train.main(command(data, out_dir, max_steps=5, **changes)) == 0
    before = intact(out_dir)
    loss = train.loss
    monkeypatch.setattr(train, "loss", lambda network, batch: SPOILS[kind](
        loss(network, batch), network.embedding.weight[0, 0]))
    capsys.readouterr()
    # Step 5 is the first after resuming, and it would be saved right away.
    assert train.main(command(data, out_dir, resume=True, **changes)) == 1
    assert one_line(capsys.readouterr().err, "step 5 is", "Usual causes: a learning rate too high")
    assert intact(out_dir) == before


def test_a_validation_loss_not_finite_is_not_saved(data, tmp_path, monkeypatch, capsys):
    out_dir = tmp_path / "out"
    assert train.main(command(data, out_dir, max_steps=5)) == 0
    before = intact(out_dir)
    monkeypatch.setattr(train, "evaluate", lambda *rest, **named: evaluate(
        *rest, **named)._replace(nats=math.nan))
    capsys.readouterr()
    assert train.main(command(data, out_dir, resume=True)) == 1
    assert one_line(capsys.readouterr().err, "validation loss after step 6 is nan")
    assert intact(out_dir) == before


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_absurd_learning_rates_end_in_one_line_or_finite_weights(data, tmp_path, capsys, precision):
    absurd = dict(learning_rate=1e14, muon_learning_rate=1e14, warmup_steps=0, eval_interval=1)
    code = train.main(command(data, tmp_path, precision=precision, **absurd))
    errors = capsys.readouterr().err
    assert (code, errors) == (0, "") or code == 1 and one_line(errors, "is ", "Usual causes")
    for name in intact(tmp_path):
        tensors, _ = read_tensors(tmp_path / name)
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def write_tokens(folder: Path, ids: np.ndarray, vocab_size: int) -> Path:
    """A dataset by hand, both splits the same."""
    folder.mkdir()
    split = {"tokens": len(ids), "bytes": len(ids), "documents": 1, "sha256": ""}
    meta = {"format": 1, "tokenizer": "byte", "vocab_size": vocab_size, "dtype": "uint16"}
    (folder / "meta.json").write_text(json.dumps(meta | {"train": split, "val": split}))
    for name in ("train", "val"):
        (folder / f"{name}.bin").write_bytes(ids.astype("<u2").tobytes())
    return folder


@pytest.mark.parametrize("objective", ["diffusion", "mlm", "autoregressive"])
@pytest.mark.parametrize("tokens, vocab_size, context_length", [
    (1, 1, 1), (1, 2, 1), (2, 2, 2), (3, 2, 1), (50, 257, 50)], ids=str)
def test_the_smallest_data_is_enough(tmp_path, objective, tokens, vocab_size, context_length):
    data = write_tokens(tmp_path / "data", np.arange(tokens) % vocab_size, vocab_size)
    out_dir = tmp_path / "out"
    changes = dict(objective=objective, context_length=context_length, mlm_ratio=0.0, batch_size=64)
    assert train.main(command(data, out_dir, steps=3, eval_interval=1, **changes)) == 0
    model, info = load_checkpoint(out_dir)
    _, state_info = read_tensors(out_dir / "state.safetensors")
    config = json.loads((out_dir / "config.json").read_text())
    json.dumps([info, state_info, config, log(out_dir)], allow_nan=False)  # JSON has no NaN
    x_0 = torch.from_numpy(TokenFile(data, "val").spread(16, context_length))
    bound = evaluate(model, x_0, vocab_size, objective, curve_points=30, batch_size=64)
    assert bound.nats == pytest.approx(info["evaluation"]["nats"], abs=1e-5)


def test_more_than_two_to_the_31_tokens_are_addressed_to_the_last_one(tmp_path):
    data = write_tokens(tmp_path / "data", np.zeros(3), 257)
    count = 2**31 + 1001
    meta = (data / "meta.json").read_text()
    (data / "meta.json").write_text(meta.replace('"tokens": 3', f'"tokens": {count}'))
    with open(data / "train.bin", "r+b") as file:  # sparse: it takes two blocks of the disk
        file.truncate(2 * count)
        file.seek(2 * (count - 3))
        file.write(np.array([7, 8, 9], "<u2").tobytes())
    tokens = TokenFile(data, "train")
    assert tokens.spread(5, 100)[-1, -4:].tolist() == [0, 7, 8, 9]
    starts = []
    tokens.read = lambda at, length: starts.extend(at)
    for step in range(100):
        tokens.batch(1, step, 100, 100)
    assert max(starts) > 2**31 - 2**20 and min(starts) >= 0  # 10,000 draws


# ---- several processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("lost", forms(1, 0))
def test_when_one_process_is_lost_the_other_says_so_and_one_can_go_on(data, tmp_path, figure, lost):
    out_dir = tmp_path / "out"
    changes = dict(steps=10**6, eval_interval=20, learning_rate=1e-3)
    launcher = "-m torch.distributed.run --nproc_per_node=2 --standalone".split()
    torchrun = subprocess.Popen(
        [sys.executable, *launcher, train.__file__, *command(data, out_dir, **changes)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert happens((out_dir / "state.safetensors").exists, 120)
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    os.kill(int(children[lost - 2]), signal.SIGKILL)
    killed = time.monotonic()
    _, errors = torchrun.communicate(timeout=60)  # within a minute
    figure(f"process {lost} was lost: all ended after {time.monotonic() - killed:.1f} s")
    assert torchrun.returncode == 1
    said = "".join(line for line in errors.splitlines(keepends=True) if "train.py: " in line)
    assert one_line(said, "a process of this run was lost, go on with --resume"), errors
    # One process goes on from the checkpoint of the two, and another trains alone from the start.
    last = read_tensors(out_dir / "state.safetensors")[1]["step"] + 5
    for folder in (out_dir, tmp_path / "one"):
        arguments = command(data, folder, resume=folder == out_dir, max_steps=last, **changes)
        assert Run(arguments).end() == (0, "")
    for a, b in zip(log(out_dir), log(tmp_path / "one"), strict=True):
        for name in ("loss", "nats"):
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=1e-2)


# ---- a long run ----------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
@pytest.mark.parametrize("steps", forms(150, 2000))
def test_memory_and_file_handles_stay_flat(data, tmp_path, figure, steps):
    out_dir = tmp_path / "out"
    process = Run(command(data, out_dir, steps=steps, eval_interval=10, final_eval_rows=8))
    assert happens((out_dir / "state.safetensors").exists)
    samples = []
    while Path(f"/proc/{process.pid}/fd").exists():
        try:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            names = [os.readlink(path) for path in Path(f"/proc/{process.pid}/fd").iterdir()]
        except (OSError, IndexError):
            continue  # it ends, or a handle was closed meanwhile
        saving = any(".part" in name for name in names)
        samples.append((pages * resource.getpagesize() / 1e6, len(names) - saving))
        time.sleep(0.02)
    assert process.end() == (0, "") and len(samples) > 10
    warm = samples[len(samples) // 4 : len(samples) * 9 // 10]  # without the start and the end
    memory, handles = zip(*warm, strict=True)
    half = len(memory) // 2
    before = np.median(memory[:half])
    after = np.median(memory[half:])
    figure(f"{steps} steps, {steps // 10} checkpoints: {before:.1f} MB, then {after:.1f} MB "
           f"({after / before - 1:+.2%}); {min(handles)} to {max(handles)} file handles")
    assert after / before < 1.02 and max(handles) == min(handles)


def test_the_averages_keep_no_history():
    # In a graph they would keep a node for each matrix and step: gigabytes in a long run.
    model = nn.Linear(2, 2)
    average_model = nn.Linear(2, 2).requires_grad_(False)
    before = average_model.weight.clone()
    train.average(average_model, model, 0.9, 100)
    assert not torch.equal(average_model.weight, before)
    assert not any(parameter.requires_grad for parameter in average_model.parameters())


# ---- older checkpoints ---------------------------------------------------------------------------


def test_a_recorded_checkpoint_loads_and_its_run_goes_on(data, tmp_path):
    """Made by train.py from `data` and the configuration that lies beside it."""
    first = ROOT / "tests/fixtures/first"
    model, info = load_checkpoint(first)
    x_0 = torch.from_numpy(TokenFile(data, "val").spread(8, 32))
    bound = evaluate(model, x_0, model.config.mask_id, batch_size=8)
    assert bound.nats == pytest.approx(info["evaluation"]["nats"], abs=1e-4)
    shutil.copytree(first, tmp_path, dirs_exist_ok=True)
    config = json.loads((first / "config.json").read_text())
    config |= {"data_dir": data, "out_dir": tmp_path, "resume": True, "max_steps": None}
    settings = {name: value for name, value in config.items() if value is not None}
    assert train.main([f"--{name}={value}" for name, value in settings.items()]) == 0
    assert read_tensors(tmp_path / "state.safetensors")[1]["step"] == 12


@pytest.mark.parametrize("before", ["before-neighbours", "neighbours-once"])
def test_older_networks_are_what_they_were(before, data):
    model, info = load_checkpoint(ROOT / "tests/fixtures" / before)
    x_0 = torch.from_numpy(TokenFile(data, "val").spread(8, 32))
    bound = evaluate(model, x_0, model.config.mask_id, batch_size=8)
    assert bound.nats == pytest.approx(info["evaluation"]["nats"], abs=1e-4)


def test_neighbours_of_the_embedding_are_those_of_the_first_block(tmp_path):
    net = Transformer(ModelConfig(5, 8, n_layer=2, n_head=1, n_embd=2))
    tensors = dict(net.state_dict())
    del tensors["blocks.1.neighbours"]
    tensors["neighbours"] = tensors.pop("blocks.0.neighbours") + 3
    info = {"model": vars(net.config), "config": {"objective": "diffusion"}, "tokenizer": "byte"}
    write_tensors(tmp_path / "model.safetensors", tensors, info)
    first, second = load_checkpoint(tmp_path)[0].blocks
    assert (first.neighbours == 3).all() and (second.neighbours == 0).all()


def test_a_run_of_older_code_is_refused_and_left_as_it_is(data, tmp_path, capsys):
    out_dir = tmp_path / "out"
    assert train.main(command(data, out_dir, max_steps=5)) == 0
    tensors, info = read_tensors(out_dir / "state.safetensors")
    del info["config"]["mask_positions"]
    write_tensors(out_dir / "state.safetensors", tensors, info)
    before = intact(out_dir)
    assert train.main(command(data, out_dir, resume=True)) == 2
    assert one_line(capsys.readouterr().err, "written by older code, which knew no mask_positions")
    assert intact(out_dir) == before
