"""How many tokens stay hidden after each step, what that costs, and which schedule costs least."""

import itertools
import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import EXACT, JOINT, Exact, Fixed, Recorder, T, V, correlated_joint, masked, seeded

from diffusion import SCHEDULES, Curve, hidden_counts, optimal_schedule, schedule_nelbo, smooth
from sample import generate

BY_HAND = {
    "linear": lambda u: 1 - u,
    "cosine": lambda u: (1 + math.cos(math.pi * u)) / 2,
    "exponential": lambda u: math.exp(-3 * u),
}


def plain_curve(nats, counts=None) -> Curve:
    counts = counts or list(range(1, len(nats) + 1))
    return Curve(counts[-1], counts, list(nats), [0.0] * len(nats))


def column(schedule, N: int, steps: int, **options) -> list[int]:
    return hidden_counts(schedule, torch.tensor([N]), steps, **options)[:, 0].tolist()


# --- Counts ---------------------------------------------------------------------------------------


def test_hidden_counts_by_hand():
    assert column("linear", 100, 4) == [100, 75, 50, 25, 0]
    assert column("cosine", 100, 4) == [100, 85, 50, 15, 0]  # (1 + cos 45 degrees)/2 = 0.854
    assert column("exponential", 100, 3) == [100, 37, 14, 0]  # 1/e, 1/e^2, and 5% jumps to 0
    assert column("cosine", 10, 10) == [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]  # no choice
    assert column("exponential", 6, 5) == [6, 4, 3, 2, 1, 0]  # 3.3 -> 3, but 4 steps are left
    assert column([50, 49, 20, 3, 0], 50, 99) == [50, 49, 20, 3, 0]  # a list sets the steps


def assert_counts(counts: list[int], N: int, ideal) -> None:
    """From N to 0, round(ideal(i)) in between, bent only as far as one token per step demands."""
    S = len(counts) - 1
    assert counts[0] == N and counts[-1] == 0
    for i in range(1, S):
        roundings = {math.floor(ideal(i) + 0.5 + tiny) for tiny in (-1e-9, 1e-9)}  # halves: both
        assert counts[i] in {max(min(m, counts[i - 1] - 1), S - i) for m in roundings}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(list(BY_HAND)), st.lists(st.integers(0, 300), min_size=1, max_size=5),
       st.integers(1, 60))
def test_hidden_counts_agree_with_a_plain_reference(schedule, num_hidden, steps):
    counts = hidden_counts(schedule, torch.tensor(num_hidden), steps)
    longest = min(steps, max(num_hidden))
    assert counts.shape == (longest + 1, len(num_hidden)) and not counts.is_floating_point()
    for N, row in zip(num_hidden, counts.T.tolist(), strict=True):
        S = min(steps, N)
        assert_counts(row[: S + 1], N, lambda i, N=N, S=S: N * BY_HAND[schedule](i / S))
        assert row[S:] == [0] * (longest + 1 - S)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.sets(st.integers(1, 200), min_size=1, max_size=12), st.integers(0, 400))
def test_a_list_of_counts_is_rescaled_to_other_lengths(hidden, N):
    wanted = [*sorted(hidden, reverse=True), 0]
    counts = column(wanted, N, 99)
    if N >= len(wanted) - 1:
        assert_counts(counts, N, lambda i: wanted[i] * N / wanted[0])
    else:  # fewer tokens than steps: one per step
        assert counts == list(range(N, -1, -1))


@pytest.mark.parametrize("schedule", BY_HAND)
def test_counts_that_are_not_strict_are_rounded_fractions(schedule):
    for N in (0, 1, 7, 40):
        counts = column(schedule, N, 12, strict=False)
        assert len(counts) == 13 and counts[0] == N and counts[-1] == 0
        for i in range(1, 12):
            assert abs(counts[i] - N * BY_HAND[schedule](i / 12)) <= 0.5 + 1e-9


# --- The price ------------------------------------------------------------------------------------


def test_the_price_of_a_schedule_by_hand():
    curve = plain_curve([0.5, 1.0, 2.0, 4.0])  # CE(1) .. CE(4)
    by_token = (4 + 2 + 1 + 0.5) / 4
    for schedule, steps, price in (("linear", 1, 4.0), ("linear", 2, (2 * 4 + 2 * 1) / 4),
                                   ("exponential", 3, (2 * 4 + 1 + 0.5) / 4),  # 4 2 1 0
                                   ([4, 3, 0], 99, (4 + 3 * 2) / 4),
                                   ([8, 2, 0], 99, (3 * 4 + 0.5) / 4),  # rescaled to 4 1 0
                                   *((name, 4, by_token) for name in SCHEDULES),
                                   *((name, 50, by_token) for name in SCHEDULES)):
        assert schedule_nelbo(curve, schedule, steps) == pytest.approx(price)
    sparse = plain_curve([1.0, 5.0, 5.5], counts=[1, 3, 4])  # CE(2) = 3 lies between
    assert schedule_nelbo(sparse, "linear", 4) == pytest.approx((5.5 + 5 + 3 + 1) / 4)


