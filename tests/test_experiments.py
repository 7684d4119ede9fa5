"""The ready uses of the `adjust` hook, and the page that shows a text being written."""

import dataclasses
import itertools
import json
import re
import shutil

import pytest
import torch

import diffusion
from experiments import denoise_page, guidance, structured
from model import ModelConfig, Transformer
from prepare_data import get_tokenizer
from tests.test_sampling import EXACT, JOINT, Exact, Fixed, chi_square_p, counts_of, masked, seeded
from train import save

T, V = EXACT.T, EXACT.V
ROWS = 20_000
BYTES = get_tokenizer("byte")
MASK = 257

# --- Guidance -------------------------------------------------------------------------------------


def test_an_exact_classifier_turns_the_joint_into_the_conditional():
    # Class: the first and the last token are equal. Its probability given what is visible, from the table.
    inside = torch.zeros_like(JOINT)
    for row in itertools.product(range(V), repeat=T):
        inside[row] = float(row[0] == row[-1])
    both, either = Exact(JOINT * inside), EXACT

    def log_p_class(tokens):
        return torch.stack([(both.probability[tuple(row)] / either.probability[tuple(row)]).log()
                            for row in tokens.tolist()])

    seen = {}  # few different rows are ever asked about

    def score(tokens):
        keys = [tuple(row) for row in tokens.tolist()]
        for key in set(keys) - set(seen):
            seen[key] = log_p_class(torch.tensor([key]))[0].item()
        return torch.tensor([seen[key] for key in keys])

    adjust = guidance.classifier_guidance(score, strength=1.0, candidates=V)
    x = diffusion.generate(EXACT, masked(ROWS, T, V), V, steps=T, adjust=adjust, generator=seeded(1))
    assert chi_square_p(counts_of(x, V), JOINT * inside) > 1e-3


def test_guidance_tries_only_the_likeliest_candidates():
    model = Fixed(torch.tensor([0.1, 0.4, 0.2, 0.3]).log())
    adjust = guidance.classifier_guidance(lambda tokens: (tokens == 0).float().sum(1) * 100, candidates=2)
    x = diffusion.generate(model, masked(2000, 1, 4), 4, steps=1, adjust=adjust, generator=seeded(0))
    assert chi_square_p(torch.bincount(x.flatten(), minlength=4), torch.tensor([0, 0.4, 0, 0.3])) > 1e-3


@pytest.mark.parametrize("strength", [0.0, 1.0, 2.0])
def test_classifier_free_guidance_raises_what_the_prefix_makes_likelier(strength):
    x = masked(ROWS, T, V)
    x[:, :2] = torch.tensor([2, 0])
    adjust = guidance.classifier_free_guidance(EXACT, x != V, V, strength)
    written = diffusion.generate(EXACT, x, V, steps=1, adjust=adjust, generator=seeded(0))
    with_prefix, without = JOINT[2, 0].sum(1), JOINT.sum((0, 1, 3))  # of the third token
    expected = (with_prefix / with_prefix.sum()) ** (1 + strength) / without**strength
    assert chi_square_p(torch.bincount(written[:, 2], minlength=V), expected) > 1e-3


def test_a_bag_of_tokens_is_the_sum_of_the_weights_of_its_visible_runs():
    bag = guidance.BagOfTokens(mask_id=9, longest=2)
    torch.nn.init.normal_(bag.weight.weight, generator=seeded(0))
    with torch.no_grad():
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
        steps = torch.randint(0, 2, (5000,), generator=seeded(shift + 1)) * shift
        return steps.cumsum(0) % 7

    bag = guidance.BagOfTokens(mask_id=7, longest=2)
    languages = language(1), language(-1)
    assert bag.accuracy(languages, T=32) == pytest.approx(0.5)  # all weights 0: always the same answer
    bag.fit(languages, steps=60, T=32)
    assert bag.accuracy(languages, T=32) > 0.85
    with torch.no_grad():
        assert (bag(torch.tensor([[0, 6, 5, 5, 4, 3], [0, 1, 2, 2, 3, 4]])) > 0).tolist() == [True, False]


