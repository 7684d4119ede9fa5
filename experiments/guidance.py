"""Can one steer what is written? python -m experiments.guidance --checkpoint out/bytes

Two uses of the `adjust` hook of sample.denoise:

    classifier_guidance        any callable that scores token rows says what it wants to read
    classifier_free_guidance   no classifier: what the prefix makes likelier is made likelier still

The experiment trains two small classifiers to tell old State of the Union messages (the first
third) from modern ones (the last third), on different documents. One guides; the other judges what
was written:

    judged modern   fraction of the samples, the prefix left out, and its standard error
    words           fraction of their words that occur in the training text: what steering costs
"""

import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from diffusion import Model, draw_mask
from experiments.lab.command import answer, count, flags
from experiments.lab.judge import fraction_and_error, fraction_known, vocabulary_of
from experiments.lab.pictures import draw
from experiments.lab.runs import autocast
from plumbing.adjust import Adjust
from plumbing.checkpoint import load_checkpoint
from plumbing.command import command
from plumbing.config import ConfigError
from prepare_data import DataError, TokenFile, get_tokenizer
from sample import generate


def classifier_guidance(score, strength: float = 1.0, candidates: int = 8) -> Adjust:
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


class BagOfTokens(nn.Module):
    """log-odds of a class = bias + the sum of a weight for each visible run of 1..longest tokens.

    Runs share a table of weights by hashing. Forward: tokens (n,T), mask_id where hidden -> (n,).
    """

    def __init__(self, mask_id: int, longest: int = 5, buckets: int = 1 << 18):
        super().__init__()
        self.mask_id = mask_id
        self.longest = longest
        self.buckets = buckets
        self.weight = nn.Embedding(buckets, 1)
        self.bias = nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self.weight.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        total = self.bias
        for length in range(1, min(self.longest, tokens.size(1)) + 1):
            runs = tokens.unfold(1, length, 1)  # (n, T-length+1, length)
            powers = torch.tensor([pow(1_000_003, i + 1, self.buckets) for i in range(length)])
            hashes = ((runs * powers).sum(2) + 7919 * length) % self.buckets
            visible = (runs != self.mask_id).all(2)
            total = total + (self.weight(hashes).squeeze(2) * visible).sum(1)
        return total

    def fit(self, classes: tuple[Tensor, Tensor], steps: int = 300, T: int = 128,
            seed: int = 0) -> None:
        """Learn to tell two token streams, (n,) each, apart by windows with a random number of
        tokens hidden, as the sampler will show them."""
        generator = Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)
        for _ in range(steps):
            rows, labels = self.windows(classes, 64, T, generator)
            odds = self(rows)
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(odds, labels.float()).backward()
            optimizer.step()

    @torch.no_grad()
    def accuracy(self, classes: tuple[Tensor, Tensor], T: int = 128, seed: int = 1) -> float:
        """The fraction of right answers on 2,000 partly hidden windows of these streams."""
        rows, labels = self.windows(classes, 2000, T, Generator().manual_seed(seed))
        return ((self(rows) > 0) == labels.bool()).float().mean().item()

    def windows(self, classes: tuple[Tensor, Tensor], rows: int, T: int,
                generator: Generator) -> tuple[Tensor, Tensor]:
        """(tokens (rows,T), labels (rows,)): partly hidden windows of class 0 and 1 by turns."""
        labels = torch.arange(rows) % 2
        found = []
        for label in labels:
            start = int(torch.randint(len(classes[label]) - T, (), generator=generator))
            found.append(classes[label][start : start + T])
        mask = draw_mask(torch.randint(T, (rows,), generator=generator), T, 0, generator)
        return torch.stack(found).masked_fill(mask, self.mask_id), labels


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


def plans(model: Model, guide: BagOfTokens, x: Tensor, begun: Tensor, mask_id: int,
          strengths: list[float]) -> list[tuple[str, float, Tensor, Adjust | None]]:
    """(guidance, strength, the text to fill, its `adjust`); x is all hidden, `begun` has the
    prefix."""
    found = [("none", 0.0, x, None)]
    for name, sign in (("towards modern", 1), ("towards old", -1)):
        for strength in strengths:
            adjust = classifier_guidance(
                lambda rows, sign=sign: F.logsigmoid(sign * guide(rows)), strength)
            found.append((name, strength, x, adjust))
    found.append(("the prefix alone", 0.0, begun, None))
    for strength in strengths[:-1]:
        adjust = classifier_free_guidance(model, begun != mask_id, mask_id, strength)
        found.append(("classifier-free", strength, begun, adjust))
    return found


def paint(axis, results: list[dict], real: dict[str, float]) -> None:
    """The fraction judged modern by strength, with what the judge says of real text."""
    lines = {"classifier, towards modern": ("none", "towards modern"),
             "classifier, towards old": ("none", "towards old"),
             "classifier-free, by a prefix": ("the prefix alone", "classifier-free")}
    strengths = sorted({row["strength"] for row in results})
    for label, members in lines.items():
        line = [row for row in results if row["guidance"] in members]
        axis.errorbar([strengths.index(row["strength"]) for row in line],
                      [100 * row["judged_modern"] for row in line],
                      [100 * row["stderr"] for row in line], marker="o", capsize=3, label=label)
    for name, fraction in real.items():
        axis.axhline(100 * fraction, color="grey", linestyle=":")
        axis.annotate(f"real {name} text", (0, 100 * fraction), xytext=(4, 3), color="grey",
                      xycoords=("axes fraction", "data"), textcoords="offset points")
    axis.set(title="Steering towards an age", xlabel="strength of the guidance", ylim=(-5, 105),
             ylabel="judged modern, % of the samples")
    axis.set_xticks(range(len(strengths)), [f"{strength:g}" for strength in strengths])
    axis.figure.legend(loc="outside lower center", ncols=2)


