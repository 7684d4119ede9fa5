"""Schedules, orders, remasking, thresholds and blocks against exact answers: enumeration where a sampler's
distribution can be enumerated, the stated chance of every change where it cannot."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diffusion
from diffusion import Curve
from model import ModelConfig, Transformer
from tests.test_sampling import (
    COUNTED,
    CURVES,
    DRAWS,
    EXACT,
    JOINT,
    ORDERS,
    ROWS,
    SCHEDULES,
    Exact,
    Fixed,
    P,
    Recorder,
    T,
    V,
    chi_square_p,
    correlated_joint,
    counts_of,
    masked,
    seeded,
    subset_sampler,
    with_holes,
)

REMASKS = tuple(diffusion.REMASKS)
OTHER = Exact(correlated_joint(V, T, seed=5))  # a model that is wrong about JOINT
SIX = correlated_joint(2, 6, seed=2)

# ---------------------------------------------------------------------------------------------------
# What enumeration says: a path is the groups of places that a sampler reveals together, in turn


def path_log_q(model, groups, V, T):
    """(V**T,): for every row the log-probability that a sampler writes it, if it reveals these groups."""
    rows = torch.tensor(list(itertools.product(range(V), repeat=T)))
    seen, total = torch.full_like(rows, V), torch.zeros(len(rows), dtype=torch.float64)
    for group in map(list, groups):
        log_p = model(seen).double().log_softmax(-1).gather(-1, rows[..., None]).squeeze(-1)
        total += log_p[:, group].sum(1)
        seen[:, group] = rows[:, group]
    return total


def paths_of(places, counts):
    """Every way to reveal random subsets until `counts` places are hidden; all are equally likely."""
    if len(counts) == 1:
        return [[]]
    return [[group, *rest] for group in itertools.combinations(places, counts[0] - counts[1])
            for rest in paths_of([t for t in places if t not in group], counts[1:])]


def ancestral_paths(schedule, steps, T):
    """(probability, path): every place is revealed in step i with probability f(i/steps) - f((i+1)/steps)."""
    f = [CURVES[schedule](i / steps) for i in range(steps)] + [0]
    for times in itertools.product(range(steps), repeat=T):
        weight = math.prod(f[i] - f[i + 1] for i in times)
        yield weight, [[t for t in range(T) if times[t] == i] for i in range(steps)]


def exact_curve(model, joint):
    """CE(m) for all m, by enumeration, of a model that answers about rows drawn from `joint`."""
    V, T = joint.shape[0], joint.dim()
    nats = []
    for m in range(1, T + 1):
        costs = []
        for hidden in itertools.combinations(range(T), m):
            visible = [t for t in range(T) if t not in hidden]
            before = path_log_q(model, [visible], V, T)
            costs.append((before - path_log_q(model, [visible, hidden], V, T)) @ joint.flatten() / m)
        nats.append(float(torch.stack(costs).mean()))
    return Curve(T, list(range(1, T + 1)), nats, [0.0] * T)


def plain_curve(nats, counts=None):
    counts = counts or list(range(1, len(nats) + 1))
    return Curve(counts[-1], counts, list(nats), [0.0] * len(nats))


def frequencies_p(events):
    """One chi-square for many (happened, probability): how often each of them came true. A probability of 0
    or 1 allows no exception."""
    chi_square, freedom = 0.0, 0
    for happened, probability in events:
        n, yes = happened.numel(), happened.sum().item()
        if min(probability, 1 - probability) < 1e-9:
            assert yes == n * round(probability), "a certain event did not happen, or an impossible one did"
        elif n * min(probability, 1 - probability) > 5:
            chi_square += (yes - n * probability) ** 2 / (n * probability * (1 - probability))
            freedom += 1
    assert freedom, "too few draws for any test"
    half = torch.tensor([freedom / 2, chi_square / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


def chi_square_of_bins_p(observed, probability):
    """`chi_square_p` with the bins that expect too few put together with the fullest."""
    small = (observed.sum() * probability < 8) & (probability > 0)
    fullest = probability.argmax()
    for bins in (observed, probability):
        bins[fullest] += bins[small].sum()
        bins[small] = 0
    return chi_square_p(observed, probability)


def binomial(n, p, most=None):
    """The probabilities of 0..n successes; those above `most` count as `most`."""
    probability = torch.tensor([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])
    if most is not None and most < n:
        probability = torch.cat([probability[:most], probability[most:].sum()[None]])
    return probability


def three_places_hidden(share):
    """The probabilities of the 8 patterns of three places, each hidden by itself with this probability."""
    one = torch.tensor([1 - share, share])
    return one[:, None, None] * one[:, None] * one


def label(value):
    """A readable test id for functions and for options that hold them."""
    if isinstance(value, dict):
        return ",".join(f"{name}={label(option)}" for name, option in value.items()) or "plain"
    return getattr(value, "__name__", str(value))


def hidden_in(states, V):
    return [state.tokens == V for state in states]


# ---------------------------------------------------------------------------------------------------
# The price of a schedule


def test_the_price_of_a_schedule_by_hand():
    curve = plain_curve([0.5, 1.0, 2.0, 4.0])  # CE(1) .. CE(4)

    def price(schedule, steps):
        return pytest.approx(diffusion.schedule_nelbo(curve, schedule, steps))

    assert price("linear", 1) == 4.0
    assert price("linear", 2) == (2 * 4 + 2 * 1) / 4
    assert price("linear", 4) == (4 + 2 + 1 + 0.5) / 4
    assert price("exponential", 3) == (2 * 4 + 1 + 0.5) / 4  # 4 2 1 0
    assert price([4, 3, 0], 99) == (4 + 3 * 2) / 4
    assert price([8, 2, 0], 99) == (3 * 4 + 0.5) / 4  # rescaled to 4 1 0


def test_between_the_measured_counts_the_curve_is_interpolated():
    curve = plain_curve([1.0, 5.0, 5.5], counts=[1, 3, 4])  # CE(2) = 3
    assert diffusion.schedule_nelbo(curve, "linear", 4) == pytest.approx((5.5 + 5 + 3 + 1) / 4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_more_steps_than_tokens_are_priced_as_one_token_a_step(schedule):
    curve = plain_curve([0.5, 1.0, 2.0, 4.0])
    assert diffusion.schedule_nelbo(curve, schedule, 50) == pytest.approx((4 + 2 + 1 + 0.5) / 4)


@pytest.mark.parametrize("model", [EXACT, OTHER], ids=["exact", "wrong"])
@pytest.mark.parametrize("counts", [[4, 0], [4, 2, 0], [4, 3, 0], [4, 1, 0], [4, 3, 1, 0], [4, 3, 2, 1, 0]],
                         ids=label)
def test_the_price_is_the_enumerated_expected_cost_and_bounds_what_the_sampler_writes(model, counts):
    price = diffusion.schedule_nelbo(exact_curve(model, JOINT), counts, 99)
    log_q = torch.stack([path_log_q(model, path, V, T) for path in paths_of(range(T), counts)])
    truth = JOINT.flatten()
    assert price == pytest.approx(float(-(log_q @ truth).mean() / T), rel=1e-5)
    # The sampler does not tell its path: what it writes is the mixture over paths, cheaper by Jensen.
    mixture = log_q.exp().mean(0)
    torch.testing.assert_close(mixture, subset_sampler(model, counts).flatten(), rtol=1e-4, atol=0)
    entropy, cross_entropy = -(truth @ truth.log()) / T, -(truth @ mixture.log()) / T
    assert entropy <= cross_entropy + 1e-6 and cross_entropy <= price + 1e-6
    if model is EXACT and len(counts) == T + 1:
        assert price == pytest.approx(float(entropy), rel=1e-5)


@pytest.mark.parametrize("schedule, steps", [("linear", 1), ("linear", 3), ("cosine", 3), ("exponential", 2),
                                             ("optimal", 2), ([6, 5, 1, 0], 3), ("linear", 6)])
def test_held_out_rows_cost_what_the_schedule_is_priced_at(schedule, steps):
    # `denoise` itself reveals, but an adjust hook notes the loss of each true token and lets no other by
    model, n = Exact(correlated_joint(2, 6, seed=3)), 4000
    curve = exact_curve(model, SIX)
    if schedule == "optimal":
        schedule = diffusion.optimal_schedule(curve, steps)
    row = torch.multinomial(SIX.flatten(), n, replacement=True, generator=seeded(1))
    x_0 = torch.tensor(list(itertools.product(range(2), repeat=6)))[row]
    cost = torch.zeros(n, dtype=torch.float64)

    def force(logits, x, positions):
        answer = x_0.flatten()[positions][:, None]
        cost.index_add_(0, positions // 6, -logits.double().log_softmax(1).gather(1, answer).squeeze(1))
        return torch.full_like(logits, -math.inf).scatter(1, answer, 0.0)

    written = diffusion.generate(model, masked(n, 6, 2), 2, steps, schedule=schedule, adjust=force,
                                 generator=seeded(2))
    assert torch.equal(written, x_0)
    cost /= 6
    assert abs(cost.mean() - diffusion.schedule_nelbo(curve, schedule, steps)) < 3 * cost.std() / math.sqrt(n)


# ---------------------------------------------------------------------------------------------------
# The optimal schedule


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=8), st.integers(1, 10))
def test_the_optimal_schedule_is_the_best_of_all(nats, steps):
    curve, N = plain_curve(nats), len(nats)  # any curve, rising or not
    counts = diffusion.optimal_schedule(curve, steps)
    S = min(steps, N)
    assert counts[0] == N and counts[-1] == 0 and len(counts) == S + 1
    assert all(later < earlier for earlier, later in itertools.pairwise(counts))

    def price(counts):
        return sum((m - k) * nats[m - 1] for m, k in itertools.pairwise(counts)) / N

    best = min(price([N, *inner, 0]) for inner in itertools.combinations(range(N - 1, 0, -1), S - 1))
    assert price(counts) == pytest.approx(best, abs=1e-9)
    assert diffusion.schedule_nelbo(curve, counts, 1) == pytest.approx(best, abs=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 150), st.integers(1, 160), st.integers(0, 10**6))
def test_the_optimal_schedule_is_never_dearer_than_a_named_one(N, steps, seed):
    measured = sorted({1, N, *torch.randint(1, N + 1, (8,), generator=seeded(seed)).tolist()})
    curve = plain_curve((torch.rand(len(measured), generator=seeded(seed)) * 5).tolist(), counts=measured)
    counts = diffusion.optimal_schedule(curve, steps)
    assert len(counts) == min(steps, N) + 1 and (torch.tensor(counts).diff() < 0).all()
    optimal = diffusion.schedule_nelbo(curve, counts, steps)
    for schedule in SCHEDULES:
        assert optimal <= diffusion.schedule_nelbo(curve, schedule, steps) + 1e-9


def test_the_optimal_schedule_finds_where_the_curve_is_steep():
    # seeing 7 of 8 tokens hidden costs nothing less than 8 of 8; from 4 on, everything is known
    assert diffusion.optimal_schedule(plain_curve([0, 0, 0, 0, 9, 9, 9, 9]), 2) == [8, 4, 0]


def test_the_optimal_schedule_is_accepted_by_the_sampler():
    curve = plain_curve([0.1, 0.5, 0.6, 2.0, 2.1, 2.2, 3.0, 4.0])
    counts = diffusion.optimal_schedule(curve, 3)
    assert diffusion.hidden_counts(counts, torch.tensor([8, 8]), 99).T.tolist() == [counts] * 2
    states = diffusion.denoise(Fixed(torch.zeros(8, 3)), masked(2, 8, 3), 3, 99, counts, generator=seeded(0))
    assert [hidden.sum(1).tolist() for hidden in hidden_in(states, 3)] == [[m, m] for m in counts]


def test_no_steps_have_no_price_and_no_optimum():
    curve = plain_curve([1.0, 2.0])
    for steps in (0, -1):
        with pytest.raises(ValueError, match="steps"):
            diffusion.schedule_nelbo(curve, "linear", steps)
        with pytest.raises(ValueError, match="steps"):
            diffusion.optimal_schedule(curve, steps)


# ---------------------------------------------------------------------------------------------------
# Ancestral sampling


@pytest.mark.parametrize("schedule, steps", [("linear", 2), ("cosine", 3), ("exponential", 3)])
def test_ancestral_sampling_writes_what_enumeration_says(schedule, steps):
    expected = sum(w * path_log_q(EXACT, path, V, T).exp() for w, path in ancestral_paths(schedule, steps, T))
    x = diffusion.generate(EXACT, masked(ROWS, T, V), V, steps, schedule=schedule, order="ancestral",
                           generator=seeded(11))
    assert chi_square_p(counts_of(x, V), expected) > 1e-3


def test_ancestral_sampling_in_many_steps_reproduces_the_joint_distribution():
    x = diffusion.generate(EXACT, masked(ROWS, T, V), V, steps=300, order="ancestral", generator=seeded(12))
    assert chi_square_p(counts_of(x, V), JOINT) > 1e-3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ancestral_steps_commit_a_binomial_number(schedule):
    states = diffusion.denoise(Fixed(torch.zeros(1, 2)), masked(ROWS, 4, 2), 2, steps=4, schedule=schedule,
                               order="ancestral", generator=seeded(13))
    hidden = [mask.sum(1) for mask in hidden_in(states, 2)]
    assert len(hidden) == 5 and (hidden[4] == 0).all()
    alpha = [1 - CURVES[schedule](i / 4) for i in range(4)] + [1.0]
    for i, (before, after) in enumerate(itertools.pairwise(hidden)):
        for n in (n for n in range(1, 5) if (before == n).sum() > 100):
            committed = torch.bincount((before - after)[before == n], minlength=n + 1)
            chance = (alpha[i + 1] - alpha[i]) / (1 - alpha[i])
            assert chi_square_of_bins_p(committed, binomial(n, chance)) > 1e-3


def test_ancestral_rows_and_places_are_independent():
    states = diffusion.denoise(Fixed(torch.zeros(1, 2)), masked(ROWS, 3, 2), 2, steps=4, order="ancestral",
                               generator=seeded(14))
    for i, hidden in enumerate(hidden_in(states, 2)):
        a = i / 4
        assert chi_square_p(counts_of(hidden.long(), 2), three_places_hidden(1 - a)) > 1e-3
    split = diffusion.denoise(Fixed(torch.zeros(1, 2)), masked(ROWS, 2, 2), 2, steps=2, order="ancestral",
                              generator=seeded(15))
    next(split)
    halfway = (next(split).tokens == 2).sum(1)  # of each row: neighbours must not share their draws
    pair = halfway[0::2] * 3 + halfway[1::2]
    expected = torch.outer(binomial(2, 0.5), binomial(2, 0.5))
    assert chi_square_p(torch.bincount(pair, minlength=9), expected) > 1e-3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_ancestral_step_fills_everything(schedule):
    x, model = with_holes(50, 8, 3), Recorder(Fixed(torch.zeros(8, 3)))
    states = list(diffusion.denoise(model, x, 3, steps=1, schedule=schedule, order="ancestral",
                                    generator=seeded(0)))
    assert len(states) == 2 and len(model.shown) == 1 and (states[1].tokens < 3).all()


# ---------------------------------------------------------------------------------------------------
# Remasking


def sigma_by_hand(remask, alpha_t, alpha_s):
    """ReMDM's chance of a visible token to be hidden again, at most what the schedule bears."""
    limit = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t else 1.0
    wanted = {"none": 0.0, "renoise": 1 - alpha_s, "cap": 0.02, "rescale": 0.05 * limit}
    return min(limit, remask(limit, alpha_s, None) if callable(remask) else wanted[remask])


