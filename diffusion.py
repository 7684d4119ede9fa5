"""Masked diffusion: how text is noised, what the network is asked, what that proves, how it writes.

    1  how many tokens to hide     draw_num_masked
    2  what the network is asked   corrupt, loss
    3  what the network knows      nelbo: a bound on the negative log-likelihood, with error bars
    4  schedules                   hidden_counts: how many tokens stay hidden after each step; their price
    5  the sampling loop           denoise: start from hidden places, commit some tokens each step

The network is passed in: any callable with model(tokens) -> (B,T,V) and model(tokens, positions) -> (P,V)
will do, a table of probabilities included, which is how the tests compare all this with exact answers.

Names: x_0 clean tokens (B,T); x_t noised tokens; mask (B,T) bool, True = hidden; N maskable tokens of a
row; m how many of them are hidden; t = m/N the mask ratio; CE(m) the mean cross-entropy over the hidden
tokens when m are hidden, in nats; alpha = 1 - t the share visible, alpha_t before a step, alpha_s after it.
"""

import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Model = Callable[..., Tensor]
MaskRatio = str | Callable[[Tensor], Tensor]  # a name in MASK_RATIOS, or a CDF on [0,1]


def keyed_generator(seed: int, step: int, purpose: str) -> Generator:
    """Random numbers that depend on (seed, step, purpose) alone, not on what was drawn before.

    So a resumed run draws what the uninterrupted one would have, evaluation cannot disturb training,
    and every process can draw the whole global batch and take its own rows.
    """
    key = np.random.SeedSequence([seed, step, zlib.crc32(purpose.encode())])
    return Generator().manual_seed(int(key.generate_state(1, np.uint64)[0]))


# --- 1. How many tokens to hide -------------------------------------------------------------------

# A distribution of the training mask ratio is its CDF on [0,1]. To try your own, add a line.
MASK_RATIOS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda t: t,  # every level equally often: the bound itself
    "bell": lambda t: 3 * t**2 - 2 * t**3,  # Beta(2,2): few nearly clean and few nearly empty rows
}


def level_probabilities(levels: int, mask_ratio: MaskRatio) -> Tensor:
    """q(k), (levels,) float64: how often level k of 1..L is drawn, the CDF's rise from (k-1)/L to k/L."""
    if isinstance(mask_ratio, str):
        if mask_ratio not in MASK_RATIOS:
            raise ValueError(f"mask_ratio {mask_ratio!r} is unknown; known: {', '.join(MASK_RATIOS)}")
        mask_ratio = MASK_RATIOS[mask_ratio]
    return mask_ratio(torch.linspace(0, 1, levels + 1, dtype=torch.float64)).diff()


def is_symmetric(q: Tensor) -> bool:
    """Whether level k is as likely as level L+1-k: then pairing rows changes no level's frequency."""
    return torch.allclose(q, q.flip(0))


def draw_num_masked(batch: int, N: int, generator: Generator | None = None, mask_levels: int = 0,
                    mask_ratio: MaskRatio = "uniform") -> Tensor:
    """How many tokens to hide in each row of the *global* batch: (batch,) int64, values in 1..N.

    The unit interval is cut into as many strata as there are draws, all sharing one random offset, so a
    batch always covers all levels evenly. Draw u picks the level k with CDF((k-1)/L) <= u < CDF(k/L),
    where L = `mask_levels`, or N when that is 0; level k hides m = round(kN/L) tokens.

    Rows come in antithetic pairs: row 2j hides m and row 2j+1 hides N + round(N/L) - m (for L = N that is
    N+1-m). Either way all levels are drawn alike, and a pair always hides the same total: the work per
    batch is one constant. An asymmetric distribution has no pairs.
    """
    L = mask_levels or N
    if N < 1 or not 0 <= mask_levels <= N:
        raise ValueError(f"cannot hide tokens of {N} at {mask_levels} levels")
    q = level_probabilities(L, mask_ratio)
    strata = (batch + 1) // 2 if is_symmetric(q) else batch
    u = (torch.rand((), generator=generator, dtype=torch.float64) + torch.arange(strata) / strata) % 1
    k = torch.searchsorted(q.cumsum(0), u, right=True).clamp(max=L - 1) + 1  # (strata,)
    m = (k * N / L).round().long()
    if is_symmetric(q):
        m = torch.stack([m, N + round(N / L) - m], dim=1).flatten()[:batch]
    return m


