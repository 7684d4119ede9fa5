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
    prefix_lengths,
    recipe,
    repetition,
    training_dynamics,
    variable_masking,
)
from model import ModelConfig, Transformer
from plumbing.checkpoint import load_checkpoint
from prepare_data import TokenFile, get_tokenizer, write_dataset

ROOT = Path(__file__).parent.parent.parent
TINY = "--config tiny.toml "


def config_of(name: str) -> dict:
    return json.loads(Path(f"out/experiments/{name}/config.json").read_text())


# --- The recipe -----------------------------------------------------------------------------------


def test_the_recipe_is_a_table_of_trainings(workplace, started, monkeypatch, capsys):
    Path("text.txt").write_text(FOX * 300)
    monkeypatch.setattr(recipe, "ROWS", {
        "as it is": ("byte", "--steps 4"), "spread": ("byte", "--steps 4 --mask-positions spread"),
        "300 tokens": ("bpe:300", "--steps 4 --learning-rate 0.02")})
    flags = "--config tiny.toml --corpus text.txt --seeds 1 2 --picture a.png"
    assert recipe.main(flags.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert Path("a.png").stat().st_size > 1000 and "Answer: the lowest bound has" in lines[-2]
    assert [words[words.index("--seed") + 1] for words in started] == ["1", "2"] * 3
    assert config_of("recipe-300-tokens-2")["learning_rate"] == 0.02
    for name, bits in result["bits_per_byte"].items():
        assert len(set(bits)) == 2 and min(bits) > 0.1  # two seeds, two runs
        row = next(line for line in lines if line.startswith(name))
        more = [other - base for other, base in zip(bits, result["bits_per_byte"]["as it is"],
                                                    strict=True)]
        assert f"{sum(more) / 2:+.3f} +- {abs(more[0] - more[1]) / 2:.3f}" in row


# --- Prompts --------------------------------------------------------------------------------------


def test_the_same_end_is_scored_after_every_prompt():
    shown = []

    def watched(tokens, positions):
        shown.append(tokens)
        missing = T - tokens.size(1)
        x = torch.nn.functional.pad(tokens, (missing, 0), value=V)
        return EXACT(x)[:, missing:].flatten(0, 1)[positions]

    watched.config = SimpleNamespace(mask_id=V)
    x_0 = torch.arange(32).view(8, 4) % V
    found = prefix_lengths.measure(watched, x_0, [0, 2], end=2)
    assert found[0].shape == found[2].shape == (4,)
    assert [tokens.size(1) for tokens in shown] == [2, 4]
    assert torch.equal(shown[1][:, :2], x_0[:, :2])  # the prompt stays visible


def test_the_answer_says_which_prefix_pays():
    def terms(shift):
        return {p: torch.linspace(1, 3, 50, dtype=torch.float64) + shift * p for p in (0, 64)}

    means = {"none": terms(0), "fixed": terms(-0.001), "drawn": terms(0.001), "fewer": terms(0.002)}
    text = prefix_lengths.conclude(means)
    assert "at equal steps fixed training with a prefix makes continuing a prompt better" in text
    assert "-0.064 +- 0.000 at 64 tokens of prompt and +0.000 +- 0.000 at 0 (fixed)" in text
    assert "drawn changes it by -0.064 +- 0.000 at 64 tokens" in text
    assert "at equal steps no training" in prefix_lengths.conclude(means | {"fixed": terms(0.001)})


def test_prefix_lengths(finish):
    flags = "--steps 4 --rows 8 --fixed 4 --longest 32 --prompts 0 8 56 --end 8"
    _, tables = finish(prefix_lengths, TINY + flags)
    assert list(tables) == ["All that follows", "The same last 8 tokens"]
    for table in tables.values():
        assert all(list(table[name]) == ["0", "8", "56"] for name in table)
        assert all(more == 0 for _, _, more, _ in table["none"].values())
    whole, same = tables.values()
    assert list(same) == ["none", "fixed", "drawn", "fewer"]
    assert whole["none"]["56"] == same["none"]["56"]
    fewer = config_of("prefix-fewer")
    assert (fewer["steps"], fewer["prefix_length_max"]) == (3, None)  # 4 * (1 - 32/2/64)
    assert config_of("prefix-drawn")["prefix_length_max"] == 32


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
    row = domain.judge_lines("", [text, text])
    numbers = (row["parse"], row["lines"], row["different"])
    assert numbers == (pytest.approx(4 / 6), 6, 1 / 4)
    assert row[" one of them"] == "whole = line" and domain.judge_lines("", ["\n"])["lines"] == 0


SOURCE = ("import sys\n\n\ndef function(argument):\n    value = argument + 1\n"
          "    return value * argument\n")


@pytest.fixture
def holes() -> list[domain.Hole]:
    tokenizer = get_tokenizer("byte")
    ids = tokenizer.encode_ordinary(SOURCE)
    return domain.holes(torch.tensor([ids[i : i + 80] for i in range(10)]), tokenizer.decode)


def test_holes_lie_inside_lines_that_parse(holes):
    assert len(holes) == 10
    for hole in holes:
        line = bytes(hole.row[hole.line].tolist()).decode()
        assert line in SOURCE.split("\n") and domain.parses(line)
        assert hole.line.start <= hole.hidden.start and hole.hidden.stop <= hole.line.stop
        assert hole.hidden.stop - hole.hidden.start == domain.SIZE
    assert len({hole.hidden.start - hole.line.start for hole in holes}) > 3
    with pytest.raises(domain.DataError, match="no line"):
        domain.holes(torch.full((4, 64), 65), get_tokenizer("byte").decode)


def test_filled_holes_are_judged_by_the_line_they_are_in(holes):
    decode = get_tokenizer("byte").decode
    holes = holes[:8]
    rows = torch.stack([hole.row for hole in holes])
    judged = domain.judge_filled("", rows, holes, decode)
    assert (judged["filled"], judged["exact"]) == (1, 1)
    for row, hole in zip(rows[:6], holes[:6], strict=True):
        row[hole.hidden] = ord("(")
    rows[7, holes[7].hidden] = ord("a")  # parses, unless a keyword was there, but is not the text
    judged = domain.judge_filled("", rows, holes, decode)
    assert judged["exact"] == 1 / 8 and judged["filled"] in (1 / 8, 2 / 8)


def test_domain(finish):
    Path("source/test").mkdir(parents=True)
    for i in range(12):
        Path(f"source/{i}.py").write_text(SOURCE * 4)
    Path("source/test/left_out.py").write_text("no")
    Path("source/latin.py").write_bytes(b"x = '\xe4'")
    assert len(domain.source_files(Path("source"))) == 12
    _, result = finish(domain, TINY + "--source source --tokenizer bpe:280 --steps 3 --rows 8 "
                       "--num-samples 2")
    parse = {row["lines of"]: row["parse"] for row in result["lines"]}
    assert list(parse)[3:] == list(domain.SAMPLERS)
    assert parse["real text"] == 1 > 0.5 > parse["its tokens shuffled"]
    assert len(result["filled"]) == 2 + 3


# --- Levels ---------------------------------------------------------------------------------------


def prepare_prose() -> bytes:
    """A corpus that is always there, our own prose and code; its validation text, every tenth
    paragraph, is returned. ASCII only: the pictures made of blocks are another language."""
    paths = [path for kind in ("*.md", "*.py", "*/*.md", "*/*.py") for path in ROOT.glob(kind)]
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(paths))
    paragraphs = text.encode("ascii", "ignore").decode().split("\n\n")
    val = "\n\n".join(paragraphs[9::10])
    del paragraphs[9::10]
    documents = [("train", ["\n\n".join(paragraphs)]), ("val", [val])]
    write_dataset(iter(documents), "byte", Path("prose"), "our prose")
    return val.encode()


