"""Which sampler writes best? python -m experiments.samplers (every setting there is; for half an hour)

The judge is the autoregressive twin, trained on the same text:

    python train.py configs/quickstart.toml --objective autoregressive --out-dir out/quickstart-ar

For every order, remasking and temperature the table says

    judge     nats per token under the judge: how likely the text is. Real text has the first row's figure;
              less than that is not better, but more repetitive or timid than people are
    error     the standard error of that, over the samples
    entropy   of a sample's own tokens, in nats: falls when a sample repeats itself
    distinct  share of different ones among all runs of three tokens of the samples: falls likewise
    words     share of the words that occur in the training text

A good sampler is near real text in all of them. Draws the frontier of likelihood against entropy, and ends
with the setting nearest to real text. docs/sampling.md discusses the result.

What is written and judged here, `load_twins` to `frontier`, the shorter experiments share: schedules,
sampling_methods, temperature, steps, adaptive.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from bench.words import share_known, words
from configs import ConfigError, Parser
from diffusion import REMASKS, Model, State, denoise, evaluate, left_to_right_model
from experiments import lab
from model import CheckpointError, Transformer, load_checkpoint
from prepare_data import DataError, TokenFile, get_tokenizer

ORDERS = {
    "random": dict(order="random"),
    "left_to_right": dict(order="left_to_right"),
    "ancestral": dict(order="ancestral"),
    "confidence": dict(order="confidence"),
    "confidence, gumbel 1": dict(order="confidence", gumbel=1.0),
    "margin": dict(order="margin"),
    "entropy": dict(order="entropy"),
}


# --- Who writes and who judges --------------------------------------------------------------------


class Twins(NamedTuple):
    """A diffusion model, which writes, its autoregressive twin, which judges, and what both have read."""

    model: Transformer
    info: dict  # of its checkpoint
    judge: Transformer
    N: int  # tokens of a text: the context of both
    mask_id: int
    decode: Callable[[list[int]], str]
    vocabulary: set[str]  # the words of the training text
    val: TokenFile


def flags(name: str, doc: str, num_samples: int = 16) -> Parser:
    """lab.flags, and those of writing and judging."""
    parser = lab.flags(name, doc)
    parser.add_argument("--judge", default="out/quickstart-ar", help="(default: out/quickstart-ar)")
    parser.add_argument("--num-samples", type=lab.several, default=num_samples,
                        help=f"texts of each row of the table (default: {num_samples})")
    return parser


def load_twins(checkpoint: str | Path, judge: str | Path, data_dir: str | Path) -> Twins:
    """Both models and their data. CheckpointError, ConfigError or DataError, one line, if they do not fit."""
    model, info = load_checkpoint(checkpoint)
    if not (Path(judge) / "model.pt").exists():
        raise CheckpointError(f"{judge}/model.pt does not exist; train the judge: python train.py "
                              f"configs/quickstart.toml --objective autoregressive --out-dir {judge}")
    twin, twin_info = load_checkpoint(judge)
    if (twin.config.causal, twin.config.context_length, twin_info["tokenizer"]) != (
            True, model.config.context_length, info["tokenizer"]):
        raise ConfigError(f"--judge {judge} is no autoregressive twin of {checkpoint}")
    train, val = TokenFile(data_dir, "train"), TokenFile(data_dir, "val")
    if train.tokenizer != info["tokenizer"]:
        raise DataError(f"{data_dir} is in tokens of {train.tokenizer}, {checkpoint} of {info['tokenizer']}")
    decode = get_tokenizer(info["tokenizer"]).decode
    vocabulary = set(words(decode(train.tokens.tolist())))
    N, mask_id = model.config.context_length, model.config.mask_id
    return Twins(model, info, twin, N, mask_id, decode, vocabulary, val)


def real_text(twins: Twins, rows: int) -> Tensor:
    """(rows,N): always the same windows of validation text."""
    return torch.from_numpy(twins.val.spread(rows, twins.N))


def write(model: Model, x: Tensor, mask_id: int, seed: int = 1, **options) -> tuple[list[State], float]:
    """All states of `denoise`, and the seconds they took; in bfloat16 where the hardware has it.

    ConfigError for options that make no sense.
    """
    states = denoise(model, x, mask_id, generator=Generator().manual_seed(seed), **options)
    started = time.perf_counter()
    try:
        first = next(states)  # bad options are refused here
    except ValueError as error:
        raise ConfigError(str(error)) from None
    with lab.autocast(x.device.type):
        return [first, *states], time.perf_counter() - started


def entropy(tokens: Tensor) -> float:
    """In nats, of the frequencies of these tokens (n,)."""
    return torch.special.entr(tokens.bincount() / len(tokens)).sum().item()


def figures(twins: Twins, tokens: Tensor) -> dict[str, float]:
    """What the table says of finished texts (n,T)."""
    bound = evaluate(twins.judge, tokens, twins.mask_id, "autoregressive")
    runs = tokens.unfold(1, 3, 1).reshape(-1, 3)
    known, _ = share_known("\n".join(twins.decode(row) for row in tokens.tolist()), twins.vocabulary)
    return {"judge": bound.nats, "error": bound.stderr, "entropy": sum(map(entropy, tokens)) / len(tokens),
            "distinct": len(runs.unique(dim=0)) / len(runs), "words": known}


def judged(twins: Twins, sampler: str, x: Tensor, network: Model | None = None,
           **options) -> tuple[dict, list[State]]:
    """Let the model (or `network`) fill the hidden places of x: (a row of the table, all states)."""
    states, seconds = write(network or twins.model, x, twins.mask_id, **options)
    speed = int((x == twins.mask_id).sum()) / seconds
    row = {"sampler": sampler, "temperature": float(options.get("temperature", 1)), "calls": states[-1].calls,
           "tokens_per_second": round(speed)}
    return row | figures(twins, states[-1].tokens), states


def judged_real(twins: Twins, rows: int) -> dict:
    """The row of real text."""
    row = {"sampler": "real text", "temperature": None, "calls": None, "tokens_per_second": None}
    return row | figures(twins, real_text(twins, rows))


def distance(row: dict, real: dict) -> float:
    """From real text: the sum of the four figures' relative differences."""
    return sum(abs(row[name] / real[name] - 1) for name in ("judge", "entropy", "distinct", "words"))


