"""The experiments about hiding and writing: they count exactly, steer exactly, run to their end."""

import itertools
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from oracles import (
    EXACT,
    JOINT,
    ROWS,
    Causal,
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
    denoise_page,
    guidance,
    masking_viz,
    prices,
    sampling,
    structured,
)
from experiments.lab import judge
from prepare_data import get_tokenizer, write_dataset
from sample import State, exact_nll, generate

BYTES = get_tokenizer("byte")
MASK = 257
N = 64  # tokens of a text: the context of the networks

# --- Hiding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("T, prefix_length", [(256, 0), (256, 16), (37, 0), (37, 20), (10, 0)])
def test_each_level_hides_exactly_its_part_and_never_the_prefix(T, prefix_length):
    m, mask = masking_viz.mask_levels(T, prefix_length)
    assert m.tolist() == [round(k * (T - prefix_length) / 10) for k in range(1, 11)]
    assert mask.sum(1).tolist() == m.tolist()
    assert not mask[:, :prefix_length].any() and mask[-1, prefix_length:].all()


def test_the_calls_of_a_sampler_are_counted_by_level():
    # Ten linear steps of 100 tokens are called at 100, 90 .. 10 hidden: each level once.
    assert masking_viz.calls_by_level("linear", 100, 10) == [1] * 10
    assert masking_viz.calls_by_level("cosine", 100, 1) == [0] * 9 + [1]
    assert masking_viz.calls_by_level("linear", 10, 256) == [1] * 10
    assert sum(masking_viz.calls_by_level("exponential", 256, 20)) == 20


def test_belief_is_the_probability_of_the_true_token_where_hidden():
    mask = torch.zeros(10, 2, dtype=torch.bool)
    mask[0, 1] = True
    mask[9] = True
    model = Fixed(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).log())
    model.config = SimpleNamespace(mask_id=3)
    shown = masking_viz.belief(model, torch.tensor([1, 2]), mask)
    expected = torch.tensor([[math.nan, 0.8], [0.3, 0.8]])
    torch.testing.assert_close(shown[[0, 9]], expected, equal_nan=True)
    assert shown[1:9].isnan().all()


def test_masking_viz_shows_what_is_hidden_as_blocks(finish):
    lines, result = finish(masking_viz, "--checkpoint run --rows 4 --prefix-length 6 --width 64")
    hidden = [row["hidden"] for row in result["levels"]]
    assert hidden == [round(k * N / 10) for k in range(1, 11)]
    assert sum(row["linear"] for row in result["levels"]) == 20
    views = [line for line in lines if masking_viz.HIDDEN in line]
    behind = [round(k * (N - 6) / 10) for k in range(1, 11)]  # the prefix
    assert [view.count(masking_viz.HIDDEN) for view in views] == hidden + behind
    assert all("  the qu" in view for view in views[10:])
    assert not any("\033" in line for line in lines)  # a pipe gets no colours


# --- Writing and judging --------------------------------------------------------------------------


@pytest.fixture
def twins(workplace) -> judge.Twins:
    return judge.load_twins("run", "twin", "data/sotu")


def test_numbers_that_one_can_count():
    rows = [[[9, 9, 9], [9, 1, 1]], [[9, 9, 1], [1, 1, 1]], [[9, 1, 1], [1, 1, 1]],
            [[1, 1, 1], [1, 1, 1]]]  # finished after three calls and after one
    states = [State(torch.tensor(tokens), torch.zeros(2, 3), i) for i, tokens in enumerate(rows)]
    assert sampling.calls_of_texts(states, 9) == (3 + 1) / 2
    x_0 = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    x = torch.tensor([[9, 2, 9, 4], [9, 9, 7, 8]])
    written = torch.tensor([[1, 2, 0, 4], [5, 6, 7, 8]])
    assert sampling.restored(written, x, x_0, 9).tolist() == [0.5, 1]


@pytest.mark.parametrize("p, calls", [(0.99, 1), (0.2, 4)])
def test_a_confident_model_needs_one_call_and_another_as_many_as_tokens(twins, p, calls):
    x = masked(2, 4, MASK)
    logits = torch.full((4, MASK), math.log((1 - p) / 256))
    logits[:, 7] = math.log(p)
    rows = sampling.compare(twins._replace(model=Fixed(logits)), "fill", torch.full_like(x, 7), x,
                            0.0)
    numbers = [(row["calls"], row["right"], row["more"]) for row in rows[1:]]
    assert numbers == [(calls, 1, 0)] * 2 * len(sampling.THRESHOLDS)