def draw_mask(num_masked: Tensor, T: int, prefix_length: int, generator: Generator | None) -> Tensor:
    """(B,T) bool: in row b a uniformly random subset of exactly num_masked[b] places after the prefix."""
    B, N = num_masked.numel(), T - prefix_length
    shuffled = torch.rand(B, N, generator=generator).argsort(dim=1) + prefix_length
    chosen = torch.arange(N) < num_masked[:, None]
    return torch.zeros(B, T, dtype=torch.bool).scatter_(1, shuffled, chosen)


# --- 2. What the network is asked: one form for three objectives ----------------------------------

OBJECTIVES = ("diffusion", "mlm", "autoregressive")
WEIGHTINGS = ("nelbo", "token")


class Batch(NamedTuple):
    """A training question: from `inputs`, predict `targets` at `positions`; errors count by `weights`."""

    inputs: Tensor  # (B,T) int64, what the network sees
    positions: Tensor  # (P,) int64, flat places b*T + t
    targets: Tensor  # (P,) int64, the clean tokens there
    weights: Tensor  # (P,) float32, so that loss = sum(weights * cross-entropy)

    def split(self, parts: int) -> list["Batch"]:
        """Micro-batches of whole rows and equal work, whose losses add up to this batch's loss."""
        B, T = self.inputs.shape
        if parts >= 1 and B % parts == 0 and self.positions.numel() % parts == 0:
            size = B // parts * T  # tokens of a part; its positions count from its own first token
            positions = self.positions.view(parts, -1) - size * torch.arange(parts)[:, None]
            if 0 <= positions.min() and positions.max() < size:  # otherwise a pair would be torn apart
                fields = (field.chunk(parts) for field in self._replace(positions=positions.flatten()))
                return [Batch(*part) for part in zip(*fields, strict=True)]
        raise ValueError(f"{B} rows, in antithetic pairs, do not split into {parts} parts of equal work")

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(field.to(device, non_blocking=True) for field in self))


def corrupt(x_0: Tensor, mask_id: int, generator: Generator | None = None, objective: str = "diffusion",
            mask_levels: int = 0, mask_ratio: MaskRatio = "uniform", weighting: str = "nelbo",
            prefix_length: int = 0, prefix_length_max: int | None = None, mlm_ratio: float = 0.15) -> Batch:
    """Turn the clean tokens of the *global* batch, (B,T) on the CPU, into a training question.

    objective   "diffusion"       hide m tokens, m drawn anew for each row (`draw_num_masked`)
                "mlm"             hide the fixed share `mlm_ratio`: BERT, which cannot generate
                "autoregressive"  inputs [mask_id, x_0[:-1]], predict x_0: GPT; wants a causal network
    weighting   of a hidden token: see `row_weights`
    prefix      the first `prefix_length` tokens are never hidden; with `prefix_length_max`, a length from
                that range is drawn for each batch

    The number of predictions P is one constant for given arguments and B, so a compiled step is compiled
    once. Where the count itself varies (a drawn prefix, an asymmetric distribution, an odd number of rows),
    predictions are padded to the largest possible count, with weight 0.
    """
    B, T = x_0.shape
    if objective == "autoregressive":
        weights = torch.full((B * T,), 1 / (B * T))
        return Batch(shift_right(x_0, mask_id), torch.arange(B * T), x_0.flatten(), weights)
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is unknown; known: {', '.join(OBJECTIVES)}")
    longest = prefix_length if prefix_length_max is None else prefix_length_max
    if not 0 <= prefix_length <= longest < T or mask_levels > T - longest:
        raise ValueError(f"a prefix of {prefix_length} to {longest} tokens does not fit rows of {T} tokens "
                         f"and {mask_levels} mask levels")
    if not 0 <= mlm_ratio <= 1:
        raise ValueError(f"mlm_ratio must be in [0, 1], not {mlm_ratio}")

    most = T - prefix_length  # maskable tokens under the shortest prefix
    N = most - int(torch.randint(longest - prefix_length + 1, (), generator=generator))
    if objective == "mlm":
        num_masked = torch.full((B,), max(1, round(mlm_ratio * N)))
        row_weight = 1 / (B * num_masked)
        group, capacity = 1, max(1, round(mlm_ratio * most))
    else:
        num_masked = draw_num_masked(B, N, generator, mask_levels, mask_ratio)
        row_weight = row_weights(num_masked, N, mask_levels or N, mask_ratio, weighting)
        # A group of rows fills at most `capacity` places: a pair its constant total, a lone row all of them.
        paired = B % 2 == 0 and is_symmetric(level_probabilities(mask_levels or most, mask_ratio))
        group, capacity = (2, most + round(most / (mask_levels or most))) if paired else (1, most)
    mask = draw_mask(num_masked, T, T - N, generator)
    positions, weights = fill_slots(mask, row_weight, group, capacity)
    return Batch(x_0.masked_fill(mask, mask_id), positions, x_0.flatten()[positions], weights)


