"""How fast is writing? python -m bench.sampling --shape shakespeare

New tokens per second (given ones don't count), the time for a text and its model calls, for

    denoise              this repository, as sample.py does by default: order spread, top-k 200
    denoise, confidence  the same where the network decides what is committed next
    network alone        as many calls of the network, and nothing else: the floor
    straightforward      the loop most code has: logits and softmax of all positions in each step,
                         then keep some
    gpt, cached          the causal twin with a key-value cache, compiled, a call for each token
    gpt, uncached        the same eager and without a cache

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
from torch import Generator, Tensor, nn

from bench.training import SHAPES
from diffusion import shift_right
from model import Transformer, norm, rotate
from plumbing.command import command
from plumbing.config import Parser
from plumbing.machine import (
    can_compile,
    choose_device,
    choose_dtype,
    device_name,
    keep_freed_memory,
)
from sample import draw_tokens, generate, largest, left_to_right_model


class CachedTwin(nn.Module):
    """The causal network, with the keys and values of all earlier tokens kept.

    It is given the first tokens in one call, then one at a time. Shapes never change after that, so
    it compiles, on a GPU to one CUDA graph. The price: attention looks at the whole context, where
    what isn't written yet is masked.
    """

    def __init__(self, model: Transformer, B: int):
        super().__init__()
        config = model.config
        self.model = model
        shape = (B, config.n_head, config.context_length, config.n_embd // config.n_head)
        empty = model.embedding.weight.new_zeros(shape)  # (B,H,T,D)
        for layer in range(config.n_layer):
            self.register_buffer(f"before{layer}", empty.new_zeros(B, 1, config.n_embd))
            self.register_buffer(f"keys{layer}", empty.clone())
            self.register_buffer(f"values{layer}", empty.clone())

    def restart(self) -> None:
        """Nothing stands before the first token. Old keys and values are overwritten in time."""
        for layer in range(self.model.config.n_layer):
            getattr(self, f"before{layer}").zero_()

    def forward(self, tokens: Tensor, at: Tensor) -> Tensor:
        """Logits (B,V) of what follows `tokens` (B,n), which stand at the positions `at` (n,).

        The very first token is the mask token, with which every text begins.
        """
        model = self.model
        B, n = tokens.shape
        H = model.config.n_head
        T = model.config.context_length
        visible = torch.arange(T, device=at.device) <= at[:, None]  # (n,T)
        x = norm(model.embedding(tokens))  # (B,n,C)
        for layer, block in enumerate(model.blocks):
            y = norm(x)
            before = getattr(self, f"before{layer}")  # the last token's y, a neighbour of the next
            x = x + block.neighbours[0] * torch.cat([before, y[:, :-1]], dim=1)
            before.copy_(y[:, -1:])
            q, k, v = block.attention.qkv(norm(x)).view(B, n, 3 * H, -1).chunk(3, dim=2)
            rotary = model.rotary[:, at]
            q = rotate(norm(q), rotary).transpose(1, 2)  # (B,H,n,D)
            k = rotate(norm(k), rotary).transpose(1, 2)
            keys = getattr(self, f"keys{layer}")
            values = getattr(self, f"values{layer}")
            keys.index_copy_(2, at, k.to(keys.dtype))
            values.index_copy_(2, at, v.transpose(1, 2).to(keys.dtype))
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible)
            x = x + block.attention.proj(y.transpose(1, 2).reshape(B, n, -1))
            x = x + block.down(F.relu(block.up(norm(x))).square())
        return F.linear(norm(x[:, -1]), model.embedding.weight)[:, : model.config.vocab_size]


@torch.no_grad()
def write_cached(twin: CachedTwin, x: Tensor, temperature: float = 1.0,
                 generator: Generator | None = None) -> Tensor:
    """Fill x (B,T) left to right; the first tokens are given, equally many in each row."""
    x = x.clone()
    mask_id = twin.model.config.mask_id
    given = int((x != mask_id).sum(1).min())
    tokens = shift_right(x, mask_id)
    positions = torch.arange(x.size(1), device=x.device)
    twin.restart()
    # Not twin(...), which may be compiled: for one token at a time, not for so many.
    logits = twin.forward(tokens[:, : given + 1], positions[: given + 1])
    for t in range(given, x.size(1)):
        if t > given:
            logits = twin(x[:, t - 1 : t].contiguous(), positions[t : t + 1])
        x[:, t] = draw_tokens(logits, temperature, generator=generator)
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


def call_only(network: Callable, x: Tensor, mask_id: int, steps: int) -> Tensor:
    """As many calls as `denoise` makes, each at as many positions, on average."""
    holes = (x == mask_id).flatten().nonzero().squeeze(1)
    for positions in holes.chunk(steps):
        logits = network(x, positions)
    return logits[0]


def ways(network: Callable, graph: Callable, model: Transformer, cached: CachedTwin, x: Tensor,
         step_counts: list[int]) -> dict[tuple[str, int], Callable[[Generator], Tensor]]:
    """{(name, model calls): writes x, given a generator}."""
    mask_id = model.config.mask_id
    new = int((x[0] == mask_id).sum())
    causal = left_to_right_model(cached.model, mask_id)

    def ours(model: Callable, **options) -> Callable[[Generator], Tensor]:
        return lambda generator: generate(model, x, mask_id, generator, **options)

    def straightforward(model: Callable, steps: int) -> Callable[[Generator], Tensor]:
        return lambda generator: write_straightforward(model, x, mask_id, steps, generator)

    def alone(steps: int) -> Callable[[Generator], Tensor]:
        return lambda generator: call_only(graph, x, mask_id, steps)

    found: dict[tuple[str, int], Callable] = {}
    for steps in sorted({min(steps, new) for steps in step_counts}):
        found["denoise", steps] = ours(graph, steps=steps, order="spread", top_k=200)
        found["denoise, confidence", steps] = ours(network, steps=steps, order="confidence")
        found["network alone", steps] = alone(steps)
        found["straightforward", steps] = straightforward(network, steps)
        if network is not model:
            found["straightforward, eager", steps] = straightforward(model, steps)
    found["gpt, cached", new] = lambda generator: write_cached(cached, x, generator=generator)
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
    # All weights in the dtype of the products: nothing learns here, so nothing needs more.
    model = Transformer(config).to(device, args.dtype).eval()
    twin = Transformer(dataclasses.replace(config, causal=True)).to(device, args.dtype).eval()
    mask_id = config.mask_id
    T = config.context_length
    new = min(args.new_tokens or T, T)
    compiling = args.compile and can_compile()
    network = torch.compile(model, dynamic=True) if compiling else model
    # "reduce-overhead": on a GPU a call is one CUDA graph, launched in one go. Each shape is
    # recorded by itself, so it suits a fixed order, which predicts equally many positions per step.
    graph = network
    if compiling and device.type == "cuda":
        graph = torch.compile(model, mode="reduce-overhead", dynamic=True)
    print(f"{args.shape}: {new} new tokens after {T - new} given ones, {args.dtype}, "
          f"{'compiled' if network is not model else 'eager'}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}", flush=True)

    rows = []
    print("way                          batch  calls  seconds   tokens/s  spread")
    for batch in args.batch_sizes:
        x = torch.full((batch, T), mask_id, device=device)
        x[:, : T - new] = 0
        cached = CachedTwin(twin, batch)
        if compiling:
            cached.compile(mode="reduce-overhead", dynamic=False)
        writers = {way: write for way, write in ways(network, graph, model, cached, x,
                                                        args.steps).items()
                   if way[0] not in args.without}
        seconds: dict[tuple[str, int], list[float]] = {way: [] for way in writers}
        for repeat in range(args.repeats + 1):  # the first is the warm-up
            for way, write in writers.items():
                started = time.perf_counter()
                with torch.no_grad():
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
                      "device": device_name(device), "torch": torch.__version__, "rows": rows}))


def compare(batch: int, seconds: dict[tuple[str, int], float], most: int, new: int) -> None:
    """Print how `denoise` at the most steps compares with the others, where they were measured."""
    if ("denoise", most) not in seconds:
        return
    ours = seconds["denoise", most]
    if ("gpt, cached", new) in seconds:
        calls = seconds["gpt, cached", new] / (ours / most)
        print(f"  batch {batch}: as long as the cached twin takes, denoise makes {calls:.0f} calls")
    for name in ("network alone", "straightforward", "straightforward, eager"):
        if (name, most) in seconds:
            ratio = seconds[name, most] / ours
            print(f"  batch {batch}: at {most} calls denoise is {ratio:.2f}x as fast as {name}")


if __name__ == "__main__":
    sys.exit(main())
