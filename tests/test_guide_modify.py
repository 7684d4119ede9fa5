"""The guide's scripts that change something: mask ratios, prompts, layers, guidance, another domain."""

import dataclasses
import json
import types

import pytest
import torch

import diffusion
import train
from experiments import custom_masking, domain, guidance, lab, layers, prefix_lengths
from model import ModelConfig, Transformer
from prepare_data import get_tokenizer, write_dataset
from tests.test_sampling import Exact, Fixed, correlated_joint, seeded

V, T = 3, 4
JOINT = correlated_joint(V, T)
TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 60
TINY = """
n_layer = 2
n_head = 2
n_embd = 32
context_length = 32
batch_size = 8
eval_interval = 99
final_eval_rows = 8
compile = false
precision = "float32"
"""


def run_here(command: list, env: dict) -> types.SimpleNamespace:
    """`subprocess.run` of train.py, in this process: starting one takes longer than the tiny training."""
    assert command[1] == lab.TRAIN
    return types.SimpleNamespace(returncode=train.main([str(word) for word in command[2:]]))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to work in with a tiny corpus and configuration: data/ and tiny.toml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lab.subprocess, "run", run_here)
    monkeypatch.setattr(train, "matmul_ceiling", lambda device, dtype: 1e9)  # measuring it takes a second
    write_dataset(iter([("train", [TEXT]), ("val", [TEXT[:2000]])]), "byte", tmp_path / "data", "test")
    (tmp_path / "tiny.toml").write_text(TINY)
    return tmp_path


def figures_of(capsys) -> dict:
    """The JSON line that ends an experiment, with the sentence before it."""
    *_, sentence, line = capsys.readouterr().out.strip().splitlines()
    assert sentence.startswith("Answer: ") and sentence.endswith(".")
    return json.loads(line)


# --- Distributions of the mask ratio of one's own --------------------------------------------------


@pytest.mark.parametrize("name, mean", [("high", 2 / 3), ("low", 1 / 3)])
def test_draws_follow_the_cdf(name, mean):
    N, n = 50, 40_000
    m = diffusion.draw_num_masked(n, N, seeded(0), mask_ratio=custom_masking.CUSTOM[name])
    cdf = custom_masking.CUSTOM[name](torch.arange(N + 1) / N)
    for k in (1, 10, 25, 49, 50):  # strata: far closer than independent draws
        assert (m <= k).double().mean().item() == pytest.approx(cdf[k].item(), abs=2 / n)
    assert m.double().mean().item() / N == pytest.approx(mean, abs=0.02)
    t, q = custom_masking.density(name)
    assert q.mean().item() == pytest.approx(1) and (q * t).mean().item() == pytest.approx(mean, abs=1e-4)


def test_training_reads_the_added_lines(workplace, monkeypatch, capsys):
    monkeypatch.undo()  # train.py's own process, and its own table, from here on
    monkeypatch.chdir(workplace)
    arguments = "--ratios high --steps 3 --rows 8 --config tiny.toml --data-dir data --picture a.png".split()
    assert custom_masking.main(arguments) == 0
    assert "high" not in diffusion.MASK_RATIOS
    (run,) = figures_of(capsys)["runs"]
    assert run["mask_ratio"] == "high" and run["nelbo"] > 1
    config = json.loads((workplace / "out/experiments/masking-high/config.json").read_text())
    assert config["mask_ratio"] == "high" and (workplace / "a.png").stat().st_size > 10_000


def test_the_answer_names_the_best_and_what_cannot_be_told_from_it():
    def rows(mean):
        return torch.randn(200, generator=seeded(0)) + mean

    noise = torch.randn(200, generator=seeded(1))
    pairs = {"bell": rows(1.0), "uniform": rows(1.0) + noise * 0.1, "high": rows(1.5)}
    curves = {name: terms.expand(len(custom_masking.LEVELS), -1) for name, terms in pairs.items()}
    text = custom_masking.conclude(pairs, curves, "bell")
    best, other = sorted(["bell", "uniform"], key=lambda name: pairs[name].mean())
    assert text.startswith(f"{best} has the lowest NELBO") and f"but {other} cannot be told from it" in text
    assert "mostly high ratios instead of bell change CE by +0.500 +- 0.000 at 10% hidden" in text


