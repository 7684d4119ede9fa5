"""What does a sampler cost, exactly? python -m experiments.prices

The price of a text is -log of the probability with which a sampler writes it, at temperature 1:
the lower, the better the sampler knows real text. Validation text is priced by order and number of
calls, in bits per byte, and how much more than order spread costs at one token per call. All rows
price the same texts, so differences are known better than the numbers.

Where the visible tokens decide which positions come next, the price is exact (sample.exact_nll).
That of a random order is a bound, estimated with one order per text. Then: the cheapest schedules
of the order spread, found on other texts than they are priced on; and what a word or a sentence in
the middle of a text costs the model, which sees both sides of it, and the twin (--judge), which
sees the left one.
"""

import itertools
import re
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from diffusion import (
    Model,
    bit_reversal,
    cheapest_schedule,
    evaluate,
    keyed_generator,
    mean_and_error,
    row_losses,
    shift_right,
)
from experiments.lab.command import count, flags, report, several
from experiments.lab.judge import load_twins
from experiments.lab.pictures import draw
from experiments.lab.runs import autocast
from plumbing.checkpoint import load_checkpoint
from plumbing.command import command
from plumbing.config import ConfigError
from prepare_data import TokenFile, get_tokenizer
from sample import denoise

ORDERS = ("spread", "random", "left_to_right", "top", "margin", "entropy")
UNIT = 4  # tokens: schedules are sought among the multiples of it
HOLES = {"a word": rb" [A-Za-z]+", "a sentence": rb"(?<=[.?!]) [A-Z][^.?!]*[.?!]"}


def costs(model: Model, x: Tensor, truth: Tensor, mask_id: int, **options) -> Tensor:
    """(B,T): nats of each token of `truth` (B,T) if `denoise` writes it into x; of given ones 0."""
    found = []
    for rows, goal in zip(x.split(32), truth.split(32), strict=True):
        generator = keyed_generator(0, len(found), "prices")  # for random orders
        with autocast():
            *_, last = denoise(model, rows, mask_id, generator, truth=goal, **options)
        found.append(-last.probability.double().log())
    return torch.cat(found)


def prices(model: Model, x_0: Tensor, mask_id: int, **options) -> Tensor:
    """(B,): nats per token of each text (B,T)."""
    return costs(model, torch.full_like(x_0, mask_id), x_0, mask_id, **options).mean(1)


def costs_of_steps(model: Model, x_0: Tensor, mask_id: int) -> np.ndarray:
    """(N+1,N+1): nats per text of a step of the order spread from m hidden units to k < m."""
    T = x_0.size(1)
    N = T // UNIT
    rank = bit_reversal(T).argsort().argsort()  # (T,): 0 is written first
    found = np.zeros((N + 1, N + 1))
    for m in range(1, N + 1):
        x = x_0.masked_fill(rank >= T - m * UNIT, mask_id)
        nats = costs(model, x, x_0, mask_id, steps=1, order="spread").mean(0)  # (T,), all at once
        # Of the units, the last to be written first: a step from m to k commits all but k of the m.
        units = nats[rank.argsort()].flip(0).view(N, UNIT).sum(1)[:m]  # (m,)
        found[m, :m] = units.flip(0).cumsum(0).flip(0)
    return found


def spans(pieces: list[bytes], pattern: bytes) -> list[tuple[int, int]]:
    """The runs of tokens, (first, last + 1), whose text is exactly a match of the pattern."""
    ends = itertools.accumulate(map(len, pieces), initial=0)
    token_at = {byte: token for token, byte in enumerate(ends)}
    found = (match.span() for match in re.finditer(pattern, b"".join(pieces)))
    return [(token_at[a], token_at[b]) for a, b in found if a in token_at and b in token_at]


