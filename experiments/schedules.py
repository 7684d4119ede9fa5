"""Which schedule is best? python -m experiments.schedules

A sampler that reveals random places at temperature 1 has an exact price,

    NELBO_S = (1/N) sum_i (m_i - m_{i+1}) CE(m_i),

so schedules are compared without drawing a sample. CE(m) is measured twice, on disjoint windows of validation
text: `optimal_schedule` is fitted to one curve, smoothed, and every schedule is priced by the other. Prints
the table schedule x steps, in nats per token.

Then each schedule writes --num-samples texts in --steps calls, by that sampler (random) and by one that
commits what it is surest of first (confidence, with Gumbel noise, at temperature 0.7). The autoregressive
twin judges them: columns as in experiments/samplers.py.
"""

import sys
import time

import torch
from torch import Tensor

from diffusion import (
    SCHEDULES,
    Curve,
    Schedule,
    draw_mask,
    hidden_counts,
    keyed_generator,
    mean_and_error,
    optimal_schedule,
    row_losses,
    schedule_nelbo,
    smooth,
)
from experiments import lab, samplers
from model import Transformer

STEPS = (5, 10, 20, 50)  # and as many as tokens
SAMPLERS = {
    "random": dict(order="random"),
    "confidence": dict(order="confidence", gumbel=1.0, temperature=0.7),
}


@torch.no_grad()
def measure(model: Transformer, x_0: Tensor, points: int, label: str) -> Curve:
    """CE(m) at m = 1 and `points` counts evenly spaced up to N, every one on all rows of x_0 (R,N).

    (`nelbo` gives each count its share of the rows: cheaper, but too rough to tell good schedules apart.)
    """
    R, N = x_0.shape
    mask_id, generator = model.config.mask_id, keyed_generator(0, 0, label)
    counts = sorted({1, *(max(1, round(N * i / points)) for i in range(1, points + 1))})
    values, started = [], time.monotonic()
    for done, m in enumerate(counts, start=1):
        mask = draw_mask(torch.full((R,), m), N, 0, generator)
        by_row = row_losses(model, x_0.masked_fill(mask, mask_id), x_0, mask, batch_size=32)
        values.append(mean_and_error(by_row))
        left = (time.monotonic() - started) / done * (len(counts) - done)
        nats, error = values[-1]
        print(f"{label}: CE({m}) = {nats:.3f} +- {error:.3f}, {left:.0f} s left", file=sys.stderr)
    nats, errors = zip(*values, strict=True)
    return Curve(N, counts, list(nats), list(errors))


def price(measured: Curve, fitted: dict[str, Curve]) -> dict[str, dict[int, float]]:
    """{schedule: {steps: nats per token}} by the `measured` curve: the named schedules, and for each of the
    `fitted` curves the one that is optimal for it."""
    table = {}
    for name in (*SCHEDULES, *fitted):
        table[name] = {}
        for steps in (*STEPS, measured.N):
            schedule = optimal_schedule(fitted[name], steps) if name in fitted else name
            table[name][steps] = schedule_nelbo(measured, schedule, steps)
    return table


def paint_prices(panels, measured: Curve, schedules: dict[str, Schedule], table: dict, steps: int) -> None:
    """Three panels: the loss by mask level, the schedules, their prices."""
    N, (left, middle, right) = measured.N, panels
    left.errorbar([m / N for m in measured.counts], measured.nats, measured.stderr, color="black")
    left.set(title="What the network knows", xlabel="share hidden", ylabel="CE(m), nats per hidden token")
    for name, schedule in schedules.items():
        counts = hidden_counts(schedule, torch.tensor([N]), steps)[:, 0] / N
        middle.plot(range(len(counts)), counts, marker=".", label=name)
        extra = [nats - table["linear"][N] for nats in table[name].values()]
        right.plot(list(table[name]), extra, marker="o", label=name)
    middle.set(title=f"Schedules for {steps} steps", xlabel="step", ylabel="share still hidden")
    right.set(title="What they cost", xlabel="steps", ylabel="NELBO_S - NELBO, nats per token", xscale="log")


def paint_samples(axes, title: str, real: dict, rows: list[dict]) -> None:
    """Likelihood against entropy, a bar for the standard error of the former."""
    for row in rows:
        axes.errorbar(row["entropy"], row["judge"], row["error"], marker="o", capsize=3)
    axes.plot(real["entropy"], real["judge"], "k*", markersize=14)
    axes.set(title=title, xlabel="entropy of a text's tokens, nats (star: real)",
             ylabel="nats per token under the twin")


