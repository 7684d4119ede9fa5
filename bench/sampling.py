"""How fast is writing? python -m bench.sampling --shape shakespeare

New tokens per second (given ones don't count), the time for a text and its model calls, for

    denoise           this repository, by order and number of steps
    straightforward   the loop most code has: logits and softmax of all positions in each step, then
                      keep some
    gpt, cached       the causal twin with a key-value cache, eager, a call for each token
    gpt, uncached     the same without a cache

all with untrained networks of one shape (speed does not depend on what they know). Each runs in
turn; the numbers are medians over the repeats, after a warm-up. Ends with the number of steps at
which `denoise` takes as long as the cached twin, and one JSON line.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bench.training import SHAPES
from diffusion import shift_right
from model import Transformer, norm, rotate
from plumbing.command import command
from plumbing.config import Parser
from plumbing.machine import (
    autocast,
    can_compile,
    choose_device,
    choose_dtype,
    keep_freed_memory,
)
from sample import draw_tokens, generate, largest, left_to_right_model


class CachedTwin:
    """The causal network, with the keys and values of all earlier tokens kept.

    It is given the first tokens in one call, then one at a time.
    """

    def __init__(self, model: Transformer):
        self.model = model
        self.length = 0
        self.cache: list[tuple[Tensor, Tensor]] = []  # keys and values (B,H,T,D) of each layer

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B,V) of what follows `tokens` (B,n), n = 1 after the first call.

        The very first token is the mask token, with which every text begins.
        """
        model = self.model
        B, n = tokens.shape
        H = model.config.n_head
        start = self.length
        self.length += n
        x = norm(model.embedding(tokens))  # (B,n,C)
        for layer, block in enumerate(model.blocks):
            qkv = block.attention.qkv(norm(x)).view(B, n, 3, H, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B,H,n,D) each
            rotary = model.rotary[:, start : self.length]
            q = rotate(norm(q), rotary)
            k = rotate(norm(k), rotary)
            if start == 0:
                empty = k.new_zeros(B, H, model.config.context_length, k.size(3))
                self.cache.append((empty, empty.clone()))
            keys, values = (kept[:, :, : self.length] for kept in self.cache[layer])
            keys[:, :, start:] = k
            values[:, :, start:] = v
            y = F.scaled_dot_product_attention(q, keys, values, is_causal=n > 1)
            x = x + block.attention.proj(y.transpose(1, 2).reshape(B, n, -1))
            x = x + block.down(F.relu(block.up(norm(x))).square())
        return F.linear(norm(x[:, -1]), model.embedding.weight)[:, : model.config.vocab_size]


@torch.no_grad()
def write_cached(model: Transformer, x: Tensor, temperature: float = 1.0,
                 generator: Generator | None = None) -> Tensor:
    """Fill x (B,T) left to right; the first tokens are given, equally many in each row."""
    twin = CachedTwin(model)
    x = x.clone()
    mask_id = model.config.mask_id
    given = int((x != mask_id).sum(1).min())
    tokens = shift_right(x, mask_id)[:, : given + 1]
    for t in range(given, x.size(1)):
        x[:, t] = draw_tokens(twin(tokens), temperature, generator=generator)
        tokens = x[:, t : t + 1]
    return x


@torch.no_grad()
def write_straightforward(model: Callable, x: Tensor, mask_id: int, steps: int,
                          generator: Generator) -> Tensor:
    """Random order as it is usually written: compute everything, throw most of it away."""
    x = x.clone()
    generator = Generator(x.device).manual_seed(generator.initial_seed())
    for left in range(steps, 0, -1):
        hidden = x == mask_id
        p = model(x).float().softmax(-1)  # (B,T,V)
        tokens = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(x.shape)
        score = torch.rand(x.shape, generator=generator, device=x.device)
        commit = largest(score, hidden, (hidden.sum(1) / left).ceil().long())
        x = torch.where(commit, tokens, x)
    return x


