"""Which sampler writes best? python -m experiments.samplers (every setting; takes half an hour)

The judge is the autoregressive twin, trained on the same text:

    python train.py configs/bytes.toml --objective autoregressive --out-dir out/bytes-ar

A row of the table for every order, remasking and temperature; lab/judge.py explains the columns.
Draws the frontier of likelihood against entropy, and ends with the setting nearest to real text.
docs/sampling.md discusses the result.
"""

import sys

import torch

from experiments.lab.command import answer, count, flags_with_judge
from experiments.lab.judge import (
    ORDER_OPTIONS,
    distance,
    judged,
    judged_real,
    load_twins,
    print_row,
    real_text,
)
from experiments.lab.pictures import draw, paint_frontier
from plumbing.command import command
from sample import REMASKS, left_to_right_model


def settings(steps: int, temperatures: list[float], N: int) -> list[tuple[str, dict]]:
    """(label, options): order x remask x temperature, then variations of plain ones."""
    found = []
    for temperature in temperatures:
        for remask in REMASKS:
            for order, options in ORDER_OPTIONS.items():
                options = options | dict(steps=steps, remask=remask, temperature=temperature)
                found.append((order + (f" + {remask}" if remask != "none" else ""), options))
    plain = dict(temperature=temperatures[0], order="random")
    confident = plain | dict(order="confidence")
    for steps_of_row in (N // 16, N // 8, N // 2, N):
        found.append(("random", plain | dict(steps=steps_of_row)))
        found.append(("confidence", confident | dict(steps=steps_of_row)))
    for threshold in (0.5, 0.7, 0.9):
        found.append((f"confidence, threshold {threshold}",
                      confident | dict(steps=N, threshold=threshold)))
    for length in (N // 16, N // 4):
        blocks = dict(steps=steps, block_length=length)
        found.append((f"random, blocks of {length}", plain | blocks))
        found.append((f"confidence, blocks of {length}", confident | blocks))
    for top_p in (0.8, 0.9):
        nucleus = dict(steps=steps, top_p=top_p, temperature=1.0)
        found.append((f"random, top-p {top_p}", plain | nucleus))
    return found


def paint(axes, real: dict, grid: list[dict]) -> None:
    """The frontier: a line for each order, small dots with remasking, black for renoising."""
    for row in grid:
        remask = row["options"]["remask"]
        if remask != "none":
            color = "black" if remask == "renoise" else "grey"
            axes.plot(row["entropy"], row["judge"], ".", color=color, zorder=0)
    by_temperature = sorted(grid, key=lambda row: row["temperature"])
    paint_frontier(axes, real, {order: [row for row in by_temperature if row["sampler"] == order]
                                for order in ORDER_OPTIONS})
    axes.set(title="Orders, a dot for each temperature; "
             "small dots: with remasking (black: renoise)")
    axes.figure.legend(loc="outside right center")


@command("experiments.samplers")
def main(arguments: list[str]) -> None:
    parser = flags_with_judge("samplers", __doc__)
    add = parser.add_argument
    add("--steps", type=count, default=64, help="of the grid (default: 64)")
    add("--temperatures", type=float, nargs="+", default=[0.7, 0.5, 1.0],
        help="of the grid (default: 0.7 0.5 1.0); the first is that of the variations")
    args = parser.parse_args(arguments)
    twins = load_twins(args.checkpoint, args.judge, args.data_dir)
    N = twins.N
    x = torch.full((args.num_samples, N), twins.mask_id)

    real = judged_real(twins, real_text(twins, args.num_samples))
    print_row(real, heading=True)
    causal = left_to_right_model(twins.judge, twins.mask_id)
    plans = []
    for temperature in args.temperatures:
        options = dict(steps=N, order="left_to_right", temperature=temperature)
        plans.append(("the twin, left to right", causal, options))
    for label, options in settings(args.steps, args.temperatures, N):
        plans.append((label, twins.model, options))
    rows = []
    for label, network, options in plans:
        row, _ = judged(twins, label, x, network, **options)
        print_row(row)
        rows.append(row | {"options": options, "grid": "remask" in options})
    grid = [row for row in rows if row["grid"]]

    draw(args.picture, lambda axes: paint(axes, real, grid), width=9, height=5.5)
    best = min(grid, key=lambda row: distance(row, real))
    answer(f"nearest to real text at {args.steps} steps is {best['sampler']} at temperature "
           f"{best['temperature']}.", {"real": real, "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