def never(limit, alpha_s, p):
    return 0.0


def one_in_fifty(limit, alpha_s, p):
    return 0.02


def one_in_500(limit, alpha_s, p):
    return 0.002


def half(limit, alpha_s, p):
    return 0.5


def everything_back(limit, alpha_s, p):
    return 1.0


def quarter_of_limit(limit, alpha_s, p):
    return 0.25 * limit


def pace_dependent(limit, alpha_s, p):
    return 0.6 * (1 - alpha_s)


NUMBERS = ("none", "renoise", "cap", "rescale", half, quarter_of_limit, pace_dependent)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("remask", NUMBERS, ids=label)
def test_ancestral_remasking_changes_tokens_with_the_posteriors_chances(remask, schedule):
    # ReMDM, arXiv:2503.00307: hidden with sigma, revealed with (alpha_s - (1-sigma) alpha_t)/(1 - alpha_t)
    states = diffusion.denoise(Fixed(torch.zeros(1, 2)), masked(ROWS, 3, 2), 2, steps=5, schedule=schedule,
                               order="ancestral", remask=remask, generator=seeded(21))
    hidden = hidden_in(states, 2)
    assert len(hidden) == 6 and not hidden[5].any()
    alpha, events = [1 - CURVES[schedule](i / 5) for i in range(5)] + [1.0], []
    for i, (before, after) in enumerate(itertools.pairwise(hidden)):
        a_t, a_s = alpha[i], alpha[i + 1]
        sigma = sigma_by_hand(remask, a_t, a_s)
        events.append((after[~before], sigma))
        events.append((~after[before], (a_s - (1 - sigma) * a_t) / (1 - a_t)))
        # with a number for sigma the share of hidden tokens is the schedule's, each place by itself
        assert chi_square_p(counts_of(after.long(), 2), three_places_hidden(1 - a_s)) > 1e-3
    assert frequencies_p(events) > 1e-3


