"""Training runs that take milliseconds per step, for the tests of commands and of safety."""

import json
from pathlib import Path

import train
from plumbing.checkpoint import read_tensors

TINY = dict(n_layer=2, n_head=2, n_embd=32, context_length=32, batch_size=8, steps=12,
            warmup_steps=2, log_interval=4, eval_interval=6, eval_rows=8, final_eval_rows=16,
            compile=False, device="cpu", precision="float32")


def flags(data: Path, out_dir: Path, **changes) -> list[str]:
    """What one types to train on `data`."""
    settings = TINY | dict(data_dir=data, out_dir=out_dir) | changes
    return [f"--{name}={value}" for name, value in settings.items()]


def run(data: Path, out_dir: Path, **changes) -> Path:
    assert train.main(flags(data, out_dir, **changes)) == 0
    return out_dir


def state(out_dir: Path) -> dict:
    """The tensors that resuming reads: weights, averages, what the optimizers remember."""
    return read_tensors(out_dir / "state.safetensors")[0]


def log(out_dir: Path) -> list[dict]:
    """The lines of log.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    clocked = ("seconds", "tokens_per_second", "mfu")
    return [{key: value for key, value in line.items() if key not in clocked} for line in lines]


def everything(out_dir: Path) -> list:
    """All that a run leaves, bit for bit: its state, its best model and its log."""
    best, _ = read_tensors(out_dir / "model.safetensors")
    files = [{name: tensor.tolist() for name, tensor in tensors.items()}
             for tensors in (state(out_dir), best)]
    return files + log(out_dir)
