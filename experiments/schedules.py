"""Which schedule is best? python -m experiments.schedules

A sampler that reveals random positions at temperature 1 has an exact price,

    NELBO_S = (1/N) sum_i (m_i - m_{i+1}) CE(m_i),

so schedules are compared without drawing a sample. CE(m) is measured twice, on disjoint windows of
validation text: `optimal_schedule` is fitted to one curve, smoothed, and every schedule is priced
by the other. Prints the table schedule x steps, in nats per token.

Then each schedule writes --num-samples texts in --steps calls, by that sampler (random) and by one
that commits the most confident first (confidence, with Gumbel noise, at temperature 0.7). The
autoregressive twin judges them: columns as in lab/judge.py.
"""

import sys

import torch

from diffusion import (
    SCHEDULES,
    Curve,
    Schedule,
    hidden_counts,
    optimal_schedule,
    schedule_nelbo,
    smooth,
)
from experiments.lab.command import answer, count, flags_with_judge
from experiments.lab.judge import judged, judged_real, load_twins, print_row, real_text
from experiments.lab.pictures import draw
from experiments.lab.runs import measure_curve
from plumbing.command import command

STEPS = (5, 10, 20, 50)  # and as many as tokens
SAMPLERS = {
    "random": dict(order="random"),
    "confidence": dict(order="confidence", gumbel=1.0, temperature=0.7),
}


def price(measured: Curve, fitted: dict[str, Curve]) -> dict[str, dict[int, float]]:
    """{schedule: {steps: nats per token}} by the `measured` curve: of the named schedules, and for
    each of the `fitted` curves of the one that is optimal for it."""
    table = {}
    for name in (*SCHEDULES, *fitted):
        table[name] = {}
        for steps in (*STEPS, measured.N):
            schedule = optimal_schedule(fitted[name], steps) if name in fitted else name
            table[name][steps] = schedule_nelbo(measured, schedule, steps)
    return table


def paint_prices(panels, measured: Curve, schedules: dict[str, Schedule], table: dict,
                 steps: int) -> None:
    """Three panels: the loss by mask level, the schedules, their prices."""
    N = measured.N
    left, middle, right = panels
    ratios = [m / N for m in measured.counts]
    left.errorbar(ratios, measured.nats, measured.stderr, color="black")
    left.set(title="What the network knows", xlabel="mask ratio",
             ylabel="CE(m), nats per hidden token")
    for name, schedule in schedules.items():
        counts = hidden_counts(schedule, torch.tensor([N]), steps)[:, 0] / N
        middle.plot(range(len(counts)), counts, marker=".", label=name)
        extra = [nats - table["linear"][N] for nats in table[name].values()]
        right.plot(list(table[name]), extra, marker="o", label=name)
    middle.set(title=f"Schedules for {steps} steps", xlabel="step", ylabel="fraction still hidden")
    right.set(title="What they cost", xlabel="steps", ylabel="NELBO_S - NELBO, nats per token",
              xscale="log")


def paint_samples(axes, title: str, real: dict, rows: list[dict]) -> None:
    """Likelihood against entropy, a bar for the standard error of the former."""
    for row in rows:
        axes.errorbar(row["entropy"], row["judge"], row["error"], marker="o", capsize=3)
    axes.plot(real["entropy"], real["judge"], "k*", markersize=14)
    axes.set(title=title, xlabel="entropy of a text's tokens, nats (star: real)",
             ylabel="nats per token under the twin")