def fill_slots(mask: Tensor, row_weight: Tensor, group: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Flat positions and weights of the hidden places, `capacity` slots for every `group` rows: two (P,).

    A slot that is not needed asks about the first place of its group, with weight 0.
    """
    B, T = mask.shape
    grouped = mask.view(B // group, group * T)
    g, place = grouped.nonzero(as_tuple=True)
    slot = grouped.cumsum(1)[g, place] - 1
    positions = (torch.arange(B // group)[:, None] * group * T).repeat(1, capacity)
    weights = torch.zeros(B // group, capacity)
    positions[g, slot] += place
    weights[g, slot] = row_weight.float().repeat_interleave(mask.sum(1))
    return positions.flatten(), weights.flatten()


def shift_right(tokens: Tensor, mask_id: int) -> Tensor:
    """[mask_id, tokens[:-1]] in each row: place t holds token t-1; the mask token serves as start of text."""
    return F.pad(tokens[:, :-1], (1, 0), value=mask_id)


def row_weights(num_masked: Tensor, N: int, L: int, mask_ratio: MaskRatio, weighting: str) -> Tensor:
    """(B,) weight of each hidden token of a row that hides m, its level k drawn from q(1..L).

    "nelbo"  1 / (B L q(k) m): the loss estimates the NELBO whatever q is, if q > 0; uniform q: 1 / (B m)
    "token"  1 / sum of m: hidden tokens count alike, which weighs level m by m. Another objective
    """
    B = len(num_masked)
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting {weighting!r} is unknown; known: {', '.join(WEIGHTINGS)}")
    if weighting == "token":
        return torch.full((B,), 1 / num_masked.sum().item())
    q = level_probabilities(L, mask_ratio)
    if (q <= 0).any():
        raise ValueError("this mask_ratio never draws some levels: only weighting token suits it")
    k = (num_masked * L / N).round().long().clamp(1, L)
    if is_symmetric(q):  # the two levels of a pair are equally likely
        k = k[::2].repeat_interleave(2)[:B]
    return 1 / (B * L * q[k - 1] * num_masked)


def loss(model: Model, batch: Batch) -> Tensor:
    """sum(weights * cross-entropy) in nats, a scalar. With the "nelbo" weights its mean is the NELBO."""
    logits = model(batch.inputs, batch.positions)  # (P,V): the head works only where tokens are hidden
    ce = F.cross_entropy(logits.float(), batch.targets, reduction="none")  # (P,)
    return (batch.weights * ce).sum()


# --- 3. What the network knows: a bound on the negative log-likelihood ----------------------------


class Curve(NamedTuple):
    """The loss by mask level, CE(m), at some exact counts m out of N."""

    N: int
    counts: list[int]  # increasing; the first is 1, the last N
    nats: list[float]  # CE(m)
    stderr: list[float]


class Bound(NamedTuple):
    """An estimate of the NELBO in nats per token, its standard error, and the curve it is the mean of."""

    nats: float
    stderr: float
    curve: Curve | None


def row_losses(model: Model, inputs: Tensor, x_0: Tensor, asked: Tensor, batch_size: int) -> Tensor:
    """(B,) float64: each row's mean cross-entropy at the places marked in `asked`, all arguments (B,T)."""
    sums = torch.zeros(len(x_0), dtype=torch.float64)
    for first in range(0, len(x_0), batch_size):
        part = slice(first, first + batch_size)
        b, place = asked[part].nonzero(as_tuple=True)
        logits = model(inputs[part], b * x_0.size(1) + place)
        ce = F.cross_entropy(logits.float(), x_0[part][b, place], reduction="none")
        sums[part].index_add_(0, b.cpu(), ce.cpu().double())
    return sums / asked.sum(1).cpu()


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean and its standard error; NaN where there are too few values to tell."""
    error = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(math.nan)
    return values.mean().item(), error.item()


@torch.no_grad()
def nelbo(model: Model, x_0: Tensor, mask_id: int, prefix_length: int = 0, seed: int = 0,
          curve_points: int = 10, batch_size: int = 32) -> Bound:
    """NELBO = (1/N) sum_{m=1..N} CE(m), in nats per token: an upper bound on -log p(x_0) / N.

    It equals the continuous-time bound of MDLM (arXiv:2406.07524) and LLaDA (arXiv:2502.09992, eq. 14)
    without its noise of random counts, and the mean negative log-likelihood over all orders of an any-order
    autoregressive model: if the conditionals are exact, NELBO = entropy. With a prefix it bounds the
    likelihood of the rest given the prefix.

    x_0: (B,T) clean tokens, any B; more rows, smaller standard error. Each row hides one count m, the counts
    being strata over all of 1..N, so that the estimate has no bias. The same seed always gives the same
    counts and masks: two checkpoints are compared on the same questions.

    A second pass measures the curve at m = 1 and at `curve_points` counts evenly spaced up to N, each on its
    share of the rows (fewer counts if there would be less than two rows for each).
    """
    B, T = x_0.shape
    N = T - prefix_length
    if min(B, batch_size) < 1 or not 0 <= prefix_length < T:
        raise ValueError(f"nothing to measure in {B} rows of {T} tokens after a prefix of {prefix_length}")
    generator = keyed_generator(seed, 0, "nelbo")

    def measure(num_masked: Tensor) -> Tensor:
        mask = draw_mask(num_masked, T, prefix_length, generator).to(x_0.device)
        return row_losses(model, x_0.masked_fill(mask, mask_id), x_0, mask, batch_size)

    by_row = measure(draw_num_masked(B, N, generator))
    # The two rows of a pair depend on one another: the error is that of the pair means.
    _, stderr = mean_and_error(by_row[: B // 2 * 2].view(-1, 2).mean(1))
    points = max(1, min(curve_points, B // 2 - 1))
    counts = sorted({1, *(max(1, round(N * i / points)) for i in range(1, points + 1))} if B > 1 else {N})
    of_row = torch.arange(B) % len(counts)
    by_count = measure(torch.tensor(counts)[of_row])
    nats, errors = zip(*(mean_and_error(by_count[of_row == i]) for i in range(len(counts))), strict=True)
    return Bound(by_row.mean().item(), stderr, Curve(N, counts, list(nats), list(errors)))


@torch.no_grad()
def evaluate(model: Model, x_0: Tensor, mask_id: int, objective: str = "diffusion",
             curve_points: int = 10, batch_size: int = 32) -> Bound:
    """The figure to compare checkpoints by: `nelbo`, or of an autoregressive model the exact negative
    log-likelihood, in nats per token, scored on the same T tokens (its curve is None)."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is unknown; known: {', '.join(OBJECTIVES)}")
    if objective != "autoregressive":
        return nelbo(model, x_0, mask_id, curve_points=curve_points, batch_size=batch_size)
    everywhere = torch.ones_like(x_0, dtype=torch.bool)
    by_row = row_losses(model, shift_right(x_0, mask_id), x_0, everywhere, batch_size)
    return Bound(*mean_and_error(by_row), None)