@lab.command
def main(arguments: list[str] | None = None) -> None:
    parser = samplers.flags("schedules", __doc__, num_samples=32)
    parser.add_argument("--rows", type=lab.count, default=256,
                        help="windows, half to fit and half to price (default: 256)")
    parser.add_argument("--curve-points", type=lab.count, default=32, help="of each curve (default: 32)")
    parser.add_argument("--steps", type=lab.count, default=20, help="of the samples (default: 20)")
    args = parser.parse_args(arguments)
    if args.rows < 4:
        parser.error(f"--rows must be at least 4, not {args.rows}")
    twins = samplers.load_twins(args.checkpoint, args.judge, args.data_dir)
    x_0 = samplers.real_text(twins, args.rows)

    # Every other window: two halves as alike as can be, and disjoint.
    fitted = measure(twins.model, x_0[::2], args.curve_points, "to fit")
    measured = measure(twins.model, x_0[1::2], args.curve_points, "to price")
    own = (twins.info.get("evaluation") or {}).get("curve")
    curves = {"optimal": smooth(fitted)}
    if own:  # what `sample.py --schedule optimal` has, and what it would be without smoothing
        curves |= {"by own curve": smooth(Curve(**own)), "by own, raw": Curve(**own)}
    table = price(measured, curves)
    print(f"{'NELBO_S <=, steps':18}" + "".join(f"{steps:>9}" for steps in (*STEPS, measured.N)))
    for name, prices in table.items():
        print(f"{name:18}" + "".join(f"{nats:9.4f}" for nats in prices.values()))
    error = sum(measured.stderr) / len(measured.stderr)  # as if all errors were one: they share their windows
    print(f"(a price is known to +- {error:.3f}, differences much better: all are of the same windows)\n")

    steps = min(args.steps, twins.N)
    schedules = {name: name for name in SCHEDULES} | {"optimal": optimal_schedule(curves["optimal"], steps)}
    x = torch.full((args.num_samples, twins.N), twins.mask_id)
    real, rows = samplers.judged_real(twins, args.num_samples), []
    samplers.show(real, heading=True)
    texts = []
    for sampler, options in SAMPLERS.items():
        for name, schedule in schedules.items():
            how = options | dict(steps=steps, schedule=schedule)
            row, states = samplers.judged(twins, f"{name}, {sampler}", x, **how)
            samplers.show(row)
            rows.append(row | {"schedule": name, "order": sampler})
            texts.append((row["sampler"], twins.decode(states[-1].tokens[0].tolist())[:90]))
    print("\n" + "\n".join(f"{name:24} {text!r}" for name, text in texts))

    def paint(panels) -> None:
        paint_prices(panels[0], measured, schedules, table, steps)
        for axes, sampler in zip(panels[1], SAMPLERS, strict=False):
            line = [row for row in rows if row["order"] == sampler]
            paint_samples(axes, f"Samples, order {sampler}", real, line)
        panels[1][2].axis("off")
        panels[1][2].legend(*panels[0][1].get_legend_handles_labels(), title="schedule", loc="center left")

    lab.draw(args.picture, paint, columns=3, rows=2, width=4.4, height=3.8)
    lab.answer(summary(table, rows), {"table": table, "fitted": fitted, "measured": measured, "real": real,
                                      "rows": rows})


def summary(table: dict, rows: list[dict]) -> str:
    """What the prices say, and the samples, also of the folklore about cosine and exponential."""
    gains = []
    for steps in STEPS:
        best = min(SCHEDULES, key=lambda name, steps=steps: table[name][steps])
        gains.append(f"{table['optimal'][steps] - table[best][steps]:+.3f} at {steps} steps ({best})")
    said = ["what the optimal schedule costs beyond the best named one, in nats/token: " + ", ".join(gains)]
    for sampler in SAMPLERS:
        found = {row["schedule"]: row for row in rows if row["order"] == sampler}
        best = min(found, key=lambda name: found[name]["judge"])
        varied = max(found, key=lambda name: found[name]["distinct"])
        others = "".join(f", of {name} {brief(found, name)}" for name in ("linear", "cosine", "exponential")
                         if name != best)
        said.append(f"of the samples in order {sampler}, {best}'s are likeliest ({brief(found, best)})"
                    f"{others}; the most varied are {varied}'s")
    return ". ".join(said).replace(". of", ". Of") + "."


def brief(found: dict[str, dict], name: str) -> str:
    """The judge's figure of a schedule, and how varied its texts are."""
    row = found[name]
    return f"{row['judge']:.2f} +- {row['error']:.2f} nats, distinct {row['distinct']:.3f}"


if __name__ == "__main__":
    sys.exit(main())
