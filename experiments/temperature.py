"""Which temperature is best? python -m experiments.temperature

Temperature tau draws a token from p^(1/tau), renormalised: 0 takes the likeliest, 1 believes the model, more
than 1 flattens. Each is tried with three samplers: random places, the surest places first (with Gumbel
noise), and that with remasking, sample.py's best. Columns, as in experiments/samplers.py:

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

SAMPLERS = {
    "random": dict(order="random"),
    "confidence": dict(order="confidence", gumbel=1.0),
    "confidence, renoised": dict(order="confidence", gumbel=1.0, remask="renoise"),
}


def best_temperatures(rows: list[dict]) -> dict[str, dict]:
    """{sampler: its row nearest to real text}."""
    return {sampler: min((row for row in rows if row["sampler"] == sampler), key=lambda row: row["distance"])
            for sampler in SAMPLERS}


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
    for sampler, options in SAMPLERS.items():
        for temperature in args.temperatures:
            options = options | dict(steps=args.steps, temperature=temperature)
            row, _ = samplers.judged(twins, sampler, x, **options)
            rows.append(row | {"distance": samplers.distance(row, real)})
            samplers.show(rows[-1])

    lines = {sampler: [row for row in rows if row["sampler"] == sampler] for sampler in SAMPLERS}

    def paint(panels) -> None:
        left, right = panels
        samplers.frontier(left, real, lines)
        for line in lines.values():
            for row in (line[0], line[-1]):
                left.annotate(f"{row['temperature']:g}", (row["entropy"], row["judge"]), xytext=(6, -11),
                              textcoords="offset points")
        for line in lines.values():
            right.plot([row["temperature"] for row in line], [row["distance"] for row in line], "o-")
        right.axvspan(0.5, 0.8, color="lightgrey", zorder=0)
        left.set(title=f"Temperatures, {args.steps} model calls")
        right.set(title="Is 0.5 to 0.8 best?", xlabel="temperature", ylabel="distance from real text")
        left.figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)

    lab.draw(args.picture, paint, columns=2, height=4.5)
    best = best_temperatures(rows)
    inside = [row for row in best.values() if 0.5 <= row["temperature"] <= 0.8]
    lab.answer("nearest to real text is " + ", ".join(
        f"temperature {row['temperature']:g} for {sampler}" for sampler, row in best.items())
        + f": 'between 0.5 and 0.8' holds for {len(inside)} of {len(best)} samplers.",
        {"steps": args.steps, "real": real, "rows": rows,
         "best": {sampler: row["temperature"] for sampler, row in best.items()}})


if __name__ == "__main__":
    sys.exit(main())
