"""What makes a training run safe: one writer per folder, atomic saves, a resume that is bit-exact.

    config.json         the settings of the run
    log.jsonl           a line every few steps, and one per evaluation
    model.safetensors   the best averaged weights so far: all that sampling reads
    state.safetensors   everything the run needs to go on: all that resuming reads
"""

import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diffusion import Bound
from model import Transformer
from plumbing.checkpoint import CheckpointError, read_tensors, write_tensors
from plumbing.config import ConfigError
from plumbing.machine import fetch
from plumbing.terminal import put
from plumbing.vocabulary import copy_file

# What may differ when a run goes on: where it runs and how long, not what it learns.
FREE = ("data_dir", "out_dir", "resume", "init_from", "micro_batch_size", "device", "precision",
        "compile", "log_interval", "eval_interval", "final_eval_rows", "max_steps", "max_minutes")
# Ctrl-C, kill, and a terminal that is closed, which Windows tells nobody
STOPS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}


class StopSignals:
    """Within `with`, signals to stop are noted: the run finishes its step, saves and stops.

    It ends at once in its first step, which may compile for a minute and has nothing to save, and
    at a second signal, for who can't wait.
    """

    def __init__(self, run: "Run"):
        self.run = run
        self.first_step = run.step

    def __enter__(self):
        self.received: list[int] = []
        self.handlers = {number: signal.signal(number, self.note) for number in STOPS
                         if signal.getsignal(number) != signal.SIG_IGN}  # as nohup does
        return self

    def note(self, number: int, frame) -> None:
        self.received.append(number)
        if self.run.step == self.first_step or len(self.received) > 1:
            put("train.py: stopped", screen="stderr")
            os._exit(self.exit_code)  # an exception could get lost in a callback of the compiler

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        return 128 + self.received[0] if self.received else 0


def check_finite(what: str, value: float) -> None:
    """Stop the run before NaN or infinity can reach a checkpoint."""
    if not math.isfinite(value):
        raise FloatingPointError(f"the {what} is {value}; what was saved before is intact. Usual "
                                 "causes: a learning rate too high, no grad_clip, bad --init-from")


class Run:
    """Everything that changes while a network learns."""

    def __init__(self, model: Transformer, ema_model: Transformer,
                 optimizers: list[torch.optim.Optimizer]):
        self.model = model
        self.ema_model = ema_model
        self.optimizers = optimizers
        self.step = 0
        self.losses: list[float] = []  # of the steps since the last line of the log
        self.sent: list[tuple[int, Callable]] = []  # numbers on their way from the device
        self.best = math.inf  # the lowest validation loss so far
        self.started = time.monotonic()
        self.seconds_before = 0.0  # what earlier processes took, if this run is resumed
        self.start_clock()

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    @property
    def minutes(self) -> float:
        """Of this process alone."""
        return (time.monotonic() - self.started) / 60

    def start_clock(self) -> None:
        """Time steps from here on: measuring and saving don't count."""
        self.clock_step = self.step
        self.clock_time = time.monotonic()

    def steps_per_second(self) -> float:
        return (self.step - self.clock_step) / (time.monotonic() - self.clock_time)

    def send(self, numbers: Tensor) -> None:
        """[loss, gradient norm, 1 to stop] of this step, (3,), leave the device: see `receive`."""
        self.sent.append((self.step, fetch(numbers)))

    def receive(self, late: int = 0) -> bool:
        """Wait for the numbers of all steps but the last `late`; whether a process wants to stop.

        Before anything is saved, `late` must be 0: FloatingPointError for NaN or infinity.
        """
        stop = 0.0
        while len(self.sent) > late:
            step, read = self.sent.pop(0)
            loss, norm, stop = read()
            check_finite(f"loss of step {step}", loss)
            check_finite(f"gradient norm of step {step}", norm)
            self.losses.append(loss)
        return stop > 0

    def tensors(self) -> dict[str, Tensor]:
        """In one flat dict: "model.*", "ema.*", "optimizer.<parameter>.<what>"."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, tensor in self.ema_model.state_dict().items():
            tensors[f"ema.{name}"] = tensor
        for name, parameter in self.model.named_parameters():
            for optimizer in self.optimizers:
                for what, tensor in optimizer.state.get(parameter, {}).items():
                    tensors[f"optimizer.{name}.{what}"] = tensor
        return tensors

    @torch.no_grad()
    def load_tensors(self, saved: dict[str, Tensor]) -> None:
        """Put back what `tensors` took."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in self.optimizers:  # an idle step makes the optimizers create their state
            optimizer.step()
            optimizer.zero_grad()
        for name, tensor in self.tensors().items():
            tensor.copy_(saved[name].view(tensor.shape))  # copy_ alone would repeat a smaller one


