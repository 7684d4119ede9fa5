"""Masked diffusion: hide tokens, ask the network for them, learn, and measure what it knows.

    1  noise        draw_num_masked (how many tokens to hide), draw_mask (which)
    2  learn        ask (what the network sees and predicts), loss
    3  measure      nelbo: an upper bound on the negative log-likelihood, with error bars
    4  schedules    how many tokens stay hidden after each denoising step, and what that costs

The network is passed in: any callable model(tokens (B,T), positions (P,)) -> logits (P,V), even a
table of probabilities. That is how the tests compare all this with exact answers.

Names: x_0 clean tokens (B,T); mask (B,T) bool, True = hidden; N the tokens of a row that may be
hidden; m how many of them are; t = m/N the mask ratio; CE(m) the mean cross-entropy over the hidden
tokens when m are hidden, in nats.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Model = Callable[..., Tensor]


def keyed_generator(seed: int, step: int, purpose: str) -> Generator:
    """Random numbers that depend on (seed, step, purpose) alone, not on what was drawn before."""
    # So a resumed run draws what the uninterrupted one would have drawn, evaluation can't disturb
    # training, and every process can draw the whole global batch and take its own rows.
    key = np.random.SeedSequence([seed, step, zlib.crc32(purpose.encode())])
    return Generator().manual_seed(int(key.generate_state(1, np.uint64)[0]))


# --- 1. Noise -----------------------------------------------------------------------------------

# A new objective needs a branch in draw_num_masked, num_predicted, ask and evaluate.
OBJECTIVES = ("diffusion", "mlm", "autoregressive")
WEIGHTINGS = ("nelbo", "token")
MASK_POSITIONS = ("random", "spread")

# A distribution of the mask ratio t is its CDF, rising from 0 to 1. To try your own, add a line.
# Best is a symmetric one: only its rows come in pairs, and the head has half of the work.
MASK_RATIOS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda t: t,  # every ratio equally often
    "bell": lambda t: 3 * t**2 - 2 * t**3,  # Beta(2,2): few rows nearly clean or nearly empty
    "narrow": lambda t: 10 * t**3 - 15 * t**4 + 6 * t**5,  # Beta(3,3): still fewer
}


@dataclass(frozen=True)
class Masking:
    """What is hidden in training, and how errors count. By default the mean loss is the NELBO;
    train.py has defaults that learn better."""

    objective: str = "diffusion"  # "mlm": a fixed ratio, as BERT; "autoregressive": GPT
    mask_ratio: str | Callable[[Tensor], Tensor] = "uniform"  # or "bell", or a CDF of your own
    mask_positions: str = "random"  # any subset; "spread": evenly spaced ones
    weighting: str = "nelbo"  # of hidden tokens: the bound's; "token": all count alike
    mask_levels: int = 0  # 0: hide any number of tokens; 10: only tenths of the row
    mlm_ratio: float = 0.15  # the fixed ratio of "mlm"
    prefix_length: int = 0  # the first tokens of a row, never hidden
    prefix_length_max: int | None = None  # draw each batch's prefix length, from prefix_length on

    def __post_init__(self):
        for name, value, choices in (("objective", self.objective, OBJECTIVES),
                                     ("mask_ratio", self.mask_ratio, MASK_RATIOS),
                                     ("mask_positions", self.mask_positions, MASK_POSITIONS),
                                     ("weighting", self.weighting, WEIGHTINGS)):
            if value not in choices and not (name == "mask_ratio" and callable(value)):
                raise ValueError(f"{name} must be {' or '.join(choices)}, not {value!r}")
        if not 0 <= self.mlm_ratio <= 1:
            raise ValueError(f"mlm_ratio must be from 0 to 1, not {self.mlm_ratio}")
        if self.mask_levels < 0:
            raise ValueError(f"mask_levels must be at least 0, not {self.mask_levels}")

    @property
    def longest_prefix(self) -> int:
        return self.prefix_length if self.prefix_length_max is None else self.prefix_length_max

    def check_rows_of(self, T: int) -> None:
        """ValueError if rows of T tokens are too short for these options."""
        room = T - max(1, self.mask_levels)  # at least one token must be left to hide
        if not 0 <= self.prefix_length <= self.longest_prefix <= room:
            raise ValueError(f"a prefix of {self.prefix_length} to {self.longest_prefix} tokens "
                             f"does not fit rows of {T} tokens and {self.mask_levels} mask levels")

    def level_probabilities(self, N: int) -> Tensor:
        """q(k), (L,) float64: how often level k of 1..L is drawn. Level k hides kN/L tokens."""
        cdf = MASK_RATIOS.get(self.mask_ratio, self.mask_ratio)  # by name, or a function
        L = self.mask_levels or N
        q = cdf(torch.linspace(0, 1, L + 1, dtype=torch.float64)).diff()
        if (q < 0).any() or abs(q.sum() - 1) > 1e-6:
            raise ValueError("mask_ratio must be a CDF: it must rise from 0 to 1 on [0, 1]")
        return q

    def mlm_count(self, N: int) -> int:
        return max(1, round(self.mlm_ratio * N))


def is_symmetric(q: Tensor) -> bool:
    """Whether level k is as likely as level L+1-k, so that rows can come in pairs."""
    return torch.allclose(q, q.flip(0))


def draw_num_maskable(T: int, masking: Masking, generator: Generator | None = None) -> int:
    """N, the tokens of a row that may be hidden: T less the prefix, whose length may be drawn."""
    masking.check_rows_of(T)
    lengths = masking.longest_prefix - masking.prefix_length + 1
    return T - masking.prefix_length - int(torch.randint(lengths, (), generator=generator))


def draw_num_masked(B: int, N: int, masking: Masking = Masking(),
                    generator: Generator | None = None) -> Tensor:
    """How many tokens to hide in each row of the *global* batch: (B,) int64, from 1 to N."""
    if masking.objective == "autoregressive":
        return torch.full((B,), N)  # GPT predicts every token
    if masking.objective == "mlm":
        return torch.full((B,), masking.mlm_count(N))
    if N < max(1, masking.mask_levels):
        raise ValueError(f"{N} tokens are too few for {masking.mask_levels} mask levels")
    q = masking.level_probabilities(N)  # (L,)
    L = len(q)
    paired = is_symmetric(q)
    # Stratified draws: evenly spaced in [0,1], with one random offset. Each follows q, but together
    # they cover all levels, so the loss is less noisy. Usually B/2 draws, one for each pair.
    strata = (B + 1) // 2 if paired else B
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    u = (offset + torch.arange(strata, dtype=torch.float64) / strata) % 1
    k = torch.searchsorted(q.cumsum(0), u, right=True).clamp(max=L - 1) + 1  # levels, from 1 to L
    m = (k * N / L).round().long()
    if paired:
        # Antithetic pairs: if one row hides m, its partner hides N+1-m, as in 3, 8, 7, 4 of N = 10.
        # So a batch always hides B(N+1)/2 tokens: one static shape, one compilation.
        partner = N + round(N / L) - m
        m = torch.stack([m, partner], dim=1).flatten()[:B]
    return m


def bit_reversal(n: int) -> Tensor:
    """(n,) int64: a rank for each position, 0, 4, 2, 6, 1, 5, 3, 7 for n = 8: the bits of 0 to n-1
    read backwards (van der Corput). Those of similar rank are far apart."""
    t = torch.arange(n)
    rank = torch.zeros_like(t)
    for i in range((n - 1).bit_length()):
        rank = 2 * rank + (t >> i) % 2
    return rank


def draw_mask(num_masked: Tensor, T: int, prefix_length: int = 0,
              generator: Generator | None = None, mask_positions: str = "random") -> Tensor:
    """(B,T) bool: num_masked[b] positions of row b after the prefix.

    "random"  all subsets equally likely: what the bound speaks of
    "spread"  what the order `spread` of sample.py still has to write, from a random start: every
              hidden token has visible ones nearby, as in its sampling. Learns better, no bound
    """
    B = len(num_masked)
    N = T - prefix_length
    if mask_positions == "spread":
        start = torch.randint(N, (B, 1), generator=generator)
        score = -bit_reversal(N)[(torch.arange(N) + start) % N]  # (B,N), the last ranks first
    else:
        score = torch.rand(B, N, generator=generator)
    shuffled = score.argsort(dim=1) + prefix_length
    chosen = torch.arange(N) < num_masked[:, None]  # (B,N): the first m of each shuffled row
    return torch.zeros(B, T, dtype=torch.bool).scatter_(1, shuffled, chosen)


# --- 2. Learn -----------------------------------------------------------------------------------


class Batch(NamedTuple):
    """A training question: from `inputs`, predict `targets` at `positions`."""

    inputs: Tensor  # (B,T) int64, what the network sees
    positions: Tensor  # (P,) int64, flat positions b*T + t
    targets: Tensor  # (P,) int64, the clean tokens there
    weights: Tensor  # (P,) float32, so that loss = sum(weights * cross-entropy)


def weigh(num_masked: Tensor, N: int, masking: Masking = Masking()) -> Tensor:
    """(B,) float32: the weight of each hidden token of a row, for the whole *global* batch.

    "nelbo"  1 / (B L q(k) m), k the row's level: the mean loss is the NELBO (with mask_levels, that
             of a sampler of L steps), whatever q is. The rows must be draw_num_masked's
    "token"  1 / sum of m: all hidden tokens count alike. No bound, but it trains better
    """
    B = len(num_masked)
    if masking.weighting == "token" or masking.objective != "diffusion":
        return torch.full((B,), 1 / num_masked.sum().item())
    q = masking.level_probabilities(N)
    L = len(q)
    if (q <= 0).any():
        raise ValueError("this mask_ratio never draws some levels: only weighting token suits it")
    k = (num_masked * L / N).round().long().clamp(1, L)
    if is_symmetric(q):  # rounding may blur the partner's level; it is as likely as the first one's
        k = k[::2].repeat_interleave(2)[:B]
    return (1 / (B * L * q[k - 1] * num_masked)).float()


def num_predicted(B: int, T: int, masking: Masking = Masking()) -> int:
    """P, the most tokens that B rows (whole pairs) can hide: the static shape of the head."""
    N = T - masking.prefix_length  # under the shortest prefix
    if masking.objective == "autoregressive":
        return B * N
    if masking.objective == "mlm":
        return B * masking.mlm_count(N)
    q = masking.level_probabilities(N)
    if not is_symmetric(q):
        return B * N
    pair = N + round(N / len(q))
    return B // 2 * pair + B % 2 * N


def ask(x_0: Tensor, mask: Tensor, weights: Tensor, mask_id: int,
        masking: Masking = Masking()) -> Batch:
    """The question about some rows of the global batch: x_0 and mask (B,T), weights (B,)."""
    B, T = x_0.shape
    if masking.objective == "autoregressive":
        inputs = shift_right(x_0, mask_id)  # GPT hides nothing, and predicts everything
    else:
        inputs = x_0.masked_fill(mask, mask_id)
    positions = mask.flatten().nonzero().squeeze(1)
    weights = weights.repeat_interleave(mask.sum(1))  # from rows to hidden tokens
    # Usually there are exactly P of them. Where their number varies (a drawn prefix, an asymmetric
    # mask ratio), pad: predict the first token again and again, with weight 0.
    spare = num_predicted(B, T, masking) - len(positions)
    if spare < 0:
        raise ValueError(f"{B} rows hide too many tokens: keep antithetic pairs together")
    positions = F.pad(positions, (0, spare))  # (P,)
    weights = F.pad(weights, (0, spare))  # (P,)
    return Batch(inputs, positions, x_0.flatten()[positions], weights)


def corrupt(x_0: Tensor, mask_id: int, masking: Masking = Masking(),
            generator: Generator | None = None) -> Batch:
    """Hide and ask in one call, for experiments and tests. train.py has these lines inline."""
    B, T = x_0.shape
    N = draw_num_maskable(T, masking, generator)
    num_masked = draw_num_masked(B, N, masking, generator)
    mask = draw_mask(num_masked, T, T - N, generator, masking.mask_positions)
    return ask(x_0, mask, weigh(num_masked, N, masking), mask_id, masking)


def shift_right(tokens: Tensor, mask_id: int) -> Tensor:
    """[mask_id, tokens[:-1]] in each row: position t sees token t-1, the first one a mask token."""
    return F.pad(tokens[:, :-1], (1, 0), value=mask_id)


def loss(model: Model, batch: Batch) -> Tensor:
    """sum(weights * cross-entropy), a scalar in nats per token."""
    logits = model(batch.inputs, batch.positions)  # (P,V): the head works only where it must
    ce = F.cross_entropy(logits.float(), batch.targets, reduction="none")  # (P,)
    return (batch.weights * ce).sum()


# --- 3. Measure ---------------------------------------------------------------------------------


class Curve(NamedTuple):
    """The loss by mask level: CE(m) at some counts m out of N."""

    N: int
    counts: list[int]  # increasing; the first is 1, the last N
    nats: list[float]  # CE(m)
    stderr: list[float]


class Bound(NamedTuple):
    """An estimate in nats per token, its standard error, and the curve whose mean height it is."""

    nats: float
    stderr: float
    curve: Curve | None


def row_losses(model: Model, inputs: Tensor, x_0: Tensor, predicted: Tensor,
               batch_size: int = 32) -> Tensor:
    """(B,) float64: each row's mean cross-entropy where `predicted` is True; arguments (B,T)."""
    T = x_0.size(1)
    sums = torch.zeros(len(x_0), dtype=torch.float64)
    for first in range(0, len(x_0), batch_size):
        rows = slice(first, first + batch_size)
        b, t = predicted[rows].nonzero(as_tuple=True)  # (P,) each
        logits = model(inputs[rows], b * T + t)
        ce = F.cross_entropy(logits.float(), x_0[rows][b, t], reduction="none")
        sums[rows].index_add_(0, b.cpu(), ce.cpu().double())
    return sums / predicted.sum(1).cpu()


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean and its standard error, which is NaN for a single value."""
    error = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(math.nan)
    return values.mean().item(), error.item()


@torch.no_grad()
def nelbo(model: Model, x_0: Tensor, mask_id: int, prefix_length: int = 0, seed: int = 0,
          curve_points: int = 10, batch_size: int = 32) -> Bound:
    """NELBO = (1/N) sum_{m=1..N} CE(m), in nats per token: a bound, -log p(x_0) / N <= NELBO.

    It is the mean NLL over all orders of writing the text token by token: the token written while m
    are hidden costs CE(m). The text's probability is the mean over the orders, and -log of a mean
    is at most the mean of -log (Jensen): hence a bound. Exact conditionals: NELBO = entropy. It is
    also the bound of MDLM (arXiv:2406.07524) and LLaDA (arXiv:2502.09992, eq. 14), which integrate
    over t, without the noise of random counts.

    x_0: (B,T) clean tokens; more rows, smaller standard error.
    """
    B, T = x_0.shape
    N = T - prefix_length
    if min(B, batch_size) < 1 or not 0 <= prefix_length < T:
        raise ValueError(f"nothing to measure: {B} rows of {T} tokens, {prefix_length} are prefix")
    generator = keyed_generator(seed, 0, "nelbo")  # the same questions for every checkpoint

    def measure(num_masked: Tensor) -> Tensor:
        mask = draw_mask(num_masked, T, prefix_length, generator).to(x_0.device)
        return row_losses(model, x_0.masked_fill(mask, mask_id), x_0, mask, batch_size)

    # First the bound: each row hides one count, drawn uniformly from 1..N, so there is no bias.
    by_row = measure(draw_num_masked(B, N, Masking(mask_ratio="uniform"), generator))  # (B,)
    # The rows of a pair depend on each other, so the standard error is that of the pairs' means.
    _, stderr = mean_and_error(by_row[: B // 2 * 2].view(-1, 2).mean(1))

    # Then its curve, at m = 1 and evenly spaced counts up to N, with two rows for each if B >= 4.
    n = max(1, min(curve_points, B // 2 - 1))
    spaced = (max(1, round(N * i / n)) for i in range(1, n + 1))
    counts = sorted({1, *spaced}) if B > 1 else [N]
    of_row = torch.arange(B) % len(counts)
    by_count = measure(torch.tensor(counts)[of_row])  # (B,)
    points = [mean_and_error(by_count[of_row == i]) for i in range(len(counts))]
    nats, errors = zip(*points, strict=True)
    return Bound(by_row.mean().item(), stderr, Curve(N, counts, list(nats), list(errors)))


@torch.no_grad()
def evaluate(model: Model, x_0: Tensor, mask_id: int, objective: str = "diffusion",
             prefix_length: int = 0, curve_points: int = 10, batch_size: int = 32) -> Bound:
    """What checkpoints are compared by, in nats per token: the NELBO, or GPT's exact NLL."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be {' or '.join(OBJECTIVES)}, not {objective!r}")
    if objective != "autoregressive":
        return nelbo(model, x_0, mask_id, prefix_length, 0, curve_points, batch_size)
    predicted = (torch.arange(x_0.size(1), device=x_0.device) >= prefix_length).expand_as(x_0)
    by_row = row_losses(model, shift_right(x_0, mask_id), x_0, predicted, batch_size)
    return Bound(*mean_and_error(by_row), None)