@command("experiments.schedules")
def main(arguments: list[str]) -> None:
    parser = flags_with_judge("schedules", __doc__, num_samples=32)
    add = parser.add_argument
    add("--rows", type=count, default=256,
        help="windows, half to fit and half to price (default: 256)")
    add("--curve-points", type=count, default=32, help="of each curve (default: 32)")
    add("--steps", type=count, default=20, help="of the samples (default: 20)")
    args = parser.parse_args(arguments)
    if args.rows < 4:
        parser.error(f"--rows must be at least 4, not {args.rows}")
    twins = load_twins(args.checkpoint, args.judge, args.data_dir)
    x_0 = real_text(twins, args.rows)

    # Every other window: two halves as alike as can be, and disjoint.
    fitted, measured = (
        measure_curve(twins.model, windows, twins.mask_id, args.curve_points, label)
        for windows, label in ((x_0[::2], "to fit"), (x_0[1::2], "to price")))
    own = (twins.info.get("evaluation") or {}).get("curve")
    curves = {"optimal": smooth(fitted)}
    if own:  # what `sample.py --schedule optimal` has, and what it would be without smoothing
        curves |= {"by own curve": smooth(Curve(**own)), "by own, raw": Curve(**own)}
    table = price(measured, curves)
    print(f"{'NELBO_S <=, steps':18}" + "".join(f"{steps:>9}" for steps in (*STEPS, measured.N)))
    for name, prices in table.items():
        print(f"{name:18}" + "".join(f"{nats:9.4f}" for nats in prices.values()))
    # As if all errors were one: they share their windows.
    error = sum(measured.stderr) / len(measured.stderr)
    print(f"(a price is known to +- {error:.3f}, differences much better: all are of the same "
          "windows)\n")

    steps = min(args.steps, twins.N)
    schedules = {name: name for name in SCHEDULES}
    schedules["optimal"] = optimal_schedule(curves["optimal"], steps)
    x = torch.full((args.num_samples, twins.N), twins.mask_id)
    real = judged_real(twins, real_text(twins, args.num_samples))
    print_row(real, heading=True)
    rows = []
    texts = []
    for sampler, options in SAMPLERS.items():
        for name, schedule in schedules.items():
            row, states = judged(twins, f"{name}, {sampler}", x, steps=steps, schedule=schedule,
                                 **options)
            print_row(row)
            rows.append(row | {"schedule": name, "order": sampler})
            texts.append((row["sampler"], twins.decode(states[-1].tokens[0].tolist())[:90]))
    print("\n" + "\n".join(f"{name:24} {text!r}" for name, text in texts))

    def paint(panels) -> None:
        paint_prices(panels[0], measured, schedules, table, steps)
        for axes, sampler in zip(panels[1], SAMPLERS, strict=False):
            line = [row for row in rows if row["order"] == sampler]
            paint_samples(axes, f"Samples, order {sampler}", real, line)
        panels[1][2].axis("off")
        labels = panels[0][1].get_legend_handles_labels()
        panels[1][2].legend(*labels, title="schedule", loc="center left")

    draw(args.picture, paint, columns=3, rows=2, width=4.4, height=3.8)
    answer(summary(table, rows), {"table": table, "fitted": fitted, "measured": measured,
                                  "real": real, "rows": rows})


def summary(table: dict, rows: list[dict]) -> str:
    """What the prices say, and the samples, also of the folklore about cosine and exponential."""
    gains = []
    for steps in STEPS:
        best = min(SCHEDULES, key=lambda name, steps=steps: table[name][steps])
        gain = table["optimal"][steps] - table[best][steps]
        gains.append(f"{gain:+.3f} at {steps} steps ({best})")
    said = ["what the optimal schedule costs beyond the best named one, in nats/token: "
            + ", ".join(gains)]
    for sampler in SAMPLERS:
        found = {row["schedule"]: row for row in rows if row["order"] == sampler}
        best = min(found, key=lambda name: found[name]["judge"])
        varied = max(found, key=lambda name: found[name]["distinct"])
        others = "".join(f", of {name} {brief(found[name])}"
                         for name in ("linear", "cosine", "exponential") if name != best)
        said.append(f"Of the samples in order {sampler}, {best}'s are likeliest "
                    f"({brief(found[best])}){others}; the most varied are {varied}'s")
    return ". ".join(said) + "."


def brief(row: dict) -> str:
    """What the judge thinks of a schedule, and how varied its texts are."""
    return f"{row['judge']:.2f} +- {row['error']:.2f} nats, distinct {row['distinct']:.3f}"


if __name__ == "__main__":
    sys.exit(main())
