"""Bugs seen in other repositories of this field. None of them is here.

What a command has to show of them (resuming, --show-steps, bits per byte) is in tests/commands.
"""

import itertools
import math

import pytest
import torch
from oracles import EXACT, ROWS, Causal, Fixed, Recorder, T, V, fits, levels, masked, seeded

from diffusion import corrupt, draw_num_masked, evaluate, keyed_generator, loss, nelbo
from model import ModelConfig, Transformer
from plumbing.adjust import ban
from sample import ORDERS, REMASKS, denoise, draw_tokens, generate

P = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
HOWS = [*({"order": order} for order in ORDERS), *({"remask": name} for name in REMASKS),
        {"order": "ancestral", "remask": "conf"}, {"threshold": 0.3}, {"block_length": 3},
        {"order": "confidence", "gumbel": 1.0}]  # one of each way to denoise
every_how = pytest.mark.parametrize("how", HOWS, ids=str)


def hidden_counts_of(states, mask_id: int) -> list[list[int]]:
    return [(state.tokens == mask_id).sum(1).tolist() for state in states]


def test_1_time_runs_forward_the_network_sees_ever_fewer_masks():
    # seen: time fed backwards, the network told "nearly clean" when all was hidden
    model = Recorder(EXACT)
    generate(model, masked(1, T, V), V, seeded(0))
    assert [(shown == V).sum().item() for shown in model.shown] == [4, 3, 2, 1]


@every_how
def test_1_temperature_changes_the_written_token_not_only_the_order(how):
    x = generate(Fixed(P.log()), masked(ROWS, 1, 5), 5, seeded(71), temperature=2.0, **how)
    assert fits(x, P.sqrt())


@every_how
def test_2_the_mask_token_is_never_written_and_every_real_one_is(how):
    states = [*denoise(Fixed(torch.zeros(8, 4)), masked(50, 8, 4), 4, seeded(72), steps=6,
                       temperature=50.0, **how)]
    assert states[-1].tokens.unique().tolist() == [0, 1, 2, 3]
    assert all(torch.equal(state.tokens == 4, state.probability == 0) for state in states)


@every_how
def test_3_a_banned_token_is_never_written(how):
    # seen: the suppression written to a tensor that sampling had already read
    for options in ({}, {"temperature": 0}, {"temperature": 50.0}, {"top_k": 2}):
        states = denoise(Fixed(P.log()), masked(40, 8, 5), 5, seeded(73), steps=6, adjust=ban([1]),
                         **options, **how)
        assert all((state.tokens != 1).all() for state in states)


@pytest.mark.parametrize("options", [{}, {"gumbel": 0.1}, {"block_length": 3}, {"threshold": 0.9}],
                         ids=str)
@pytest.mark.parametrize("order", ["confidence", "margin", "entropy"])
def test_4_positions_are_ranked_within_their_row(order, options):
    # seen: the most confident positions of the whole batch: a row that was certain took all turns
    logits = torch.tensor([[0.99, 0.01], [0.6, 0.4]]).log()[:, None].expand(2, 6, 2)
    states = denoise(Fixed(logits), masked(2, 6, 2), 2, seeded(74), temperature=0, order=order,
                     **options)
    expected = [[m, m] for m in range(6, -1, -1)]
    if "threshold" in options:
        expected = [[6, 6], *([0, m] for m in range(5, -1, -1))]
    assert hidden_counts_of(states, 2) == expected


def test_5_complementary_masks_are_no_independent_draws():
    for N, seed in itertools.product((5, 10, 1024), range(20)):
        assert (draw_num_masked(32, N, generator=seeded(seed)).view(-1, 2).sum(1) == N + 1).all()


@pytest.mark.parametrize("T", [1, 4, 32])
@pytest.mark.parametrize("B", [1, 2, 7, 16])
def test_6_a_constant_cross_entropy_is_the_loss(B, T):
    # seen: division by the number of hidden tokens on top of 1/t: not 1.25 but 1.25/m
    constant = Fixed(torch.tensor([-1.25, math.log1p(-math.exp(-1.25))]))
    batch = corrupt(torch.zeros(B, T, dtype=torch.int64), 2, generator=seeded(0))
    assert loss(constant, batch).item() == pytest.approx(1.25, rel=1e-6)


