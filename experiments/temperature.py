"""Which temperature is best? python -m experiments.temperature

Temperature tau draws a token from p^(1/tau), renormalised: 0 takes the likeliest, 1 believes the model, more
than 1 flattens. Each is tried with some orders of writing. Columns, as in experiments/samplers.py:

    judge, error   nats per token under the autoregressive twin, and the standard error over the texts
    entropy        of a text's own tokens, in nats
    distinct       share of different ones among the texts' runs of three tokens
    words          share of the words that occur in the training text
    distance       from real text: the sum of the relative differences of the last four (without the error)

A low temperature is likely under the judge *because* it repeats itself: only both figures together say
anything. The picture is that frontier, the real text a star on it.
"""

import sys

import torch

from experiments import lab, samplers

DEFAULT = ["random", "confidence, gumbel 1", "margin"]


def best_temperatures(rows: list[dict]) -> dict[str, dict]:
    """{order: its row nearest to real text}."""
    return {order: min((row for row in rows if row["sampler"] == order), key=lambda row: row["distance"])
            for order in dict.fromkeys(row["sampler"] for row in rows)}


@lab.command
def main(arguments: list[str] | None = None) -> None:
    parser = samplers.flags("temperature", __doc__)
    parser.add_argument("--steps", type=lab.count, default=32, help="model calls (default: 32)")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0, 0.3, 0.5, 0.7, 0.85, 1, 1.3],
                        help="(default: 0 0.3 0.5 0.7 0.85 1 1.3)")
    parser.add_argument("--orders", nargs="+", choices=list(samplers.ORDERS), default=DEFAULT,
                        help=f"(default: {DEFAULT})")
    args = parser.parse_args(arguments)
    twins = samplers.load_twins(args.checkpoint, args.judge, args.data_dir)
    x = torch.full((args.num_samples, twins.N), twins.mask_id)

    real = samplers.judged_real(twins, args.num_samples)
    samplers.show(real | {"distance": 0.0}, heading=True)
    rows = []
    for order in args.orders:
        for temperature in args.temperatures:
            row, _ = samplers.judged(twins, order, x, steps=args.steps, temperature=temperature,
                                     **samplers.ORDERS[order])
            rows.append(row | {"distance": samplers.distance(row, real)})
            samplers.show(rows[-1])

    def paint(axes) -> None:
        samplers.frontier(axes, real, {order: [row for row in rows if row["sampler"] == order]
                                       for order in args.orders})
        for row in rows:
            axes.annotate(f"{row['temperature']:g}", (row["entropy"], row["judge"]), fontsize=8,
                          xytext=(5, -9), textcoords="offset points")
        axes.set(title=f"Temperatures, {args.steps} model calls")
        axes.figure.legend(loc="outside right center")

    lab.draw(args.picture, paint, width=8.5, height=5)
    best = best_temperatures(rows)
    inside = [order for order, row in best.items() if 0.5 <= row["temperature"] <= 0.8]
    lab.answer("nearest to real text is " + ", ".join(
        f"temperature {row['temperature']:g} for {order}" for order, row in best.items())
        + f": 'between 0.5 and 0.8' holds for {len(inside)} of {len(best)} orders.",
        {"steps": args.steps, "real": real, "rows": rows,
         "best": {order: row["temperature"] for order, row in best.items()}})


if __name__ == "__main__":
    sys.exit(main())
