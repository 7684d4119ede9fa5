"""What does a sampler cost, exactly? python -m experiments.prices

The price of a text is -log of the probability with which a sampler writes it, at temperature 1:
the lower, the better the sampler knows real text. Three tables price validation text:

    orders     bits per byte by order and number of calls, and in brackets how much more than order
               spread with a token per call: on the same texts, so the difference is known better
    schedules  of order spread: equal steps, and the cheapest, found on other texts
    holes      nats of a word or a sentence in the middle of a text, of which the model sees both
               sides, and its twin GPT (--judge) the left one

Where the visible tokens decide which positions come next, the price is exact (sample.exact_nll).
That of a random order is a bound, estimated with one order per text.
"""

import functools
import itertools
import re
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Generator, Tensor

from diffusion import Model, bit_reversal, cheapest_schedule, evaluate, mean_and_error
from experiments.lab.command import count, flags_with_judge, report
from experiments.lab.judge import Twins, load_twins
from experiments.lab.pictures import draw
from experiments.lab.runs import autocast, rows_of
from plumbing.command import command
from prepare_data import TokenFile
from sample import denoise, left_to_right_model

ORDERS = ("spread", "random", "margin", "top", "entropy", "left_to_right")
SCHEDULES = (3, 4, 8, 16)  # calls
UNIT = 4  # tokens: schedules are sought among the multiples of it
HOLES = {"a word": " [A-Za-z]+", "a sentence": "(?<=[.?!]) [A-Z][^.?!]*[.?!]"}


def costs(model: Model, x: Tensor, truth: Tensor, mask_id: int, **options) -> Tensor:
    """(B,T): nats of each token of `truth` (B,T) if `denoise` writes it into x; of given ones 0."""
    found = []
    for rows, goal in zip(x.split(32), truth.split(32), strict=True):
        generator = Generator().manual_seed(len(found))  # for random orders
        with autocast():
            *_, last = denoise(model, rows, mask_id, generator, truth=goal, **options)
        found.append(-last.probability.double().log())
    return torch.cat(found)


def prices(model: Model, x_0: Tensor, mask_id: int, **options) -> Tensor:
    """(B,): nats per token of each text (B,T)."""
    return costs(model, torch.full_like(x_0, mask_id), x_0, mask_id, **options).mean(1)


def price_orders(price: Callable[..., Tensor], N: int, calls: list[int]) -> dict[str, list[float]]:
    """Print a row for each order. price(options of `denoise`): bits per byte of each text, (B,)."""
    price = functools.cache(price)
    base = price(order="spread", steps=N)  # a token per call; it is a cell of the table, too
    print(f"\n{'calls':14}" + "".join(f"{n:>24}" for n in calls))
    table = {}
    for order in ORDERS:
        by_text = [price(order=order, steps=n) for n in calls]
        table[order] = [bits.mean().item() for bits in by_text]
        cells = zip(table[order], (mean_and_error(bits - base) for bits in by_text), strict=True)
        print(f"{order:14}" + "".join(f"  {bits:.3f} ({more:+.3f}+-{error:.3f})"
                                      for bits, (more, error) in cells), flush=True)
    return table


def costs_of_steps(model: Model, x_0: Tensor, mask_id: int) -> np.ndarray:
    """(N+1,N+1): nats per text of a step of order spread from m hidden units to k < m."""
    T = x_0.size(1)
    N = T // UNIT
    order = bit_reversal(T).argsort()  # (T,): the position that is written first, second, ...
    found = np.zeros((N + 1, N + 1))
    for m in range(1, N + 1):
        x = x_0.clone()
        x[:, order[T - m * UNIT :]] = mask_id
        nats = costs(model, x, x_0, mask_id, steps=1, order="spread").mean(0)  # (T,), all at once
        units = nats[order].view(N, UNIT).sum(1)[N - m :]  # (m,): the hidden ones, as written
        found[m, :m] = units.cumsum(0).flip(0)  # all of them down to k = 0, the first to k = m-1
    return found


def price_schedules(price: Callable[..., Tensor], step_costs: np.ndarray) -> dict[int, list]:
    """Print what equal steps and the cheapest ones cost. step_costs: of `costs_of_steps`."""
    print("\ncalls  equal steps  the cheapest              tokens committed in each call")
    found = {}
    for n in SCHEDULES:
        counts = [UNIT * units for units in cheapest_schedule(step_costs, n)]
        equal = price(order="spread", steps=n)
        cheapest = price(order="spread", schedule=counts)
        more, error = mean_and_error(cheapest - equal)
        committed = (-np.diff(counts)).tolist()
        print(f"{n:5} {equal.mean():12.3f}  {cheapest.mean():.3f} ({more:+.3f}+-{error:.3f})  ",
              *committed)
        found[n] = [equal.mean().item(), more, error, committed]
    return found


