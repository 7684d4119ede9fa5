"""Write with a trained model: python sample.py --checkpoint out/quickstart --prefix "The state of"

    free text       python sample.py --num-samples 4
    continuation    python sample.py --prefix "Fellow citizens" --length 200
    infilling       python sample.py --text "The[MASK:5] of the Union"
    measuring       python sample.py --score FILE

All writing is one call of `denoise`, which fills what is hidden; the rest is given. The plain idea:

    while (x == mask_id).any():
        positions = some of the hidden ones
        x[positions] = draw(model(x, positions))

Text goes to stdout, numbers about it to stderr. --show-steps shows it being written.
"""

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
from torch import Generator, Tensor

from diffusion import SCHEDULES, Bound, Model
from diffusion import bit_reversal, hidden_counts, hidden_fractions, mean_and_error, shift_right
from model import Transformer
from plumbing.adjust import Adjust
from plumbing.checkpoint import CheckpointError, load_checkpoint
from plumbing.command import command
from plumbing.config import check_knobs, knob, load
from plumbing.given import options_for, score, starting_tokens
from plumbing.machine import choose_device, choose_dtype, keep_freed_memory, send
from plumbing.terminal import DenoisingView, harmless
from plumbing.text import token_texts
from prepare_data import get_tokenizer

# --- 1. Orders: which hidden positions are committed next -----------------------------------------


def random_order(hidden: Tensor, generator: Generator | None) -> Tensor:
    return torch.rand(hidden.shape, generator=generator)


# Orders known before the network is called: (still hidden (B,T), generator) -> score (B,T), the
# highest go first, on the CPU. The head then runs once per token in all, at the positions about to
# be committed. To add one, write such a function and name it here.
FIXED_ORDERS: dict[str, Callable[[Tensor, Generator | None], Tensor]] = {
    "random": random_order,
    # 0, 128, 64, 192, 32, ...: what is drawn together stands far apart, and hardly depends
    "spread": lambda hidden, _: -bit_reversal(hidden.size(1)).float().expand(hidden.shape),
    "left_to_right": lambda hidden, _: -torch.arange(hidden.size(1)).float().expand(hidden.shape),
    "right_to_left": lambda hidden, _: torch.arange(hidden.size(1)).float().expand(hidden.shape),
    "ancestral": random_order,  # with a random number of tokens per step: see `share_out`
}


def confidence(log_p: Tensor, tokens: Tensor) -> Tensor:
    """The log-probability of the token that was drawn."""
    return log_p.gather(1, tokens[:, None]).squeeze(1)


def margin(log_p: Tensor, tokens: Tensor) -> Tensor:
    """log(p1 - p2) of the two most likely tokens."""
    first, second = log_p.exp().topk(2, dim=1).values.unbind(1)
    return (first - second).log()


# Orders by the network's predictions: (log p (P,V), drawn tokens (P,)) -> score (P,). `order` may
# also be such a function.
SCORED_ORDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "confidence": confidence,
    "top": lambda log_p, _: log_p.amax(1),  # of the most likely token, whatever was drawn
    "margin": margin,
    "entropy": lambda log_p, _: -torch.special.entr(log_p.exp()).sum(1),  # low entropy first
}
ORDERS = {**FIXED_ORDERS, **SCORED_ORDERS}

# The probability with which a committed token is hidden again, a number or (B,T), from
#   limit    ReMDM's sigma_max = min(1, (1 - visible) / visible before); more is cut (2503.00307)
#   visible  the fraction that is to be visible after this step
#   p (B,T)  of each token when it was committed, on the CPU; infinity at all other positions
REMASKS: dict[str, Callable[[float, float, Tensor], float | Tensor]] = {
    "none": lambda limit, visible, p: 0.0,
    "renoise": lambda limit, visible, p: 1 - visible,  # a new random mask over all that is written
    "cap": lambda limit, visible, p: 0.02,
    "rescale": lambda limit, visible, p: 0.05 * limit,
    "conf": lambda limit, visible, p: limit * (-p).softmax(1).nan_to_num(),  # the least confident
}