def test_7_the_weight_is_1_over_t_and_not_1_over_1_minus_t():
    batch = corrupt(torch.zeros(64, 10, dtype=torch.int64), 2, generator=seeded(0))
    t = (batch.inputs == 2).float().mean(1)[batch.positions // 10]
    torch.testing.assert_close(batch.weights, 1 / (64 * 10 * t))


def test_7_the_bound_counts_all_mask_levels_the_emptiest_and_the_fullest_too():
    # seen: only t in [.05, .95]
    model = Recorder(levels)
    nelbo(model, torch.zeros(40, 20, dtype=torch.int64), 2)
    hidden = (torch.cat(model.shown)[:40] == 2).sum(1)  # the bound; the curve comes after it
    assert hidden.sort().values.tolist() == [m for m in range(1, 21) for _ in range(2)]


def test_7_no_network_sees_what_it_predicts():
    # seen: a causal network scored as diffusion; a token may not be visible where it is predicted
    x_0 = EXACT.sample(50)
    model = Recorder(EXACT)
    nelbo(model, x_0, V)
    for shown, asked in zip(model.shown, model.asked, strict=True):
        assert (shown.flatten()[asked] == V).all()
    model = Recorder(Causal(EXACT.p.view((V,) * T)))
    evaluate(model, x_0, V, objective="autoregressive")
    assert torch.equal(torch.cat(model.shown)[:, 1:], x_0[:, :-1])
    assert (torch.cat(model.shown)[:, 0] == V).all()


@pytest.mark.parametrize("sampler", ["draw_tokens", "denoise"])
def test_8_rare_tokens_are_drawn_in_proportion(monkeypatch, sampler):
    # One token of nearly 1 and 256 of 2^-26 each, which share the uniform draws above 1 - 2^-18. Of
    # evenly spaced draws each must get its ten: in float32 most of these draws are the same number.
    spaced = 1 - 2**-18 * (torch.arange(2560, dtype=torch.float64) + 0.5) / 2560
    rand = torch.rand

    def evenly(*size, dtype=torch.float32, **options):
        return spaced.view(size) if dtype == torch.float64 else rand(*size, dtype=dtype, **options)

    monkeypatch.setattr(torch, "rand", evenly)
    logits = torch.tensor([math.log(1 - 2**-18)] + [-26 * math.log(2)] * 256, dtype=torch.float64)
    if sampler == "draw_tokens":
        x = draw_tokens(logits.expand(2560, -1))
    else:  # with confidence, Gumbel noise and a threshold around the draw
        x = generate(Fixed(logits), masked(2560, 1, 257), 257, seeded(75), order="confidence",
                     gumbel=1.0, threshold=0.9)
    counts = torch.bincount(x.flatten(), minlength=257)
    assert counts[0] <= 3 and (counts[1:] - 10).abs().max() <= 1  # log p itself is float32


def test_9_every_row_has_its_own_mask_ratio():
    # seen: one ratio for a whole batch
    hidden = corrupt(torch.zeros(32, 64, dtype=torch.int64), 5, generator=seeded(77)).inputs == 5
    assert len(hidden.sum(1).unique()) > 16


def test_10_a_resumed_run_draws_what_the_whole_run_would_have_drawn():
    # seen: a resume that replays the batches of the first steps. Here a draw depends on seed, step
    # and purpose, and on nothing that was drawn before.
    def draw(key):
        return torch.rand(1, generator=keyed_generator(*key)).item()

    keys = [*itertools.product([0, 1, 12, 123], [0, 1, 2, 3, 23], ["noise", "data", "1", "2"])]
    whole = [draw(key) for key in keys]
    torch.manual_seed(99)
    assert [draw(key) for key in keys[50:]] == whole[50:] and len(set(whole)) == len(keys)


@every_how
def test_11_ids_between_the_vocabulary_and_the_mask_token_are_never_written(how):
    # seen: padded rows of the embedding sampled as tokens, on which the tokenizer then died
    x = generate(Fixed(torch.zeros(8, 5)), masked(60, 8, 9), 9, seeded(79), steps=4, **how)
    assert x.unique().tolist() == [0, 1, 2, 3, 4]


def test_11_a_network_with_an_odd_vocabulary_writes_all_of_it_and_nothing_else():
    torch.manual_seed(0)
    network = Transformer(ModelConfig(11, context_length=16, n_layer=1, n_head=1, n_embd=16))
    x = generate(network, masked(100, 16, 11), 11, seeded(80), steps=2, temperature=20.0)
    assert x.unique().tolist() == list(range(11))


@pytest.mark.parametrize("batch_size", [1, 7, 32, 1000])
def test_12_evaluation_asks_every_network_the_same_whatever_the_batch_size(batch_size):
    x_0 = EXACT.sample(51)
    model, once = Recorder(EXACT), Recorder(Fixed(torch.zeros(T, V)))
    nelbo(model, x_0, V, batch_size=batch_size)
    nelbo(once, x_0, V, batch_size=51)
    shown = torch.cat(model.shown)
    assert torch.equal(shown, torch.cat(once.shown))
    assert sum(map(len, model.asked)) == (shown == V).sum()


def test_13_given_tokens_cost_no_prediction_and_count_as_none():
    # seen: a rate of tokens per second that counts the prompt
    x = torch.tensor([[1, 1, 1, 3, 3, 3], [3, 0, 3, 0, 0, 3]])
    model = Recorder(Fixed(torch.zeros(6, 3)))
    states = [*denoise(model, x, 3, seeded(81), steps=2)]
    committed = sum((a.tokens != b.tokens).sum().item() for a, b in itertools.pairwise(states))
    assert committed == (x == 3).sum() == sum(map(len, model.asked)) == 6
