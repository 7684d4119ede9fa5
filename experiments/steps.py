"""How many steps does a text need? python -m experiments.steps

A model that writes everywhere at once may take one call for a text (one-shot), one for each token
(sequential) or any number between (iterative). What the tokens of one step cost by not knowing of
each other is exact for random order at temperature 1: the sampler's bound on -log p of real text,
in nats per token,

    NELBO_S = (1/N) sum_i (m_i - m_{i+1}) CE(m_i)    (column `price`; CE by --rows validation texts)

and all samplers are judged: columns as in lab/judge.py. `calls` are of the model, for all texts
together, and tokens/s count the tokens of all. Three samplers:

    random          that one
    confident       the most confident first, with Gumbel noise and remasking, at temperature 0.5
    left to right   one token a call, as GPT writes
"""

import sys

import torch

from diffusion import nelbo, schedule_nelbo
from experiments.lab.command import answer, count, flags_with_judge, several
from experiments.lab.judge import (
    distance,
    judged,
    judged_real,
    load_twins,
    print_row,
    real_text,
)
from experiments.lab.pictures import draw
from plumbing.command import command

SAMPLERS = {
    "random": dict(order="random"),
    "confident": dict(order="confidence", gumbel=1.0, remask="renoise", temperature=0.5),
}


def paint(panels, real: dict, lines: dict[str, list[dict]]) -> None:
    """Three numbers against model calls, a line for each sampler; its price beside the first."""
    line = lines["random"]
    calls = [row["calls"] for row in line]
    for axes, (name, label) in zip(panels, {
            "judge": "nats per token under the twin", "words": "fraction of words that exist",
            "entropy": "entropy of a text's tokens, nats"}.items(), strict=True):
        for sampler, rows in lines.items():
            axes.plot([row["calls"] for row in rows], [row[name] for row in rows], "o-",
                      label=sampler)
        axes.axhline(real[name], color="black", linestyle=":", label="real text")
        axes.set(xlabel="model calls", ylabel=label, xscale="log")
        axes.set_xticks(calls, [str(number) for number in calls])
        axes.minorticks_off()
    panels[0].plot(calls, [row["price"] for row in line], "k--", label="exact price of random")
    labels = panels[0].get_legend_handles_labels()
    panels[0].figure.legend(*labels, loc="outside lower center", ncols=5)


@command("experiments.steps")
def main(arguments: list[str]) -> None:
    parser = flags_with_judge("steps", __doc__)
    add = parser.add_argument
    add("--steps", type=count, nargs="+", default=[1, 4, 16, 64, 256],
        help="model calls; left to right takes one a token (default: 1 4 16 64 256)")
    add("--rows", type=several, default=256, help="texts to measure CE on (default: 256)")
    args = parser.parse_args(arguments)
    twins = load_twins(args.checkpoint, args.judge, args.data_dir)
    N = twins.N
    x = torch.full((args.num_samples, N), twins.mask_id)
    measured = real_text(twins, args.rows)
    curve = nelbo(twins.model, measured, twins.mask_id, curve_points=30).curve

    real = judged_real(twins, real_text(twins, args.num_samples))
    print_row(real | {"price": None}, heading=True)
    plans = [(sampler, options | dict(steps=min(steps, N)))
             for sampler, options in SAMPLERS.items() for steps in args.steps]
    plans.append(("left to right", dict(order="left_to_right", steps=N)))
    rows = []
    for sampler, options in plans:
        steps = options["steps"]
        row, _ = judged(twins, sampler, x, **options)
        row["price"] = schedule_nelbo(curve, "linear", steps) if sampler == "random" else None
        rows.append(row | {"steps": steps})
        print_row(row)
    lines = {}
    for sampler in (*SAMPLERS, "left to right"):
        line = [row for row in rows if row["sampler"] == sampler]
        lines[sampler] = sorted(line, key=lambda row: row["steps"])

    draw(args.picture, lambda panels: paint(panels, real, lines), columns=3, width=4.4)
    said = []
    for sampler, line in lines.items():
        ends = [f"{row['judge']:.2f} nats and {row['words']:.0%} words by {row['calls']}"
                for row in (line[0], line[-1])][: len(line)]
        said.append(f"{sampler} {', '.join(ends)}")
    best = min(rows, key=lambda row: distance(row, real))
    answer(f"by model calls: {'; '.join(said)} (real text: {real['judge']:.2f} and "
           f"{real['words']:.0%}). Nearest to real text in all numbers: {best['sampler']} with "
           f"{best['calls']} calls, {best['tokens_per_second']:,} tokens/s.",
           {"real": real, "rows": rows, "curve": curve._asdict()})


if __name__ == "__main__":
    sys.exit(main())