# --- 2. The options -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampler:
    """How to denoise: the options of `denoise`. Those made by `knob` are flags as well."""

    steps: int | None = knob(None, "model calls, fewer is faster; none: one per token", low=1)
    # how many tokens stay hidden after each step: a name, or the counts [N, ..., 0]
    schedule: str | Sequence[int] = knob("linear", "how many stay hidden", (*SCHEDULES, "optimal"))
    order: str | Callable = knob("random", "which are committed next", tuple(ORDERS))
    gumbel: float = knob(0.0, "noise on a scored order, falling to 0 (1: much)", low=0)
    remask: str | Callable = knob("none", "which are hidden again", tuple(REMASKS))
    threshold: float | None = knob(None, "also commit what is more probable", low=1e-30, high=1)
    block_length: int | None = knob(None, "write blocks of so many tokens, left to right", low=1)
    temperature: float = knob(1.0, "below 1 safer, above 1 wilder, 0 greedy", low=0)
    top_k: int | None = knob(None, "draw from the K most likely tokens (0: all)", low=0)
    top_p: float | None = knob(None, "draw from the nucleus of this mass (1: all)", low=0, high=1)
    adjust: Adjust | None = None  # changes logits: guidance, constraints, penalties
    truth: Tensor | None = None  # (B,T): commit these tokens, draw none (for exact_nll)

    def __post_init__(self):
        check_knobs(self)
        if self.gumbel and self.order in FIXED_ORDERS:
            raise ValueError(f"gumbel changes nothing for order {self.order}, which has no scores")


@dataclass(frozen=True)
class Command(Sampler):
    """All flags of sample.py: how to denoise, then what to write and how to show it."""

    # What reads best, see docs/sampling.md. The sampler that the bound is about is --exact.
    steps: int | None = knob(None, "model calls; none: 16, or with blocks one per token", low=1)
    order: str = knob("spread", "which are committed next", tuple(ORDERS))
    top_k: int | None = knob(200, "draw from the K most likely tokens (0: all)", low=0)
    exact: bool = knob(False, "as the bound: random order, a call per token, temperature 1")
    checkpoint: str = knob("out/quickstart", "folder that train.py wrote")
    prefix: str | None = knob(None, "text to continue")
    text: str | None = knob(None, 'text with holes to fill: "The[MASK:5] of the Union"')
    length: int | None = knob(None, "tokens to write; none: as many as the context holds", low=1)
    num_samples: int = knob(1, "texts to write", low=1)  # B: all are written at once
    sampling: str | None = knob(None, "short for --temperature 0, --top-k 200 or --top-p 0.9",
                                ("greedy", "topk", "nucleus"))
    repetition_penalty: float | None = knob(None, "divides the odds of repeats", low=1e-6)
    ban: str | None = knob(None, "never write the tokens of this text")
    seed: int = knob(1, "the same seed writes the same text", low=0)
    show_steps: bool = knob(False, "watch the text being written")
    jsonl: str | None = knob(None, "write every step to this file, for other programs")
    whole: bool = knob(False, "do not cut the text at the end-of-text token")
    score: str | None = knob(None, "instead of writing, say what this text costs")
    device: str = knob("auto", "where to compute", ("auto", "cuda", "mps", "cpu"))

    def __post_init__(self):
        super().__post_init__()
        f"{self.prefix}{self.text}{self.ban}".encode()  # a ValueError if that isn't Unicode
        if self.text is not None and (self.prefix is not None or self.length is not None):
            raise ValueError("--text says what is given and hidden: drop --prefix and --length")
        how = {field.name for field in fields(Sampler)} | {"sampling", "repetition_penalty", "ban"}
        for field in fields(self):
            if self.exact and field.name in how and getattr(self, field.name) != field.default:
                raise ValueError(f"--exact leaves no choice: drop --{field.name.replace('_', '-')}")
        if self.schedule == "optimal" and self.block_length:
            raise ValueError("--schedule optimal is for whole texts: drop --block-length")
        if self.jsonl and (Path(self.jsonl).is_dir() or not Path(self.jsonl).parent.is_dir()):
            raise ValueError(f"--jsonl {self.jsonl}: name a file in a folder that exists")

    def sampler_options(self) -> dict:
        return {field.name: getattr(self, field.name) for field in fields(Sampler)}


# --- 3. Denoising ---------------------------------------------------------------------------------


class State(NamedTuple):
    """What `denoise` has written so far. It goes on from there: to change it, change a copy."""

    tokens: Tensor  # (B,T) int64, mask_id where hidden
    probability: Tensor  # (B,T) float32, of each token when committed; given 1, hidden 0
    calls: int  # of the model


