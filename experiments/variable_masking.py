"""Why hide another fraction each time? python -m experiments.variable_masking

Four networks, the same but for how much of a row was hidden while they learned:

    15%           always 15% of the tokens: BERT's objective (mlm)
    50%           always half of them
    ten levels    10%, 20% .. 100%, by turns
    all levels    any number from one token to all: this repository's default

All see the same rows in the same order for the same number of steps. The table says, in nats per
token of validation text (lower is better),

    NELBO         the mean of CE(m) over all m: what a text costs when it is written token by token
    CE at ...     the loss at that mask ratio: columns of the curve in the picture
    words         fraction of the words written from nothing that occur in the training text
    entropy       of a row's own tokens, of what is written and of real text

When everything is hidden all positions look the same, and the best answer is how often each token
occurs: no network has a CE below the unigram entropy there. Writing from nothing begins at that
level and passes through all others, so a network must know them all: the one it knows worst spoils
the text.
"""

import sys

import tiktoken
import torch
from torch import Tensor

from diffusion import Bound, nelbo
from experiments.lab.command import answer, count, flags, several
from experiments.lab.judge import entropy, fraction_known, mean_entropy, vocabulary_of
from experiments.lab.pictures import draw
from experiments.lab.runs import autocast, trained
from model import Transformer
from plumbing.checkpoint import load_checkpoint
from plumbing.command import command
from prepare_data import TokenFile, get_tokenizer
from sample import generate

RUNS = {
    "15%": ("--objective", "mlm", "--mlm-ratio", "0.15"),
    "50%": ("--objective", "mlm", "--mlm-ratio", "0.5"),
    "ten levels": ("--mask-levels", "10"),
    "all levels": (),
}
RATIOS = (0.05, 0.15, 0.5, 0.85, 1.0)  # the columns


def train_all(data_dir: str, steps: str, settings: list[str]) -> dict[str, Transformer]:
    """The four networks; `settings` are further flags of train.py."""
    networks = {}
    for name, masking in RUNS.items():
        folder = trained("variable-masking/" + name.replace(" ", "-").replace("%", "-percent"),
                         "--data-dir", data_dir, "--steps", steps, "--eval-interval", steps,
                         "--final-eval-rows", "64", *masking, *settings)
        networks[name], _ = load_checkpoint(folder)
    return networks


def about_text(rows: Tensor, tokenizer: tiktoken.Encoding,
               vocabulary: set[str]) -> dict[str, float]:
    """The last two columns, of the texts in these rows (n,T)."""
    known = fraction_known("\n".join(map(tokenizer.decode, rows.tolist())), vocabulary)
    return {"words": known, "entropy": mean_entropy(rows)}


def ce_at(bound: Bound, mask_ratio: float) -> float:
    """CE at this mask ratio, from the measured count that is nearest."""
    N, counts, nats, _ = bound.curve
    return nats[min(range(len(counts)), key=lambda i: abs(counts[i] - mask_ratio * N))]


def paint(panels, bounds: dict[str, Bound], unigram: float) -> None:
    """The loss by mask level of each network, and how much more it is than that of all levels."""
    left, right = panels
    ours = bounds["all levels"].curve
    for name, bound in bounds.items():
        N, counts, nats, errors = bound.curve
        percent = [100 * m / N for m in counts]
        left.errorbar(percent, nats, errors, marker=".", label=f"{name}: NELBO {bound.nats:.2f}")
        more = [theirs - best for theirs, best in zip(nats, ours.nats, strict=True)]
        right.plot(percent, more, marker=".")
    left.axhline(unigram, color="grey", linestyle=":", label=f"unigram entropy: {unigram:.2f}")
    left.set(title="What each network knows", xlabel="mask ratio, %",
             ylabel="CE(m), nats per hidden token")
    right.set(title="The same, less that of all levels", xlabel="mask ratio, %",
              ylabel="nats per hidden token")
    left.figure.legend(loc="outside right center", title="learned at")