# --- Structure ------------------------------------------------------------------------------------

TEMPLATE = "On [word:May|July|September] [digits:2], [MASK:5] [letters:3]!"


@pytest.mark.parametrize("order", ["random", "confidence", "left_to_right", "ancestral"])
@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_the_result_always_satisfies_the_template(order, steps):
    x, form = structured.parse(TEMPLATE, BYTES, MASK)
    logits = torch.randn(len(x), MASK, generator=seeded(0)) * 3
    logits[:, BYTES.eot_token] = -torch.inf
    model = Fixed(logits)
    rows = diffusion.generate(model, x.expand(20, -1), MASK, steps=steps, order=order, remask="renoise",
                              adjust=structured.keep_form(form, MASK, seeded(1)), generator=seeded(2))
    texts = [BYTES.decode_bytes(row.tolist()) for row in rows]
    pattern = rb"On (May      |July     |September) \d\d, .{5} [a-zA-Z]{3}!"
    assert all(re.fullmatch(pattern, text, re.S) for text in texts), texts
    assert all(structured.satisfies(row, x, form, MASK) for row in rows)
    assert len(set(texts)) == 20


@pytest.mark.parametrize("arguments, message", [
    (["--num-samples", "0"], "--num-samples must be at least 1"),
    (["--steps", "0"], "steps must be at least 1"),
    (["--checkpoint", "no/such/folder"], "does not exist"),
    (["--template", "In [wrd:May|June]"], "[wrd:May|June] is no hole"),
    (["--template", "In [MASK:3] [digits:x]"], "[digits:x] is no hole"),
    (["--template", "In [May]"], "the template has no holes"),
])
def test_a_mistake_gets_one_line(arguments, message, tmp_path, capsys):
    model = Transformer(ModelConfig(257, 128, n_layer=1, n_head=1, n_embd=8))
    info = {"format": 1, "model": dataclasses.asdict(model.config), "config": {"objective": "diffusion"},
            "tokenizer": "byte"}
    save(tmp_path / "model.pt", model.state_dict(), info)
    assert structured.main(["--checkpoint", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert structured.main(["--checkpoint", str(tmp_path), "--steps", "1", "--template", "[digits:2]"]) == 0


def test_an_unsatisfied_row_is_recognised():
    x, form = structured.parse("a[digits:1][word:no|on]", BYTES, MASK)
    verdicts = {text: structured.satisfies(torch.tensor(list(text.encode())), x, form, MASK)
                for text in ("a1no", "a9on", "b1no", "axno", "a1nn")}
    assert verdicts == {"a1no": True, "a9on": True, "b1no": False, "axno": False, "a1nn": False}


@pytest.mark.parametrize("steps", [1, 2])
def test_words_are_chosen_as_the_network_would(steps):
    # Independent places: each word in proportion to the product of its letters, drawn in one step or in two.
    p = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]])
    words = torch.tensor([[0, 0], [0, 1], [2, 2]])
    adjust = structured.keep_form([(0, words)], 3, seeded(1))
    x = diffusion.generate(Fixed(p.log()), masked(3000, 2, 3), 3, steps=steps, order="left_to_right",
                           adjust=adjust, generator=seeded(0))
    expected = torch.zeros(3, 3)
    for a, b in words.tolist():
        expected[a, b] = p[0, a] * p[1, b]
    if steps == 2:  # the first letter among those that begin a word, then the second among those that end it
        first = torch.tensor([0.5, 0, 0.3])
        expected = first[:, None] * expected / expected.sum(1, keepdim=True).clamp(min=1e-9)
    assert chi_square_p(counts_of(x, 3), expected) > 1e-3


def test_a_hole_that_no_token_fits_is_refused(capsys, tmp_path):
    with pytest.raises(ValueError, match="2 tokens"):
        structured.parse("[word:a|abc]", _TwoTokenSpace(), MASK)


