"""Training runs that are kept, their logs, and what is measured on their networks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion import Curve, Model, draw_mask, keyed_generator, mean_and_error, row_losses
from plumbing import machine
from plumbing.vocabulary import copy_file
from prepare_data import DataError, TokenFile, get_tokenizer, write_dataset

ROOT = Path(__file__).parent.parent.parent
TRAIN = ROOT / "train.py"
OUT = Path("out/experiments")


def trained(name: str, *settings: str, config: str = "configs/quickstart.toml",
            program: tuple[str, ...] = ()) -> Path:
    """The folder of a finished run of train.py: found in out/experiments/NAME, continued, or new.

    settings: flags of train.py. If it fails, it has said why, and we end with its exit code. A run
        of this name with other settings is such a failure: delete its folder to train again.
    program: what Python runs instead of train.py: something that calls train.main.
    """
    folder = OUT / name
    resume = ["--resume"] if (folder / "state.safetensors").exists() else []
    words = [*(program or [TRAIN]), config, *settings, "--out-dir", folder]
    print("$ python", *words, flush=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, *words, *resume], env=environment)
    if result.returncode:
        sys.exit(result.returncode)
    return folder


def small_corpus(data_dir: str, tokens: int, out_dir: Path) -> Path:
    """out_dir, with so many tokens of the training text, and the validation text whole."""
    train = TokenFile(data_dir, "train")
    val = TokenFile(data_dir, "val")
    tokenizer = get_tokenizer(train.tokenizer, data_dir)
    # Evenly spread windows: the beginning alone would be the oldest text.
    windows = train.spread(max(1, tokens // 1024), min(1024, tokens))
    pieces = [*(("train", window) for window in windows), ("val", val.tokens)]
    documents = ((split, [text]) for split, ids in pieces
                 for text in tokenizer.decode(ids.tolist()).split("<|endoftext|>") if text)
    out_dir.mkdir(parents=True, exist_ok=True)
    copy_file(train.tokenizer, data_dir, out_dir)  # the same tokens, whatever is left of the text
    write_dataset(documents, train.tokenizer, out_dir, f"{tokens} tokens of {data_dir}")
    return out_dir


class Run(NamedTuple):
    """A training run, as its folder tells it."""

    folder: Path
    config: dict
    training: list[dict]  # lines of log.jsonl: step, loss, seconds ...
    evaluations: list[dict]  # others: step, tokens, nats, curve ...; the last of each step


def read_run(folder: Path) -> Run:
    """The run that train.py wrote into `folder`, with the tokens read before each evaluation."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = (folder / "log.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    evaluations = {line["step"]: line for line in lines if "nats" in line}
    for line in evaluations.values():
        line["tokens"] = line["step"] * config["batch_size"] * config["context_length"]
    losses = [line for line in lines if "loss" in line]
    return Run(folder, config, losses, list(evaluations.values()))


def autocast(device: str = "cpu") -> torch.autocast:
    """Matrix products in bfloat16 where the hardware has them: nearly all takes half the time."""
    device = torch.device(device)
    return machine.autocast(device, machine.choose_dtype("auto", device))


def rows_of(data_dir: str, rows: int, length: int) -> Tensor:
    """(rows or fewer, length) int64: always the same windows of validation text, an even number."""
    x_0 = torch.from_numpy(TokenFile(data_dir, "val").spread(rows, length))
    if len(x_0) < 2:
        raise DataError(f"{data_dir} has too little validation text to measure on: prepare more")
    return x_0[: len(x_0) // 2 * 2]


@torch.no_grad()
def measure_curve(model: Model, x_0: Tensor, mask_id: int, points: int, label: str) -> Curve:
    """CE(m) at m = 1 and `points` counts evenly spaced up to N, each on all rows of x_0 (R,N), not
    on a part of them as in `nelbo`: enough to tell good schedules apart."""
    R, N = x_0.shape
    generator = keyed_generator(0, 0, label)
    counts = sorted({1, *(max(1, round(N * i / points)) for i in range(1, points + 1))})
    points = []
    for m in counts:
        mask = draw_mask(torch.full((R,), m), N, 0, generator)
        points.append(mean_and_error(row_losses(model, x_0.masked_fill(mask, mask_id), x_0, mask)))
    nats, errors = zip(*points, strict=True)
    return Curve(N, counts, list(nats), list(errors))
