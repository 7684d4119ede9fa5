"""What the experiments share: numbers as computed by hand, bounds as known from a table."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import EXACT, JOINT, T, V, masked, seeded

from experiments import words
from experiments.lab import judge, runs
from experiments.lab.command import count, several
from prepare_data import TokenFile, get_tokenizer, write_dataset
from sample import generate


@pytest.fixture
def twins(workplace) -> judge.Twins:
    return judge.load_twins("run", "twin", "data/sotu-bytes")


def test_the_judge_says_what_is_computed_by_hand(twins):
    texts = ["the fox the fox ", "aaaaaaaaaaaaaaaa"]
    tokens = torch.tensor([list(text.encode()) for text in texts])
    found = judge.judge(twins, tokens)
    shifted = torch.cat([torch.full((2, 1), 257), tokens[:, :-1]], dim=1)
    log_p = twins.judge(shifted).log_softmax(-1).gather(2, tokens[..., None]).squeeze(2)
    assert found["judge"] == pytest.approx(-log_p.mean().item(), abs=1e-4)
    assert found["error"] == pytest.approx(log_p.mean(1).std().item() / 2**0.5, abs=1e-4)
    p = [n / 16 for n in (2, 2, 2, 4, 2, 2, 2)]  # t, h, e, space, f, o, x
    assert found["entropy"] == pytest.approx(-sum(p * math.log(p) for p in p) / 2, abs=1e-6)
    assert found["distinct"] == (8 + 1) / 28  # 8 runs of three of "the fox ", repeated, and aaa
    assert found["words"] == 4 / 5


def test_a_row_prints_text_numbers_and_gaps_under_their_names(capsys):
    row = {"sampler": "a", "calls": 1234, "tokens_per_second": None, "judge": 1.5}
    judge.print_row(row, heading=True)
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split() == ["sampler", "calls", "tokens/s", "judge"]
    assert row.split() == ["a", "1,234", "-", "1.500"]
    assert len(heading) == len(row) and heading.index("tokens/s") + 8 == row.index("-") + 1


@pytest.mark.parametrize("order, same", [("left_to_right", True), ("confidence", True),
                                         ("random", False)])
def test_greedy_is_the_same_for_every_seed_but_in_random_order(twins, order, same):
    one, two = (generate(twins.model, masked(3, 16, 257), 257, seeded(seed), steps=4,
                         temperature=0.0, order=order) for seed in (1, 2))
    assert torch.equal(one, two) == torch.equal(one, one[:1].expand(3, -1)) == same


@pytest.mark.parametrize("yes, n", [(0, 32), (32, 32), (8, 32)])
def test_a_fraction_is_never_known_exactly(yes, n):
    fraction, error = judge.fraction_and_error(torch.arange(n) < yes)
    assert fraction == yes / n and 1 / n / 2 < error <= 0.5 / n**0.5


def test_a_measured_curve_is_that_of_the_table():
    curve = runs.measure_curve(EXACT, EXACT.sample(4000), V, T, "a label")
    assert (curve.N, curve.counts) == (T, [1, 2, 3, 4])
    alone = [JOINT.sum([s for s in range(T) if s != t]) for t in range(T)]
    expected = torch.stack([torch.special.entr(p).sum() for p in alone]).mean()
    assert curve.nats[-1] == pytest.approx(expected.item(), abs=4 * curve.stderr[-1])
    assert sum(curve.nats) / T == pytest.approx(EXACT.entropy() / T, abs=0.03)


def test_a_small_corpus_is_spread_over_the_training_text_and_keeps_the_validation_text(tmp_path):
    text = " ".join(f"{i} sheep jumped over the fence, then {i + 1}." for i in range(400))
    documents = [("train", [text]), ("train", [text[::-1]]), ("val", [text[:3000]]),
                 ("val", ["End."])]
    write_dataset(iter(documents), "byte", tmp_path / "all", "made up")
    folder = runs.small_corpus(str(tmp_path / "all"), 3000, tmp_path / "small")
    small = TokenFile(folder, "train")
    assert 2000 < small.num_tokens <= 3100
    val, all_val = (TokenFile(path, "val").tokens for path in (folder, tmp_path / "all"))
    assert np.array_equal(val, all_val)
    text = get_tokenizer("byte").decode(small.tokens.tolist())
    assert "sheep" in text and "peehs" in text  # of the beginning and of the end


def test_counts_are_whole_and_positive():
    assert (count("3"), several("2")) == (3, 2)
    for kind, text in ((count, "3.5"), (count, "0"), (several, "1")):
        with pytest.raises(Exception, match="invalid literal|must be at least"):
            kind(text)


def test_a_run_is_its_log_with_the_last_evaluation_of_each_step(tmp_path):
    def measured(step, nats):
        return {"step": step, "nats": nats, "stderr": 0.1, "rows": 64, "bits_per_byte": nats / 2,
                "curve": None}

    log = [{"step": 1, "loss": 3.0}, measured(1, 5.0), {"step": 4, "loss": 2.0}, measured(4, 9.0),
           measured(4, 4.0), measured(5, 3.0)]
    config = {"batch_size": 2, "context_length": 5}  # 10 tokens a step
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    run = runs.read_run(tmp_path)
    assert [(line["step"], line["tokens"], line["nats"], line["bits_per_byte"])
            for line in run.evaluations] == [
        (1, 10, 5.0, 2.5), (4, 40, 4.0, 2.0), (5, 50, 3.0, 1.5)]
    assert [line["loss"] for line in run.training] == [3, 2]


def test_words_are_known_from_the_training_text(workplace, capsys):
    Path("written.txt").write_text("The lazy dog qzx'd the FOX.")
    assert words.main(["data/sotu", "written.txt"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["written"] == {"share": 5 / 7, "words": 7}
    assert result["shuffled"]["share"] < 0.5 < 0.9 < result["validation"]["share"]
