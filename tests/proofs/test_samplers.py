"""Samplers write what enumeration says they should, and do what their options say.

The network is a table of probabilities, so the distribution of all that `denoise` writes is known:
chi-square tests of 20,000 texts say whether it is met. Seeds are fixed: none can fail by chance.
"""

import itertools
import math
import random

import oracles
import pytest
import torch
from oracles import EXACT, JOINT, ROWS, Fixed, Recorder, T, V, fits, frequencies_p, masked, seeded

import sample
from diffusion import SCHEDULES, hidden_counts
from model import ModelConfig, Transformer
from plumbing.adjust import ban, chain, penalize_repetition
from sample import ORDERS, REMASKS, Sampler, denoise, draw_tokens, generate

THIRDS = {"linear": [1, 2 / 3, 1 / 3, 0], "cosine": [1, 3 / 4, 1 / 4, 0],
          "exponential": [1, math.exp(-1), math.exp(-2), 0]}  # hidden fractions of three steps
IN_PAIRS = oracles.path_log_q(EXACT, [(0, 1), (2, 3)]).exp()
P = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])


def label(value) -> str:
    """A readable test id for options, and for the functions among them."""
    if isinstance(value, dict):
        return ",".join(f"{name}={label(option)}" for name, option in value.items()) or "plain"
    return "" if isinstance(value, torch.Tensor) else getattr(value, "__name__", str(value))


def hidden_in(states, V: int) -> list[torch.Tensor]:
    return [state.tokens == V for state in states]


def two_way(confidence: list[float]) -> torch.Tensor:
    """Logits (T,2) that give token 0 these probabilities."""
    p = torch.tensor(confidence)
    return torch.stack([p, 1 - p], -1).log()


# --- What is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("expected, options", [
    (JOINT, {}),  # a token per step, wherever it is: the distribution itself
    *((JOINT, {"order": order}) for order in ("left_to_right", "margin", "entropy")),
    *((JOINT, {"block_length": length}) for length in (1, 3)),
    (JOINT, {"steps": 200, "order": "ancestral"}),
    *((oracles.random_order_q(EXACT, counts), {"steps": len(counts) - 1})
      for counts in ([4, 0], [4, 2, 0], [4, 3, 1, 0])),
    (oracles.random_order_q(EXACT, [4, 1, 0]), {"schedule": [4, 1, 0]}),
    *((IN_PAIRS, {"steps": 2} | how) for how in ({"order": "left_to_right"}, {"block_length": 2})),
    *((oracles.ancestral_q(EXACT, thirds), {"order": "ancestral", "schedule": name, "steps": 3})
      for name, thirds in THIRDS.items()),
], ids=label)
def test_every_sampler_writes_what_enumeration_says(expected, options):
    x = generate(EXACT, masked(ROWS, T, V), V, seeded(1), **options)
    assert fits(x, expected)


@pytest.mark.parametrize("order", ["random", "left_to_right", "margin"])
def test_infilling_of_ragged_holes_draws_each_row_from_its_own_conditional(order):
    x = masked(4 * ROWS, T, V).view(4, ROWS, T)
    x[1, :, 1:3] = torch.tensor([0, 2])  # holes at both ends
    x[2, :, [0, 3]] = torch.tensor([2, 1])  # a hole in the middle
    x[3, :, :3] = torch.tensor([1, 0, 2])  # a prefix
    x = generate(EXACT, x.view(-1, T), V, seeded(5), order=order).view(4, ROWS, T)
    assert fits(x[0], JOINT)
    assert fits(x[1][:, [0, 3]], JOINT[:, 0, 2, :])
    assert fits(x[2][:, 1:3], JOINT[2, :, :, 1])
    assert fits(x[3][:, 3:], JOINT[1, 0, 2, :])


def test_a_causal_network_writes_by_the_chain_rule():
    model = sample.left_to_right_model(oracles.Causal(JOINT), V)
    logits = model(EXACT.texts)
    assert torch.equal(model(EXACT.texts, torch.arange(81 * T)), logits.flatten(0, 1))
    log_p = logits.double().log_softmax(-1).gather(-1, EXACT.texts[..., None])
    torch.testing.assert_close(log_p.sum((1, 2)).exp(), EXACT.p, rtol=1e-5, atol=0)
    x = generate(model, masked(ROWS, T, V), V, seeded(7), order="left_to_right")
    assert fits(x, JOINT)


