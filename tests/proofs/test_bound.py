"""The bound: if the conditionals are exact, NELBO = entropy; its error bars and curve are right."""

import itertools
import math

import pytest
import torch
from oracles import EXACT, JOINT, Causal, Exact, Fixed, T, V, levels, seeded, some_curve
from torch import Tensor

from diffusion import Batch, Bound, Masking, corrupt, evaluate, loss, nelbo

SOFT = Exact(JOINT, poison=False)


def every_question(x_0: Tensor, p: Tensor, prefix_length: int = 0) -> Batch:
    """All masks of all given texts, weighted so that `loss` is the exact NELBO averaged under p.

    (1/N) sum_m CE(m), CE(m) a mean over the C(N,m) masks and over the m tokens that each hides.
    """
    N = T - prefix_length
    inputs, positions, weights = [], [], []
    for m in range(1, N + 1):
        for hidden in itertools.combinations(range(prefix_length, T), m):
            positions += [(len(inputs) + b) * T + t for b in range(len(x_0)) for t in hidden]
            weights.append((p / (N * math.comb(N, m) * m)).repeat_interleave(m))
            inputs += x_0.index_fill(1, torch.tensor(hidden), V).tolist()
    targets = x_0.repeat(len(inputs) // len(x_0), 1).flatten()[positions]
    return Batch(torch.tensor(inputs), torch.tensor(positions), targets, torch.cat(weights))


EVERYTHING = every_question(EXACT.texts, EXACT.p)


def entropy(prefix_length: int = 0) -> float:
    """Per token, given the prefix."""
    return (EXACT.entropy() - EXACT.entropy(prefix_length)) / (T - prefix_length)


# --- NELBO = entropy ------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix_length", [0, 1, 3])
def test_nelbo_of_exact_conditionals_is_the_entropy(prefix_length):
    # The identity behind everything: exactly, by averaging over all masks of all texts
    batch = every_question(EXACT.texts, EXACT.p, prefix_length)
    assert loss(EXACT, batch).item() == pytest.approx(entropy(prefix_length), rel=1e-5)
    # and as it is measured, on samples.
    bound = nelbo(EXACT, EXACT.sample(6000), V, prefix_length, batch_size=1000)
    assert bound.stderr < 0.02
    assert abs(bound.nats - entropy(prefix_length)) < 3 * bound.stderr


@pytest.mark.parametrize("B", [10, 11])
@pytest.mark.parametrize("mask_ratio", ["uniform", "bell", lambda t: t**2], ids=str)
def test_mean_training_loss_of_exact_conditionals_is_the_entropy(mask_ratio, B):
    masking = Masking(mask_ratio=mask_ratio)
    draws = torch.stack([loss(SOFT, corrupt(SOFT.sample(B, seed), V, masking, seeded(5000 + seed)))
                         for seed in range(400)])
    stderr = draws.std() / len(draws) ** 0.5
    assert stderr < 0.03
    assert abs(draws.mean() - entropy()) < 3 * stderr


@pytest.mark.parametrize("V", [2, 257])
@pytest.mark.parametrize("B, T, prefix_length", [(64, 20, 0), (33, 20, 5), (1, 20, 0), (3, 1, 0),
                                                 (5, 20, 19)])
def test_nelbo_of_a_uniform_model_is_ln_V(V, B, T, prefix_length):
    x_0 = torch.randint(2, (B, T), generator=seeded(0))
    bound = nelbo(Fixed(torch.full((1, V), 0.7)), x_0, V, prefix_length)
    measured = [nats for nats in bound.curve.nats if not math.isnan(nats)]
    assert measured
    for nats in (bound.nats, *measured):
        assert nats == pytest.approx(math.log(V), rel=1e-6)


def test_a_model_that_ignores_context_has_the_mean_marginal_entropy_which_is_larger():
    marginals = torch.stack([JOINT.sum([d for d in range(T) if d != t]) for t in range(T)])
    expected = -torch.special.xlogy(marginals, marginals).sum().item() / T
    model = Fixed(marginals.log())
    assert loss(model, EVERYTHING).item() == pytest.approx(expected, rel=1e-5)
    bound = nelbo(model, EXACT.sample(6000), V, batch_size=1000)
    assert abs(bound.nats - expected) < 3 * bound.stderr
    assert expected > entropy() + 5 * bound.stderr


@pytest.mark.parametrize("B", [2, 50, 101])
def test_autoregressive_is_the_exact_log_likelihood_by_the_chain_rule(B):
    x_0 = EXACT.sample(B)
    nats = -JOINT[tuple(x_0.T)].log() / T  # per token
    result = evaluate(Causal(JOINT), x_0, V, objective="autoregressive")
    assert result.nats == pytest.approx(nats.mean().item(), rel=1e-5)
    assert result.stderr == pytest.approx((nats.std() / B**0.5).item(), rel=1e-4)
    assert result.curve is None


# --- Error bars -----------------------------------------------------------------------------------


@pytest.mark.parametrize("B, prefix_length", [(1, 0), (3, 2), (4, 0)])
def test_nelbo_of_few_texts_has_no_bias(B, prefix_length):
    x_0 = EXACT.sample(B)
    exact = loss(EXACT, every_question(x_0, torch.full((B,), 1 / B), prefix_length)).item()
    draws = torch.tensor([nelbo(EXACT, x_0, V, prefix_length, seed=s).nats for s in range(200)])
    assert draws.std() > 0.01  # the masks do differ from seed to seed
    assert abs(draws.mean() - exact) < 3 * draws.std() / 200**0.5


def test_standard_error_is_the_scatter_of_the_estimate():
    bounds = [nelbo(EXACT, EXACT.sample(50, seed), V, seed=seed) for seed in range(200)]
    z = torch.tensor([(bound.nats - entropy()) / bound.stderr for bound in bounds])
    # 1 if counts and masks were drawn independently; strata make it a little smaller, never larger.
    assert 0.7 < z.pow(2).mean().sqrt() < 1.15


def test_same_seed_same_bound_to_the_last_bit_whatever_the_global_random_state():
    x_0 = EXACT.sample(101)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = evaluate(EXACT, x_0, V)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert first == nelbo(EXACT, x_0, V, seed=0)
    other = nelbo(EXACT, x_0, V, seed=6)
    assert first.nats != other.nats and first.curve.nats != other.curve.nats


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_bound_does_not_depend_on_the_batch_size(batch_size):
    x_0 = EXACT.sample(51)
    one = nelbo(EXACT, x_0, V)
    other = nelbo(EXACT, x_0, V, batch_size=batch_size)
    assert other[:2] == pytest.approx(one[:2], rel=1e-6)
    assert other.curve.counts == one.curve.counts
    assert other.curve.nats == pytest.approx(one.curve.nats, rel=1e-6)
    assert other.curve.stderr == pytest.approx(one.curve.stderr, rel=1e-5)


# --- The curve ------------------------------------------------------------------------------------


def levels_bound(B: int, T: int, **options) -> Bound:
    return nelbo(levels, torch.zeros(B, T, dtype=torch.int64), 2, **options)


@pytest.mark.parametrize("N", [1, 7, 40])
def test_nelbo_of_two_texts_per_count_is_the_mean_height_of_the_curve_exactly(N):
    curve = some_curve(torch.arange(1, N + 1).double())
    bound = levels_bound(2 * N, N)
    assert bound.nats == pytest.approx(curve.mean().item(), rel=1e-5)
    pairs = (curve + curve.flip(0)) / 2  # rows of a pair depend on each other: their means count
    error = pairs.std().item() / N**0.5 if N > 1 else math.nan
    assert bound.stderr == pytest.approx(error, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("B, T, prefix_length, points", [
    (200, 20, 0, 10), (200, 20, 3, 10), (200, 64, 0, 33), (200, 5, 0, 10), (200, 20, 0, 1),
    (4, 20, 0, 10), (7, 20, 0, 10), (20, 20, 0, 10), (21, 20, 0, 10)])  # few texts, fewer points
def test_curve_is_the_cross_entropy_at_increasing_counts_from_1_to_N(B, T, prefix_length, points):
    curve = levels_bound(B, T, prefix_length=prefix_length, curve_points=points).curve
    assert curve.N == curve.counts[-1] == T - prefix_length and curve.counts[0] == 1
    assert curve.counts == sorted(set(curve.counts))
    points = min(points, B // 2 - 1)  # two texts or more for each
    assert min(points, curve.N) <= len(curve.counts) <= points + 1
    expected = some_curve(torch.tensor(curve.counts).double()).tolist()
    assert curve.nats == pytest.approx(expected, rel=1e-5)
    assert curve.stderr == pytest.approx([0] * len(curve.counts), abs=1e-6)  # all rows agree


def test_curve_of_exact_conditionals_is_the_mean_conditional_entropy():
    curve = nelbo(EXACT, EXACT.sample(6000), V, batch_size=1000).curve
    assert curve.counts == [1, 2, 3, 4]
    m = (EVERYTHING.inputs == V).sum(1)[EVERYTHING.positions // T]
    for count, nats, stderr in zip(*curve[1:], strict=True):
        weights = EVERYTHING.weights * (m == count) * T
        assert stderr < 0.03
        assert abs(nats - loss(EXACT, EVERYTHING._replace(weights=weights)).item()) < 3 * stderr


def test_nothing_to_measure_and_an_unknown_objective_are_refused():
    for options in ({"prefix_length": -1}, {"prefix_length": T}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="nothing to measure"):
            nelbo(EXACT, EXACT.sample(4), V, **options)
    with pytest.raises(ValueError, match="objective.*autoregresive"):
        evaluate(EXACT, EXACT.sample(4), V, objective="autoregresive")
