"""Can one steer what is written? python -m experiments.guidance

Two uses of the `adjust` hook of sample.denoise:

    classifier_guidance        any callable that scores token rows says what it wants to read
    classifier_free_guidance   no classifier: what the prefix makes likelier is made likelier still

Here the classifier tells State of the Union messages of the first third from those of the last
third, by their words. One guides; another, made of other documents, judges what was written:

    modern      fraction of the texts, the prefix left out, that it finds modern, with the standard
                error; the first rows are real text of both kinds
    judge ...   what the steering costs: the columns are those of experiments/lab/judge.py
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion import Model
from experiments.lab.command import count, flags_with_judge, report
from experiments.lab.judge import fraction_and_error, judge, judged, load_twins, print_row
from experiments.lab.pictures import draw
from plumbing.adjust import Adjust
from plumbing.command import command
from plumbing.config import ConfigError
from prepare_data import DataError, TokenFile, get_tokenizer


def classifier_guidance(score, strength: float = 1.0, candidates: int = 32) -> Adjust:
    """An `adjust` that draws from p(v | x) * p(class | x with v written)^strength, renormalised.

    score: tokens (n,T), mask_id where hidden -> (n,), log p(class | what is visible); any callable.
    candidates: only so many of the likeliest tokens of a position are tried, and can be drawn.

    One token at a time, with an exact network and an exact classifier, strength 1 samples exactly
    from p(text | class): Bayes' rule at every step.
    """

    def adjust(logits: Tensor, x: Tensor, positions: Tensor) -> Tensor:
        T = x.size(1)
        K = min(candidates, logits.size(1))
        value, token = logits.float().log_softmax(1).topk(K, dim=1)  # (P,K)
        trials = x[positions // T].repeat_interleave(K, dim=0)  # (P*K,T): each candidate written
        trials.scatter_(1, (positions % T).repeat_interleave(K)[:, None], token.view(-1, 1))
        wanted = (value + strength * score(trials).view(-1, K)).float()
        impossible = torch.full_like(logits, -torch.inf, dtype=torch.float32)
        return impossible.scatter_(1, token, wanted)

    return adjust


def classifier_free_guidance(model: Model, given: Tensor, mask_id: int, strength: float) -> Adjust:
    """An `adjust` that draws from p(v | x)^(1 + strength) / p(v | x without `given`)^strength.

    given: (B,T) bool, the prefix. Costs a second model call per step.
    """

    def adjust(logits: Tensor, x: Tensor, positions: Tensor) -> Tensor:
        without = model(x.masked_fill(given, mask_id), positions).float().log_softmax(1)
        return (1 + strength) * logits.float().log_softmax(1) - strength * without

    return adjust


class BagOfWords(nn.Module):
    """Naive Bayes: the log-odds of the second class are the sum over the visible tokens of how much
    likelier each is in its text. Forward: tokens (n,T), mask_id where hidden -> (n,)."""

    def __init__(self, classes: tuple[Tensor, Tensor], mask_id: int):
        """classes: the tokens (n,) of each."""
        super().__init__()
        # As if each token had been seen once more: none is impossible.
        counts = torch.stack([tokens.bincount(minlength=mask_id) for tokens in classes]) + 1.0
        log_p = (counts / counts.sum(1, keepdim=True)).log()  # (2,V)
        self.weight = F.pad(log_p[1] - log_p[0], (0, 1))  # a hidden token says nothing

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[tokens].sum(1)


def old_and_modern(file: TokenFile, part: int) -> tuple[Tensor, Tensor]:
    """The tokens of every second document (part 0 or 1) of the first and of the last third."""
    tokens = np.asarray(file.tokens).astype(np.int64)
    ends = np.flatnonzero(tokens == get_tokenizer(file.tokenizer, file.path.parent).eot_token) + 1
    documents = np.split(tokens, ends[:-1])
    third = len(documents) // 3
    if third < 2:
        raise DataError(f"{file.path} has {len(documents)} documents, too few to compare old and "
                        "modern ones")
    old = np.concatenate(documents[:third][part::2])
    modern = np.concatenate(documents[-third:][part::2])
    return torch.from_numpy(old), torch.from_numpy(modern)


def plans(model: Model, guide: BagOfWords, x: Tensor, begun: Tensor,
          strengths: list[float]) -> list[tuple[str, float, Tensor, Adjust | None]]:
    """(guidance, strength, the text to fill, its `adjust`); x is all hidden, `begun` has the
    prefix."""
    given = begun != x
    found = []
    for name, sign, some in (("none", 1, [0.0]), ("towards modern", 1, strengths),
                             ("towards old", -1, strengths)):
        for strength in some:  # at 0 too only likely candidates are drawn: nothing else differs
            adjust = classifier_guidance(
                lambda rows, sign=sign: F.logsigmoid(sign * guide(rows)), strength)
            found.append((name, strength, x, adjust))
    found.append(("the prefix alone", 0.0, begun, None))
    for strength in strengths:
        adjust = classifier_free_guidance(model, given, int(x[0, 0]), strength)
        found.append(("classifier-free", strength, begun, adjust))
    return found


def paint(axis, results: list[dict]) -> None:
    """The fraction judged modern by strength; dotted, that of real text."""
    lines = {"classifier, towards modern": ("none", "towards modern"),
             "classifier, towards old": ("none", "towards old"),
             "classifier-free, by a prefix": ("the prefix alone", "classifier-free")}
    for label, members in lines.items():
        line = [row for row in results if row["guidance"] in members]
        axis.errorbar([row["strength"] for row in line], [100 * row["modern"] for row in line],
                      [100 * row["modern_error"] for row in line], marker="o", capsize=3,
                      label=label)
    for row in results[:2]:
        axis.axhline(100 * row["modern"], color="grey", linestyle=":")
        axis.annotate(row["guidance"], (0, 100 * row["modern"]), color="grey")
    axis.set(title="Steering towards an age", xlabel="strength of the guidance", ylim=(-5, 105),
             ylabel="judged modern, % of the texts")
    axis.legend()


@command("experiments.guidance")
def main(arguments: list[str]) -> None:
    parser = flags_with_judge("guidance", __doc__, num_samples=64)
    add = parser.add_argument
    add("--length", type=count, default=128, help="tokens of a text (default: %(default)s)")
    add("--prefix", default="My fellow citizens,", help="text to be strengthened")
    add("--strengths", type=float, nargs="+", default=[1, 2, 4], help="(default: 1 2 4)")
    args = parser.parse_args(arguments)
    twins = load_twins(args.checkpoint, args.judge, args.data_dir)
    tokenizer = get_tokenizer(twins.info["tokenizer"], args.checkpoint)
    prefix = tokenizer.encode_ordinary(args.prefix)
    if not len(prefix) < args.length <= twins.N:
        raise ConfigError(f"--length must be more than the prefix's {len(prefix)} tokens and at "
                          f"most {twins.N}, not {args.length}")
    streams = [old_and_modern(TokenFile(args.data_dir, "train"), part) for part in (0, 1)]
    guide, second = (BagOfWords(classes, twins.mask_id) for classes in streams)
    for name, end in (("modern", guide.weight), ("old", -guide.weight)):
        words = [tokenizer.decode([token]) for token in end[:-1].topk(12).indices]
        print(f"the most {name} words:{''.join(words)}")

    results = []

    def say(name: str, strength: float, row: dict, tokens: Tensor) -> None:
        modern, error = fraction_and_error(second(tokens[:, len(prefix) :]) > 0)
        numbers = {name: row[name] for name in ("judge", "error", "distinct", "words")}
        results.append({"guidance": name, "strength": strength, "modern": modern,
                        "modern_error": error} | numbers)
        print_row(results[-1], heading=len(results) == 1)

    for name, stream in zip(("real old text", "real modern text"), streams[0], strict=True):
        windows = stream[: len(stream) // args.length * args.length].view(-1, args.length)
        windows = windows[:: max(1, len(windows) // 128)]
        say(name, 0.0, judge(twins, windows), windows)
    x = torch.full((args.num_samples, args.length), twins.mask_id)
    begun = x.clone()
    begun[:, : len(prefix)] = torch.tensor(prefix)
    samples = []
    for name, strength, start, adjust in plans(twins.model, guide, x, begun, args.strengths):
        row, states = judged(twins, name, start, order="spread", steps=32, temperature=0.85,
                             adjust=adjust)
        say(name, strength, row, states[-1].tokens)
        samples.append(tokenizer.decode(states[-1].tokens[0, len(prefix) :].tolist()))
    print()
    for row, sample in zip(results[2:], samples, strict=True):
        print(f"{row['guidance']:18}{row['strength']:4g}   {sample[:70]!r}")
    draw(args.picture, lambda axis: paint(axis, results), width=7, height=5)
    report({"rows": results})


if __name__ == "__main__":
    sys.exit(main())
