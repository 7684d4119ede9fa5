"""Which temperature is best? python -m experiments.temperature

Temperature tau draws a token from p^(1/tau), renormalised: 0 takes the likeliest, 1 believes the model, more
than 1 flattens. Each is tried with three orders: random places, the surest first (confidence, with Gumbel
noise), and the clearest choice first (margin). Columns, as in experiments/samplers.py:

    judge, error   nats per token under the autoregressive twin, and the standard error over the texts
    entropy        of a text's own tokens, in nats
    distinct       share of different ones among the texts' runs of three tokens
    words          share of the words that occur in the training text
    distance       from real text: the sum of the relative differences of the last four (without the error)

A low temperature is likely under the judge *because* it repeats itself: only both figures together say
anything. The picture has that frontier, the real text a star, and the distance by temperature.
"""

import sys

import torch

from experiments import lab, samplers

ORDERS = ("random", "confidence, gumbel 1", "margin")


def best_temperatures(rows: list[dict]) -> dict[str, dict]:
    """{order: its row nearest to real text}."""
    return {order: min((row for row in rows if row["sampler"] == order), key=lambda row: row["distance"])
            for order in ORDERS}


def paint(panels, real: dict, lines: dict[str, list[dict]]) -> None:
    """The frontier of likelihood against entropy, and the distance from real text by temperature."""
    left, right = panels
    samplers.frontier(left, real, lines)
    for line in lines.values():
        (drawn,) = right.plot([row["temperature"] for row in line], [row["distance"] for row in line], "o-")
        for row in (line[0], line[-1]):
            left.annotate(f"{row['temperature']:g}", (row["entropy"], row["judge"]), xytext=(5, -12),
                          textcoords="offset points", color=drawn.get_color())
    right.axvspan(0.5, 0.8, color="lightgrey", zorder=0)
    left.set(title="Each order, from the first to the last temperature")
    left.margins(x=0.1)
    right.set(title="Is 0.5 to 0.8 best?", xlabel="temperature", ylabel="distance from real text")
    left.figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)


@lab.command
def main(arguments: list[str] | None = None) -> None:
    parser = samplers.flags("temperature", __doc__)
    parser.add_argument("--steps", type=lab.count, default=32, help="model calls (default: 32)")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0, 0.3, 0.5, 0.7, 0.85, 1, 1.3],
                        help="(default: 0 0.3 0.5 0.7 0.85 1 1.3)")
    args = parser.parse_args(arguments)
    twins = samplers.load_twins(args.checkpoint, args.judge, args.data_dir)
    x = torch.full((args.num_samples, twins.N), twins.mask_id)

    real = samplers.judged_real(twins, args.num_samples)
    samplers.show(real | {"distance": 0.0}, heading=True)
    rows = []
    for order in ORDERS:
        for temperature in args.temperatures:
            options = samplers.ORDERS[order] | dict(steps=args.steps, temperature=temperature)
            row, _ = samplers.judged(twins, order, x, **options)
            rows.append(row | {"distance": samplers.distance(row, real)})
            samplers.show(rows[-1])

    lines = {order: [row for row in rows if row["sampler"] == order] for order in ORDERS}
    lab.draw(args.picture, lambda panels: paint(panels, real, lines), columns=2, height=4.5)
    best = best_temperatures(rows)
    inside = [row for row in best.values() if 0.5 <= row["temperature"] <= 0.8]
    lab.answer("nearest to real text is " + ", ".join(
        f"temperature {row['temperature']:g} for {order}" for order, row in best.items())
        + f": 'between 0.5 and 0.8' holds for {len(inside)} of {len(best)} orders.",
        {"steps": args.steps, "real": real, "rows": rows,
         "best": {order: row["temperature"] for order, row in best.items()}})


if __name__ == "__main__":
    sys.exit(main())