# --- Prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_the_bound_behind_a_prefix_is_the_conditional_entropy(prefix):
    rows = torch.multinomial(JOINT.flatten(), 4000, replacement=True, generator=seeded(0))
    x_0 = torch.stack([rows // V ** (T - 1 - t) % V for t in range(T)], dim=1)
    terms = lab.pair_nelbos(Exact(JOINT), x_0, V, prefix)
    assert terms.mean().item() == pytest.approx(diffusion.nelbo(Exact(JOINT), x_0, V, prefix).nats, abs=1e-9)
    marginal = JOINT.sum(tuple(range(prefix, T)))  # of the prefix
    entropy = [torch.special.entr(p).sum() for p in (JOINT, marginal)]
    nats, error = diffusion.mean_and_error(terms)
    assert nats == pytest.approx((entropy[0] - entropy[1]).item() / (T - prefix), abs=4 * error)
    assert error < 0.02


def test_the_same_end_is_scored_behind_every_prompt():
    shown = []

    class Watched(Exact):
        config = types.SimpleNamespace(mask_id=V)

        def __call__(self, tokens, positions=None):
            shown.append(tokens)
            return super().__call__(torch.nn.functional.pad(tokens, (T - tokens.size(1), 0), value=V))[
                :, T - tokens.size(1) :].flatten(0, 1)[positions]

    x_0 = torch.arange(32).view(8, 4) % V
    found = prefix_lengths.measure(Watched(JOINT), x_0, [0, 2], end=2)
    assert found[0].shape == found[2].shape == (4,)
    assert [tokens.size(1) for tokens in shown] == [2, 4]
    assert torch.equal(shown[1][:, :2], x_0[:, :2])  # the prompt stays visible


def test_the_answer_says_which_prefix_pays():
    def terms(shift):
        return {p: torch.randn(50, generator=seeded(p)).double() * 0.1 + 2 + shift * p for p in (0, 64)}

    means = {"none": terms(0), "fixed": terms(-0.001), "drawn": terms(0.001), "fewer": terms(0.002)}
    text = prefix_lengths.conclude(means)
    assert text.startswith("at equal steps fixed training with a prefix makes continuing a prompt better")
    assert "by -0.064 +- 0.000 at 64 tokens of prompt and +0.000 +- 0.000 at 0 (fixed), by +0.064" in text
    assert "drawn changes it by -0.064 +- 0.000 at 64 tokens" in text
    assert prefix_lengths.conclude(means | {"fixed": terms(0.001)}).startswith("at equal steps no training")


def test_prefix_lengths_end_to_end(workplace, capsys):
    tiny = "--config tiny.toml --data-dir data --steps 4 --rows 8 --fixed 4 --longest 16 --picture a.png "
    assert prefix_lengths.main((tiny + "--prompts 0 8 24 --end 8").split()) == 0
    tables = figures_of(capsys)
    assert set(tables) == {"All that follows", "The same last 8 tokens"}
    for table in tables.values():
        assert all(set(table[name]) == {"0", "8", "24"} for name in ("none", "fixed", "drawn", "fewer"))
        assert all(more == 0 for _, _, more, _ in table["none"].values())
    assert tables["All that follows"]["none"]["24"] == tables["The same last 8 tokens"]["none"]["24"]
    assert (workplace / "a.png").stat().st_size > 10_000
    config = json.loads((workplace / "out/experiments/prefix-fewer/config.json").read_text())
    assert (config["steps"], config["prefix_length_max"]) == (3, None)  # 4 * (1 - 16/2/32)
    assert prefix_lengths.main((tiny + "--prompts 0 30 --end 8").split()) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# --- Layers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> Transformer:
    """A small one whose blocks do something: they are born as the identity."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(257, 64, n_layer=3, n_head=2, n_embd=32)).eval().requires_grad_(False)
    for block in model.blocks:
        for matrix in (block.attention.proj, block.down):
            torch.nn.init.normal_(matrix.weight, std=0.3)
    return model


def checkpoint(model: Transformer, folder) -> str:
    """The folder, with the model in it as train.py would save it."""
    info = {"format": 1, "model": dataclasses.asdict(model.config), "config": {"objective": "diffusion"},
            "tokenizer": "byte"}
    folder.mkdir()
    train.save(folder / "model.pt", model.state_dict(), info)
    return str(folder)


def test_the_lens_at_the_last_layer_is_the_model(network):
    tokens = torch.randint(258, (3, 64), generator=seeded(0))
    positions = torch.tensor([0, 5, 64, 191])
    logits = layers.lens(network, tokens, positions)
    assert logits.shape == (4, 4, 257)
    torch.testing.assert_close(logits[-1], network(tokens, positions))
    first = Transformer(ModelConfig(257, 64, n_layer=1, n_head=2, n_embd=32))  # a network that ends there
    first.load_state_dict({name: tensor for name, tensor in network.state_dict().items()
                           if not name.startswith(("blocks.1", "blocks.2"))})
    torch.testing.assert_close(logits[1], first(tokens, positions))


@pytest.mark.parametrize("causal", [False, True])
def test_the_weights_reproduce_the_attention(network, causal):
    attention, x = network.blocks[1].attention, torch.randn(2, 20, 32, generator=seeded(0))
    rotary = network.rotary[:, :20]
    attention.causal = causal
    weights, v = layers.attention_weights(attention, x, rotary)
    y = attention.proj((weights @ v).transpose(1, 2).reshape(x.shape))
    torch.testing.assert_close(y, attention(x, rotary))
    attention.causal = False


def test_the_weights_of_all_layers_are_those_of_the_forward_pass(network):
    tokens = torch.randint(258, (2, 16), generator=seeded(1))
    seen = []
    hooks = [block.attention.register_forward_hook(lambda module, inputs, _: seen.append(
        layers.attention_weights(module, *inputs)[0])) for block in network.blocks]
    network(tokens)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(layers.all_attention(network, tokens), torch.stack(seen))


def test_habits_of_heads_that_do_one_thing():
    eye = torch.eye(6)
    weights = torch.stack([eye, eye.roll(2, 1), torch.full((6, 6), 1 / 6)])[None, None]  # (1,1,3,6,6)
    mask = torch.tensor([[True, True, False, False, False, False]])
    habits = {name: value[0].tolist() for name, value in layers.look(weights, mask).items()}
    assert habits["hidden"] == pytest.approx([1 / 3] * 3)
    assert habits["itself"] == pytest.approx([1, 0, 1 / 6])
    assert habits["neighbours"] == pytest.approx([0, 4 / 6, 18 / 36])  # two of the six wrap around, 4 away
    assert habits["distance"] == pytest.approx([0, (4 * 2 + 2 * 4) / 6, 70 / 36])


def test_what_is_decided_is_what_will_be_written(network):
    x = torch.full((2, 12), 257)
    shares, written = layers.decided(network, x, steps=12)
    assert shares.shape == (4, 12) and (written < 257).all()
    everywhere = torch.arange(24)
    first_choice = layers.lens(network, x, everywhere).argmax(-1)
    expected = (first_choice == written.flatten()).float().mean(1)
    torch.testing.assert_close(shares[:, 0], expected, atol=0.1, rtol=0)  # in bfloat16 a choice may differ


def test_layers_end_to_end(network, workplace, capsys):
    folder = checkpoint(network, workplace / "model")
    tiny = ["--checkpoint", folder, "--data-dir", "data", "--picture", "a.png", "--rows", "8"]
    assert layers.main([*tiny, "--num-samples", "2", "--steps", "4", "--prefix", "fox"]) == 0
    figures = figures_of(capsys)
    assert list(figures["ce"]) == ["embedding", "block 1", "block 2", "block 3"]
    assert all(len(row) == len(layers.LEVELS) for row in figures["ce"].values())
    assert (workplace / "a.png").stat().st_size > 10_000
    assert layers.main([*tiny, "--steps", "64", "--prefix", "fox"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# --- Guidance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, n", [(0, 32), (32, 32), (8, 32)])
def test_a_share_is_never_known_exactly(count, n):
    answers = torch.arange(n) < count
    share, error = lab.share_and_error(answers)
    assert share == count / n
    assert 1 / n / 2 < error <= 0.5 / n**0.5
    assert lab.share_and_error(answers.tolist()) == (share, error)


def test_guidance_end_to_end(network, workplace, capsys):
    old, modern = ("train", ["of olden times we spoke thus " * 20]), ("train", ["tonight my americans " * 20])
    write_dataset(iter([old] * 6 + [modern] * 6 + [("val", [TEXT])]), "byte", workplace / "ages", "test")
    folder = checkpoint(network, workplace / "model")
    tiny = ["--checkpoint", folder, "--data-dir", "ages", "--picture", "a.png"]
    few = "--num-samples 4 --length 24 --prefix ton --strengths 1 500 --fit-steps 40".split()
    assert guidance.main([*tiny, *few]) == 0
    figures = figures_of(capsys)
    assert figures["real"] == {"old": 0, "modern": 1}
    share = {(run["guidance"], run["strength"]): run["judged_modern"] for run in figures["runs"]}
    assert share["towards modern", 500] > share["towards old", 500]
    assert ("classifier-free", 1) in share and ("classifier-free", 500) not in share
    assert (workplace / "a.png").stat().st_size > 10_000
    assert guidance.main([*tiny, "--length", "5"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# --- Another domain -------------------------------------------------------------------------------


@pytest.mark.parametrize("line, verdict", [
    ("x = 1", True), ("    return x + 1", True), ("if x:", True), ("else:", True), ("elif y > 2:", True),
    ("except ValueError as error:", True), ("finally:", True), ("@property", True), ("class A(B):", True),
    ("for x in range(3): print(x)", True), (r"re.match('\d', line)", True), ("async def f(self, x):", True),
    ("x = = 1", False), ("if x", False), ("foo(a,", False), ("x = 1\ny = 2", False), ("else", False),
    ("fellow citizens of the Senate", False), ("a\0b", False), ("(" * 300 + ")" * 300, False), ("", False),
    ("f() pass:", False),
])
def test_what_parses(line, verdict):
    assert domain.parses(line) == verdict


def test_cut_lines_comments_and_short_ones_do_not_count():
    text = "cut = off\n  whole = line\nx = 1\n\n# a comment of some length\nfoo(bar, = 2\nwhole = line\ncut"
    assert domain.counted(text) == ["whole = line", "foo(bar, = 2", "whole = line"]
    row = domain.judge([text, text])
    assert (row["parse"], row["lines"], row["different"]) == (pytest.approx(4 / 6), 6, 1 / 4)
    assert row["example"] == "whole = line" and domain.judge(["", "\n"])["lines"] == 0


SOURCE = "import sys\n\n\ndef function(argument):\n    value = argument + 1\n    return value * argument\n"


def rows_of_source(n: int) -> torch.Tensor:
    ids = get_tokenizer("byte").encode_ordinary(SOURCE)
    return torch.tensor([ids[i : i + 64] for i in range(n)])


def test_holes_lie_inside_lines_that_parse():
    found = domain.holes(rows_of_source(20), 10)
    assert len(found) == 10
    for hole in found:
        line = bytes(hole.row[hole.line].tolist()).decode()
        assert line in SOURCE.split("\n") or "    " + line in SOURCE.split("\n")
        assert domain.parses(line) and hole.line.start <= hole.hidden.start
        assert hole.hidden.stop - hole.hidden.start == domain.HOLE and hole.hidden.stop <= hole.line.stop
    assert len({hole.hidden.start - hole.line.start for hole in found}) > 3
    with pytest.raises(domain.DataError, match="no line"):
        domain.holes(torch.full((4, 64), 65), 10)


def test_filled_holes_are_judged_by_the_line_they_are_in():
    decode = get_tokenizer("byte").decode
    real = domain.holes(rows_of_source(20), 8)
    rows = torch.stack([hole.row for hole in real])
    judged = domain.judge_filled(rows, real, decode)
    assert (judged["filled"], judged["exact"]) == (1, 1)
    for row, hole in zip(rows[:6], real[:6], strict=True):
        row[hole.hidden] = ord("(")
    rows[7, real[7].hidden] = ord("a")  # parses, but is not what was there: unless it is a keyword that went
    judged = domain.judge_filled(rows, real, decode)
    assert judged["exact"] == 1 / 8 and judged["filled"] in (1 / 8, 2 / 8)


def test_only_the_holes_are_filled():
    real = domain.holes(rows_of_source(20), 8)

    class Writes7(Fixed):
        config = types.SimpleNamespace(mask_id=257)

    logits = torch.zeros(257)
    logits[7] = 100
    rows = domain.fill(Writes7(logits[None]), real, temperature=1.0)
    for row, hole in zip(rows, real, strict=True):
        assert (row[hole.hidden] == 7).all()
        row[hole.hidden] = hole.row[hole.hidden]
        assert torch.equal(row, hole.row)


def test_domain_end_to_end(workplace, capsys):
    torch.manual_seed(0)
    start = checkpoint(Transformer(ModelConfig(257, 64, n_layer=2, n_head=2, n_embd=32)), workplace / "model")
    (workplace / "source/test").mkdir(parents=True)
    for i in range(12):
        (workplace / f"source/{i}.py").write_text(SOURCE * 4)
    (workplace / "source/test/left_out.py").write_text("no")
    (workplace / "source/latin.py").write_bytes(b"x = '\xe4'")
    (workplace / "tiny.toml").write_text(TINY.replace("context_length = 32", "context_length = 64"))
    assert len(domain.source_files(workplace / "source")) == 12
    tiny = (f"--checkpoint {start} --source source --config tiny.toml --picture a.png --steps 3 --rows 8 "
            "--num-samples 2 --sampling-steps 4 --holes 4").split()
    assert domain.main(tiny) == 0
    figures = figures_of(capsys)
    assert figures["lines"]["real text"]["parse"] == 1
    assert figures["lines"]["its lines shuffled"]["parse"] < 0.5
    assert len(figures["filled"]) == 2 + 3 * 3 and set(figures["nelbo"]) == {
        "English only", "from scratch", "continued"}
    config = json.loads((workplace / "out/experiments/python-continued/config.json").read_text())
    assert config["init_from"] == start
    assert (workplace / "a.png").stat().st_size > 10_000
    assert domain.main(["--source", "nowhere", "--data-dir", "new", "--checkpoint", start]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
