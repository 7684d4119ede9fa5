"""experiments.prices: what orders, schedules and holes cost, against arithmetic; and to its end."""

import itertools

import pytest
import torch
from oracles import EXACT, JOINT, Causal, V, seeded

from experiments import prices

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


def test_a_hole_costs_what_the_conditionals_say():
    x_0 = EXACT.sample(40)
    hole = torch.tensor([False, True, True, False]).expand(40, 4)
    ours, from_the_left = prices.prices_of_holes(EXACT, Causal(JOINT), x_0, V, hole)
    for text, one, other in zip(x_0, ours, from_the_left, strict=True):
        a, b, c, d = text.tolist()
        both = EXACT.marginal[a, b, c, d] / EXACT.marginal[a, V, V, d]
        left = EXACT.marginal[a, b, c, V] / EXACT.marginal[a, V, V, V]
        assert one == pytest.approx(-both.log().item(), abs=1e-5)
        assert other == pytest.approx(-left.log().item(), abs=1e-5)


PIECES = [b"It", b" end", b"ed.", b" The", b" sk", b"y is", b" wide", b".", b" An", b"d", b" we"]


def test_holes_are_whole_words_and_whole_sentences():
    words = prices.spans(PIECES, prices.HOLES["a word"])
    # "ended" and "sky" end within a token
    assert [b"".join(PIECES[a:b]) for a, b in words] == [b" The", b" wide", b" And", b" we"]
    assert prices.spans(PIECES, prices.HOLES["a sentence"]) == [(3, 8)]  # " And we" has no end


def test_each_text_gets_up_to_three_holes():
    texts = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [0] * 11])  # the second has no words
    rows, holes = prices.dig_holes(texts, PIECES.__getitem__, prices.HOLES["a word"])
    assert rows.tolist() == [texts[0].tolist()] * 3
    dug = sorted(hole.nonzero().flatten().tolist() for hole in holes)
    assert dug == [[6], [8, 9], [10]]


def test_prices_tell_orders_apart_and_schedules_are_found(finish):
    _, result = finish(prices, "--checkpoint run --judge twin --data-dir data/sotu-bytes --texts 4 "
                               "--calls 8 64 --orders spread random entropy --schedules 2 4")
    assert list(result["prices"]) == [f"{order}, {calls}" for order in ("spread", "random",
                                      "entropy") for calls in (8, 64)]
    for calls in ("2", "4"):
        committed = result["schedules"][calls][-1]
        assert len(committed) == int(calls) and sum(committed) == N
    assert set(result["holes"]) <= set(prices.HOLES)