def test_variable_masking(finish):
    val = prepare_prose()
    _, result = finish(variable_masking, "--data-dir prose --rows 42 --num-samples 2 "
                       "--sampling-steps 4 --compile=false --n-layer=1 --n-head=1 --n-embd=16 "
                       "--context-length=16 --batch-size=4 --steps=4")
    assert list(result["rows"]) == list(result["curves"]) == [*variable_masking.RUNS]
    for name, objective, mask_levels in (
            ("15-percent", "mlm", 0), ("50-percent", "mlm", 0), ("ten-levels", "diffusion", 10),
            ("all-levels", "diffusion", 0)):
        config = config_of(f"variable-masking/{name}")
        assert (config["objective"], config["mask_levels"]) == (objective, mask_levels)
    assert len({row["nelbo"] for row in result["rows"].values()}) == 4
    p = np.bincount([*val, 256]) / (len(val) + 1)
    entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
    assert result["unigram"] == pytest.approx(entropy, abs=1e-4)


@pytest.mark.slow
def test_a_network_that_learned_at_one_level_does_not_know_the_others(finish):
    prepare_prose()
    _, result = finish(variable_masking, "--data-dir prose --rows 336 --num-samples 2 "
                       "--sampling-steps 16 --compile=false --n-layer=2 --n-head=2 --n-embd=64 "
                       "--context-length=32 --batch-size=32 --steps=600")
    bert = result["rows"]["15%"]
    ours = result["rows"]["all levels"]
    assert bert["ce"]["100%"] >= result["unigram"] - 0.05
    assert bert["ce"]["100%"] > ours["ce"]["100%"]
    assert ours["nelbo"] + 0.01 < bert["nelbo"]  # of the very same rows and masks


