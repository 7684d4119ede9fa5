"""Does it pay to commit what is sure at once? python -m experiments.adaptive

A fixed schedule commits as many tokens in each step, sure or not. Adaptive decoding commits every token
whose probability exceeds a threshold, and one at least: easy texts take fewer model calls. Each threshold is
compared with the fixed schedule of as many calls, in the same order (the surest first), in two tasks:

    free    texts from nothing, at temperature 0.5
    fill    validation texts of which --share is hidden at random, by the likeliest tokens (temperature 0):
            much is given, and the model is often sure

Columns, beside those of experiments/samplers.py:

    calls   of the model until a text is finished, mean over the texts: alone, each ends at its own time
    right   share of the hidden tokens that are restored exactly, and its standard error (fill)
"""

import math
import sys

import torch
from torch import Tensor

from diffusion import State, draw_mask, keyed_generator, mean_and_error
from experiments import lab, samplers
from experiments.samplers import Twins


def calls_of_texts(states: list[State], mask_id: int) -> float:
    """Model calls until a text has nothing hidden, mean over the texts: without remasking, the number of
    states in which something of it is hidden."""
    return sum((state.tokens == mask_id).any(1).float().mean().item() for state in states)


def right(tokens: Tensor, x: Tensor, x_0: Tensor, mask_id: int) -> tuple[float, float]:
    """The share of the hidden tokens of x that `tokens` has as x_0 has them, all (n,T), and its error."""
    hidden = x == mask_id
    return mean_and_error(((tokens == x_0) & hidden).sum(1).double() / hidden.sum(1))


def hide(x_0: Tensor, share: float, mask_id: int) -> Tensor:
    """x_0 (n,T) with this share of each text hidden, at random, one token at least."""
    n, T = x_0.shape
    num_masked = torch.full((n,), max(1, round(share * T)))
    return x_0.masked_fill(draw_mask(num_masked, T, 0, keyed_generator(0, 0, "adaptive")), mask_id)


def compare(twins: Twins, task: str, x_0: Tensor, x: Tensor, thresholds: list[float],
            temperature: float) -> list[dict]:
    """Two rows for each threshold, also printed: adaptive, and a fixed schedule of as many calls."""
    rows, hidden = [], int((x == twins.mask_id).sum(1).max())
    for threshold in thresholds:
        calls = hidden  # the slowest pace: a token a call
        for how in (f"threshold {threshold:g}", "fixed"):
            adaptive = dict(threshold=threshold) if how != "fixed" else {}
            row, states = samplers.judged(twins, f"{task}, {how}", x, order="confidence", steps=calls,
                                          temperature=temperature, **adaptive)
            row["calls"] = calls_of_texts(states, twins.mask_id)
            calls = max(1, round(row["calls"]))  # what the fixed schedule is given next
            share, error = right(states[-1].tokens, x, x_0, twins.mask_id)
            row |= {"right": share, "right_error": error} if task == "fill" else {"right": None}
            samplers.show(row)
            rows.append(row | {"task": task, "hidden": hidden, "threshold": threshold,
                               "adaptive": bool(adaptive)})
    return rows


def paint(panels, real: dict[str, dict], rows: list[dict]) -> None:
    """Three panels: what the calls of each way buy, with standard errors where there are some."""
    for axes, (task, name, error, label) in zip(panels, (
            ("free", "judge", "error", "free: nats per token under the twin"),
            ("free", "entropy", None, "free: entropy of a text's tokens, nats"),
            ("fill", "right", "right_error", "fill: share of hidden tokens restored")), strict=True):
        for adaptive, how in ((True, "threshold"), (False, "fixed schedule of as many calls")):
            line = [row for row in rows if (row["task"], row["adaptive"]) == (task, adaptive)]
            axes.errorbar([row["calls"] for row in line], [row[name] for row in line],
                          [row[error] for row in line] if error else None, fmt="o-", capsize=3, label=how)
        axes.axhline(real[task][name], color="black", linestyle=":", label="real text")
        axes.set(xlabel="model calls for a text", ylabel=label)
    panels[0].figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


@lab.command
def main(arguments: list[str] | None = None) -> None:
    parser = samplers.flags("adaptive", __doc__)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.5, 0.7, 0.9],
                        help="(default: 0.5 0.7 0.9)")
    parser.add_argument("--length", type=lab.count, default=128, help="tokens of a text (default: 128)")
    parser.add_argument("--share", type=float, default=0.25, help="hidden in the second task (default: 0.25)")
    parser.add_argument("--fill-samples", type=lab.several, default=64, help="texts of it (default: 64)")
    args = parser.parse_args(arguments)
    if not 0 < args.share <= 1:
        parser.error(f"--share must be in (0, 1], not {args.share}")
    twins = samplers.load_twins(args.checkpoint, args.judge, args.data_dir)
    free, fill = (samplers.real_text(twins, rows)[:, : args.length]
                  for rows in (args.num_samples, args.fill_samples))
    tasks = {"free": (free, torch.full_like(free, twins.mask_id), 0.5),
             "fill": (fill, hide(fill, args.share, twins.mask_id), 0.0)}

    real, rows = {}, []
    for task, (x_0, x, temperature) in tasks.items():
        nothing = {"temperature": None, "calls": None, "tokens_per_second": None}
        real[task] = {"sampler": f"{task}, real text"} | nothing | samplers.figures(twins, x_0)
        real[task] |= {"right": 1.0, "right_error": 0.0} if task == "fill" else {"right": None}
        samplers.show(real[task], heading=True)
        rows += compare(twins, task, x_0, x, args.thresholds, temperature)

    lab.draw(args.picture, lambda panels: paint(panels, real, rows), columns=3, width=4.4)
    lab.answer(summary(rows), {"real": real, "rows": rows})


def summary(rows: list[dict]) -> str:
    """Whether thresholds beat fixed schedules of as many calls by more than chance, and each comparison."""
    said, better, worse = [], 0, 0
    for sure, fixed in zip(rows[::2], rows[1::2], strict=True):
        if sure["task"] == "free":
            gain, error = fixed["judge"] - sure["judge"], math.hypot(sure["error"], fixed["error"])
            figures = f"{sure['judge']:.2f} nats against {fixed['judge']:.2f}"
        else:
            gain = sure["right"] - fixed["right"]
            error = math.hypot(sure["right_error"], fixed["right_error"])
            figures = f"{sure['right']:.1%} right against {fixed['right']:.1%}"
        better, worse = better + (gain > 2 * error), worse + (gain < -2 * error)
        said.append(f"{sure['sampler']}: {sure['calls']:.0f} calls for {sure['hidden']} tokens, {figures}")
    return ("a threshold is better than a fixed schedule of as many calls, by more than two standard errors, "
            f"in {better} of {len(said)} comparisons, and worse in {worse}: " + "; ".join(said) + ".")


if __name__ == "__main__":
    sys.exit(main())