def dig_holes(texts: Tensor, decode: Callable[[list[int]], str],
              pattern: str) -> tuple[Tensor, Tensor]:
    """(rows (n,T), holes (n,T) bool): each text (B,T) up to three times, every time with another
    hole: tokens that spell exactly a match of the pattern."""
    dug = []
    for row, text in enumerate(texts.tolist()):
        pieces = [decode([token]) for token in text]
        ends = itertools.accumulate(map(len, pieces), initial=0)
        token_at = {character: token for token, character in enumerate(ends)}
        spans = [match.span() for match in re.finditer(pattern, "".join(pieces))]
        found = [(token_at[a], token_at[b]) for a, b in spans if a in token_at and b in token_at]
        dug += [(row, *hole) for hole in {found[len(found) * i // 4] for i in (1, 2, 3) if found}]
    row, first, end = torch.tensor(dug, dtype=torch.long).view(-1, 3, 1).unbind(1)  # (n,1) each
    t = torch.arange(texts.size(1))
    return texts[row.squeeze(1)], (first <= t) & (t < end)


def price_holes(twins: Twins, texts: Tensor) -> dict[str, list]:
    """Print what holes in texts (B,T) cost, in nats of a hole."""
    print("\nhole           n  tokens  from both sides  the twin, from the left  difference")
    gpt = left_to_right_model(twins.judge, twins.mask_id)
    found = {}
    for name, pattern in HOLES.items():
        rows, hole = dig_holes(texts, twins.tokenizer.decode, pattern)
        if not len(rows):  # texts too short for a sentence
            continue
        x = rows.masked_fill(hole, twins.mask_id)
        ours = costs(twins.model, x, rows, twins.mask_id, order="spread").sum(1)  # (n,)
        theirs = costs(gpt, x, rows, twins.mask_id, order="left_to_right").sum(1)
        more, error = mean_and_error(ours - theirs)
        print(f"{name:10} {len(hole):5} {hole.sum() / len(hole):7.1f} {ours.mean():16.2f} "
              f"{theirs.mean():24.2f}  {more:+.2f}+-{error:.2f}", flush=True)
        found[name] = [ours.mean().item(), theirs.mean().item(), more, error]
    return found


def paint(axes, calls: list[int], table: dict[str, list[float]], nelbo: float) -> None:
    for order, line in table.items():
        axes.plot(calls, line, "o-", label=order)
    axes.axhline(nelbo, color="black", linestyle=":", label="NELBO")
    axes.set_xscale("log", base=2)
    axes.set_xticks(calls, calls)
    axes.set(xlabel="model calls for a text", ylabel="price, bits per byte")
    axes.legend()


@command("experiments.prices")
def main(arguments: list[str]) -> None:
    parser = flags_with_judge("prices", __doc__, num_samples=64)
    parser.add_argument("--calls", type=count, nargs="+", default=[4, 8, 16, 32, 256])
    args = parser.parse_args(arguments)
    twins = load_twins(args.checkpoint, args.judge, args.data_dir)
    texts = rows_of(args.data_dir, 2 * args.num_samples, twins.N)
    x_0 = texts[::2]
    val = TokenFile(args.data_dir, "val")
    scale = val.num_tokens / val.num_bytes / np.log(2)  # to bits per byte

    def price(**options) -> Tensor:
        return scale * prices(twins.model, x_0, twins.mask_id, **options)

    with autocast():
        nelbo, error, _ = evaluate(twins.model, x_0, twins.mask_id)
        twin = evaluate(twins.judge, x_0, twins.mask_id, "autoregressive").nats
    print(f"{len(x_0)} texts of {twins.N} tokens, bits per byte: NELBO <= {scale * nelbo:.3f} +- "
          f"{scale * error:.3f}; the twin, exact, {scale * twin:.3f}")
    table = price_orders(price, twins.N, args.calls)
    step_costs = costs_of_steps(twins.model, texts[1::2], twins.mask_id)
    numbers = {"nelbo": scale * nelbo, "twin": scale * twin, "calls": args.calls, "orders": table,
               "schedules": price_schedules(price, step_costs), "holes": price_holes(twins, texts)}
    draw(args.picture, lambda axes: paint(axes, args.calls, table, scale * nelbo), width=7)
    report(numbers)


if __name__ == "__main__":
    sys.exit(main())
