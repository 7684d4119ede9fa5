"""What does seeing both sides cost, and what does it buy? python -m experiments.gpt_twin

Diffusion against GPT: the same network, data, tokens and optimizer, but one attention mask and one
objective. The twin is out/bytes-ar; if there is none it is trained first, in three minutes.

1. What a text costs, in nats per byte. The twin's price is exact: -log p(x_t | x_<t), summed. The
   diffusion model predicts any positions from any others, so it has an exact price for each order
   of writing,

       -log p_order(x) = -sum_i log p(x_order(i) | positions earlier in the order; the rest hidden),

   one model call a byte. The NELBO is its average over all orders: left to right is one of them.
2. Speed, in bytes per second.
3. Infilling. Holes in the middle of validation text: the fraction that is filled with exactly the
   true text, greedily, and what the true text costs, written left to right; bound: in random order.
   The twin sees only the left; the diffusion model both sides or, for comparison, only the left.
"""

import argparse
import copy
import itertools
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bench.sampling import CachedTwin, write_cached
from diffusion import Curve, Model, evaluate, keyed_generator, mean_and_error, shift_right
from experiments.lab.command import answer, count, flags, several
from experiments.lab.pictures import draw
from experiments.lab.runs import autocast, trained
from model import Transformer
from plumbing.checkpoint import load_checkpoint
from plumbing.command import command
from plumbing.config import ConfigError
from plumbing.machine import choose_dtype
from prepare_data import TokenFile, get_tokenizer
from sample import denoise, generate, largest, left_to_right_model

TWIN = Path("out/bytes-ar")  # trained if it is not there
HOLES = (4, 8, 16)  # bytes; and whole words
# (B,T) -> score (B,T): the position of the largest score is written first.
ORDERS: dict[str, Callable[[int, int], Tensor]] = {
    "left to right": lambda B, T: -torch.arange(T).expand(B, T),
    "right to left": lambda B, T: torch.arange(T).expand(B, T),
    "a random order": lambda B, T: torch.rand(B, T, generator=keyed_generator(0, 0, "order")),
}


@torch.no_grad()
def chain_rule(model: Model, x_0: Tensor, hole: Tensor, score: Tensor, mask_id: int) -> Tensor:
    """(B,T) float64, nats: what each position of the hole costs, written one after another.

    x_0 (B,T) clean tokens; hole (B,T) bool, all else is visible from the start; score (B,T): the
    largest is written first. A row's sum is the exact -log p(its hole | the rest), in this order.
    """
    x = x_0.masked_fill(hole, mask_id)
    left = hole.clone()
    one = torch.ones(len(x_0), dtype=torch.int64)
    nats = torch.zeros(x_0.shape, dtype=torch.float64)
    while left.any():
        positions = largest(score.float(), left, one).flatten().nonzero().squeeze(1)  # one in a row
        tokens = x_0.flatten()[positions]
        log_p = model(x, positions).float().log_softmax(1)
        nats.view(-1)[positions] = -log_p.gather(1, tokens[:, None]).squeeze(1).double()
        x.view(-1)[positions] = tokens
        left.view(-1)[positions] = False
    return nats


@torch.no_grad()
def twin_nats(twin: Model, x_0: Tensor, mask_id: int) -> Tensor:
    """(B,T) float64, nats: what each token costs the twin, given those on its left; in one call."""
    logits = twin(shift_right(x_0, mask_id)).float()
    return F.cross_entropy(logits.transpose(1, 2), x_0, reduction="none").double()


def middle(x_0: Tensor, length: int) -> Tensor:
    """(B,T) bool: a hole of `length` positions, from the middle on."""
    t = torch.arange(x_0.size(1)) - x_0.size(1) // 2
    return ((t >= 0) & (t < length)).expand(x_0.shape)