@torch.no_grad()
def denoise(model: Model, x: Tensor, mask_id: int, generator: Generator | None = None,
            **options) -> Iterator[State]:
    """Fill every position of x (B,T) that is `mask_id`; yield the state at first and at each step.

    Everything else is given and never changed, wherever it stands: free text, a continuation and
    infilling are one call, and rows may have different numbers of holes. A step is one model call
    at most; one in which nothing changes is skipped.

    generator: of the CPU; the same one writes the same text.
    options: the fields of Sampler. Bad ones are a ValueError at the first `next`.
    """
    sampler = Sampler(**options)
    # Tokens stay on the model's device, the CPU keeps account of what is hidden. In a fixed order
    # (without remask and threshold) it never waits for a GPU, but for the check at the end.
    holes = (x == mask_id).cpu()  # (B,T), what there is to fill
    state = State(x.clone(), (x != mask_id).float(), calls=0)
    plans = plan_blocks(holes, sampler)
    yield state
    for plan in plans:  # usually one, for all holes
        hidden = plan.block  # (B,T)
        for step in range(len(plan.counts) - 1):
            quota, remasked = share_out(plan, step, hidden, state, sampler, generator)
            if quota.any():
                progress = step / (len(plan.counts) - 1)
                state, chosen = commit(model, state, hidden, quota, progress, sampler, generator)
                hidden = hidden & ~chosen
            if remasked.any():
                hidden = hidden | remasked
                back = send(remasked, x.device)
                state = State(state.tokens.masked_fill(back, mask_id),
                              state.probability.masked_fill(back, 0), state.calls)
            if quota.any() or remasked.any():
                yield state
    if not state.probability.isfinite().all():
        raise ValueError("the network, or adjust, rules out every token at some position")


def commit(model: Model, state: State, hidden: Tensor, quota: Tensor, progress: float,
           sampler: Sampler, generator: Generator | None) -> tuple[State, Tensor]:
    """Commit quota[b] of the hidden positions (B,T) of each row; (the new state, which (B,T))."""
    score_of = sampler.order if callable(sampler.order) else SCORED_ORDERS.get(sampler.order)
    candidates = hidden
    if score_of is None:  # a fixed order
        chosen = largest(FIXED_ORDERS[sampler.order](hidden, generator), hidden, quota)  # (B,T)
        if sampler.threshold is None:
            candidates = chosen  # what isn't committed now needn't be predicted now
    indices = candidates.flatten().nonzero().squeeze(1)  # (P,), flat, on the CPU
    positions = send(indices, state.tokens.device)
    logits = model(state.tokens, positions)
    if sampler.adjust is not None:
        logits = sampler.adjust(logits, state.tokens, positions)
    log_p = logits.float().log_softmax(1)  # (P,V)
    tokens = (draw_tokens(log_p, sampler.temperature, sampler.top_k, sampler.top_p, generator)
              if sampler.truth is None else sampler.truth.flatten()[positions])  # (P,)
    p = confidence(log_p, tokens).exp()  # untempered: what the network itself thinks
    if score_of is not None:
        score = score_of(log_p, tokens).float().cpu()  # here the CPU waits for a GPU
        if sampler.gumbel:
            # Gumbel noise, falling towards 0 (MaskGIT, arXiv:2202.04200): by confidence, positions
            # are at first chosen in proportion to p^(1/gumbel), at last by p alone.
            noise = -torch.empty(len(score)).exponential_(generator=generator).log()
            score = score + sampler.gumbel * (1 - progress) * noise
        chosen = largest(torch.zeros(hidden.shape).masked_scatter(hidden, score), hidden, quota)
    if sampler.threshold is not None:  # here, and in scored orders, the candidates are all hidden
        chosen = chosen.masked_scatter(hidden, chosen[hidden] | (p > sampler.threshold).cpu())
    committed = send(chosen.flatten()[indices], p.device)  # (P,) bool
    x = state.tokens.clone()
    probability = state.probability.clone()
    x.view(-1)[positions] = tokens.where(committed, x.view(-1)[positions])
    probability.view(-1)[positions] = p.where(committed, 0)
    return State(x, probability, state.calls + 1), chosen


class Plan(NamedTuple):
    """How one block of the text is filled in S steps."""

    block: Tensor  # (B,T) bool, its holes
    counts: Tensor  # (S+1,B) tokens still hidden before each step, at last 0
    visible: list[float]  # the S+1 fractions that are to be visible: 0 ... 1