# --- 4. Schedules: how many tokens stay hidden after each step ------------------------------------

# f(u): the share still hidden after a fraction u of the steps, from f(0) = 1; the last step hides nothing.
SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda u: 1 - u,
    "cosine": lambda u: (1 + torch.cos(math.pi * u)) / 2,  # slow, fast, slow (MaskGIT's is cos(pi u / 2))
    "exponential": lambda u: torch.exp(-3 * u),  # fast at first; the last step fills the last 5%
}
Schedule = str | Sequence[int]  # a name, or falling hidden counts [N, ..., 0]


def hidden_shares(schedule: Schedule, u: Tensor) -> Tensor:
    """f(u) of a schedule, any shape: exactly 0 from u = 1 on."""
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule {schedule!r} is unknown; known: {', '.join(SCHEDULES)}")
        return SCHEDULES[schedule](u) * (u < 1)
    counts = np.array(schedule, dtype=float)
    if len(counts) < 2 or counts[-1] != 0 or (np.diff(counts) >= 0).any():
        raise ValueError(f"a schedule must fall strictly from some count to 0, not {list(schedule)}")
    return torch.from_numpy(np.interp(u, np.linspace(0, 1, len(counts)), counts / counts[0]))


def hidden_counts(schedule: Schedule, num_hidden: Tensor, steps: int, strict: bool = True) -> Tensor:
    """How many tokens of each row are still hidden before step i: (S+1, B), from `num_hidden` (B,) to 0.

    A row with N hidden tokens uses S = min(steps, N) steps: m_i = round(N f(i/S)), lowered where needed to be
    strictly decreasing, and raised to leave at least one token for each later step; the longest row sets the
    length S of the result. Not `strict`: m_i = round(N f(i/steps)) as it is. A schedule that is a list of
    counts sets the steps by its length, and is rescaled to each row's N.
    """
    if not isinstance(schedule, str):
        steps = len(schedule) - 1
    elif steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    N = num_hidden.cpu().double()
    S = N.clamp(max=steps) if strict else torch.full_like(N, steps)
    i = torch.arange(int(S.max()) + 1, dtype=torch.float64)[:, None]
    m = (N * hidden_shares(schedule, i / S.clamp(min=1))).round()
    if strict:
        m = (m + i).cummin(0).values - i  # strictly decreasing
        m = m.maximum(S - i).clamp(min=0)  # one token at least for each step that is left
    return m.long()