def show(row: dict, heading: bool = False) -> None:
    """Print a row of a table, its cells that are text or numbers; with `heading` their names above it."""
    names, cells = "", ""
    for name, cell in row.items():
        width = max(8, len(name := name.replace("tokens_per_second", "tokens/s")))
        if isinstance(cell, str):
            names, cells = names + f"{name:30}", cells + f"{cell:30}"
        elif cell is None or isinstance(cell, int | float):
            text = "-" if cell is None else f"{cell:,}" if isinstance(cell, int) else f"{cell:.3f}"
            names, cells = names + f" {name:>{width}}", cells + f" {text:>{width}}"
    print(names + "\n" + cells if heading else cells, flush=True)


def frontier(axes, real: dict, lines: dict[str, list[dict]]) -> None:
    """Likelihood against entropy: a line through the rows of each label, the real text as a star."""
    axes.plot(real["entropy"], real["judge"], "*", markersize=16, color="black", label="real text", zorder=3)
    for label, rows in lines.items():
        axes.plot([row["entropy"] for row in rows], [row["judge"] for row in rows], marker="o", label=label)
    axes.set(xlabel="entropy of a sample's tokens, nats", ylabel="nats per token under the twin")


# --- The study ------------------------------------------------------------------------------------


def settings(steps: int, temperatures: list[float], N: int) -> list[tuple[str, dict]]:
    """(label, arguments of `denoise`): order x remask x temperature, then variations of plain ones."""
    found = []
    for temperature in temperatures:
        for remask in REMASKS:
            for order, options in ORDERS.items():
                options = options | dict(steps=steps, remask=remask, temperature=temperature)
                found.append((order + (f" + {remask}" if remask != "none" else ""), options))
    plain = dict(temperature=temperatures[0])
    for steps_of_row in (N // 16, N // 8, N // 2, N):
        found.append(("random", dict(steps=steps_of_row, order="random") | plain))
        found.append(("confidence", dict(steps=steps_of_row, order="confidence") | plain))
    for threshold in (0.5, 0.7, 0.9):
        found.append((f"confidence, threshold {threshold}",
                      dict(steps=N, order="confidence", threshold=threshold) | plain))
    for length in (N // 16, N // 4):
        found.append((f"random, blocks of {length}", dict(steps=steps, block_length=length) | plain))
        found.append((f"confidence, blocks of {length}",
                      dict(steps=steps, block_length=length, order="confidence") | plain))
    for top_p in (0.8, 0.9):
        found.append((f"random, top-p {top_p}", dict(steps=steps, top_p=top_p, temperature=1.0)))
    return found


@lab.command
def main(arguments: list[str] | None = None) -> None:
    parser = flags("samplers", __doc__)
    parser.add_argument("--steps", type=lab.count, default=64, help="of the grid (default: 64)")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 0.5, 1.0],
                        help="of the grid (default: 0.7 0.5 1.0); the first is that of the variations")
    args = parser.parse_args(arguments)
    twins = load_twins(args.checkpoint, args.judge, args.data_dir)
    N, x = twins.N, torch.full((args.num_samples, twins.N), twins.mask_id)

    real = judged_real(twins, args.num_samples)
    show(real, heading=True)
    judge = left_to_right_model(twins.judge, twins.mask_id)
    plans = [("the twin, left to right", judge, dict(steps=N, order="left_to_right", temperature=temperature))
             for temperature in args.temperatures]
    plans += [(label, twins.model, options) for label, options in settings(args.steps, args.temperatures, N)]
    rows = []
    for label, network, options in plans:
        row, _ = judged(twins, label, x, network, **options)
        show(row)
        rows.append(row | {"options": options, "grid": "remask" in options})
    grid = [row for row in rows if row["grid"]]

    def paint(axes) -> None:
        for row in grid:
            if (remask := row["options"]["remask"]) != "none":
                color = "black" if remask == "renoise" else "grey"
                axes.plot(row["entropy"], row["judge"], ".", color=color, zorder=0)
        lines = {order: [row for row in grid if row["sampler"] == order] for order in ORDERS}
        frontier(axes, real, {order: sorted(line, key=lambda row: row["temperature"])
                              for order, line in lines.items()})
        axes.set(title="Orders, a dot for each temperature; small dots: with remasking (black: renoise)")
        axes.figure.legend(loc="outside right center")

    lab.draw(args.picture, paint, width=9, height=5.5)
    best = min(grid, key=lambda row: distance(row, real))
    lab.answer(f"nearest to real text at {args.steps} steps is {best['sampler']} at temperature "
               f"{best['temperature']}.", {"real": real, "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
