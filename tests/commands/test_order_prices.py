"""experiments.prices: what orders, schedules and holes cost, against arithmetic; and to its end."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from oracles import EXACT, JOINT, Causal, V, seeded

from experiments import prices
from prepare_data import get_tokenizer

N = 64  # tokens of a text: the context of the networks


def test_the_price_of_a_schedule_is_the_sum_of_the_costs_of_its_steps():
    generator = seeded(0)
    tables = torch.randn(3, 17, 16, 5, generator=generator)

    def network(tokens, positions):  # it depends on what is visible, in some arbitrary way
        hidden = (tokens == 5).sum(1)
        logits = torch.stack([tables[row % 3][hidden[row]] for row in range(len(tokens))])
        return logits.flatten(0, 1)[positions]

    x_0 = torch.randint(5, (3, 16), generator=generator)
    costs = prices.costs_of_steps(network, x_0, 5)
    for counts in ([16, 0], [16, 8, 0], [16, 12, 8, 0], [16, 4, 0]):
        units = [count // prices.UNIT for count in counts]
        expected = sum(costs[m, k] for m, k in itertools.pairwise(units)) / 16
        found = prices.prices(network, x_0, 5, order="spread", schedule=counts)
        assert found.mean().item() == pytest.approx(expected, rel=1e-5)


def test_a_hole_costs_what_the_conditionals_say(monkeypatch):
    hole = torch.tensor([False, True, True, False])
    monkeypatch.setattr(prices, "dig_holes", lambda rows, *_: (rows, hole.expand(rows.shape)))
    twins = SimpleNamespace(model=EXACT, judge=Causal(JOINT), mask_id=V,
                            tokenizer=get_tokenizer("byte"))
    texts = EXACT.sample(40)
    a, b, c, d = texts.T
    both = EXACT.marginal[a, b, c, d] / EXACT.marginal[a, V, V, d]
    left = EXACT.marginal[a, b, c, V] / EXACT.marginal[a, V, V, V]
    expected = [-both.log().mean().item(), -left.log().mean().item()]
    assert prices.price_holes(twins, texts)["a word"][:2] == pytest.approx(expected, abs=1e-5)


PIECES = ["It", " end", "ed.", " The", " sk", "y is", " wide", ".", " An", "d", " we"]


def test_holes_are_up_to_three_whole_words_or_sentences_of_a_text():
    texts = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [0] * 11])  # the second has none

    def dig(name: str) -> list[list[int]]:
        rows, holes = prices.dig_holes(texts, lambda ids: PIECES[ids[0]], prices.HOLES[name])
        assert rows.tolist() == [texts[0].tolist()] * len(holes)
        return sorted(hole.nonzero().flatten().tolist() for hole in holes)

    # Of " The", " wide", " And", " we"; "ended" and "sky" end within a token.
    assert dig("a word") == [[6], [8, 9], [10]]
    assert dig("a sentence") == [[3, 4, 5, 6, 7]]  # " And we" has no end


def test_prices_tell_orders_apart_and_schedules_are_found(finish):
    _, result = finish(prices, "--checkpoint run --judge twin --data-dir data/sotu-bytes "
                               "--num-samples 4 --calls 8 64")
    assert list(result["orders"]) == list(prices.ORDERS)
    assert all(len(line) == 2 and min(line) > 0 for line in result["orders"].values())
    for calls in prices.SCHEDULES:
        committed = result["schedules"][str(calls)][-1]
        assert len(committed) == calls and sum(committed) == N
    assert "a word" in result["holes"]
