"""Diffusion against its twin, repeated text, training that goes wrong: prices against tables of probabilities
whose likelihoods are known, and each script from end to end on very little."""

import dataclasses
import itertools
import json
import math
import unittest.mock

import numpy as np
import pytest
import torch

import diffusion
import train
from experiments import gpt_twin, lab, repetition, training_dynamics
from model import ModelConfig, Transformer, load_checkpoint
from prepare_data import TokenFile, get_tokenizer, write_dataset
from tests.test_sampling import EXACT, JOINT, Causal, Exact, correlated_joint, seeded

T, V = EXACT.T, EXACT.V
ROWS = torch.tensor(list(itertools.product(range(V), repeat=T)))  # every possible text
TINY = """
n_layer = 1
n_head = 1
n_embd = 16
context_length = 32
batch_size = 4
compile = false
precision = "float32"
eval_rows = 12
"""

# --- Prices ---------------------------------------------------------------------------------------


def log_p(rows, hole):
    """By the table: log p(the hole's tokens | the rest), (B,)."""
    given = EXACT.probability[tuple(rows.masked_fill(hole, V).T)]
    return (JOINT[tuple(rows.T)] / given).log()


@pytest.mark.parametrize("order", gpt_twin.ORDERS)
@pytest.mark.parametrize("places", [(0, 1, 2, 3), (1, 2), (0, 3), (2,)])
def test_the_chain_rule_gives_the_likelihood_of_an_exact_model_in_any_order(order, places):
    hole = torch.zeros_like(ROWS, dtype=torch.bool)
    hole[:, list(places)] = True
    nats = gpt_twin.chain_rule(EXACT, ROWS, hole, gpt_twin.ORDERS[order](*ROWS.shape), V)
    torch.testing.assert_close(nats.sum(1), -log_p(ROWS, hole), rtol=1e-4, atol=1e-5)
    assert (nats[~hole] == 0).all()


def test_each_place_costs_what_the_table_says_given_the_places_written_before_it():
    everything = torch.ones_like(ROWS, dtype=torch.bool)
    nats = gpt_twin.chain_rule(EXACT, ROWS, everything, gpt_twin.ORDERS["right to left"](*ROWS.shape), V)
    for t in range(T):
        later = everything.clone()  # hidden when place t is asked about, and after it is written
        later[:, t + 1 :] = False
        after = later.clone()
        after[:, t] = False
        expected = log_p(ROWS, after) - log_p(ROWS, later)
        torch.testing.assert_close(nats[:, t], expected, rtol=1e-4, atol=1e-5)


def test_rows_may_have_holes_of_different_lengths():
    hole = torch.rand(ROWS.shape, generator=seeded(0)) < 0.5
    nats = gpt_twin.chain_rule(EXACT, ROWS, hole, gpt_twin.ORDERS["a random order"](*ROWS.shape), V)
    torch.testing.assert_close(nats.sum(1), -log_p(ROWS, hole), rtol=1e-4, atol=1e-5)
    mean, _ = gpt_twin.per_byte(nats, hole)
    some = hole.any(1)
    expected = -log_p(ROWS, hole)[some] / hole.sum(1)[some]
    assert mean == pytest.approx(expected.mean().item(), rel=1e-4)


def test_the_chain_rule_in_random_order_is_the_nelbo_on_average_for_a_wrong_model_too():
    wrong = Exact(correlated_joint(V, T, seed=5))
    wrong.probability = wrong.probability * (1 + torch.rand(wrong.probability.shape, generator=seeded(6)))
    rows = ROWS[7:8].expand(4000, T)
    everything = torch.ones_like(rows, dtype=torch.bool)
    nats = gpt_twin.chain_rule(wrong, rows, everything, torch.rand(rows.shape, generator=seeded(1)), V)
    mean, error = gpt_twin.per_byte(nats, everything)
    bound = diffusion.nelbo(wrong, rows, V, batch_size=4000)
    assert abs(mean - bound.nats) < 4 * math.hypot(error, bound.stderr)
    assert nats.sum(1).std() > 0.01  # its conditionals disagree: the order matters


def test_the_twin_pays_what_the_table_says_given_the_left():
    nats = gpt_twin.twin_nats(Causal(JOINT), ROWS, V)
    torch.testing.assert_close(nats.sum(1), -JOINT.flatten().log(), rtol=1e-4, atol=1e-5)


