"""What does training with a prefix buy? python -m experiments.prefix_lengths

A prompt is text at the beginning that is never hidden. Training may do the same (prefix_length and
prefix_length_max of train.py): the first tokens of a row are then always visible, and the loss is
that of the rest. Four models of the byte model's shape are trained on the same text:

    none      any position may be hidden, the default
    fixed     the first 32 tokens of a row of 256 are never hidden
    drawn     a prefix of 0 to 128 tokens, its length drawn again for each step
    fewer     none again, for three quarters of the steps: a prefix leaves fewer positions to hide,
              and this model has seen no more hidden tokens than drawn has

They are measured at prompts of many lengths by the conditional bound: with N tokens after a prompt,

    -log p(rest | prompt) / N  <=  NELBO = (1/N) sum_m CE(m),   m = 1..N hidden, the prompt visible.

The first table takes whole rows: a longer prompt leaves a shorter rest. The second always scores
the same text, the last 64 tokens of a row, with a longer or shorter prompt before it. Nats per
token; below them the difference to "none", taken pair of rows by pair of rows.
"""

import sys

from torch import Tensor

from diffusion import mean_and_error
from experiments.lab.command import answer, count, flags, several
from experiments.lab.pictures import draw
from experiments.lab.runs import autocast, pair_nelbos, rows_of, trained
from model import Transformer
from plumbing.checkpoint import load_checkpoint
from plumbing.command import command
from plumbing.config import ConfigError, load
from train import TrainConfig

Terms = dict[int, Tensor]  # prompt length -> the terms of the NELBO, (B/2,), of `pair_nelbos`


def measure(model: Transformer, x_0: Tensor, prompts: list[int], end: int | None = None) -> Terms:
    """By prompt length: the NELBO of all that follows, or of the last `end` tokens of each row."""
    terms = {}
    with autocast():
        for p in prompts:
            rows = x_0 if end is None else x_0[:, -end - p :]
            terms[p] = pair_nelbos(model, rows, model.config.mask_id, p)
    return terms


def table(title: str, terms: dict[str, Terms],
          base: str) -> dict[str, dict[int, tuple[float, ...]]]:
    """Print a row for each training, a column for each prompt.

    Returns {training: {prompt: (nats, error, more than `base`, its error)}}.
    """
    prompts = list(terms[base])
    numbers = {}
    print(f"\n{title + ', prompt of':34}" + "".join(f"{p:>8}" for p in prompts))
    for name, by_prompt in terms.items():
        numbers[name] = {p: (*mean_and_error(t), *mean_and_error(t - terms[base][p]))
                         for p, t in by_prompt.items()}
        for label, column in ((name, 0), ("  +-", 1), (f"  more than {base}", 2), ("  +-", 3)):
            if name != base or column < 2:
                cells = (numbers[name][p][column] for p in prompts)
                print(f"{label:34}" + "".join(f"{cell:8.3f}" for cell in cells))
    return numbers


def paint(axes, tables: dict[str, dict], base: str) -> None:
    """Left the bound of the same text by length of the prompt; the differences of both tables."""
    left, *others = axes
    whole, same = tables
    for name, numbers in tables[same].items():
        nats, errors, _, _ = zip(*numbers.values(), strict=True)
        left.errorbar(list(numbers), nats, errors, marker="o", capsize=2, label=name)
    left.set(title=f"{same}: what a prompt tells", ylabel="NELBO, nats per token")
    for axis, title in zip(others, (same, whole), strict=True):
        for name, numbers in tables[title].items():
            _, _, more, errors = zip(*numbers.values(), strict=True)
            axis.errorbar(list(numbers), more, errors, marker="o", capsize=2, label=name)
        axis.set(title=f"{title}: against {base}", ylabel="difference of the NELBO, nats per token")
    for axis in axes:
        axis.set_xlabel("length of the prompt, tokens")
    labels = left.get_legend_handles_labels()
    left.figure.legend(*labels, loc="outside right center", title="training")


def conclude(terms: dict[str, Terms]) -> str:
    """The answer in words: what training with a prefix changes at the longest and the shortest
    prompt."""
    prompts = list(terms["none"])
    first = prompts[0]
    last = prompts[-1]

    def pays(name: str) -> bool:
        mean, error = mean_and_error(terms[name][last] - terms["none"][last])
        return mean < -2 * error

    def change(name: str, other: str) -> str:
        longest, shortest = (
            "{:+.3f} +- {:.3f}".format(*mean_and_error(terms[name][p] - terms[other][p]))
            for p in (last, first))
        return f"{longest} at {last} tokens of prompt and {shortest} at {first}"

    paying = " and ".join(name for name in ("fixed", "drawn") if pays(name)) or "no"
    told = (terms["none"][first] - terms["none"][last]).mean()
    return (f"at equal steps {paying} training with a prefix makes continuing a prompt better: the "
            f"NELBO changes by {change('fixed', 'none')} (fixed), by {change('drawn', 'none')} "
            f"(drawn). At equally many hidden tokens drawn changes it by "
            f"{change('drawn', 'fewer')}. The prompt itself is worth {told:.3f} nats/token")


@command("experiments.prefix_lengths")
def main(arguments: list[str]) -> None:
    parser = flags("prefix_lengths", __doc__, checkpoint=False)
    add = parser.add_argument
    add("--config", default="configs/bytes.toml", help="(default: the byte model's)")
    add("--steps", type=count, default=200, help="of training (default: 200)")
    add("--fixed", type=count, default=32, help="the fixed prefix, tokens (default: 32)")
    add("--longest", type=count, default=128, help="the longest drawn prefix (default: 128)")
    add("--prompts", type=int, nargs="+", default=[0, 16, 32, 64, 128, 192],
        help="lengths to measure at")
    add("--end", type=count, default=64, help="last tokens of a row, always scored (default: 64)")
    add("--rows", type=several, default=384, help="windows of validation text (default: 384)")
    args = parser.parse_args(arguments)

    T = load(TrainConfig, args.config).context_length
    if min(args.prompts) < 0 or max(args.prompts) + args.end > T:
        raise ConfigError(f"prompts of {min(args.prompts)} to {max(args.prompts)} tokens and the "
                          f"last {args.end} do not fit rows of {T} tokens: change --prompts or "
                          "--end")
    x_0 = rows_of(args.data_dir, args.rows, T)
    fewer = round(args.steps * (1 - args.longest / 2 / T))
    trainings = {"none": ([], args.steps), "fixed": (["--prefix-length", args.fixed], args.steps),
                 "drawn": (["--prefix-length-max", args.longest], args.steps), "fewer": ([], fewer)}
    whole = {}
    same = {}
    for name, (prefix, steps) in trainings.items():
        settings = [*prefix, "--steps", steps, "--data-dir", args.data_dir,
                    "--eval-interval", steps, "--final-eval-rows", 32]  # we measure better below
        model, _ = load_checkpoint(trained(f"prefix-{name}", *map(str, settings),
                                           config=args.config))
        whole[name] = measure(model, x_0, args.prompts)
        same[name] = measure(model, x_0, args.prompts, args.end)

    tables = {}
    for title, terms in (("All that follows", whole),
                         (f"The same last {args.end} tokens", same)):
        tables[title] = table(title, terms, "none")
    draw(args.picture, lambda axes: paint(axes, tables, "none"), columns=3)
    answer(f"{conclude(same)} ({args.steps} steps, one seed).", tables)


if __name__ == "__main__":
    sys.exit(main())
