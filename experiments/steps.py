"""How many steps does a text need? python -m experiments.steps

A model that writes everywhere at once may take one call for a text (one-shot), one for each token
(sequential) or any number between (iterative). What the tokens of one step cost by not knowing of each other
is exact for random places at temperature 1: the sampler's bound on -log p of real text, in nats per token,

    NELBO_S = (1/N) sum_i (m_i - m_{i+1}) CE(m_i)        (column `price`; CE by --rows validation texts)

and for all samplers it is judged: columns as in experiments/samplers.py. `calls` are of the model, for all
texts together, and tokens/s count the tokens of all. Three samplers:

    random          that one
    confident       the surest first, with Gumbel noise and remasking, at temperature 0.5: sample.py's best
    left to right   one token a call, as GPT writes
"""

import sys

import torch

from diffusion import nelbo, schedule_nelbo
from experiments import lab, samplers

SAMPLERS = {
    "random": dict(order="random"),
    "confident": dict(order="confidence", gumbel=1.0, remask="renoise", temperature=0.5),
}


def paint(panels, real: dict, lines: dict[str, list[dict]]) -> None:
    """Three figures against model calls, a line for each sampler; its price beside the first."""
    for axes, (name, label) in zip(panels, {
            "judge": "nats per token under the twin", "words": "share of words that exist",
            "entropy": "entropy of a text's tokens, nats"}.items(), strict=True):
        for sampler, line in lines.items():
            axes.plot([row["calls"] for row in line], [row[name] for row in line], "o-", label=sampler)
        axes.axhline(real[name], color="black", linestyle=":", label="real text")
        axes.set(xlabel="model calls", ylabel=label, xscale="log")
        axes.set_xticks(calls := [row["calls"] for row in lines["random"]], [str(number) for number in calls])
        axes.minorticks_off()
    line = lines["random"]
    panels[0].plot([row["calls"] for row in line], [row["price"] for row in line], "k--",
                   label="exact price of random")
    panels[0].figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)


@lab.command
def main(arguments: list[str] | None = None) -> None:
    parser = samplers.flags("steps", __doc__)
    parser.add_argument("--steps", type=lab.count, nargs="+", default=[1, 4, 16, 64, 256],
                        help="model calls; left to right takes one a token (default: 1 4 16 64 256)")
    parser.add_argument("--rows", type=lab.several, default=256, help="texts to measure CE on (default: 256)")
    args = parser.parse_args(arguments)
    twins = samplers.load_twins(args.checkpoint, args.judge, args.data_dir)
    N, x = twins.N, torch.full((args.num_samples, twins.N), twins.mask_id)
    curve = nelbo(twins.model, samplers.real_text(twins, args.rows), twins.mask_id, curve_points=30).curve

    real = samplers.judged_real(twins, args.num_samples)
    samplers.show(real | {"price": None}, heading=True)
    plans = [(sampler, dict(steps=min(steps, N)) | options) for sampler, options in SAMPLERS.items()
             for steps in args.steps]
    plans.append(("left to right", dict(order="left_to_right", steps=N)))
    rows = []
    for sampler, options in plans:
        row, _ = samplers.judged(twins, sampler, x, **options)
        row["price"] = schedule_nelbo(curve, "linear", options["steps"]) if sampler == "random" else None
        rows.append(row | {"steps": options["steps"]})
        samplers.show(row)
    lines = {sampler: sorted((row for row in rows if row["sampler"] == sampler), key=lambda row: row["steps"])
             for sampler in (*SAMPLERS, "left to right")}

    lab.draw(args.picture, lambda panels: paint(panels, real, lines), columns=3, width=4.4)
    said = []
    for sampler, line in lines.items():
        ends = [f"{row['judge']:.2f} nats and {row['words']:.0%} words by {row['calls']}"
                for row in (line[0], line[-1])][: len(line)]
        said.append(f"{sampler} {', '.join(ends)}")
    best = min(rows, key=lambda row: samplers.distance(row, real))
    lab.answer(
        f"by model calls: {'; '.join(said)} (real text: {real['judge']:.2f} and {real['words']:.0%}). "
        f"Nearest to real text in all figures: {best['sampler']} with {best['calls']} calls, "
        f"{best['tokens_per_second']:,} tokens/s.", {"real": real, "rows": rows, "curve": curve._asdict()})


if __name__ == "__main__":
    sys.exit(main())
