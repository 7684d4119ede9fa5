"""Greedy, top-k or nucleus? python -m experiments.sampling_methods

How the token at a position is drawn; positions in random order, for the first row left to right:

    greedy       the likeliest
    top-k        from the k likeliest
    nucleus      from the fewest that together reach probability p
    temperature  from p^(1/tau)

Columns, beside those of lab/judge.py (judge and entropy in nats, distinct and words as fractions):

    same    fraction of the positions at which a second seed writes the same token: 1 for a sampler
            without chance
    shared  of a text's runs of four tokens, the fraction that another text of the same sampler
            holds too

A greedy draw leaves nothing to chance, the choice of *positions* may: greedy is the same every time
only where the order is fixed (left to right), or follows from what was drawn (the most confident
first, without Gumbel noise).
"""

import sys

import torch
from torch import Tensor

from experiments.lab.command import answer, count, flags_with_judge
from experiments.lab.judge import (
    distance,
    judged,
    judged_real,
    load_twins,
    print_row,
    real_text,
    write,
)
from experiments.lab.pictures import draw, paint_frontier
from plumbing.command import command

METHODS = {
    "greedy, left to right": dict(temperature=0.0, order="left_to_right"),
    "greedy": dict(temperature=0.0),
    "top-k 3": dict(top_k=3),
    "top-k 10": dict(top_k=10),
    "top-k 50": dict(top_k=50),
    "nucleus 0.5": dict(top_p=0.5),
    "nucleus 0.8": dict(top_p=0.8),
    "nucleus 0.9": dict(top_p=0.9),
    "temperature 0.7": dict(temperature=0.7),
    "everything": dict(),
}


def shared_runs(tokens: Tensor, length: int = 4) -> float:
    """Of a text's runs of `length` tokens the fraction that another text holds, too: the mean over
    all ordered pairs of the texts (n,T); 1 if all are the same, NaN for a single one."""
    runs = [set(map(tuple, row.unfold(0, length, 1).tolist())) for row in tokens]
    shared = [len(a & b) / len(a) for i, a in enumerate(runs) for j, b in enumerate(runs) if i != j]
    return sum(shared) / len(shared) if shared else float("nan")


def paint(axes, real: dict, rows: list[dict]) -> None:
    """Likelihood against entropy, without the first row: a single text."""
    paint_frontier(axes, real, {row["sampler"]: [row] for row in rows[1:]})
    axes.set(title="Ways to draw a token")
    axes.figure.legend(loc="outside right center")


@command("experiments.sampling_methods")
def main(arguments: list[str]) -> None:
    parser = flags_with_judge("sampling_methods", __doc__)
    parser.add_argument("--steps", type=count, default=32, help="model calls (default: 32)")
    args = parser.parse_args(arguments)
    twins = load_twins(args.checkpoint, args.judge, args.data_dir)
    x = torch.full((args.num_samples, twins.N), twins.mask_id)

    real_tokens = real_text(twins, args.num_samples)
    real = judged_real(twins, real_tokens)
    real |= {"distance": 0.0, "same": None, "shared": shared_runs(real_tokens)}
    print_row(real, heading=True)
    rows = []
    texts = []
    for method, options in METHODS.items():
        options = dict(order="random", steps=args.steps) | options
        row, states = judged(twins, method, x, **options)
        tokens = states[-1].tokens
        again, _ = write(twins.model, x[:4], twins.mask_id, seed=2, **options)
        same = (again[-1].tokens == tokens[:4]).float().mean().item()
        rows.append(row | {"distance": distance(row, real), "same": same,
                           "shared": shared_runs(tokens)})
        print_row(rows[-1])
        texts.append(twins.decode(tokens[0].tolist())[:90])
    print()
    for method, text in zip(METHODS, texts, strict=True):
        print(f"{method:22} {text!r}")

    draw(args.picture, lambda axes: paint(axes, real, rows), width=8, height=4.5)
    fixed = rows[0]
    greedy = rows[1]
    everything = rows[-1]
    best = min(rows, key=lambda row: row["distance"])
    answer(
        f"two seeds of greedy agree on {fixed['same']:.0%} of the tokens from left to right, on "
        f"{greedy['same']:.0%} in random order (from everything: {everything['same']:.0%}). In "
        f"random order greedy costs the twin {greedy['judge']:.2f} nats and shares "
        f"{greedy['shared']:.0%} of its runs with another text; everything "
        f"{everything['judge']:.2f} and {everything['shared']:.0%}; real text has "
        f"{real['judge']:.2f} and {real['shared']:.0%}. Nearest to it in all is {best['sampler']}.",
        {"steps": args.steps, "real": real, "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
