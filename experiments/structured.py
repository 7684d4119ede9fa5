"""Can one prescribe the form of a text? python -m experiments.structured

    python -m experiments.structured --template "In [word:May|June] of 1[digits:3], the[MASK:40]."

A template has fixed text and holes. [word:May|June|next year] takes one of these alternatives, of
one or more tokens each, [digits:3] three digits, and [MASK:20] any 20 tokens. Inside what is
possible the network decides: first which word, then, all other holes together, what is in them.
The result always satisfies the template, at any number of steps and in any order: where a digit
must be, the `adjust` hook of sample.denoise leaves no other token possible.
"""

import re
import sys

import tiktoken
import torch
from torch import Generator, Tensor

from diffusion import Model
from experiments.lab.command import count, report
from experiments.lab.judge import load_writer
from plumbing.adjust import Adjust, ban, chain
from plumbing.command import command
from plumbing.config import Parser
from sample import generate

HOLE = re.compile(r"\[(digits|MASK):(\d{1,6})\]|\[word:([^\]]+)\]")
DIGIT = -1  # among token ids: hidden, and a digit


def parse(template: str, tokenizer: tiktoken.Encoding, mask_id: int) -> list[list[list[int]]]:
    """Its parts, each a list of alternatives in tokens: mask_id where any will do, DIGIT for one
    digit. Only a [word:...] has more than one."""
    if wrong := re.search(r"\[\w+:[^\]]*\]", HOLE.sub("", template)):
        raise ValueError(f"{wrong[0]} is no hole; [digits:3], [MASK:3] and [word:May|June] are")
    template.encode()  # a ValueError for half a surrogate pair, which a tokenizer would replace
    parts = []
    end = 0
    for match in HOLE.finditer(template):
        given = template[end : match.start()]
        end = match.end()
        kind, size, words = match.groups()
        space = " " if words and given.endswith(" ") else ""  # tokens begin with the space before
        parts.append([tokenizer.encode_ordinary(given.removesuffix(space))])
        if words:
            parts.append([tokenizer.encode_ordinary(space + word)
                          for word in dict.fromkeys(words.split("|"))])
        else:
            parts.append([[DIGIT if kind == "digits" else mask_id] * int(size)])
    return [*parts, [tokenizer.encode_ordinary(template[end:])]]


@torch.no_grad()
def choose_words(model: Model, parts: list[list[list[int]]], mask_id: int,
                 generator: Generator) -> Tensor:
    """(T,) int64: one alternative of each part, with mask_id and DIGIT where they were.

    Words are drawn from left to right, each with the probability that the network gives to its
    tokens together, all hidden, once the words before it are in their places.
    """
    x = []
    for i, words in enumerate(parts):
        chosen = 0
        if len(words) > 1:
            behind = [token for later in parts[i + 1 :] for token in (
                later[0] if len(later) == 1 else [mask_id] * min(map(len, later)))]
            scores = []
            for word in words:
                row = torch.tensor([x + [mask_id] * len(word) + behind])
                positions = torch.arange(len(x), len(x) + len(word))
                log_p = model(row.where(row != DIGIT, mask_id), positions).float().log_softmax(1)
                scores.append(log_p[torch.arange(len(word)), word].sum())
            chosen = torch.multinomial(torch.stack(scores).softmax(0), 1, generator=generator)
        x += words[chosen]
    return torch.tensor(x, dtype=torch.int64)


def keep_digits(is_digit: Tensor, digits: Tensor) -> Adjust:
    """An `adjust` that bans all but the tokens `digits` where is_digit (T,) is True."""
    def adjust(logits: Tensor, x: Tensor, positions: Tensor) -> Tensor:
        banned = torch.ones(logits.size(1), dtype=torch.bool).index_fill(0, digits, False)  # (V,)
        return logits.masked_fill(is_digit[positions % x.size(1), None] & banned, -torch.inf)

    return adjust


@command("experiments.structured", ValueError)
def main(arguments: list[str]) -> None:
    parser = Parser(prog="experiments.structured", description=__doc__.split("\n\n")[2])
    add = parser.add_argument
    add("--checkpoint", default="out/quickstart", help="(default: %(default)s)")
    add("--template", default="In [word:May|July|September] of 1[digits:3] the "
        "[word:Congress|Senate|House of Representatives][MASK:30].", help="(default: %(default)s)")
    add("--num-samples", type=count, default=5, help="(default: %(default)s)")
    add("--steps", type=count, default=16, help="calls of the network (default: %(default)s)")
    add("--order", default="spread", help="of sample.py (default: %(default)s)")
    args = parser.parse_args(arguments)
    model, tokenizer = load_writer(args.checkpoint)
    mask_id = model.config.mask_id
    generator = Generator().manual_seed(1)
    parts = parse(args.template, tokenizer, mask_id)
    if not HOLE.search(args.template):
        raise ValueError("the template has no holes, such as [digits:3] or [MASK:40]")
    digits = torch.tensor([tokenizer.encode_ordinary(digit)[0] for digit in "0123456789"])
    satisfied = 0
    for _ in range(args.num_samples):  # one by one: their words may differ in length
        x = choose_words(model, parts, mask_id, generator)
        adjust = chain([ban([tokenizer.eot_token]), keep_digits(x == DIGIT, digits)])
        [row] = generate(model, x.where(x != DIGIT, mask_id)[None], mask_id, generator,
                         steps=args.steps, order=args.order, top_k=200, adjust=adjust)
        possible = (row == x) | (x == mask_id) | (x == DIGIT) & torch.isin(row, digits)  # (T,)
        satisfied += bool(possible.all())
        print(tokenizer.decode(row.tolist()), flush=True)
    print(f"{satisfied} of {args.num_samples} satisfy the template")
    report({"template": args.template, "texts": args.num_samples, "satisfied": satisfied})


if __name__ == "__main__":
    sys.exit(main())