def test_infilling_an_exact_model_with_the_left_only_is_its_twin():
    rows = torch.multinomial(JOINT.flatten().float(), 400, replacement=True, generator=seeded(2))
    x_0, hole = ROWS[rows], gpt_twin.middle(ROWS[rows], 1)
    found = gpt_twin.infill(EXACT, Causal(JOINT), x_0, hole, V)
    both, left, twin = found.values()
    assert left["nats"] == pytest.approx(twin["nats"], rel=1e-4) and left["right"] == twin["right"]
    assert both["nats"] == pytest.approx((-log_p(x_0, hole)).mean().item(), rel=1e-4)
    assert both["bound"] == pytest.approx(both["nats"], rel=1e-4)  # one byte has one order
    guess = EXACT(x_0.masked_fill(hole, V))[:, T // 2].argmax(1)
    assert both["right"] == pytest.approx((guess == x_0[:, T // 2]).double().mean().item())
    assert both["right"] > left["right"]


def test_holes_are_where_they_should_be():
    text = "abcdefgh of the Union, a"
    x_0 = torch.tensor([list(text.encode()), list(b"x" * len(text))])
    assert gpt_twin.middle(x_0, 3).nonzero().tolist() == [[b, t] for b in (0, 1) for t in (12, 13, 14)]
    letters = {token for token in range(256) if chr(token).isascii() and chr(token).isalpha()}
    assert "".join(text[t] for t in gpt_twin.words(x_0, letters)[0].nonzero().flatten()) == "the"
    assert not gpt_twin.words(x_0, letters)[1].any()  # no whole word begins there


# --- Small corpora and broken training ------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in: tiny.toml, data/tiny, a checkpoint of each objective; train.py in this process."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(TINY)
    text = " ".join(f"{i} sheep jumped over the fence, then {i + 1}." for i in range(400))
    documents = [("train", [text]), ("train", [text[::-1]]), ("val", [text[:3000]]), ("val", ["End."])]
    write_dataset(iter(documents), "byte", tmp_path / "data/tiny", "made up")
    for name, causal in (("diffusion", False), ("autoregressive", True)):
        torch.manual_seed(0)
        model = Transformer(ModelConfig(257, 32, n_layer=1, n_head=1, n_embd=16, causal=causal))
        (tmp_path / name).mkdir()
        config = dataclasses.asdict(train.TrainConfig(objective=name, data_dir="data/tiny"))
        train.save(tmp_path / name / "model.pt", model.state_dict(), {
            "format": 1, "model": dataclasses.asdict(model.config), "config": config, "tokenizer": "byte",
            "step": 1, "evaluation": None})

    def in_process(command, **_):
        program, arguments = command[1], [str(word) for word in command[2:]]
        bug = train.corrupt
        if program == "-c":
            assert "train.corrupt = leak" in arguments.pop(0)
            bug = training_dynamics.leak
        with unittest.mock.patch("train.corrupt", bug):
            return unittest.mock.Mock(returncode=train.main(arguments))

    monkeypatch.setattr(lab.subprocess, "run", in_process)
    monkeypatch.setattr(train, "matmul_ceiling", lambda *_: 1e9)  # two seconds a run, for nothing here
    return tmp_path


def test_a_small_corpus_is_spread_over_the_training_text_and_keeps_the_validation_text(here):
    folder = lab.small_corpus("data/tiny", 3000, here / "small")
    small, val, all_val = TokenFile(folder, "train"), TokenFile(folder, "val"), TokenFile("data/tiny", "val")
    assert 2000 < small.num_tokens <= 3100
    assert np.array_equal(val.tokens, all_val.tokens)
    text = get_tokenizer("byte").decode(small.tokens.tolist())
    assert "sheep" in text and "peehs" in text  # of the beginning and of the end


def test_the_leak_shows_the_answers_and_nothing_else():
    x_0 = torch.randint(9, (6, 20), generator=seeded(0))
    sound, leaking = (corrupt(x_0, 9, seeded(1)) for corrupt in (diffusion.corrupt, training_dynamics.leak))
    assert torch.equal(leaking.inputs, x_0) and (sound.inputs == 9).any()
    for field in ("positions", "targets", "weights"):
        assert torch.equal(getattr(sound, field), getattr(leaking, field))


def test_the_height_of_a_curve_is_its_mean():
    assert training_dynamics.height([1, 4], [1.0, 4.0], 4) == pytest.approx(2.5)
    assert training_dynamics.height([1, 2, 4], [0.0, 1.0, 1.0], 4) == pytest.approx(0.75)


def test_the_three_weightings_have_one_mean_where_every_level_costs_the_same(here):
    def model(tokens, positions):  # 2 nats for any byte, whatever is hidden
        return torch.full((len(positions), 257), math.log((1 - math.exp(-2)) / 256)).scatter(
            1, answers(tokens)[positions][:, None], -2.0)

    clean = {}

    def answers(tokens):
        return clean["x_0"]

    file = TokenFile("data/tiny", "train")
    batch = file.batch
    file.batch = lambda *arguments: clean.setdefault("rows", batch(*arguments))
    clean["x_0"] = torch.from_numpy(file.batch(0, 0, 4, 32)).flatten()
    losses = training_dynamics.spikes(model, file, 300, 4, 32, 257)
    assert np.allclose(losses["token"], 2) and np.allclose(losses["1/m"], 2, atol=1e-5)
    assert np.allclose(losses["over all"], 2 * 33 / 64)
    error = np.std(losses["1/t"]) / 300**0.5
    assert error > 0.01 and abs(np.mean(losses["1/t"]) - 2) < 4 * error  # right on average, and noisy


def test_a_verdict_tells_a_curve_that_turned_from_one_that_has_not():
    def run(*validation):
        return {"validation": list(validation), "stderr": [0.1] * len(validation),
                "epochs": list(range(1, len(validation) + 1))}

    turned, fell, flat = (repetition.verdict(run(*nats)) for nats in ((3, 2, 2.5), (3, 2, 1), (3, 2, 2.05)))
    assert (turned["best"], turned["best_epoch"], turned["turned"]) == (2, 2, True)
    assert (fell["best_epoch"], fell["turned"], flat["turned"]) == (3, False, False)


# --- From end to end ------------------------------------------------------------------------------


def last_line(capsys):
    out = capsys.readouterr().out.splitlines()
    assert out[-2].startswith("Answer: ")
    return json.loads(out[-1])


def test_gpt_twin_from_end_to_end(here, capsys):
    arguments = ["--checkpoint", "diffusion", "--twin", "autoregressive", "--data-dir", "data/tiny",
                 "--rows", "8", "--chain-rows", "2", "--hole-rows", "4", "--steps", "2", "4"]
    assert gpt_twin.main(arguments) == 0
    figures = last_line(capsys)
    assert set(figures["holes"]) == {"4 bytes", "8 bytes", "a word"}  # 16 do not fit half of 32
    for row in figures["prices"].values():  # untrained networks: all bytes nearly alike
        assert row["nats"] == pytest.approx(math.log(257), abs=0.2)
    assert (here / "out/experiments/gpt_twin.png").stat().st_size > 1000
    assert gpt_twin.main([*arguments[:3], "diffusion", *arguments[4:]]) == 2  # no twin of itself
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "experiments.gpt_twin: diffusion is no twin of diffusion: its objective is diffusion"


def test_a_missing_twin_is_trained_first(here, monkeypatch):
    asked = []
    monkeypatch.setattr(lab.subprocess, "run", lambda command, **_: asked.append(command) or
                        unittest.mock.Mock(returncode=3))
    with pytest.raises(SystemExit) as ending:
        gpt_twin.main(["--checkpoint", "diffusion"])
    assert ending.value.code == 3 and "autoregressive" in asked[0]
    assert str(asked[0][asked[0].index("--out-dir") + 1]) == "out/quickstart-ar"


def test_another_twin_that_is_missing_is_a_mistake(here, capsys):
    assert gpt_twin.main(["--checkpoint", "diffusion", "--twin", "out/othre"]) == 2
    assert "out/othre/model.pt does not exist" in capsys.readouterr().err


def test_repetition_from_end_to_end(here, capsys):
    arguments = ["--data-dir", "data/tiny", "--tokens", "512", "--steps", "20", "--config", "tiny.toml"]
    assert repetition.main(arguments) == 0
    figures = last_line(capsys)
    tokens = TokenFile("out/experiments/repetition-data", "train").num_tokens
    for run in figures["runs"].values():
        assert run["epochs"] == pytest.approx([step * 4 * 32 / tokens for step in range(1, 21)])
        assert run["validation"][-1] < run["validation"][0] < 5.7
    assert (here / "out/experiments/repetition.png").stat().st_size > 1000
    assert repetition.main(arguments) == 0  # the runs are found again
    assert last_line(capsys) == figures


def test_training_dynamics_from_end_to_end(here, capsys):
    arguments = ["--checkpoint", "diffusion", "--data-dir", "data/tiny", "--config", "tiny.toml",
                 "--steps", "20", "--rows", "12", "--starved-tokens", "64", "--batches", "3"]
    assert training_dynamics.main(arguments) == 0
    figures = last_line(capsys)
    table = figures["table"]
    expected, measured = table["ln V: an untrained network"]
    assert expected == pytest.approx(math.log(257)) and measured == pytest.approx(expected, abs=0.1)
    expected, measured = table["factor 2: over all tokens / over hidden ones"]
    assert measured == pytest.approx(expected, abs=1e-6) and expected == pytest.approx(33 / 64)
    assert list(figures["runs"]) == ["good", "too hot", "starved", "leak"]
    assert figures["runs"]["leak"]["steps"][-1] == 10 and "1.0" in figures["levels"]
    assert (here / "out/experiments/training_dynamics.png").stat().st_size > 1000


@pytest.mark.parametrize("script, flag", [(gpt_twin, "--chain-rows"), (repetition, "--steps"),
                                          (training_dynamics, "--batches")])
def test_a_count_that_makes_no_sense_gets_one_line(script, flag, capsys):
    with pytest.raises(SystemExit) as ending:
        script.main([flag, "0"])
    assert ending.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


# --- What training teaches ------------------------------------------------------------------------


@pytest.mark.slow
def test_the_twin_is_ahead_on_the_left_and_diffusion_uses_the_right(tmp_path):
    # The source is a Markov chain over eight letters, so that every price has a least possible value: its
    # entropy, and of a hole of L letters between i and j: log P^(L+1)[i, j] - the sum of log P on the way.
    P = (1.5 * torch.randn(8, 8, generator=seeded(1), dtype=torch.float64)).softmax(1)
    cdf, text, state = P.cumsum(1).numpy(), "", 0
    for u in np.random.default_rng(0).random(120_000):
        state = min(7, int(np.searchsorted(cdf[state], u)))
        text += "abcdefgh"[state]
    documents = [("train", [text[:100_000]]), ("val", [text[100_000:]])]
    write_dataset(iter(documents), "byte", tmp_path / "data", "a Markov chain")
    networks = {}
    for objective in ("diffusion", "autoregressive"):
        flags = (f"--data-dir {tmp_path}/data --out-dir {tmp_path}/{objective} --objective {objective} "
                 "--n-layer 2 --n-head 2 --n-embd 64 --context-length 64 --batch-size 16 --steps 400 "
                 "--eval-interval 400 --compile false --precision float32")
        assert train.main(flags.split()) == 0
        networks[objective], info = load_checkpoint(tmp_path / objective)
        networks[objective, "figures"] = info["evaluation"]
    stationary = torch.linalg.matrix_power(P, 1000)[0]
    entropy = (stationary[:, None] * torch.special.entr(P)).sum().item()
    bound, exact = networks["diffusion", "figures"], networks["autoregressive", "figures"]
    assert entropy - 3 * exact["stderr"] < exact["nats"] < bound["nats"]  # at equal steps the twin is ahead

    x_0 = torch.from_numpy(TokenFile(tmp_path / "data", "val").spread(256, 64))
    hole = gpt_twin.middle(x_0, 4)
    pair = networks["diffusion"], networks["autoregressive"]
    both, left, twin = gpt_twin.infill(*pair, x_0, hole, 257).values()
    assert twin["nats"] < left["nats"]  # from the left only, too
    assert both["nats"] < left["nats"] - 3 * left["stderr"] and both["right"] > left["right"]
    assert both["nats"] < twin["nats"] - 3 * twin["stderr"]  # what the right side tells outweighs that
    path = x_0[:, 31:37] - 97  # the hole with a letter on either side
    ends = torch.linalg.matrix_power(P, 5)[path[:, 0], path[:, -1]]
    best = (ends.log() - P[path[:, :-1], path[:, 1:]].log().sum(1)).mean().item() / 4
    assert best - 0.02 < both["nats"] < best + 0.2
