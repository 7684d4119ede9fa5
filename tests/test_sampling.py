"""Sampling against exact answers: a table of probabilities plays the network, so every distribution that
`generate` and `draw_tokens` should produce is known, and chi-square tests say whether they produce it."""

import itertools
import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diffusion

SCHEDULES = ("linear", "cosine", "exponential")
ORDERS = tuple(diffusion.ORDERS)
COUNTED = tuple(order for order in ORDERS if order != "ancestral")  # these follow the schedule's exact counts
NAN = float("nan")

# ---------------------------------------------------------------------------------------------------
# Models whose answers are known


class Exact:
    """The conditionals of `joint`, a table of shape (V,)*T of probabilities. At given places NaN: poison."""

    def __init__(self, joint):
        self.T, self.V = joint.dim(), joint.shape[0]
        for t in range(self.T):  # one more entry along each axis, the sum over it: that is what a mask means
            joint = torch.cat([joint, joint.sum(t, keepdim=True)], t)
        self.probability = joint  # of what is visible; index V means hidden
        self.stride = torch.tensor(joint.stride())

    def __call__(self, tokens, positions=None):
        assert tokens.shape[1] == self.T and tokens.dtype == torch.int64
        state = (tokens * self.stride).sum(1)[:, None, None]
        change = (torch.arange(self.V) - tokens[:, :, None]) * self.stride[:, None]  # (B,T,V): v at place t
        logits = self.probability.flatten()[state + change].log().float()
        logits[tokens != self.V] = NAN
        return logits if positions is None else logits.flatten(0, 1)[positions]


class Causal(Exact):
    """The same joint left to right: from [mask_id, x_0[:-1]], at place t log p(x_t | x_<t) + constant."""

    def __call__(self, inputs, positions=None):
        assert (inputs[:, 0] == self.V).all()
        columns = []
        for t in range(self.T):
            seen = torch.full_like(inputs, self.V)
            seen[:, :t] = inputs[:, 1 : t + 1]
            columns.append(super().__call__(seen)[:, t])
        logits = torch.stack(columns, 1)
        return logits if positions is None else logits.flatten(0, 1)[positions]


class Fixed:
    """Independent places: the same logits (T,V) or (B,T,V) whatever is visible."""

    def __init__(self, logits):
        self.logits = torch.as_tensor(logits)

    def __call__(self, tokens, positions=None):
        logits = self.logits.expand(*tokens.shape, self.logits.shape[-1])
        return logits if positions is None else logits.flatten(0, 1)[positions]


class Recorder:
    """Any model, with a record of what it was shown and asked."""

    def __init__(self, model):
        self.model, self.shown, self.asked = model, [], []

    def __call__(self, tokens, positions=None):
        self.shown.append(tokens.clone())
        self.asked.append(positions.clone())  # `denoise` must use the cheap head: positions are always given
        return self.model(tokens, positions)


# ---------------------------------------------------------------------------------------------------
# Helpers


def correlated_joint(V, T, seed=0):
    """A random table: every token depends on all the others."""
    return torch.randn(V**T, generator=seeded(seed), dtype=torch.float64).softmax(0).reshape((V,) * T)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def masked(B, T, V):
    return torch.full((B, T), V)


def with_holes(B, T, V):
    given = torch.randint(V, (B, T), generator=seeded(0))
    return given.masked_fill(torch.rand(B, T, generator=seeded(1)) < 0.7, V)


def counts_of(rows, V):
    """How often each of the V**T possible rows occurs, in the order of a flattened table."""
    T = rows.shape[1]
    index = (rows * torch.tensor([V ** (T - 1 - t) for t in range(T)])).sum(1)
    return torch.bincount(index, minlength=V**T)


def chi_square_p(observed, probability):
    """The probability of a chi-square as large as this if `observed` counts are drawn from `probability`."""
    observed, probability = observed.double().flatten(), probability.double().flatten()
    assert observed[probability == 0].sum() == 0, "an impossible outcome occurred"
    observed, probability = observed[probability > 0], probability[probability > 0]
    expected = observed.sum() * probability / probability.sum()
    assert expected.min() > 5, "too few draws for a chi-square test"
    if len(expected) == 1:
        return 1.0
    chi_square = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), chi_square / 2).item()