class _TwoTokenSpace:
    def encode_ordinary(self, text):
        return [token for c in text for token in ([1, 2] if c == " " else [ord(c)])]


# --- The page -------------------------------------------------------------------------------------


def steps_file(path, texts_by_step, tokens_by_step):
    with open(path, "w") as file:
        for i, (texts, tokens) in enumerate(zip(texts_by_step, tokens_by_step, strict=True)):
            p = [[0.5] * len(row) for row in tokens]
            line = {"step": i, "tokens": tokens, "texts": texts, "probability": p}
            print(json.dumps(line), file=file)


@pytest.fixture
def steps(tmp_path):
    evil = "</script><b id='evil'>&"
    texts = [[["Hi", None, None, None]], [["Hi", evil, None, None]],
             [["Hi", None, "x", "y"]], [["Hi", "z", "x", "y"]]]
    tokens = [[[5, 9, 9, 9]], [[5, 1, 9, 9]], [[5, 9, 2, 3]], [[5, 4, 2, 3]]]
    steps_file(tmp_path / "steps.jsonl", texts, tokens)
    return tmp_path / "steps.jsonl"


def test_the_page_knows_when_each_place_became_what_it_is(steps, tmp_path):
    assert denoise_page.main([str(steps), str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    frames = json.loads(page.split('id="frames">')[1].split("</script>")[0])
    since = [frame["since"] for frame in frames]
    assert since == [[[0, 0, 0, 0]], [[0, 1, 0, 0]], [[0, 2, 2, 2]], [[0, 3, 2, 2]]]
    assert page.count("</script>") == 2 and "http" not in page  # nothing escapes, nothing is fetched


@pytest.mark.parametrize("content", ["", "{", "{}\n", '{"tokens": 3}\n', "[1]\n"])
def test_a_file_that_is_no_record_of_steps_gets_one_line(content, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text(content)
    assert denoise_page.main([str(tmp_path / "bad.jsonl"), str(tmp_path / "page.html")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "page.html").exists()


@pytest.mark.skipif(not (shutil.which("chromium") and shutil.which("chromedriver")), reason="no chromium")
def test_the_slider_and_the_play_button_move_through_the_steps(steps, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.support.wait import WebDriverWait

    denoise_page.main([str(steps), str(tmp_path / "page.html")])
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
                 "--disable-background-networking", "--disable-component-update",
                 f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as browser:
        browser.get((tmp_path / "page.html").as_uri())

        def state():
            label = browser.find_element("id", "label").text
            spans = browser.find_elements("css selector", "main p span")
            return label, [span.text for span in spans], [span.get_attribute("class") for span in spans]

        def slide_to(step):
            browser.execute_script("const s = document.getElementById('step'); s.value = arguments[0];"
                                   "s.dispatchEvent(new Event('input'))", step)

        hidden = "\N{LIGHT SHADE}"
        assert state() == ("step 0 of 3: 3 hidden", ["Hi", hidden, hidden, hidden],
                           ["", "hidden", "hidden", "hidden"])
        slide_to(1)  # markup in a token is shown as text
        assert state() == ("step 1 of 3: 2 hidden", ["Hi", "</script><b id='evil'>&", hidden, hidden],
                           ["", "new", "hidden", "hidden"])
        assert not browser.find_elements("id", "evil")
        slide_to(2)
        assert state() == ("step 2 of 3: 1 hidden", ["Hi", hidden, "x", "y"], ["", "again", "new", "new"])
        places = browser.find_elements("css selector", "main p span")
        assert [place.get_attribute("title") for place in places] == [
            "given", "hidden", "probability 0.500, written in step 2", "probability 0.500, written in step 2"]
        browser.find_element("id", "play").click()
        waiting = WebDriverWait(browser, 20)
        waiting.until(lambda _: state()[0] == "step 3 of 3: 0 hidden")
        assert state()[1] == ["Hi", "z", "x", "y"]
        assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
