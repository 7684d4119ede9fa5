"""Experiments against sources whose every probability is known: a Markov chain, a table."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import EXACT, JOINT, Causal, Exact, Fixed, T, V, chi_square_p, masked, seeded

import diffusion
import train
from experiments import gpt_twin, proof_corpus
from experiments.proof_corpus import draw_states, exact_denoiser, exact_entropy, stationary
from plumbing.checkpoint import load_checkpoint
from prepare_data import TokenFile, get_tokenizer, write_dataset
from sample import generate

CHAIN = proof_corpus.make_chain(letters=2, seed=3, peak=0.5, end=0.2)
S = len(CHAIN)


def joint(T: int) -> torch.Tensor:
    """(S,)*T: the probability of every text of T tokens of the chain, multiplied out."""
    texts = torch.cartesian_prod(*[torch.arange(S)] * T).view(-1, T)
    p = stationary(CHAIN)[texts[:, 0]]
    for t in range(1, T):
        p = p * CHAIN[texts[:, t - 1], texts[:, t]]
    return p.view((S,) * T)


def walks(rows: int, T: int) -> torch.Tensor:
    return torch.tensor(draw_states(CHAIN, rows * T, seed=0)).view(rows, T)


# --- The chain ------------------------------------------------------------------------------------


def test_a_chain_is_made_of_distributions_and_its_stationary_one_stays():
    chain = proof_corpus.make_chain(letters=8, seed=0)
    assert (chain > 0).all() and torch.allclose(chain.sum(1), torch.ones(9).double())
    assert torch.allclose(stationary(chain) @ chain, stationary(chain), atol=1e-12)
    assert stationary(chain)[-1].item() == pytest.approx(1 / 200)


def test_a_walk_follows_the_chain():
    states = torch.tensor(draw_states(CHAIN, 30_000, seed=5))
    for state in range(S):  # where a walk goes from a state depends on nothing else
        counts = torch.bincount(states[1:][states[:-1] == state], minlength=S)
        assert chi_square_p(counts, CHAIN[state]) > 1e-3


@pytest.mark.parametrize("T", [1, 2, 5])
def test_the_exact_entropy_is_that_of_all_texts(T):
    assert exact_entropy(CHAIN, T) == pytest.approx(torch.special.entr(joint(T)).sum().item() / T)


def test_the_exact_nll_is_that_of_the_texts_probability():
    rows = torch.cartesian_prod(*[torch.arange(S)] * 4)
    found = proof_corpus.exact_nll(CHAIN, [7, 0, 2], torch.tensor([7, 0, 2])[rows])
    assert found == pytest.approx(-joint(4).log().mean().item() / 4)


def test_the_corpus_is_the_walk_with_every_text_ended(tmp_path):
    chain = proof_corpus.make_chain(8, seed=0)
    proof_corpus.write_corpus(chain, tmp_path, tokens=5000)
    ids = np.array([*proof_corpus.LETTERS.encode(), get_tokenizer("byte").eot_token])
    for split, length, seed in (("train", 5000, 1), ("val", 1000, 2)):
        walk = ids[draw_states(chain, length, seed)]
        assert TokenFile(tmp_path, split).tokens.tolist() == [*walk, ids[-1]]


def test_the_denoiser_is_bayes_rule_for_every_text_and_every_mask():
    ids = [4, 0, 2]  # the states' tokens are some of the vocabulary of 6, in another order
    rows = torch.cartesian_prod(*[torch.arange(S + 1)] * 5)  # every text, any part of it hidden
    hidden = rows == S
    expected = Exact(joint(5))(rows).softmax(2)[hidden]
    tokens = torch.tensor([*ids, 6])[rows]
    denoiser = exact_denoiser(CHAIN, ids, 6)
    p = denoiser(tokens).softmax(2)
    assert len(rows) == 4**5 and torch.allclose(p[..., ids][hidden], expected, atol=1e-6)
    assert (p[..., [1, 3, 5]] == 0).all()
    positions = hidden.flatten().nonzero().squeeze(1)
    assert torch.equal(denoiser(tokens, positions), denoiser(tokens)[hidden])


def test_a_long_row_does_not_run_out_of_numbers():
    row = walks(1, 5000)
    row[0, ::7] = S
    assert torch.isfinite(exact_denoiser(CHAIN, [0, 1, 2], S)(row)).all()


def test_the_nelbo_of_the_denoiser_is_the_entropy():
    denoiser = exact_denoiser(CHAIN, [0, 1, 2], S)
    bound = diffusion.nelbo(denoiser, walks(4000, 12), S, batch_size=1000)
    assert abs(bound.nats - exact_entropy(CHAIN, 12)) < 3 * bound.stderr < 0.05


def test_sampling_with_the_denoiser_reproduces_the_chain():
    x = generate(exact_denoiser(CHAIN, [0, 1, 2], S), masked(20_000, 6, S), S, seeded(2))
    for t in range(5):  # rows are independent of one another, the pairs of a row are not
        counts = torch.bincount(x[:, t] * S + x[:, t + 1], minlength=S * S)
        assert chi_square_p(counts, stationary(CHAIN)[:, None] * CHAIN) > 1e-3


def test_comparing_finds_the_gap_of_a_known_error():
    exact = exact_denoiser(CHAIN, [0, 1, 2], S)
    x_0 = walks(500, 8)
    everything = torch.full((500,), 8)
    uniform = Fixed(torch.zeros(8, S))
    known, gaps = proof_corpus.compare(exact, [exact, uniform], x_0, S, everything)
    assert gaps.shape == (2, 500) and (gaps[0] == 0).all()
    gap, error = diffusion.mean_and_error(gaps[1])
    assert known + gap == pytest.approx(math.log(S))
    expected = math.log(S) - exact_entropy(CHAIN, 1)  # KL(pi || uniform)
    assert abs(gap - expected) < 4 * error


def test_the_proof_corpus_measures_the_gap_on_the_same_questions(finish):
    _, result = finish(
        proof_corpus, "--tokens=4000 --rows=40 --seeds 1 2 --compile=false --n-layer=1 --n-head=1 "
        "--n-embd=16 --context-length=16 --batch-size=4 --steps=4 --eval-interval=2 --eval-rows=8 "
        "--final-eval-rows=8 --log-interval=1")
    chain = proof_corpus.make_chain(8, seed=0)
    assert result["entropy"] == pytest.approx(exact_entropy(chain, 16))
    assert list(result["runs"]) == ["NELBO", "the twin's NLL"]
    # What train.py's evaluation would say of the best network.
    exact = exact_denoiser(chain, [*proof_corpus.LETTERS.encode(), 256], 257)
    val = TokenFile("out/experiments/proof-corpus/data", "val")
    best = diffusion.evaluate(exact, torch.from_numpy(val.spread(8, 16)), 257, batch_size=4).nats
    for name, run in result["runs"].items():
        assert list(run) == ["2", "4"]
        for step, gaps in run.items():
            assert len(gaps) == 2 and min(gaps) > 1  # still believes in 257 tokens
            if name == "NELBO":
                log = Path("out/experiments/proof-corpus/run-1/log.jsonl").read_text().splitlines()
                (nats,) = {line["nats"] for line in map(json.loads, log)
                           if line["step"] == int(step) and "nats" in line}
                assert gaps[0] == pytest.approx(nats - best, abs=1e-5)
    levels = sorted({1, *(max(1, round(1.6 * i)) for i in range(1, 11))})
    assert list(result["table"]) == [*map(str, levels), "NELBO"]


@pytest.mark.slow
def test_training_comes_near_the_entropy_and_never_below(finish):
    _, result = finish(proof_corpus, "--tokens=500000 --seeds 1 2 --compile=false --n-layer=2 "
                       "--n-head=2 --n-embd=64 --context-length=32 --steps=600")
    H = result["entropy"]
    nats, stderr = result["exact"]
    row = result["table"]["NELBO"]
    assert abs(nats - H) < 3 * stderr < 0.05 * H
    assert -3 * row["error"] < row["gap"] < 0.1 * H
    for run in result["runs"].values():
        first, *_, last = run.values()
        assert 0 < max(last) < min(first) / 2


# --- Prices by the chain rule ---------------------------------------------------------------------

TEXTS = EXACT.texts  # every possible one
EVERYTHING = torch.ones_like(TEXTS, dtype=torch.bool)


def log_p(rows, hole):
    """By the table: log p(the hole's tokens | the rest), (B,)."""
    given = EXACT.marginal[tuple(rows.masked_fill(hole, V).T)]
    return (JOINT[tuple(rows.T)] / given).log()


def score(order: str, rows) -> torch.Tensor:
    return gpt_twin.ORDERS[order](*rows.shape)


@pytest.mark.parametrize("hole", [
    EVERYTHING, torch.tensor([False, True, True, False]).expand_as(TEXTS),
    torch.tensor([True, False, False, True]).expand_as(TEXTS),
    torch.rand(TEXTS.shape, generator=seeded(0)) < 0.5,  # of different lengths, some of none
])
def test_the_chain_rule_gives_the_likelihood_of_an_exact_model_in_any_order(hole):
    for order in gpt_twin.ORDERS:
        nats = gpt_twin.chain_rule(EXACT, TEXTS, hole, score(order, TEXTS), V)
        torch.testing.assert_close(nats.sum(1), -log_p(TEXTS, hole), rtol=1e-4, atol=1e-5)
        assert (nats[~hole] == 0).all()
    mean, _ = gpt_twin.per_byte(nats, hole)
    expected = (-log_p(TEXTS, hole) / hole.sum(1))[hole.any(1)].mean()
    assert mean == pytest.approx(expected.item(), rel=1e-4)


def test_each_position_costs_what_the_table_says_given_those_written_before_it():
    nats = gpt_twin.chain_rule(EXACT, TEXTS, EVERYTHING, score("right to left", TEXTS), V)
    for t in range(T):
        hidden = EVERYTHING.clone()  # when position t is predicted
        hidden[:, t + 1 :] = False
        after = hidden.clone()
        after[:, t] = False
        expected = log_p(TEXTS, after) - log_p(TEXTS, hidden)
        torch.testing.assert_close(nats[:, t], expected, rtol=1e-4, atol=1e-5)


def test_the_chain_rule_in_random_order_is_the_nelbo_on_average_for_a_wrong_model_too():
    wrong = Exact(JOINT)
    noise = torch.rand(wrong.marginal.shape, generator=seeded(6))
    wrong.marginal = wrong.marginal * (1 + noise)
    rows = TEXTS[7:8].expand(4000, T)
    everything = torch.ones_like(rows, dtype=torch.bool)
    order = torch.rand(rows.shape, generator=seeded(1))
    nats = gpt_twin.chain_rule(wrong, rows, everything, order, V)
    mean, error = gpt_twin.per_byte(nats, everything)
    bound = diffusion.nelbo(wrong, rows, V, batch_size=4000)
    assert abs(mean - bound.nats) < 4 * math.hypot(error, bound.stderr)
    assert nats.sum(1).std() > 0.01  # its conditionals disagree: the order matters


def test_the_twin_pays_what_the_table_says_given_the_left():
    nats = gpt_twin.twin_nats(Causal(JOINT), TEXTS, V)
    torch.testing.assert_close(nats.sum(1), -JOINT.flatten().log(), rtol=1e-4, atol=1e-5)


def test_infilling_an_exact_model_with_the_left_only_is_its_twin():
    x_0 = EXACT.sample(400, seed=2)
    hole = gpt_twin.middle(x_0, 1)
    both, left, twin = gpt_twin.infill(EXACT, Causal(JOINT), x_0, hole, V).values()
    assert left["nats"] == pytest.approx(twin["nats"], rel=1e-4)
    assert left["right"] == twin["right"] < both["right"]
    assert both["nats"] == pytest.approx((-log_p(x_0, hole)).mean().item(), rel=1e-4)
    assert both["bound"] == pytest.approx(both["nats"], rel=1e-4)  # one byte has one order
    guess = EXACT(x_0.masked_fill(hole, V))[:, T // 2].argmax(1)
    right = (guess == x_0[:, T // 2]).double().mean().item()
    assert both["right"] == pytest.approx(right)


def test_holes_are_where_they_should_be():
    text = "abcdefgh of the Union, a"
    x_0 = torch.tensor([list(text.encode()), list(b"x" * len(text))])
    middle = gpt_twin.middle(x_0, 3).nonzero().tolist()
    assert middle == [[b, t] for b, t in itertools.product((0, 1), (12, 13, 14))]
    letters = {token for token in range(128) if chr(token).isalpha()}
    found = gpt_twin.words(x_0, letters)
    assert "".join(text[t] for t in found[0].nonzero().flatten()) == "the"
    assert not found[1].any()  # no whole word begins there


def test_gpt_twin(finish):
    _, result = finish(gpt_twin, "--checkpoint run --twin twin --rows 8 --chain-rows 2 "
                       "--hole-rows 8 --steps 2 4")
    assert set(result["holes"]) == {"4 bytes", "8 bytes", "16 bytes", "a word"}
    for row in result["prices"].values():  # random weights: hardly better or worse than chance
        assert row["nats"] == pytest.approx(math.log(257), abs=2)
    ways = ["diffusion, 2 calls", "diffusion, 4 calls", "the twin, 64 calls, no cache",
            "the twin, 64 calls, cached"]
    assert list(result["speed"]) == ways and min(result["speed"].values()) > 0


def test_a_missing_twin_is_trained_first(workplace, monkeypatch):
    commands = []
    failed = type("Failed", (), {"returncode": 3})
    monkeypatch.setattr("subprocess.run", lambda words, env: commands.append(words) or failed)
    with pytest.raises(SystemExit, match="3"):
        gpt_twin.main(["--checkpoint", "run"])
    words = list(map(str, commands[0]))
    assert words[words.index("--objective") + 1] == "autoregressive"
    assert words[words.index("--out-dir") + 1] == "out/bytes-ar"


@pytest.mark.slow
def test_the_twin_is_ahead_on_the_left_and_diffusion_uses_the_right(tmp_path):
    # A Markov chain over eight letters, so that every price has a least possible value: its
    # entropy, and of a hole of L letters between i and j: log P^(L+1)[i, j] - the sum of log P on
    # the way.
    P = (1.5 * torch.randn(8, 8, generator=seeded(1), dtype=torch.float64)).softmax(1)
    text = "".join("abcdefgh"[state] for state in draw_states(P, 120_000, seed=0))
    documents = [("train", [text[:100_000]]), ("val", [text[100_000:]])]
    write_dataset(iter(documents), "byte", tmp_path / "data", "a Markov chain")
    networks = []
    evaluations = []
    for objective in ("diffusion", "autoregressive"):
        flags = (f"--data-dir {tmp_path}/data --out-dir {tmp_path}/{objective} --objective "
                 f"{objective} --n-layer 2 --n-head 2 --n-embd 64 --context-length 64 "
                 "--batch-size 16 --steps 400 --eval-interval 400 --compile false "
                 "--precision float32")
        assert train.main(flags.split()) == 0
        model, info = load_checkpoint(tmp_path / objective)
        networks.append(model)
        evaluations.append(info["evaluation"])
    entropy = (stationary(P)[:, None] * torch.special.entr(P)).sum().item()
    bound, exact = evaluations
    assert entropy - 3 * exact["stderr"] < exact["nats"] < bound["nats"]  # the twin is ahead

    x_0 = torch.from_numpy(TokenFile(tmp_path / "data", "val").spread(256, 64))
    both, left, twin = gpt_twin.infill(*networks, x_0, gpt_twin.middle(x_0, 4), 257).values()
    assert twin["nats"] < left["nats"]  # from the left only, too
    assert both["nats"] < left["nats"] - 3 * left["stderr"] and both["right"] > left["right"]
    # What the right side tells outweighs that.
    assert both["nats"] < twin["nats"] - 3 * twin["stderr"]
    path = x_0[:, 31:37] - 97  # the hole with a letter on either side
    ends = torch.linalg.matrix_power(P, 5)[path[:, 0], path[:, -1]]
    on_the_way = P[path[:, :-1], path[:, 1:]].log().sum(1)
    best = (ends.log() - on_the_way).mean().item() / 4
    assert best - 0.02 < both["nats"] < best + 0.2