def schedule_nelbo(curve: Curve, schedule: Schedule, steps: int) -> float:
    """The NELBO of a sampler that reveals *random* places by this schedule, in nats per token:

        NELBO_S = (1/N) sum_i (m_i - m_{i+1}) CE(m_i),   m_0 = N > m_1 > ... > m_S = 0

    an upper bound on -log p(text) / N for what it writes at temperature 1 without truncation; with one token
    a step it is the NELBO itself. CE is interpolated between the counts that `curve` holds.
    """
    m = hidden_counts(schedule, torch.tensor([curve.N]), steps)[:, 0].numpy()
    return float(-np.diff(m) @ np.interp(m[:-1], curve.counts, curve.nats) / curve.N)


def smooth(curve: Curve) -> Curve:
    """The same curve at every count, from a cubic in m/N fitted by the standard errors.

    What is optimised would otherwise chase the noise of the measurement, which costs more than it gains.
    """
    weights = 1 / np.maximum(np.nan_to_num(np.array(curve.stderr, dtype=float), nan=1.0), 1e-3)
    counts = np.arange(1, curve.N + 1)
    cubic = np.polynomial.Polynomial.fit(curve.counts, curve.nats, min(3, len(curve.counts) - 1), w=weights)
    return Curve(curve.N, counts.tolist(), cubic(counts).tolist(), [math.nan] * curve.N)


def optimal_schedule(curve: Curve, steps: int) -> list[int]:
    """The hidden counts [N, ..., 0] of the cheapest schedule of min(steps, N) steps, by `schedule_nelbo`.

    Dynamic programming: the cheapest way from m hidden tokens to none in s steps is the cheapest first step,
    (m - k) CE(m), followed by the cheapest way from k to none in s - 1.
    """
    m = np.arange(curve.N + 1)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    ce = np.interp(m, curve.counts, curve.nats)
    step_cost = np.where(m[:, None] > m, (m[:, None] - m) * ce[:, None], math.inf)  # (from m, to k)
    cost, best_k = step_cost[:, 0], []  # with one step left, everything is revealed
    for _ in range(min(steps, curve.N) - 1):
        total = step_cost + cost
        best_k.append(total.argmin(1))
        cost = total.min(1)
    counts = [curve.N]
    for k in reversed(best_k):
        counts.append(int(k[counts[-1]]))
    return [*counts, 0]


# --- 5. The sampling loop -------------------------------------------------------------------------

Adjust = Callable[[Tensor, Tensor, Tensor], Tensor]  # (logits (P,V), x (B,T), positions (P,)) -> logits


def ban(tokens: Sequence[int]) -> Adjust:
    """An `adjust` under which these tokens are never written."""
    banned = torch.tensor(tokens, dtype=torch.int64)
    return lambda logits, x, positions: logits.index_fill(1, banned.to(logits.device), -math.inf)