def test_greedy_takes_the_most_likely_token_given_what_is_written():
    x = [V] * T
    for t in range(T):  # by hand: the argmax of each conditional in turn
        x[t] = max(range(V), key=lambda v, t=t: EXACT.marginal[(*x[:t], v, *x[t + 1 :])])
    for temperature in (0, 1e-60):
        greedy = {"order": "left_to_right", "temperature": temperature}
        assert generate(EXACT, masked(2, T, V), V, seeded(0), **greedy).tolist() == [x] * 2
    marginals = [JOINT.sum([d for d in range(T) if d != t]).argmax().item() for t in range(T)]
    assert generate(EXACT, masked(1, T, V), V, steps=1, temperature=0).tolist() == [marginals]


# --- What holds for every combination of options --------------------------------------------------


def probability_of_0(log_p, tokens):
    """An order of one's own."""
    return log_p[:, 0]


def half(limit, visible, p):
    return 0.5


def quarter_of_limit(limit, visible, p):
    return 0.25 * limit


def everything(limit, visible, p):
    return 1.0


def guide(logits, x, positions):
    """Guidance that depends on the position and on the first token of the row."""
    first = x[positions // T, 0]
    return logits + torch.stack([positions % T, first, torch.zeros_like(first)], 1)


BAN_1 = ban([1])
CHOICES = {
    "steps": [None, 1, 2, 3, 4, 6, 12],
    "schedule": [*SCHEDULES, [4, 3, 0], [40, 25, 7, 3, 0]],
    "order": [*ORDERS, probability_of_0],
    "remask": [*["none"] * 4, *REMASKS, half, everything],
    "temperature": [1.0, 0, 0, 0.5, 3.0],
    "top_k": [None, None, None, 1, 2, 4],
    "top_p": [None, None, 0.3, 1],
    "threshold": [None, None, 0.1, 0.5, 1],
    "block_length": [None, None, None, 1, 2, 3, 5],
    "gumbel": [0.0, 0.0, 1.0],
    "adjust": [None, None, BAN_1, penalize_repetition(1.5), guide],
}


@pytest.mark.parametrize("seed", range(20))
def test_what_holds_for_every_combination_of_options(seed):
    draw = random.Random(seed)
    for _ in range(25):
        options = {name: draw.choice(values) for name, values in CHOICES.items()}
        if options["order"] in sample.FIXED_ORDERS:
            options["gumbel"] = 0.0  # which is for scored orders
        x = torch.tensor([[draw.choice([V, V, *range(V)]) for _ in range(T)]
                          for _ in range(draw.randint(1, 4))])
        print(options, x)  # shown if it fails
        assert_what_holds(x, options, draw.randrange(1000))


def assert_what_holds(x, options, seed):
    before = x.clone()
    holes = x == V
    num_holes = holes.sum(1)
    fixed = options["order"] in sample.FIXED_ORDERS
    use = Sampler(**options)
    block_length = use.block_length or T
    num_blocks = math.ceil(int(num_holes.max()) / block_length)
    steps = use.steps or max(1, int(num_holes.max()))
    named = isinstance(use.schedule, str)
    if named and steps < num_blocks:
        with pytest.raises(ValueError, match=f"at least {num_blocks}.* {steps}"):
            next(denoise(EXACT, x, V, **options))
        return
    global_state = torch.get_rng_state()
    model = Recorder(EXACT)
    states = []
    copies = []
    for state in denoise(model, x, V, seeded(seed), **options):
        states.append(state)
        copies.append(state.tokens.clone())
    again = [*denoise(EXACT, x, V, seeded(seed), **options)]
    hidden = hidden_in(states, V)
    steps_taken = [*itertools.pairwise(states)]

    # Given tokens never change, and all the rest is filled with real tokens; states are snapshots.
    assert torch.equal(x, before) and torch.equal(states[0].tokens, before)
    assert all(torch.equal(state.tokens, copy) for state, copy in zip(states, copies, strict=True))
    assert all(torch.equal(state.tokens[~holes], before[~holes]) for state in states)
    assert ((states[-1].tokens >= 0) & (states[-1].tokens < V)).all()
    if use.adjust is BAN_1:
        assert all((state.tokens[holes] != 1).all() for state in states)

    # The same seed writes the same text, whatever the global random state, which is left alone.
    assert all(torch.equal(a.tokens, b.tokens) and torch.equal(a.probability, b.probability)
               for a, b in zip(states, again, strict=True))
    assert torch.equal(torch.get_rng_state(), global_state)

    # A model call per step at most, at hidden positions only; no step without a change.
    planned = steps if named else max(1, num_blocks) * (len(use.schedule) - 1)
    assert states[-1].calls == len(model.shown) <= len(steps_taken) <= planned
    assert all(not torch.equal(a.tokens, b.tokens) for a, b in steps_taken)
    for shown, asked in zip(model.shown, model.asked, strict=True):
        assert len(asked) and (shown.flatten()[asked] == V).all()
        assert any(torch.equal(shown, copy) for copy in copies)
    if fixed and use.threshold is None and use.remask == "none" and model.asked:  # once per token
        asked = torch.cat(model.asked).sort().values
        assert torch.equal(asked, holes.flatten().nonzero().squeeze(1))

    # What is written stays, unless it is remasked, with the probability that it was given then.
    for a, b in steps_taken:
        assert torch.equal(b.probability == 0, b.tokens == V) and (b.probability[~holes] == 1).all()
        kept = (a.tokens != V) & (b.tokens != V)
        assert torch.equal(a.tokens[kept], b.tokens[kept])
        assert torch.equal(a.probability[kept], b.probability[kept])
        assert use.remask != "none" or not ((a.tokens != V) & (b.tokens == V)).any()
        new = ((a.tokens == V) & (b.tokens != V)).flatten().nonzero().squeeze(1)
        logits = EXACT(a.tokens, new)
        logits = use.adjust(logits, a.tokens, new) if use.adjust else logits
        p = logits.softmax(-1).gather(1, b.tokens.flatten()[new][:, None]).squeeze(1)
        torch.testing.assert_close(b.probability.flatten()[new], p)

    # The schedule is kept to the token, but where chance or a threshold decides.
    if use.order != "ancestral" and use.threshold is None and use.block_length is None:
        found = torch.stack([mask.sum(1) for mask in hidden])
        counts = hidden_counts(use.schedule, num_holes, steps, strict=use.remask == "none")
        if use.remask != "none":  # then it may stand still, and such steps may be skipped
            found = found.unique_consecutive(dim=0)
            counts = counts.unique_consecutive(dim=0)
        assert torch.equal(found, counts)
    # Blocks are filled from left to right.
    block_of = (holes.cumsum(1) - 1) // block_length
    for mask in hidden:
        last_begun = block_of.masked_fill(~holes | mask, -1).amax(1)
        first_open = block_of.masked_fill(~mask, T).amin(1)
        assert (last_begun <= first_open).all()

    # If nothing is drawn, a row alone is written as in the batch.
    greedy = use.temperature == 0 or use.top_k == 1
    ranked = use.order not in ("random", "ancestral") and use.gumbel == 0
    if greedy and ranked and use.remask == "none" and use.block_length is None:
        alone = [generate(EXACT, row[None], V, seeded(9), **options) for row in x]
        assert torch.equal(torch.cat(alone), states[-1].tokens)


@pytest.mark.parametrize("order", ["confidence", "margin", "entropy"])
@pytest.mark.parametrize("options", [
    {"block_length": 9}, {"threshold": 1}, {"gumbel": 0}, {"top_k": 99}, {"top_p": 1},
    {"adjust": ban([])}, {"adjust": penalize_repetition(1)}], ids=label)
def test_options_that_should_change_nothing_change_nothing(order, options):
    x = oracles.with_holes(40, T, V)
    one, other = ([*denoise(EXACT, x, V, seeded(1), steps=3, order=order, **more)]
                  for more in ({}, options))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(one, other, strict=True))