# --- 4. Schedules -------------------------------------------------------------------------------

# f(u): the fraction still hidden after a fraction u of the steps; f(0) = 1, the last ends at 0.
SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda u: 1 - u,
    "cosine": lambda u: (1 + torch.cos(math.pi * u)) / 2,  # slow, fast, slow; MaskGIT's is another
    "exponential": lambda u: torch.exp(-3 * u),  # fast at first; the last step fills the last 5%
}
Schedule = str | Sequence[int]  # a name, or falling hidden counts [N, ..., 0]


def hidden_fractions(schedule: Schedule, u: Tensor) -> Tensor:
    """f(u), any shape: exactly 0 from u = 1 on."""
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be {' or '.join(SCHEDULES)}, not {schedule!r}")
        return SCHEDULES[schedule](u) * (u < 1)
    counts = np.array(schedule, dtype=float)
    if len(counts) < 2 or counts[-1] != 0 or (np.diff(counts) >= 0).any():
        raise ValueError(f"a schedule must fall strictly, from a count to 0, not {list(schedule)}")
    return torch.from_numpy(np.interp(u, np.linspace(0, 1, len(counts)), counts / counts[0]))


def hidden_counts(schedule: Schedule, num_hidden: Tensor, steps: int,
                  strict: bool = True) -> Tensor:
    """How many tokens of each row are still hidden before step i: (S+1,B), from num_hidden to 0.

    `strict`: every step commits at least one token, so a row of N tokens takes min(steps, N) steps.
    A schedule that is a list sets the steps by its length, and is rescaled to each row's N.
    """
    if not isinstance(schedule, str):
        steps = len(schedule) - 1
    elif steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    N = num_hidden.cpu().double()  # (B,)
    S = N.clamp(max=steps) if strict else torch.full_like(N, steps)  # (B,) steps of each row
    i = torch.arange(int(S.max()) + 1, dtype=torch.float64)[:, None]  # (S+1,1)
    m = (N * hidden_fractions(schedule, i / S.clamp(min=1))).round()  # (S+1,B)
    if strict:
        m = (m + i).cummin(0).values - i  # lower where needed: strictly decreasing
        m = m.maximum(S - i).clamp(min=0)  # raise where needed: a token for each step that is left
    return m.long()


