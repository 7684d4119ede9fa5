"""Which mask ratios should training draw? python -m experiments.custom_masking

A distribution of the training mask ratio is one line, its cumulative distribution function (CDF) on
[0,1]. CUSTOM below has two of our own, and nothing in the core is edited: with those lines added to
its table, train.py is `python -m experiments.custom_masking train configs/bytes.toml
--mask-ratio high ...`. Each distribution trains a model of the byte model's shape, on the same text
for as many steps:

    hidden     mean mask ratio in training
    NELBO      on validation text, all levels weighing alike whatever the training drew; nats per
               token
    - bell     the same minus bell's, taken pair of rows by pair of rows: known better than either
    CE at ...  cross-entropy per hidden token when 10%, 50%, 90% and all of the text is hidden

With weighting "token", the default, hidden tokens count alike: a row with mask ratio t counts t
times as much as an all-hidden one. The training loss is then the mean of CE(t) not under the
density q(t) that is drawn but under t q(t), normalised.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion import MASK_RATIOS, draw_mask, keyed_generator, mean_and_error, row_losses
from experiments.lab.command import answer, count, flags, several
from experiments.lab.pictures import draw
from experiments.lab.runs import autocast, pair_nelbos, rows_of, trained
from model import Transformer
from plumbing.checkpoint import load_checkpoint
from plumbing.command import command

CUSTOM: dict[str, Callable[[Tensor], Tensor]] = {
    "high": lambda t: t**2,  # density 2t: mostly hidden rows
    "low": lambda t: 1 - (1 - t) ** 2,  # density 2 - 2t: mostly visible rows
}
ALL = MASK_RATIOS | CUSTOM
LEVELS = (0.02, *(k / 10 for k in range(1, 11)))  # where CE is measured
SHOWN = (0.1, 0.5, 0.9, 1.0)  # what the table has of it


def train(arguments: list[str]) -> int:
    """train.py with more lines in its table, which it reads when it is imported: hence here."""
    MASK_RATIOS.update(CUSTOM)
    from train import main
    return main(arguments)


@torch.no_grad()
def by_level(model: Transformer, x_0: Tensor) -> Tensor:
    """(levels,R) float64: each row's CE by mask ratio, at the same positions for every model."""
    R, N = x_0.shape
    rows = []
    for level in LEVELS:
        m = max(1, round(level * N))
        generator = keyed_generator(0, round(level * N), "custom masking")
        mask = draw_mask(torch.full((R,), m), N, 0, generator)
        x_t = x_0.masked_fill(mask, model.config.mask_id)
        rows.append(row_losses(model, x_t, x_0, mask))
    return torch.stack(rows)


def density(name: str, points: int = 200) -> tuple[Tensor, Tensor]:
    """(t, q(t)), each (points,): the slope of the CDF."""
    t = torch.linspace(0, 1, points + 1, dtype=torch.float64)
    return (t[1:] + t[:-1]) / 2, ALL[name](t).diff() * points


def paint(axes, curves: dict[str, Tensor], base: str) -> None:
    """What is drawn, what the loss is made of, what was learned, and that minus `base`'s."""
    (drawn, counted), (learned, compared) = axes
    for name, rows in curves.items():
        t, q = density(name)
        drawn.plot(t, q, label=name)
        counted.plot(t, q * t / (q * t).mean(), label=name)
        learned.plot(LEVELS, rows.mean(1), marker=".", label=name)
        nats, errors = zip(*map(mean_and_error, rows - curves[base]), strict=True)
        compared.errorbar(LEVELS, nats, errors, marker=".", capsize=2, label=name)
    drawn.set(title="How often a level is drawn", ylabel="density q(t)")
    counted.set(title="What the training loss is made of", ylabel="t q(t), normalised")
    learned.set(title="What was learned", ylabel="CE(t), nats per hidden token")
    compared.set(title=f"The same, minus {base}'s", ylabel="nats per hidden token")
    for axis in axes.flat:
        axis.set_xlabel("mask ratio t")
        axis.legend()


