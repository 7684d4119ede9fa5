"""Samples and what they are worth: a diffusion model writes, its autoregressive twin judges.

    judge     nats per token under the judge: how likely the text is. Compare it with the first row,
              real text: less is not better, but more repetitive or timid than people are
    error     the standard error of that, over the samples
    entropy   of a sample's own tokens, in nats: falls when a sample repeats itself
    distinct  fraction of different ones among all runs of three tokens of the samples: falls too
    words     fraction of the words that occur in the training text

A good sampler is near real text in all of them.
"""

import re
import time
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
from torch import Generator, Tensor

from diffusion import Model, draw_mask, evaluate, keyed_generator
from experiments.lab.runs import autocast
from model import Transformer
from plumbing.checkpoint import CheckpointError, load_checkpoint
from plumbing.config import ConfigError
from prepare_data import TokenFile, get_tokenizer
from sample import State, denoise


class Twins(NamedTuple):
    """A diffusion model, which writes, its twin, which judges, and what both have read."""

    model: Transformer
    judge: Transformer
    N: int  # tokens of a text: the context of both
    mask_id: int
    tokenizer: tiktoken.Encoding
    vocabulary: set[str]  # the words of the training text


def load_writer(checkpoint: str | Path) -> tuple[Transformer, tiktoken.Encoding]:
    """A model that fills what is hidden, and its tokenizer."""
    model, info = load_checkpoint(checkpoint)
    if model.config.causal:
        raise ConfigError(f"{checkpoint} is autoregressive: it never sees hidden text")
    return model, get_tokenizer(info["tokenizer"], checkpoint)


def load_twins(checkpoint: str | Path, judge: str | Path, data_dir: str | Path) -> Twins:
    """Both models and their data. CheckpointError, ConfigError or DataError if they don't fit."""
    model, tokenizer = load_writer(checkpoint)
    N = model.config.context_length
    if not (Path(judge) / "model.safetensors").exists():
        raise CheckpointError(
            f"{judge}/model.safetensors does not exist; train the judge with the settings of "
            f"{checkpoint}: python train.py CONFIG --objective autoregressive --out-dir {judge}")
    twin, info = load_checkpoint(judge)
    train = TokenFile(data_dir, "train")
    same_text = tokenizer.name == info["tokenizer"] == train.tokenizer
    if not (twin.config.causal and twin.config.context_length == N and same_text):
        raise ConfigError(f"--judge {judge} is no autoregressive twin of {checkpoint}, or "
                          f"{data_dir} is in other tokens")
    return Twins(model, twin, N, model.config.mask_id, tokenizer, vocabulary_of(train))


def some_positions(x_0: Tensor, m: int, purpose: str) -> Tensor:
    """(B,T) bool: m random positions of each row of x_0 (B,T), for one purpose always the same."""
    m = torch.full((len(x_0),), m)
    return draw_mask(m, x_0.size(1), 0, keyed_generator(0, 0, purpose))


def write(model: Model, x: Tensor, mask_id: int, **options) -> list[State]:
    """All states of `denoise`, in bfloat16 where the hardware has it, with seed 1."""
    with autocast():
        return list(denoise(model, x, mask_id, Generator().manual_seed(1), **options))


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def vocabulary_of(file: TokenFile) -> set[str]:
    """The words of a whole split."""
    tokenizer = get_tokenizer(file.tokenizer, file.path.parent)
    return set(words(tokenizer.decode(file.tokens.tolist())))


def fraction_known(text: str, vocabulary: set[str]) -> float:
    """How many of the words of `text` are in `vocabulary`."""
    found = words(text)
    return sum(word in vocabulary for word in found) / max(1, len(found))


def mean_entropy(rows: Tensor) -> float:
    """In nats, of the frequencies of a row's own tokens, the mean over rows (n,T)."""
    entropies = [torch.special.entr(row.bincount() / len(row)).sum() for row in rows]
    return torch.stack(entropies).mean().item()


def fraction_and_error(yes: Tensor) -> tuple[float, float]:
    """The fraction of True in (n,) answers, and its standard error, as if one more of each had been
    seen: 0 of 32 does not prove that there are none."""
    n = len(yes)
    p = (yes.sum().item() + 1) / (n + 2)
    return yes.double().mean().item(), (p * (1 - p) / n) ** 0.5


def judge(twins: Twins, tokens: Tensor) -> dict[str, float]:
    """What the table says of finished texts (n,T)."""
    bound = evaluate(twins.judge, tokens, twins.mask_id, "autoregressive")
    runs = tokens.unfold(1, 3, 1).reshape(-1, 3)
    text = "\n".join(map(twins.tokenizer.decode, tokens.tolist()))
    return {"judge": bound.nats, "error": bound.stderr, "entropy": mean_entropy(tokens),
            "distinct": len(runs.unique(dim=0)) / len(runs),
            "words": fraction_known(text, twins.vocabulary)}


def judged(twins: Twins, sampler: str, x: Tensor, network: Model,
           **options) -> tuple[dict, list[State]]:
    """Let one of the twins, as `network`, fill the holes of x: (a row of the table, all states)."""
    started = time.perf_counter()
    states = write(network, x, twins.mask_id, **options)
    seconds = time.perf_counter() - started
    speed = int((x == twins.mask_id).sum()) / seconds
    row = {"sampler": sampler, "calls": states[-1].calls, "tokens_per_second": round(speed)}
    return row | judge(twins, states[-1].tokens), states


def print_row(row: dict, heading: bool = False) -> None:
    """Print the cells of a row, text or numbers; with `heading` their names above it."""
    names = []
    cells = []
    for name, cell in row.items():
        name = name.replace("tokens_per_second", "tokens/s")
        text = cell or "-"
        if isinstance(cell, int | float):
            text = f"{cell:,}" if isinstance(cell, int) else f"{cell:.3f}"
        column = "<30" if isinstance(cell, str) else f">{max(8, len(name))}"
        names.append(f"{name:{column}}")
        cells.append(f"{text:{column}}")
    if heading:
        print(*names)
    print(*cells, flush=True)