class RunFolder:
    """The folder of a run. Every process reads it; only the master writes."""

    def __init__(self, cfg, train_file, val_file, master: bool):
        self.path = Path(cfg.out_dir)
        self.cfg = cfg
        self.tokenizer = train_file.tokenizer
        self.data = [train_file.sha256, val_file.sha256]
        self.master = master
        self.last_step = min(cfg.steps, cfg.max_steps or cfg.steps)  # of this command
        self.evaluations: list[dict] = []  # of this step, until it is saved

    def open(self, run: Run) -> None:
        """Start a run, or go on where it stopped. ConfigError, CheckpointError if that can't be."""
        log_size = 0
        if not self.cfg.out_dir or self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"out_dir must name a folder, not {self.cfg.out_dir!r}")
        there = {path.name for path in self.path.glob("*")}
        if "state.safetensors" not in there and "state.safetensors.part" in there:
            there -= {"model.safetensors"}  # from a kill between the first two files of a run
        if self.cfg.resume:
            log_size = self.resume(run)
        elif there & {"state.safetensors", "state.pt", "model.safetensors", "model.pt"}:
            raise ConfigError(f"{self.path} holds a run: continue it with --resume, or choose "
                              "another --out-dir")
        if self.master and run.step < self.last_step:
            self.claim(log_size)

    def ending(self, step: int) -> str:
        """How far it came, and how it goes on."""
        if step == self.cfg.steps:
            return f"all {step} steps are done"
        higher = " with a higher --max-steps" if step >= self.last_step else ""
        return f"stopped after step {step} of {self.cfg.steps}; --resume{higher} goes on"

    def resume(self, run: Run) -> int:
        """Load the state of the run; the size that its log had."""
        path = self.path / "state.safetensors"
        tensors, info = read_tensors(path)
        try:
            for name, value in dataclasses.asdict(self.cfg).items():
                if name not in FREE and name not in info["config"]:
                    raise ConfigError(f"{path} was written by older code, which knew no {name}: "
                                      "go on with that code, or start with --init-from")
                if name not in FREE and info["config"][name] != value:
                    hint = "; to train on, --init-from it" if name == "steps" else ""
                    raise ConfigError(f"cannot resume with {name} {value!r}: the run has "
                                      f"{info['config'][name]!r}{hint}")
            network = dataclasses.asdict(run.model.config)
            if (info["model"], info["tokenizer"]) != (network, self.tokenizer):
                raise ConfigError(f"cannot resume on {self.cfg.data_dir}: the run has another "
                                  "vocabulary")
            if info.get("data", self.data) != self.data:  # older code kept no hashes
                raise ConfigError(f"cannot resume on {self.cfg.data_dir}: its text has changed "
                                  "since the run began; start another one with --init-from")
            run.load_tensors(tensors)
            run.step = max(0, int(info["step"]))
            run.losses = [float(value) for value in info["losses"]]
            run.best = math.inf if info["best"] is None else float(info["best"])
            run.seconds_before = float(info["seconds"])
            return max(0, int(info["log_size"]))
        except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError,
                RuntimeError) as error:
            raise CheckpointError(f"{path} does not fit this run: {error!r:.200}") from None

    def claim(self, log_size: int) -> None:
        """Keep a second run out until this process ends, in whatever way; write config.json."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.log_file = open(self.path / "log.jsonl", "a+", buffering=1)
        try:
            import fcntl
            fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another run is writing {self.log_file.name}: wait for its end or "
                              "stop it") from None
        except (ImportError, OSError):  # Windows and some network file systems have no such locks
            pass
        end = self.log_file.seek(0, os.SEEK_END)
        self.log_file.seek(self.log_file.truncate(min(log_size, end)))  # the rest will happen again
        copy_file(self.tokenizer, self.cfg.data_dir, self.path)  # a vocabulary, if it has one
        part = self.path / "config.json.part"
        part.write_text(json.dumps(dataclasses.asdict(self.cfg), indent=2) + "\n")
        os.replace(part, self.path / "config.json")

    def log(self, line: dict) -> None:
        print(json.dumps(line), file=self.log_file)

    def log_evaluation(self, step: int, bound: Bound, bits_per_byte: float, rows: int) -> None:
        check_finite(f"validation loss after step {step}", bound.nats)
        curve = bound.curve and bound.curve._asdict()
        evaluation = {"step": step, "nats": bound.nats, "stderr": bound.stderr, "rows": rows,
                      "bits_per_byte": bits_per_byte, "curve": curve}
        # JSON has no NaN: a standard error of one row becomes null.
        evaluation = json.loads(json.dumps(evaluation), parse_constant=lambda nan: None)
        self.evaluations.append(evaluation)
        self.log(evaluation)

    def save(self, run: Run) -> None:
        """model.safetensors if this is the best evaluation so far, and state.safetensors."""
        run.receive()  # nothing is saved after NaN or infinity
        # The first is on the rows on which steps are compared, the last tells most.
        nats = self.evaluations[0]["nats"] if self.evaluations else math.inf
        evaluation = self.evaluations[-1] if self.evaluations else None
        self.evaluations = []
        info = {"model": dataclasses.asdict(run.model.config),
                "config": dataclasses.asdict(self.cfg), "tokenizer": self.tokenizer,
                "step": run.step, "evaluation": evaluation}
        # Until the first evaluation any model is better than none.
        if run.best == math.inf or nats < run.best:
            run.best = nats
            (self.path / "state.safetensors.part").touch()  # see `open`
            write_tensors(self.path / "model.safetensors", run.ema_model.state_dict(), info)
        os.fsync(self.log_file.fileno())
        info["best"] = run.best if run.best < math.inf else None
        info["data"] = self.data
        info["losses"] = run.losses
        info["log_size"] = self.log_file.tell()
        info["seconds"] = run.seconds
        write_tensors(self.path / "state.safetensors", run.tensors(), info)
