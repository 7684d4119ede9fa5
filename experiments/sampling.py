"""Which sampler writes best? python -m experiments.sampling QUESTION

A question is a table of samplers: each row is `denoise` with the options that it names, and the
usual ones beside them (BASE). It writes texts, which the autoregressive twin judges: columns
as in lab/judge.py. Down is likelier, but only together with the entropy of real text.

    temperature  How much to leave to chance?
    methods      Greedy, top-k or nucleus?
    orders       Which positions come first?
    remasking    Does it help to hide some of the written tokens again?
    steps        How many calls does a text need: one, one a token, or some between?
    schedules    How many tokens to commit in each of them?
    adaptive     Does it pay to commit what is confident at once? With a threshold, and on a fixed
                 schedule of as many calls, the hidden quarter of real texts is filled greedily;
                 `right` is the fraction of tokens restored, `more` the difference between the two
    frontier     Likelihood against variety, by order and calls, and the twin's by temperature

The tables of steps and schedules have a price, too: -log of the probability with which the sampler
writes real text, at temperature 1, in nats per token. No sample is needed for it. It is exact; that
of the order random is a mean over all orders, from the loss by mask ratio (schedule_nelbo). `more`
is the mean difference, text by text, to the first row of the same order.
"""

import argparse
import sys

import numpy as np
import torch
from torch import Tensor

from diffusion import SCHEDULES, mean_and_error, optimal_schedule, schedule_nelbo, smooth
from experiments.lab.command import flags_with_judge, report
from experiments.lab.judge import Twins, judge, judged, load_twins, print_row, some_positions
from experiments.lab.pictures import draw
from experiments.lab.runs import OUT, measure_curve, rows_of
from experiments.prices import prices
from plumbing.command import command
from sample import REMASKS, left_to_right_model

# A label is "line" or "line, point": the picture joins the points of a line. "the twin" writes
# itself, from left to right; everything else is written by the diffusion model.
BASE = dict(order="spread", steps=16, schedule="linear", top_k=200)  # the default of sample.py
LEFT_TO_RIGHT = dict(order="left_to_right", steps=None)  # None: one token per call
QUESTIONS: dict[str, dict[str, dict]] = {
    "temperature": {f"temperature, {tau:g}": dict(temperature=tau, top_k=None)
                    for tau in (0.0, 0.3, 0.5, 0.7, 0.85, 1.0, 1.3)},
    "methods": {
        "greedy": dict(temperature=0.0),
        **{f"top-k, {k}": dict(top_k=k) for k in (3, 50, 200)},
        **{f"nucleus, {p}": dict(top_p=p, top_k=None) for p in (0.5, 0.9)},
        **{f"temperature, {tau:g}": dict(temperature=tau, top_k=None) for tau in (0.85, 1.0)},
    },
    "orders": {
        **{order.replace("_", " "): dict(order=order) for order in (
            "spread", "random", "margin", "entropy", "confidence", "left_to_right")},
        "the twin": LEFT_TO_RIGHT,
    },
    "remasking": {"none, 16 calls": dict(), **{
        f"{remask}, 64 calls": dict(remask=remask, steps=64) for remask in REMASKS}},
    "steps": {f"{order}, {steps}": dict(order=order, steps=steps)
              for order in ("spread", "random") for steps in (256, 64, 16, 4, 1)},
    "schedules": {f"{order} {schedule}": dict(order=order, schedule=schedule)
                  for order in ("spread", "random") for schedule in (*SCHEDULES, "optimal")},
    "frontier": {
        **{f"{order}, {steps} calls": dict(order=order, steps=steps)
           for order in ("spread", "random") for steps in (4, 8, 16, 32, 64)},
        **{f"the twin, {tau:g}": LEFT_TO_RIGHT | dict(temperature=tau, top_k=None)
           for tau in (0.7, 0.85, 1.0)},
    },
}
THRESHOLDS = (0.5, 0.7, 0.9)  # of adaptive

# The columns (x, y, error) of each panel of a picture. +- is the error of a difference, which is
# known better than a price.
PANELS = {
    "steps": [("calls", "price", "+-"), ("calls", "judge", None), ("calls", "words", None)],
    "adaptive": [("calls", "right", "+-")],
}
LIKELIHOOD_AGAINST_VARIETY = [("entropy", "judge", "error")]  # of all other questions
AXES = {"calls": "model calls for a text", "entropy": "entropy of a sample's tokens, nats",
        "judge": "nats per token under the twin", "right": "fraction of tokens restored"}
STAR = {"marker": "*", "markersize": 16, "color": "black", "zorder": 3}


