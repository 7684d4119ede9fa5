"""What does a sampler cost, exactly? python -m experiments.prices

The price of a text is -log of the probability with which a sampler writes it, at temperature 1:
the lower, the better the sampler knows real text. Validation text is priced by order and number of
calls, in bits per byte, and how much more than order spread costs at one token per call. All rows
price the same texts, so differences are known better than the numbers.

Where the visible tokens decide which positions come next, the price is exact (sample.exact_nll).
That of a random order is a bound, estimated with one order per text. Then: the cheapest schedules
of the order spread, found on other texts than they are priced on; and what a hole in the middle of
a text costs the model, which sees both sides, and the twin (--judge), which sees the left one.
"""

import sys

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
from experiments.lab.command import answer, count, flags, several
from experiments.lab.judge import load_twins
from experiments.lab.pictures import draw
from experiments.lab.runs import autocast
from plumbing.checkpoint import load_checkpoint
from plumbing.command import command
from plumbing.config import ConfigError
from prepare_data import TokenFile
from sample import denoise

ORDERS = ("spread", "random", "left_to_right", "top", "margin", "entropy")
UNIT = 4  # tokens: schedules are sought among the multiples of it


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


@torch.no_grad()
def prices_of_holes(model: Model, twin: Model, x_0: Tensor, mask_id: int,
                    length: int) -> tuple[Tensor, Tensor]:
    """(B,) each: nats per token of a hole of `length` tokens in the middle of each text (B,T)."""
    hole = torch.zeros(x_0.shape, dtype=torch.bool)
    hole[:, (x_0.size(1) - length) // 2 :][:, :length] = True
    x = x_0.masked_fill(hole, mask_id)
    ours = costs(model, x, x_0, mask_id, order="spread").sum(1) / length
    with autocast():
        from_the_left = row_losses(twin, shift_right(x_0, mask_id), x_0, hole)
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


@command("experiments.prices")
def main(arguments: list[str]) -> None:
    parser = flags("prices", __doc__)
    parser.set_defaults(checkpoint="out/quickstart", data_dir="data/sotu")
    add = parser.add_argument
    add("--judge", help="the autoregressive twin, to compare with")
    add("--texts", type=several, default=64, help="to price (default: 64)")
    add("--calls", type=count, nargs="+", default=[4, 8, 16, 32, 64, 256])
    add("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    add("--schedules", type=count, nargs="*", default=[2, 3, 4, 6, 8, 16],
        help="calls of the schedules to be found (none: leave that out)")
    add("--holes", type=count, nargs="+", default=[1, 5, 20, 60], help="their lengths in tokens")
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
    others = texts[1::2]  # to find schedules on
    bits = val.num_tokens / val.num_bytes / np.log(2)  # per byte, of a nat per token

    with autocast():
        bound = evaluate(model, x_0, mask_id)
    print(f"{len(x_0)} texts of {T} tokens, bits per byte; NELBO <= {bits * bound.nats:.3f} "
          f"+- {bits * bound.stderr:.3f}")
    result = {"nelbo": bits * bound.nats, "prices": {}, "schedules": {}, "holes": {}}
    if args.judge:
        with autocast():
            result["twin"] = bits * evaluate(twins.judge, x_0, mask_id, "autoregressive").nats
        print(f"the twin, exact: {result['twin']:.3f}")

    base = prices(model, x_0, mask_id, order="spread")  # a token per call
    print(f"a token per call in order spread: {bits * base.mean():.3f}\n\n{'calls':16}"
          + "".join(f"{calls:>20}" for calls in args.calls))
    table: dict[str, list[Tensor]] = {}
    for order in args.orders:
        table[order] = []
        print(f"{order:16}", end="", flush=True)
        for calls in args.calls:
            by_row = prices(model, x_0, mask_id, order=order, steps=min(calls, T))
            more, error = mean_and_error(bits * (by_row - base))
            table[order].append(by_row)
            print(f"  {bits * by_row.mean():.3f} {more:+.3f}+-{error:.3f}", end="", flush=True)
            result["prices"][f"{order}, {calls}"] = [bits * by_row.mean().item(), more, error]
        print()

    if args.schedules:
        print("\ncalls  the linear schedule  the cheapest   tokens committed in each call")
        step_costs = costs_of_steps(model, others, mask_id)
    for calls in (min(calls, T // UNIT) for calls in args.schedules):
        counts = [UNIT * units for units in cheapest_schedule(step_costs, calls)]
        linear = prices(model, x_0, mask_id, order="spread", steps=calls)
        cheapest = prices(model, x_0, mask_id, order="spread", schedule=counts)
        more, error = mean_and_error(bits * (cheapest - linear))
        committed = (-np.diff(counts)).tolist()
        print(f"{calls:5} {bits * linear.mean():16.3f} {bits * cheapest.mean():16.3f} "
              f"({more:+.3f}+-{error:.3f})  {' '.join(map(str, committed))}", flush=True)
        result["schedules"][calls] = [bits * linear.mean().item(), more, error, committed]

    if args.judge:
        print("\na hole in the middle, nats per token  from both sides  the twin, from the left")
    for length in args.holes if args.judge else []:
        ours, from_the_left = prices_of_holes(model, twins.judge, x_0, mask_id, length)
        more, error = mean_and_error(ours - from_the_left)
        print(f"{length:16} tokens {ours.mean():28.3f} {from_the_left.mean():24.3f} "
              f"({more:+.3f}+-{error:.3f})", flush=True)
        result["holes"][length] = [ours.mean().item(), from_the_left.mean().item(), more, error]

    draw(args.picture, lambda axes: paint(axes, args.calls, table, bits, bound.nats), width=7)
    cheap = min(result["prices"], key=lambda name: result["prices"][name][0])
    answer(f"the lowest price has {cheap} calls: {result['prices'][cheap][0]:.3f} bits per byte.",
           result)


if __name__ == "__main__":
    sys.exit(main())