def penalize_repetition(penalty: float) -> Adjust:
    """An `adjust` that divides by `penalty` the odds of every token that its row already holds."""
    if not 0 < penalty < math.inf:
        raise ValueError(f"the repetition penalty must be positive, not {penalty}")

    def adjust(logits: Tensor, x: Tensor, positions: Tensor) -> Tensor:
        V = logits.size(1)
        seen = logits.new_zeros(x.size(0), V + 1).scatter_(1, x.clamp(max=V), 1)[:, :V]  # not the mask token
        return logits - math.log(penalty) * seen[positions // x.size(1)]

    return adjust


def draw_tokens(logits: Tensor, temperature: float = 1.0, top_k: int | None = None,
                top_p: float | None = None, generator: Generator | None = None) -> Tensor:
    """Draw one token per row of `logits` (P,V): (P,).

    temperature 0 is greedy; top_k keeps the k likeliest tokens; top_p (nucleus) the fewest whose
    probabilities reach top_p. The draw inverts the CDF in float64: races of fp32 noise never reach the
    tail and act like a lower temperature (arXiv:2409.02908).
    """
    if temperature == 0:
        return logits.argmax(1)
    p = (logits.float() / temperature).softmax(1)
    if top_k is not None and top_k < p.size(1):
        value, index = p.topk(top_k, dim=1)
        p = torch.zeros_like(p).scatter_(1, index, value)
    if top_p is not None and top_p < 1:
        value, index = p.sort(dim=1, descending=True)
        value /= value.sum(1, keepdim=True)
        value[value.cumsum(1) - value >= top_p] = 0  # the likelier ones already reach top_p
        p = torch.zeros_like(p).scatter_(1, index, value)
    if p.device.type == "mps":  # has no float64
        p = p.cpu()
    cdf = p.cumsum(1, dtype=torch.float64)
    u = torch.rand(p.size(0), 1, dtype=torch.float64, generator=generator).to(p.device)
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True).squeeze(1).to(logits.device)


def largest(score: Tensor, among: Tensor, quota: Tensor) -> Tensor:
    """(B,T) bool: in row b the quota[b] places with the largest score among those marked in `among`."""
    score = score.clamp(min=torch.finfo(score.dtype).min)  # a score may be -inf, and is a place all the same
    ranking = score.masked_fill(~among, -math.inf).argsort(dim=1, descending=True, stable=True)
    first = torch.arange(score.size(1), device=score.device) < quota[:, None]
    return torch.zeros_like(among).scatter_(1, ranking, first) & among


# Which hidden places are committed next: those of the highest score(log p (P,V), drawn tokens (P,)) -> (P,),
# in nats. None: decided without asking the network, so that its head runs once per token in all.
ORDERS: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "random": None,
    "left_to_right": None,
    "ancestral": None,  # each by itself, with probability (alpha_s - alpha_t) / (1 - alpha_t): D3PM, MDLM
    "confidence": lambda log_p, tokens: log_p.gather(1, tokens[:, None]).squeeze(1),
    "margin": lambda log_p, tokens: log_p.exp().topk(2, dim=1).values.diff(dim=1).neg().log().squeeze(1),
    "entropy": lambda log_p, tokens: -torch.special.entr(log_p.exp()).sum(1),
}

# The chance sigma(limit, alpha_s, p) that a committed token is hidden again, a number or (B,T). alpha_s: the
# share to be visible after this step. p (B,T): the probability with which each token was committed, infinite
# at other places. limit = min(1, (1 - alpha_s) / alpha_t): the largest chance that leaves as many hidden as
# the schedule says; what exceeds it is cut (ReMDM, arXiv:2503.00307).
REMASKS: dict[str, Callable[[float, float, Tensor], float | Tensor]] = {
    "none": lambda limit, alpha_s, p: 0.0,
    "renoise": lambda limit, alpha_s, p: 1 - alpha_s,  # a fresh random share of all that is written
    "cap": lambda limit, alpha_s, p: 0.02,
    "rescale": lambda limit, alpha_s, p: 0.05 * limit,
    "conf": lambda limit, alpha_s, p: limit * (-p).softmax(1).nan_to_num(),  # the unsure ones
}


class State(NamedTuple):
    """What `denoise` has written so far."""

    tokens: Tensor  # (B,T) int64, mask_id where hidden
    probability: Tensor  # (B,T) float32, of each token when it was committed; 1 where given, 0 where hidden
    calls: int  # how often the network was asked