def exact_curve(model: Exact, joint: torch.Tensor) -> Curve:
    """CE(m) for all m, by enumeration, of a model that answers about rows drawn from `joint`."""
    T = joint.dim()
    nats = []
    for m in range(1, T + 1):
        costs = []
        for hidden in itertools.combinations(range(T), m):
            visible = [t for t in range(T) if t not in hidden]
            before = oracles.path_log_q(model, [visible])
            after = oracles.path_log_q(model, [visible, hidden])
            costs.append((before - after) @ joint.flatten() / m)
        nats.append(float(torch.stack(costs).mean()))
    return plain_curve(nats)


WRONG = Exact(correlated_joint(V, T, seed=5))


@pytest.mark.parametrize("model", [EXACT, WRONG], ids=["exact", "wrong"])
@pytest.mark.parametrize("counts", [[4, 0], [4, 2, 0], [4, 1, 0], [4, 3, 1, 0], [4, 3, 2, 1, 0]])
def test_the_price_is_the_enumerated_cost_and_bounds_what_the_sampler_writes(model, counts):
    price = schedule_nelbo(exact_curve(model, JOINT), counts, 99)
    paths = oracles.paths(range(T), counts)
    log_q = torch.stack([oracles.path_log_q(model, path) for path in paths])
    truth = JOINT.flatten()
    assert price == pytest.approx(float(-(log_q @ truth).mean() / T), rel=1e-5)
    # The sampler does not tell its path: what it writes is the mixture of paths, cheaper by Jensen.
    entropy = -(truth @ truth.log()) / T
    cross_entropy = -(truth @ oracles.random_order_q(model, counts).log()) / T
    assert entropy <= cross_entropy + 1e-6 and cross_entropy <= price + 1e-6
    if model is EXACT and len(counts) == T + 1:
        assert price == pytest.approx(float(entropy), rel=1e-5)


@pytest.mark.parametrize("schedule, steps", [
    ("linear", 1), ("linear", 3), ("linear", None), ("cosine", 3), ("exponential", 2),
    ("optimal", 2), ([6, 5, 1, 0], None)])
def test_held_out_rows_cost_what_the_schedule_is_priced_at(schedule, steps):
    # `denoise` itself commits, but `adjust` notes the loss of each true token and lets no other by.
    joint = correlated_joint(2, 6, seed=2)
    model = Exact(correlated_joint(2, 6, seed=3))
    n = 4000
    curve = exact_curve(model, joint)
    if schedule == "optimal":
        schedule = optimal_schedule(curve, steps)
    x_0 = Exact(joint).sample(n, seed=1)
    cost = torch.zeros(n, dtype=torch.float64)

    def force(logits, x, positions):
        truth = x_0.flatten()[positions][:, None]
        log_p = logits.double().log_softmax(1).gather(1, truth).squeeze(1)
        cost.index_add_(0, positions // 6, -log_p)
        return torch.full_like(logits, -math.inf).scatter(1, truth, 0.0)

    options = {"steps": steps, "schedule": schedule, "adjust": force}
    assert torch.equal(generate(model, masked(n, 6, 2), 2, seeded(2), **options), x_0)
    error = cost.mean() / 6 - schedule_nelbo(curve, schedule, steps or 6)
    assert abs(error) < 3 * cost.std() / 6 / math.sqrt(n)


# --- The optimal schedule -------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=8), st.integers(1, 10))
def test_the_optimal_schedule_is_the_best_of_all_by_brute_force(nats, steps):
    N = len(nats)  # any curve, rising or not
    counts = optimal_schedule(plain_curve(nats), steps)
    S = min(steps, N)
    assert counts[0] == N and counts[-1] == 0 and len(counts) == S + 1
    assert all(later < earlier for earlier, later in itertools.pairwise(counts))

    def price(counts):
        return sum((m - k) * nats[m - 1] for m, k in itertools.pairwise(counts)) / N

    every = itertools.combinations(range(N - 1, 0, -1), S - 1)
    best = min(price([N, *inner, 0]) for inner in every)
    assert price(counts) == pytest.approx(best, abs=1e-9)
    assert schedule_nelbo(plain_curve(nats), counts, 1) == pytest.approx(best, abs=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 150), st.integers(1, 160), st.integers(0, 10**6))
