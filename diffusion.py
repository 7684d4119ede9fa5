"""Masked diffusion: how text is noised, what the network is asked, what that proves, how it writes.

    1  how many tokens to hide     draw_num_masked
    2  what the network is asked   corrupt, loss
    3  what the network knows      nelbo: a bound on the negative log-likelihood, with error bars
    4  schedules                   hidden_counts: how many tokens stay hidden after each step
    5  the sampling loop           denoise: start from hidden places, commit some tokens each step

The network is passed in: any callable with model(tokens) -> (B,T,V) and model(tokens, positions) -> (P,V)
will do, a table of probabilities included, which is how the tests compare all this with exact answers.

Names: x_0 clean tokens (B,T); x_t noised tokens; mask (B,T) bool, True = hidden; N maskable tokens of a
row; m how many of them are hidden; t = m/N the mask ratio; CE(m) the mean cross-entropy over the hidden
tokens when m are hidden, in nats.
"""

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
    "middle": lambda t: ((t - 0.2) / 0.6).clamp(0, 1),  # uniform on [0.2, 0.8]
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
WEIGHTINGS = ("nelbo", "row", "token")


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
        row_weight = row_weights(num_masked, N, level_probabilities(mask_levels or N, mask_ratio), weighting)
        q = level_probabilities(mask_levels or most, mask_ratio)
        if weighting == "nelbo" and (q <= 0).any():
            raise ValueError(f"mask_ratio {mask_ratio} never draws some levels, so no weight makes its loss "
                             "the NELBO: use weighting row or token")
        # A group of rows fills at most `capacity` places: a pair its constant total, a lone row all of them.
        paired = is_symmetric(q) and B % 2 == 0
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


def row_weights(num_masked: Tensor, N: int, q: Tensor, weighting: str) -> Tensor:
    """(B,) weight of each hidden token of a row that hides m, its level drawn from q(1..L).

    "nelbo"  1 / (B L q(k) m): the loss estimates the NELBO whatever q is, if q > 0; uniform q: 1 / (B m)
    "row"    1 / (B m): rows count alike. Under a q that is not uniform, another objective than the NELBO
    "token"  1 / sum of m: hidden tokens count alike, which weighs level m by m. Another objective too
    """
    B, L = len(num_masked), len(q)
    if weighting == "token":
        return torch.full((B,), 1 / num_masked.sum().item())
    if weighting == "row":
        return 1 / (B * num_masked)
    if weighting != "nelbo":
        raise ValueError(f"weighting {weighting!r} is unknown; known: {', '.join(WEIGHTINGS)}")
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
        sums[part].index_add_(0, b.cpu(), ce.double().cpu())
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
             curve_points: int = 10) -> Bound:
    """The figure to compare checkpoints by: `nelbo`, or of an autoregressive model the exact negative
    log-likelihood, in nats per token, scored on the same T tokens (its curve is None)."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is unknown; known: {', '.join(OBJECTIVES)}")
    if objective != "autoregressive":
        return nelbo(model, x_0, mask_id, curve_points=curve_points)
    everywhere = torch.ones_like(x_0, dtype=torch.bool)
    by_row = row_losses(model, shift_right(x_0, mask_id), x_0, everywhere, batch_size=32)
    return Bound(*mean_and_error(by_row), None)


# --- 4. Schedules: how many tokens stay hidden after each step ------------------------------------

# f(u): the share still hidden after a fraction u of the steps, from f(0) = 1; the last step hides nothing.
SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda u: 1 - u,
    "cosine": lambda u: (1 + torch.cos(math.pi * u)) / 2,  # slow, fast, slow (MaskGIT's is cos(pi u / 2))
    "exponential": lambda u: torch.exp(-3 * u),  # fast at first; the last step fills the last 5%
}


def hidden_counts(schedule: str | Sequence[int], num_hidden: Tensor, steps: int) -> Tensor:
    """How many tokens of each row are still hidden before step i: (steps+1, B), from `num_hidden` (B,) to 0.

    A row with N hidden tokens uses S = min(steps, N) steps: m_i = round(N f(i/S)), lowered where needed to be
    strictly decreasing, and raised to leave at least one token for each later step. A schedule may
    also be a list of counts [n, ..., 0], whose length sets the steps; it is rescaled to each row's N.
    """
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule {schedule!r} is unknown; known: {', '.join(SCHEDULES)}")
        f = SCHEDULES[schedule]
    else:
        given = torch.tensor(schedule, dtype=torch.float64)
        if len(given) < 2 or given[-1] != 0 or (given.diff() >= 0).any():
            raise ValueError(f"a schedule must fall strictly from some count to 0, not {list(schedule)}")
        steps = len(given) - 1

        def f(u: Tensor) -> Tensor:
            return torch.from_numpy(np.interp(u * steps, np.arange(steps + 1), given / given[0]))

    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    N = num_hidden.cpu().double()
    S = N.clamp(max=steps)
    i = torch.arange(steps + 1, dtype=torch.float64)[:, None]
    m = (N * f((i / S.clamp(min=1)).clamp(max=1))).round() * (i < S)
    m = (m + i).cummin(0).values - i  # strictly decreasing
    return m.maximum(S - i).clamp(min=0).long()  # one token at least for each step that is left


# --- 5. The sampling loop -------------------------------------------------------------------------


def draw_tokens(logits: Tensor, temperature: float = 1.0, top_k: int | None = None,
                top_p: float | None = None, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw one token per row of `logits` (P,V): (tokens (P,), their probability under the model (P,)).

    temperature 0 is greedy; top_k keeps the k likeliest tokens; top_p (nucleus) the fewest whose
    probabilities reach top_p. The draw inverts the CDF in float64: races of fp32 noise never reach the
    tail and act like a lower temperature (arXiv:2409.02908). The returned probability is the untempered one.
    """
    if logits.device.type == "mps":  # has no float64
        logits = logits.cpu()
    logits = logits.double()
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        p = (logits / temperature).softmax(-1)
        if top_k is not None and top_k < p.size(-1):
            value, index = p.topk(top_k, dim=-1)
            p = torch.zeros_like(p).scatter_(-1, index, value)
        if top_p is not None:
            value, index = p.sort(dim=-1, descending=True)
            value /= value.sum(-1, keepdim=True)
            value[value.cumsum(-1) - value >= top_p] = 0  # the likelier ones already reach top_p
            p = torch.zeros_like(p).scatter_(-1, index, value)
        cdf = p.cumsum(-1)
        u = torch.rand(p.size(0), 1, dtype=torch.float64, generator=generator).to(p.device)
        # Shrunk by a hair, so that rounding cannot carry u past the last token that has a probability.
        u = u * cdf[:, -1:] * (1 - 1e-15)
        tokens = torch.searchsorted(cdf, u, right=True).squeeze(1)
    chosen = logits.gather(-1, tokens[:, None]).squeeze(1)
    return tokens, (chosen - logits.logsumexp(-1)).exp()