def conclude(results: list[dict]) -> str:
    """The answer in words: what guidance of every kind makes of the fraction judged modern, and of
    the words."""
    def said(row: dict) -> str:
        return f"{row['judged_modern']:.0%} +- {row['stderr']:.0%}"

    by_kind = {row["guidance"]: row for row in results}  # the last of each kind: the strongest
    none, modern, old = (by_kind[name] for name in ("none", "towards modern", "towards old"))
    alone = by_kind["the prefix alone"]
    free = by_kind.get("classifier-free", alone)
    moved = abs(free["judged_modern"] - alone["judged_modern"]) > 2 * (
        free["stderr"] ** 2 + alone["stderr"] ** 2) ** 0.5
    effect = "moves it" if moved else "changes nothing this judge would notice"
    return (f"guided by a classifier at strength {modern['strength']:g}, the fraction of texts "
            f"judged modern goes from {said(none)} to {said(modern)}, or to {said(old)} when old "
            f"ones are wanted, and the fraction of known words from {none['words']:.0%} to "
            f"{modern['words']:.0%} and {old['words']:.0%}. Strengthening a prefix {effect}: "
            f"{said(alone)} with the prefix alone, {said(free)} at strength {free['strength']:g}.")


@command("experiments.guidance")
def main(arguments: list[str]) -> None:
    parser = flags("guidance", __doc__)
    add = parser.add_argument
    add("--num-samples", type=count, default=48, help="texts of each kind (default: 48)")
    add("--length", type=count, default=128, help="tokens of a text (default: 128)")
    add("--prefix", default="Tonight, my fellow Americans, our economy ", help="to be strengthened")
    add("--strengths", type=float, nargs="+", default=[1, 3, 10], help="(default: 1 3 10)")
    add("--fit-steps", type=count, default=300,
        help="of training for each classifier (default: 300)")
    args = parser.parse_args(arguments)
    model, info = load_checkpoint(args.checkpoint)
    train = TokenFile(args.data_dir, "train")
    streams = [old_and_modern(train, part) for part in (0, 1)]
    mask_id = model.config.mask_id
    tokenizer = get_tokenizer(info["tokenizer"], args.checkpoint)
    prefix = tokenizer.encode_ordinary(args.prefix)
    if not len(prefix) < args.length <= model.config.context_length:
        raise ConfigError(f"--length must be more than the prefix's {len(prefix)} tokens and at "
                          f"most {model.config.context_length}, not {args.length}")
    vocabulary = vocabulary_of(train)

    guide = BagOfTokens(mask_id)
    judge = BagOfTokens(mask_id)
    for name, classifier, own, other in (("guide", guide, *streams),
                                         ("judge", judge, *streams[::-1])):
        classifier.fit(own, args.fit_steps)
        classifier.requires_grad_(False)
        print(f"the {name} is right about {classifier.accuracy(other):.0%} of partly hidden "
              "windows of documents it was not trained on", flush=True)
    L = args.length - len(prefix)  # as much as is judged of a sample; documents new to the judge
    real = {}
    for name, stream in zip(("old", "modern"), streams[0], strict=True):
        windows = stream[: len(stream) // L * L].view(-1, L)[:1000]
        real[name] = (judge(windows) > 0).float().mean().item()
    print(f"of real text it judges modern: {real['old']:.0%} of old, {real['modern']:.0%} of "
          "modern windows")

    x = torch.full((args.num_samples, args.length), mask_id)
    begun = x.clone()
    begun[:, : len(prefix)] = torch.tensor(prefix)
    results = []
    print(f"\n{'guidance':18} {'strength':>8} {'judged modern':>14} {'words':>6} {'seconds':>8}   "
          "a sample")
    for name, strength, start, adjust in plans(model, guide, x, begun, mask_id, args.strengths):
        started = time.perf_counter()
        with autocast():
            written = generate(model, start, mask_id, Generator().manual_seed(1), order="random",
                               steps=args.length, temperature=0.8, adjust=adjust)
        seconds = time.perf_counter() - started
        behind = written[:, len(prefix) :]
        modern, error = fraction_and_error(judge(behind) > 0)
        known = fraction_known("\n".join(map(tokenizer.decode, behind.tolist())), vocabulary)
        sample = tokenizer.decode(behind[0].tolist())
        print(f"{name:18} {strength:8g} {modern:7.0%} +- {error:4.0%} {known:6.0%} "
              f"{seconds:8.1f}   {sample[:50]!r}", flush=True)
        results.append({"guidance": name, "strength": strength, "judged_modern": modern,
                        "stderr": error, "words": known, "seconds": round(seconds, 1)})
    draw(args.picture, lambda axis: paint(axis, results, real), width=7, height=5)
    answer(conclude(results), {"real": real, "runs": results})


if __name__ == "__main__":
    sys.exit(main())