def test_the_price_of_a_text_is_exact_and_that_of_random_order_the_mean_over_orders(twins):
    x_0 = judge.real_text(twins, 4)
    options = dict(order="spread", steps=5, schedule="cosine", temperature=0.3)
    found = sampling.prices(twins, x_0, None, options)
    exact = exact_nll(twins.model, x_0, MASK, order="spread", steps=5, schedule="cosine")
    assert found.mean().item() == pytest.approx(exact.nats, rel=0.01)  # in bfloat16
    curve = Curve(4, [1, 4], [1.0, 4.0], [0.0, 0.0])
    nats = sampling.prices(twins, x_0, curve, options | dict(order="random", schedule=[4, 1, 0]))
    assert nats.item() == pytest.approx((3 * 4 + 1 * 1) / 4)


def priced(result):
    rows = result["rows"][1:]
    firsts = [row for row in rows if row["sampler"] in ("spread, 256", "random, 256",
                                                        "spread, linear", "random, linear")]
    return {row["more"] for row in firsts} == {0} and all(row["price"] > 0 for row in rows)


def as_many_calls(result):
    calls = [row["calls"] for row in result["rows"] if row["calls"]]
    rights = [row["right"] for row in result["rows"] if row["right"] is not None]
    return calls[1::2] == [max(1, round(n)) for n in calls[::2]] and len(rights) == 6


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
    lines, result = finish(sampling, f"{question} --checkpoint run --judge twin --num-samples 3 "
                                     "--rows 4")
    assert check(result)
    for row in result["rows"]:
        assert any(line.startswith(row["sampler"]) for line in lines)


# --- Prices ---------------------------------------------------------------------------------------


def test_the_price_of_a_schedule_is_the_sum_of_the_costs_of_its_steps():
    generator = seeded(0)
    tables = [torch.randn(17, 16, 5, generator=generator).log_softmax(-1) for _ in range(3)]

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


def test_prices_tell_orders_apart_and_schedules_are_found(finish):
    _, result = finish(prices, "--checkpoint run --judge twin --data-dir data/sotu-bytes --texts 4 "
                               "--calls 8 64 --orders spread random entropy --schedules 2 4 "
                               "--holes 3 20")
    assert list(result["prices"]) == [f"{order}, {calls}" for order in ("spread", "random",
                                      "entropy") for calls in (8, 64)]
    assert result["prices"]["spread, 64"][1:] == [0, 0]  # compared with itself
    for calls in ("2", "4"):
        committed = result["schedules"][calls][-1]
        assert len(committed) == int(calls) and sum(committed) == N
    assert list(result["holes"]) == ["3", "20"]


def test_a_hole_costs_what_the_conditionals_say():
    x_0 = EXACT.sample(40)
    ours, from_the_left = prices.prices_of_holes(EXACT, Causal(JOINT), x_0, V, 2)
    for text, one, other in zip(x_0, ours, from_the_left, strict=True):
        a, b, c, d = text.tolist()
        both = EXACT.marginal[a, b, c, d] / EXACT.marginal[a, V, V, d]
        left = EXACT.marginal[a, b, c, V] / EXACT.marginal[a, V, V, V]
        assert one == pytest.approx(-both.log().item() / 2, abs=1e-5)
        assert other == pytest.approx(-left.log().item() / 2, abs=1e-5)


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


def test_a_bag_of_tokens_is_the_sum_of_the_weights_of_its_visible_runs():
    bag = guidance.BagOfTokens(mask_id=9, longest=2).requires_grad_(False)
    torch.nn.init.normal_(bag.weight.weight, generator=seeded(0))

    def weigh(*row):
        return bag(torch.tensor([row])).item()

    ones = [weigh(token) for token in range(3)]
    pairs = {(a, b): weigh(a, b) - ones[a] - ones[b] for a in range(3) for b in range(3)}
    assert len({round(pair, 6) for pair in pairs.values()}) == 9  # order matters
    expected = ones[0] + ones[1] + ones[1] + ones[2] + pairs[0, 1] + pairs[1, 2]
    assert weigh(0, 1, 9, 1, 2) == pytest.approx(expected, abs=1e-5)
    assert weigh(9, 9) == 0


def test_a_bag_of_tokens_learns_to_tell_two_languages_apart():
    def language(shift):  # the same letters, upwards or downwards
        moves = torch.randint(0, 2, (5000,), generator=seeded(shift + 1)) * shift
        return moves.cumsum(0) % 7

    bag = guidance.BagOfTokens(mask_id=7, longest=2)
    languages = language(1), language(-1)
    assert bag.accuracy(languages, T=32) == pytest.approx(0.5)  # all weights 0: one answer
    bag.fit(languages, steps=60, T=32)
    assert bag.accuracy(languages, T=32) > 0.85
    down_and_up = torch.tensor([[0, 6, 5, 5, 4, 3], [0, 1, 2, 2, 3, 4]])
    assert (bag(down_and_up) > 0).tolist() == [True, False]


