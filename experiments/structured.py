"""Text that keeps a form:

    python -m experiments.structured --template "In [word:May|June] of 1[digits:3], the [MASK:40]"

A template has fixed text and typed holes. [digits:4] and [letters:4] are holes of four positions
that take one character each; [word:May|June|July] takes one of the words, padded with spaces;
[MASK:20] is free. The result always satisfies the template, at any number of steps and in any
order, because the `adjust` hook leaves no other token possible; inside what is possible the network
decides.
"""

import re
import string
import sys

import tiktoken
import torch
from torch import Generator, Tensor

from experiments.lab.command import count
from plumbing.adjust import Adjust
from plumbing.checkpoint import load_checkpoint
from plumbing.command import command
from plumbing.config import Parser
from prepare_data import get_tokenizer
from sample import generate

HOLE = re.compile(r"\[(digits|letters|MASK):(\d{1,6})\]|\[word:([^\]]+)\]")
ALPHABETS = {"digits": string.digits, "letters": string.ascii_letters}
Form = list[tuple[int, Tensor]]  # holes: first position, and the (n,L) contents it may take


def parse(template: str, tokenizer: tiktoken.Encoding, mask_id: int) -> tuple[Tensor, Form]:
    """(x (T,), form): the given tokens with mask_id in the holes, and what typed holes may hold.

    A position for a digit is a hole of length 1 with ten contents. ValueError if a hole cannot be
    filled: a character or padding that is no single token.
    """
    def single(character: str) -> int:
        ids = tokenizer.encode_ordinary(character)
        if len(ids) != 1:
            raise ValueError(f"{character!r} is {len(ids)} tokens of this vocabulary: no hole can "
                             "be of it")
        return ids[0]

    if wrong := re.search(r"\[\w+:[^\]]*\]", HOLE.sub("", template)):
        raise ValueError(f"{wrong[0]} is no hole; [digits:3], [letters:3], [MASK:3] and "
                         "[word:May|June] are")
    template.encode()  # a ValueError for half a surrogate pair, which a tokenizer would replace
    ids = []
    form = []
    end = 0
    for match in HOLE.finditer(template):
        ids += tokenizer.encode_ordinary(template[end : match.start()])
        end = match.end()
        kind, size, words = match.groups()
        if kind in ALPHABETS:
            contents = torch.tensor([[single(character)] for character in ALPHABETS[kind]])
            form += [(len(ids) + i, contents) for i in range(int(size))]
        elif words:
            spelled = [tokenizer.encode_ordinary(word) for word in words.split("|")]
            size = max(map(len, spelled))
            padded = [word + [single(" ")] * (size - len(word)) for word in spelled]
            form.append((len(ids), torch.tensor(padded).unique(dim=0)))
        ids += [mask_id] * int(size)
    return torch.tensor(ids + tokenizer.encode_ordinary(template[end:])), form


def keep_form(form: Form, mask_id: int, generator: Generator | None = None) -> Adjust:
    """An `adjust` under which every row of the result satisfies `form`.

    If one position of a hole is predicted, it bans the tokens that no content allows that agrees
    with what is visible. If several are, which would be drawn independently of one another, it
    draws them together: a combination of tokens in proportion to the product of its probabilities,
    the only one left.
    """

    def adjust(logits: Tensor, x: Tensor, positions: Tensor) -> Tensor:
        logits = logits.float().log_softmax(1)
        slot = torch.full((x.numel(),), -1, device=x.device)
        slot[positions] = torch.arange(len(positions), device=x.device)  # where their logits are
        slot = slot.view(x.shape)
        for start, contents in form:
            n, L = contents.shape
            hole = x[:, start : start + L]  # (B,L)
            slots = slot[:, start : start + L]
            contents = contents.to(x.device)
            agrees = ((hole[:, None] == contents) | (hole[:, None] == mask_id)).all(2)  # (B,n)
            for b in (slots >= 0).any(1).nonzero().flatten().tolist():
                predicted = slots[b] >= 0
                combinations = contents[agrees[b]][:, predicted].unique(dim=0)  # (k,p)
                rows = slots[b, predicted]  # (p,)
                if len(rows) > 1:
                    score = logits[rows, combinations].sum(1)  # of each combination
                    chosen = torch.multinomial(score.softmax(0).cpu(), 1, generator=generator)
                    combinations = combinations[chosen.to(x.device)]
                allowed = torch.zeros_like(logits[rows], dtype=torch.bool)
                allowed.scatter_(1, combinations.T, True)
                logits[rows] = logits[rows].masked_fill(~allowed, -torch.inf)
        return logits

    return adjust


def satisfies(row: Tensor, x: Tensor, form: Form, mask_id: int) -> bool:
    """Whether a finished row (T,) has the fixed text, and allowed contents in its holes."""
    fixed = (row == x) | (x == mask_id)
    return bool(fixed.all()) and all(
        bool((contents == row[start : start + contents.size(1)]).all(1).any())
        for start, contents in form)


@command("experiments.structured", ValueError)
def main(arguments: list[str]) -> None:
    parser = Parser(prog="experiments.structured", description=__doc__.split("\n\n")[2])
    add = parser.add_argument
    add("--checkpoint", default="out/bytes")
    add("--template", default="On the [digits:2]th of [word:January|May|July|September] 1[digits:3]"
        " the [word:Congress|Senate|people] [MASK:60].")
    add("--num-samples", type=count, default=5)
    add("--steps", type=count, help="default: one for each hidden token")
    add("--order", default="random")
    add("--temperature", type=float, default=0.7)
    add("--seed", type=int, default=1)
    args = parser.parse_args(arguments)
    model, info = load_checkpoint(args.checkpoint)
    tokenizer = get_tokenizer(info["tokenizer"], args.checkpoint)
    mask_id = model.config.mask_id
    generator = Generator().manual_seed(args.seed)
    x, form = parse(args.template, tokenizer, mask_id)
    if not (x == mask_id).any():
        raise ValueError("the template has no holes, such as [digits:3] or [MASK:40]")
    rows = generate(model, x.expand(args.num_samples, -1), mask_id, generator, steps=args.steps,
                    order=args.order, temperature=args.temperature,
                    adjust=keep_form(form, mask_id, generator))
    for row in rows:
        print(tokenizer.decode(row.tolist()))
    satisfied = sum(satisfies(row, x, form, mask_id) for row in rows)
    print(f"{satisfied} of {len(rows)} satisfy the template")


if __name__ == "__main__":
    sys.exit(main())
