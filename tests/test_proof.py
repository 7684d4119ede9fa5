"""The experiments on what a network learns: the source of known entropy, and training at one level only."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import diffusion
import train
from experiments import lab, proof_corpus, variable_masking
from experiments.proof_corpus import (
    compare,
    draw_states,
    exact_denoiser,
    exact_entropy,
    exact_nll,
    make_chain,
    stationary,
    write_corpus,
)
from prepare_data import TokenFile, get_tokenizer, write_dataset
from tests.test_sampling import Exact, Fixed, chi_square_p, masked, seeded

ROOT = Path(__file__).parent.parent
CHAIN = make_chain(letters=2, seed=3, peak=0.5, end=0.2)
S = len(CHAIN)
TINY = ("--compile=false --n-layer=1 --n-head=1 --n-embd=16 --context-length=16 --batch-size=4 --steps=4 "
        "--eval-interval=2 --eval-rows=8 --final-eval-rows=8 --log-interval=1").split()


def joint(T: int) -> torch.Tensor:
    """(S,)*T: the probability of every text of T tokens, multiplied out."""
    texts = torch.cartesian_prod(*[torch.arange(S)] * T).view(-1, T)
    p = stationary(CHAIN)[texts[:, 0]]
    for t in range(1, T):
        p = p * CHAIN[texts[:, t - 1], texts[:, t]]
    return p.view((S,) * T)


def texts(rows: int, T: int) -> torch.Tensor:
    return torch.tensor(draw_states(CHAIN, rows * T, seed=0)).view(rows, T)


# ---- the source -----------------------------------------------------------------------------------


def test_a_chain_is_made_of_distributions_and_its_stationary_one_stays():
    chain = make_chain(letters=8, seed=0)
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
    found = exact_nll(CHAIN, [7, 0, 2], torch.tensor([7, 0, 2])[rows])
    assert found == pytest.approx(-joint(4).log().mean().item() / 4)


def test_the_corpus_is_the_walk_with_every_text_ended(tmp_path):
    chain = make_chain(8, seed=0)
    write_corpus(chain, tmp_path, tokens=5000)
    ids = np.array([*proof_corpus.LETTERS.encode(), get_tokenizer("byte").eot_token])
    for split, length, seed in (("train", 5000, 1), ("val", 1000, 2)):
        walk = ids[draw_states(chain, length, seed)]
        assert TokenFile(tmp_path, split).tokens.tolist() == [*walk, ids[-1]]


# ---- the exact denoiser ---------------------------------------------------------------------------


def test_the_denoiser_is_bayes_rule_for_every_text_and_every_mask():
    T, ids, V = 5, [4, 0, 2], 6  # the states' tokens are some of the vocabulary, in another order
    rows = torch.cartesian_prod(*[torch.arange(S + 1)] * T)  # every text with every part of it hidden
    expected = Exact(joint(T))(rows)
    found = exact_denoiser(CHAIN, ids, V)(torch.tensor([*ids, V])[rows])
    hidden = rows == S
    p = found.softmax(2)
    assert len(rows) == 4**5 and torch.allclose(p[..., ids][hidden], expected.softmax(2)[hidden], atol=1e-6)
    assert (p[..., [1, 3, 5]] == 0).all()
    positions = hidden.flatten().nonzero().squeeze(1)
    assert torch.equal(exact_denoiser(CHAIN, ids, V)(torch.tensor([*ids, V])[rows], positions), found[hidden])


def test_a_long_row_does_not_run_out_of_numbers():
    row = texts(1, 5000)
    row[0, ::7] = S
    logits = exact_denoiser(CHAIN, [0, 1, 2], S)(row)
    assert torch.isfinite(logits).all()


def test_the_nelbo_of_the_denoiser_is_the_entropy():
    T = 12
    bound = diffusion.nelbo(exact_denoiser(CHAIN, [0, 1, 2], S), texts(4000, T), S, batch_size=1000)
    assert abs(bound.nats - exact_entropy(CHAIN, T)) < 3 * bound.stderr < 0.05


def test_sampling_with_the_denoiser_reproduces_the_chain():
    T, rows = 6, 20_000
    x = diffusion.generate(exact_denoiser(CHAIN, [0, 1, 2], S), masked(rows, T, S), S, steps=T,
                           generator=seeded(2))
    for t in range(T - 1):  # rows are independent of one another, the pairs of a row are not
        counts = torch.bincount(x[:, t] * S + x[:, t + 1], minlength=S * S)
        assert chi_square_p(counts, stationary(CHAIN)[:, None] * CHAIN) > 1e-3


def test_comparing_finds_the_gap_of_a_known_error():
    T, rows = 8, 500
    exact, x_0 = exact_denoiser(CHAIN, [0, 1, 2], S), texts(rows, T)
    everything = torch.full((rows,), T)
    assert compare(exact, exact, x_0, S, everything)[2:] == [0, 0]
    known, learned, gap, error = compare(exact, Fixed(torch.zeros(T, S)), x_0, S, everything)
    assert learned == pytest.approx(math.log(S)) and gap == pytest.approx(learned - known)
    pi = stationary(CHAIN)
    expected = math.log(S) - torch.special.entr(pi).sum().item()  # KL(pi || uniform)
    assert abs(gap - expected) < 4 * error


# ---- the scripts ----------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty place to work in, with the configurations, and training inside this process."""

    def train_here(name: str, *settings: str, config: str = "configs/quickstart.toml") -> Path:
        assert train.main([config, *settings, f"--out-dir={lab.OUT / name}"]) == 0
        return lab.OUT / name

    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr(train, "matmul_ceiling", lambda device, dtype: 1e9)  # a second in each run
    for script in (proof_corpus, variable_masking):
        monkeypatch.setattr(script, "trained", train_here)
    return tmp_path