def conclude(bounds: dict[str, Bound], rows: dict[str, dict], unigram: float) -> None:
    """The answer, from the numbers."""
    bert = rows["15%"]
    half = rows["50%"]
    ours = rows["all levels"]
    ranking = sorted(rows, key=lambda name: rows[name]["nelbo"])

    def more(row: dict, ratios) -> str:
        return ", ".join(f"{row['ce'][ratio] - ours['ce'][ratio]:+.2f} at {ratio} hidden"
                         for ratio in ratios)

    nelbos = ", ".join(f"{name} {rows[name]['nelbo']:.2f}" for name in ranking)
    answer(
        f"by NELBO, {nelbos} nats per token. Beside all levels, learning at 15% only is "
        f"{bert['nelbo'] - ours['nelbo']:+.2f} ({more(bert, ('15%', '50%', '100%'))}; the last is "
        f"{bert['ce']['100%'] - unigram:.2f} above the unigram entropy), at 50% only "
        f"{half['nelbo'] - ours['nelbo']:+.2f} ({more(half, half['ce'])}). Known words when "
        f"writing from nothing: {bert['words']:.0%}, {half['words']:.0%}, all levels "
        f"{ours['words']:.0%}.",
        {"unigram": unigram, "rows": rows,
         "curves": {name: bound.curve for name, bound in bounds.items()}})


@command("experiments.variable_masking")
def main(arguments: list[str]) -> None:
    parser = flags("variable_masking", __doc__, checkpoint=False)
    add = parser.add_argument
    add("--steps", default="300", help="of each training run (default: 300)")
    add("--rows", type=several, default=512, help="of validation text (default: 512)")
    add("--num-samples", type=count, default=8, help="texts that each writes (default: 8)")
    add("--sampling-steps", type=count, default=128, help="to write them in (default: 128)")
    args, settings = parser.parse_known_args(arguments)  # what else is given goes to train.py

    train = TokenFile(args.data_dir, "train")
    val = TokenFile(args.data_dir, "val")
    networks = train_all(args.data_dir, args.steps, settings)
    T = networks["15%"].config.context_length
    mask_id = networks["15%"].config.mask_id
    tokenizer = get_tokenizer(train.tokenizer, args.data_dir)
    x_0 = torch.from_numpy(val.spread(args.rows, T))
    vocabulary = vocabulary_of(train)
    unigram = entropy(torch.from_numpy(val.tokens.astype("int64")))

    print(f"\n{'learned at':12}{'NELBO <=':>18}"
          + "".join(f"{f'CE at {ratio:.0%}':>12}" for ratio in RATIOS)
          + f"{'words':>8}{'entropy':>9}")
    bounds = {}
    rows = {}
    samples = {}
    for name, model in networks.items():
        x = torch.full((args.num_samples, T), mask_id)
        generator = torch.Generator().manual_seed(1)
        with autocast():
            bound = nelbo(model, x_0, mask_id, curve_points=20)
            written = generate(model, x, mask_id, generator, steps=args.sampling_steps,
                               order="random")  # the NELBO's sampler
        row = {"nelbo": bound.nats, "stderr": bound.stderr,
               **about_text(written, tokenizer, vocabulary),
               "ce": {f"{ratio:.0%}": ce_at(bound, ratio) for ratio in RATIOS}}
        print(f"{name:12}{bound.nats:9.3f} +- {bound.stderr:.3f}"
              + "".join(f"{nats:12.3f}" for nats in row["ce"].values())
              + f"{row['words']:8.0%}{row['entropy']:9.2f}", flush=True)
        bounds[name] = bound
        rows[name] = row
        samples[name] = tokenizer.decode(written[0].tolist())
    real = about_text(x_0, tokenizer, vocabulary)
    print(f"{'real text':{30 + 12 * len(RATIOS)}}{real['words']:8.0%}{real['entropy']:9.2f}")
    print(f"unigram entropy of the validation text: {unigram:.3f} nats per token")
    for name, text in samples.items():
        print(f"\n--- learned at {name}, written from nothing:\n{text}")
    print()
    draw(args.picture, lambda panels: paint(panels, bounds, unigram), columns=2, width=6)
    conclude(bounds, rows, unigram)


if __name__ == "__main__":
    sys.exit(main())