SURE_TO_UNSURE = torch.tensor([[0.9, 0.05, 0.03, 0.02], [0.6, 0.2, 0.1, 0.1], [0.3, 0.25, 0.25, 0.2]])


def test_ancestral_conf_hides_unsure_tokens_in_proportion():
    # sigma of a place = limit exp(-p) / sum of exp(-p) over the visible places of its row; 0 where hidden
    states = diffusion.denoise(Fixed(SURE_TO_UNSURE.log()), masked(ROWS, 3, 4), 4, steps=5, order="ancestral",
                               remask="conf", temperature=0, generator=seeded(22))
    events, p = [], SURE_TO_UNSURE[:, 0]
    for i, (before, after) in enumerate(itertools.pairwise(hidden_in(states, 4))):
        a_t, a_s = i / 5, (i + 1) / 5
        limit = min(1.0, (1 - a_s) / a_t) if i else 1.0
        for pattern in itertools.product([False, True], repeat=3):
            rows = (before == torch.tensor(pattern)).all(1)
            weight = (-p).exp() * ~torch.tensor(pattern)
            for t in range(3):
                if pattern[t]:
                    events.append((~after[rows, t], (a_s - a_t) / (1 - a_t)))
                else:
                    events.append((after[rows, t], float(limit * weight[t] / weight.sum())))
    assert len(events) == 5 * 24 and frequencies_p(events) > 1e-3


def test_counted_conf_hides_unsure_tokens_in_proportion():
    # left to right, 8 places in 4 steps: at the second step the tokens at 0 (sure) and 1 (unsure) are visible
    p = torch.full((8, 4), 0.1)
    p[:, 0] = torch.tensor([0.97, 0.4] + [0.7] * 6)
    p[:, 1:] = (1 - p[:, :1]) / 3
    states = diffusion.denoise(Fixed(p.log()), masked(ROWS, 8, 4), 4, steps=4, order="left_to_right",
                               remask="conf", temperature=0, generator=seeded(23))
    hidden = hidden_in(itertools.islice(states, 3), 4)
    assert hidden[1].tolist() == [[False] * 2 + [True] * 6] * ROWS
    sigma = (-p[:2, 0]).softmax(0)  # limit is min(1, (1 - 1/2) / (1/4)) = 1
    both = torch.outer(torch.stack([1 - sigma[0], sigma[0]]), torch.stack([1 - sigma[1], sigma[1]]))
    assert chi_square_p(counts_of(hidden[2][:, :2].long(), 2), both) > 1e-3


@pytest.mark.parametrize("order", COUNTED)
@pytest.mark.parametrize("remask", ["renoise", "cap", half], ids=label)
def test_counted_orders_hide_again_with_the_chance_as_far_as_the_count_allows(order, remask):
    # 8 places in 4 steps: 2 tokens can be hidden again in step 2, 4 in step 3, of which 2 may stay hidden
    model = Fixed(torch.randn(8, 3, generator=seeded(0)))
    states = diffusion.denoise(model, masked(5000, 8, 3), 3, steps=4, order=order, remask=remask,
                               generator=seeded(24))
    hidden = hidden_in(states, 3)
    for i, most in ((1, 4), (2, 2)):
        again = (~hidden[i] & hidden[i + 1]).sum(1)
        chance = sigma_by_hand(remask, i / 4, (i + 1) / 4)
        written = [0, 2, 4][i]
        expected = binomial(written, chance, most)
        assert chi_square_of_bins_p(torch.bincount(again, minlength=len(expected)), expected) > 1e-3
    assert not (~hidden[3] & hidden[4]).any()


@pytest.mark.parametrize("order", COUNTED)
@pytest.mark.parametrize("remask", [*REMASKS[1:], everything_back], ids=label)
@pytest.mark.parametrize("steps", [1, 4, 35])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_with_remasking_counted_orders_hide_exactly_what_the_schedule_says(order, remask, steps, schedule):
    x = with_holes(6, 10, 3)
    model = Fixed(torch.randn(10, 3, generator=seeded(0)))
    states = list(diffusion.denoise(model, x, 3, steps, schedule, order, remask=remask, generator=seeded(1)))
    counts = diffusion.hidden_counts(schedule, (x == 3).sum(1), steps, strict=False)
    assert counts.shape == (steps + 1, 6)
    # a step without any change is skipped, so several steps of equal counts may be one state
    found = torch.stack([hidden.sum(1) for hidden in hidden_in(states, 3)])
    assert torch.equal(found.unique_consecutive(dim=0), counts.unique_consecutive(dim=0))
    if steps == 4:
        assert torch.equal(found, counts)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_counts_that_are_not_strict_are_rounded_shares(schedule):
    N, steps = [0, 1, 7, 40], 12
    counts = diffusion.hidden_counts(schedule, torch.tensor(N), steps, strict=False)
    assert counts.shape == (steps + 1, 4) and counts[0].tolist() == N and counts[-1].tolist() == [0] * 4
    for i in range(1, steps):
        for n, m in zip(N, counts[i].tolist(), strict=True):
            assert abs(m - n * CURVES[schedule](i / steps)) <= 0.5 + 1e-9


@pytest.mark.parametrize("order, remask, steps", [("random", one_in_fifty, 150), ("random", never, 30),
                                                  ("ancestral", one_in_500, 300)], ids=label)
def test_rare_remasking_leaves_the_joint_distribution_as_it_is(order, remask, steps):
    # Hiding a token whatever it is and redrawing it from its exact conditional is a step of Gibbs sampling.
    # Two redrawn at once would be drawn independently: with so small a chance that is too rare to be seen.
    changed_back = 0
    states = diffusion.denoise(EXACT, masked(ROWS, T, V), V, steps, order=order, remask=remask,
                               generator=seeded(25))
    for a, b in itertools.pairwise(states):
        changed_back += ((a.tokens != V) & (b.tokens == V)).sum().item()
    assert chi_square_p(counts_of(b.tokens, V), JOINT) > 1e-3
    assert changed_back > ROWS / 2 or remask is never


class WrongEarly:
    """While more than half of a row is hidden, most it says is wrong (token 1); later everything is right."""

    def __call__(self, tokens, positions):
        early = (tokens == 2).sum(1, keepdim=True) > tokens.shape[1] / 2
        wrong = torch.where(early, 0.55, 1e-9).expand(tokens.shape).flatten()[positions]
        return torch.stack([1 - wrong, wrong], 1).log()


@pytest.mark.parametrize("order", ORDERS)
def test_renoise_corrects_mistakes_made_early(order):
    def mistakes(remask):
        x = diffusion.generate(WrongEarly(), masked(400, 12, 2), 2, steps=12, order=order, remask=remask,
                               generator=seeded(26))
        return (x == 1).float().mean().item()

    kept = mistakes(None)
    assert kept > 0.2 and mistakes("none") == kept  # more than .55 of the first half
    # a token of the first half outlasts the masks of the second with 7/12 8/12 9/12 10/12 11/12 = .22
    assert mistakes("renoise") < kept / 2