def prepare_prose(folder: Path) -> str:
    """A corpus that is always there, our own prose and code: every tenth paragraph is for validation, and is
    returned. ASCII only: the pictures made of blocks are another language."""
    paths = sorted(path for kind in ("*.md", "*.py", "*/*.md", "*/*.py") for path in ROOT.glob(kind))
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in paths)
    paragraphs = text.encode("ascii", "ignore").decode().split("\n\n")
    val = "\n\n".join(paragraphs[9::10])
    del paragraphs[9::10]
    write_dataset(iter([("train", ["\n\n".join(paragraphs)]), ("val", [val])]), "byte", folder, "our prose")
    return val


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_proof_corpus_runs_from_end_to_end(here, capsys):
    assert proof_corpus.main(["--tokens=4000", "--rows=40", "--picture=proof.png", *TINY]) == 0
    result = last_line(capsys)
    chain = make_chain(8, seed=0)
    assert result["entropy"] == pytest.approx(exact_entropy(chain, 16))
    assert list(result["runs"]) == ["NELBO", "the twin's NLL"]
    for run in result["runs"].values():
        assert [point["step"] for point in run] == [2, 4]
        assert min(point["gap"] for point in run) > 1  # still believes in 257 tokens
    assert list(result["table"]) == ["1", "2", "3", "5", "6", "8", "10", "11", "13", "14", "16", "NELBO"]
    assert all(learned - known == pytest.approx(gap) for known, learned, gap, _ in result["table"].values())
    assert (here / "proof.png").stat().st_size > 10_000


def test_the_gap_over_training_is_measured_on_the_same_questions(here, capsys):
    # The gap is what train.py's evaluation says of the network, minus what it would say of the best one.
    write_corpus(make_chain(8, seed=0), here / "data", tokens=4000)
    val = TokenFile(here / "data", "val")
    exact = exact_denoiser(make_chain(8, seed=0), [*proof_corpus.LETTERS.encode(), 256], 257)
    logged = diffusion.evaluate(exact, torch.from_numpy(val.spread(8, 16)), 257, batch_size=4).nats
    assert proof_corpus.main(["--tokens=4000", "--rows=40", *TINY]) == 0
    result = last_line(capsys)
    assert all(point["gap"] == pytest.approx(point["nats"] - logged) for point in result["runs"]["NELBO"])


