"""Can one steer what is written? python -m experiments.guidance

Two uses of the `adjust` hook of sample.denoise:

    classifier_guidance        any callable that scores token rows says what it wants to read
    classifier_free_guidance   no classifier: what the prefix makes likelier is made likelier still

Here the classifier tells State of the Union messages of the first third from those of the last
third, by their words. One guides; another, made of other documents, judges what was written:

    modern      fraction of the texts, the prefix left out, that it finds modern, with the standard
                error; the first rows are real text of both kinds
    judge ...   what the steering costs: the columns are those of experiments/lab/judge.py
The number behind a guidance is its strength.
"""

import sys
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion import Model
from experiments.lab.command import flags_with_judge, report
from experiments.lab.judge import fraction_and_error, judge, load_twins, print_row, write
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


def bag_of_words(old: Tensor, modern: Tensor, mask_id: int) -> Tensor:
    """(V+1,): how much a token speaks for modern text, in nats, from the tokens (n,) of both kinds.

    Naive Bayes: the sum over a text is the log-odds that it is modern; a hidden token says nothing.
    """
    # As if each token had been seen once more: none is impossible.
    counts = torch.stack([tokens.bincount(minlength=mask_id) for tokens in (old, modern)]) + 1.0
    log_p = (counts / counts.sum(1, keepdim=True)).log()  # (2,V)
    return F.pad(log_p[1] - log_p[0], (0, 1))


def old_and_modern(file: TokenFile, part: int) -> tuple[Tensor, Tensor]:
    """The tokens of every second document (part 0 or 1) of the first and of the last third."""
    tokens = np.asarray(file.tokens).astype(np.int64)
    ends = np.flatnonzero(tokens == get_tokenizer(file.tokenizer, file.path.parent).eot_token) + 1
    documents = np.split(tokens, ends[:-1])
    third = len(documents) // 3
    if third < 2:
        raise DataError(f"{file.path} has {len(documents)} documents, too few to compare old and "
                        "modern ones")
    old, modern = (torch.from_numpy(np.concatenate(some[part::2]))
                   for some in (documents[:third], documents[-third:]))
    return old, modern


def paint(axes, rows: list[dict]) -> None:
    """What fraction of the texts of each row is judged modern."""
    axes.barh([row["guidance"] for row in rows], [100 * row["modern"] for row in rows],
              xerr=[100 * row["+-"] for row in rows], capsize=3)
    axes.invert_yaxis()
    axes.set(title="Steering towards an age", xlabel="judged modern, % of the texts")


@command("experiments.guidance")
def main(arguments: list[str]) -> None:
    parser = flags_with_judge("guidance", __doc__, num_samples=64)
    parser.add_argument("--prefix", default="My fellow citizens,", help="what is strengthened")
    args = parser.parse_args(arguments)
    twins = load_twins(args.checkpoint, args.judge, args.data_dir)
    prefix = twins.tokenizer.encode_ordinary(args.prefix)
    length = min(128, twins.N)  # tokens of a text
    if len(prefix) >= length:
        raise ConfigError(f"--prefix has {len(prefix)} tokens, as many as a text: shorten it")
    classes = [old_and_modern(TokenFile(args.data_dir, "train"), part) for part in (0, 1)]
    guide, second = (bag_of_words(*both, twins.mask_id) for both in classes)
    texts = {}
    for name, stream in zip(("real old text", "real modern text"), classes[0], strict=True):
        windows = stream[: len(stream) // length * length].view(-1, length)
        texts[name] = windows[:: max(1, len(windows) // 128)]

    def towards(sign: int, strength: float) -> Adjust:
        return classifier_guidance(lambda x: F.logsigmoid(sign * guide[x].sum(1)), strength)

    x = torch.full((args.num_samples, length), twins.mask_id)
    begun = x.clone()
    begun[:, : len(prefix)] = torch.tensor(prefix)
    stronger = partial(classifier_free_guidance, twins.model, begun != x, twins.mask_id)
    for name, start, adjust in (
        ("none", x, towards(1, 0)),  # it too draws from the likely candidates alone
        ("classifier, towards modern, 1", x, towards(1, 1)),
        ("classifier, towards old, 1", x, towards(-1, 1)),
        ("the prefix alone", begun, None),
        ("classifier-free, 2", begun, stronger(2)),
        ("classifier-free, 4", begun, stronger(4)),
    ):
        states = write(twins.model, start, twins.mask_id, order="spread", steps=16, top_k=200,
                       adjust=adjust)
        texts[name] = states[-1].tokens
    rows = []
    for name, tokens in texts.items():
        modern, error = fraction_and_error(second[tokens[:, len(prefix) :]].sum(1) > 0)
        rows.append({"guidance": name, "modern": modern, "+-": error} | judge(twins, tokens))
        print_row(rows[-1], heading=len(rows) == 1)
    draw(args.picture, lambda axes: paint(axes, rows), width=7)
    report({"rows": rows})


if __name__ == "__main__":
    sys.exit(main())