def plan_blocks(holes: Tensor, sampler: Sampler) -> list[Plan]:
    """Blocks of `block_length` holes, left to right, by default one block. holes: (B,T) bool."""
    tokens_left = int(holes.sum(1).max())
    length = sampler.block_length or max(1, tokens_left)
    num_blocks = math.ceil(tokens_left / length)
    steps_left = sampler.steps or max(1, tokens_left)  # by default a step per token
    if isinstance(sampler.schedule, str) and steps_left < num_blocks:
        raise ValueError(f"steps must be at least {num_blocks}, one per block, not {steps_left}")
    # Unless tokens are remasked or committed by chance, every step commits at least one.
    strict = sampler.remask == "none" and sampler.order != "ancestral"
    block_of = (holes.cumsum(1) - 1) // length  # (B,T)
    plans = []
    for i in range(num_blocks):
        # Steps in proportion to tokens, but at least one, and one for each block that follows.
        steps = round(steps_left * min(1, length / tokens_left))
        steps = max(1, min(steps, steps_left - (num_blocks - 1 - i)))
        steps_left -= steps
        tokens_left -= length
        block = holes & (block_of == i)
        counts = hidden_counts(sampler.schedule, block.sum(1), steps, strict)
        u = torch.linspace(0, 1, len(counts), dtype=torch.float64)
        visible = (1 - hidden_fractions(sampler.schedule, u)).tolist()
        plans.append(Plan(block, counts, visible))
    return plans


def share_out(plan: Plan, step: int, hidden: Tensor, state: State, sampler: Sampler,
              generator: Generator | None) -> tuple[Tensor, Tensor]:
    """(quota, remasked): how many tokens each row commits in this step, and which go back."""
    stay = plan.counts[step + 1]  # (B,) how many shall be hidden after this step
    before, after = plan.visible[step : step + 2]
    ancestral = sampler.order == "ancestral" and after < 1
    sigma: float | Tensor = 0.0
    remasked = torch.zeros_like(hidden)
    if sampler.remask != "none":
        committed = plan.block & ~hidden
        limit = min(1.0, (1 - after) / max(before, 1e-9))  # ReMDM's sigma_max
        p = state.probability.cpu().masked_fill(~committed, math.inf)
        sigma = REMASKS.get(sampler.remask, sampler.remask)(limit, after, p)
        sigma = torch.as_tensor(sigma, device="cpu").clamp(max=limit)
        remasked = committed & (random_order(hidden, generator) < sigma)
        if not ancestral:
            remasked = largest(random_order(hidden, generator), remasked, stay)  # no more may stay
    if ancestral:
        # D3PM, MDLM: each hidden token is committed with this probability, whatever the others do.
        chance = (after - before + sigma * before) / (1 - before)
        quota = (hidden & (random_order(hidden, generator) < chance)).sum(1)
    else:
        quota = hidden.sum(1) + remasked.sum(1) - stay
    if sampler.threshold is not None:  # the schedule is the slowest pace: at least one
        quota = quota.clamp(min=1).minimum(hidden.sum(1))
    return quota, remasked


def draw_tokens(logits: Tensor, temperature: float = 1.0, top_k: int | None = None,
                top_p: float | None = None, generator: Generator | None = None) -> Tensor:
    """Draw one token per row of `logits` (P,V): (P,). Temperature 0 takes the most likely one."""
    if temperature < 1e-6:  # greedy; dividing by so little could overflow
        return logits.argmax(1)
    p = (logits.float() / temperature).softmax(1)  # (P,V)
    if top_k and top_k < p.size(1):
        value, index = p.topk(top_k, dim=1)  # (P,top_k) each
        p = torch.zeros_like(p).scatter_(1, index, value)
    if top_p is not None and top_p < 1:
        value, index = p.sort(dim=1, descending=True)
        value /= value.sum(1, keepdim=True)
        value[:, 1:][(value.cumsum(1) - value)[:, 1:] >= top_p] = 0  # those before reach top_p
        p = torch.zeros_like(p).scatter_(1, index, value)
    if p.device.type == "mps":  # has no float64
        p = p.cpu()
    # Invert the CDF in float64: float32 noise never reaches the tail of a large vocabulary, which
    # acts like a lower temperature (arXiv:2409.02908).
    cdf = p.cumsum(1, dtype=torch.float64)
    u = torch.rand(len(p), 1, dtype=torch.float64, generator=generator)  # (P,1)
    tokens = torch.searchsorted(cdf, send(u, p.device) * cdf[:, -1:], right=True).squeeze(1)
    return tokens.clamp(max=p.size(1) - 1).to(logits.device)  # NaN finds no place in the CDF