def draws(logits, n, seed=0, **options):
    """n draws from one distribution: how often each token came."""
    logits = torch.as_tensor(logits)
    tokens = diffusion.draw_tokens(logits.expand(n, -1), generator=seeded(seed), **options)
    return torch.bincount(tokens, minlength=len(logits))


def subset_sampler(exact, counts):
    """By enumeration: the distribution (V,)*T of a sampler that starts from nothing, reveals uniformly
    random subsets until `counts` places are hidden, and draws the tokens of a subset independently."""
    V, T = exact.V, exact.T
    p, states = exact.probability, {(V,) * T: 1.0}
    for before, after in itertools.pairwise(counts):
        following = defaultdict(float)
        for state, weight in states.items():
            subsets = list(itertools.combinations([t for t in range(T) if state[t] == V], before - after))
            contents = itertools.product(range(V), repeat=before - after)
            for subset, symbols in itertools.product(subsets, contents):
                q, revealed = weight / len(subsets), list(state)
                for t, v in zip(subset, symbols, strict=True):
                    q *= (p[(*state[:t], v, *state[t + 1 :])] / p[state]).item()
                    revealed[t] = v
                following[tuple(revealed)] += q
        states = following
    table = torch.zeros((V,) * T, dtype=torch.float64)
    for state, weight in states.items():
        table[state] = weight
    return table


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On tensors as small as these, threads mostly wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


V, T = 3, 4
JOINT = correlated_joint(V, T)
EXACT = Exact(JOINT)
ROWS = 20_000


# ---------------------------------------------------------------------------------------------------
# The distribution of what is written


@pytest.mark.parametrize("order", ["random", "left_to_right"])
def test_one_token_a_step_reproduces_the_joint_distribution(order):
    x = diffusion.generate(EXACT, masked(ROWS, T, V), V, steps=T, order=order, generator=seeded(1))
    assert chi_square_p(counts_of(x, V), JOINT) > 1e-3


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_fewer_steps_draw_what_enumeration_says(steps):
    # linear counts by hand: 4 places in 1 step 4,0; in 2 steps 4,2,0; in 3 steps 4, round(8/3), round(4/3), 0
    counts = {1: [4, 0], 2: [4, 2, 0], 3: [4, 3, 1, 0]}[steps]
    x = diffusion.generate(EXACT, masked(ROWS, T, V), V, steps=steps, generator=seeded(2))
    assert chi_square_p(counts_of(x, V), subset_sampler(EXACT, counts)) > 1e-3


def test_divergence_from_the_truth_shrinks_as_steps_grow():
    def divergence(steps):
        x = diffusion.generate(EXACT, masked(ROWS, T, V), V, steps=steps, generator=seeded(3))
        q = counts_of(x, V) / ROWS
        return torch.special.xlogy(q, q / JOINT.flatten()).sum().item()

    one, two, four = divergence(1), divergence(2), divergence(4)
    # 81 outcomes: from the true distribution 2 * ROWS * divergence is chi-square, mean 80, deviation 12.6
    assert four < (80 + 4 * 12.6) / (2 * ROWS)
    assert one > 1.5 * two > 2 * four


@pytest.mark.parametrize("order", ["random", "left_to_right"])
def test_infilling_draws_from_the_conditional_given_both_sides(order):
    x = masked(ROWS, T, V)
    x[:, 0], x[:, 3] = 2, 1
    x = diffusion.generate(EXACT, x, V, steps=2, order=order, generator=seeded(4))
    assert (x[:, 0] == 2).all() and (x[:, 3] == 1).all()
    assert chi_square_p(counts_of(x[:, 1:3], V), JOINT[2, :, :, 1]) > 1e-3