def test_conf_hides_early_mistakes_more_often_than_sure_tokens():
    steps, there, back, variance = 16, torch.zeros(2), torch.zeros(2), torch.zeros(2)
    states = diffusion.denoise(WrongEarly(), masked(2000, 16, 2), 2, steps, remask="conf",
                               generator=seeded(27))
    for i, (a, b) in enumerate(itertools.pairwise(states)):
        a_t, a_s = i / steps, (i + 1) / steps
        weight = (-a.probability).exp() * (a.tokens != 2)
        sigma = min(1.0, (1 - a_s) / max(a_t, 1e-9)) * weight / weight.sum(1, keepdim=True).clamp(min=1e-9)
        hidden_again = (a.tokens != 2) & (b.tokens == 2)
        for kind, these in enumerate((a.probability < 0.75, a.probability > 0.75)):
            there[kind] += sigma[these].sum()
            variance[kind] += (sigma * (1 - sigma))[these].sum()
            back[kind] += hidden_again[these].sum()
    assert (there > 1000).all()  # both kinds are hidden again: once in two rows, or more often
    assert ((back - there).abs() < 4 * variance.sqrt()).all()


@pytest.mark.parametrize("equal", [True, False], ids=["equal chances", "different chances"])
def test_a_chance_for_each_place_moves_each_place_by_its_own_posterior(equal):
    sigma = torch.tensor([0.25, 0.25, 0.25] if equal else [0.0, 0.25, 0.5])

    def by_place(limit, alpha_s, p):
        return sigma.expand(p.shape)

    states = diffusion.denoise(Fixed(torch.zeros(1, 2)), masked(ROWS, 3, 2), 2, steps=4, order="ancestral",
                               remask=by_place, generator=seeded(29))
    events = []
    for i, (before, after) in enumerate(itertools.pairwise(hidden_in(states, 2))):
        a_t, a_s = i / 4, (i + 1) / 4
        for t in range(3):
            s = min(sigma[t].item(), (1 - a_s) / a_t) if i else sigma[t].item()
            events.append((after[~before[:, t], t], s))
            events.append((~after[before[:, t], t], (a_s - (1 - s) * a_t) / (1 - a_t)))
    assert frequencies_p(events) > 1e-3


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("remask", [*REMASKS, everything_back], ids=label)
def test_given_tokens_are_never_hidden_and_nothing_stays_hidden(order, remask):
    x = with_holes(30, 12, 4)
    x[0], x[1, :6] = 1, 2  # a row without holes, a prefix
    holes, model = x == 4, Fixed(torch.randn(12, 4, generator=seeded(0)))
    for steps in (1, 2, 7, 40):
        states = list(diffusion.denoise(model, x, 4, steps, order=order, remask=remask, generator=seeded(28)))
        for state in states:
            assert torch.equal(state.tokens[~holes], x[~holes])
        assert ((states[-1].tokens >= 0) & (states[-1].tokens < 4)).all()


def test_a_custom_remask_is_told_limit_share_and_commit_probabilities():
    told = []

    def watch(limit, alpha_s, p):
        told.append((limit, alpha_s, p.clone()))
        return 0.0

    x = torch.tensor([[3, 1, 3, 3], [3, 3, 2, 0]])
    logits = torch.randn(4, 3, generator=seeded(0))
    states = list(diffusion.denoise(Fixed(logits), x, 3, steps=3, remask=watch, generator=seeded(1)))
    assert len(told) == 3 == len(states) - 1
    for i, (limit, alpha_s, p) in enumerate(told):
        assert alpha_s == pytest.approx((i + 1) / 3)
        assert limit == pytest.approx([1, 1, 0][i])  # min(1, (1 - alpha_s) / alpha_t)
        committed = (x == 3) & (states[i].tokens != 3)
        expected = torch.where(committed, states[i].probability, math.inf)  # given or hidden: infinite
        torch.testing.assert_close(p, expected)


# ---------------------------------------------------------------------------------------------------
# Threshold


def two_way(confidence):
    """Logits (T,2): token 0 has these probabilities."""
    p = torch.tensor(confidence, dtype=torch.float64)
    return torch.stack([p, 1 - p], -1).log().float()


def test_a_threshold_of_one_changes_nothing():
    x = with_holes(40, 8, 3)
    model = Fixed(torch.randn(8, 3, generator=seeded(0)))

    def states(threshold, steps):
        return list(diffusion.denoise(model, x, 3, steps, order="confidence", threshold=threshold,
                                      generator=seeded(1)))

    for steps in (1, 3, 8, 20):
        for a, b in zip(states(None, steps), states(1, steps), strict=True):
            assert torch.equal(a.tokens, b.tokens) and torch.equal(a.probability, b.probability)


@pytest.mark.parametrize("order", COUNTED)
def test_every_token_above_the_threshold_is_committed_and_one_at_least(order):
    # rows: three sure places, none, all
    model = Fixed(torch.stack([two_way([0.9, 0.6, 0.95, 0.7, 0.81, 0.6]),
                               two_way([0.6, 0.7, 0.65, 0.7, 0.6, 0.79]),
                               two_way([0.9] * 6)]))
    states = list(diffusion.denoise(model, masked(3, 6, 2), 2, steps=6, order=order, threshold=0.8,
                                    temperature=0, generator=seeded(0)))
    first = states[1].tokens != 2
    assert first[0, [0, 2, 4]].all() and first[2].all()
    if order in ("confidence", "margin", "entropy"):
        assert first.sum(1).tolist() == [3, 1, 6]  # the surest place is above the threshold already
    else:
        assert first[1].sum() == 1 and 3 <= first[0].sum() <= 4
    for a, b in itertools.pairwise(states):
        changed, open_rows = (a.tokens != b.tokens).sum(1), (a.tokens == 2).any(1)
        assert (changed[open_rows] >= 1).all()


def test_the_schedule_is_the_slowest_pace():
    # 8 places in 4 steps are due at 8 6 4 2 0. Four sure ones at first are ahead of it: then one a step
    model = Fixed(two_way([0.9, 0.9, 0.6, 0.6, 0.9, 0.9, 0.6, 0.6]))
    states = diffusion.denoise(model, masked(1, 8, 2), 2, steps=4, order="confidence", threshold=0.8,
                               temperature=0)
    assert [hidden.sum().item() for hidden in hidden_in(states, 2)] == [8, 4, 3, 2, 0]


def test_with_a_threshold_steps_is_a_cap_and_a_sure_model_is_asked_less():
    def calls(confidence, steps):
        model = Recorder(Fixed(two_way([confidence] * 10)))
        x = diffusion.generate(model, masked(3, 10, 2), 2, steps, order="confidence", threshold=0.9,
                               temperature=0)
        assert (x == 0).all()
        return len(model.shown)

    assert calls(0.95, 10) == 1
    assert calls(0.6, 10) == 10
    assert calls(0.6, 3) == 3
    assert calls(0.6, 500) == 10


def test_the_threshold_looks_at_the_drawn_tokens_own_probability_without_temperature():
    # Two places of (.9, .1), threshold .8, drawn at temperature 4: both are written in the first step only
    # if both drew the likely token; its own probability is then .9, not the tempered one.
    tempered = (two_way([0.9])[0] / 4).softmax(0)[0].item()
    states = diffusion.denoise(Fixed(two_way([0.9, 0.9])), masked(ROWS, 2, 2), 2, steps=2, order="confidence",
                               temperature=4.0, threshold=0.8, generator=seeded(2))
    next(states)
    both = (next(states).tokens != 2).all(1)
    assert frequencies_p([(both, tempered**2)]) > 1e-3


@pytest.mark.parametrize("order", ["confidence", "margin", "entropy", "left_to_right"])
def test_with_a_threshold_a_row_alone_is_written_as_in_a_batch(order):
    exact = Exact(correlated_joint(3, 6, seed=1))
    x = with_holes(40, 6, 3)
    for steps in (1, 2, 6):
        options = {"steps": steps, "order": order, "threshold": 0.5, "temperature": 0}
        together = diffusion.generate(exact, x, 3, **options)
        alone = [diffusion.generate(exact, row[None], 3, **options) for row in x]
        assert torch.equal(together, torch.cat(alone))


# ---------------------------------------------------------------------------------------------------
# Blocks


