"""Steer what is written: python -m experiments.guidance --checkpoint out/quickstart --data-dir data/sotu

Two uses of the `adjust` hook of diffusion.denoise:

    classifier_guidance        any callable that scores token rows says what it wants to read
    classifier_free_guidance   no classifier: what the prefix makes likelier is made likelier still

The experiment trains two small classifiers to tell old State of the Union messages (the first third) from
modern ones (the last third), on different documents. One guides; the other judges what was written.
"""

import argparse
import json
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion import Adjust, Model, draw_mask, generate
from model import CheckpointError, load_checkpoint
from prepare_data import DataError, TokenFile, get_tokenizer


def classifier_guidance(score, strength: float = 1.0, candidates: int = 8) -> Adjust:
    """An `adjust` that draws from p(v | x) * p(class | x with v written)^strength, renormalised.

    score: tokens (n,T), mask_id where hidden -> (n,), log p(class | what is visible); any callable.
    candidates: only so many of the likeliest tokens are tried at a place, and only they can be drawn.

    One token at a time, with an exact network and an exact classifier, strength 1 samples exactly from
    p(text | class): Bayes' rule at every step.
    """

    def adjust(logits: Tensor, x: Tensor, positions: Tensor) -> Tensor:
        T, K = x.size(1), min(candidates, logits.size(1))
        value, token = logits.float().log_softmax(1).topk(K, dim=1)  # (P,K)
        trials = x[positions // T].repeat_interleave(K, dim=0)  # (P*K,T): each candidate written in its place
        trials.scatter_(1, (positions % T).repeat_interleave(K)[:, None], token.view(-1, 1))
        wanted = value + strength * score(trials).view(-1, K)
        return torch.full_like(logits, -torch.inf, dtype=torch.float32).scatter_(1, token, wanted)

    return adjust


def classifier_free_guidance(model: Model, given: Tensor, mask_id: int, strength: float) -> Adjust:
    """An `adjust` that draws from p(v | x)^(1 + strength) / p(v | x without `given`)^strength, renormalised.

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
        self.mask_id, self.longest, self.buckets = mask_id, longest, buckets
        self.weight = nn.Embedding(buckets, 1)
        self.bias = nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self.weight.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        total, T = self.bias, tokens.size(1)
        for length in range(1, min(self.longest, T) + 1):
            runs = tokens.unfold(1, length, 1)  # (n, T-length+1, length)
            powers = torch.tensor([pow(1_000_003, i + 1, self.buckets) for i in range(length)])
            hashes = ((runs * powers).sum(2) + 7919 * length) % self.buckets
            visible = (runs != self.mask_id).all(2)
            total = total + (self.weight(hashes).squeeze(2) * visible).sum(1)
        return total

    def fit(self, classes: tuple[Tensor, Tensor], steps: int = 300, T: int = 128, seed: int = 0) -> None:
        """Learn to tell two token streams, (n,) each, apart by windows with a random share hidden, as the
        sampler will show them."""
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)
        for _ in range(steps):
            rows, labels = self.windows(classes, 64, T, generator)
            odds = self(rows)
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(odds, labels.float()).backward()
            optimizer.step()

    @torch.no_grad()
    def accuracy(self, classes: tuple[Tensor, Tensor], T: int = 128, seed: int = 1) -> float:
        """The share of right answers on 2,000 windows of these streams, a random share of each hidden."""
        rows, labels = self.windows(classes, 2000, T, torch.Generator().manual_seed(seed))
        return ((self(rows) > 0) == labels.bool()).float().mean().item()

    def windows(self, classes: tuple[Tensor, Tensor], rows: int, T: int,
                generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(tokens (rows,T), labels (rows,)): random windows, by turns of class 0 and 1, partly hidden."""
        labels, found = torch.arange(rows) % 2, []
        for label in labels:
            start = int(torch.randint(len(classes[label]) - T, (), generator=generator))
            found.append(classes[label][start : start + T])
        mask = draw_mask(torch.randint(T, (rows,), generator=generator), T, 0, generator)
        return torch.stack(found).masked_fill(mask, self.mask_id), labels


def old_and_modern(file: TokenFile, part: int) -> tuple[Tensor, Tensor]:
    """The tokens of every second document (part 0 or 1) of the first and of the last third, end to end."""
    tokens = np.asarray(file.tokens).astype(np.int64)
    ends = np.flatnonzero(tokens == get_tokenizer(file.tokenizer).eot_token) + 1
    documents = np.split(tokens, ends[:-1])
    third = len(documents) // 3
    if third < 2:
        raise DataError(f"{file.path} has {len(documents)} documents, too few to compare old and modern ones")
    old, modern = documents[:third][part::2], documents[-third:][part::2]
    return torch.from_numpy(np.concatenate(old)), torch.from_numpy(np.concatenate(modern))


def main() -> int:
    parser = argparse.ArgumentParser(prog="experiments.guidance", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default="out/quickstart")
    parser.add_argument("--data-dir", default="data/sotu")
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--prefix", default="Tonight, my fellow Americans, our economy ")
    args = parser.parse_args()
    try:
        model, info = load_checkpoint(args.checkpoint)
        train = TokenFile(args.data_dir, "train")
        streams = [old_and_modern(train, part) for part in (0, 1)]
    except (CheckpointError, DataError) as error:
        print(f"experiments.guidance: {error}", file=sys.stderr)
        return 2
    mask_id, tokenizer = model.config.mask_id, get_tokenizer(info["tokenizer"])
    prefix = tokenizer.encode_ordinary(args.prefix)
    if not len(prefix) < args.length <= model.config.context_length:
        parser.error(f"--length must be more than the prefix's {len(prefix)} tokens and at most "
                     f"{model.config.context_length}, not {args.length}")
    guide, judge = BagOfTokens(mask_id), BagOfTokens(mask_id)
    for name, classifier, own, other in (("guide", guide, *streams), ("judge", judge, *streams[::-1])):
        classifier.fit(own)
        print(f"the {name} is right about {classifier.accuracy(other):.0%} of partly hidden windows of "
              "documents it was not trained on")

    free = torch.full((args.num_samples, args.length), mask_id)
    begun = free.clone()
    begun[:, : len(prefix)] = torch.tensor(prefix)
    runs: list[tuple[str, float, Tensor, Adjust | None]] = [("none", 0, free, None)]
    for strength in (1, 3, 10):
        for name, sign in (("modern", 1), ("old", -1)):
            adjust = classifier_guidance(lambda x, sign=sign: F.logsigmoid(sign * guide(x)), strength)
            runs.append((f"classifier, towards {name}", strength, free, adjust))
    runs.append(("a prefix alone", 0, begun, None))
    for strength in (1, 3):
        adjust = classifier_free_guidance(model, begun != mask_id, mask_id, strength)
        runs.append(("classifier-free, by the prefix", strength, begun, adjust))

    results = []
    print(f"\n{'guidance':32} {'strength':>8} {'judged modern':>14} {'seconds':>8}   a sample")
    for name, strength, x, adjust in runs:
        started = time.perf_counter()
        written = generate(model, x, mask_id, steps=args.length, temperature=0.8, adjust=adjust,
                           generator=torch.Generator().manual_seed(1))
        seconds = time.perf_counter() - started
        with torch.no_grad():
            modern = (judge(written[:, len(prefix) :]) > 0).float().mean().item()  # without the prefix
        sample = tokenizer.decode(written[0].tolist())
        print(f"{name:32} {strength:8} {modern:14.0%} {seconds:8.1f}   {sample[:60]!r}", flush=True)
        results.append({"guidance": name, "strength": strength, "judged_modern": modern, "seconds": seconds})
    share = {(row["guidance"], row["strength"]): row["judged_modern"] for row in results}
    print("\nGuided by a classifier at strength 3, the share of texts judged modern goes from "
          f"{share['none', 0]:.0%} to {share['classifier, towards modern', 3]:.0%}, or to "
          f"{share['classifier, towards old', 3]:.0%} when asked for old ones.")
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