# --- Orders ---------------------------------------------------------------------------------------

RANKED = torch.tensor([
    [0.50, 0.45, 0.05, 0.00, 0.00],  # confidence .50  margin .05  entropy  .86
    [0.40, 0.20, 0.20, 0.20, 0.00],  #            .40         .20          1.33
    [0.45, 0.22, 0.22, 0.11, 0.00],  #            .45         .23          1.27
    [0.60, 0.10, 0.10, 0.10, 0.10],  #            .60         .50          1.23
]).log()
RANKING = {"confidence": [3, 0, 2, 1], "margin": [3, 2, 1, 0], "entropy": [0, 3, 2, 1]}


def committed_in_turn(logits, seed: int = 0, **options) -> list[int]:
    """The positions of a single row in the order in which they are committed, one per step."""
    T, V = logits.shape
    hidden = hidden_in(denoise(Fixed(logits), masked(1, T, V), V, seeded(seed), **options), V)
    return [(a & ~b).nonzero()[:, 1].item() for a, b in itertools.pairwise(hidden)]


@pytest.mark.parametrize("order", RANKING)
def test_each_score_ranks_positions_its_own_way(order):
    for options in ({"temperature": 0}, {"top_k": 1}, {"top_p": 0.1, "temperature": 5.0}):
        assert committed_in_turn(RANKED, order=order, **options) == RANKING[order]
    if order != "confidence":  # the others look neither at the drawn token nor at the temperature
        for seed, temperature in itertools.product(range(10), (0.2, 1.0, 50.0)):
            turns = committed_in_turn(RANKED, seed, order=order, temperature=temperature)
            assert turns == RANKING[order]

    def no_zero_at_three(logits, x, positions):  # now the four others make it the least certain
        at_three = (positions % 4 == 3)[:, None]
        logits = logits + 0.1 * (at_three & (torch.arange(5) == 1))
        return logits.masked_fill(at_three & (torch.arange(5) == 0), -math.inf)

    turns = committed_in_turn(RANKED, order=order, temperature=0, adjust=no_zero_at_three)
    assert turns == [t for t in RANKING[order] if t != 3] + [3]