def test_the_optimal_schedule_is_never_dearer_than_a_named_one(N, steps, seed):
    measured = sorted({1, N, *torch.randint(1, N + 1, (8,), generator=seeded(seed)).tolist()})
    curve = plain_curve((torch.rand(len(measured), generator=seeded(seed)) * 5).tolist(), measured)
    counts = optimal_schedule(curve, steps)
    assert len(counts) == min(steps, N) + 1 and (np.diff(counts) < 0).all()
    optimal = schedule_nelbo(curve, counts, steps)
    assert all(optimal <= schedule_nelbo(curve, name, steps) + 1e-9 for name in SCHEDULES)


def test_the_optimal_schedule_finds_where_the_curve_is_steep_and_the_sampler_follows_it():
    # Seeing 1 to 3 of 8 tokens brings nothing; once four are visible, everything is known.
    counts = optimal_schedule(plain_curve([0, 0, 0, 0, 9, 9, 9, 9]), 2)
    assert counts == [8, 4, 0]
    model = Recorder(Fixed(torch.zeros(8, 3)))
    generate(model, masked(2, 8, 3), 3, seeded(0), steps=99, schedule=counts)
    assert [(shown == 3).sum(1).tolist() for shown in model.shown] == [[8, 8], [4, 4]]


# --- Smoothing ------------------------------------------------------------------------------------


def noisy_curve(seed: int, N: int = 64) -> tuple[Curve, Curve]:
    """A true curve, increasing and bent, and a measurement of it at 33 counts with known errors."""
    every = np.arange(1, N + 1)
    true = 1 + 2 * (every / N) ** 3
    counts = sorted({1, *(round(N * i / 32) for i in range(1, 33))})
    errors = 0.1 * (1.2 - np.array(counts) / N)
    noise = torch.randn(len(counts), generator=seeded(seed)).numpy()
    measured = true[np.array(counts) - 1] + errors * noise
    return plain_curve(true.tolist()), Curve(N, counts, measured.tolist(), errors.tolist())


def test_smoothing_returns_a_cubic_as_it_is_and_believes_certain_points_more():
    true, _ = noisy_curve(0)
    counts = [1, 9, 30, 50, 64]
    smoothed = smooth(Curve(64, counts, [true.nats[m - 1] for m in counts], [0.1] * 5))
    assert (smoothed.N, smoothed.counts) == (64, true.counts)
    assert smoothed.nats == pytest.approx(true.nats, abs=1e-9)
    outlier = Curve(10, [1, 4, 5, 7, 10], [1.0, 1.0, 9.0, 1.0, 1.0], [0.01, 0.01, 10.0, 0.01, 0.01])
    assert smooth(outlier).nats == pytest.approx([1.0] * 10, abs=1e-3)


@pytest.mark.parametrize("counts", [[5], [1, 5], [1, 3, 5]])
def test_a_curve_of_few_points_or_unknown_errors_is_smoothed_too(counts):
    nats = [1.0 + m for m in counts]
    smoothed = smooth(Curve(5, counts, nats, [math.nan] * len(counts)))
    assert [smoothed.nats[m - 1] for m in counts] == pytest.approx(nats)


def test_a_schedule_of_the_smoothed_curve_is_cheaper_than_one_that_chases_noise():
    excess = {"chasing": 0.0, "smoothed": 0.0, "linear": 0.0}
    for seed, steps in itertools.product(range(10), (4, 8, 16)):
        true, measured = noisy_curve(seed)
        best = schedule_nelbo(true, optimal_schedule(true, steps), steps)
        for name, schedule in (("chasing", optimal_schedule(measured, steps)),
                               ("smoothed", optimal_schedule(smooth(measured), steps)),
                               ("linear", "linear")):
            excess[name] += schedule_nelbo(true, schedule, steps) - best
    assert excess["smoothed"] < min(excess["chasing"], excess["linear"]) / 2


# --- Mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_have_no_price_and_no_optimum(steps):
    for function in (lambda curve: schedule_nelbo(curve, "linear", steps),
                     lambda curve: optimal_schedule(curve, steps)):
        with pytest.raises(ValueError, match=f"steps.*{steps}"):
            function(plain_curve([1.0, 2.0]))


@pytest.mark.parametrize("schedule", ["quadratic", [4, 2, 2, 0], [4, 2, 1], [2, 3, 0], [0], []])
def test_a_schedule_that_does_not_fall_to_0_is_refused_by_name(schedule):
    with pytest.raises(ValueError, match="schedule") as error:
        column(schedule, 4, 4)
    assert str(schedule) in str(error.value)