def test_rows_with_different_holes_draw_from_their_own_conditionals():
    free, ends, last = masked(ROWS, T, V), masked(ROWS, T, V), masked(ROWS, T, V)
    ends[:, 1:3] = torch.tensor([0, 2])  # holes first and last
    last[:, :3] = torch.tensor([1, 0, 2])
    x = diffusion.generate(EXACT, torch.cat([free, ends, last]), V, steps=T, generator=seeded(5))
    free, ends, last = x.chunk(3)
    assert chi_square_p(counts_of(free, V), JOINT) > 1e-3
    assert chi_square_p(counts_of(ends[:, [0, 3]], V), JOINT[:, 0, 2, :]) > 1e-3
    assert chi_square_p(counts_of(last[:, 3:], V), JOINT[1, 0, 2, :]) > 1e-3


def test_random_order_commits_every_subset_equally_often():
    states = diffusion.denoise(EXACT, masked(ROWS, T, V), V, steps=2, generator=seeded(6))
    next(states)
    subsets = counts_of((next(states).tokens == V).long(), 2)  # a row of 0 and 1 is a number below 16
    assert chi_square_p(subsets, torch.tensor([bin(i).count("1") == 2 for i in range(16)])) > 1e-3


def test_left_to_right_model_reproduces_the_joint_by_the_chain_rule():
    model = diffusion.left_to_right_model(Causal(JOINT), V)
    x = diffusion.generate(model, masked(ROWS, T, V), V, steps=T, order="left_to_right", generator=seeded(7))
    assert chi_square_p(counts_of(x, V), JOINT) > 1e-3


def test_left_to_right_model_answers_from_the_tokens_before():
    # the product of p(x_t | x_<t) over t is the joint, for each of the 81 rows
    x = torch.tensor(list(itertools.product(range(V), repeat=T)))
    logits = diffusion.left_to_right_model(Causal(JOINT), V)(x, torch.arange(x.numel())).reshape(*x.shape, V)
    chain = logits.double().log_softmax(-1).gather(-1, x[..., None]).sum((1, 2))
    torch.testing.assert_close(chain.exp(), JOINT.flatten(), rtol=1e-5, atol=0)


def test_left_to_right_model_gives_the_same_answer_at_positions():
    x = torch.randint(V + 1, (50, T), generator=seeded(8))
    positions = torch.tensor([0, 3, 4, 50, 199])
    model = diffusion.left_to_right_model(Causal(JOINT), V)
    assert torch.equal(model(x, positions), model(x).flatten(0, 1)[positions])


# ---------------------------------------------------------------------------------------------------
# What holds in every run


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    holes=st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=1, max_size=5),
    steps=st.integers(1, 9),
    schedule=st.sampled_from([*SCHEDULES, [4, 3, 0], [40, 25, 7, 3, 0]]),
    order=st.sampled_from(COUNTED),
    options=st.sampled_from([{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.6}, {"temperature": 3.0}]),
    seed=st.integers(0, 1000),
)
def test_given_tokens_stay_and_hidden_ones_follow_the_schedule(holes, steps, schedule, order, options, seed):
    x = torch.randint(V, (len(holes), T), generator=seeded(seed)).masked_fill(torch.tensor(holes), V)
    before, model = x.clone(), Recorder(EXACT)
    options = {"generator": seeded(seed), **options}
    states = [state.tokens for state in diffusion.denoise(model, x, V, steps, schedule, order, **options)]

    num_hidden = (x == V).sum(1)
    planned_steps = steps if isinstance(schedule, str) else len(schedule) - 1
    assert torch.equal(x, before)  # the caller's tensor is left alone
    assert torch.equal(states[0], before)
    assert len(states) - 1 == len(model.shown) == min(planned_steps, num_hidden.max())  # one call a step
    counts = diffusion.hidden_counts(schedule, num_hidden, steps)
    for i, (state, later) in enumerate(itertools.pairwise(states)):
        assert torch.equal(model.shown[i], state)
        assert torch.equal((later == V).sum(1), counts[i + 1])
        assert torch.equal(later[state != V], state[state != V])  # what is written stays written
    assert (states[-1] < V).all() and (states[-1] >= 0).all()