def largest(score: Tensor, among: Tensor, quota: Tensor) -> Tensor:
    """(B,T) bool: in row b the quota[b] positions of highest score among those marked."""
    score = score.clamp(min=torch.finfo(score.dtype).min)  # even -inf ranks above what isn't marked
    ranking = score.masked_fill(~among, -math.inf).argsort(dim=1, descending=True, stable=True)
    first = torch.arange(score.size(1), device=score.device) < quota[:, None]
    return torch.zeros_like(among).scatter_(1, ranking, first) & among


def generate(model: Model, x: Tensor, mask_id: int, generator: Generator | None = None,
             **options) -> Tensor:
    """The tokens of the last state of `denoise`, (B,T), nothing hidden; same arguments."""
    *_, last = denoise(model, x, mask_id, generator, **options)
    return last.tokens


def exact_nll(model: Model, x_0: Tensor, mask_id: int, prefix_length: int = 0,
              batch_size: int = 32, **options) -> Bound:
    """-log p(x_0) / N in nats per token, where p is the probability with which `denoise` writes x_0
    (B,T) after the prefix at temperature 1. It is exact; the NELBO is only a bound.

    If the visible tokens decide where to write next, a text can be written along one path only. Its
    probability is the product of what the network says of its tokens on that path, each step at
    once (DUEL, arXiv:2603.01367). ValueError if chance decides, or the token that was drawn.
    options: order (default "spread"; your own must not look at the drawn tokens), steps, schedule,
        block_length and adjust of Sampler.
    """
    options = {"order": "spread"} | options
    priced = ("order", "steps", "schedule", "block_length", "adjust")
    plain = Sampler(**{name: options[name] for name in priced if name in options})
    if Sampler(**options) != plain or plain.order in ("random", "ancestral", "confidence"):
        raise ValueError("no exact price: chance, or the drawn tokens, decide where to write next")
    by_row = []
    for rows in x_0.split(batch_size):
        x = rows.clone()
        x[:, prefix_length:] = mask_id
        *_, last = denoise(model, x, mask_id, **options | {"truth": rows})
        by_row.append(-last.probability[:, prefix_length:].double().log().mean(1))
    return Bound(*mean_and_error(torch.cat(by_row)), None)


def left_to_right_model(model: Model, mask_id: int) -> Model:
    """GPT in the form that `denoise` expects: position t is predicted from those before it. With
    order="left_to_right" and a step per token, `denoise` is GPT's sampling."""
    return lambda tokens, *positions: model(shift_right(tokens, mask_id), *positions)


# --- 4. The command -------------------------------------------------------------------------------


def write(cmd: Command, model: Transformer, info: dict, tokenizer: tiktoken.Encoding) -> None:
    """Sample, print the texts (or every state of them), and say what they cost."""
    mask_id = model.config.mask_id
    x = starting_tokens(cmd, model, tokenizer)  # (B,T), the same holes in each row
    model.to(choose_dtype("auto", x.device))  # the dtype of its products does for all else, too
    network = left_to_right_model(model, mask_id) if model.config.causal else model
    generator = Generator().manual_seed(cmd.seed)
    started = time.perf_counter()
    states = denoise(network, x, mask_id, generator, **options_for(cmd, info, tokenizer, x))
    first = next(states)  # bad options are refused here, before a file is opened
    with DenoisingView(tokenizer, mask_id, cmd.whole, cmd.show_steps, cmd.jsonl) as view:
        for state in itertools.chain([first], states):
            view.show(state)
    seconds = time.perf_counter() - started
    if not cmd.show_steps:
        texts = [token_texts(ids, tokenizer, mask_id, cmd.whole) for ids in state.tokens.tolist()]
        print(harmless("\n---\n".join("".join(text) for text in texts)))
    new = int((x == mask_id).sum())  # given tokens don't count
    print(f"{new} new tokens in {state.calls} model calls, {new / seconds:,.0f} tokens/s",
          file=sys.stderr)


@command("sample.py", ValueError)  # of options that don't suit the model
def main(arguments: list[str]) -> None:
    cmd = load(Command, None, arguments, "sample.py", __doc__)
    keep_freed_memory()  # makes a CPU faster
    model, info = load_checkpoint(cmd.checkpoint, choose_device(cmd.device))
    tokenizer = get_tokenizer(info["tokenizer"], cmd.checkpoint)
    if tokenizer.n_vocab != model.config.vocab_size:
        raise CheckpointError(f"{cmd.checkpoint} does not have the vocabulary of its tokenizer")
    if cmd.score is None:
        write(cmd, model, info, tokenizer)
    else:
        score(cmd, model, info, tokenizer, exact_nll)


if __name__ == "__main__":
    sys.exit(main())
