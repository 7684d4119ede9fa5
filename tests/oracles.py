"""Sources whose every answer is known, and what tests need to compare with them.

A joint distribution of short texts, given as a table, plays the network: `Exact` answers with the
true conditionals, so what noising, the bound and the samplers should give follows from arithmetic.
The mask token is V in all of them, as in a real network.
"""

import itertools
import math

import torch
from torch import Generator, Tensor

FOX = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. "


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def correlated_joint(V: int, T: int, seed: int = 0) -> Tensor:
    """(V,)*T: a random table of probabilities, in which every token depends on all the others."""
    return torch.randn(V**T, generator=seeded(seed), dtype=torch.float64).softmax(0).view((V,) * T)


# --- Networks with known answers ------------------------------------------------------------------


def at(logits: Tensor, positions: Tensor | None) -> Tensor:
    """Both forms of a model's answer: (B,T,V), or (P,V) at flat positions."""
    return logits if positions is None else logits.flatten(0, 1)[positions]


class Exact:
    """The exact conditionals of `joint`, a table (V,)*T of the probabilities of all texts.

    Where a token is given it answers NaN, which spoils whatever is computed from it: nobody has any
    business there. With `poison=False` it is finite, for batches padded with a given token.
    """

    def __init__(self, joint: Tensor, poison: bool = True):
        self.T = joint.dim()
        self.V = joint.shape[0]
        self.poison = poison
        self.p = joint.flatten()  # (V^T,) the probabilities of
        self.texts = torch.cartesian_prod(*[torch.arange(self.V)] * self.T)  # (V^T,T) all texts
        for t in range(self.T):  # one more entry along each axis, the sum over it: a hidden token
            joint = torch.cat([joint, joint.sum(t, keepdim=True)], t)
        self.marginal = joint  # (V+1,)*T, the probability of what is visible; index V means hidden
        self.stride = torch.tensor(joint.stride())

    def __call__(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        assert tokens.shape[1] == self.T and tokens.dtype == torch.int64
        state = (tokens * self.stride).sum(1)[:, None, None]
        change = (torch.arange(self.V) - tokens[:, :, None]) * self.stride[:, None]  # (B,T,V)
        logits = self.marginal.flatten()[state + change].log().float()
        if self.poison:
            logits[tokens != self.V] = math.nan
        return at(logits, positions)

    def sample(self, B: int, seed: int = 0) -> Tensor:
        return self.texts[torch.multinomial(self.p, B, replacement=True, generator=seeded(seed))]

    def entropy(self, first: int | None = None) -> float:
        """In nats, of all tokens or of the first ones."""
        first = self.T if first is None else first
        p = self.marginal[(slice(self.V),) * first + (self.V,) * (self.T - first)]
        return -torch.special.xlogy(p, p).sum().item()


class Causal(Exact):
    """The same left to right: from [mask_id, x_0[:-1]], at position t log p(x_t | x_<t)."""

    def __call__(self, inputs: Tensor, positions: Tensor | None = None) -> Tensor:
        assert (inputs[:, 0] == self.V).all()
        columns = []
        for t in range(self.T):
            seen = torch.full_like(inputs, self.V)
            seen[:, :t] = inputs[:, 1 : t + 1]
            columns.append(super().__call__(seen)[:, t])
        return at(torch.stack(columns, 1), positions)


class Fixed:
    """Independent positions: the same logits (T,V) or (B,T,V), whatever is visible."""

    def __init__(self, logits: Tensor):
        self.logits = torch.as_tensor(logits)

    def __call__(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        return at(self.logits.expand(*tokens.shape, self.logits.shape[-1]), positions)


def some_curve(m: Tensor) -> Tensor:
    """An arbitrary CE(m), steep and not monotonic."""
    return 0.3 + (m - 2.5) ** 2 / 9 + 1 / (m + 1)


def levels(tokens: Tensor, positions: Tensor) -> Tensor:
    """A network with CE(m) = some_curve(m) on texts of zeros, whose mask token is 2."""
    right = torch.exp(-some_curve((tokens == 2).sum(1).double()))  # (B,) probability of token 0
    logits = torch.stack([right, 1 - right], -1).log()[:, None]
    return at(logits.expand(-1, tokens.shape[1], -1), positions)


class Recorder:
    """Any model, with a record of what it was shown and where it had to predict."""

    def __init__(self, model):
        self.model = model
        self.shown = []
        self.asked = []

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:  # always with the cheap head
        self.shown.append(tokens.clone())
        self.asked.append(positions.clone())
        return self.model(tokens, positions)


V = 3
T = 4
JOINT = correlated_joint(V, T)  # of 81 texts
EXACT = Exact(JOINT)
ROWS = 20_000  # samples of it: enough for 81 counts


def masked(B: int, T: int, V: int) -> Tensor:
    return torch.full((B, T), V)


def with_holes(B: int, T: int, V: int) -> Tensor:
    """Random texts, about 70% hidden, each row differently."""
    given = torch.randint(V, (B, T), generator=seeded(0))
    return given.masked_fill(torch.rand(B, T, generator=seeded(1)) < 0.7, V)


# --- What samplers write, by enumeration ----------------------------------------------------------


def path_log_q(model: Exact, path) -> Tensor:
    """(V^T,): the log-probability of writing each text by one path, which is groups of positions:
    those of a group are committed together, one group after the other."""
    seen = torch.full_like(model.texts, model.V)
    total = torch.zeros(len(seen), dtype=torch.float64)
    for group in map(list, path):
        log_p = model(seen).double().log_softmax(-1).gather(-1, model.texts[..., None]).squeeze(-1)
        total += log_p[:, group].sum(1)
        seen[:, group] = model.texts[:, group]
    return total


def paths(positions, counts: list[int]) -> list[list[tuple]]:
    """All ways to commit random subsets by these hidden counts, each as likely as any other."""
    if len(counts) == 1:
        return [[]]
    return [[group, *rest] for group in itertools.combinations(positions, counts[0] - counts[1])
            for rest in paths([t for t in positions if t not in group], counts[1:])]


def random_order_q(model: Exact, counts: list[int]) -> Tensor:
    every = [path_log_q(model, path).exp() for path in paths(range(model.T), counts)]
    return torch.stack(every).mean(0)


def ancestral_q(model: Exact, hidden: list[float]) -> Tensor:
    """Each position by itself is committed in step i with probability hidden[i] - hidden[i+1]."""
    chance = [before - after for before, after in itertools.pairwise(hidden)]
    total = torch.zeros(len(model.p), dtype=torch.float64)
    for step_of in itertools.product(range(len(chance)), repeat=model.T):
        path = [[t for t in range(model.T) if step_of[t] == i] for i in range(len(chance))]
        total += math.prod(chance[i] for i in step_of) * path_log_q(model, path).exp()
    return total


# --- Whether draws follow a distribution ----------------------------------------------------------


def counts_of(rows: Tensor, V: int) -> Tensor:
    """How often each of the V^T texts occurs, in the order of a flattened table."""
    T = rows.shape[1]
    index = (rows * torch.tensor([V ** (T - 1 - t) for t in range(T)])).sum(1)
    return torch.bincount(index, minlength=V**T)


def chi_square_tail(statistic: float, freedom: int) -> float:
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


def chi_square_p(observed: Tensor, probability: Tensor, merge: bool = False) -> float:
    """The p-value: how likely counts drawn from `probability` are as far from it as `observed`.

    merge: put together with the fullest those bins that expect too few for the test.
    """
    observed = observed.double().flatten()
    expected = observed.sum() * probability.double().flatten() / probability.sum()
    assert observed[expected == 0].sum() == 0, "an impossible outcome occurred"
    small = (expected > 0) & (expected < 8) & merge
    for bins in (observed, expected):
        bins[expected.argmax()] += bins[small].sum()
    keep = (expected > 0) & ~small
    observed = observed[keep]
    expected = expected[keep]
    assert expected.min() > 5, "too few draws for a chi-square test"
    if len(expected) == 1:
        return 1.0
    return chi_square_tail(((observed - expected) ** 2 / expected).sum().item(), len(expected) - 1)


def fits(rows: Tensor, probability: Tensor, merge: bool = False) -> bool:
    """Whether texts (n,T) may well be drawn from this table of V^T probabilities."""
    V = round(probability.numel() ** (1 / rows.shape[1]))
    return chi_square_p(counts_of(rows, V), probability, merge) > 1e-4


def frequencies_p(events) -> float:
    """One p-value for many (happened, probability). What is certain or impossible must be so."""
    statistic = 0.0
    freedom = 0
    for happened, p in events:
        n = happened.numel()
        yes = happened.sum().item()
        if min(p, 1 - p) < 1e-6:
            assert yes == n * round(p), "a certain event did not happen, or an impossible one did"
        elif n * min(p, 1 - p) > 5:
            statistic += (yes - n * p) ** 2 / (n * p * (1 - p))
            freedom += 1
    assert freedom, "too few draws for any test"
    return chi_square_tail(statistic, freedom)