@pytest.mark.parametrize("order", ["random", "left_to_right"])
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_the_head_is_asked_once_for_each_hidden_token(order, steps):
    x = with_holes(6, 10, 5)
    model = Recorder(Fixed(torch.randn(10, 5, generator=seeded(2))))
    diffusion.generate(model, x, 5, steps=steps, order=order, generator=seeded(3))
    asked = torch.cat(model.asked)
    assert torch.equal(asked.sort().values, (x == 5).flatten().nonzero().squeeze(1))


def test_left_to_right_commits_the_leftmost_holes():
    x = torch.tensor([[9, 1, 9, 9, 0, 9], [9, 9, 9, 9, 1, 1]])
    states = list(diffusion.denoise(Fixed(torch.zeros(6, 9)), x, 9, steps=2, order="left_to_right"))
    halfway = states[1].tokens == 9
    assert halfway.tolist() == [[False] * 3 + [True, False, True], [False, False, True, True, False, False]]


def test_rows_without_holes_cost_nothing_and_come_back_as_they_are():
    x, model = torch.tensor([[0, 1, 2, 0]]), Recorder(EXACT)
    assert [state.tokens.tolist() for state in diffusion.denoise(model, x, V, steps=3)] == [x.tolist()]
    assert model.shown == []


@pytest.mark.parametrize("order", ORDERS)
def test_the_same_seed_writes_the_same_text_and_another_seed_another(order):
    def text(seed):
        return diffusion.generate(EXACT, masked(50, T, V), V, steps=2, order=order, generator=seeded(seed))

    assert torch.equal(text(1), text(1))
    assert not torch.equal(text(1), text(2))


def test_a_generator_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    diffusion.generate(EXACT, masked(5, T, V), V, steps=2, generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------
# Greedy and confidence


def test_greedy_takes_the_likeliest_token_given_what_is_written():
    x = torch.full((T,), V)
    for t in range(T):  # by hand: the argmax of each conditional in turn
        scores = [EXACT.probability[(*x[:t], v, *x[t + 1 :])] for v in range(V)]
        x[t] = torch.stack(scores).argmax()
    for seed in (0, 1):
        written = diffusion.generate(EXACT, masked(2, T, V), V, steps=T, order="left_to_right",
                                     temperature=0, generator=seeded(seed))
        assert written.tolist() == [x.tolist()] * 2


def test_greedy_in_one_step_takes_the_argmax_of_every_marginal():
    marginals = [JOINT.sum([d for d in range(T) if d != t]).argmax().item() for t in range(T)]
    assert diffusion.generate(EXACT, masked(1, T, V), V, steps=1, temperature=0).tolist() == [marginals]


def test_confidence_commits_the_highest_probabilities_first():
    confidence = torch.tensor([0.5, 0.9, 0.4, 0.8, 0.99, 0.7])  # of token 1 or 0, whichever is likelier
    model = Fixed(torch.stack([1 - confidence, confidence], -1).log())
    states = list(diffusion.denoise(model, masked(1, 6, 2), 2, steps=6, order="confidence", temperature=0))
    committed = [(a.tokens != b.tokens).nonzero()[0, 1].item() for a, b in itertools.pairwise(states)]
    assert committed == [4, 1, 3, 5, 2, 0]  # place 2 is sure of token 0 with 0.6


def test_confidence_is_the_drawn_tokens_probability_not_the_places_best():
    # Place 0 draws token 0 or 1, half each. Place 1 draws token 2 with 0.6, and then comes first; otherwise
    # it holds a token of 0.4 against place 0's 0.5.
    logits = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.4, 0.6]]).log()
    states = list(diffusion.denoise(Fixed(logits), masked(ROWS, 2, 3), 3, steps=2, order="confidence",
                                    generator=seeded(0)))
    first = states[1].tokens
    place_1_first = first[:, 0] == 3
    assert (first[place_1_first, 1] == 2).all()
    assert chi_square_p(torch.bincount(place_1_first.long()), torch.tensor([0.4, 0.6])) > 1e-3


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_a_row_alone_is_written_as_in_a_batch(steps):
    exact = Exact(correlated_joint(3, 6, seed=1))
    x = with_holes(40, 6, 3)
    options = {"steps": steps, "order": "confidence", "temperature": 0}
    together = diffusion.generate(exact, x, 3, **options)
    alone = [diffusion.generate(exact, row[None], 3, **options) for row in x]
    assert torch.equal(together, torch.cat(alone))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 10**6))
