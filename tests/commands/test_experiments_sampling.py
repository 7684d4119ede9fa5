"""The experiments about hiding and writing: they count exactly, steer exactly, run to their end."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from oracles import (
    EXACT,
    JOINT,
    ROWS,
    Exact,
    Fixed,
    T,
    V,
    chi_square_p,
    fits,
    masked,
    seeded,
)

from diffusion import Curve
from experiments import (
    denoising,
    guidance,
    masking,
    sampling,
    structured,
)
from experiments.lab import judge
from experiments.lab.runs import rows_of
from prepare_data import get_tokenizer, write_dataset
from sample import exact_nll, generate

BYTES = get_tokenizer("byte")
MASK = 257
N = 64  # tokens of a text: the context of the networks

# --- Hiding ---------------------------------------------------------------------------------------


def masks_of(x_0: torch.Tensor, spelled: list[str]) -> dict[str, torch.Tensor]:
    """In a text in which token 0 is the rarest."""
    scores = masking.scores(x_0, spelled, 5 + torch.arange(len(spelled)))
    return {name: masking.hide_half(score) for name, score in scores.items()}


def test_every_mask_hides_exactly_half_of_each_row():
    x_0 = torch.randint(9, (6, 32), generator=seeded(0))
    masks = masks_of(x_0, [" a"] * 9)
    assert all((mask.sum(1) == 16).all() for mask in masks.values())
    assert masks["the first half"][:, :16].all() and masks["the second half"][:, 16:].all()
    assert masks["every second"][:, 1::2].all()
    rare, common = masks["rare tokens"], masks["common tokens"]
    assert x_0[rare].double().mean() < 3 < 5 < x_0[common].double().mean()
    spans = masks["spans of 8"].view(6, 4, 8).sum(2)
    assert ((spans == 0) | (spans == 8)).all()


def test_words_are_hidden_whole():
    spelled = ["in", " con", "stit", "ution", " we", " trust", "ed", " it"]
    words = [[0], [1, 2, 3], [4], [5, 6], [7]]
    for mask in masks_of(torch.arange(8).expand(20, -1), spelled)["whole words"]:
        assert sum(mask[word].unique().numel() > 1 for word in words) <= 1  # where the half ends


def test_the_price_of_a_mask_is_that_of_writing_what_it_hides():
    x_0 = EXACT.sample(50)
    mask = torch.tensor([[False, True, True, False]]).expand(50, -1)
    model = Exact(JOINT)
    model.config = SimpleNamespace(mask_id=V)
    one_by_one = masking.price(model, x_0, mask, calls=2)
    for text, nats in zip(x_0, one_by_one, strict=True):
        a, b, c, d = text.tolist()
        p = EXACT.marginal[a, b, c, d] / EXACT.marginal[a, V, V, d]
        assert nats == pytest.approx(-p.log().item() / 2, abs=1e-5)


def test_masking_shows_what_is_hidden_as_blocks(finish):
    lines, result = finish(masking, "--checkpoint run --rows 4 --width 64")
    views = [line for line in lines if masking.HIDDEN in line]
    assert [view.count(masking.HIDDEN) for view in views] == [N * level // 10
                                                              for level in range(1, 11)]
    assert len(result["masks"]) == 8
    random, every_second = result["masks"][:2]
    assert random["more"] == 0
    assert every_second["more"] == pytest.approx(every_second["in_16_calls"]
                                                 - random["in_16_calls"])


# --- Writing and judging --------------------------------------------------------------------------


@pytest.fixture
def twins(workplace) -> judge.Twins:
    return judge.load_twins("run", "twin", "data/sotu")


@pytest.mark.parametrize("p, calls", [(0.99, 1), (0.2, 3.5)])
def test_a_confident_model_needs_one_call_and_another_as_many_as_tokens(twins, p, calls):
    x_0 = torch.tensor([[7, 7, 7, 7], [8, 8, 7, 7]])
    x = torch.tensor([[MASK] * 4, [8] + [MASK] * 3])  # 4 and 3 tokens to restore
    logits = torch.full((4, MASK), math.log((1 - p) / 256))
    logits[:, 7] = math.log(p)  # which is wrong once
    rows = sampling.adaptive(twins._replace(model=Fixed(logits)), x_0, x)
    numbers = [(row["calls"], row["right"], row["more"]) for row in rows]
    assert numbers == [(calls, (1 + 2 / 3) / 2, 0)] * 2 * len(sampling.THRESHOLDS)


def test_the_price_of_a_text_is_exact_and_that_of_random_order_the_mean_over_orders(
        twins, monkeypatch):
    curve = Curve(4, [1, 4], [1.0, 4.0], [0.0, 0.0])
    monkeypatch.setattr(sampling, "measure_curve", lambda *_: curve)
    texts = rows_of("data/sotu", 8, twins.N)
    found = sampling.price(twins, texts, {
        "spread": dict(order="spread", steps=5, schedule="cosine", top_k=3, temperature=0.3),
        "more": dict(order="spread", steps=1, schedule="linear"),
        "random": dict(order="random", steps=2, schedule=[4, 1, 0])})
    exact = [exact_nll(twins.model, texts[::2], MASK, steps=steps, schedule=schedule).nats
             for steps, schedule in ((5, "cosine"), (1, "linear"))]
    assert found["spread"]["price"] == pytest.approx(exact[0], rel=0.01)  # in bfloat16
    assert found["more"]["more"] == pytest.approx(exact[1] - exact[0], rel=0.05)
    assert found["random"] == {"price": pytest.approx((3 * 4 + 1 * 1) / 4), "more": 0, "+-": None}


def priced(result):
    rows = result["rows"][1:]
    firsts = [row for row in rows if row["sampler"] in ("spread, 256", "random, 256",
                                                        "spread linear", "random linear")]
    return {row["more"] for row in firsts} == {0} and all(row["price"] > 0 for row in rows)


def as_many_calls(result):
    calls = [row["calls"] for row in result["rows"] if row["calls"]]
    return calls[1::2] == [max(1, round(n)) for n in calls[::2]]


@pytest.mark.parametrize("question, check", [
    ("temperature", lambda result: result["rows"][1]["entropy"] < result["rows"][-1]["entropy"]),
    ("methods", lambda result: result["rows"][1]["error"] == 0),  # the same text again and again
    ("orders", lambda result: result["rows"][-1]["calls"] == N),
    ("remasking", lambda result: max(row["calls"] or 0 for row in result["rows"]) == N),
    ("steps", priced),
    ("schedules", priced),
    ("adaptive", as_many_calls),
    ("frontier", lambda result: result["rows"][-1]["judge"] < result["rows"][1]["judge"]),
])
def test_a_question_about_sampling_is_a_table(question, check, finish):
    lines, result = finish(sampling, f"{question} --checkpoint run --judge twin --num-samples 3")
    assert check(result)
    for row in result["rows"]:
        assert any(line.startswith(row["sampler"]) for line in lines)


# --- Guidance -------------------------------------------------------------------------------------


def test_an_exact_classifier_turns_the_joint_into_the_conditional():
    # Class: the first and the last token are equal. Its probability given what is visible, from
    # the table.
    equal = (EXACT.texts[:, 0] == EXACT.texts[:, -1]).view(JOINT.shape)
    both = Exact(JOINT * equal)

    def score(tokens):
        index = tuple(tokens.T)
        return (both.marginal[index] / EXACT.marginal[index]).log()

    adjust = guidance.classifier_guidance(score, strength=1.0, candidates=V)
    x = generate(EXACT, masked(ROWS, T, V), V, seeded(1), order="random", adjust=adjust)
    assert fits(x, JOINT * equal)


def test_guidance_tries_only_the_likeliest_candidates():
    model = Fixed(torch.tensor([0.1, 0.4, 0.2, 0.3]).log())
    adjust = guidance.classifier_guidance(lambda tokens: (tokens == 0).float().sum(1) * 100,
                                          candidates=2)
    x = generate(model, masked(2000, 1, 4), 4, seeded(0), adjust=adjust)
    assert fits(x, torch.tensor([0, 0.4, 0, 0.3]))


@pytest.mark.parametrize("strength", [0.0, 1.0, 2.0])
def test_classifier_free_guidance_raises_what_the_prefix_makes_likelier(strength):
    x = masked(ROWS, T, V)
    x[:, :2] = torch.tensor([2, 0])
    adjust = guidance.classifier_free_guidance(EXACT, x != V, V, strength)
    written = generate(EXACT, x, V, seeded(0), steps=1, adjust=adjust)
    with_prefix = JOINT[2, 0].sum(1) / JOINT[2, 0].sum()  # of the third token
    expected = with_prefix ** (1 + strength) / JOINT.sum((0, 1, 3)) ** strength
    assert chi_square_p(torch.bincount(written[:, 2], minlength=V), expected) > 1e-3


def test_a_bag_of_words_holds_the_log_ratios_of_its_tokens():
    bag = guidance.bag_of_words(torch.tensor([0, 0, 0, 1]), torch.tensor([1, 1]), mask_id=3)
    # One more of each: 4, 2, 1 of 7 against 1, 3, 1 of 5.
    ratios = [math.log(1 / 5 * 7 / 4), math.log(3 / 5 * 7 / 2), math.log(1 / 5 * 7 / 1)]
    torch.testing.assert_close(bag, torch.tensor([*ratios, 0]))  # what is hidden says nothing


def test_guidance_steers_both_ways(finish):
    old = ("train", ["of olden times we spoke thus " * 20])
    modern = ("train", ["tonight my americans " * 20])
    val = ("val", ["tonight we spoke of olden times my americans " * 10])
    write_dataset(iter([old] * 6 + [modern] * 6 + [val]), "byte", Path("ages"), "test")
    _, result = finish(guidance, "--checkpoint run --judge twin --data-dir ages --num-samples 4 "
                       "--prefix ton")
    old, modern, _, towards_modern, towards_old, *_ = (row["modern"] for row in result["rows"])
    assert (old, modern) == (0, 1)
    assert towards_modern > towards_old


# --- Structure ------------------------------------------------------------------------------------

TEMPLATE = "On [word:May|July|September] [digits:2],[MASK:5] [word:no|a house]!"
PATTERN = rb"On (May|July|September) \d\d,.{5} (no|a house)!"


@pytest.mark.parametrize("order, steps", [("random", 1), ("random", 5), ("confidence", 2),
                                          ("left_to_right", 40), ("ancestral", 5)])
def test_the_result_always_satisfies_the_template(order, steps):
    parts = structured.parse(TEMPLATE, BYTES, MASK)
    logits = torch.randn(MASK, generator=seeded(0)).expand(99, -1) * 3
    logits = logits.index_fill(1, torch.tensor([BYTES.eot_token]), -torch.inf)
    model = lambda tokens, positions: logits[positions % tokens.size(1)]  # noqa: E731
    digits = torch.tensor(list(b"0123456789"))
    texts = []
    for word in parts[1]:  # alternatives of every length
        x = structured.choose_words(model, [parts[0], [word], *parts[2:]], MASK, seeded(1))
        adjust = structured.keep_digits(x == structured.DIGIT, digits)
        rows = generate(model, x.where(x != structured.DIGIT, MASK).expand(5, -1), MASK, seeded(2),
                        steps=steps, order=order, remask="renoise", adjust=adjust)
        texts += [BYTES.decode_bytes(row.tolist()) for row in rows]
    assert all(re.fullmatch(PATTERN, text, re.S) for text in texts), texts
    assert len(set(texts)) > 5


def test_words_are_drawn_with_the_probability_of_their_tokens():
    # The first is 1, or 2 and then 0; the second, whose network sees which it was, 0 or 1.
    p = torch.tensor([0.2, 0.5, 0.3])

    def model(tokens, positions):
        assert (tokens.flatten()[positions] == 3).all() and not (tokens == structured.DIGIT).any()
        seen = p.flip(0) if tokens[0, 0] == 2 else p
        return seen.log().expand(len(positions), -1)

    parts = [[[1], [2, 0]], [[structured.DIGIT]], [[0], [1]], [[3, 3]]]
    texts = [structured.choose_words(model, parts, 3, seeded(seed)).tolist()
             for seed in range(2000)]
    two = 0.3 * 0.2 / (0.3 * 0.2 + 0.5)
    expected = {(1, -1, 0, 3, 3): (1 - two) * 2 / 7, (1, -1, 1, 3, 3): (1 - two) * 5 / 7,
                (2, 0, -1, 0, 3, 3): two * 3 / 8, (2, 0, -1, 1, 3, 3): two * 5 / 8}
    assert {*map(tuple, texts)} == {*expected}
    for text, probability in expected.items():
        assert texts.count([*text]) / 2000 == pytest.approx(probability, abs=0.04)


def test_a_space_before_a_word_belongs_to_it():
    [given], words, [behind] = structured.parse("In [word:May|June]!", BYTES, MASK)
    assert BYTES.decode(given) == "In" and BYTES.decode(behind) == "!"
    assert [BYTES.decode(word) for word in words] == [" May", " June"]


def test_structured_writes_what_satisfies_the_template(workplace, capsys):
    flags = ["--checkpoint", "run", "--steps", "1", "--num-samples", "2", "--template"]
    assert structured.main([*flags, "[digits:2]"]) == 0
    *texts, verdict, _, numbers = capsys.readouterr().out.splitlines()
    assert all(re.fullmatch(r"\d\d", text) for text in texts)
    assert verdict == "2 of 2 satisfy the template" and json.loads(numbers)["satisfied"] == 2


# --- The moving picture ---------------------------------------------------------------------------


def test_the_picture_shows_each_token_from_its_last_step_on(tmp_path):
    texts = [["Hi", None, None, None], ["Hi", "</text><b id='evil'>&", None, None],
             ["Hi", None, "\n x", "y"], ["Hi", "<z>\0 &", "\n x", "y"]]  # the evil one was remasked
    steps = tmp_path / "steps.jsonl"
    with open(steps, "w") as file:
        for step, text in enumerate(texts):
            line = {"step": step, "texts": [text], "probability": [[1, 0.5, 0.25, 0.125]]}
            print(json.dumps(line), file=file)
    assert denoising.main([str(steps), str(tmp_path / "picture.svg")]) == 0
    svg = ElementTree.parse(tmp_path / "picture.svg").getroot()
    given, *groups = svg.findall("{*}g")
    assert not given.findall("{*}animate")  # nothing is ever hidden there
    assert ["".join(text.itertext()) for text in given] == ["givenHi"]
    found = []
    for boxes, words in zip(groups[::2], groups[1::2], strict=True):
        times = [[float(time) for time in moved.get("keyTimes").split(";")]
                 for moved in (*boxes.findall("{*}animate"), *words.findall("{*}animate"))]
        shown = ["".join(text.itertext()) for text in words.findall("{*}text")]
        assert len(boxes.findall("{*}rect")) == len(shown)
        found.append((times, shown))
    end = 3 * denoising.SECONDS_PER_STEP + denoising.SECONDS_OF_REST
    moments = [round(n * denoising.SECONDS_PER_STEP / end, 4) for n in range(5)]
    # A box goes when its word comes, and the word is red until the next one comes.
    assert [times for times, _ in found] == [[[0, moments[n]], [0, moments[n]], [0, moments[n + 1]]]
                                             for n in (1, 2, 3)]
    assert [shown for _, shown in found] == [
        [], ["step 2, probability 0.250x", "step 2, probability 0.125y"],
        ["step 3, probability 0.500<z>\N{MIDDLE DOT} &"]]
    lines = {text[0].tail: text.get("y") for text in svg.findall(".//{*}text")}
    assert lines["Hi"] == lines["<z>\N{MIDDLE DOT} &"] < lines["x"] == lines["y"]


def test_a_line_of_the_picture_is_not_overfull():
    places = denoising.lay_out([" word"] * 100 + ["\n\n\nend"])
    assert max(column + len(text) for column, _, text in places) <= denoising.COLUMNS
    assert places[0] == (0, 0, "word") and places[-1][0] == 0
    assert [line for _, line, _ in places] == sorted(line for _, line, _ in places)