def test_confidence_is_the_drawn_tokens_probability_not_the_positions_best():
    # Position 0 draws token 0 or 1, half each. Position 1 draws token 2 with 0.6, and then comes
    # first; otherwise it holds a token of 0.4 against position 0's 0.5.
    logits = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.4, 0.6]]).log()
    states = [*denoise(Fixed(logits), masked(ROWS, 2, 3), 3, seeded(0), order="confidence")]
    first = states[1].tokens
    second_first = first[:, 0] == 3
    assert (first[second_first, 1] == 2).all()
    assert fits(second_first.long()[:, None], torch.tensor([0.4, 0.6]))


def test_an_order_of_your_own_commits_its_highest_scores():
    def highest_token_first(log_p, tokens):
        assert log_p.shape == (len(tokens), 4) and tokens.dtype == torch.int64
        torch.testing.assert_close(log_p.exp().sum(1), torch.ones(len(tokens)))
        return tokens.float()

    logits = torch.full((4, 4), -math.inf)
    logits[torch.arange(4), torch.tensor([2, 0, 3, 1])] = 5.0  # unnormalised
    assert committed_in_turn(logits, order=highest_token_first) == [2, 0, 3, 1]


def equally_impossible(log_p, tokens):
    return torch.full(tokens.shape, -math.inf)


@pytest.mark.parametrize("order", [*RANKING, equally_impossible], ids=label)
@pytest.mark.parametrize("options", [{}, {"gumbel": 2.0}, {"block_length": 2}, {"threshold": 0.9},
                                     {"remask": "renoise"}], ids=label)
def test_equal_scores_everywhere_are_an_order_like_any_other(order, options):
    x = torch.tensor([[1, 0, 2, 2, 1, 2, 2], [2, 2, 2, 2, 0, 0, 1]])
    states = denoise(Fixed(torch.zeros(7, 2)), x, 2, seeded(0), order=order, **options)
    counts = [mask.sum(1).tolist() for mask in hidden_in(states, 2)]
    assert counts == [[4, 4], [3, 3], [2, 2], [1, 1], [0, 0]]


