"""Can one prescribe the form of a text? python -m experiments.structured

    python -m experiments.structured --template "In [word:May|June] of 1[digits:3], the[MASK:40]."

A template has fixed text and holes. [digits:3] takes three digits, [word:May|June|next year] one of
these alternatives, of one or more tokens each, and [MASK:20] any 20 tokens. Inside what is possible
the network decides, first how many tokens an alternative has, then which; the result always
satisfies the template, at any number of steps and in any order: the `adjust` hook of sample.denoise
leaves no other token possible.
"""

import re
import string
import sys

import tiktoken
import torch
from torch import Generator, Tensor

from diffusion import Model
from experiments.lab.command import count, report
from plumbing.adjust import Adjust, ban, chain
from plumbing.checkpoint import load_checkpoint
from plumbing.command import command
from plumbing.config import Parser
from prepare_data import get_tokenizer
from sample import generate

HOLE = re.compile(r"\[(digits|MASK):(\d{1,6})\]|\[word:([^\]]+)\]")
Hole = dict[int, Tensor]  # by their length L in tokens: the (n,L) contents that it may have


def parse(template: str, tokenizer: tiktoken.Encoding, mask_id: int) -> list[list[int] | Hole]:
    """The given tokens, mask_id where any will do, and between them the holes with a form."""
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
        parts.append(tokenizer.encode_ordinary(given.removesuffix(space)))
        if words:
            ids = [tokenizer.encode_ordinary(space + word) for word in dict.fromkeys(
                words.split("|"))]
            parts.append({L: torch.tensor([word for word in ids if len(word) == L])
                          for L in sorted(set(map(len, ids)))})
        elif kind == "digits":
            digits = [tokenizer.encode_ordinary(digit) for digit in string.digits]
            parts += [{1: torch.tensor(digits)}] * int(size)
        else:
            parts.append([mask_id] * int(size))
    return [*parts, tokenizer.encode_ordinary(template[end:])]


@torch.no_grad()
def settle(model: Model, parts: list[list[int] | Hole], mask_id: int,
           generator: Generator) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    """Choose how long each hole is: (x (T,), with mask_id in the holes; where each begins, and the
    contents (n,L) that it may have).

    A length is drawn with the probability that the network gives to all contents of this length.
    """
    x = []
    form = []
    for i, part in enumerate(parts):
        if isinstance(part, dict):
            behind = [token for later in parts[i + 1 :] for token in (
                later if isinstance(later, list) else [mask_id] * min(later))]
            scores = []
            for L, contents in part.items():
                positions = len(x) + torch.arange(L)
                row = torch.tensor([x + [mask_id] * L + behind])
                log_p = model(row, positions).float().log_softmax(1)  # (L,V)
                scores.append(log_p[torch.arange(L), contents].sum(1).logsumexp(0))
            chosen = torch.multinomial(torch.stack(scores).softmax(0), 1, generator=generator)
            contents = list(part.values())[chosen]
            form.append((len(x), contents))
            part = [mask_id] * contents.size(1)
        x += part
    return torch.tensor(x, dtype=torch.int64), form


def keep_form(form: list[tuple[int, Tensor]], mask_id: int, generator: Generator) -> Adjust:
    """An `adjust` under which every row of the result satisfies `form`.

    If one position of a hole is predicted, it bans the tokens that no content allows that agrees
    with what is visible. If several are, which would be drawn independently of one another, it
    draws them together, in proportion to the product of their probabilities.
    """

    def adjust(logits: Tensor, x: Tensor, positions: Tensor) -> Tensor:
        logits = logits.float().log_softmax(1)
        slot = torch.full((x.numel(),), -1)
        slot[positions] = torch.arange(len(positions))  # where the logits of a position are
        slot = slot.view(x.shape)
        for start, contents in form:
            hole = slice(start, start + contents.size(1))
            visible = x[:, None, hole]  # (B,1,L)
            agrees = ((visible == contents) | (visible == mask_id)).all(2)  # (B,n)
            for b in (slot[:, hole] >= 0).any(1).nonzero().flatten().tolist():
                predicted = slot[b, hole] >= 0
                rows = slot[b, hole][predicted]  # (p,)
                combinations = contents[agrees[b]][:, predicted].unique(dim=0)  # (k,p)
                if len(rows) > 1:
                    score = logits[rows, combinations].sum(1)
                    chosen = torch.multinomial(score.softmax(0), 1, generator=generator)
                    combinations = combinations[chosen]
                allowed = torch.zeros_like(logits[rows], dtype=torch.bool)
                allowed.scatter_(1, combinations.T, True)
                logits[rows] = logits[rows].masked_fill(~allowed, -torch.inf)
        return logits

    return adjust


def pattern_of(template: str) -> re.Pattern[bytes]:
    """What the bytes of a text match that satisfies the template."""
    # re.split with three groups: given, kind, size, words, given, kind, size, words, ..., given
    given, *rest = HOLE.split(template)
    pattern = re.escape(given)
    for kind, size, words, given in zip(*[iter(rest)] * 4, strict=True):
        hole = "|".join(map(re.escape, words.split("|"))) if words else (
            rf"[0-9]{{{size}}}" if kind == "digits" else ".*")
        pattern += f"(?:{hole})" + re.escape(given)
    return re.compile(pattern.encode(), re.DOTALL)


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
    add("--seed", type=int, default=1, help="(default: %(default)s)")
    args = parser.parse_args(arguments)
    model, info = load_checkpoint(args.checkpoint)
    tokenizer = get_tokenizer(info["tokenizer"], args.checkpoint)
    mask_id = model.config.mask_id
    generator = Generator().manual_seed(args.seed)
    parts = parse(args.template, tokenizer, mask_id)
    if not HOLE.search(args.template):
        raise ValueError("the template has no holes, such as [digits:3] or [MASK:40]")
    texts = []
    for _ in range(args.num_samples):  # one by one: their holes may differ in length
        x, form = settle(model, parts, mask_id, generator)
        adjust = chain([ban([tokenizer.eot_token]), keep_form(form, mask_id, generator)])
        rows = generate(model, x[None], mask_id, generator, steps=args.steps, order=args.order,
                        temperature=0.85, adjust=adjust)
        texts.append(tokenizer.decode_bytes(rows[0].tolist()))
        print(texts[-1].decode(errors="replace"), flush=True)
    pattern = pattern_of(args.template)
    satisfied = sum(pattern.fullmatch(text) is not None for text in texts)
    print(f"{satisfied} of {len(texts)} satisfy the template")
    report({"template": args.template, "texts": len(texts), "satisfied": satisfied})


if __name__ == "__main__":
    sys.exit(main())
