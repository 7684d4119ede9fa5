"""Does it pay to commit what is confident at once? python -m experiments.adaptive

A fixed schedule commits as many tokens in each step, confident or not. Adaptive decoding commits
every token whose probability exceeds a threshold, and at least one: easy texts take fewer model
calls. Each threshold is compared with the fixed schedule of as many calls, in the same order (the
most confident first), in two tasks:

    free    texts from nothing, at temperature 0.5
    fill    validation texts of which --mask-ratio is hidden at random, by the likeliest tokens
            (temperature 0): much is given, and the model is often confident

Columns, beside those of lab/judge.py:

    calls   of the model until a text is finished, mean over the texts: alone, each would end at its
            own time
    right   fraction of the hidden tokens that are restored exactly, and its standard error (fill)
"""

import math
import sys

import torch
from torch import Tensor

from diffusion import draw_mask, keyed_generator, mean_and_error
from experiments.lab.command import answer, count, flags_with_judge, several
from experiments.lab.judge import Twins, judged, judged_real, load_twins, print_row, real_text
from experiments.lab.pictures import draw
from plumbing.command import command
from sample import State


def calls_of_texts(states: list[State], mask_id: int) -> float:
    """Model calls until a text has nothing hidden, mean over the texts: without remasking, the
    number of states in which something of it is hidden."""
    return sum((state.tokens == mask_id).any(1).float().mean().item() for state in states)


def right(tokens: Tensor, x: Tensor, x_0: Tensor, mask_id: int) -> tuple[float, float]:
    """The fraction of the hidden tokens of x (n,T) that `tokens` restores, and its error."""
    hidden = x == mask_id
    return mean_and_error(((tokens == x_0) & hidden).sum(1).double() / hidden.sum(1))


def hide(x_0: Tensor, mask_ratio: float, mask_id: int) -> Tensor:
    """x_0 (n,T) with this fraction of each text hidden, at random, one token at least."""
    n, T = x_0.shape
    num_masked = torch.full((n,), max(1, round(mask_ratio * T)))
    mask = draw_mask(num_masked, T, 0, keyed_generator(0, 0, "adaptive"))
    return x_0.masked_fill(mask, mask_id)


def compare(twins: Twins, task: str, x_0: Tensor, x: Tensor, thresholds: list[float],
            temperature: float) -> list[dict]:
    """Two printed rows for each threshold: adaptive, and a fixed schedule of as many calls."""
    rows = []
    hidden = int((x == twins.mask_id).sum(1).max())
    for threshold in thresholds:
        calls = hidden  # the slowest pace: a token a call
        for how in (f"threshold {threshold:g}", "fixed"):
            adaptive = dict(threshold=threshold) if how != "fixed" else {}
            row, states = judged(twins, f"{task}, {how}", x, order="confidence", steps=calls,
                                 temperature=temperature, **adaptive)
            row["calls"] = calls_of_texts(states, twins.mask_id)
            calls = max(1, round(row["calls"]))  # what the fixed schedule is given next
            row["right"] = None
            if task == "fill":
                row["right"], row["right_error"] = right(states[-1].tokens, x, x_0, twins.mask_id)
            print_row(row)
            rows.append(row | {"task": task, "hidden": hidden, "threshold": threshold,
                               "adaptive": bool(adaptive)})
    return rows


def paint(panels, real: dict[str, dict], rows: list[dict]) -> None:
    """Three panels: what the calls of each way buy, with standard errors where there are some."""
    for axes, (task, name, error, label) in zip(panels, (
            ("free", "judge", "error", "free: nats per token under the twin"),
            ("free", "entropy", None, "free: entropy of a text's tokens, nats"),
            ("fill", "right", "right_error", "fill: fraction of hidden tokens restored")),
            strict=True):
        for adaptive, how in ((True, "threshold"), (False, "fixed schedule of as many calls")):
            line = [row for row in rows if (row["task"], row["adaptive"]) == (task, adaptive)]
            errors = [row[error] for row in line] if error else None
            axes.errorbar([row["calls"] for row in line], [row[name] for row in line], errors,
                          fmt="o-", capsize=3, label=how)
        axes.axhline(real[task][name], color="black", linestyle=":", label="real text")
        axes.set(xlabel="model calls for a text", ylabel=label)
    labels = panels[0].get_legend_handles_labels()
    panels[0].figure.legend(*labels, loc="outside lower center", ncols=3)


@command("experiments.adaptive")
def main(arguments: list[str]) -> None:
    parser = flags_with_judge("adaptive", __doc__)
    add = parser.add_argument
    add("--thresholds", type=float, nargs="+", default=[0.5, 0.7, 0.9],
        help="(default: 0.5 0.7 0.9)")
    add("--length", type=count, default=128, help="tokens of a text (default: 128)")
    add("--mask-ratio", type=float, default=0.25, help="hidden in the second task (default: 0.25)")
    add("--fill-samples", type=several, default=64, help="texts of it (default: 64)")
    args = parser.parse_args(arguments)
    if not 0 < args.mask_ratio <= 1:
        parser.error(f"--mask-ratio must be in (0, 1], not {args.mask_ratio}")
    twins = load_twins(args.checkpoint, args.judge, args.data_dir)
    free = real_text(twins, args.num_samples)[:, : args.length]
    fill = real_text(twins, args.fill_samples)[:, : args.length]
    tasks = {"free": (free, torch.full_like(free, twins.mask_id), 0.5),
             "fill": (fill, hide(fill, args.mask_ratio, twins.mask_id), 0.0)}

    real = {}
    rows = []
    for task, (x_0, x, temperature) in tasks.items():
        restored = {"right": 1.0, "right_error": 0.0} if task == "fill" else {"right": None}
        real[task] = judged_real(twins, x_0, f"{task}, real text") | restored
        print_row(real[task], heading=True)
        rows += compare(twins, task, x_0, x, args.thresholds, temperature)

    draw(args.picture, lambda panels: paint(panels, real, rows), columns=3, width=4.4)
    answer(summary(rows), {"real": real, "rows": rows})


def summary(rows: list[dict]) -> str:
    """Whether thresholds beat fixed schedules of as many calls by more than chance, one by one."""
    said = []
    better = 0
    worse = 0
    for adaptive, fixed in zip(rows[::2], rows[1::2], strict=True):
        if adaptive["task"] == "free":
            gain = fixed["judge"] - adaptive["judge"]
            error = math.hypot(adaptive["error"], fixed["error"])
            numbers = f"{adaptive['judge']:.2f} nats against {fixed['judge']:.2f}"
        else:
            gain = adaptive["right"] - fixed["right"]
            error = math.hypot(adaptive["right_error"], fixed["right_error"])
            numbers = f"{adaptive['right']:.1%} right against {fixed['right']:.1%}"
        better += gain > 2 * error
        worse += gain < -2 * error
        said.append(f"{adaptive['sampler']}: {adaptive['calls']:.0f} calls for "
                    f"{adaptive['hidden']} tokens, {numbers}")
    return ("a threshold is better than a fixed schedule of as many calls, by more than two "
            f"standard errors, in {better} of {len(said)} comparisons, and worse in {worse}: "
            + "; ".join(said) + ".")


if __name__ == "__main__":
    sys.exit(main())
