"""How many calls, and at which temperature? python -m experiments.frontier

Likelihood under the autoregressive twin against the variety of what is written, by order, number of
calls and temperature (lab/judge.py explains the numbers). Several models of one recipe, trained
with other seeds, write: each number is the mean over them, +- its standard error. Best is what is
nearest to real text, in all of them.
"""

import itertools
import math
import sys

import torch
from torch import Tensor

from diffusion import mean_and_error
from experiments.lab.command import answer, count, flags, several
from experiments.lab.judge import ORDER_OPTIONS, distance, judge, load_twins, real_text, write
from experiments.lab.pictures import draw, paint_frontier
from model import Transformer
from plumbing.command import command
from sample import left_to_right_model

NUMBERS = ("judge", "entropy", "distinct", "words")


def judged(twins, models: list[Transformer], x: Tensor, **options) -> dict:
    """A row of the table: what each of the models writes into x (B,T), judged by one twin."""
    found = []
    for seed, model in enumerate(models, start=1):
        states, _ = write(model, x, twins.mask_id, seed, **options)
        found.append(judge(twins, states[-1].tokens))
    row = {"calls": states[-1].calls}
    for name in NUMBERS:
        mean, error = mean_and_error(torch.tensor([one[name] for one in found]))
        row |= {name: mean, f"{name}_error": error}  # NaN for one model
    return row


def print_row(row: dict, real: dict) -> None:
    cells = [f"{row['writer']:16} {row['calls'] or '-':>5} {row['temperature']:>11}"]
    for name in NUMBERS:
        error = row.get(f"{name}_error", math.nan)
        cells.append(f"{row[name]:8.3f} " + (f"+-{error:.3f}" if error == error else " " * 7))
    print(*cells, f"{distance(row, real):9.3f}", flush=True)


def paint(axes, real: dict, rows: list[dict]) -> None:
    """A line for each writer and number of calls, through its temperatures."""
    lines: dict[str, list[dict]] = {}
    for row in rows:
        lines.setdefault(f"{row['writer']}, {row['calls']} calls", []).append(row)
    paint_frontier(axes, real, lines)
    axes.legend(fontsize="small")


@command("experiments.frontier")
def main(arguments: list[str]) -> None:
    parser = flags("frontier", __doc__, checkpoint=False)
    parser.set_defaults(data_dir="data/sotu")
    add = parser.add_argument
    add("--checkpoints", nargs="+", default=["out/quickstart"], help="who writes")
    add("--judge", default="out/quickstart-ar", help="their autoregressive twin")
    add("--num-samples", type=several, default=32, help="texts of each model (default: 32)")
    add("--orders", nargs="+", choices=list(ORDER_OPTIONS), default=["spread", "random"])
    add("--calls", type=count, nargs="+", default=[4, 8, 16, 64])
    add("--temperatures", type=float, nargs="+", default=[0.7, 0.85, 1.0])
    args = parser.parse_args(arguments)
    every = [load_twins(folder, args.judge, args.data_dir) for folder in args.checkpoints]
    twins = every[0]
    models = [one.model for one in every]
    causal = left_to_right_model(twins.judge, twins.mask_id)
    x = torch.full((args.num_samples, twins.N), twins.mask_id)

    print("writer           calls temperature     judge           entropy         distinct       "
          "words     distance")
    real = {"writer": "real text", "calls": None, "temperature": "-"}
    real |= judge(twins, real_text(twins, args.num_samples))
    print_row(real, real)
    plans = [("the twin", [causal], dict(order="left_to_right"))]
    for order, calls in itertools.product(args.orders, args.calls):
        plans.append((order, models, ORDER_OPTIONS[order] | dict(steps=calls)))
    rows = []
    for writer, networks, options in plans:
        for temperature in args.temperatures:
            row = judged(twins, networks, x, temperature=temperature, **options)
            rows.append({"writer": writer, "temperature": temperature} | row)
            print_row(rows[-1], real)

    draw(args.picture, lambda axes: paint(axes, real, rows), width=8, height=6)
    best = min(rows[len(args.temperatures) :], key=lambda row: distance(row, real))
    answer(f"nearest to real text is {best['writer']} in {best['calls']} calls at temperature "
           f"{best['temperature']}.", {"real": real, "rows": rows, "best": best})


if __name__ == "__main__":
    sys.exit(main())