def check_options(order: object, remask: object, temperature: float, gumbel: float, top_k: int | None,
                  top_p: float | None, threshold: float | None, block_length: int | None) -> None:
    """Raise ValueError for the argument of `denoise` that makes no sense."""
    for name, value, valid, rule in (
        ("order", order, callable(order) or order in ORDERS, f"one of {', '.join(ORDERS)}"),
        ("remask", remask, callable(remask) or remask in REMASKS, f"one of {', '.join(REMASKS)}"),
        ("temperature", temperature, temperature == 0 or 1e-6 < temperature < math.inf,
         "0 (greedy) or positive"),
        ("gumbel", gumbel, 0 <= gumbel < math.inf, "0 or positive"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "in (0, 1]"),
        ("threshold", threshold, threshold is None or 0 < threshold <= 1, "in (0, 1]"),
        ("block_length", block_length, block_length is None or block_length >= 1, "at least 1"),
    ):
        if not valid:
            raise ValueError(f"{name} must be {rule}, not {value!r}")


def plan_blocks(holes: Tensor, block_length: int | None, schedule: Schedule, steps: int,
                strict: bool) -> list[tuple[Tensor, Tensor, list[float]]]:
    """For each block of holes, left to right: its places (B,T), the counts (S+1,B) to stay hidden, and
    alpha, the S+1 shares to be visible. Blocks get steps in proportion to their tokens, at least one."""
    tokens_left, plans = int(holes.sum(1).max()), []
    length = block_length or max(1, tokens_left)
    block_of = (holes.cumsum(1) - 1) // length
    blocks_left = math.ceil(tokens_left / length)
    if isinstance(schedule, str) and steps < max(1, blocks_left):
        raise ValueError(f"steps must be at least {max(1, blocks_left)}, not {steps}")
    for block in range(blocks_left):
        places = holes & (block_of == block)
        blocks_left -= 1
        block_steps = min(max(1, round(steps * min(1, length / tokens_left))), max(1, steps - blocks_left))
        steps, tokens_left = steps - block_steps, tokens_left - length
        counts = hidden_counts(schedule, places.sum(1), block_steps, strict)
        alpha = 1 - hidden_shares(schedule, torch.linspace(0, 1, len(counts), dtype=torch.float64))
        plans.append((places, counts.to(holes.device), alpha.tolist()))
    return plans


def ask(model: Model, x: Tensor, positions: Tensor, adjust: Adjust | None) -> Tensor:
    """(P,V) float32: the log-probabilities of the tokens at these places."""
    logits = model(x, positions)
    if adjust is not None:
        logits = adjust(logits, x, positions)
    if not logits.amax(1).isfinite().all():
        raise ValueError("the network, or adjust, leaves no token possible at some place")
    return logits.float().log_softmax(1)