def schedule_nelbo(curve: Curve, schedule: Schedule, steps: int) -> float:
    """The price of a sampler that commits *random* positions by this schedule, in nats per token:

        NELBO_S = (1/N) sum_i (m_i - m_{i+1}) CE(m_i),   N = m_0 > m_1 > ... > m_S = 0

    for text written at temperature 1 without truncation. One token per step: the NELBO itself.
    """
    m = hidden_counts(schedule, torch.tensor([curve.N]), steps)[:, 0].numpy()
    return float(-np.diff(m) @ np.interp(m[:-1], curve.counts, curve.nats) / curve.N)


def smooth(curve: Curve) -> Curve:
    """The curve at every count, from a cubic fit: an optimum over a raw curve chases its noise."""
    errors = np.nan_to_num(np.array(curve.stderr, dtype=float), nan=1.0)
    degree = min(3, len(curve.counts) - 1)
    cubic = np.polynomial.Polynomial.fit(curve.counts, curve.nats, degree,
                                         w=1 / np.maximum(errors, 1e-3))
    counts = np.arange(1, curve.N + 1)
    return Curve(curve.N, counts.tolist(), cubic(counts).tolist(), [math.nan] * curve.N)


def optimal_schedule(curve: Curve, steps: int) -> list[int]:
    """The hidden counts [N, ..., 0] of the cheapest min(steps, N) steps, by `schedule_nelbo`."""
    m = np.arange(curve.N + 1)
    ce = np.interp(m, curve.counts, curve.nats)
    return cheapest_schedule((m[:, None] - m) * ce[:, None], steps)


def cheapest_schedule(step_cost: np.ndarray, steps: int) -> list[int]:
    """The same if a step from m hidden tokens to k costs step_cost[m, k], (N+1,N+1)."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    # Dynamic programming: the cheapest way from m hidden tokens to none in s steps is a first step
    # to k, and then the cheapest way from k to none in s - 1 steps.
    N = len(step_cost) - 1
    step_cost = np.where(np.tri(N + 1, k=-1), step_cost, math.inf)  # k < m
    cost = step_cost[:, 0]  # with one step left, everything is committed
    best_k = []
    for _ in range(min(steps, N) - 1):
        total = step_cost + cost
        best_k.append(total.argmin(1))
        cost = total.min(1)
    counts = [N]
    for k in reversed(best_k):
        counts.append(int(k[counts[-1]]))
    return [*counts, 0]