def mixed_rows(V):
    """Nine places: free text, a prefix, infilling, another infilling, nothing to do."""
    x = torch.full((5, 9), V)
    x[1, :4] = 1
    x[2, [0, 2, 5]] = 0
    x[3, [1, 3, 4, 6, 7, 8]] = 2
    x[4] = 1
    return x


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("remask", ["none", "renoise"])
@pytest.mark.parametrize("options", [{}, {"threshold": 0.6}], ids=label)
def test_blocks_are_filled_left_to_right_and_only_they_are_asked_about(order, remask, options):
    x = mixed_rows(3)
    holes = x == 3
    block_of = (holes.cumsum(1) - 1) // 3  # a block is three hidden places, wherever they are
    model = Recorder(Fixed(torch.randn(9, 3, generator=seeded(0))))
    for steps in (3, 5, 9):
        states = list(diffusion.denoise(model, x, 3, steps, order=order, remask=remask, block_length=3,
                                        generator=seeded(1), **options))
        assert (states[-1].tokens < 3).all()
        for hidden in hidden_in(states, 3):
            for row in range(5):
                open_blocks = block_of[row][hidden[row]]
                begun = block_of[row][holes[row] & ~hidden[row]]
                assert not len(open_blocks) or not len(begun) or begun.max() <= open_blocks.min()
        blocks = [block_of.flatten()[asked].unique().tolist() for asked in model.asked]
        blocks = [one for one in blocks if one]  # a step may only hide
        assert all(len(one) == 1 for one in blocks) and sorted(blocks) == blocks
        assert blocks[0] == [0] and blocks[-1] == [2]
        for shown, asked in zip(model.shown, model.asked, strict=True):
            assert (shown.flatten()[asked] == 3).all()
        model.shown.clear()
        model.asked.clear()


@pytest.mark.parametrize("order", COUNTED)
@pytest.mark.parametrize("steps", [3, 4, 7, 9, 50])
def test_steps_are_the_total_over_the_blocks(order, steps):
    model = Recorder(Fixed(torch.randn(9, 3, generator=seeded(0))))
    diffusion.generate(model, mixed_rows(3), 3, steps, order=order, block_length=3, generator=seeded(1))
    assert len(model.shown) == min(steps, 9)


def test_fewer_steps_than_blocks_are_refused():
    model = Recorder(Fixed(torch.zeros(9, 3)))
    with pytest.raises(ValueError, match="steps.* 5.* 4") as error:
        diffusion.generate(model, mixed_rows(3), 3, steps=4, block_length=2)
    assert "\n" not in str(error.value) and model.shown == []
    diffusion.generate(model, mixed_rows(3), 3, steps=5, block_length=2)


def test_a_list_of_counts_is_followed_in_each_block():
    states = diffusion.denoise(Fixed(torch.zeros(9, 3)), masked(1, 9, 3), 3, 99, [3, 2, 0], block_length=3,
                               generator=seeded(0))
    assert [hidden.sum().item() for hidden in hidden_in(states, 3)] == [9, 8, 6, 5, 3, 2, 0]


@pytest.mark.parametrize("order", ORDERS)
def test_one_block_as_long_as_the_holes_changes_nothing(order):
    x, model = mixed_rows(3), Fixed(torch.randn(9, 3, generator=seeded(0)))

    def states(block_length):
        return diffusion.denoise(model, x, 3, 5, order=order, block_length=block_length, generator=seeded(1))

    for a, b, c in zip(states(None), states(9), states(400), strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.tokens, c.tokens)


@pytest.mark.parametrize("block_length", [1, 2, 3])
def test_blocks_of_one_token_a_step_reproduce_the_joint_distribution(block_length):
    steps = {1: 4, 2: 4, 3: 6}[block_length]  # three for each of two blocks; the last needs one
    x = diffusion.generate(EXACT, masked(ROWS, T, V), V, steps, block_length=block_length,
                           generator=seeded(31))
    assert chi_square_p(counts_of(x, V), JOINT) > 1e-3


def test_blocks_written_at_once_draw_what_enumeration_says():
    x = diffusion.generate(EXACT, masked(ROWS, T, V), V, steps=2, block_length=2, generator=seeded(32))
    assert chi_square_p(counts_of(x, V), path_log_q(EXACT, [(0, 1), (2, 3)], V, T).exp()) > 1e-3


@pytest.mark.parametrize("order", ["random", "left_to_right", "ancestral"])
@pytest.mark.parametrize("block_length", [None, 1, 2, 4])
@pytest.mark.parametrize("steps", [10, 13, 100])
def test_the_head_is_asked_once_for_each_hidden_token_in_blocks_too(order, block_length, steps):
    x, model = with_holes(6, 10, 5), Recorder(Fixed(torch.zeros(10, 5)))
    diffusion.generate(model, x, 5, steps, order=order, block_length=block_length, generator=seeded(3))
    assert torch.equal(torch.cat(model.asked).sort().values, (x == 5).flatten().nonzero().squeeze(1))


# ---------------------------------------------------------------------------------------------------
# Orders by confidence, margin, entropy, or your own score

#     confidence  margin   entropy        so confidence commits 3 0 2 1, margin 3 2 1 0, entropy 0 3 2 1
RANKED = torch.tensor([
    [0.50, 0.45, 0.05, 0.00, 0.00],  # .50  .05   .86
    [0.40, 0.20, 0.20, 0.20, 0.00],  # .40  .20  1.33
    [0.45, 0.22, 0.22, 0.11, 0.00],  # .45  .23  1.27
    [0.60, 0.10, 0.10, 0.10, 0.10],  # .60  .50  1.23
])
RANKING = {"confidence": [3, 0, 2, 1], "margin": [3, 2, 1, 0], "entropy": [0, 3, 2, 1]}


def committed_in_turn(states, V):
    """The places of a single row in the order in which they were committed."""
    masks = hidden_in(states, V)
    return [(a & ~b).nonzero()[:, 1].tolist() for a, b in itertools.pairwise(masks)]


@pytest.mark.parametrize("order", RANKING)
@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 1}, {"top_p": 0.1, "temperature": 5.0}],
                         ids=label)
def test_each_score_ranks_places_its_own_way(order, options):
    states = diffusion.denoise(Fixed(RANKED.log()), masked(1, 4, 5), 5, steps=4, order=order,
                               generator=seeded(0), **options)
    assert committed_in_turn(states, 5) == [[t] for t in RANKING[order]]


@pytest.mark.parametrize("order", ["margin", "entropy"])
@pytest.mark.parametrize("temperature", [0.2, 1.0, 50.0])
def test_margin_and_entropy_do_not_depend_on_the_drawn_token_or_the_temperature(order, temperature):
    for seed in range(10):
        states = diffusion.denoise(Fixed(RANKED.log()), masked(1, 4, 5), 5, steps=4, order=order,
                                   temperature=temperature, generator=seeded(seed))
        assert committed_in_turn(states, 5) == [[t] for t in RANKING[order]]


def test_scores_look_at_logits_after_adjust():
    # in place 3 the likeliest token is banned: its four others are nearly equal, the least sure place of all
    def no_zero_at_three(logits, x, positions):
        at_three = (positions % 4 == 3)[:, None]
        logits = logits + 0.1 * (at_three & (torch.arange(5) == 1))
        return logits.masked_fill(at_three & (torch.arange(5) == 0), -math.inf)

    ranking = {"confidence": [0, 2, 1, 3], "margin": [2, 1, 0, 3], "entropy": [0, 2, 1, 3]}
    for order, expected in ranking.items():
        states = diffusion.denoise(Fixed(RANKED.log()), masked(1, 4, 5), 5, steps=4, order=order,
                                   temperature=0, adjust=no_zero_at_three)
        assert committed_in_turn(states, 5) == [[t] for t in expected]


def test_an_order_of_your_own_commits_its_highest_scores():
    def highest_token_first(log_p, tokens):
        assert log_p.shape == (len(tokens), 4) and tokens.dtype == torch.int64
        torch.testing.assert_close(log_p.exp().sum(1), torch.ones(len(tokens)))
        return tokens.float()

    logits = torch.full((4, 4), -math.inf)
    logits[torch.arange(4), torch.tensor([2, 0, 3, 1])] = 5.0  # unnormalised
    states = diffusion.denoise(Fixed(logits), masked(1, 4, 4), 4, steps=4, order=highest_token_first)
    assert committed_in_turn(states, 4) == [[2], [0], [3], [1]]