@pytest.mark.parametrize("gumbel", [0.5, 1.0, 2.0])
def test_gumbel_noise_draws_positions_by_confidence_and_falls_to_nothing(gumbel):
    # Step i of 10 adds gumbel (1 - i/10) noise to log .9 or log .6. So of c positions of .9 and u
    # of .6, one of .9 is chosen with odds of c to u times 1.5^(1 / (gumbel (1 - i/10))).
    states = denoise(Fixed(two_way([0.9, 0.6] * 5)), masked(ROWS, 10, 2), 2, seeded(42),
                     order="confidence", temperature=0, gumbel=gumbel)
    events = []
    for i, (a, b) in enumerate(itertools.pairwise(hidden_in(states, 2))):
        certain = a[:, 0::2].sum(1)
        unsure = a[:, 1::2].sum(1)
        chosen = certain - b[:, 0::2].sum(1)
        for c, u in itertools.product(range(1, 6), repeat=2):
            odds = c / u * 1.5 ** (10 / (10 - i) / gumbel)
            events.append((chosen[(certain == c) & (unsure == u)], odds / (1 + odds)))
    assert frequencies_p(events) > 1e-4


# --- Ancestral sampling and remasking -------------------------------------------------------------


def sigma_by_hand(remask, before: float, after: float) -> float:
    """ReMDM's probability that a visible token is hidden again, at most what the schedule bears."""
    limit = min(1.0, (1 - after) / before) if before else 1.0
    wanted = {"none": 0.0, "renoise": 1 - after, "cap": 0.02, "rescale": 0.05 * limit}
    return min(limit, remask(limit, after, None) if callable(remask) else wanted[remask])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential"])
@pytest.mark.parametrize("remask", ["none", "renoise", "cap", "rescale", half, quarter_of_limit],
                         ids=label)
def test_ancestral_steps_change_tokens_with_the_posteriors_probabilities(remask, schedule):
    # ReMDM, arXiv:2503.00307: hidden with sigma, revealed with (a_s - (1-sigma) a_t) / (1 - a_t)
    states = denoise(Fixed(torch.zeros(1, 2)), masked(ROWS, 3, 2), 2, seeded(21), steps=5,
                     schedule=schedule, order="ancestral", remask=remask)
    hidden = hidden_in(states, 2)
    assert len(hidden) == 6 and not hidden[5].any()
    visible = [*(1 - SCHEDULES[schedule](torch.arange(5).double() / 5)).tolist(), 1.0]
    events = []
    for i, (before, after) in enumerate(itertools.pairwise(hidden)):
        a_t, a_s = visible[i : i + 2]
        sigma = sigma_by_hand(remask, a_t, a_s)
        events.append((after[~before], sigma))
        events.append((~after[before], (a_s - (1 - sigma) * a_t) / (1 - a_t)))
        # The hidden fraction is the schedule's: each position by itself, in neighbouring rows too.
        one = torch.tensor([a_s, 1 - a_s])
        patterns = torch.cartesian_prod(*[one] * 6).prod(1)
        assert fits(after.long().view(-1, 6), patterns, merge=True)
    assert frequencies_p(events) > 1e-4


def test_conf_hides_again_the_least_confident_in_proportion():
    # sigma = limit exp(-p) / sum of exp(-p) over the visible tokens of the row
    p = torch.tensor([0.9, 0.6, 0.3])
    logits = torch.stack([p, *[(1 - p) / 4] * 4], 1).log()  # a token of p; four share the rest
    states = denoise(Fixed(logits), masked(ROWS, 3, 5), 5, seeded(22), steps=5, order="ancestral",
                     remask="conf", temperature=0)
    events = []
    for i, (before, after) in enumerate(itertools.pairwise(hidden_in(states, 5))):
        limit = min(1.0, (4 - i) / i) if i else 1.0
        for pattern in itertools.product([False, True], repeat=3):
            rows = (before == torch.tensor(pattern)).all(1)
            weight = (-p).exp() * ~torch.tensor(pattern)
            for t in range(3):
                if pattern[t]:
                    events.append((~after[rows, t], 1 / (5 - i)))
                else:
                    events.append((after[rows, t], float(limit * weight[t] / weight.sum())))
    assert frequencies_p(events) > 1e-4