def test_largest_marks_the_quota_of_best_places(B, T, seed):
    random = seeded(seed)
    score = torch.randint(-2, 3, (B, T), generator=random).double()  # few values: many ties
    among = torch.rand(B, T, generator=random) < 0.6
    quota = torch.randint(0, T + 1, (B,), generator=random)
    chosen = diffusion.largest(score, among, quota)
    assert torch.equal(chosen.sum(1), quota.minimum(among.sum(1)))
    assert not (chosen & ~among).any()
    for row in range(B):
        taken, left = score[row, chosen[row]], score[row, among[row] & ~chosen[row]]
        assert not len(taken) or not len(left) or taken.min() >= left.max()


# ---------------------------------------------------------------------------------------------------
# Drawing one token

P = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
DRAWS = 20_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0, 10.0])
def test_tokens_are_drawn_from_the_tempered_softmax(temperature, dtype):
    logits = (P.log() + 3).to(dtype)  # unnormalised: a constant must not matter
    expected = (logits.double() / temperature).softmax(0)
    assert chi_square_p(draws(logits, DRAWS, temperature=temperature), expected) > 1e-3


def test_a_vast_temperature_draws_every_token_equally_often():
    assert chi_square_p(draws(P.log(), DRAWS, temperature=1e6), torch.ones(5)) > 1e-3


@pytest.mark.parametrize("temperature", [0, 0.5, 1.0])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 2}, {"top_p": 0.5}])
def test_the_probability_of_the_state_is_the_untempered_one(temperature, truncation):
    logits = torch.randn(100, 7, generator=seeded(0)) * 2
    *_, state = diffusion.denoise(Fixed(logits), masked(1, 100, 7), 7, steps=2, temperature=temperature,
                                  generator=seeded(1), **truncation)
    expected = logits.double().softmax(-1).gather(1, state.tokens.T)
    torch.testing.assert_close(state.probability.double().T, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("k, kept", [(1, [1]), (2, [1, 3]), (4, [0, 1, 3, 4]), (99, [0, 1, 2, 3, 4])])
def test_top_k_draws_the_k_likeliest_with_renormalised_probabilities(k, kept):
    expected = torch.zeros(5).index_copy(0, torch.tensor(kept), P[kept])
    counts = draws(P.log(), DRAWS, top_k=k)
    assert counts.nonzero().flatten().tolist() == kept
    assert chi_square_p(counts, expected) > 1e-3


@pytest.mark.parametrize("p, kept", [(0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 3, 4]),
                                     (0.94, [0, 1, 3, 4]), (0.96, [0, 1, 2, 3, 4])])
def test_top_p_draws_the_smallest_nucleus_with_renormalised_probabilities(p, kept):
    # cumulated from the likeliest: .4, .7, .85, .95, 1 for tokens 1, 3, 4, 0, 2
    expected = torch.zeros(5).index_copy(0, torch.tensor(kept), P[kept])
    counts = draws(P.log(), DRAWS, top_p=p)
    assert counts.nonzero().flatten().tolist() == kept
    assert chi_square_p(counts, expected) > 1e-3


@pytest.mark.parametrize("k, p, kept", [(2, 0.96, [1, 3]), (4, 0.69, [1, 3]), (1, 0.96, [1]), (4, 0.39, [1])])
def test_top_k_and_top_p_together_keep_what_both_keep(k, p, kept):
    # chosen so that it does not matter whether the nucleus is taken of all tokens or of the k likeliest
    expected = torch.zeros(5).index_copy(0, torch.tensor(kept), P[kept])
    counts = draws(P.log(), DRAWS, top_k=k, top_p=p)
    assert counts.nonzero().flatten().tolist() == kept
    assert chi_square_p(counts, expected) > 1e-3