def price(twins: Twins, texts: Tensor, samplers: dict[str, dict]) -> dict[str, dict]:
    """Columns for each sampler. An optimal schedule becomes a list of counts in its options."""
    x_0 = texts[::2]
    curve = measure_curve(twins.model, x_0, twins.mask_id, 16, "to price")
    others = measure_curve(twins.model, texts[1::2], twins.mask_id, 16, "to fit")
    first: dict[str, Tensor] = {}  # by order, (B,): nats per token of each text
    columns = {}
    for label, options in samplers.items():
        order, steps = options["order"], options["steps"]
        if options["schedule"] == "optimal":  # found on other texts than it is priced on
            options["schedule"] = optimal_schedule(smooth(others), steps)
        if order == "random":  # only the mean of all texts and orders is known: (1,)
            by_text = torch.tensor([schedule_nelbo(curve, options["schedule"], steps)])
        else:
            by_text = prices(twins.model, x_0, twins.mask_id, **options)
        more, error = mean_and_error(by_text - first.setdefault(order, by_text))
        columns[label] = {"price": by_text.mean().item(), "more": more,
                          "+-": error if len(by_text) > 1 else None}
    return columns


def table(args: argparse.Namespace, twins: Twins) -> list[dict]:
    """Write, judge and print: real text, then a row for each sampler of the question."""
    samplers = {label: BASE | options for label, options in QUESTIONS[args.question].items()}
    columns = dict.fromkeys(samplers, {})
    if args.question in ("steps", "schedules"):
        columns = price(twins, rows_of(args.data_dir, 2 * args.num_samples, twins.N), samplers)
    real = judge(twins, rows_of(args.data_dir, args.num_samples, twins.N))
    empty = dict.fromkeys(next(iter(columns.values())))  # what real text has not: a price
    rows = [{"sampler": "real text", "calls": None, "tokens_per_second": None} | real | empty]
    print_row(rows[0], heading=True)
    causal = left_to_right_model(twins.judge, twins.mask_id)
    x = torch.full((args.num_samples, twins.N), twins.mask_id)
    samples = []
    for label, options in samplers.items():
        network = causal if label.startswith("the twin") else twins.model
        row, states = judged(twins, label, x, network, **options)
        rows.append(row | columns[label])
        print_row(rows[-1])
        text = twins.tokenizer.decode(states[-1].tokens[0].tolist())
        samples.append(f"{label:24} {text[:75]!r}")
    print("", *samples, sep="\n")
    return rows


def adaptive(twins: Twins, x_0: Tensor, x: Tensor) -> list[dict]:
    """Fill the holes of x, some texts x_0 (n,T): two printed rows for each threshold."""
    hidden = x == twins.mask_id
    rows = []
    for threshold in THRESHOLDS:
        steps = None  # with a threshold, the slowest pace: a token per call
        rights = []  # (n,) each: of the hidden tokens of a text, the fraction that is restored
        for how in (dict(threshold=threshold), {}):
            label = f"{'threshold' if how else 'fixed'}, {threshold}"
            row, states = judged(twins, label, x, twins.model, order="spread", temperature=0.0,
                                 steps=steps, **how)
            # The states in which something of a text is hidden: its calls; mean over the texts.
            row["calls"] = sum((state.tokens == twins.mask_id).any(1).double().mean().item()
                               for state in states)
            steps = max(1, round(row["calls"]))  # what the fixed schedule is given next
            rights.append(((states[-1].tokens == x_0) & hidden).sum(1).double() / hidden.sum(1))
            more, error = mean_and_error(rights[-1] - rights[0])
            rows.append(row | {"right": rights[-1].mean().item(), "more": more, "+-": error})
            print_row(rows[-1], heading=len(rows) == 1)
    return rows


def paint(panels, shown: list[tuple], rows: list[dict]) -> None:
    """A line for each line of the table; real text, if it can be shown, is a star."""
    for panel, (x, y, error) in zip(panels, shown, strict=True):
        lines: dict[str, list[dict]] = {}
        for row in rows:
            if row[x] is not None:
                lines.setdefault(row["sampler"].split(",")[0], []).append(row)
        for line, points in lines.items():
            style = STAR if line == "real text" else {"marker": "o"}
            panel.errorbar([row[x] for row in points], [row[y] for row in points],
                           [row[error] or 0 for row in points] if error else None, capsize=2,
                           label=line, **style)
        panel.set(xlabel=AXES[x], ylabel=AXES.get(y, y),
                  xscale="log" if len(shown) > 1 else "linear")
    panels[-1].legend(loc="upper left", bbox_to_anchor=(1, 1))


@command("experiments.sampling")
def main(arguments: list[str]) -> None:
    parser = flags_with_judge("sampling", __doc__, num_samples=64)
    parser.set_defaults(picture=None)
    parser.add_argument("question", choices=[*QUESTIONS, "adaptive"])
    args = parser.parse_args(arguments)
    picture = args.picture or OUT / f"sampling-{args.question}.png"
    twins = load_twins(args.checkpoint, args.judge, args.data_dir)
    if args.question == "adaptive":
        x_0 = rows_of(args.data_dir, args.num_samples, twins.N)
        holes = some_positions(x_0, twins.N // 4, "fill")
        rows = adaptive(twins, x_0, x_0.masked_fill(holes, twins.mask_id))
    else:
        rows = table(args, twins)
    shown = PANELS.get(args.question, LIKELIHOOD_AGAINST_VARIETY)
    draw(picture, lambda panels: paint(np.atleast_1d(panels), shown, rows), columns=len(shown),
         width=6)
    report({"rows": rows})


if __name__ == "__main__":
    sys.exit(main())