@pytest.mark.parametrize("order", ["random", "left_to_right", "margin"])
@pytest.mark.parametrize("remask", ["renoise", "cap", half], ids=label)
def test_counted_orders_hide_again_by_sigma_as_far_as_the_count_allows(order, remask):
    # 8 positions in 4 steps: 8 6 4 2 0 are hidden. What is hidden again must not be more than that.
    model = Fixed(torch.randn(8, 3, generator=seeded(0)))
    states = denoise(model, masked(5000, 8, 3), 3, seeded(24), steps=4, order=order, remask=remask)
    hidden = hidden_in(states, 3)
    events = []
    for i, n, most in ((1, 2, 2), (2, 4, 2), (3, 6, 0)):  # n are written, at most so many go back
        p = sigma_by_hand(remask, i / 4, (i + 1) / 4)
        chance = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
        chance = torch.tensor([*chance[:most], sum(chance[most:])])
        again = ~hidden[i] & hidden[i + 1]
        assert fits(again.sum(1, keepdim=True), chance, merge=True)
        one = float(chance @ torch.arange(most + 1.0)) / n  # whichever it is
        events += [(again[~hidden[i][:, t], t], one) for t in range(8)]
    assert frequencies_p(events) > 1e-4


@pytest.mark.parametrize("order, sigma, steps", [("random", 0.02, 150), ("ancestral", 0.002, 300)])
def test_rare_remasking_leaves_the_joint_distribution_as_it_is(order, sigma, steps):
    # Hiding a token whatever it is and redrawing it from its exact conditional is a step of Gibbs
    # sampling. Two at once would be drawn independently: with so small a sigma too rare to be seen.
    states = [*denoise(EXACT, masked(ROWS // 2, T, V), V, seeded(25), steps=steps, order=order,
                       remask=lambda limit, visible, p: sigma)]
    assert fits(states[-1].tokens, JOINT, merge=True)
    back = sum((b & ~a).sum() for a, b in itertools.pairwise(hidden_in(states, V)))
    assert back > ROWS / 4


def test_a_remask_of_your_own_is_told_limit_fraction_and_commit_probabilities():
    told = []

    def watch(limit, visible, p):
        told.append((limit, visible, p.clone()))
        return 0.0

    x = torch.tensor([[3, 1, 3, 3], [3, 3, 2, 0]])
    logits = torch.randn(4, 3, generator=seeded(0))
    states = [*denoise(Fixed(logits), x, 3, seeded(1), remask=watch)]
    for i, ((limit, visible, p), state) in enumerate(zip(told, states[:-1], strict=True)):
        assert visible == pytest.approx((i + 1) / 3)
        assert limit == pytest.approx([1, 1, 0][i])  # min(1, (1 - visible) / visible before)
        committed = (x == 3) & (state.tokens != 3)  # elsewhere, given or hidden, p is infinite
        torch.testing.assert_close(p, torch.where(committed, state.probability, math.inf))


# --- Threshold and blocks -------------------------------------------------------------------------


def pace(confidence: list[float], **options) -> list[int]:
    """How many are hidden after each step, greedily with a threshold of .8."""
    T = len(confidence)
    states = denoise(Fixed(two_way(confidence)), masked(1, T, 2), 2, seeded(0), temperature=0,
                     threshold=0.8, **options)
    return [mask.sum().item() for mask in hidden_in(states, 2)]


@pytest.mark.parametrize("order", RANKING)
def test_a_threshold_commits_all_above_it_and_the_schedule_is_the_slowest_pace(order):
    # Due at 8 6 4 2 0. The four certain ones are ahead of it: then one per step.
    mixed = [0.9, 0.9, 0.6, 0.6, 0.95, 0.81, 0.6, 0.79]
    assert pace(mixed, order=order, steps=4) == [8, 4, 3, 2, 0]
    assert pace([0.95] * 10, order=order) == [10, 0]
    assert pace([0.6] * 10, order=order, steps=3) == [10, 7, 3, 0]
    assert pace([0.6] * 10, order=order, steps=500) == [*range(10, -1, -1)]
    assert pace([0.9, 0.6, 0.9, 0.6], order="left_to_right") == [4, 2, 1, 0]


def test_the_threshold_looks_at_the_drawn_tokens_own_probability_without_temperature():
    # Two positions of (.9, .1), threshold .8, drawn at temperature 4: both are written in the first
    # step only if both drew the likely token; its own probability is then .9, not the tempered one.
    tempered = (two_way([0.9])[0] / 4).softmax(0)[0].item()
    states = [*denoise(Fixed(two_way([0.9, 0.9])), masked(ROWS, 2, 2), 2, seeded(2),
                       order="confidence", temperature=4.0, threshold=0.8)]
    assert frequencies_p([((states[1].tokens != 2).all(1), tempered**2)]) > 1e-4


@pytest.mark.parametrize("steps, calls", [(3, 3), (4, 4), (7, 7), (9, 9), (50, 9), (None, 9)])
def test_steps_are_the_total_over_the_blocks_and_a_list_is_followed_in_each(steps, calls):
    model = Fixed(torch.zeros(9, 3))
    for order in ("random", "margin"):
        *_, last = denoise(model, masked(2, 9, 3), 3, steps=steps, order=order, block_length=3)
        assert last.calls == calls
    states = denoise(model, masked(1, 9, 3), 3, steps=steps, schedule=[3, 2, 0], block_length=3)
    assert [mask.sum().item() for mask in hidden_in(states, 3)] == [9, 8, 6, 5, 3, 2, 0]


# --- Drawing one token ----------------------------------------------------------------------------


def draws(logits, **options) -> torch.Tensor:
    """20,000 tokens, in a column."""
    return draw_tokens(logits.expand(ROWS, -1), generator=seeded(0), **options)[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0, 1e6])