@torch.no_grad()
def denoise(model: Model, x: Tensor, mask_id: int, steps: int, schedule: Schedule = "linear",
            order: str | Callable = "random", temperature: float = 1.0, top_k: int | None = None,
            top_p: float | None = None, remask: str | Callable | None = None, threshold: float | None = None,
            block_length: int | None = None, gumbel: float = 0.0, adjust: Adjust | None = None,
            generator: Generator | None = None) -> Iterator[State]:
    """Fill every place of x (B,T) that equals `mask_id`; yield the state at first and after each step.

    Everything else is given and never changed, wherever it stands: free generation, continuing a prefix
    and infilling are one call, and rows may have different numbers of holes. A step asks the network once;
    a step in which nothing changes is skipped.

    schedule:      how many tokens stay hidden after each step (`hidden_counts`)
    order:         which hidden places are committed next: a name in ORDERS, or a score like those
    gumbel:        size of the Gumbel noise on such scores, falling linearly to 0 over the steps of a block
                   (MaskGIT, arXiv:2202.04200): confidence first commits in proportion to p^(1/gumbel)
    remask:        which committed tokens are hidden again: a name in REMASKS, or a chance like those. With
                   it, as with order ancestral, `steps` may exceed the number of tokens
    threshold:     every token with a probability above it is committed too, one per row at least; the
                   schedule is then the slowest pace, and `steps` a cap
    block_length:  fill blocks of so many hidden tokens one after another, left to right, in `steps` in all
                   (a schedule given as a list is followed in each block)
    adjust:        adjust(logits (P,V), x, positions (P,)) -> logits: guidance, constraints, penalties
    temperature, top_k, top_p:  `draw_tokens`; order, threshold, remask look at probabilities without these
    generator:     of the CPU; the same one writes the same text
    Raises ValueError for arguments that make no sense, before the first step.
    """
    remask = remask or "none"
    check_options(order, remask, temperature, gumbel, top_k, top_p, threshold, block_length)
    score_of = order if callable(order) else ORDERS[order]
    sigma_of = remask if callable(remask) else REMASKS[remask]
    places_first = score_of is None and threshold is None  # the places are chosen, then the network is asked
    B, T, device = *x.shape, x.device
    holes, leftmost = x == mask_id, -torch.arange(T, device=device).float().expand(B, T)
    plans = plan_blocks(holes, block_length, schedule, steps, remask == "none" and order != "ancestral")

    def noise() -> Tensor:
        return torch.rand(B, T, generator=generator).to(device)

    x, probability, calls = x.clone(memory_format=torch.contiguous_format), (~holes).float(), 0
    yield State(x.clone(), probability.clone(), calls)
    for places, counts, alpha in plans:
        for i, (alpha_t, alpha_s) in enumerate(itertools.pairwise(alpha)):
            # Which committed tokens are hidden again: `remasked` (B,T). How many hidden ones are committed:
            # `quota` (B,), by chance too (ancestral), or so many that counts[i + 1] stay hidden.
            hidden = places & (x == mask_id)
            committed = places & ~hidden
            limit = min(1.0, (1 - alpha_s) / max(alpha_t, 1e-9))
            sigma = sigma_of(limit, alpha_s, probability.masked_fill(~committed, math.inf))
            sigma = torch.as_tensor(sigma, device=device).clamp(max=limit)
            remasked = committed & (noise() < sigma)
            score = leftmost if order == "left_to_right" else noise()
            if order == "ancestral" and alpha_s < 1:
                chance = (alpha_s - alpha_t + sigma * alpha_t) / (1 - alpha_t)
                score = chance - score
                quota = (hidden & (score > 0)).sum(1)
            else:
                remasked = largest(noise(), remasked, counts[i + 1])  # no more of them than may stay hidden
                quota = hidden.sum(1) + remasked.sum(1) - counts[i + 1]
            if threshold is not None:
                quota = quota.clamp(min=1).minimum(hidden.sum(1))

            # Ask the network, and draw; if the places are chosen already, only there.
            if quota.any():
                asked = largest(score, hidden, quota) if places_first else hidden
                positions, calls = asked.flatten().nonzero().squeeze(1), calls + 1  # (P,)
                log_p = ask(model, x, positions, adjust)
                tokens = draw_tokens(log_p, temperature, top_k, top_p, generator)
                p = log_p.gather(1, tokens[:, None]).squeeze(1).exp()
                if score_of is not None:
                    jitter = -torch.empty(len(p)).exponential_(generator=generator).log()  # Gumbel noise
                    jitter = jitter.to(device) * gumbel * (1 - i / (len(alpha) - 1)) if gumbel else 0
                    score.view(-1)[positions] = score_of(log_p, tokens) + jitter
                commit = largest(score, hidden, quota).flatten()[positions]
                if threshold is not None:
                    commit |= p > threshold
                x.view(-1)[positions[commit]] = tokens[commit]
                probability.view(-1)[positions[commit]] = p[commit]
            if quota.any() or remasked.any():
                x.masked_fill_(remasked, mask_id), probability.masked_fill_(remasked, 0)
                yield State(x.clone(), probability.clone(), calls)


def generate(model: Model, x: Tensor, mask_id: int, steps: int, **options) -> Tensor:
    """The tokens of the last state of `denoise`, (B,T), nothing hidden any more; same arguments."""
    *_, last = denoise(model, x, mask_id, steps, **options)
    return last.tokens


def left_to_right_model(model: Model, mask_id: int) -> Model:
    """An autoregressive network as `denoise` wants one: at place t it answers from the tokens before t.

    With order="left_to_right" and as many steps as tokens, `denoise` is then GPT's sampling.
    """
    return lambda tokens, *positions: model(shift_right(tokens, mask_id), *positions)