def largest(score: Tensor, among: Tensor, quota: Tensor) -> Tensor:
    """(B,T) bool: in row b the quota[b] places with the largest score among those marked in `among`."""
    ranking = score.masked_fill(~among, -math.inf).argsort(dim=1, descending=True, stable=True)
    first = torch.arange(score.size(1), device=score.device) < quota[:, None]
    return torch.zeros_like(among).scatter_(1, ranking, first) & among


ORDERS = ("random", "left_to_right", "confidence")


@torch.no_grad()
def denoise(model: Model, x: Tensor, mask_id: int, steps: int, schedule: str | Sequence[int] = "linear",
            order: str = "random", temperature: float = 1.0, top_k: int | None = None,
            top_p: float | None = None, adjust: Callable[..., Tensor] | None = None,
            generator: Generator | None = None) -> Iterator[Tensor]:
    """Fill every place of x (B,T) that equals `mask_id`; yield x before the first and after each step.

    Everything else is given and never changed, wherever it stands: free generation, continuing a prefix
    and infilling are one call, and rows may have different numbers of holes. Each step asks the network once.

    schedule:  how many tokens stay hidden after each step (`hidden_counts`)
    order:     which hidden places are committed next: "random", "left_to_right", or "confidence", those
               whose drawn token the network gives the highest probability
    adjust:    adjust(logits (P,V), x, positions (P,)) -> logits, for guidance, constraints, penalties
    temperature, top_k, top_p:  `draw_tokens`
    Raises ValueError for arguments that make no sense, before the first step.
    """
    if order not in ORDERS:
        raise ValueError(f"order {order!r} is unknown; known: {', '.join(ORDERS)}")
    if temperature < 0 or not math.isfinite(temperature):
        raise ValueError(f"temperature must be 0 (greedy) or positive, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], not {top_p}")

    B, T = x.shape
    x = x.clone()
    counts = hidden_counts(schedule, (x == mask_id).sum(1), steps).to(x.device)  # (steps+1, B)
    priority = None  # a fixed ranking of places, where the order does not depend on what the network says
    if order == "random":
        priority = torch.rand(B, T, generator=generator).to(x.device)
    elif order == "left_to_right":
        priority = -torch.arange(T, device=x.device).float().expand(B, T)

    yield x.clone()
    for quota in -counts.diff(dim=0):  # (B,): tokens to commit in this step
        if not quota.any():  # every row is done
            return
        hidden = x == mask_id
        # Places known beforehand: the head runs once per token in all. Otherwise: at every hidden place.
        asked = hidden if priority is None else largest(priority, hidden, quota)
        positions = asked.flatten().nonzero().squeeze(1)  # (P,)
        logits = model(x, positions)
        if adjust is not None:
            logits = adjust(logits, x, positions)
        tokens, confidence = draw_tokens(logits, temperature, top_k, top_p, generator)
        tokens, confidence = tokens.to(x.device), confidence.to(x.device)
        if priority is None:
            score = torch.zeros(B, T, dtype=confidence.dtype, device=x.device)
            score.view(-1)[positions] = confidence
            commit = largest(score, hidden, quota).flatten()[positions]
            positions, tokens = positions[commit], tokens[commit]
        x.view(-1)[positions] = tokens
        yield x.clone()


def generate(model: Model, x: Tensor, mask_id: int, steps: int, **options) -> Tensor:
    """The last state of `denoise`, (B,T), with nothing hidden any more; same arguments."""
    *_, last = denoise(model, x, mask_id, steps, **options)
    return last


def left_to_right_model(model: Model, mask_id: int) -> Model:
    """An autoregressive network as `denoise` wants one: at place t it answers from the tokens before t.

    With order="left_to_right" and as many steps as tokens, `denoise` is then GPT's sampling.
    """
    return lambda tokens, *positions: model(shift_right(tokens, mask_id), *positions)