def test_among_equals_top_k_and_top_p_keep_no_more_than_asked():
    assert (draws(torch.zeros(8), 1000, top_k=3) > 0).sum() == 3
    assert (draws(torch.zeros(8), 1000, top_p=0.3) > 0).sum() == 3  # 2/8 < .3 <= 3/8


def test_top_k_of_one_is_greedy():
    logits = torch.randn(200, 9, generator=seeded(0))
    greedy = diffusion.draw_tokens(logits, temperature=0)
    top_1 = diffusion.draw_tokens(logits, top_k=1, generator=seeded(1))
    assert torch.equal(greedy, logits.argmax(-1)) and torch.equal(top_1, greedy)


def test_every_row_is_drawn_from_its_own_logits():
    logits = torch.full((6, 6), -math.inf).fill_diagonal_(0.0)[[3, 1, 5, 0, 2, 4]]
    assert diffusion.draw_tokens(logits, generator=seeded(0)).tolist() == [3, 1, 5, 0, 2, 4]


def uniform_draws(monkeypatch, values):
    """From here on torch.rand gives these numbers, in whatever precision it is asked for."""

    def rand(*size, dtype=torch.float32, **_):
        return torch.as_tensor(values, dtype=torch.float64).to(dtype).reshape(*size)

    monkeypatch.setattr(torch, "rand", rand)


@pytest.mark.parametrize("u, token", [(0.0, 1), (1 - 2**-53, 2)])
def test_the_extreme_uniform_draws_give_possible_tokens(monkeypatch, u, token):
    uniform_draws(monkeypatch, [u] * 3)
    logits = torch.tensor([[-math.inf, 0.1, 0.3, -math.inf]]).expand(3, 4)
    assert diffusion.draw_tokens(logits).tolist() == [token] * 3


def test_the_tail_is_drawn_in_proportion(monkeypatch):
    # One token of nearly 1 and 256 of 2^-26 each, which share the uniform draws above 1 - 2^-18. Of evenly
    # spaced draws each must get its ten: in float32 most of these draws are the same number.
    spaced = 1 - 2**-18 * (torch.arange(2560, dtype=torch.float64) + 0.5) / 2560
    uniform_draws(monkeypatch, spaced)
    logits = torch.tensor([math.log(1 - 2**-18)] + [-26 * math.log(2)] * 256, dtype=torch.float64)
    counts = torch.bincount(diffusion.draw_tokens(logits.expand(2560, -1)), minlength=257)
    assert counts[0] == 0 and counts[1:].tolist() == [10] * 256


# ---------------------------------------------------------------------------------------------------
# The adjust hook


def test_adjust_sees_logits_state_and_positions_of_every_step():
    x = torch.tensor([[V, 1, V, V], [0, V, 2, 1]])
    model, calls = Recorder(EXACT), []

    def adjust(logits, x, positions):
        assert logits.shape == (len(positions), V) and logits.isfinite().all()
        assert x.shape == (2, T) and (x.flatten()[positions] == V).all()
        calls.append((x.clone(), positions.clone()))
        return logits

    diffusion.generate(model, x, V, steps=3, adjust=adjust, generator=seeded(0))
    for i, (state, positions) in enumerate(calls):
        assert torch.equal(state, model.shown[i]) and torch.equal(positions, model.asked[i])
    assert len(calls) == len(model.shown) == 3


def test_adjust_changes_the_distribution_as_its_logits_say():
    def guide(logits, x, positions):
        return logits + torch.tensor([1.0, 0.0, -1.0])

    x = diffusion.generate(Fixed(torch.zeros(1, 3)), masked(DRAWS, 1, 3), 3, steps=1, adjust=guide,
                           generator=seeded(0))
    expected = torch.tensor([1.0, 0.0, -1.0]).softmax(0)
    assert chi_square_p(torch.bincount(x.flatten(), minlength=3), expected) > 1e-3