def never_mind(log_p, tokens):
    return torch.full(tokens.shape, -math.inf)


@pytest.mark.parametrize("order", [*COUNTED, never_mind], ids=label)
@pytest.mark.parametrize("options", [{}, {"gumbel": 2.0}, {"block_length": 2}, {"threshold": 0.9},
                                     {"remask": "renoise"}], ids=label)
def test_equal_tokens_everywhere_are_an_order_like_any_other(order, options):
    x = torch.tensor([[1, 0, 2, 2, 1, 2, 2], [2, 2, 2, 2, 0, 0, 1]])
    steps = 4
    states = list(diffusion.denoise(Fixed(torch.zeros(7, 2)), x, 2, steps, order=order, generator=seeded(0),
                                    **options))
    assert [hidden.sum(1).tolist() for hidden in hidden_in(states, 2)] == [[m, m] for m in (4, 3, 2, 1, 0)]


# ---------------------------------------------------------------------------------------------------
# Gumbel noise


@pytest.mark.parametrize("gumbel", [0.5, 1.0, 2.0])
def test_the_first_place_is_drawn_in_proportion_to_its_confidence(gumbel):
    confidence = [0.95, 0.8, 0.65, 0.55]
    states = diffusion.denoise(Fixed(two_way(confidence)), masked(ROWS, 4, 2), 2, steps=4, order="confidence",
                               temperature=0, gumbel=gumbel, generator=seeded(41))
    next(states)
    first = (next(states).tokens != 2).nonzero()[:, 1]
    expected = torch.tensor(confidence) ** (1 / gumbel)
    assert chi_square_p(torch.bincount(first, minlength=4), expected) > 1e-3


def test_gumbel_noise_falls_to_nothing_over_the_steps():
    # ten places, half .9, half .6: rows with one of each left show by their choice how much noise there is
    states = diffusion.denoise(Fixed(two_way([0.9, 0.6] * 5)), masked(ROWS, 10, 2), 2, steps=10,
                               order="confidence", temperature=0, gumbel=1.0, generator=seeded(42))
    sure_first = []
    for a, b in itertools.pairwise(states):
        sure, unsure = (a.tokens == 2)[:, 0::2].sum(1), (a.tokens == 2)[:, 1::2].sum(1)
        gone = sure - (b.tokens == 2)[:, 0::2].sum(1)
        tied = (sure > 0) & (unsure > 0)
        # odds that a sure place goes first, (s/u) 1.5^(1/g), with the numbers of places taken out
        share = gone[tied].double().mean()
        plain = (sure / (sure + unsure))[tied].double().mean()
        sure_first.append((share - plain).item())
    assert sure_first[0] == pytest.approx(0.1, abs=0.015)  # .9/(.9 + .6) - 1/2: proportional at first
    assert sure_first[1] > sure_first[0] - 0.01 and sure_first[5] > sure_first[2] > sure_first[0]
    sure, unsure = 0.9, 0.6
    last = sure_first[8]  # at the last choice a fifth of the noise, or less, is left: .88 for the sure one
    assert last > sure**5 / (sure**5 + unsure**5) - 0.5 - 0.03


def test_without_gumbel_noise_greedy_confidence_is_the_same_for_every_seed():
    exact = Exact(correlated_joint(3, 6, seed=1))

    def text(seed, **options):
        return diffusion.generate(exact, masked(30, 6, 3), 3, steps=4, order="confidence", temperature=0,
                                  generator=seeded(seed), **options)

    assert torch.equal(text(1), text(2)) and torch.equal(text(1, gumbel=0), text(2, gumbel=0.0))
    assert not torch.equal(text(1, gumbel=3.0), text(2, gumbel=3.0))
    assert torch.equal(text(1, gumbel=3.0), text(1, gumbel=3.0))


# ---------------------------------------------------------------------------------------------------
# Guidance: bans, penalties, and what the state remembers


def test_banned_tokens_leave_the_others_in_proportion():
    x = diffusion.generate(Fixed(P.log()), masked(DRAWS, 1, 5), 5, steps=1, adjust=diffusion.ban([1, 4]),
                           generator=seeded(51))
    allowed = torch.tensor([1, 0, 1, 1, 0])
    assert chi_square_p(torch.bincount(x.flatten(), minlength=5), P * allowed) > 1e-3


def test_nothing_banned_changes_nothing():
    def text(adjust):
        return diffusion.generate(EXACT, masked(50, T, V), V, steps=2, adjust=adjust, generator=seeded(0))

    assert torch.equal(text(None), text(diffusion.ban([])))
    assert torch.equal(text(None), text(diffusion.penalize_repetition(1.0)))


@pytest.mark.parametrize("mask_id", [5, 9])  # 9: rows of the embedding that are no token
def test_a_repeated_token_has_its_odds_divided_by_the_penalty(mask_id):
    # two rows that hold different tokens, one of them twice: what counts is that it is there, in this row
    x = torch.tensor([[1, mask_id, 1, 3], [0, 4, mask_id, 4]]).repeat(DRAWS, 1)
    x = diffusion.generate(Fixed(P.log()), x, mask_id, steps=1, adjust=diffusion.penalize_repetition(2.5),
                           generator=seeded(52))
    first, second = x[0::2, 1], x[1::2, 2]
    assert chi_square_p(torch.bincount(first, minlength=5), P / torch.tensor([1, 2.5, 1, 2.5, 1])) > 1e-3
    assert chi_square_p(torch.bincount(second, minlength=5), P / torch.tensor([2.5, 1, 1, 1, 2.5])) > 1e-3


def test_a_penalty_sees_what_has_just_been_written():
    states = list(diffusion.denoise(Fixed(torch.zeros(3, 3)), masked(200, 3, 3), 3, steps=3,
                                    adjust=diffusion.penalize_repetition(1e30), generator=seeded(53)))
    assert torch.equal(states[-1].tokens.sort(1).values, torch.tensor([[0, 1, 2]]).expand(200, 3))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("remask", ["none", "renoise", "conf"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"temperature": 0},
                                     {"top_k": 2, "threshold": 0.4}], ids=label)
def test_the_state_holds_each_tokens_probability_when_it_was_committed(order, remask, options):
    bias = torch.tensor([1.0, 0.0, -0.5])

    def guide(logits, x, positions):
        return logits + bias

    x = with_holes(60, T, V)
    holes = x == V
    states = list(diffusion.denoise(EXACT, x, V, steps=3, order=order, remask=remask, adjust=guide,
                                    generator=seeded(54), **options))
    for state in states:
        assert state.tokens.dtype == torch.int64 and state.probability.dtype == torch.float32
        assert state.tokens.shape == state.probability.shape == x.shape
        assert (state.probability[~holes] == 1).all()
        assert (state.probability[state.tokens == V] == 0).all()
    for a, b in itertools.pairwise(states):
        committed, kept = (a.tokens == V) & (b.tokens != V), (a.tokens != V) & (b.tokens != V)
        log_p = (EXACT(a.tokens) + bias).log_softmax(-1)[committed]
        p = log_p.gather(1, b.tokens[committed][:, None]).squeeze(1).exp()
        torch.testing.assert_close(b.probability[committed], p)
        assert torch.equal(a.probability[kept], b.probability[kept])
        assert torch.equal(a.tokens[kept], b.tokens[kept])


def test_states_are_snapshots():
    # what a caller does to a state, or keeps of it, has nothing to do with the sampler's own
    states, seen = [], []
    for state in diffusion.denoise(EXACT, masked(5, T, V), V, steps=T, generator=seeded(0)):
        states.append(state)
        seen.append((state.tokens.clone(), state.probability.clone()))
    assert all(torch.equal(s.tokens, t) and torch.equal(s.probability, p) for s,
               (t, p) in zip(states, seen, strict=True))
    spoiled = []
    for state in diffusion.denoise(EXACT, masked(5, T, V), V, steps=T, generator=seeded(0)):
        spoiled.append(state.tokens.clone())
        state.tokens.fill_(0)
        state.probability.fill_(7)
    assert all(torch.equal(a, b) for a, (b, _) in zip(spoiled, seen, strict=True))


# ---------------------------------------------------------------------------------------------------
# Smoothing


