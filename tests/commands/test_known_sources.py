"""Experiments against sources whose every probability is known: a Markov chain, a table."""

from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import Exact, chi_square_p, masked, seeded

import diffusion
from experiments import proof_corpus
from experiments.lab.runs import read_run
from experiments.proof_corpus import draw_states, exact_denoiser, exact_entropy, stationary
from prepare_data import TokenFile, get_tokenizer
from sample import exact_nll, generate

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
    p = exact_denoiser(CHAIN, ids, 6)(tokens, hidden.flatten().nonzero().squeeze(1)).softmax(1)
    assert len(rows) == 4**5 and torch.allclose(p[:, ids], expected, atol=1e-6)
    assert (p[:, [1, 3, 5]] == 0).all()


def test_a_long_row_does_not_run_out_of_numbers():
    row = walks(1, 5000)
    row[0, ::7] = S
    hidden = torch.arange(0, 5000, 7)
    assert torch.isfinite(exact_denoiser(CHAIN, [0, 1, 2], S)(row, hidden)).all()


def test_the_nelbo_of_the_denoiser_is_the_entropy():
    denoiser = exact_denoiser(CHAIN, [0, 1, 2], S)
    bound = diffusion.nelbo(denoiser, walks(4000, 12), S, batch_size=1000)
    assert abs(bound.nats - exact_entropy(CHAIN, 12)) < 3 * bound.stderr < 0.05


@pytest.mark.parametrize("order", ["left_to_right", "spread"])
def test_the_nll_of_the_denoiser_is_that_of_the_texts_probability(order):
    rows = torch.cartesian_prod(*[torch.arange(S)] * 4)
    found = exact_nll(exact_denoiser(CHAIN, [0, 1, 2], S), rows, S, order=order)
    assert found.nats == pytest.approx(-joint(4).log().mean().item() / 4)


def test_sampling_with_the_denoiser_reproduces_the_chain():
    x = generate(exact_denoiser(CHAIN, [0, 1, 2], S), masked(20_000, 6, S), S, seeded(2))
    for t in range(5):  # rows are independent of one another, the pairs of a row are not
        counts = torch.bincount(x[:, t] * S + x[:, t + 1], minlength=S * S)
        assert chi_square_p(counts, stationary(CHAIN)[:, None] * CHAIN) > 1e-3


def test_the_proof_corpus_measures_the_gap_on_the_same_questions(finish):
    _, result = finish(
        proof_corpus, "--tokens=4000 --rows=40 --seeds 1 2 --compile=false --n-layer=1 --n-head=1 "
        "--n-embd=16 --context-length=16 --batch-size=4 --steps=4 --eval-interval=2 "
        "--log-interval=1")
    chain = proof_corpus.make_chain(8, seed=0)
    H = result["entropy"]
    assert pytest.approx(exact_entropy(chain, 16)) == H
    # What train.py's evaluation would say of the best network.
    exact = exact_denoiser(chain, [*proof_corpus.LETTERS.encode(), 256], 257)
    x_0 = torch.from_numpy(TokenFile("out/experiments/proof-corpus/data", "val").spread(40, 16))
    best = {"NELBO": ("diffusion", diffusion.evaluate(exact, x_0, 257).nats),
            "the twin's NLL": ("autoregressive", exact_nll(exact, x_0, 257).nats)}
    assert list(result["gaps"]) == list(best)
    for name, (objective, nats) in best.items():
        for i in range(2):
            folder = Path(f"out/experiments/proof-corpus/{objective}-{i + 1}")
            found = {str(line["step"]): line["nats"] for line in read_run(folder).evaluations}
            assert list(found) == list(result["gaps"][name]) == ["2", "4"]
            for step, gaps in result["gaps"][name].items():
                assert gaps[i] == pytest.approx(100 * (found[step] - nats) / H, rel=1e-4)
                assert gaps[i] > 100  # still believes in 257 tokens
    known, *trained = np.array(result["ce"])
    assert len(trained) == 2 and all((ce > known).all() for ce in trained)


@pytest.mark.slow
def test_training_comes_near_the_entropy_and_never_below(finish):
    _, result = finish(proof_corpus, "--tokens=500000 --seeds 1 2 --compile=false --n-layer=2 "
                       "--n-head=2 --n-embd=64 --context-length=32 --steps=600")
    H = result["entropy"]
    nats, stderr = result["exact"]
    assert abs(nats - H) < 3 * stderr < 0.05 * H
    for run in result["gaps"].values():
        first, *_, last = run.values()
        assert 0 < max(last) < min(10, *(gap / 2 for gap in first))  # percent