def test_variable_masking_runs_from_end_to_end(here, capsys):
    val = prepare_prose(here / "data").encode()
    assert variable_masking.main(["--data-dir=data", "--picture=levels.png", "--rows=42", "--num-samples=2",
                                  "--sampling-steps=4", *TINY]) == 0
    result = last_line(capsys)
    assert list(result["rows"]) == list(result["curves"]) == ["15%", "50%", "ten levels", "all levels"]
    for name, objective, mask_levels in (("15-percent", "mlm", 0), ("50-percent", "mlm", 0),
                                         ("ten-levels", "diffusion", 10), ("all-levels", "diffusion", 0)):
        config = json.loads((lab.OUT / "variable-masking" / name / "config.json").read_text())
        assert (config["objective"], config["mask_levels"]) == (objective, mask_levels)
    assert len({row["nelbo"] for row in result["rows"].values()}) == 4
    share = np.bincount([*val, 256]) / (len(val) + 1)
    assert result["unigram"] == pytest.approx(-(share[share > 0] * np.log(share[share > 0])).sum(), abs=1e-4)
    assert (here / "levels.png").stat().st_size > 10_000


@pytest.mark.parametrize("script, arguments, message", [
    (proof_corpus, ["--tokens=0"], "--tokens must be at least 5"),
    (variable_masking, ["--num-samples=0"], "--num-samples: must be at least 1, not 0"),
    (variable_masking, ["--rows=1"], "--rows: must be at least 2, not 1"),
    (proof_corpus, ["--tokens=many"], "invalid int value: 'many'"),
    (variable_masking, ["--data-dir=nowhere"], "run prepare_data.py"),
])
def test_a_mistake_gets_one_line(script, arguments, message, here, capsys):
    try:
        code = script.main(arguments)
    except SystemExit as error:
        code = error.code
    lines = capsys.readouterr().err.splitlines()
    assert (code, len(lines)) == (2, 1) and message in lines[0]


# ---- the directions of the results, by training that takes a minute ---------------------------------


@pytest.mark.slow
def test_training_comes_near_the_entropy_and_never_below(here, capsys):
    assert proof_corpus.main(["--tokens=500000", "--compile=false", "--n-layer=2", "--n-head=2",
                              "--n-embd=64", "--context-length=32", "--steps=600"]) == 0
    result = last_line(capsys)
    H, (*_, learned, gap, error) = result["entropy"], result["table"]["NELBO"]
    nats, stderr = result["exact"]
    assert abs(nats - H) < 3 * stderr < 0.05 * H
    assert learned > H - 3 * stderr and gap > -3 * error
    assert gap < 0.1 * H
    for first, *_, last in result["runs"].values():
        assert 0 < last["gap"] < first["gap"] / 2


@pytest.mark.slow
def test_a_network_that_learned_at_one_level_does_not_know_the_others(here, capsys):
    prepare_prose(here / "data")
    assert variable_masking.main(["--data-dir=data", "--compile=false", "--n-layer=2", "--n-head=2",
                                  "--n-embd=64", "--context-length=32", "--batch-size=32", "--steps=600",
                                  "--rows=336", "--num-samples=2", "--sampling-steps=16"]) == 0
    result = last_line(capsys)
    rows, unigram = result["rows"], result["unigram"]
    assert rows["15%"]["ce"]["100%"] >= unigram - 0.05
    assert rows["15%"]["ce"]["100%"] > rows["all levels"]["ce"]["100%"]
    assert rows["all levels"]["nelbo"] + 0.01 < rows["15%"]["nelbo"]  # of the very same rows and masks
