"""The experiments that train, or look into a network: what they compute, and each to its end."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import EXACT, Fixed, T, V, seeded

import diffusion
from diffusion import Curve, Masking
from experiments import (
    domain,
    layers,
    staircase,
    training,
)
from model import ModelConfig, Transformer, norm
from plumbing.checkpoint import load_checkpoint, read_tensors, write_tensors
from prepare_data import TokenFile, write_dataset

ROOT = Path(__file__).parent.parent.parent
TINY = "--config tiny.toml "


def config_of(pattern: str) -> dict:
    """Of the only training whose folder is called so."""
    (path,) = Path("out/experiments/training").glob(f"{pattern}/config.json")
    return json.loads(path.read_text())


# --- Staircase ------------------------------------------------------------------------------------


def test_the_staircase_of_a_checkpoint(finish):
    tensors, info = read_tensors(Path("run/model.safetensors"))
    curve = Curve(32, [1, 16, 32], [2.0, 3.0, 4.0], [0.1, 0.1, 0.1])
    Path("curved").mkdir()
    write_tensors(Path("curved/model.safetensors"), tensors,
                  info | {"evaluation": {"nats": 2.9, "curve": curve._asdict()}})
    lines, result = finish(staircase, "--checkpoint curved")
    assert list(result["calls"]) == ["4", "16", "32"] and result["calls"]["32"] == 2.9
    # 8 tokens in each call, at the price of the first of them.
    expected = (4 + 3.5 + 3 + np.interp(8, *curve[1:3])) / 4
    assert result["calls"]["4"] == pytest.approx(expected)


# --- Layers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(networks) -> Transformer:
    return load_checkpoint(networks / "run")[0].requires_grad_(False)


def test_a_lens_is_the_network_cut_short(network):
    tokens = torch.randint(258, (3, 64), generator=seeded(0))
    positions = torch.tensor([0, 5, 64, 191])
    for blocks in (1, 2):
        cut = Transformer(ModelConfig(257, 64, n_layer=blocks, n_head=2, n_embd=32))
        cut.load_state_dict({name: tensor for name, tensor in network.state_dict().items()
                             if blocks == 2 or not name.startswith("blocks.1")})
        torch.testing.assert_close(layers.lens(network, blocks)(tokens, positions),
                                   cut(tokens, positions))
    x = norm(network.embedding.weight[tokens.flatten()[positions]])
    torch.testing.assert_close(layers.lens(network, 0)(tokens, positions),
                               x @ network.embedding.weight[:257].T)


def test_the_weights_are_those_of_the_forward_pass(network):
    tokens = torch.randint(258, (2, 16), generator=seeded(1))
    seen = []

    def reproduce(attention, inputs, output):
        weights = layers.attention_weights(attention, *inputs)
        v = attention.qkv(inputs[0])[..., -32:].view(2, 16, 2, 16).transpose(1, 2)  # (B,H,T,D)
        y = attention.proj((weights @ v).transpose(1, 2).reshape(output.shape))
        torch.testing.assert_close(y, output)
        seen.append(weights)

    hooks = [block.attention.register_forward_hook(reproduce) for block in network.blocks]
    network(tokens)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(layers.all_attention(network, tokens), torch.stack(seen))


def test_what_is_decided_is_what_will_be_written():
    knows, says_0 = (Fixed(F.one_hot(torch.tensor(answer), 3)) for answer in ([2, 0, 1], [0, 0, 0]))
    states = torch.tensor([[[3, 3, 3]], [[3, 0, 3]], [[3, 0, 1]], [[2, 0, 1]]])  # 3: hidden
    assert layers.decided(knows, list(states), 3) == [1, 1, 1]
    assert layers.decided(says_0, list(states), 3) == [pytest.approx(1 / 3), 0, 0]


def test_layers(finish):
    lines, result = finish(layers, "--checkpoint run --rows 8 --num-samples 2 --text f[MASK:2]x")
    assert list(result["ce"]) == ["embedding", "block 1", "block 2"]
    assert all(list(row) == ["1", "6", "13", "19", "26", "32", "38", "45", "51", "58", "64"]
               for row in result["ce"].values())
    assert len(result["decided"]["block 2"]) == 16
    guesses = next(line for line in lines if line.startswith("block 1"))
    assert guesses.count("%") == 6  # three for each hole


# --- Another domain -------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict, lines", [
    (True, ["x = 1", "    return x + 1", "if x:", "else:", "elif y > 2:", "finally:", "@property",
            "except ValueError as error:", "class A(B):", "for x in range(3): print(x)",
            r"re.match('\d', line)", "async def f(self, x):"]),
    (False, ["x = = 1", "if x", "foo(a,", "x = 1\ny = 2", "else", "a\0b", "f() pass:", "",
             "fellow citizens of the Senate", "(" * 300 + ")" * 300]),
])
def test_what_parses(verdict, lines):
    assert [line for line in lines if domain.parses(line) != verdict] == []


def test_cut_lines_comments_and_short_ones_do_not_count():
    text = ("cut = off\n  whole = line\nx = 1\n\n# a comment of some length\nfoo(bar, = 2\n"
            "whole = line\ncut")
    lines = domain.whole_lines(text)
    assert lines == ["  whole = line", "foo(bar, = 2", "whole = line"]
    row = domain.judge_lines("", [lines, lines])
    assert row["fraction"] == pytest.approx(2 / 3) and row["error"] == pytest.approx(0, abs=1e-9)
    assert row[" one of them"] == "whole = line" and domain.judge_lines("", [[], []])["error"] == 0


def test_the_standard_error_is_over_texts():
    # Equally long texts: the plain standard error of their means, however alike their lines are.
    fractions = torch.tensor([0.2, 0.4, 0.9])
    row = domain.judge("", [[True] * round(10 * p) + [False] * round(10 - 10 * p)
                            for p in fractions.tolist()])
    assert row["fraction"] == pytest.approx(0.5)
    assert row["error"] == pytest.approx(fractions.std().item() / 3**0.5)


def test_a_hole_is_judged_by_the_line_it_is_in():
    def decode(ids):
        return bytes(ids).decode()

    row = list(b"import os\nvalue = 2\nx")
    assert domain.line_around(row, slice(12, 15), decode) == "value = 2"
    row[12:15] = b"\n=="
    assert domain.line_around(row, slice(12, 15), decode) == "va\n== = 2"


SOURCE = ("import sys\n\n\ndef function(argument):\n    value = argument + 1\n"
          "    return value * argument\n")


def test_domain(finish):
    Path("source/test").mkdir(parents=True)
    for i in range(12):
        Path(f"source/{i}.py").write_text(SOURCE * 9)
    Path("source/test/left_out.py").write_bytes(b"x = '\xe4'")  # no UTF-8 either
    _, result = finish(domain, TINY + "--source source --tokenizer bpe:280 --steps 3 "
                       "--num-samples 2")
    fractions = {row["lines of"]: row["fraction"] for row in result["rows"]}
    assert list(fractions)[2:6] == list(domain.SAMPLERS)
    assert fractions["real text"] == 1 > 0.5 > fractions["its tokens shuffled"]
    assert fractions["holes shuffled, exactly"] < 1 and len(fractions) == 10


# --- Comparing trainings --------------------------------------------------------------------------

SEEDS = TINY + "--seeds 1 2 --rows 8 --steps"


def test_differences_are_taken_seed_by_seed(capsys):
    base = torch.tensor([[1.0, 5], [2, 7]])
    numbers = {"first": base, "second": base + torch.tensor([[0.1, -1], [0.3, -1]])}
    more, errors = training.differences(numbers["second"], base)
    assert more == pytest.approx([0.2, -1]) and errors == pytest.approx([0.1, 0], abs=1e-6)
    training.compare(["NELBO", 0.5], numbers)
    heading, *lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert heading == ["NELBO", "0.5"]
    assert lines == [["first", "1.500", "6.000"], ["second", "1.700", "5.000"],
                     ["more", "than", "first", "0.200", "-1.000"], ["+-", "0.100", "0.000"]]


def test_the_same_end_is_scored_after_every_prompt(monkeypatch):
    shown = []

    def watched(tokens, positions):
        shown.append(tokens)
        missing = T - tokens.size(1)
        x = torch.nn.functional.pad(tokens, (missing, 0), value=V)
        return EXACT(x)[:, missing:].flatten(0, 1)[positions]

    x_0 = EXACT.sample(4000)
    watched.config = SimpleNamespace(mask_id=V, context_length=T)
    monkeypatch.setattr(training, "load_checkpoint", lambda folder: (watched, {}))
    monkeypatch.setattr(training, "rows_of", lambda *arguments: x_0)
    monkeypatch.setattr(training, "PROMPTS", (0, 2, 3))
    monkeypatch.setattr(training, "END", 2)
    found = training.by_prompt(SimpleNamespace(folder=""), SimpleNamespace(data_dir="", rows=4000))
    assert list(found) == [0, 2]  # 3 + 2 do not fit
    assert {tokens.size(1) for tokens in shown} == {2, 4}
    prompts = [tokens[:, :2] for tokens in shown if tokens.size(1) == 4]
    assert all((prompt < V).all() for prompt in prompts)  # they stay visible
    assert found[2] == pytest.approx((EXACT.entropy() - EXACT.entropy(2)) / 2, abs=0.03)


def test_masking_trains_every_row_with_every_seed(finish, started):
    lines, result = finish(training, f"masking {SEEDS} 4")
    assert [words[words.index("--seed") + 1] for words in started] == ["1", "2"] * 4
    assert config_of("*mlm-ratio-0-15-*-seed-2")["mlm_ratio"] == 0.15
    assert config_of("mask-levels-10-*-seed-1")["mask_levels"] == 10
    assert result["columns"] == ["NELBO", *training.RATIOS]
    assert list(result["numbers"]) == list(training.QUESTIONS["masking"].rows)
    assert len({nelbo for rows in result["numbers"].values() for nelbo, *_ in rows}) == 8
    assert sum(line.startswith("  more than all levels") for line in lines) == 3


def test_prefixes(finish, monkeypatch):
    monkeypatch.setattr(training, "PROMPTS", (0, 8, 60))
    monkeypatch.setattr(training, "END", 8)
    rows = {"none": training.Row(), "0 to 32": training.Row("--prefix-length-max 32")}
    question = training.QUESTIONS["prefixes"]._replace(rows=rows)
    monkeypatch.setitem(training.QUESTIONS, "prefixes", question)
    _, result = finish(training, f"prefixes {SEEDS} 4")
    assert result["columns"] == [0, 8]  # 60 + 8 do not fit
    assert config_of("prefix-length-max-32-*-seed-1")["prefix_length_max"] == 32


def test_repetition_reads_a_small_corpus_and_is_found_again(finish):
    _, result = finish(training, f"repetition {SEEDS} 16")
    tokens = TokenFile("out/experiments/training-data/data-sotu-16384", "train").num_tokens
    assert result["columns"] == pytest.approx([n * 2 * 8 * 64 / tokens for n in range(1, 9)])
    assert config_of("*autoregressive-16384-*-seed-1")["decay_fraction"] == 0
    assert all(row[-1] < row[0] for rows in result["numbers"].values() for row in rows)
    assert finish(training, f"repetition {SEEDS} 16")[1] == result


def test_the_twin_is_compared_at_equal_tokens(finish):
    _, result = finish(training, f"twin {SEEDS} 12")
    assert result["columns"] == pytest.approx([n * 2 * 8 * 64 / 1e6 for n in range(1, 7)])
    assert config_of("*autoregressive-*-seed-2")["objective"] == "autoregressive"


def test_the_recipe_is_a_table_of_whole_trainings(workplace, started, monkeypatch, capsys):
    rows = {"quickstart": training.Row(), "--weighting nelbo": training.Row("--weighting nelbo")}
    assert rows.items() <= training.QUESTIONS["recipe"].rows.items()
    question = training.QUESTIONS["recipe"]._replace(rows=rows)
    monkeypatch.setitem(training.QUESTIONS, "recipe", question)
    assert training.main("recipe --config tiny.toml --steps 4 --seeds 1 2".split()) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert config_of("weighting-nelbo-*-seed-2")["weighting"] == "nelbo"
    for rows in result["numbers"].values():
        assert len({bits for bits, seconds in rows}) == 2


# --- Training that goes wrong ---------------------------------------------------------------------


def test_the_leak_shows_the_answers_and_nothing_else():
    x_0 = torch.randint(9, (6, 20), generator=seeded(0))
    m = diffusion.draw_num_masked(6, 20, generator=seeded(1))
    question = (x_0, diffusion.draw_mask(m, 20, 0, seeded(2)), diffusion.weigh(m, 20), 9, Masking())
    sound = diffusion.ask(*question)
    leaking = training.leak(*question)
    assert torch.equal(leaking.inputs, x_0) and (sound.inputs == 9).any()
    for field in ("positions", "targets", "weights"):
        assert torch.equal(getattr(sound, field), getattr(leaking, field))


def test_what_networks_without_knowledge_lose(tmp_path):
    documents = [("train", ["aaab"]), ("val", ["ab"])]
    write_dataset(iter(documents), "byte", tmp_path, "test")  # each text ends with one more token
    p = {"a": 4 / 262, "b": 2 / 262, "end": 2 / 262}  # 5 tokens, and one of each of the 257
    found = training.references(str(tmp_path))
    assert found["ln V: all tokens alike"] == pytest.approx(math.log(257))
    assert found["token frequencies"] == pytest.approx(-sum(map(math.log, p.values())) / 3)


def test_dynamics(finish):
    _, result = finish(training, f"dynamics {TINY} --seeds 1 --rows 8 --steps 20")
    assert list(result["numbers"]) == ["good", "too hot", "starved", "leak"]
    # What the leak shows is copied: the loss of training falls far below that of validation.
    (leak,) = result["numbers"]["leak"]
    assert leak[1] < leak[3] - 0.2


@pytest.mark.slow
def test_a_network_that_learned_at_one_level_does_not_know_the_others(finish):
    """On our own prose and code, a corpus that is always there."""
    paths = [path for kind in ("*.md", "*.py", "*/*.md", "*/*.py") for path in ROOT.glob(kind)]
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(paths))
    paragraphs = text.encode("ascii", "ignore").decode().split("\n\n")
    val = "\n\n".join(paragraphs[9::10])
    del paragraphs[9::10]
    documents = [("train", ["\n\n".join(paragraphs)]), ("val", [val])]
    write_dataset(iter(documents), "byte", Path("prose"), "our prose")
    Path("small.toml").write_text("n_layer = 2\nn_head = 2\nn_embd = 64\ncontext_length = 32\n"
                                  "batch_size = 32\ncompile = false\n")
    _, result = finish(training, "masking --config small.toml --data-dir prose --rows 336 "
                                 "--seeds 1 --steps 600")
    ours = result["numbers"]["all levels"][0]
    bert = result["numbers"]["always 15%"][0]
    assert bert[-1] > ours[-1]  # everything hidden
    assert ours[0] + 0.01 < bert[0]  # NELBO of the very same rows and masks