# --- Repeated text --------------------------------------------------------------------------------


@pytest.mark.parametrize("validation, best, best_epoch, turned", [
    ([3, 2, 2.5], 2, 2, True), ([3, 2, 1], 1, 3, False), ([3, 2, 2.05], 2, 2, False)])
def test_a_verdict_tells_a_curve_that_turned_from_one_that_has_not(validation, best, best_epoch,
                                                                   turned):
    run = {"validation": validation, "stderr": [0.1] * 3, "epochs": [1, 2, 3]}
    verdict = repetition.verdict(run)
    assert (verdict["best"], verdict["best_epoch"]) == (best, best_epoch)
    assert verdict["turned"] == turned


def test_repetition(finish):
    flags = TINY + "--tokens 512 --steps 20"
    _, result = finish(repetition, flags)
    tokens = TokenFile("out/experiments/repetition-data", "train").num_tokens
    for run in result["runs"].values():
        assert run["epochs"] == pytest.approx([step * 8 * 64 / tokens for step in range(1, 21)])
        assert run["validation"][-1] < run["validation"][0] < 5.7
    assert config_of("repetition-diffusion")["decay_fraction"] == 0
    assert finish(repetition, flags)[1] == result  # the runs are found again


# --- Training that goes wrong ---------------------------------------------------------------------


def test_the_leak_shows_the_answers_and_nothing_else():
    x_0 = torch.randint(9, (6, 20), generator=seeded(0))
    m = diffusion.draw_num_masked(6, 20, generator=seeded(1))
    question = (x_0, diffusion.draw_mask(m, 20, 0, seeded(2)), diffusion.weigh(m, 20), 9, Masking())
    sound = diffusion.ask(*question)
    leaking = training_dynamics.leak(*question)
    assert torch.equal(leaking.inputs, x_0) and (sound.inputs == 9).any()
    for field in ("positions", "targets", "weights"):
        assert torch.equal(getattr(sound, field), getattr(leaking, field))


def test_the_height_of_a_curve_is_its_mean():
    assert training_dynamics.height([1, 4], [1.0, 4.0], 4) == pytest.approx(2.5)
    assert training_dynamics.height([1, 2, 4], [0.0, 1.0, 1.0], 4) == pytest.approx(0.75)


def test_the_three_weightings_have_one_mean_where_every_level_costs_the_same(data):
    file = TokenFile(data, "train")
    rows = file.batch(0, 0, 4, 32)
    file.batch = lambda *arguments: rows
    answers = torch.from_numpy(rows).flatten()

    def model(tokens, positions):  # 2 nats for any byte, whatever is hidden
        others = torch.full((len(positions), 257), math.log((1 - math.exp(-2)) / 256))
        return others.scatter(1, answers[positions][:, None], -2.0)

    losses = training_dynamics.spikes(model, file, 300, 4, 32, 257)
    assert np.allclose(losses["token"], 2) and np.allclose(losses["1/m"], 2, atol=1e-5)
    assert np.allclose(losses["over all"], 2 * 33 / 64)
    error = np.std(losses["1/t"]) / 300**0.5
    assert error > 0.01 and abs(np.mean(losses["1/t"]) - 2) < 4 * error  # right on average, noisy


def test_training_dynamics(finish):
    _, result = finish(training_dynamics, TINY + "--checkpoint run --steps 20 --rows 12 "
                       "--starved-tokens 64 --batches 3")
    expected, measured = result["table"]["ln V: an untrained network"]
    assert expected == pytest.approx(math.log(257)) and measured == pytest.approx(expected, abs=0.1)
    expected, measured = result["table"]["factor 2: over all tokens / over hidden ones"]
    assert measured == pytest.approx(expected, abs=1e-6) and expected == pytest.approx(65 / 128)
    assert list(result["runs"]) == ["good", "too hot", "starved", "leak"]
    assert result["runs"]["leak"]["steps"][-1] == 10 and "1.0" in result["levels"]
    # What the leak shows is copied: the loss of training falls far below that of validation.
    leak = result["runs"]["leak"]
    assert leak["training"][-1] < leak["validation"][-1] - 0.2