def noisy_curve(seed, N=64):
    """A true curve, increasing and bent, and a measurement of it at 33 counts with known errors."""
    def truth(m):
        return 1 + 2 * (m / N) ** 3

    counts = sorted({1, *(round(N * i / 32) for i in range(1, 33))})
    errors = [0.1 * (1.2 - m / N) for m in counts]
    noise = torch.randn(len(counts), generator=seeded(seed)).tolist()
    measured = [truth(m) + error * n for m, error, n in zip(counts, errors, noise, strict=True)]
    every = list(range(1, N + 1))
    return Curve(N, every, [truth(m) for m in every], [0.0] * N), Curve(N, counts, measured, errors)


def test_smoothing_returns_a_cubic_as_it_is_at_every_count():
    true, _ = noisy_curve(0)
    sparse = Curve(64, [1, 9, 30, 50, 64], [true.nats[m - 1] for m in (1, 9, 30, 50, 64)], [0.1] * 5)
    smoothed = diffusion.smooth(sparse)
    assert (smoothed.N, smoothed.counts) == (64, true.counts)
    assert smoothed.nats == pytest.approx(true.nats, abs=1e-9)


def test_smoothing_believes_sure_points_more():
    sure = Curve(10, [1, 4, 7, 10, 5], [1.0, 1.0, 1.0, 1.0, 9.0], [0.01, 0.01, 0.01, 0.01, 10.0])
    assert diffusion.smooth(sure).nats == pytest.approx([1.0] * 10, abs=1e-3)


@pytest.mark.parametrize("counts", [[5], [1, 5], [1, 3, 5]])
def test_a_curve_of_few_points_or_unknown_errors_is_smoothed_too(counts):
    nats = [1.0 + m for m in counts]
    smoothed = diffusion.smooth(Curve(5, counts, nats, [math.nan] * len(counts)))
    assert [smoothed.nats[m - 1] for m in counts] == pytest.approx(nats)


def test_a_schedule_of_the_smoothed_curve_is_cheaper_than_one_that_chases_noise():
    chasing, smoothed, linear = 0.0, 0.0, 0.0
    for seed in range(10):
        true, measured = noisy_curve(seed)
        for steps in (4, 8, 16):
            def price(schedule, true=true, steps=steps):
                return diffusion.schedule_nelbo(true, schedule, steps)

            best = price(diffusion.optimal_schedule(true, steps))
            chasing += price(diffusion.optimal_schedule(measured, steps)) - best
            smoothed += price(diffusion.optimal_schedule(diffusion.smooth(measured), steps)) - best
            linear += price("linear") - best
    assert smoothed < chasing / 2 and smoothed < linear / 2


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"order": "random"}, {"order": "confidence", "remask": "cap"},
                                     {"order": "entropy", "threshold": 0.5, "block_length": 9}], ids=label)
def test_compiled_and_eager_write_the_same(options):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=50, context_length=24, n_layer=2, n_head=2, n_embd=32)).eval()
    for parameter in model.parameters():  # the output projections start at zero: a network of the input alone
        torch.nn.init.normal_(parameter, std=0.2)
    compiled = torch.compile(model, dynamic=True)
    x = with_holes(5, 24, 50)
    eager, fast = (diffusion.generate(network, x, 50, steps=8, generator=seeded(1), **options)
                   for network in (model, compiled))
    assert torch.equal(eager, fast)


# ---------------------------------------------------------------------------------------------------
# What a step costs


@pytest.mark.parametrize("options", [{"order": "ancestral"}, {"remask": never},
                                     {"order": "ancestral", "remask": never},
                                     {"order": "confidence", "remask": never},
                                     {"order": "ancestral", "block_length": 2}], ids=label)
def test_a_step_in_which_nothing_changes_costs_no_call(options):
    model = Recorder(EXACT)
    states = list(diffusion.denoise(model, masked(1, T, V), V, steps=2000, generator=seeded(61), **options))
    assert 1 <= len(model.shown) == len(states) - 1 <= T
    for a, b in itertools.pairwise(states):
        assert (a.tokens == V).sum() > (b.tokens == V).sum()


def test_with_remasking_only_steps_that_change_something_are_paid_and_shown():
    model = Recorder(EXACT)
    states = list(diffusion.denoise(model, masked(1, T, V), V, steps=1000, order="ancestral", remask="cap",
                                    generator=seeded(62)))
    assert all(not torch.equal(a.tokens, b.tokens) for a, b in itertools.pairwise(states))
    back = [((a.tokens != V) & (b.tokens == V)).any().item() for a, b in itertools.pairwise(states)]
    assert any(back) and len(model.shown) <= len(states) - 1 < 300


@pytest.mark.parametrize("remask", ["cap", "renoise", one_in_fifty], ids=label)
def test_a_step_that_only_hides_asks_the_network_nothing(remask):
    model = Recorder(EXACT)
    diffusion.generate(model, masked(1, T, V), V, steps=400, order="ancestral", remask=remask,
                       generator=seeded(63))
    assert all(len(asked) > 0 for asked in model.asked)


def likes_token_0(log_p, tokens):
    return log_p[:, 0]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    holes=st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=1, max_size=4),
    steps=st.integers(T, 12),
    schedule=st.sampled_from([*SCHEDULES, [4, 3, 0], [9, 1, 0]]),
    order=st.sampled_from([*ORDERS, likes_token_0]),
    remask=st.sampled_from([None, *REMASKS, half, everything_back]),
    options=st.fixed_dictionaries({}, optional={
        "temperature": st.sampled_from([0, 0.5, 3.0]), "top_k": st.integers(1, 4),
        "top_p": st.sampled_from([0.3, 1]),
        "threshold": st.sampled_from([0.1, 0.5, 1]), "block_length": st.integers(1, 5),
        "gumbel": st.sampled_from([0.0, 1.0]), "adjust": st.just(diffusion.penalize_repetition(1.5))}),
    seed=st.integers(0, 1000),
)
def test_what_holds_for_every_combination_of_options(holes, steps, schedule, order, remask, options, seed):
    x = torch.randint(V, (len(holes), T), generator=seeded(seed)).masked_fill(torch.tensor(holes), V)
    before, hidden, model = x.clone(), x == V, Recorder(EXACT)
    options = {"order": order, "remask": remask, "generator": seeded(seed), **options}
    states = list(diffusion.denoise(model, x, V, steps, schedule, **options))

    blocks = max(1, math.ceil(int(hidden.sum(1).max()) / options.get("block_length", T)))
    planned = steps if isinstance(schedule, str) else blocks * (len(schedule) - 1)
    assert torch.equal(x, before) and torch.equal(states[0].tokens, before)
    assert len(model.shown) <= len(states) - 1 <= planned
    assert all(torch.equal(state.tokens[~hidden], before[~hidden]) for state in states)
    assert all(not torch.equal(a.tokens, b.tokens) for a, b in itertools.pairwise(states))
    assert all(any(torch.equal(shown, state.tokens) for state in states) for shown in model.shown)
    assert all((shown.flatten()[asked] == V).all() for shown,
               asked in zip(model.shown, model.asked, strict=True))
    last = states[-1]
    assert ((last.tokens >= 0) & (last.tokens < V)).all()
    assert ((last.probability > 0) & (last.probability <= 1)).all()


# ---------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("name, value", [
    ("order", None), ("order", "entropie"), ("order", "optimal"),
    ("remask", "maybe"), ("remask", 0.5), ("remask", "ancestral"),
    ("threshold", 0), ("threshold", -0.2), ("threshold", 1.5), ("threshold", math.nan),
    ("block_length", 0), ("block_length", -4),
    ("gumbel", -1.0), ("gumbel", math.nan), ("gumbel", math.inf),
    ("temperature", math.inf), ("top_p", math.nan),
])
def test_a_bad_new_argument_is_refused_by_name_before_the_model_is_asked(name, value):
    model = Recorder(EXACT)
    with pytest.raises(ValueError) as error:
        diffusion.generate(model, masked(1, T, V), V, **{"steps": T, name: value})
    message = str(error.value)
    assert name in message and str(value) in message and "\n" not in message
    assert model.shown == []


@pytest.mark.parametrize("steps", [0, -1])
@pytest.mark.parametrize("options", [{}, {"order": "ancestral"}, {"remask": "cap"}, {"block_length": 2},
                                     {"threshold": 0.5}], ids=label)
