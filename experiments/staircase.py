"""What do fewer calls cost? One picture: python -m experiments.staircase

CE(m) is what a hidden token costs while m of N are hidden, from the log of the checkpoint. Its mean
height is the NELBO, the price of writing one random token per call. A sampler that commits many
tokens in a call pays the height at the *start* of the call for all of them, since they are drawn
without seeing each other: its price is the mean height of the staircase (diffusion.schedule_nelbo).
"""

import sys

import numpy as np
import torch

from diffusion import Curve, hidden_counts, schedule_nelbo, smooth
from experiments.lab.command import count, flags, report
from experiments.lab.pictures import draw
from plumbing.checkpoint import load_checkpoint
from plumbing.command import command
from plumbing.config import ConfigError


def paint(panels, curve: Curve, calls: list[int], prices: list[float], nelbo: float) -> None:
    """The curve, smoothed, and its area; above it the stairs of each number of calls."""
    line = smooth(curve)
    written = curve.N - np.array(line.counts)  # left to right: as a text fills up
    for panel, steps, price in zip(panels, calls, prices, strict=True):
        m = hidden_counts("linear", torch.tensor([curve.N]), steps)[:, 0]  # before each call
        heights = np.interp(m[:-1], line.counts, line.nats)
        panel.fill_between(curve.N - m, [*heights, heights[-1]], step="post",
                           color="tab:orange", alpha=0.35, label=f"{steps} calls: <= {price:.2f}")
        panel.fill_between(written, line.nats, color="tab:blue", alpha=0.8,
                           label=f"{curve.N} calls: NELBO <= {nelbo:.2f}")
        panel.plot(written, line.nats, color="black")
        panel.plot(curve.N - np.array(curve.counts), curve.nats, "k.", markersize=4)
        panel.set(xlabel="tokens written", xlim=(0, curve.N), ylim=(0, max(curve.nats) * 1.35))
        panel.legend(loc="upper right")
    panels[0].set(ylabel="nats for the next token")


@command("experiments.staircase")
def main(arguments: list[str]) -> None:
    parser = flags("staircase", __doc__, data_dir=False)
    parser.add_argument("--calls", type=count, nargs=2, default=[4, 16], help="(default: 4 16)")
    args = parser.parse_args(arguments)
    _, info = load_checkpoint(args.checkpoint)
    if not info["evaluation"] or not info["evaluation"]["curve"]:
        raise ConfigError(f"{args.checkpoint} has no curve of the loss by mask ratio")
    curve = Curve(**info["evaluation"]["curve"])
    nelbo = info["evaluation"]["nats"]
    prices = [schedule_nelbo(curve, "linear", steps) for steps in args.calls]
    for steps, price in zip([curve.N, *args.calls], [nelbo, *prices], strict=True):
        print(f"{steps:4} calls: <= {price:.3f} nats per token")
    draw(args.picture, lambda panels: paint(panels, curve, args.calls, prices, nelbo),
         columns=len(args.calls), width=5.5, height=3.6)
    report({"nelbo": nelbo, "calls": dict(zip(args.calls, prices, strict=True))})


if __name__ == "__main__":
    sys.exit(main())