def words(x_0: Tensor, letters: set[int]) -> Tensor:
    """(B,T) bool: each row's first word of two letters or more from the middle on, if any."""
    hole = torch.zeros_like(x_0, dtype=torch.bool)
    for row, tokens in enumerate(x_0.tolist()):
        spelling = "".join("a" if token in letters else "." for token in tokens)
        if word := re.compile(r"\.(aa+)\.").search(spelling, max(0, len(tokens) // 2 - 1)):
            hole[row, word.start(1) : word.end(1)] = True
    return hole


def per_byte(nats: Tensor, hole: Tensor) -> tuple[float, float]:
    """(mean, standard error) over rows of nats per position of the hole, both (B,T)."""
    return mean_and_error((nats.sum(1) / hole.sum(1))[hole.any(1)])


def filled(model: Model, x: Tensor, mask_id: int, count: int, order: str) -> Tensor:
    """x (B,T) after `count` greedy steps of one token each."""
    states = denoise(model, x, mask_id, steps=x.size(1), order=order, temperature=0)
    *_, last = itertools.islice(states, count + 1)
    return last.tokens


def infill(model: Model, twin: Model, x_0: Tensor, hole: Tensor,
           mask_id: int) -> dict[str, dict[str, float]]:
    """{who: {"right": fraction filled exactly, "nats", "stderr", "bound"}} on rows with a hole."""
    some = hole.any(1)
    x_0 = x_0[some]
    hole = hole[some]
    B, T = x_0.shape
    count = int(hole.sum(1).max())
    onward = hole.cumsum(1) > 0  # the hole and all on its right
    rightward = ORDERS["left to right"](B, T)
    random = ORDERS["a random order"](B, T)
    causal = left_to_right_model(twin, mask_id)
    both = chain_rule(model, x_0, hole, rightward, mask_id)
    bound, _ = per_byte(chain_rule(model, x_0, hole, random, mask_id), hole)
    left_only = x_0.masked_fill(onward & ~hole, mask_id)
    left = chain_rule(model, left_only, hole, rightward, mask_id)
    rows = {}
    for who, network, hidden, order, nats in (
            ("diffusion, both sides", model, hole, "confidence", both),
            ("diffusion, the left only", model, onward, "left_to_right", left),
            ("the twin, the left only", causal, onward, "left_to_right",
             twin_nats(twin, x_0, mask_id))):
        written = filled(network, x_0.masked_fill(hidden, mask_id), mask_id, count, order)
        right = ((written == x_0) | ~hole).all(1).double().mean().item()
        mean, error = per_byte(nats * hole, hole)
        rows[who] = {"right": right, "nats": mean, "stderr": error, "rows": B}
    rows["diffusion, both sides"]["bound"] = bound
    return rows


def load_pair(args: argparse.Namespace) -> tuple[Transformer, Transformer, str]:
    """(the diffusion model, its twin, their tokenizer). ConfigError if they are no twins."""
    model, info = load_checkpoint(args.checkpoint)
    if args.twin == TWIN and not (TWIN / "model.safetensors").exists():
        trained(TWIN.name, "--objective", "autoregressive", out=TWIN.parent)
    twin, twin_info = load_checkpoint(args.twin)
    for name in ("objective", "data_dir", "context_length", "n_layer", "n_head", "n_embd", "steps",
                 "batch_size", "seed"):
        theirs = twin_info["config"].get(name)
        wanted = "autoregressive" if name == "objective" else info["config"].get(name)
        if theirs != wanted:
            raise ConfigError(f"{args.twin} is no twin of {args.checkpoint}: its {name} is "
                              f"{theirs}")
    return model, twin, info["tokenizer"]


def prices(model: Model, twin: Model, x_0: Tensor, few: Tensor,
           mask_id: int) -> tuple[dict, Curve, dict]:
    """What a text costs.

    (table {who: {"nats", "stderr", "rows"}}, CE(m), {who: (N,) nats by bytes visible}).
    x_0 (R,N) for what is cheap, few (r,N) for what takes a model call a byte.
    """
    exact = evaluate(twin, x_0, mask_id, "autoregressive", batch_size=8)
    bound = evaluate(model, x_0, mask_id, curve_points=30, batch_size=8)
    table = {"the twin, exact": {"nats": exact.nats, "stderr": exact.stderr, "rows": len(x_0)},
             "diffusion, NELBO <=": {"nats": bound.nats, "stderr": bound.stderr, "rows": len(x_0)}}
    everything = torch.ones_like(few, dtype=torch.bool)
    by_position = {"the twin, exact": twin_nats(twin, few, mask_id)}
    for done, (order, score) in enumerate(ORDERS.items()):
        print(f"pricing {len(few)} texts, {order}: {done + 1} of {len(ORDERS)}", file=sys.stderr)
        nats = chain_rule(model, few, everything, score(*few.shape), mask_id)
        by_position[f"diffusion, {order}"] = nats
    for who, nats in by_position.items():
        mean, error = per_byte(nats, everything)
        table[f"{who}, these rows"] = {"nats": mean, "stderr": error, "rows": len(few)}
    profile = {who: nats.mean(0) for who, nats in by_position.items() if "random" not in who}
    profile["diffusion, right to left"] = profile["diffusion, right to left"].flip(0)
    return table, bound.curve, profile


def speeds(model: Model, twin: Transformer, x: Tensor, mask_id: int,
           step_counts: list[int]) -> dict[str, float]:
    """{way: bytes per second} of writing x (B,T), which is all hidden: the better of two times."""
    causal = left_to_right_model(twin, mask_id)
    N = x.size(1)

    def writer(network: Model, steps: int, order: str) -> Callable[[Generator], Tensor]:
        return lambda generator: generate(network, x, mask_id, generator, steps=steps, order=order)

    ways = {f"diffusion, {steps} calls": writer(model, steps, "random")
            for steps in sorted(step_counts)}
    ways[f"the twin, {N} calls, no cache"] = writer(causal, N, "left_to_right")
    cached = CachedTwin(copy.deepcopy(twin).to(choose_dtype("auto", x.device)), len(x))
    ways[f"the twin, {N} calls, cached"] = (
        lambda generator: write_cached(cached, x, generator=generator))
    fastest = {}
    for way, write in ways.items():
        seconds = []
        for repeat in range(2):
            started = time.perf_counter()
            write(Generator().manual_seed(repeat))
            seconds.append(time.perf_counter() - started)
        fastest[way] = x.numel() / min(seconds)
    return fastest


def paint(axes, curve: Curve, profile: dict, holes: dict) -> None:
    """Loss by what is visible; what holes cost; how many are right."""
    price, cost, right = axes
    bins = max(1, curve.N // 16)
    colors = ("black", "tab:blue", "tab:cyan")
    for (who, nats), color in zip(profile.items(), colors, strict=True):
        blocks = nats[: len(nats) // bins * bins].view(-1, bins).mean(1)
        price.plot((torch.arange(len(blocks)) + 0.5) * bins, blocks, color=color, label=who)
    visible = [curve.N - m for m in curve.counts]
    price.plot(visible, curve.nats, color="tab:orange", label="diffusion, random order: CE(m)")
    price.set(title="What the next byte costs", xlabel="bytes visible", ylabel="nats per byte",
              ylim=0)
    price.legend()
    colors = {"diffusion, both sides": "tab:orange", "diffusion, the left only": "tab:blue",
              "the twin, the left only": "black"}
    for i, (who, color) in enumerate(colors.items()):
        at = [k + 0.27 * (i - 1) for k in range(len(holes))]
        rows = [table[who] for table in holes.values()]
        cost.bar(at, [row["nats"] for row in rows], 0.25, yerr=[row["stderr"] for row in rows],
                 color=color, ecolor="grey", label=who)
        right.bar(at, [100 * row["right"] for row in rows], 0.25, color=color, label=who)
    for axis in (cost, right):
        axis.set_xticks(range(len(holes)), list(holes))
        axis.set(xlabel="hole, in the middle of the text")
    cost.set(title="What the true content of a hole costs", ylabel="nats per byte")
    right.set(title="Holes filled with exactly the true text", ylabel="% of holes")
    cost.set_ylim(0, 1.35 * cost.get_ylim()[1])
    cost.legend(loc="upper left", ncols=1)


def sentence(table: dict, speed: dict, holes: dict) -> str:
    """The answer, by the numbers."""
    exact, bound, rightward, random = (table[who]["nats"] for who in (
        "the twin, exact", "diffusion, NELBO <=", "diffusion, left to right, these rows",
        "diffusion, a random order, these rows"))
    *_, cached = speed.values()
    fewest = next(iter(speed))
    text = (f"As a model of text the twin is {'ahead' if exact < bound else 'behind'}: "
            f"{exact:.3f} nats/byte exactly against <= {bound:.3f}. Left to right diffusion pays "
            f"{abs(rightward - random):.3f} {'less' if rightward < random else 'more'} than in "
            f"random order. Its speed is for you to choose: {fewest} write "
            f"{speed[fewest] / cached:.1f} times the bytes/s of the cached twin. Of {len(holes)} "
            "kinds of holes,")
    both, left, twin = ([hole[who] for hole in holes.values()] for who in (
        "diffusion, both sides", "diffusion, the left only", "the twin, the left only"))
    for name, rows in (("its own one-sided self", left), ("the twin", twin)):
        pairs = list(zip(both, rows, strict=True))
        cheaper = sum(a["nats"] < b["nats"] for a, b in pairs)
        better = sum(a["right"] > b["right"] for a, b in pairs)
        text += (f" seeing both sides beats {name} in nats at {cheaper} and in exact fillings at "
                 f"{better};")
    return text[:-1] + "."


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = flags("gpt_twin", __doc__)
    add = parser.add_argument
    add("--twin", type=Path, default=TWIN, help="(default: %(default)s)")
    add("--rows", type=several, default=512, help="texts for the NELBO (default: 512)")
    add("--chain-rows", type=several, default=16,
        help="texts priced by a model call a byte (default: 16)")
    add("--hole-rows", type=several, default=48, help="texts with holes (default: 48)")
    add("--steps", type=count, nargs="+", default=[16, 64, 256],
        help="model calls to time (default: 16 64 256)")
    return parser.parse_args(arguments)


@command("experiments.gpt_twin")
def main(arguments: list[str]) -> None:
    args = parse(arguments)
    model, twin, tokenizer_name = load_pair(args)
    mask_id = model.config.mask_id
    N = model.config.context_length
    val = TokenFile(args.data_dir, "val")
    tokenizer = get_tokenizer(tokenizer_name, args.checkpoint)
    if val.tokenizer != tokenizer_name:
        raise ConfigError(f"{args.data_dir} is in tokens of {val.tokenizer}, the model of "
                          f"{tokenizer_name}")
    letters = {token for token in range(mask_id) if tokenizer.decode([token]).isalpha()}
    text, few, holed = (torch.from_numpy(val.spread(rows, N))
                        for rows in (args.rows, args.chain_rows, args.hole_rows))
    with autocast():
        table, curve, profile = prices(model, twin, text, few, mask_id)
        print(f"\n{'what a text costs':46} nats/byte      +-  rows")
        for who, row in table.items():
            print(f"{who:46} {row['nats']:9.3f} {row['stderr']:7.3f} {row['rows']:5}", flush=True)

        speed = speeds(model, twin, torch.full((8, N), mask_id), mask_id, args.steps)
        print(f"\n{'speed, 8 texts at once':46} bytes/s")
        for way, bytes_per_second in speed.items():
            print(f"{way:46} {bytes_per_second:7,.0f}")

        print(f"\n{'hole':9} {'who, and what it sees':26} {'right':>6} nats/byte     +-  "
              "bound <=  rows")
        masks = {f"{length} bytes": middle(holed, length) for length in HOLES if length < N // 2}
        masks["a word"] = words(holed, letters)
        holes = {}
        for kind, hole in masks.items():
            holes[kind] = infill(model, twin, holed, hole, mask_id)
            for who, row in holes[kind].items():
                bound = f"{row['bound']:.3f}" if "bound" in row else ""
                print(f"{kind:9} {who:26} {row['right']:6.1%} {row['nats']:9.3f} "
                      f"{row['stderr']:6.3f} {bound:>9} {row['rows']:5}", flush=True)
    draw(args.picture, lambda axes: paint(axes, curve, profile, holes), columns=3)
    answer(sentence(table, speed, holes), {
        "prices": table, "curve": curve,
        "profile": {who: nats.tolist() for who, nats in profile.items()},
        "speed": speed, "holes": holes})


if __name__ == "__main__":
    sys.exit(main())