def test_no_steps_are_refused_in_every_mode(steps, options):
    model = Recorder(EXACT)
    for x in (masked(1, T, V), torch.zeros(1, T, dtype=torch.int64)):  # with nothing to fill as well
        with pytest.raises(ValueError, match=f"steps.*{steps}"):
            diffusion.generate(model, x, V, steps=steps, **options)
    assert model.shown == []


@pytest.mark.parametrize("penalty", [0, -1.0, math.nan])
def test_a_penalty_that_makes_no_sense_is_refused_by_name(penalty):
    with pytest.raises(ValueError, match="penalty") as error:
        diffusion.generate(EXACT, masked(1, T, V), V, steps=1, adjust=diffusion.penalize_repetition(penalty))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.5}], ids=label)
def test_banning_everything_is_an_error_not_a_token(order, options):
    with pytest.raises(ValueError, match="adjust") as error:
        diffusion.generate(EXACT, masked(2, T, V), V, steps=2, order=order, adjust=diffusion.ban(range(V)),
                           generator=seeded(0), **options)
    assert "\n" not in str(error.value)


def test_banning_everything_at_one_place_of_one_row_is_an_error_too():
    def ban_one_place(logits, x, positions):
        return logits.masked_fill((positions == 5)[:, None], -math.inf)

    with pytest.raises(ValueError, match="adjust"):
        diffusion.generate(EXACT, masked(2, T, V), V, steps=1, adjust=ban_one_place, generator=seeded(0))


# ---------------------------------------------------------------------------------------------------
# Mistakes seen in other repositories


@pytest.mark.parametrize("options", [{"remask": "renoise"}, {"remask": "conf"}, {"threshold": 0.9},
                                     {"block_length": 1}, {"gumbel": 1.0, "order": "confidence"}], ids=label)
def test_peer_bug_1_temperature_changes_the_written_token_with_every_option(options):
    # seen: a temperature that re-ranks places and never changes what is written
    x = diffusion.generate(Fixed(P.log()), masked(DRAWS, 1, 5), 5, steps=1, temperature=2.0,
                           generator=seeded(71), **options)
    assert chi_square_p(torch.bincount(x.flatten(), minlength=5), (P.log() / 2).softmax(0)) > 1e-3


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("remask", [*REMASKS, everything_back], ids=label)
def test_peer_bug_2_the_mask_token_is_never_written(order, remask):
    # every real token is, and what is hidden in between was hidden by the sampler, not drawn
    model = Fixed(torch.randn(8, 4, generator=seeded(0)))
    states = list(diffusion.denoise(model, masked(50, 8, 4), 4, steps=6, order=order, remask=remask,
                                    temperature=50.0, generator=seeded(72)))
    assert sorted(set(states[-1].tokens.flatten().tolist())) == [0, 1, 2, 3]
    assert all(torch.equal(state.tokens == 4, state.probability == 0) for state in states)


@pytest.mark.parametrize("options", [{"remask": "renoise"}, {"remask": "conf", "order": "ancestral"},
                                     {"threshold": 0.3}, {"block_length": 3},
                                     {"gumbel": 5.0, "order": "confidence"}], ids=label)
def test_peer_bug_3_a_banned_token_is_never_written_whatever_the_options(options):
    # seen: the suppression written to a tensor that sampling had already read
    states = diffusion.denoise(Fixed(P.log()), masked(40, 8, 5), 5, steps=6, adjust=diffusion.ban([1]),
                               generator=seeded(73), **options)
    assert all(not (state.tokens == 1).any() for state in states)


@pytest.mark.parametrize("options", [{"order": "margin"}, {"order": "entropy"},
                                     {"order": "confidence", "gumbel": 0.1},
                                     {"order": "confidence", "block_length": 3}], ids=label)
def test_peer_bug_4_every_score_is_ranked_within_its_row(options):
    # seen: the most confident places of the whole batch committed, so the sure row took the unsure row's turn
    model = Fixed(torch.stack([two_way([0.99] * 6), two_way([0.6] * 6)]))
    states = diffusion.denoise(model, masked(2, 6, 2), 2, steps=6, temperature=0, generator=seeded(74),
                               **options)
    assert [hidden.sum(1).tolist() for hidden in hidden_in(states, 2)] == [[m, m] for m in range(6, -1, -1)]


def test_peer_bug_4_a_threshold_is_met_within_each_row():
    model = Fixed(torch.stack([two_way([0.99] * 6), two_way([0.6] * 6)]))
    states = diffusion.denoise(model, masked(2, 6, 2), 2, steps=6, order="confidence", threshold=0.9,
                               temperature=0)
    hidden = [mask.sum(1).tolist() for mask in hidden_in(states, 2)]
    assert hidden == [[6, 6], [0, 5], [0, 4], [0, 3], [0, 2], [0, 1], [0, 0]]


def test_peer_bug_8_rare_tokens_are_drawn_in_proportion_while_places_are_ranked_with_noise(monkeypatch):
    # seen: float32 noise cuts the tail. Of evenly spaced uniform draws each rare token gets its share, with
    # confidence, Gumbel noise and a threshold around the draw.
    spaced = 1 - 2**-18 * (torch.arange(2560, dtype=torch.float64) + 0.5) / 2560
    rand = torch.rand

    def even(*size, dtype=torch.float32, **options):
        if dtype == torch.float64 and math.prod(size) == 2560:
            return spaced.reshape(size)
        return rand(*size, dtype=dtype, **options)

    monkeypatch.setattr(torch, "rand", even)
    logits = torch.tensor([math.log(1 - 2**-18)] + [-26 * math.log(2)] * 256)
    x = diffusion.generate(Fixed(logits), masked(2560, 1, 257), 257, steps=1, order="confidence", gumbel=1.0,
                           threshold=0.9, generator=seeded(75))
    counts = torch.bincount(x.flatten(), minlength=257)
    assert counts[0] <= 3 and (counts[1:] - 10).abs().max() <= 1  # the logits themselves are float32


def test_peer_bug_9_every_row_has_its_own_mask_ratio():
    # seen: one ratio for a whole batch, in training and then in sampling
    x_0 = torch.randint(5, (32, 64), generator=seeded(76))
    num_masked = (diffusion.corrupt(x_0, 5, generator=seeded(77)).inputs == 5).sum(1)
    assert len(num_masked.unique()) > 16
    x = mixed_rows(3)
    for order in COUNTED:
        states = diffusion.denoise(Fixed(torch.randn(9, 3, generator=seeded(0))), x, 3, steps=3, order=order,
                                   generator=seeded(78))
        assert [hidden.sum(1).tolist() for hidden in hidden_in(states, 3)] == [
            [9, 5, 6, 3, 0], [6, 3, 4, 2, 0], [3, 2, 2, 1, 0], [0] * 5]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("remask", REMASKS)
def test_peer_bug_11_ids_between_the_vocabulary_and_the_mask_are_never_written(order, remask):
    # seen: padded rows of the embedding sampled as tokens, on which the tokenizer then died
    x = with_holes(60, 8, 9)
    x[x != 9] = 0
    model = Fixed(torch.randn(8, 5, generator=seeded(0)) / 10)
    written = diffusion.generate(model, x, 9, steps=4, order=order, remask=remask, generator=seeded(79))
    assert written.unique().tolist() == [0, 1, 2, 3, 4]


def test_peer_bug_11_a_network_with_an_odd_vocabulary_writes_all_of_it_and_nothing_else():
    torch.manual_seed(0)
    network = Transformer(ModelConfig(vocab_size=11, context_length=16, n_layer=1, n_head=1, n_embd=16))
    written = diffusion.generate(network, masked(100, 16, 11), 11, steps=2, temperature=20.0,
                                 generator=seeded(80))
    assert written.unique().tolist() == list(range(11))


def test_peer_bug_13_given_tokens_cost_no_answer_and_count_as_none():
    # seen: a rate of tokens per second that counts the prompt. What was asked is what was written.
    x, model = mixed_rows(3), Recorder(Fixed(torch.zeros(9, 3)))
    states = list(diffusion.denoise(model, x, 3, steps=4, generator=seeded(81)))
    committed = sum(((a.tokens == 3) & (b.tokens != 3)).sum().item() for a, b in itertools.pairwise(states))
    assert committed == (x == 3).sum() == sum(len(asked) for asked in model.asked) == 23