def test_guidance_steers_both_ways(finish):
    old = ("train", ["of olden times we spoke thus " * 20])
    modern = ("train", ["tonight my americans " * 20])
    write_dataset(iter([old] * 6 + [modern] * 6 + [("val", ["x"])]), "byte", Path("ages"), "test")
    _, result = finish(guidance, "--checkpoint run --data-dir ages --num-samples 4 --length 24 "
                       "--prefix ton --strengths 1 500 --fit-steps 40")
    assert result["real"] == {"old": 0, "modern": 1}
    found = {(run["guidance"], run["strength"]): run["judged_modern"] for run in result["runs"]}
    assert found["towards modern", 500] > found["towards old", 500]
    assert ("classifier-free", 1) in found and ("classifier-free", 500) not in found


# --- Structure ------------------------------------------------------------------------------------

TEMPLATE = "On [word:May|July|September] [digits:2], [MASK:5] [letters:3]!"
PATTERN = rb"On (May      |July     |September) \d\d, .{5} [a-zA-Z]{3}!"


@pytest.mark.parametrize("order, steps", [("random", 1), ("random", 5), ("confidence", 2),
                                          ("left_to_right", 40), ("ancestral", 5)])
def test_the_result_always_satisfies_the_template(order, steps):
    x, form = structured.parse(TEMPLATE, BYTES, MASK)
    logits = torch.randn(len(x), MASK, generator=seeded(0)) * 3
    logits[:, BYTES.eot_token] = -torch.inf
    rows = generate(Fixed(logits), x.expand(20, -1), MASK, seeded(2), steps=steps, order=order,
                    remask="renoise", adjust=structured.keep_form(form, MASK, seeded(1)))
    texts = [BYTES.decode_bytes(row.tolist()) for row in rows]
    assert all(re.fullmatch(PATTERN, text, re.S) for text in texts), texts
    assert all(structured.satisfies(row, x, form, MASK) for row in rows)
    assert len(set(texts)) == 20


def test_an_unsatisfied_row_is_recognised():
    x, form = structured.parse("a[digits:1][word:no|on]", BYTES, MASK)
    for text, verdict in (("a1no", True), ("a9on", True), ("b1no", False), ("axno", False),
                          ("a1nn", False)):
        assert structured.satisfies(torch.tensor(list(text.encode())), x, form, MASK) == verdict


@pytest.mark.parametrize("steps", [1, 2])
def test_words_are_chosen_as_the_network_would(steps):
    # Independent positions: each word in proportion to the product of its letters, drawn in one
    # step; in two, the first letter among those that begin a word, then the second among those
    # that end it.
    p = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]])
    allowed = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 1]])
    expected = p[0, :, None] * p[1] * allowed
    if steps == 2:
        first = torch.tensor([0.5, 0, 0.3])
        expected = first[:, None] * expected / expected.sum(1, keepdim=True).clamp(min=1e-9)
    adjust = structured.keep_form([(0, allowed.nonzero())], 3, seeded(1))
    x = generate(Fixed(p.log()), masked(3000, 2, 3), 3, seeded(0), steps=steps, adjust=adjust,
                 order="left_to_right")
    assert fits(x, expected)


def test_structured_writes_what_satisfies_the_template(workplace, capsys):
    flags = ["--checkpoint", "run", "--steps", "1", "--num-samples", "2", "--template"]
    assert structured.main([*flags, "[digits:2]"]) == 0
    *texts, verdict = capsys.readouterr().out.splitlines()
    assert all(re.fullmatch(r"\d\d", text) for text in texts)
    assert verdict == "2 of 2 satisfy the template"


def test_a_hole_that_no_token_fits_is_refused():
    spaces_are_two = SimpleNamespace(encode_ordinary=lambda text: [
        token for c in text for token in ([1, 2] if c == " " else [ord(c)])])
    with pytest.raises(ValueError, match="2 tokens"):
        structured.parse("[word:a|abc]", spaces_are_two, MASK)


