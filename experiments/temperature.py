"""Which temperature is best? python -m experiments.temperature

Temperature tau draws a token from p^(1/tau), renormalised: 0 takes the likeliest, 1 believes the
model, more than 1 flattens. Each is tried with three orders: random, the most confident first
(confidence, with Gumbel noise), and the clearest choice first (margin). Columns as in lab/judge.py,
and

    distance   from real text: the relative differences of judge, entropy, distinct and words, added

A low temperature is likely under the judge *because* it repeats itself: only both numbers together
say anything. The picture has that frontier, the real text a star, and the distance by temperature.
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

ORDERS = ("random", "confidence, gumbel 1", "margin")


def best_temperatures(rows: list[dict]) -> dict[str, dict]:
    """{order: its row nearest to real text}."""
    return {order: min((row for row in rows if row["sampler"] == order),
                       key=lambda row: row["distance"]) for order in ORDERS}


def paint(panels, real: dict, lines: dict[str, list[dict]]) -> None:
    """The frontier of likelihood against entropy; the distance from real text by temperature."""
    left, right = panels
    paint_frontier(left, real, lines)
    for line in lines.values():
        (drawn,) = right.plot([row["temperature"] for row in line],
                              [row["distance"] for row in line], "o-")
        for row in (line[0], line[-1]):
            left.annotate(f"{row['temperature']:g}", (row["entropy"], row["judge"]),
                          xytext=(5, -12), textcoords="offset points", color=drawn.get_color())
    right.axvspan(0.5, 0.8, color="lightgrey", zorder=0)
    left.set(title="Each order, from the first to the last temperature")
    left.margins(x=0.1)
    right.set(title="Is 0.5 to 0.8 best?", xlabel="temperature", ylabel="distance from real text")
    labels = left.get_legend_handles_labels()
    left.figure.legend(*labels, loc="outside lower center", ncols=4)


@command("experiments.temperature")
def main(arguments: list[str]) -> None:
    parser = flags_with_judge("temperature", __doc__)
    add = parser.add_argument
    add("--steps", type=count, default=32, help="model calls (default: 32)")
    add("--temperatures", type=float, nargs="+", default=[0, 0.3, 0.5, 0.7, 0.85, 1, 1.3],
        help="(default: 0 0.3 0.5 0.7 0.85 1 1.3)")
    args = parser.parse_args(arguments)
    twins = load_twins(args.checkpoint, args.judge, args.data_dir)
    x = torch.full((args.num_samples, twins.N), twins.mask_id)

    real = judged_real(twins, real_text(twins, args.num_samples))
    print_row(real | {"distance": 0.0}, heading=True)
    rows = []
    for order in ORDERS:
        for temperature in args.temperatures:
            options = ORDER_OPTIONS[order] | dict(steps=args.steps, temperature=temperature)
            row, _ = judged(twins, order, x, **options)
            rows.append(row | {"distance": distance(row, real)})
            print_row(rows[-1])

    lines = {order: [row for row in rows if row["sampler"] == order] for order in ORDERS}
    draw(args.picture, lambda panels: paint(panels, real, lines), columns=2, height=4.5)
    best = best_temperatures(rows)
    inside = [row for row in best.values() if 0.5 <= row["temperature"] <= 0.8]
    named = (f"temperature {row['temperature']:g} for {order}" for order, row in best.items())
    answer(f"nearest to real text is {', '.join(named)}: 'between 0.5 and 0.8' holds for "
           f"{len(inside)} of {len(best)} orders.",
           {"steps": args.steps, "real": real, "rows": rows,
            "best": {order: row["temperature"] for order, row in best.items()}})


if __name__ == "__main__":
    sys.exit(main())