def test_adjust_may_depend_on_the_place():
    def alternate(logits, x, positions):
        banned = torch.where(positions % x.shape[1] % 2 == 0, 0, 1)
        return logits.scatter(1, banned[:, None], -math.inf)

    x = diffusion.generate(Fixed(torch.zeros(6, 2)), masked(20, 6, 2), 2, steps=3, adjust=alternate,
                           generator=seeded(0))
    assert x.tolist() == [[1, 0, 1, 0, 1, 0]] * 20


# ---------------------------------------------------------------------------------------------------
# How many stay hidden

CURVES = {
    "linear": lambda u: 1 - u,
    "cosine": lambda u: (1 + math.cos(math.pi * u)) / 2,
    "exponential": lambda u: math.exp(-3 * u),
}


def check_counts(counts, N, ideal):
    """`counts` (a list) go from N to 0 in S steps: round(ideal(i)), bent only as far as the rules demand."""
    S = len(counts) - 1
    assert counts[0] == N and counts[-1] == 0
    for i in range(1, S):
        roundings = {math.floor(ideal(i) + 0.5 + nudge) for nudge in (-1e-9, 1e-9)}  # a half goes either way
        bent = {max(min(m, counts[i - 1] - 1), S - i) for m in roundings}
        assert counts[i] in bent, (i, counts, ideal(i))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(SCHEDULES), st.lists(st.integers(0, 300), min_size=1, max_size=5), st.integers(1, 60))
def test_hidden_counts_agree_with_a_plain_reference(schedule, num_hidden, steps):
    counts = diffusion.hidden_counts(schedule, torch.tensor(num_hidden), steps)
    longest = min(steps, max(num_hidden))
    assert counts.shape == (longest + 1, len(num_hidden)) and not counts.is_floating_point()
    for N, column in zip(num_hidden, counts.T.tolist(), strict=True):
        S = min(steps, N)
        check_counts(column[: S + 1], N, lambda i, N=N, S=S: N * CURVES[schedule](i / S))
        assert column[S:] == [0] * (longest + 1 - S)


def test_hidden_counts_by_hand():
    def counts(schedule, N, steps):
        return diffusion.hidden_counts(schedule, torch.tensor([N]), steps).flatten().tolist()

    assert counts("linear", 100, 4) == [100, 75, 50, 25, 0]
    assert counts("cosine", 100, 4) == [100, 85, 50, 15, 0]  # (1 + cos 45 degrees)/2 = 0.854
    assert counts("exponential", 100, 3) == [100, 37, 14, 0]  # 1/e, 1/e^2, and 5% jumps to 0
    assert counts("cosine", 10, 10) == [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]  # one token a step leaves no choice
    assert counts("exponential", 6, 5) == [6, 4, 3, 2, 1, 0]  # ideal: 3.3 -> 3, but 4 steps are left after it


def test_a_list_of_counts_is_honoured_exactly():
    wanted = [50, 49, 20, 3, 0]
    counts = diffusion.hidden_counts(wanted, torch.tensor([50, 50]), steps=4)
    assert counts.T.tolist() == [wanted, wanted]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sets(st.integers(1, 200), min_size=1, max_size=12), st.integers(0, 400))
def test_a_list_of_counts_is_rescaled_to_other_lengths(hidden, N):
    wanted = [*sorted(hidden, reverse=True), 0]
    column = diffusion.hidden_counts(wanted, torch.tensor([N]), steps=len(wanted) - 1).flatten().tolist()
    S = min(len(wanted) - 1, N)
    if S == len(wanted) - 1:
        check_counts(column, N, lambda i: wanted[i] * N / wanted[0])
    else:  # fewer tokens than steps: one a step
        assert column == list(range(N, -1, -1))


def test_a_list_of_counts_sets_the_steps_of_generate():
    model = Recorder(Fixed(torch.zeros(10, 3)))
    diffusion.generate(model, masked(1, 10, 3), 3, steps=99, schedule=[10, 9, 2, 0], generator=seeded(0))
    assert [(shown == 3).sum().item() for shown in model.shown] == [10, 9, 2]