def conclude(pairs: dict[str, Tensor], curves: dict[str, Tensor], base: str) -> str:
    """The answer in words, from `pair_nelbos` and `by_level` of each distribution."""
    best = min(pairs, key=lambda name: pairs[name].mean())
    tied = [name for name in pairs if name != best and not differ(pairs[name], pairs[best])]
    text = f"{best} has the lowest NELBO, {pairs[best].mean():.3f} nats/token"
    text += f", but {' and '.join(tied)} cannot be told from it" if tied else ""
    for name in CUSTOM:
        if name in pairs and name != base:
            few, many = ("{:+.3f} +- {:.3f}".format(*mean_and_error(
                curves[name][LEVELS.index(t)] - curves[base][LEVELS.index(t)])) for t in (0.1, 1.0))
            text += (f"; mostly {name} ratios instead of {base} change CE by {few} at 10% hidden "
                     f"and by {many} at 100%")
    return text


def differ(a: Tensor, b: Tensor) -> bool:
    """Whether the mean of the differences is more than two standard errors from 0."""
    mean, error = mean_and_error(a - b)
    return abs(mean) > 2 * error


@command("experiments.custom_masking")
def main(arguments: list[str]) -> None:
    if arguments[:1] == ["train"]:
        sys.exit(train(arguments[1:]))
    parser = flags("custom_masking", __doc__, checkpoint=False)
    add = parser.add_argument
    add("--ratios", nargs="+", default=["bell", *(name for name in ALL if name != "bell")],
        choices=ALL, metavar="NAME",
        help=f"of {', '.join(ALL)}; the first is compared with (default: all, bell first)")
    add("--config", default="configs/bytes.toml", help="(default: the byte model's)")
    add("--steps", type=count, default=200, help="of training, each (default: 200)")
    add("--rows", type=several, default=512, help="windows of validation text (default: 512)")
    args = parser.parse_args(arguments)

    pairs = {}
    curves = {}
    hidden = {}
    for name in args.ratios:
        steps = str(args.steps)
        settings = ["--mask-ratio", name, "--steps", steps, "--data-dir", args.data_dir,
                    "--eval-interval", steps, "--final-eval-rows", "32"]  # we measure better below
        program = ("-m", "experiments.custom_masking", "train")
        folder = trained(f"masking-{name}", *settings, config=args.config, program=program)
        model, _ = load_checkpoint(folder)
        x_0 = rows_of(args.data_dir, args.rows, model.config.context_length)
        with autocast():
            pairs[name] = pair_nelbos(model, x_0, model.config.mask_id)
            curves[name] = by_level(model, x_0[::4])
        t, q = density(name)
        hidden[name] = (t * q).mean().item()
    base = args.ratios[0]

    print(f"\n{'mask ratio':10} {'hidden':>6} {'NELBO <=':>16} {'- ' + base:>17}"
          + "".join(f"{f'CE at {t:.0%}':>11}" for t in SHOWN))
    runs = []
    for name, rows in curves.items():
        nats, error = mean_and_error(pairs[name])
        more, more_error = mean_and_error(pairs[name] - pairs[base])
        ce = [rows[LEVELS.index(t)].mean().item() for t in SHOWN]
        print(f"{name:10} {hidden[name]:6.0%} {nats:7.3f} +- {error:.3f} {more:+8.3f} +- "
              f"{more_error:.3f}" + "".join(f"{value:11.3f}" for value in ce))
        runs.append({"mask_ratio": name, "hidden": hidden[name], "nelbo": nats, "stderr": error,
                     "more": more, "more_stderr": more_error,
                     "ce": dict(zip(SHOWN, ce, strict=True))})
    draw(args.picture, lambda axes: paint(axes, curves, base), columns=2, rows=2)
    answer(f"after {args.steps} steps {conclude(pairs, curves, base)}.", {"runs": runs})


if __name__ == "__main__":
    sys.exit(main())
