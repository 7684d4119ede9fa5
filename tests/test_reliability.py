"""Nothing is lost: runs are killed, doubled, starved of disk and data, for real, and keep what they had.

Each promise is one test. Some have a short form, part of `make test`, and a long one, part of
`make test-reliability`, which prints the figures of docs/reliability.md.
"""

import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train as training
from diffusion import Bound, evaluate
from model import load_checkpoint, read_checkpoint_file
from prepare_data import TokenFile, write_dataset
from train import main

ROOT = Path(__file__).parent.parent
TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 60
TINY = dict(n_layer=2, n_head=2, n_embd=32, context_length=32, batch_size=8, steps=12, warmup_steps=2,
            log_interval=1, eval_interval=6, eval_rows=8, final_eval_rows=16,
            compile=False, device="cpu", precision="float32")


def forms(short, long):
    """The argument of a test in its short form and in its long one."""
    return [pytest.param(short, id="short"),
            pytest.param(long, id="long", marks=pytest.mark.reliability)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(iter([("train", [TEXT]), ("val", [TEXT[:2000]])]), "byte", folder, "test")
    return folder


def flags(data: Path, out_dir: Path, **changes) -> list[str]:
    settings = TINY | dict(data_dir=data, out_dir=out_dir) | changes
    return [f"--{name}={value}" for name, value in settings.items()]


def everything(out_dir: Path) -> list:
    """All that a run leaves: weights, averages, optimizers, the best model, and the log without the clock."""
    lines = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    clocked = ("seconds", "tokens_per_second", "mfu")
    files = [read_checkpoint_file(out_dir / name)[0] for name in ("state.pt", "model.pt")]
    return [*({name: tensor.tolist() for name, tensor in file.items()} for file in files),
            *({key: value for key, value in line.items() if key not in clocked} for line in lines)]


def intact(out_dir: Path) -> dict[str, bytes]:
    """The checkpoints of a folder, byte for byte, each of which can be read."""
    for path in out_dir.glob("*.pt"):
        read_checkpoint_file(path)
    return {path.name: path.read_bytes() for path in out_dir.glob("*.pt")}


# To import torch takes seconds, too long for hundreds of runs: one process does, and forks one for each run.
# (They do not measure what matrix products reach, which takes a second.)
SERVER = """
import json, os, resource, sys, torch, torch._dynamo, train
torch.set_num_threads(1)
train.matmul_ceiling = lambda device, dtype: 1e9
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(order["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if order["file_size"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_size"],) * 2)
        os._exit(train.main(order["flags"]))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Runs:
    """Starts `train.py` with given flags, one run after another: `start`, then `end`."""

    def __init__(self, errors: Path):
        self.errors = errors
        self.process = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)

    def start(self, arguments: list[str], file_size: int = 0) -> int:
        """The process id of a new run, whose files can have at most `file_size` bytes."""
        order = {"flags": arguments, "errors": str(self.errors), "file_size": file_size}
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def end(self) -> tuple[int, str]:
        """The exit code of the run (negative: the signal that killed it) and what it wrote to stderr."""
        return int(self.process.stdout.readline()), self.errors.read_text()

    def run(self, arguments: list[str], file_size: int = 0) -> tuple[int, str]:
        self.start(arguments, file_size)
        return self.end()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("runs") / "errors.txt")
    yield runs
    os.killpg(runs.process.pid, signal.SIGKILL)  # a run too, that a failed test left
    runs.process.communicate()


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"


def one_line(errors: str, *parts: str) -> bool:
    """Whether this is one line, and says all that."""
    return errors.startswith("train.py: ") and errors.count("\n") == 1 and all(p in errors for p in parts)


@pytest.fixture(autouse=True)
def no_ceiling(monkeypatch):
    """Runs of this process do not measure it either."""
    monkeypatch.setattr(training, "matmul_ceiling", lambda device, dtype: 1e9)


# ---- killed at any moment -------------------------------------------------------------------------


@pytest.mark.parametrize("kills", forms(10, 120))
def test_a_run_killed_again_and_again_ends_as_if_nothing_had_happened(data, tmp_path, runs, kills, figure):
    changes = dict(steps=6 * kills, eval_interval=3)
    assert runs.run(flags(data, tmp_path / "whole", **changes)) == (0, "")
    chance, out_dir, seconds = random.Random(0), tmp_path / "killed", 0.3
    while_saving = before_first = finished = 0
    for kill in range(kills):
        arguments = flags(data, out_dir, resume=(out_dir / "state.pt").exists(), **changes)
        before_first += not (out_dir / "state.pt").exists()
        part = out_dir / f"{chance.choice(['state', 'model'])}.pt.part"
        part.unlink(missing_ok=True)  # what an earlier kill left
        pid = runs.start(arguments)
        if kill % 2:  # in the middle of a checkpoint, as soon as its file appears
            give_up = time.monotonic() + 2
            while not part.exists() and time.monotonic() < give_up:
                pass
            time.sleep(chance.uniform(0, 0.001))
        else:
            time.sleep(chance.uniform(0, seconds))
        while_saving += part.exists()
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        code, errors = runs.end()
        assert (code, errors) in ((-signal.SIGKILL, ""), (0, ""))
        finished += code == 0
        intact(out_dir)
    assert runs.run(flags(data, out_dir, resume=True, **changes)) == (0, "")
    assert everything(out_dir) == everything(tmp_path / "whole")
    figure(f"{kills - finished} kills, {while_saving} of them while a checkpoint was written, "
           f"{before_first} before there was one: bit-identical after {changes['steps']} steps")
    assert kills - finished > 0.7 * kills and while_saving


def test_a_killed_run_leaves_no_lock_behind(data, tmp_path, runs):
    pid = runs.start(flags(data, tmp_path / "out", steps=10**6))
    wait_for((tmp_path / "out/state.pt").exists)
    os.kill(pid, signal.SIGKILL)
    runs.end()
    assert runs.run(flags(data, tmp_path / "out", steps=10**6, resume=True, max_steps=1))[0] == 0


# ---- the folder: shared, full, read-only ----------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_in_the_folder_is_refused_and_disturbs_nothing(data, tmp_path, runs, capsys, resume):
    out_dir, changes = tmp_path / "out", dict(steps=10**6, eval_interval=6 if resume else 10**6)
    pid = runs.start(flags(data, out_dir, **changes))
    wait_for(lambda: (out_dir / "log.jsonl").exists() and (out_dir / "log.jsonl").stat().st_size > 3000)
    assert main(flags(data, out_dir, resume=resume, **changes)) == 2
    assert one_line(capsys.readouterr().err, "another run", "log.jsonl")
    os.kill(pid, signal.SIGTERM)
    assert runs.end() == (128 + signal.SIGTERM, "")
    steps = [line["step"] for line in everything(out_dir)[2:] if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize("file_size", [1500, 60_000, 200_000])  # the log, model.pt, state.pt
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(data, tmp_path, runs, file_size):
    out_dir = tmp_path / "out"
    assert runs.run(flags(data, tmp_path / "whole"))[0] == 0
    assert runs.run(flags(data, out_dir, max_steps=4))[0] == 0
    before = intact(out_dir)
    code, errors = runs.run(flags(data, out_dir, resume=True), file_size=file_size)
    assert code == 1 and one_line(errors, "intact"), errors
    assert file_size == 1500 or "step 6 cannot be saved; is the disk full?" in errors
    assert intact(out_dir)["state.pt"] == before["state.pt"]
    assert runs.run(flags(data, out_dir, resume=True)) == (0, "")  # there is room again
    assert everything(out_dir) == everything(tmp_path / "whole")


def mount(*arguments: str) -> None:
    if os.geteuid() or subprocess.run(["mount", *arguments], capture_output=True).returncode:
        pytest.skip("mounting takes root")


@pytest.fixture
def tiny_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk))
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full_too(data, tiny_disk, runs):
    out_dir = tiny_disk / "out"
    assert runs.run(flags(data, out_dir, max_steps=4))[0] == 0
    before = intact(out_dir)
    room = shutil.disk_usage(tiny_disk).free
    (tiny_disk / "other").write_bytes(bytes(max(0, room - 100_000)))
    code, errors = runs.run(flags(data, out_dir, resume=True))
    assert code == 1 and one_line(errors, "step 6", "disk full"), errors
    assert intact(out_dir) == before
    (tiny_disk / "other").unlink()
    assert runs.run(flags(data, out_dir, resume=True)) == (0, "")


def test_a_read_only_folder_is_one_line(data, tmp_path, runs):
    out_dir = tmp_path / "out"
    assert runs.run(flags(data, out_dir, max_steps=4))[0] == 0
    before = intact(out_dir)
    if os.geteuid():
        out_dir.chmod(0o500)
        for path in out_dir.iterdir():
            path.chmod(0o400)
    else:  # root may write whatever the mode says
        mount("--bind", str(out_dir), str(out_dir))
        mount("-o", "remount,bind,ro", str(out_dir))
    try:
        for folder, resume in ((out_dir, True), (out_dir / "new", False)):
            code, errors = runs.run(flags(data, folder, resume=resume))
            assert code == 1 and one_line(errors, "out"), errors
        assert intact(out_dir) == before
    finally:
        if os.geteuid():
            out_dir.chmod(0o700)
        else:
            subprocess.run(["umount", str(out_dir)], check=True)


# ---- the data and the clock -----------------------------------------------------------------------


def test_data_deleted_under_a_run_is_still_read_and_data_cut_short_is_one_line(data, tmp_path, runs):
    for damage, code in ((lambda folder: shutil.rmtree(folder), 128 + signal.SIGTERM),
                         (lambda folder: os.truncate(folder / "train.bin", 100), 2)):
        copy = shutil.copytree(data, tmp_path / f"data{code}")
        out_dir = tmp_path / f"out{code}"
        pid = runs.start(flags(copy, out_dir, steps=10**6))
        wait_for((out_dir / "state.pt").exists)
        damage(copy)
        size = (out_dir / "log.jsonl").stat().st_size
        if code != 2:
            wait_for(lambda out_dir=out_dir, size=size: (out_dir / "log.jsonl").stat().st_size > size + 9000)
            os.kill(pid, signal.SIGTERM)
        found, errors = runs.end()
        assert found == code and (one_line(errors, "train.bin", "cut short") if code == 2 else not errors)
        intact(out_dir)
    code, errors = runs.run(flags(tmp_path / "data143", out_dir, steps=10**6, resume=True))
    assert code == 2 and one_line(errors, "no ", "meta.json: run prepare_data.py")


def test_a_clock_that_jumps_changes_nothing(data, tmp_path, monkeypatch):
    jumps = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: jumps.uniform(-1e9, 4e9))
    assert main(flags(data, tmp_path / "jumping", max_minutes=5)) == 0
    monkeypatch.undo()
    assert main(flags(data, tmp_path / "steady", max_minutes=5)) == 0
    assert everything(tmp_path / "jumping") == everything(tmp_path / "steady")
    lines = [json.loads(line) for line in (tmp_path / "jumping/log.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    assert seconds == sorted(seconds) and 0 < seconds[0] and seconds[-1] < 300


# ---- numbers --------------------------------------------------------------------------------------


def loss_with(step: int, spoil):
    """The training loss, spoilt at one step."""
    calls, real = [], training.loss

    def loss(network, batch):
        calls.append(None)
        value = real(network, batch)
        return spoil(value, network) if len(calls) == step + 1 else value

    return loss


SPOILS = {
    "loss": lambda value, network: value * math.inf,
    "gradient": lambda value, network: value + (network.embedding.weight[0, 0] * 0).sqrt(),  # + 0
    "explosion": lambda value, network: value * 1e38 * network.embedding.weight.sum().sign(),
}


@pytest.mark.parametrize("kind", SPOILS)
@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_what_is_not_finite_stops_the_run_before_it_is_saved(data, tmp_path, monkeypatch, capsys, kind,
                                                             grad_clip):
    out_dir = tmp_path / "out"
    changes = dict(grad_clip=grad_clip, eval_interval=3)
    assert main(flags(data, out_dir, max_steps=5, **changes)) == 0
    before = intact(out_dir)
    monkeypatch.setattr(training, "loss", loss_with(0, SPOILS[kind]))  # step 5, the first after resuming
    capsys.readouterr()
    assert main(flags(data, out_dir, resume=True, **changes)) == 1  # otherwise it would save right away
    assert one_line(capsys.readouterr().err, "step 5 is", "Usual causes: a learning rate too high")
    assert intact(out_dir) == before


def test_a_validation_loss_that_is_not_finite_is_not_saved_either(data, tmp_path, monkeypatch, capsys):
    out_dir = tmp_path / "out"
    assert main(flags(data, out_dir, max_steps=5)) == 0
    before = intact(out_dir)
    real = training.evaluate
    monkeypatch.setattr(training, "evaluate", lambda *a, **named: real(*a, **named)._replace(nats=math.nan))
    capsys.readouterr()
    assert main(flags(data, out_dir, resume=True)) == 1
    assert one_line(capsys.readouterr().err, "validation loss after step 6 is nan")
    assert intact(out_dir) == before


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_absurd_learning_rate_ends_in_one_line_or_in_finite_weights(data, tmp_path, capsys, precision):
    code = main(flags(data, tmp_path / "out", learning_rate=1e14, muon_learning_rate=1e14, warmup_steps=0,
                      precision=precision, eval_interval=1, steps=5))
    errors = capsys.readouterr().err
    assert (code, errors) == (0, "") or code == 1 and one_line(errors, "is ", "Usual causes")
    for path in (tmp_path / "out").glob("*.pt"):
        tensors, _ = read_checkpoint_file(path)
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


def only_json(text: str) -> None:
    """Refuses NaN and Infinity, which Python reads and JSON does not have."""
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize("objective", ["diffusion", "mlm", "autoregressive"])
@pytest.mark.parametrize("tokens, vocab_size, context_length", [
    (1, 1, 1), (1, 2, 1), (2, 2, 2), (3, 2, 1), (50, 257, 50)], ids=str)
def test_the_smallest_data_can_be_trained_on(tmp_path, objective, tokens, vocab_size, context_length):
    data = write_tokens(tmp_path / "data", np.arange(tokens) % vocab_size, vocab_size)
    out_dir = tmp_path / "out"
    assert main(flags(data, out_dir, objective=objective, context_length=context_length, mlm_ratio=0.0,
                      batch_size=64, steps=3, eval_interval=1)) == 0
    for line in (out_dir / "log.jsonl").read_text().splitlines():
        only_json(line)
    for name in ("model", "state"):
        only_json(torch.load(out_dir / f"{name}.pt", weights_only=True)["info"])
    only_json((out_dir / "config.json").read_text())
    model, info = load_checkpoint(out_dir)
    assert model.config.context_length == context_length
    x_0 = torch.from_numpy(TokenFile(data, "val").spread(16, context_length))
    bound = evaluate(model, x_0, vocab_size, objective, curve_points=30, batch_size=64)
    assert bound.nats == pytest.approx(info["evaluation"]["nats"], abs=1e-5)


def test_more_than_two_to_the_31_tokens_are_addressed_to_the_last_one(tmp_path):
    count = 2**31 + 1001
    data = write_tokens(tmp_path / "data", np.zeros(0), 257)
    meta = json.loads((data / "meta.json").read_text())
    split = {"tokens": count, "bytes": count, "documents": 1, "sha256": ""}
    (data / "meta.json").write_text(json.dumps(meta | {"train": split}))
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


# ---- several processes ----------------------------------------------------------------------------


def start_ranks(arguments: list[str], torchrun: bool) -> list[subprocess.Popen]:
    """Two processes of one run, started as torchrun would start them; or torchrun, which starts them."""
    command, env = [sys.executable, str(ROOT / "train.py"), *arguments], os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if torchrun:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
        return [subprocess.Popen(launcher + command[1:], env=env, **pipes)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [subprocess.Popen(command, env=env | {"RANK": rank, "LOCAL_RANK": rank}, **pipes) for rank in "01"]


@pytest.mark.parametrize("lost", [1, *(pytest.param(who, marks=pytest.mark.reliability)
                                       for who in (0, "torchrun"))])
def test_when_one_process_is_killed_the_other_says_so_and_one_can_go_on(data, tmp_path, runs, lost, figure):
    out_dir, changes = tmp_path / "out", dict(steps=10**6, eval_interval=20, learning_rate=1e-3)
    ranks = start_ranks(flags(data, out_dir, **changes), lost == "torchrun")
    wait_for((out_dir / "state.pt").exists, 120)
    if lost == "torchrun":
        children = Path(f"/proc/{ranks[0].pid}/task/{ranks[0].pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        survivor = ranks[0]
    else:
        ranks[lost].kill()
        survivor = ranks[1 - lost]
    killed = time.monotonic()
    _, errors = survivor.communicate(timeout=60)  # within a minute
    figure(f"lost {lost}: the other process ended after {time.monotonic() - killed:.1f} s")
    for rank in ranks:
        rank.communicate()
    assert survivor.returncode == 1
    said = [line for line in errors.splitlines(keepends=True) if line.startswith("train.py: ")]
    assert len(said) == 1 and one_line(said[0], "a process of this run was lost, go on with --resume")
    assert lost == "torchrun" or "Traceback" not in errors
    # One process goes on from the last checkpoint of the two, and another trains alone from the start.
    last = read_checkpoint_file(out_dir / "state.pt")[1]["step"] + 5
    assert runs.run(flags(data, out_dir, resume=True, max_steps=last, **changes)) == (0, "")
    assert runs.run(flags(data, tmp_path / "one", max_steps=last, **changes)) == (0, "")
    for a, b in zip(everything(out_dir)[2:], everything(tmp_path / "one")[2:], strict=True):
        for name in ("loss", "nats"):
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=1e-2)


# ---- a long run -----------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
@pytest.mark.parametrize("steps", forms(150, 2000))
def test_memory_and_file_handles_stay_flat(data, tmp_path, runs, steps, figure):
    out_dir, samples = tmp_path / "out", []
    changes = dict(steps=steps, eval_interval=10, final_eval_rows=8)
    pid = runs.start(flags(data, out_dir, **changes))
    wait_for((out_dir / "state.pt").exists)
    while Path(f"/proc/{pid}/fd").exists():
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            handles = {name: os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}
        except (OSError, IndexError):
            continue  # it ends, or a handle was closed meanwhile
        saving = any(".part" in name for name in handles.values())
        samples.append((pages * resource.getpagesize(), len(handles) - saving))
        time.sleep(0.02)
    assert runs.end() == (0, "")
    warm = samples[len(samples) // 4 : len(samples) * 9 // 10]  # without the start and the end
    half = len(warm) // 2
    first, last = (np.median([memory for memory, _ in part]) for part in (warm[:half], warm[half:]))
    handles = [count for _, count in warm]
    lines = map(json.loads, (out_dir / "log.jsonl").read_text().splitlines())
    speed = [line["tokens_per_second"] for line in lines if "mfu" in line]
    early, late = np.median(speed[steps // 4 : steps // 2]), np.median(speed[steps // 2 :])
    figure(f"{steps} steps, {steps // 10} evaluations and checkpoints: memory {first / 1e6:.1f} MB, then "
           f"{last / 1e6:.1f} MB ({last / first - 1:+.2%}); {min(handles)} to {max(handles)} file handles; "
           f"{early:,.0f} tokens/s, then {late:,.0f}")
    assert last / first < 1.02 and max(handles) == min(handles) and len(samples) > 10


def test_the_averages_keep_no_history(data, tmp_path, monkeypatch):
    # In a graph they would keep a node for each matrix and step: 5 KB a step here, gigabytes in a long run.
    seen = []

    def evaluate(model, *arguments, **options):
        seen.extend(parameter.requires_grad for parameter in model.parameters())
        return Bound(1.0, 0.1, None)

    monkeypatch.setattr("train.evaluate", evaluate)
    assert main(flags(data, tmp_path / "out")) == 0
    assert seen and not any(seen)


# ---- the first format -----------------------------------------------------------------------------


def test_a_checkpoint_of_the_first_release_loads_for_ever(tmp_path, data, capsys):
    """Made by: python train.py --data-dir DATA --out-dir tests/fixtures/first --n-layer 1 --n-head 1
    --n-embd 2 --context-length 32 --batch-size 8 --steps 12 --max-steps 6 --eval-interval 6 --eval-rows 8
    --log-interval 4 --warmup-steps 2 --compile false --device cpu --precision float32, DATA being `data`."""
    first = ROOT / "tests/fixtures/first"
    model, info = load_checkpoint(first)
    x_0 = torch.from_numpy(TokenFile(data, "val").spread(8, 32))
    bound = evaluate(model, x_0, model.config.mask_id, batch_size=8)
    assert bound.nats == pytest.approx(info["evaluation"]["nats"], abs=1e-4)
    out_dir = shutil.copytree(first, tmp_path / "out")
    assert main(["--data-dir", str(data), "--out-dir", str(out_dir), "--resume", *(
        "--n-layer 1 --n-head 1 --n-embd 2 --context-length 32 --batch-size 8 --steps 12 --eval-interval 6 "
        "--eval-rows 8 --log-interval 4 --warmup-steps 2 --compile false --device cpu "
        "--precision float32").split()]) == 0
    assert read_checkpoint_file(out_dir / "state.pt")[1]["step"] == 12