def test_tokens_are_drawn_from_the_tempered_softmax(temperature, dtype):
    logits = (P.log() + 3).to(dtype)  # unnormalised: a constant must not matter
    expected = (logits.double() / temperature).softmax(0)
    assert fits(draws(logits, temperature=temperature), expected)


# Cumulated from the most likely: .4, .7, .85, .95, 1 for tokens 1, 3, 4, 0, 2.
@pytest.mark.parametrize("top_k, top_p, kept", [
    (1, None, [1]), (2, None, [1, 3]), (4, None, [0, 1, 3, 4]), (99, None, [0, 1, 2, 3, 4]),
    (None, 0.39, [1]), (None, 0.41, [1, 3]), (None, 0.69, [1, 3]), (None, 0.71, [1, 3, 4]),
    (None, 0.94, [0, 1, 3, 4]), (None, 0.96, [0, 1, 2, 3, 4]),
    (2, 0.96, [1, 3]), (4, 0.69, [1, 3]), (1, 0.96, [1]), (4, 0.39, [1])])
def test_top_k_and_top_p_keep_the_most_likely_in_proportion(top_k, top_p, kept):
    tokens = draws(P.log(), top_k=top_k, top_p=top_p)
    assert tokens.unique().tolist() == kept
    assert fits(tokens, torch.zeros(5).index_copy(0, torch.tensor(kept), P[kept]))


def test_every_row_is_drawn_from_its_own_logits_and_equals_are_not_kept_in_excess():
    assert len(draws(torch.zeros(8), top_k=3).unique()) == 3
    assert len(draws(torch.zeros(8), top_p=0.3).unique()) == 3  # 2/8 < .3 <= 3/8
    logits = torch.randn(200, 9, generator=seeded(0))
    for options in ({"temperature": 0}, {"top_k": 1}, {"temperature": 1e-3}):
        drawn = draw_tokens(logits, generator=seeded(1), **options)
        assert torch.equal(drawn, logits.argmax(-1))


@pytest.mark.parametrize("u, token", [(0.0, 1), (1 - 2**-53, 2)])
def test_the_extreme_uniform_draws_give_possible_tokens(monkeypatch, u, token):
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, **_: torch.full(size, u, dtype=dtype))
    logits = torch.tensor([[-math.inf, 0.1, 0.3, -math.inf]]).expand(3, 4)
    assert draw_tokens(logits).tolist() == [token] * 3


# --- Guidance -------------------------------------------------------------------------------------


def test_adjust_changes_the_distribution_as_its_logits_say():
    def add_p(logits, x, positions):
        return logits + P

    allowed = torch.tensor([1, 0, 1, 1, 0])
    for adjust, factor in ((add_p, P.exp()), (ban([1, 4]), allowed),
                           (chain([ban([1, 4]), add_p]), allowed * P.exp())):
        x = generate(Fixed(P.log()), masked(ROWS, 1, 5), 5, seeded(51), adjust=adjust)
        assert fits(x, P * factor)


