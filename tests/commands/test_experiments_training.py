"""The experiments that train, or look into a network: what they compute, and each to its end."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import EXACT, FOX, T, V, seeded

import diffusion
from diffusion import Masking
from experiments import (
    domain,
    layers,
    training,
)
from model import ModelConfig, Transformer
from plumbing.checkpoint import load_checkpoint
from prepare_data import TokenFile, write_dataset

ROOT = Path(__file__).parent.parent.parent
TINY = "--config tiny.toml "


def config_of(name: str) -> dict:
    return json.loads(Path(f"out/experiments/{name}/config.json").read_text())


# --- The recipe -----------------------------------------------------------------------------------




# --- Layers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(networks) -> Transformer:
    return load_checkpoint(networks / "run")[0].requires_grad_(False)


def test_the_lens_at_the_last_layer_is_the_model(network):
    tokens = torch.randint(258, (3, 64), generator=seeded(0))
    positions = torch.tensor([0, 5, 64, 191])
    logits = layers.lens(network, tokens, positions)
    assert logits.shape == (3, 4, 257)
    torch.testing.assert_close(logits[-1], network(tokens, positions))
    first = Transformer(ModelConfig(257, 64, n_layer=1, n_head=2, n_embd=32))  # it ends there
    first.load_state_dict({name: tensor for name, tensor in network.state_dict().items()
                           if not name.startswith("blocks.1")})
    torch.testing.assert_close(logits[1], first(tokens, positions))


@pytest.mark.parametrize("causal", [False, True])
def test_the_weights_are_those_of_the_forward_pass(network, causal, monkeypatch):
    tokens = torch.randint(258, (2, 16), generator=seeded(1))
    seen = []

    def reproduce(attention, inputs, output):
        weights, v = layers.attention_weights(attention, *inputs)
        y = attention.proj((weights @ v).transpose(1, 2).reshape(output.shape))
        torch.testing.assert_close(y, output)
        seen.append(weights)

    for block in network.blocks:
        monkeypatch.setattr(block.attention, "causal", causal)
    hooks = [block.attention.register_forward_hook(reproduce) for block in network.blocks]
    network(tokens)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(layers.all_attention(network, tokens), torch.stack(seen))
    assert (seen[1].triu(1) == 0).all() == causal


def test_habits_of_heads_that_do_one_thing():
    eye = torch.eye(6)
    heads = torch.stack([eye, eye.roll(2, 1), torch.full((6, 6), 1 / 6)])[None, None]  # (1,1,3,6,6)
    mask = torch.tensor([[True, True, False, False, False, False]])
    habits = {name: value[0].tolist() for name, value in layers.look(heads, mask).items()}
    assert habits["hidden"] == pytest.approx([1 / 3] * 3)
    assert habits["itself"] == pytest.approx([1, 0, 1 / 6])
    # Two of the six wrap around, 4 away.
    assert habits["neighbours"] == pytest.approx([0, 4 / 6, 18 / 36])
    assert habits["distance"] == pytest.approx([0, (4 * 2 + 2 * 4) / 6, 70 / 36])


def test_what_is_decided_is_what_will_be_written(network):
    x = torch.full((2, 12), 257)
    fractions, written = layers.decided(network, x, steps=12)
    assert fractions.shape == (3, 12) and (written < 257).all()
    first_choice = layers.lens(network, x, torch.arange(24)).argmax(-1)
    expected = (first_choice == written.flatten()).float().mean(1)
    # In bfloat16 a choice may differ.
    torch.testing.assert_close(fractions[:, 0], expected, atol=0.1, rtol=0)


def test_layers(finish):
    lines, result = finish(layers, "--checkpoint run --rows 8 --num-samples 2 --text f[MASK:2]x")
    assert list(result["ce"]) == ["embedding", "block 1", "block 2"]
    assert all(len(row) == len(layers.LEVELS) for row in result["ce"].values())
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
                     ["more", "than", "first", "+0.200", "-1.000"], ["+-", "0.100", "0.000"]]


def test_the_same_end_is_scored_after_every_prompt():
    shown = []

    def watched(tokens, positions):
        shown.append(tokens)
        missing = T - tokens.size(1)
        x = torch.nn.functional.pad(tokens, (missing, 0), value=V)
        return EXACT(x)[:, missing:].flatten(0, 1)[positions]

    watched.config = SimpleNamespace(mask_id=V)
    x_0 = torch.arange(32).view(8, 4) % V
    for prompt in (0, 2):
        assert training.after_prompt(watched, x_0, prompt, end=2).shape == (4,)
    assert [tokens.size(1) for tokens in shown] == [2, 4]
    assert torch.equal(shown[1][:, :2], x_0[:, :2])  # the prompt stays visible


def test_masking_trains_every_row_with_every_seed(finish, started):
    lines, result = finish(training, f"masking {SEEDS} 4")
    assert [words[words.index("--seed") + 1] for words in started] == ["1", "2"] * 4
    assert config_of("training/masking-always-15-2")["mlm_ratio"] == 0.15
    assert config_of("training/masking-ten-levels-1")["mask_levels"] == 10
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
    assert config_of("training/prefixes-0-to-32-1")["prefix_length_max"] == 32


def test_repetition_reads_a_small_corpus_and_is_found_again(finish):
    _, result = finish(training, f"repetition {SEEDS} 16")
    tokens = TokenFile("out/experiments/training-data/data-sotu-16384", "train").num_tokens
    assert result["columns"][3:] == pytest.approx([n * 2 * 8 * 64 / tokens for n in range(1, 9)])
    assert config_of("training/repetition-GPT-1")["decay_fraction"] == 0
    for _, best, _, *nats in (row for rows in result["numbers"].values() for row in rows):
        assert best == min(nats) and nats[-1] < nats[0]
    assert finish(training, f"repetition {SEEDS} 16")[1] == result


def test_the_twin_is_compared_at_equal_tokens(finish):
    _, result = finish(training, f"twin {SEEDS} 12")
    assert result["columns"] == pytest.approx([n * 2 * 8 * 64 / 1e6 for n in range(1, 7)])
    assert config_of("training/twin-GPT-2")["objective"] == "autoregressive"


def test_the_recipe_is_a_table_of_whole_trainings(workplace, started, monkeypatch, capsys):
    Path("text.txt").write_text(FOX * 300)
    Path("four.toml").write_text(Path("tiny.toml").read_text() + "steps = 4\n")
    rows = {"as it is": training.Row(tokenizer="byte"),
            "300 tokens": training.Row("--learning-rate 0.02", tokenizer="bpe:300")}
    question = training.QUESTIONS["recipe"]._replace(rows=rows)
    monkeypatch.setitem(training.QUESTIONS, "recipe", question)
    flags = "recipe --config four.toml --corpus text.txt --seeds 1 2"
    assert training.main(flags.split()) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert config_of("training/recipe-300-tokens-2")["learning_rate"] == 0.02
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


def test_the_three_weightings_have_one_mean_where_every_level_costs_the_same(data):
    file = TokenFile(data, "train")
    rows = file.batch(0, 0, 4, 32)
    file.batch = lambda *arguments: rows
    answers = torch.from_numpy(rows).flatten()

    def model(tokens, positions):  # 2 nats for any byte, whatever is hidden
        others = torch.full((len(positions), 257), math.log((1 - math.exp(-2)) / 256))
        return others.scatter(1, answers[positions][:, None], -2.0)

    losses = training.spikes(model, file, 300, 4, 32, 257)
    assert np.allclose(losses["token"], 2) and np.allclose(losses["1/m"], 2, atol=1e-5)
    error = np.std(losses["1/t"]) / 300**0.5
    assert error > 0.01 and abs(np.mean(losses["1/t"]) - 2) < 4 * error  # right on average, noisy


def test_dynamics(finish, monkeypatch):
    monkeypatch.setattr(training, "BATCHES", 3)
    _, result = finish(training, f"dynamics {TINY} --seeds 1 --rows 8 --steps 20")
    expected = result["loss"]["ln V: all tokens alike"]
    assert expected == pytest.approx(math.log(257))
    assert result["loss"]["before training"] == pytest.approx(expected, abs=0.1)
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
