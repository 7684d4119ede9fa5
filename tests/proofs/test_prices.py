"""The exact price of a sampler is -log of the probability with which it writes a text.

Two networks: exact conditionals, and a table of contradictions, whose answers fit no distribution.
Of both, all texts can be priced, and their probabilities must add up to 1 and be what is written.
"""

import math

import pytest
import torch
from oracles import EXACT, ROWS, Exact, T, V, correlated_joint, fits, masked, seeded
from torch import Tensor

from diffusion import evaluate
from model import ModelConfig, Transformer
from sample import FIXED_ORDERS, SCORED_ORDERS, denoise, exact_nll, generate, left_to_right_model

TEXTS = EXACT.texts  # all V^T
WORLDS = [Exact(correlated_joint(V, T, seed=t)) for t in range(T)]
# Chance decides in the others, or in confidence the token that was drawn.
PRICED = [order for order in (*FIXED_ORDERS, *SCORED_ORDERS)
          if order not in ("random", "ancestral", "confidence")]
HOWS = [{}, {"steps": 2}, {"steps": 3, "schedule": "cosine"}, {"schedule": [4, 3, 0]},
        {"block_length": 3, "steps": 2}]


def contradictions(tokens: Tensor, positions: Tensor) -> Tensor:
    """Each position has another idea of the world."""
    columns = [world(tokens)[:, t] for t, world in enumerate(WORLDS)]
    return torch.stack(columns, 1).flatten(0, 1)[positions]


def rarest_first(log_p: Tensor, tokens: Tensor) -> Tensor:
    """An order of one's own, by the probability of token 2."""
    return -log_p[:, 2]


def prices(model, **options) -> Tensor:
    """-log q of each of all texts, (V^T,): of these exact_nll is the mean, see below."""
    *_, last = denoise(model, masked(len(TEXTS), T, V), V, truth=TEXTS, **options)
    return -last.probability.log().sum(1)


@pytest.mark.parametrize("order", [*PRICED, rarest_first])
def test_a_token_at_a_time_exact_conditionals_cost_what_the_text_does(order):
    found = prices(EXACT, order=order)
    torch.testing.assert_close(found, -EXACT.p.log().float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", [EXACT, contradictions])
@pytest.mark.parametrize("order", [*PRICED, rarest_first])
def test_the_probabilities_of_all_texts_add_up_to_one(model, order):
    for how in HOWS:
        assert prices(model, order=order, **how).exp().reciprocal().sum() == pytest.approx(1, 1e-5)


@pytest.mark.parametrize("order", [*PRICED, rarest_first])
@pytest.mark.parametrize("how", HOWS[:4], ids=str)
def test_denoise_writes_each_text_as_often_as_its_price_says(order, how):
    x = generate(contradictions, masked(ROWS, T, V), V, seeded(3), order=order, **how)
    q = prices(contradictions, order=order, **how).double().neg().exp()
    assert fits(x, (q / q.sum()).view((V,) * T), merge=True)


def test_of_contradictions_orders_have_different_prices():
    q = {order: prices(contradictions, order=order) for order in PRICED}
    q.pop("top")  # with three tokens it is nearly that of margin
    distances = [(q[one] - q[other]).abs().max() for one in q for other in q if one < other]
    assert len(distances) == 10 and min(distances) > 0.01


def test_a_prefix_is_given_and_its_tokens_cost_nothing():
    text = TEXTS[50:51]
    known = EXACT.marginal[tuple(text[0, :2]) + (V, V)]
    expected = -math.log(EXACT.p[50] / known) / 2
    found = exact_nll(EXACT, text, V, prefix_length=2, order="entropy")
    assert found.nats == pytest.approx(expected, abs=1e-5)


def test_the_mean_and_its_error_are_over_rows_however_they_are_batched():
    by_row = prices(contradictions, order="margin", steps=2) / T
    for batch_size in (81, 7):
        found = exact_nll(contradictions, TEXTS, V, 0, batch_size, order="margin", steps=2)
        assert found.nats == pytest.approx(by_row.mean().item(), abs=1e-6)
        assert found.stderr == pytest.approx(by_row.std().item() / 9, rel=1e-4)
    assert math.isnan(exact_nll(EXACT, TEXTS[:1], V).stderr)


@torch.no_grad()
def test_left_to_right_a_causal_network_costs_its_nll():
    net = Transformer(ModelConfig(11, 16, n_layer=2, n_head=2, n_embd=32, causal=True))
    for weight in net.parameters():
        weight.normal_(std=weight.size(-1) ** -0.5, generator=seeded(0))
    x_0 = torch.randint(11, (20, 16), generator=seeded(1))
    twin = left_to_right_model(net, 11)
    found = exact_nll(twin, x_0, 11, order="left_to_right")
    expected = evaluate(net, x_0, 11, "autoregressive")
    assert found[:2] == pytest.approx(expected[:2], abs=1e-5)


@pytest.mark.parametrize("options", [
    *({"order": order} for order in ("random", "ancestral", "confidence")),
    {"order": "margin", "gumbel": 1.0}, {"remask": "conf"}, {"threshold": 0.9},
    {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.5},
], ids=str)
def test_what_chance_decides_has_no_exact_price(options):
    with pytest.raises(ValueError, match="no exact price"):
        exact_nll(EXACT, TEXTS[:2], V, **options)


def test_fixed_orders_ask_only_where_they_write():
    asked = []

    def counting(tokens, positions):
        asked.append(len(positions))
        return EXACT(tokens, positions)

    exact_nll(counting, TEXTS[:2], V, order="spread", steps=2)
    assert asked == [4, 4]
    *_, last = denoise(EXACT, masked(2, T, V), V, truth=TEXTS[5:7])
    assert torch.equal(last.tokens, TEXTS[5:7]) and last.calls == T
