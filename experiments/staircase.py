"""What do fewer calls cost? One picture: python -m experiments.staircase

CE(m) is what a hidden token costs while m of N are hidden, from the log of the checkpoint. Its mean
height is the NELBO, the price of writing one random token per call. A sampler that commits many
tokens in a call pays the height at the *start* of the call for all of them, since they are drawn
without seeing each other: its price is the mean height of the staircase (diffusion.schedule_nelbo).
"""

import sys

import numpy as np

from diffusion import Curve, schedule_nelbo, smooth
from experiments.lab.command import flags, report
from experiments.lab.pictures import draw
from plumbing.checkpoint import load_checkpoint
from plumbing.command import command
from plumbing.config import ConfigError


def paint(panels, curve: Curve, prices: dict[int, float]) -> None:
    """The curve, smoothed, and its area; above it the stairs of 4 and of 16 calls."""
    line = smooth(curve)
    written = curve.N - np.array(line.counts)  # left to right: as a text fills up
    for panel, steps in zip(panels, (4, 16), strict=True):
        m = np.linspace(curve.N, 0, steps + 1)  # hidden before each call, at last none
        panel.stairs(np.interp(m[:-1], line.counts, line.nats), curve.N - m, fill=True,
                     color="tab:orange", alpha=0.5, label=f"{steps} calls: <= {prices[steps]:.2f}")
        panel.fill_between(written, line.nats, color="tab:blue", alpha=0.8,
                           label=f"{curve.N} calls: NELBO <= {prices[curve.N]:.2f}")
        panel.plot(curve.N - np.array(curve.counts), curve.nats, "k.", markersize=4,
                   label="CE(m), measured")
        panel.set(xlabel="tokens written, of a text that fills up", xlim=(0, curve.N),
                  ylabel="nats for the next token", ylim=(0, max(curve.nats) * 1.35))
        panel.legend(loc="upper right")


@command("experiments.staircase")
def main(arguments: list[str]) -> None:
    args = flags("staircase", __doc__, data_dir=False).parse_args(arguments)
    _, info = load_checkpoint(args.checkpoint)
    if not info["evaluation"] or not info["evaluation"]["curve"]:
        raise ConfigError(f"{args.checkpoint} has no curve of the loss by mask ratio")
    curve = Curve(**info["evaluation"]["curve"])
    prices = {steps: schedule_nelbo(curve, "linear", steps) for steps in (4, 16)}
    prices[curve.N] = info["evaluation"]["nats"]
    for steps, price in prices.items():
        print(f"{steps:4} calls: <= {price:.3f} nats per token")
    draw(args.picture, lambda panels: paint(panels, curve, prices), columns=2, height=3.6)
    report({"calls": prices})


if __name__ == "__main__":
    sys.exit(main())