@pytest.mark.parametrize("mask_id", [5, 9])  # 9: rows of the embedding that are no token
def test_a_repeated_token_has_its_odds_divided_by_the_penalty(mask_id):
    # Two rows with different tokens, one of them twice: it counts that it is there, in this row.
    x = torch.tensor([[1, mask_id, 1, 3], [0, 4, mask_id, 4]]).repeat(ROWS, 1)
    x = generate(Fixed(P.log()), x, mask_id, seeded(52), adjust=penalize_repetition(2.5))
    for written, penalty in ((x[0::2, 1], [1, 2.5, 1, 2.5, 1]), (x[1::2, 2], [2.5, 1, 1, 1, 2.5])):
        assert fits(written[:, None], P / torch.tensor(penalty))
    # It sees what has just been written: three tokens for three positions, none twice.
    x = generate(Fixed(torch.zeros(3, 3)), masked(200, 3, 3), 3, seeded(53),
                 adjust=penalize_repetition(1e30))
    assert (x.sort(1).values == torch.arange(3)).all()
    for penalty in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"penalty.*{penalty}"):
            penalize_repetition(penalty)


# --- Mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, value", [
    ("steps", 0), ("steps", -3), ("schedule", "quadratic"), ("schedule", "optimal"),
    ("schedule", [4, 2, 2, 0]), ("order", "sideways"), ("order", "optimal"), ("remask", "maybe"),
    ("remask", 0.5), ("remask", "ancestral"), ("threshold", 0), ("threshold", -0.2),
    ("threshold", 1.5), ("threshold", math.nan), ("block_length", 0), ("block_length", -4),
    ("gumbel", -1.0), ("gumbel", math.nan), ("gumbel", math.inf), ("gumbel", 1.0),  # random order
    ("temperature", -0.5), ("temperature", math.nan), ("temperature", math.inf), ("top_p", -1),
    ("top_p", 1.5), ("top_p", -0.1), ("top_p", math.nan), ("top_k", -1), ("top_k", -2)])
def test_a_bad_option_is_refused_by_name_before_the_model_is_called(name, value):
    model = Recorder(EXACT)
    with pytest.raises(ValueError, match=name) as error:
        generate(model, masked(1, T, V), V, **{name: value})
    assert str(value) in str(error.value) or name == "gumbel"
    assert "\n" not in str(error.value) and model.shown == []


def ban_one_position(logits, x, positions):
    return logits.masked_fill((positions == 5)[:, None], -math.inf)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("adjust", [ban(range(V)), ban_one_position], ids=["all", "one position"])
def test_banning_everything_is_an_error_not_a_token(order, adjust):
    for options in ({}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.5}):
        with pytest.raises(ValueError, match="adjust"):
            generate(EXACT, masked(2, T, V), V, seeded(0), order=order, adjust=adjust, **options)


@pytest.mark.parametrize("T, expected", [
    (1, [0]), (5, [0, 4, 2, 1, 3]), (8, [0, 4, 2, 6, 1, 5, 3, 7])])
def test_spread_goes_by_the_bits_read_backwards(T, expected):
    x = torch.full((2, T), V)
    x[1, ::2] = 0  # given
    written = [[], []]
    states = denoise(Fixed(torch.zeros(T, V)), x, V, order="spread")
    for before, after in itertools.pairwise(states):
        for row, t in (before.tokens != after.tokens).nonzero().tolist():
            written[row].append(t)
    assert written == [expected, [t for t in expected if t % 2]]


def test_tokens_of_one_step_stand_far_apart_in_order_spread():
    before = torch.full((1, 256), V)
    states = denoise(Fixed(torch.zeros(256, V)), before, V, order="spread", steps=16)
    for state in itertools.islice(states, 1, None):
        t = (state.tokens != before)[0].nonzero().squeeze(1)
        assert len(t) == 16 and t.diff().unique().tolist() == [16]
        before = state.tokens


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"order": "random"}, {"order": "confidence", "remask": "cap"},
    {"order": "entropy", "threshold": 0.5, "block_length": 9}], ids=label)
def test_compiled_and_eager_write_the_same(options):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(50, context_length=24, n_layer=2, n_head=2, n_embd=32)).eval()
    for weight in model.parameters():  # output projections start at zero: nobody looks at others
        torch.nn.init.normal_(weight, std=0.2)
    x = oracles.with_holes(5, 24, 50)
    eager, fast = (generate(network, x, 50, seeded(1), steps=8, **options)
                   for network in (model, torch.compile(model, dynamic=True)))
    assert torch.equal(eager, fast)