def ways(network: Callable, model: Transformer, twin: Transformer, x: Tensor,
         step_counts: list[int]) -> dict[tuple[str, int], Callable[[Generator], Tensor]]:
    """{(name, model calls): writes x, given a generator}."""
    mask_id = model.config.mask_id
    new = int((x[0] == mask_id).sum())
    causal = left_to_right_model(twin, mask_id)

    def ours(model: Callable, **options) -> Callable[[Generator], Tensor]:
        return lambda generator: generate(model, x, mask_id, generator, **options)

    def straightforward(model: Callable, steps: int) -> Callable[[Generator], Tensor]:
        return lambda generator: write_straightforward(model, x, mask_id, steps, generator)

    found: dict[tuple[str, int], Callable] = {}
    for steps in sorted({min(steps, new) for steps in step_counts}):
        for order in ("random", "confidence"):
            found[f"denoise, {order}", steps] = ours(network, steps=steps, order=order)
        found["straightforward", steps] = straightforward(network, steps)
        if network is not model:
            found["straightforward, eager", steps] = straightforward(model, steps)
    found["gpt, cached", new] = lambda generator: write_cached(twin, x, generator=generator)
    found["gpt, uncached", new] = ours(causal, steps=new, order="left_to_right")
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="bench.sampling", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="shakespeare")
    add("--new-tokens", type=int, help="default: the context")
    add("--batch-sizes", type=int, nargs="+", default=[1, 8])
    add("--steps", type=int, nargs="+", default=[16, 64])
    add("--without", nargs="+", default=[], metavar="WAY",
        help="leave out the ways with such a name, as the last one, which takes minutes at the "
        "gpt2 shape")
    add("--repeats", type=int, default=3)
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add("--precision", default="auto", choices=("auto", "bfloat16", "float32"))
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(arguments)
    given = [args.repeats, *args.batch_sizes, *args.steps]
    if args.new_tokens is not None:
        given.append(args.new_tokens)
    if min(given) < 1:
        parser.error(f"every number must be at least 1, not {min(given)}")
    args.device = choose_device(args.device)
    args.dtype = choose_dtype(args.precision, args.device)
    return args


@command("bench.sampling")
def main(arguments: list[str]) -> None:
    args = parse(arguments)
    keep_freed_memory()
    device = args.device
    config = SHAPES[args.shape][0]
    torch.manual_seed(0)
    model = Transformer(config).to(device).eval()
    twin = Transformer(dataclasses.replace(config, causal=True)).to(device).eval()
    mask_id = config.mask_id
    T = config.context_length
    new = min(args.new_tokens or T, T)
    network = torch.compile(model, dynamic=True) if args.compile and can_compile() else model
    print(f"{args.shape}: {new} new tokens after {T - new} given ones, {args.dtype}, "
          f"{'compiled' if network is not model else 'eager'}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}", flush=True)

    rows = []
    print("way                          batch  calls  seconds   tokens/s  spread")
    for batch in args.batch_sizes:
        x = torch.full((batch, T), mask_id, device=device)
        x[:, : T - new] = 0
        writers = {way: write for way, write in ways(network, model, twin, x, args.steps).items()
                   if way[0] not in args.without}
        seconds: dict[tuple[str, int], list[float]] = {way: [] for way in writers}
        for repeat in range(args.repeats + 1):  # the first is the warm-up
            for way, write in writers.items():
                started = time.perf_counter()
                with autocast(device, args.dtype):
                    write(Generator().manual_seed(repeat)).sum().item()  # waits for the device
                seconds[way].append(time.perf_counter() - started)
        for (name, calls), (_, *times) in seconds.items():
            median = statistics.median(times)
            spread = max(times) / min(times) - 1
            rows.append({"way": name, "batch": batch, "calls": calls, "seconds": median,
                         "tokens_per_second": batch * new / median, "spread": spread})
            print(f"{name:28} {batch:5} {calls:6} {median:8.2f} {batch * new / median:10,.0f} "
                  f"{spread:7.1%}", flush=True)
        compare(batch, {way: statistics.median(times[1:]) for way, times in seconds.items()},
                min(max(args.steps), new), new)
    print(json.dumps({"shape": args.shape, "new_tokens": new, "dtype": str(args.dtype),
                      "device": str(device), "torch": torch.__version__, "rows": rows}))


def compare(batch: int, seconds: dict[tuple[str, int], float], most: int, new: int) -> None:
    """Print how `denoise` at the most steps compares with the others, where they were measured."""
    if ("denoise, random", most) not in seconds:
        return
    ours = seconds["denoise, random", most]
    if ("gpt, cached", new) in seconds:
        calls = seconds["gpt, cached", new] / (ours / most)
        print(f"  batch {batch}: as long as the cached twin takes, denoise makes {calls:.0f} calls")
    for name in ("straightforward", "straightforward, eager"):
        if (name, most) in seconds:
            ratio = seconds[name, most] / ours
            print(f"  batch {batch}: at {most} calls denoise is {ratio:.2f}x as fast as {name}")


if __name__ == "__main__":
    sys.exit(main())