# --- The page -------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path) -> Path:
    """The page of four steps, in which a token holds evil markup."""
    texts = [["Hi", None, None, None], ["Hi", "</script><b id='evil'>&", None, None],
             ["Hi", None, "x", "y"], ["Hi", "z", "x", "y"]]
    tokens = [[5, 9, 9, 9], [5, 1, 9, 9], [5, 9, 2, 3], [5, 4, 2, 3]]
    with open(tmp_path / "steps.jsonl", "w") as file:
        for step, (text, row) in enumerate(zip(texts, tokens, strict=True)):
            line = {"step": step, "tokens": [row], "texts": [text], "probability": [[0.5] * 4]}
            print(json.dumps(line), file=file)
    assert denoise_page.main([str(tmp_path / "steps.jsonl"), str(tmp_path / "page.html")]) == 0
    return tmp_path / "page.html"


def test_the_picture_shows_each_token_from_its_last_step_on(page, tmp_path):
    steps = tmp_path / "steps.jsonl"
    lines = steps.read_text().replace('"z"', '"<z>\\u0000 &"').replace('"x"', '"\\n x"')
    steps.write_text(lines)
    assert denoise_page.main([str(steps), str(tmp_path / "picture.svg")]) == 0
    svg = ElementTree.parse(tmp_path / "picture.svg").getroot()
    tokens = svg.findall(".//{*}text")
    shown = [(token.get("class"), token.text or "") for token in tokens]
    assert shown == [("t0", "Hi"), ("t3", "<z>\N{MIDDLE DOT} &"), ("t2", "x"), ("t2", "y")]
    boxes = [box.get("class") for box in svg.findall(".//{*}g/{*}rect")]
    assert boxes == ["b3", "b2", "b2"]  # none where a token is given
    assert len({token.get("y") for token in tokens[:2]}) == 1 < len({t.get("y") for t in tokens})
    rules = svg.find("{*}style").text
    moments = [float(rules.split(f"@keyframes b{step} {{ ")[1].split("%")[0]) for step in (1, 2, 3)]
    assert 0 < moments[0] < moments[1] < moments[2] < 100


def test_a_line_of_the_picture_is_not_overfull():
    places = denoise_page.lay_out([" word"] * 100 + ["\n\n\nend"])
    assert max(column + len(text) for column, _, text in places) <= denoise_page.WIDTH
    assert places[0] == (0, 0, "word") and places[-1][0] == 0
    assert [line for _, line, _ in places] == sorted(line for _, line, _ in places)


def test_the_page_knows_when_each_position_became_what_it_is(page):
    text = page.read_text()
    frames = json.loads(text.split('id="frames">')[1].split("</script>")[0])
    since = [frame["since"] for frame in frames]
    assert since == [[[0, 0, 0, 0]], [[0, 1, 0, 0]], [[0, 2, 2, 2]], [[0, 3, 2, 2]]]
    assert text.count("</script>") == 2 and "http" not in text  # nothing escapes or is fetched


@pytest.mark.skipif(not (shutil.which("chromium") and shutil.which("chromedriver")),
                    reason="no chromium")
def test_the_slider_and_the_play_button_move_through_the_steps(page, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.support.wait import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
                 "--disable-background-networking", "--disable-component-update",
                 f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as browser:
        browser.get(page.as_uri())

        def state():
            label = browser.find_element("id", "label").text
            spans = browser.find_elements("css selector", "main p span")
            return label, [(span.text, span.get_attribute("class")) for span in spans]

        def slide_to(step):
            browser.execute_script("const s = document.getElementById('step');"
                                   "s.value = arguments[0]; s.dispatchEvent(new Event('input'))",
                                   step)

        given = ("Hi", "")
        hidden = (masking_viz.HIDDEN, "hidden")
        assert state() == ("step 0 of 3: 3 hidden", [given, hidden, hidden, hidden])
        slide_to(1)  # markup in a token is shown as text
        evil = ("</script><b id='evil'>&", "new")
        assert state() == ("step 1 of 3: 2 hidden", [given, evil, hidden, hidden])
        assert not browser.find_elements("id", "evil")
        slide_to(2)
        remasked = (masking_viz.HIDDEN, "again")
        assert state() == ("step 2 of 3: 1 hidden", [given, remasked, ("x", "new"), ("y", "new")])
        spans = browser.find_elements("css selector", "main p span")
        written = "probability 0.500, written in step 2"
        titles = [span.get_attribute("title") for span in spans]
        assert titles == ["given", "hidden", written, written]
        browser.find_element("id", "play").click()
        WebDriverWait(browser, 20).until(lambda _: state()[0] == "step 3 of 3: 0 hidden")
        assert [text for text, _ in state()[1]] == ["Hi", "z", "x", "y"]
        log = browser.get_log("browser")
        assert not [entry for entry in log if entry["level"] == "SEVERE"]