# ---------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("name, value", [
    ("steps", 0), ("steps", -3),
    ("schedule", "quadratic"), ("schedule", [4, 2, 2, 0]), ("schedule", [4, 2, 1]), ("schedule", [2, 3, 0]),
    ("schedule", [0]), ("schedule", []),
    ("order", "sideways"),
    ("temperature", -0.5), ("temperature", math.nan),
    ("top_p", 0), ("top_p", 1.5), ("top_p", -0.1),
    ("top_k", 0), ("top_k", -2),
])
def test_a_bad_argument_is_refused_by_name_before_the_model_is_asked(name, value):
    model = Recorder(EXACT)
    with pytest.raises(ValueError) as error:
        diffusion.generate(model, masked(1, T, V), V, **{"steps": 2, name: value})
    message = str(error.value)
    assert name in message and str(value) in message and "\n" not in message
    assert model.shown == []


# ---------------------------------------------------------------------------------------------------
# Mistakes seen in other repositories


def test_peer_bug_1_temperature_changes_the_written_token_not_only_the_order():
    # seen: noise added to the ranking alone, every written token the argmax whatever the temperature
    for order in ORDERS:
        x = diffusion.generate(Fixed(P.log()), masked(DRAWS, 1, 5), 5, steps=1, order=order,
                               temperature=2.0, generator=seeded(0))
        assert chi_square_p(torch.bincount(x.flatten(), minlength=5), (P.log() / 2).softmax(0)) > 1e-3


def test_peer_bug_1_the_model_sees_ever_fewer_masks():
    # seen: time fed backwards, the model told "nearly clean" when all was hidden. Here masks are the time.
    model = Recorder(EXACT)
    diffusion.generate(model, masked(3, T, V), V, steps=T, generator=seeded(0))
    assert [(shown == V).sum(1).tolist() for shown in model.shown] == [[4] * 3, [3] * 3, [2] * 3, [1] * 3]


@pytest.mark.parametrize("options", [{}, {"temperature": 100.0}, {"top_k": 9}, {"top_p": 1.0}], ids=str)
def test_peer_bug_2_real_tokens_are_written_all_of_them_and_never_the_mask(options):
    model = Fixed(torch.zeros(8, 4))
    x = diffusion.generate(model, masked(50, 8, 4), 4, steps=3, generator=seeded(0), **options)
    assert sorted(set(x.flatten().tolist())) == [0, 1, 2, 3]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"temperature": 50.0}, {"top_k": 2}])
def test_peer_bug_3_a_banned_token_is_never_written(order, options):
    # seen: the suppression written to a tensor that sampling had already read
    def ban_the_likeliest(logits, x, positions):
        return logits.index_fill(1, torch.tensor([1]), -math.inf)

    model = Fixed(P.log())
    x = diffusion.generate(model, masked(40, 8, 5), 5, steps=3, order=order, adjust=ban_the_likeliest,
                           generator=seeded(0), **options)
    assert not (x == 1).any()


def test_peer_bug_4_confidence_is_ranked_within_each_row():
    # seen: the most confident places of the whole batch committed, so the sure row took the unsure row's turn
    sure, unsure = torch.tensor([0.01, 0.99]).log(), torch.tensor([0.4, 0.6]).log()
    model = Fixed(torch.stack([sure.expand(6, 2), unsure.expand(6, 2)]))
    states = diffusion.denoise(model, masked(2, 6, 2), 2, steps=3, order="confidence", temperature=0)
    assert [(state.tokens == 2).sum(1).tolist() for state in states] == [[6, 6], [4, 4], [2, 2], [0, 0]]


@pytest.mark.slow
def test_peer_bug_8_rare_tokens_are_drawn_as_often_as_they_should():
    # seen: float32 Gumbel noise, which never exceeds 16.6 and finds a token of 2^-26 one time in thirteen.
    # 256 such tokens in 10 million draws: 38.1 hits expected, Poisson, so 4 deviations are 25.
    logits = torch.tensor([math.log(1 - 2**-18)] + [-26 * math.log(2)] * 256)
    generator, hits = seeded(0), 0
    for _ in range(40_000):
        tokens = diffusion.draw_tokens(logits.expand(250, -1), generator=generator)
        hits += (tokens > 0).sum().item()
    assert 14 <= hits <= 62