def dig_holes(texts: Tensor, piece_of: Callable[[int], bytes],
              pattern: bytes) -> tuple[Tensor, Tensor]:
    """(rows (n,T), holes (n,T) bool): each text (B,T) up to three times, each time with a hole."""
    dug = []
    for b, text in enumerate(texts.tolist()):
        found = spans([piece_of(token) for token in text], pattern)
        if found:
            dug += [(b, *span) for span in {found[len(found) * i // 4] for i in (1, 2, 3)}]
    b, first, end = torch.tensor(dug, dtype=torch.long).view(-1, 3, 1).unbind(1)  # (n,1) each
    t = torch.arange(texts.size(1))
    return texts[b.squeeze(1)], (first <= t) & (t < end)


@torch.no_grad()
def prices_of_holes(model: Model, twin: Model, x_0: Tensor, mask_id: int,
                    hole: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) each: nats of each hole (n,T) of the texts (n,T), from both sides and from the left."""
    ours = costs(model, x_0.masked_fill(hole, mask_id), x_0, mask_id, order="spread").sum(1)
    with autocast():
        from_the_left = row_losses(twin, shift_right(x_0, mask_id), x_0, hole) * hole.sum(1)
    return ours, from_the_left


def paint(axes, calls: list[int], table: dict[str, list[Tensor]], bits: float,
          nelbo: float) -> None:
    for order, by_row in table.items():
        axes.plot(calls, [bits * row.mean() for row in by_row], "o-", label=order)
    axes.axhline(bits * nelbo, color="black", linestyle=":", label="NELBO")
    axes.set_xscale("log", base=2)
    axes.set_xticks(calls, calls)
    axes.set(xlabel="model calls for a text", ylabel="price, bits per byte")
    axes.legend()


# --- The three tables -----------------------------------------------------------------------------


def price_orders(model: Model, x_0: Tensor, mask_id: int, bits: float, orders: list[str],
                 calls: list[int]) -> dict[str, list[Tensor]]:
    """Print what each order costs in each number of calls; nats per token of each text."""
    base = prices(model, x_0, mask_id, order="spread")  # a token per call
    print(f"a token per call in order spread: {bits * base.mean():.3f}\n\n{'calls':16}"
          + "".join(f"{n:>20}" for n in calls))
    table = {}
    for order in orders:
        table[order] = []
        print(f"{order:16}", end="", flush=True)
        for n in calls:
            by_row = prices(model, x_0, mask_id, order=order, steps=min(n, x_0.size(1)))
            more, error = mean_and_error(bits * (by_row - base))
            print(f"  {bits * by_row.mean():.3f} {more:+.3f}+-{error:.3f}", end="", flush=True)
            table[order].append(by_row)
        print()
    return table


def price_schedules(model: Model, x_0: Tensor, others: Tensor, mask_id: int, bits: float,
                    calls: list[int]) -> dict[int, list]:
    """Find the cheapest schedules of order spread on `others` (B,T), price them on x_0 (B,T)."""
    print("\ncalls  the linear schedule  the cheapest   tokens committed in each call")
    step_costs = costs_of_steps(model, others, mask_id)
    found = {}
    for n in calls:
        counts = [UNIT * units for units in cheapest_schedule(step_costs, n)]
        linear = prices(model, x_0, mask_id, order="spread", steps=len(counts) - 1)
        cheapest = prices(model, x_0, mask_id, order="spread", schedule=counts)
        more, error = mean_and_error(bits * (cheapest - linear))
        committed = (-np.diff(counts)).tolist()
        print(f"{n:5} {bits * linear.mean():16.3f} {bits * cheapest.mean():16.3f} "
              f"({more:+.3f}+-{error:.3f})  {' '.join(map(str, committed))}", flush=True)
        found[n] = [bits * linear.mean().item(), more, error, committed]
    return found


def price_holes(model: Model, twin: Model, texts: Tensor, mask_id: int,
                piece_of: Callable[[int], bytes]) -> dict[str, list]:
    """Print what holes in texts (B,T) cost from both sides, and from the left; nats of a hole."""
    print("\nhole, nats  tokens  from both sides  the twin, from the left")
    found = {}
    for name, pattern in HOLES.items():
        rows, hole = dig_holes(texts, piece_of, pattern)
        if not len(rows):  # texts too short for a sentence
            continue
        ours, from_the_left = prices_of_holes(model, twin, rows, mask_id, hole)
        more, error = mean_and_error(ours - from_the_left)
        print(f"{name:10} {hole.sum() / len(hole):7.1f} {ours.mean():16.2f} "
              f"{from_the_left.mean():24.2f} ({more:+.2f}+-{error:.2f}; {len(hole)} of them)")
        found[name] = [ours.mean().item(), from_the_left.mean().item(), more, error]
    return found


@command("experiments.prices")
def main(arguments: list[str]) -> None:
    parser = flags("prices", __doc__)
    add = parser.add_argument
    add("--judge", help="the autoregressive twin, to compare with")
    add("--texts", type=several, default=64, help="to price (default: 64)")
    add("--calls", type=count, nargs="+", default=[4, 8, 16, 32, 64, 256])
    add("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    add("--schedules", type=count, nargs="*", default=[2, 3, 4, 6, 8, 16],
        help="calls of the schedules to be found (none: leave that out)")
    args = parser.parse_args(arguments)
    if args.judge:
        twins = load_twins(args.checkpoint, args.judge, args.data_dir)  # they fit each other
        model = twins.model
        val = twins.val
    else:
        model, info = load_checkpoint(args.checkpoint)
        val = TokenFile(args.data_dir, "val")
        if val.tokenizer != info["tokenizer"]:
            raise ConfigError(f"{args.data_dir} is in tokens of {val.tokenizer}, "
                              f"{args.checkpoint} of {info['tokenizer']}")
    T = model.config.context_length
    mask_id = model.config.mask_id
    texts = torch.from_numpy(val.spread(2 * args.texts, T))
    if len(texts) < 4 or T % UNIT:
        raise ConfigError(f"{len(texts)} texts of {T} tokens will not do: at least 4 are needed, "
                          f"of a multiple of {UNIT} tokens")
    x_0 = texts[::2]
    bits = val.num_tokens / val.num_bytes / np.log(2)  # per byte, of a nat per token

    result: dict = {}
    with autocast():
        bound = evaluate(model, x_0, mask_id)
        result["nelbo"] = [bits * bound.nats, bits * bound.stderr]
        print("{} texts of {} tokens, bits per byte; NELBO <= {:.3f} +- {:.3f}".format(
            len(x_0), T, *result["nelbo"]))
        if args.judge:
            result["twin"] = bits * evaluate(twins.judge, x_0, mask_id, "autoregressive").nats
            print(f"the twin, exact: {result['twin']:.3f}")
    table = price_orders(model, x_0, mask_id, bits, args.orders, args.calls)
    result["prices"] = {f"{order}, {calls}": bits * by_row.mean().item() for order in table
                        for calls, by_row in zip(args.calls, table[order], strict=True)}
    if args.schedules:
        result["schedules"] = price_schedules(model, x_0, texts[1::2], mask_id, bits,
                                              [min(n, T // UNIT) for n in args.schedules])
    if args.judge:
        piece_of = get_tokenizer(val.tokenizer, args.data_dir).decode_single_token_bytes
        result["holes"] = price_holes(model, twins.judge, texts, mask_id, piece_of)
    draw(args.picture, lambda axes: paint(axes, args.calls, table, bits, bound.nats), width=7)
    report(result)


if __name__ == "__main__":
    sys.exit(main())
