"""Noising, weights and the bound, against exact answers: counts by enumeration, entropies by summing a table.

The networks here are tables of probabilities, so every expected number follows from arithmetic.
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import diffusion
from diffusion import Batch, corrupt, draw_mask, draw_num_masked, evaluate, keyed_generator, loss, nelbo

MASK = 9  # the mask id of all tests: outside every vocabulary used here


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(B: int, T: int, V: int = 5) -> Tensor:
    return torch.randint(0, V, (B, T), generator=rng(123))


def chi_square_p(statistic: float, degrees: int) -> float:
    """The probability of a statistic at least this large, by chance."""
    return torch.special.gammaincc(torch.tensor(degrees / 2), torch.tensor(statistic / 2)).item()


def goodness_of_fit(observed: Tensor, probabilities: Tensor) -> float:
    """p-value of these counts under these probabilities."""
    expected = observed.sum() * probabilities
    return chi_square_p(((observed - expected) ** 2 / expected).sum().item(), len(observed) - 1)


def square(t: Tensor) -> Tensor:
    """The CDF of an asymmetric distribution of mask ratios."""
    return t**2


def middle(t: Tensor) -> Tensor:
    """The CDF of a symmetric one that draws some levels never: evenly from 20% to 80%."""
    return ((t - 0.2) / 0.6).clamp(0, 1)


CDF = {"uniform": lambda t: t, "bell": lambda t: 3 * t**2 - 2 * t**3, square: square}


# ---- networks with known answers ------------------------------------------------------------------


def network(logits_of: Callable[[Tensor], Tensor]) -> diffusion.Model:
    """Both forms of a model, from one function (B,T) -> (B,T,V)."""

    def model(x_t: Tensor, positions: Tensor | None = None) -> Tensor:
        logits = logits_of(x_t)
        return logits if positions is None else logits.flatten(0, 1)[positions]

    return model


def uniform_network(V: int) -> diffusion.Model:
    return network(lambda x_t: torch.full((*x_t.shape, V), 0.7))


def level_network(nats_at: Callable[[Tensor], Tensor]) -> diffusion.Model:
    """CE(m) = nats_at(m) on texts of zeros: two symbols, the right one having probability exp(-nats)."""

    def logits_of(x_t: Tensor) -> Tensor:
        right = torch.exp(-nats_at((x_t == MASK).sum(1).double()))
        return torch.stack([right, 1 - right], -1).log()[:, None].expand(-1, x_t.size(1), -1)

    return network(logits_of)


def some_curve(m: Tensor) -> Tensor:
    """An arbitrary CE(m), steep and not monotonic."""
    return 0.3 + (m - 2.5) ** 2 / 9 + 1 / (m + 1)


def scrambled_network(T: int, V: int = 5) -> diffusion.Model:
    """Arbitrary logits, in which every token of a row matters at every place of that row."""
    mix = torch.randn(T, T, generator=rng(1))
    table = torch.randn(MASK + 1, V, generator=rng(2))
    return network(lambda x_t: torch.einsum("ts,bsv->btv", mix, table[x_t]))


class Joint:
    """A correlated distribution over all texts of T tokens of V symbols, small enough to sum over."""

    def __init__(self, T: int = 3, V: int = 3):
        self.T, self.V = T, V
        self.texts = torch.cartesian_prod(*[torch.arange(V)] * T)  # (V^T,T)
        self.p = torch.randn(len(self.texts), generator=rng(7), dtype=torch.float64).mul(1.5).softmax(0)
        self.one_hot = torch.nn.functional.one_hot(self.texts, V).double()  # (V^T,T,V)

    def sample(self, B: int, seed: int = 0) -> Tensor:
        return self.texts[torch.multinomial(self.p, B, replacement=True, generator=rng(seed))]

    def entropy(self, first: int | None = None) -> float:
        """In nats, of the first tokens or of all."""
        if first == 0:
            return 0.0
        _, which = self.texts[:, :first].unique(dim=0, return_inverse=True)
        marginal = torch.zeros(len(self.texts)).double().index_add(0, which, self.p)
        return -torch.special.xlogy(marginal, marginal).sum().item()

    def conditionals(self, x_t: Tensor) -> Tensor:
        """log P(token at t = v | everything visible), by summing the table: (B,T,V)."""
        agrees = ((x_t[:, None] == self.texts) | (x_t[:, None] == MASK)).all(-1)  # (B,V^T)
        weight = agrees * self.p
        return (torch.einsum("bs,stv->btv", weight, self.one_hot) / weight.sum(1)[:, None, None]).log()

    def exact(self) -> diffusion.Model:
        return network(self.conditionals)

    def independent(self) -> diffusion.Model:
        """The best model that ignores context: the marginal of each place."""
        marginals = torch.einsum("s,stv->tv", self.p, self.one_hot).log()
        return network(lambda x_t: marginals.expand(len(x_t), -1, -1))

    def left_to_right(self) -> diffusion.Model:
        """A causal network: at place t of [start, x_0, x_1, ..] it gives log P(x_t = v | x_0 .. x_(t-1))."""

        def logits_of(inputs: Tensor) -> Tensor:
            before = torch.cat([inputs[:, 1:], torch.full_like(inputs[:, :1], MASK)], 1)
            visible = torch.arange(self.T)
            return torch.stack(
                [self.conditionals(before.where(visible < t, MASK))[:, t] for t in range(self.T)], 1
            )

        return network(logits_of)

    def every_question(self, x_0: Tensor, p: Tensor, prefix_length: int = 0) -> Batch:
        """All masks of all given texts, weighted so that `loss` is the exact NELBO averaged under p.

        (1/N) sum_m CE(m), CE(m) being a mean over the C(N,m) masks and over the m tokens each hides.
        """
        N = self.T - prefix_length
        inputs, positions, weights = [], [], []
        for m in range(1, N + 1):
            for places in itertools.combinations(range(prefix_length, self.T), m):
                positions += [(len(inputs) + b) * self.T + t for b in range(len(x_0)) for t in places]
                weights.append((p / (N * math.comb(N, m) * m)).repeat_interleave(m))
                inputs += x_0.index_fill(1, torch.tensor(places), MASK).tolist()
        targets = x_0.repeat(len(inputs) // len(x_0), 1).flatten()[positions]
        return Batch(torch.tensor(inputs), torch.tensor(positions), targets, torch.cat(weights).float())


# ---- keyed randomness -----------------------------------------------------------------------------


def test_keyed_generator_repeats_itself_whatever_was_drawn_in_between():
    first = torch.rand(5, generator=keyed_generator(1, 2, "noise"))
    torch.manual_seed(99)
    torch.rand(1000)
    assert torch.equal(first, torch.rand(5, generator=keyed_generator(1, 2, "noise")))


def test_keyed_generator_tells_every_seed_step_and_purpose_apart():
    keys = itertools.product([0, 1, 2, 12, 123], [0, 1, 2, 3, 23], ["noise", "data", "1", "2"])
    first_draws = {torch.rand(1, generator=keyed_generator(*key)).double().item() for key in keys}
    assert len(first_draws) == 5 * 5 * 4


# ---- how many tokens are hidden -------------------------------------------------------------------


@pytest.mark.parametrize("mask_ratio", CDF)
@pytest.mark.parametrize("B, N", [(1, 1), (1, 7), (2, 1), (5, 3), (8, 64), (31, 10)])
def test_counts_are_between_1_and_N(B, N, mask_ratio):
    counts = torch.stack([draw_num_masked(B, N, rng(s), mask_ratio=mask_ratio) for s in range(50)])
    assert counts.shape == (50, B) and counts.dtype == torch.int64
    assert counts.min() >= 1 and counts.max() <= N


def marginals(B: int, N: int, draws: int = 1000, **options) -> Tensor:
    """(B,N): how often each row hid each count over independent draws."""
    counts = torch.stack([draw_num_masked(B, N, rng(seed), **options) for seed in range(draws)])
    return torch.stack([torch.bincount(row, minlength=N + 1)[1:] for row in counts.T])


@pytest.mark.parametrize("B, N", [(1, 6), (5, 6), (4, 7)])
def test_every_row_hides_every_count_equally_often(B, N):
    for row in marginals(B, N):
        assert goodness_of_fit(row, torch.full((N,), 1 / N)) > 1e-3


@pytest.mark.parametrize("mask_ratio", ["bell", square])
def test_every_row_follows_the_mask_ratio_distribution(mask_ratio):
    probabilities = CDF[mask_ratio](torch.arange(7) / 6).diff()
    for row in marginals(5, 6, mask_ratio=mask_ratio):
        assert goodness_of_fit(row, probabilities) > 1e-3


@pytest.mark.parametrize("mask_ratio", ["uniform", "bell", middle])
@pytest.mark.parametrize("B, N", [(2, 5), (9, 10), (32, 1024)])
def test_antithetic_pairs_hide_N_plus_1_together(B, N, mask_ratio):
    for seed in range(50):
        counts = draw_num_masked(B, N, rng(seed), mask_ratio=mask_ratio)
        pairs = counts[: B // 2 * 2].view(-1, 2)
        assert (pairs.sum(1) == N + 1).all()


@pytest.mark.parametrize("N", [1, 2, 7, 100])
def test_a_batch_of_2N_rows_hides_every_count_exactly_twice(N):
    for seed in range(20):
        counts = draw_num_masked(2 * N, N, rng(seed))
        for rows in (counts[::2], counts[1::2]):
            assert rows.sort().values.tolist() == list(range(1, N + 1))


def test_a_small_batch_spreads_over_the_levels_evenly():
    # 8 pairs over 64 counts: one draw in each eighth, all at the same place of it, so 8 apart.
    for seed in range(20):
        counts = draw_num_masked(16, 64, rng(seed))
        for rows in (counts[::2], counts[1::2]):
            assert rows.sort().values.diff().tolist() == [8] * 7


def test_strata_of_an_asymmetric_distribution_are_exact_too():
    # CDF t^2: q(k) = (2k-1)/N^2, so N^2 strata hold count k exactly 2k-1 times.
    counts = draw_num_masked(25, 5, rng(), mask_ratio=square)
    assert torch.bincount(counts).tolist() == [0, 1, 3, 5, 7, 9]


def test_a_distribution_of_ones_own_is_followed():
    counts = torch.cat([draw_num_masked(6, 10, rng(seed), mask_ratio=middle) for seed in range(100)])
    assert counts.unique().tolist() == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("N", [10, 24, 100, 1024])
def test_ten_levels_hide_only_tenths_in_even_rows_and_pairs_add_up(N):
    tenths = [round(k * N / 10) for k in range(1, 11)]
    for seed in range(20):
        counts = draw_num_masked(20, N, rng(seed), mask_levels=10)
        assert counts[::2].sort().values.tolist() == tenths  # ten pairs: each level once
        assert (counts.view(-1, 2).sum(1) == N + round(N / 10)).all()
        assert counts.min() >= 1 and counts.max() <= N


@pytest.mark.parametrize("mask_ratio", ["uniform", "bell"])
@pytest.mark.parametrize("levels", [3, 10])
def test_level_probabilities_are_the_increases_of_the_cdf(mask_ratio, levels):
    # By hand: the uniform CDF grows by 1/L; the bell's density 6t(1-t) is integrated by the midpoint rule.
    grid = (torch.arange(levels * 10000).double() + 0.5) / (levels * 10000)
    density = torch.ones_like(grid) if mask_ratio == "uniform" else 6 * grid * (1 - grid)
    expected = density.view(levels, -1).sum(1) / len(grid)
    torch.testing.assert_close(diffusion.level_probabilities(levels, mask_ratio), expected, atol=1e-8, rtol=0)


# ---- which tokens are hidden ----------------------------------------------------------------------


@pytest.mark.parametrize("prefix_length", [0, 3])
def test_a_mask_hides_exactly_the_asked_number_and_never_the_prefix(prefix_length):
    num_masked = torch.arange(1, 11 - prefix_length)
    for seed in range(50):
        mask = draw_mask(num_masked, 10, prefix_length, rng(seed))
        assert torch.equal(mask.sum(1), num_masked)
        assert not mask[:, :prefix_length].any()


@pytest.mark.parametrize("T, prefix_length, m", [(5, 0, 2), (6, 2, 2), (6, 0, 3), (5, 1, 1)])
def test_every_subset_is_equally_likely(T, prefix_length, m):
    mask = draw_mask(torch.full((20000,), m), T, prefix_length, rng())
    subsets, observed = mask.unique(dim=0, return_counts=True)
    expected = math.comb(T - prefix_length, m)
    assert len(subsets) == expected
    assert goodness_of_fit(observed, torch.full((expected,), 1 / expected)) > 1e-3


def test_every_place_of_a_long_row_is_hidden_equally_often():
    T, B, m = 50, 4000, 15
    hidden = corrupt(tokens(B, T), MASK, rng(), objective="mlm", mlm_ratio=m / T).inputs == MASK
    # Drawing m of T without replacement: variance m/T (1 - m/T) a row, and the T counts sum to a constant,
    # which scales the usual statistic by (T-1)/T.
    spread = ((hidden.sum(0) - B * m / T) ** 2).sum() / (B * m / T * (1 - m / T))
    assert chi_square_p(spread.item() * (T - 1) / T, T - 1) > 1e-3


def test_corrupt_hides_every_subset_of_a_count_equally_often():
    B, T = 24000, 4  # 6000 rows hide each count, by the strata; their subsets are C(4,m) cells each
    hidden = corrupt(tokens(B, T), MASK, rng()).inputs == MASK
    for m in (1, 2, 3):
        _, observed = hidden[hidden.sum(1) == m].unique(dim=0, return_counts=True)
        assert observed.sum() == B / T and len(observed) == math.comb(T, m)
        assert goodness_of_fit(observed, torch.full((len(observed),), 1 / len(observed))) > 1e-3


def test_rows_of_a_batch_hide_different_shares():
    hidden = corrupt(tokens(16, 64), MASK, rng()).inputs == MASK
    assert len(hidden.sum(1).unique()) >= 8  # eight strata, so at least eight counts; one ratio would give 1


# ---- the question asked ---------------------------------------------------------------------------

SETTINGS = {
    "default": {},
    "bell": {"mask_ratio": "bell"},
    "asymmetric": {"mask_ratio": square},
    "middle": {"mask_ratio": middle, "weighting": "token"},
    "token weights": {"weighting": "token"},
    "ten levels": {"mask_levels": 10},
    "ten asymmetric levels": {"mask_levels": 10, "mask_ratio": square},
    "prefix": {"prefix_length": 7},
    "drawn prefix": {"prefix_length": 2, "prefix_length_max": 9},
    "asymmetric, any prefix": {"mask_ratio": square, "prefix_length_max": 19},
    "mlm": {"objective": "mlm"},
    "mlm with a drawn prefix": {"objective": "mlm", "prefix_length_max": 9},
    "autoregressive": {"objective": "autoregressive"},
}
MASKED = [name for name in SETTINGS if name != "autoregressive"]


@pytest.mark.parametrize("B", [1, 6, 7])
@pytest.mark.parametrize("setting", SETTINGS)
def test_number_of_predictions_is_one_constant(setting, B):
    x_0 = tokens(B, 20)
    sizes = set()
    for seed in range(100):
        batch = corrupt(x_0, MASK, rng(seed), **SETTINGS[setting])
        assert batch.inputs.shape == (B, 20)
        assert batch.positions.shape == batch.targets.shape == batch.weights.shape
        sizes.add(len(batch.positions))
    assert len(sizes) == 1


@pytest.mark.parametrize(
    "setting, predictions", [("default", 63), ("bell", 63), ("ten levels", 66), ("prefix", 42)]
)
def test_pairs_need_no_padding(setting, predictions):
    # Three pairs of N+1 = 21 each; ten levels of 20 tokens: 20 + 2; after a prefix of 7: 13 + 1.
    batch = corrupt(tokens(6, 20), MASK, rng(), **SETTINGS[setting])
    assert len(batch.positions) == predictions and (batch.weights > 0).all()


@pytest.mark.parametrize("B", [1, 6, 7])
@pytest.mark.parametrize("setting", MASKED)
def test_what_counts_is_exactly_what_is_hidden(setting, B):
    x_0 = tokens(B, 20)
    for seed in range(20):
        inputs, positions, targets, weights = corrupt(x_0, MASK, rng(seed), **SETTINGS[setting])
        hidden = (inputs == MASK).flatten()
        asked = positions[weights > 0]
        assert sorted(asked.tolist()) == hidden.nonzero().flatten().tolist()  # each hidden place once
        assert torch.equal(targets, x_0.flatten()[positions])
        assert torch.equal(inputs.flatten()[~hidden], x_0.flatten()[~hidden])
        assert (weights >= 0).all() and inputs.dtype == targets.dtype == torch.int64


def test_the_clean_tokens_are_left_untouched():
    x_0 = tokens(6, 20)
    before = x_0.clone()
    for options in SETTINGS.values():
        corrupt(x_0, MASK, rng(), **options)
    assert torch.equal(x_0, before)


@pytest.mark.parametrize("setting", SETTINGS)
def test_same_generator_seed_same_question(setting):
    x_0 = tokens(6, 20)
    first, again = (corrupt(x_0, MASK, rng(3), **SETTINGS[setting]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("B", [6, 7])
@pytest.mark.parametrize("prefix_length", [1, 5, 19])
def test_a_prefix_is_never_hidden_and_all_the_rest_can_be(B, prefix_length):
    hidden = torch.stack(
        [corrupt(tokens(B, 20), MASK, rng(s), prefix_length=prefix_length).inputs == MASK for s in range(60)]
    )
    assert hidden.any(0).any(0).tolist() == [t >= prefix_length for t in range(20)]


def test_a_drawn_prefix_has_every_length_of_its_range_equally_often():
    # Ten rows are five strata, at most five tokens are maskable: some row hides all of them, so the first
    # hidden place of the batch is the prefix length.
    lengths = torch.zeros(6, dtype=torch.int64)
    for seed in range(600):
        batch = corrupt(tokens(10, 6), MASK, rng(seed), prefix_length=1, prefix_length_max=4)
        hidden = (batch.inputs == MASK).any(0)
        lengths[hidden.long().argmax()] += 1
    assert lengths[0] == lengths[5] == 0
    assert goodness_of_fit(lengths[1:5], torch.full((4,), 0.25)) > 1e-3


def test_padding_changes_nothing_in_the_loss():
    model = scrambled_network(20)
    for setting, B in [("asymmetric", 6), ("drawn prefix", 6), ("default", 7)]:
        for seed in range(5):
            batch = corrupt(tokens(B, 20), MASK, rng(seed), **SETTINGS[setting])
            real = batch.weights > 0
            unpadded = Batch(batch.inputs, *(field[real] for field in batch[1:]))
            assert loss(model, batch).item() == pytest.approx(loss(model, unpadded).item(), rel=1e-5)


@pytest.mark.parametrize("mlm_ratio", [0.15, 0.5, 1.0])
@pytest.mark.parametrize("prefix_length", [0, 7])
def test_mlm_hides_the_same_rounded_share_in_every_row(mlm_ratio, prefix_length):
    m = round(mlm_ratio * (20 - prefix_length))  # 3, 10, 20 of 20; 2, 6, 13 of 13
    batch = corrupt(
        tokens(7, 20), MASK, rng(), objective="mlm", mlm_ratio=mlm_ratio, prefix_length=prefix_length
    )
    assert (batch.inputs == MASK).sum(1).tolist() == [m] * 7
    torch.testing.assert_close(batch.weights, torch.full((7 * m,), 1 / (7 * m)))


def test_autoregressive_shifts_by_one_and_asks_for_everything():
    x_0 = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    batch = corrupt(x_0, MASK, rng(), objective="autoregressive")
    assert batch.inputs.tolist() == [[MASK, 1, 2, 3], [MASK, 4, 3, 2]]
    assert batch.positions.tolist() == list(range(8))
    assert batch.targets.tolist() == [1, 2, 3, 4, 4, 3, 2, 1]
    torch.testing.assert_close(batch.weights, torch.full((8,), 1 / 8))


# ---- weights and the loss -------------------------------------------------------------------------


def row_of(batch: Batch) -> Tensor:
    return batch.positions // batch.inputs.size(1)


@pytest.mark.parametrize("B", [1, 6, 7])
@pytest.mark.parametrize("setting", ["default", "ten levels", "prefix", "drawn prefix"])
def test_nelbo_weights_are_one_over_B_m_so_each_row_counts_one_over_B(setting, B):
    # 1/t up to the constant N, and not 1/(1-t): a row that hides much has light tokens.
    batch = corrupt(tokens(B, 20), MASK, rng(), **SETTINGS[setting])
    m = (batch.inputs == MASK).sum(1)
    real = batch.weights > 0
    torch.testing.assert_close(batch.weights[real], 1 / (B * m[row_of(batch)][real]))
    by_row = torch.zeros(B).index_add(0, row_of(batch), batch.weights)
    torch.testing.assert_close(by_row, torch.full((B,), 1 / B))


@pytest.mark.parametrize("B", [6, 7])
def test_token_weights_are_equal_and_sum_to_1(B):
    batch = corrupt(tokens(B, 20), MASK, rng(), weighting="token")
    real = batch.weights[batch.weights > 0]
    assert (real == real[0]).all() and len(real) == (batch.inputs == MASK).sum()
    assert real.sum().item() == pytest.approx(1, rel=1e-6)


def test_importance_weights_are_one_over_B_N_q_m():
    # q(k) of the bell for N = 8: (12k^2 - k^3)/256 is its CDF at k/8.
    cdf = torch.tensor([(12 * k**2 - k**3) / 256 for k in range(9)])
    batch = corrupt(tokens(6, 8), MASK, rng(), mask_ratio="bell")
    m = (batch.inputs == MASK).sum(1)[row_of(batch)]
    torch.testing.assert_close(batch.weights, 1 / (6 * 8 * cdf.diff()[m - 1] * m))


@pytest.mark.parametrize("T", [1, 4, 32])
@pytest.mark.parametrize("B", [1, 2, 7, 16])
def test_a_constant_cross_entropy_is_the_loss(B, T):
    # Dividing by the number of masked tokens on top of 1/t would give about twice this, shrinking with T.
    constant = level_network(lambda m: torch.full_like(m, 1.25))
    batch = corrupt(torch.zeros(B, T, dtype=torch.int64), MASK, rng())
    assert loss(constant, batch).item() == pytest.approx(1.25, rel=1e-6)


# N = 8 and B such that the strata hold every level exactly in proportion: then one batch's loss *is* its
# expectation. uniform: 8 pairs; bell: q(k) is a multiple of 1/256; square (no pairs): of 1/64.
ONCE_AROUND = {"uniform": 16, "bell": 512, square: 64}


@pytest.mark.parametrize("weighting", ["nelbo", "token"])
@pytest.mark.parametrize("mask_ratio", ONCE_AROUND)
def test_expected_loss_of_each_weighting_is_its_sum_over_levels(mask_ratio, weighting):
    m = torch.arange(1, 9).double()
    q, CE = CDF[mask_ratio](torch.arange(9).double() / 8).diff(), some_curve(m)
    expected = {
        "nelbo": CE.mean(),  # whatever q: the importance weights undo it
        "token": (q * m * CE).sum() / (q * m).sum(),  # weighs level m by m
    }[weighting]
    x_0 = torch.zeros(ONCE_AROUND[mask_ratio], 8, dtype=torch.int64)
    batch = corrupt(x_0, MASK, rng(), mask_ratio=mask_ratio, weighting=weighting)
    assert loss(level_network(some_curve), batch).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("B", [4, 5])
def test_importance_weighted_loss_of_small_batches_has_no_bias(B):
    x_0 = torch.zeros(B, 8, dtype=torch.int64)
    model = level_network(some_curve)
    draws = torch.stack([loss(model, corrupt(x_0, MASK, rng(s), mask_ratio="bell")) for s in range(400)])
    expected = some_curve(torch.arange(1, 9).double()).mean()
    assert draws.std() > 0.05  # single batches do scatter
    assert abs(draws.mean() - expected) < 3 * draws.std() / len(draws) ** 0.5


@pytest.mark.parametrize("N", [14, 20, 24])
@pytest.mark.parametrize("mask_ratio, B", [("uniform", 20), ("bell", 1000)])
def test_ten_levels_price_the_ten_step_sampler(mask_ratio, B, N):
    # NELBO_10 = (1/10) sum of CE(kN/10). Ten pairs hold each level once; 500 pairs hold the bell's q(k),
    # multiples of 1/500, exactly. Partners hide N + round(N/10) - m: the same ten levels where 10 divides N.
    tenths = torch.tensor([round(k * N / 10) for k in range(1, 11)]).double()
    expected = (some_curve(tenths).mean() + some_curve(N + round(N / 10) - tenths).mean()) / 2
    batch = corrupt(torch.zeros(B, N, dtype=torch.int64), MASK, rng(), mask_levels=10, mask_ratio=mask_ratio)
    assert loss(level_network(some_curve), batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_loss_is_the_weighted_cross_entropy_and_has_its_gradient():
    table = torch.randn(3 * 4, 5, generator=rng(), requires_grad=True)
    batch = Batch(
        torch.zeros(3, 4, dtype=torch.int64),
        torch.tensor([0, 5, 6, 11]),
        torch.tensor([4, 0, 2, 2]),
        torch.tensor([0.5, 0.25, 0.0, 2.0]),
    )
    value = loss(network(lambda x_t: table.view(3, 4, 5)), batch)
    value.backward()
    p = table.detach()[batch.positions].softmax(-1)
    right = torch.nn.functional.one_hot(batch.targets, 5)
    assert value.item() == pytest.approx(-(batch.weights * (p * right).sum(-1).log()).sum().item(), rel=1e-5)
    expected = torch.zeros(12, 5)
    expected[batch.positions] = batch.weights[:, None] * (p - right)  # d CE / d logits = softmax - one-hot
    torch.testing.assert_close(table.grad, expected)


# ---- micro-batches --------------------------------------------------------------------------------

CAN_SPLIT = [("default", 8, 4), ("default", 8, 2), ("default", 7, 1), ("bell", 6, 3), ("ten levels", 8, 4)]
CAN_SPLIT += [("drawn prefix", 8, 4), ("asymmetric", 6, 3), ("token weights", 8, 2), ("mlm", 6, 6)]
CAN_SPLIT += [("autoregressive", 6, 6)]


def assert_parts_make_the_whole(parts: list[Batch], whole: Batch, masked: bool) -> None:
    B, T = whole.inputs.shape
    assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
    assert len({part.positions.shape for part in parts}) == 1  # equal work
    for part in parts:
        assert part.inputs.shape == (B // len(parts), T)
        if masked:  # positions count from the part's own first row: they are its hidden places
            hidden = (part.inputs == MASK).flatten().nonzero().flatten()
            assert sorted(part.positions[part.weights > 0].tolist()) == hidden.tolist()
    model = scrambled_network(T)
    in_parts = sum(loss(model, part).item() for part in parts)
    assert in_parts == pytest.approx(loss(model, whole).item(), rel=1e-5)


@pytest.mark.parametrize("setting, B, number", CAN_SPLIT)
def test_losses_of_the_parts_add_up_to_the_whole(setting, B, number):
    for seed in range(10):
        batch = corrupt(tokens(B, 20), MASK, rng(seed), **SETTINGS[setting])
        parts = batch.split(number)
        assert len(parts) == number
        assert_parts_make_the_whole(parts, batch, setting in MASKED)


@pytest.mark.parametrize("T", [19, 20])  # an odd T: half a pair's predictions, (T+1)/2, is a whole number
@pytest.mark.parametrize("setting", ["default", "ten levels", "drawn prefix", "asymmetric"])
@pytest.mark.parametrize("number", [2, 3, 4, 6])
def test_a_split_is_refused_or_right_even_where_it_would_tear_pairs_apart(number, setting, T):
    for seed in range(5):
        batch = corrupt(tokens(6, T), MASK, rng(seed), **SETTINGS[setting])
        try:
            parts = batch.split(number)
        except ValueError:
            continue
        assert_parts_make_the_whole(parts, batch, masked=True)


@pytest.mark.parametrize("number", [-1, 0, 4, 5, 7])
def test_splitting_into_an_impossible_number_of_parts_is_refused(number):
    with pytest.raises(ValueError):
        corrupt(tokens(6, 20), MASK, rng()).split(number)


# ---- arguments that make no sense -----------------------------------------------------------------


@pytest.mark.parametrize(
    "N, options", [(0, {}), (-3, {}), (4, {"mask_levels": -1}), (4, {"mask_ratio": "flat"})], ids=str
)
def test_draw_num_masked_refuses(N, options):
    with pytest.raises(ValueError):
        draw_num_masked(4, N, rng(), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "difusion"},
        {"weighting": "tokens"},
        {"mask_ratio": "flat"},
        {"mask_ratio": middle},  # some levels are never drawn: no weight makes that the NELBO
        {"mask_levels": -1},
        {"prefix_length": -1},
        {"prefix_length": 20},
        {"prefix_length": 5, "prefix_length_max": 4},
        {"prefix_length_max": 20},
        {"objective": "mlm", "mlm_ratio": -0.1},
        {"objective": "mlm", "mlm_ratio": 1.5},
    ],
    ids=str,
)
def test_corrupt_refuses(options):
    with pytest.raises(ValueError):
        corrupt(tokens(4, 20), MASK, rng(), **options)


def test_arguments_are_refused_at_every_draw_of_the_prefix_or_at_none():
    # With 1 to 20 maskable tokens, some draws leave too few for ten levels: a run must not die of that later.
    accepted = set()
    for seed in range(100):
        try:
            corrupt(tokens(4, 20), MASK, rng(seed), prefix_length_max=19, mask_levels=10)
            accepted.add(True)
        except ValueError:
            accepted.add(False)
    assert len(accepted) == 1


@pytest.mark.parametrize(
    "options", [{"prefix_length": -1}, {"prefix_length": 20}, {"batch_size": 0}, {"batch_size": -1}], ids=str
)
def test_nelbo_refuses(options):
    with pytest.raises(ValueError):
        nelbo(uniform_network(5), tokens(4, 20), MASK, **options)


def test_evaluate_refuses_an_unknown_objective():
    with pytest.raises(ValueError):
        evaluate(uniform_network(5), tokens(4, 20), MASK, objective="autoregresive")


# ---- the bound ------------------------------------------------------------------------------------


@pytest.mark.parametrize("V", [2, 257])
@pytest.mark.parametrize(
    "B, T, prefix_length", [(64, 20, 0), (33, 20, 5), (1, 20, 0), (3, 1, 0), (5, 20, 19)]
)
def test_nelbo_of_a_uniform_model_is_ln_V(V, B, T, prefix_length):
    bound = nelbo(uniform_network(V), tokens(B, T, V=2), MASK, prefix_length)
    assert bound.nats == pytest.approx(math.log(V), rel=1e-6)
    measured = [nats for nats in bound.curve.nats if not math.isnan(nats)]
    assert measured and measured == pytest.approx([math.log(V)] * len(measured), rel=1e-6)


@pytest.mark.parametrize("T, prefix_length", [(3, 0), (4, 0), (4, 1), (4, 3)])
def test_average_over_all_masks_and_texts_is_the_entropy_exactly(T, prefix_length):
    # The identity behind everything: if the conditionals are exact, the NELBO is the (conditional) entropy.
    joint = Joint(T)
    batch = joint.every_question(joint.texts, joint.p, prefix_length)
    entropy = (joint.entropy() - joint.entropy(prefix_length)) / (T - prefix_length)
    assert loss(joint.exact(), batch).item() == pytest.approx(entropy, rel=1e-5)


@pytest.mark.parametrize("T, prefix_length", [(3, 0), (4, 0), (4, 1), (4, 3)])
def test_nelbo_of_exact_conditionals_is_the_entropy(T, prefix_length):
    joint = Joint(T)
    bound = nelbo(joint.exact(), joint.sample(6000), MASK, prefix_length, batch_size=1000)
    entropy = (joint.entropy() - joint.entropy(prefix_length)) / (T - prefix_length)
    assert bound.stderr < 0.02
    assert abs(bound.nats - entropy) < 3 * bound.stderr


@pytest.mark.parametrize("B", [20, 21])
@pytest.mark.parametrize("mask_ratio", CDF)
def test_mean_training_loss_of_exact_conditionals_is_the_entropy(mask_ratio, B):
    joint = Joint(3)
    questions = (corrupt(joint.sample(B, s), MASK, rng(5000 + s), mask_ratio=mask_ratio) for s in range(200))
    draws = torch.stack([loss(joint.exact(), batch) for batch in questions])
    stderr = draws.std() / len(draws) ** 0.5
    assert stderr < 0.03
    assert abs(draws.mean() - joint.entropy() / 3) < 3 * stderr


def test_a_model_that_ignores_context_has_the_mean_marginal_entropy_which_is_larger():
    joint = Joint(4)
    marginals = torch.einsum("s,stv->tv", joint.p, joint.one_hot)
    expected = -torch.special.xlogy(marginals, marginals).sum().item() / 4
    batch = joint.every_question(joint.texts, joint.p)
    assert loss(joint.independent(), batch).item() == pytest.approx(expected, rel=1e-5)
    bound = nelbo(joint.independent(), joint.sample(6000), MASK, batch_size=1000)
    assert abs(bound.nats - expected) < 3 * bound.stderr
    assert expected > joint.entropy() / 4 + 5 * bound.stderr


@pytest.mark.parametrize("doubt", [0.1, 0.5, 0.9])
def test_a_wrong_model_has_a_larger_bound(doubt):
    joint = Joint(3)
    wrong = network(lambda x_t: ((1 - doubt) * joint.conditionals(x_t).exp() + doubt / joint.V).log())
    batch = joint.every_question(joint.texts, joint.p)
    assert loss(wrong, batch).item() > joint.entropy() / 3 + 0.001
    x_0 = joint.sample(2000)
    assert nelbo(wrong, x_0, MASK).nats > nelbo(joint.exact(), x_0, MASK).nats


@pytest.mark.parametrize("B", [1, 3, 4])
@pytest.mark.parametrize("prefix_length", [0, 2])
def test_nelbo_of_few_texts_has_no_bias(B, prefix_length):
    joint = Joint(4)
    x_0 = joint.sample(B)
    exact = loss(joint.exact(), joint.every_question(x_0, torch.full((B,), 1 / B), prefix_length)).item()
    draws = torch.tensor([nelbo(joint.exact(), x_0, MASK, prefix_length, seed=s).nats for s in range(200)])
    assert draws.std() > 0.01  # the masks do differ from seed to seed
    assert abs(draws.mean() - exact) < 3 * draws.std() / 200**0.5


def test_standard_error_is_the_scatter_of_the_estimate():
    joint = Joint(3)
    bounds = [nelbo(joint.exact(), joint.sample(50, seed), MASK, seed=seed) for seed in range(200)]
    z = torch.tensor([(bound.nats - joint.entropy() / 3) / bound.stderr for bound in bounds])
    # 1 if counts and masks were drawn independently; the strata make it a little smaller, never larger.
    assert 0.7 < z.pow(2).mean().sqrt() < 1.15


@pytest.mark.parametrize("N", [1, 7, 40])
def test_nelbo_of_two_texts_per_count_is_the_mean_height_of_the_curve_exactly(N):
    bound = nelbo(level_network(some_curve), torch.zeros(2 * N, N, dtype=torch.int64), MASK)
    assert bound.nats == pytest.approx(some_curve(torch.arange(1, N + 1).double()).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    "T, prefix_length, curve_points", [(20, 0, 10), (20, 3, 10), (64, 0, 33), (5, 0, 10), (20, 0, 1)]
)
def test_curve_is_the_cross_entropy_at_increasing_counts_from_1_to_N(T, prefix_length, curve_points):
    x_0 = torch.zeros(200, T, dtype=torch.int64)
    curve = nelbo(level_network(some_curve), x_0, MASK, prefix_length, curve_points=curve_points).curve
    assert curve.N == T - prefix_length
    assert curve.counts[0] == 1 and curve.counts[-1] == curve.N
    assert curve.counts == sorted(set(curve.counts))
    assert min(curve_points, curve.N) <= len(curve.counts) <= curve_points + 1
    expected = some_curve(torch.tensor(curve.counts).double()).tolist()
    assert curve.nats == pytest.approx(expected, rel=1e-5)
    assert curve.stderr == pytest.approx([0] * len(curve.counts), abs=1e-6)  # all rows of a count agree


def test_curve_of_exact_conditionals_is_the_mean_conditional_entropy():
    joint = Joint(3)
    curve = nelbo(joint.exact(), joint.sample(6000), MASK, batch_size=1000).curve
    assert curve.counts == [1, 2, 3]
    # CE(m): average over the subsets hidden and over the tokens in them, by enumeration
    batch = joint.every_question(joint.texts, joint.p)
    m = (batch.inputs == MASK).sum(1)[row_of(batch)]
    for count, nats, stderr in zip(curve.counts, curve.nats, curve.stderr, strict=True):
        only = batch._replace(weights=batch.weights * (m == count) * 3)
        assert stderr < 0.03
        assert abs(nats - loss(joint.exact(), only).item()) < 3 * stderr


@pytest.mark.parametrize("B", [4, 7, 20, 21])
def test_few_texts_give_a_shorter_curve_with_at_least_two_texts_a_count(B):
    curve = nelbo(level_network(some_curve), torch.zeros(B, 20, dtype=torch.int64), MASK).curve
    assert curve.counts[0] == 1 and curve.counts[-1] == 20 and len(curve.counts) <= B // 2
    assert curve.counts == sorted(set(curve.counts))
    assert curve.nats == pytest.approx(some_curve(torch.tensor(curve.counts).double()).tolist(), rel=1e-5)
    assert not any(math.isnan(stderr) for stderr in curve.stderr)


def test_same_seed_same_bound_to_the_last_bit_and_another_seed_another():
    joint = Joint(4)
    x_0 = joint.sample(101)
    first, again, other = (nelbo(joint.exact(), x_0, MASK, seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert first.nats != other.nats and first.curve.nats != other.curve.nats


def test_two_models_are_asked_the_same_questions():
    joint, seen = Joint(4), []

    def spy(logits_of):
        seen.append([])
        return network(lambda x_t: (seen[-1].append(x_t), logits_of(x_t))[1])

    x_0 = joint.sample(50)
    nelbo(spy(joint.conditionals), x_0, MASK)
    nelbo(spy(lambda x_t: torch.zeros(*x_t.shape, 3)), x_0, MASK)
    assert len(seen[0]) > 1 and torch.equal(torch.cat(seen[0]), torch.cat(seen[1]))


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_bound_does_not_depend_on_the_batch_size(batch_size):
    joint = Joint(4)
    x_0 = joint.sample(51)
    one, other = (nelbo(joint.exact(), x_0, MASK, batch_size=size) for size in (32, batch_size))
    assert other[:2] == pytest.approx(one[:2], rel=1e-6)
    assert other.curve.counts == one.curve.counts
    assert other.curve.nats == pytest.approx(one.curve.nats, rel=1e-6)
    assert other.curve.stderr == pytest.approx(one.curve.stderr, rel=1e-5)


def test_measuring_leaves_the_global_random_state_alone():
    joint = Joint(3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    evaluate(joint.exact(), joint.sample(20), MASK)
    evaluate(joint.left_to_right(), joint.sample(20), MASK, objective="autoregressive")
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluate_of_a_diffusion_model_is_the_bound():
    joint = Joint(3)
    x_0 = joint.sample(40)
    assert evaluate(joint.exact(), x_0, MASK) == nelbo(joint.exact(), x_0, MASK)


@pytest.mark.parametrize("B", [2, 50, 101])
def test_evaluate_autoregressive_is_the_exact_log_likelihood_by_the_chain_rule(B):
    joint = Joint(4)
    x_0 = joint.sample(B)
    which = (x_0 * torch.tensor([27, 9, 3, 1])).sum(1)  # the row of a text in the table
    assert torch.equal(joint.texts[which], x_0)
    nats = -joint.p[which].log() / 4  # per token
    result = evaluate(joint.left_to_right(), x_0, MASK, objective="autoregressive")
    assert result.nats == pytest.approx(nats.mean().item(), rel=1e-5)
    assert result.stderr == pytest.approx((nats.std() / B**0.5).item(), rel=1e-4)
    assert result.curve is None
