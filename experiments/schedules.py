"""Which schedule is best? python -m experiments.schedules --checkpoint out/quickstart --data-dir data/sotu

A sampler that reveals random places at temperature 1 has an exact price,

    NELBO_S = (1/N) sum_i (m_i - m_{i+1}) CE(m_i),

so schedules are compared without drawing a sample. CE(m) is measured twice, on disjoint windows of validation
text: `optimal_schedule` is fitted to one curve, smoothed, and every schedule is priced by the other.

Prints the table schedule x steps, draws it, and ends with the answer in a sentence and a JSON line.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from diffusion import (
    SCHEDULES,
    Curve,
    draw_mask,
    hidden_counts,
    keyed_generator,
    mean_and_error,
    optimal_schedule,
    row_losses,
    schedule_nelbo,
    smooth,
)
from model import CheckpointError, Transformer, load_checkpoint
from prepare_data import DataError, TokenFile

STEPS = (5, 10, 20, 50)  # and as many as tokens


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


def draw(path: Path, measured: Curve, optimal: list[int], table: dict) -> None:
    """Three panels: the loss by mask level, the schedules for 20 steps, the prices."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    N, figure = measured.N, plt.figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.errorbar([m / N for m in measured.counts], measured.nats, measured.stderr, color="black")
    left.set(title="What the network knows", xlabel="share hidden", ylabel="CE(m), nats per hidden token")
    for name in (*SCHEDULES, "optimal"):
        prices, schedule = table[name], optimal if name == "optimal" else name
        counts = hidden_counts(schedule, torch.tensor([N]), 20)[:, 0] / N
        middle.plot(range(21), counts, marker=".", label=name)
        extra = [nats - table["linear"][N] for nats in prices.values()]
        right.plot(list(prices), extra, marker="o", label=name)
    middle.set(title="Schedules for 20 steps", xlabel="step", ylabel="share still hidden")
    right.set(title="What they cost", xlabel="steps", ylabel="NELBO_S - NELBO, nats per token", xscale="log")
    for axis in (middle, right):
        axis.legend()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(prog="experiments.schedules", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default="out/quickstart")
    parser.add_argument("--data-dir", default="data/sotu")
    parser.add_argument("--rows", type=int, default=1024, help="windows, half to fit and half to price")
    parser.add_argument("--curve-points", type=int, default=32)
    parser.add_argument("--picture", type=Path, help="draw all this into this PNG")
    args = parser.parse_args()
    try:
        model, info = load_checkpoint(args.checkpoint)
        val = TokenFile(args.data_dir, "val")
        x_0 = torch.from_numpy(val.spread(args.rows, model.config.context_length))
    except (CheckpointError, DataError) as error:
        print(f"experiments.schedules: {error}", file=sys.stderr)
        return 2

    # Every other window: two halves as alike as can be, and disjoint.
    fitted = measure(model, x_0[::2], args.curve_points, "to fit")
    measured = measure(model, x_0[1::2], args.curve_points, "to price")
    own = (info["evaluation"] or {}).get("curve")
    curves = {"optimal": smooth(fitted)}
    if own:  # what `sample.py --schedule optimal` has, and what it would be without smoothing
        curves |= {"by own curve": smooth(Curve(**own)), "by own, raw": Curve(**own)}
    table = price(measured, curves)

    print(f"\n{'NELBO_S <=, steps':18}" + "".join(f"{steps:>9}" for steps in (*STEPS, measured.N)))
    for name, prices in table.items():
        print(f"{name:18}" + "".join(f"{nats:9.4f}" for nats in prices.values()))
    answers = []
    for steps in STEPS:
        best = min(SCHEDULES, key=lambda name, steps=steps: table[name][steps])
        gain = table[best][steps] - table["optimal"][steps]
        answers.append(f"{gain:.3f} nats/token cheaper than {best} at {steps} steps")
    print("\nThe optimal schedule is " + ", ".join(answers) + ".")
    if args.picture:
        try:
            draw(args.picture, measured, optimal_schedule(curves["optimal"], 20), table)
        except (ImportError, OSError) as error:
            print(f"no picture: {error} (it needs: pip install matplotlib)", file=sys.stderr)
    print(json.dumps({"table": table, "fitted": fitted, "measured": measured}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
