"""The guide's scripts about hiding and writing: they count exactly, judge as by hand, run to their end."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

import train
from diffusion import SCHEDULES, Curve, State, schedule_nelbo
from experiments import (
    adaptive,
    lab,
    masking_viz,
    samplers,
    sampling_methods,
    schedules,
    steps,
    temperature,
)
from model import ModelConfig, Transformer
from prepare_data import write_dataset
from tests.test_sampling import Fixed, masked

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 60
N = 16


@pytest.fixture(scope="module")
def twins_flags(tmp_path_factory) -> list[str]:
    """The flags that name a tiny untrained pair of models, and data."""
    folder = tmp_path_factory.mktemp("twins")
    write_dataset(iter([("train", [TEXT]), ("val", [TEXT[:2000]])]), "byte", folder / "data", "test")
    torch.manual_seed(0)
    for name, causal in (("run", False), ("twin", True)):
        model = Transformer(ModelConfig(257, N, 1, 1, 16, causal))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        (folder / name).mkdir()
        train.save(folder / name / "model.pt", model.state_dict(),
                   {"format": 1, "model": vars(model.config), "tokenizer": "byte",
                    "config": {"objective": "autoregressive" if causal else "diffusion"}})
    return [f"--checkpoint={folder / 'run'}", f"--judge={folder / 'twin'}", f"--data-dir={folder / 'data'}"]


@pytest.fixture
def twins(twins_flags) -> samplers.Twins:
    return samplers.load_twins(*(flag.split("=")[1] for flag in twins_flags))


@pytest.fixture
def end(tmp_path, monkeypatch, capsys):
    """Run a script to its end in an empty folder: (its lines, its JSON line)."""
    monkeypatch.chdir(tmp_path)

    def run(script, flags: list[str]) -> tuple[list[str], dict]:
        assert script.main(flags) == 0
        *lines, last = capsys.readouterr().out.splitlines()
        assert lines[-1].startswith("Answer: ")
        pytest.importorskip("matplotlib")
        name = script.__name__.split(".")[1]
        assert (tmp_path / f"out/experiments/{name}.png").read_bytes().startswith(b"\x89PNG")
        return lines, json.loads(last)

    return run


# --- Hiding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("T, prefix_length", [(256, 0), (256, 16), (37, 0), (37, 20), (10, 0)])
def test_each_level_hides_exactly_its_share_and_never_the_prefix(T, prefix_length):
    m, mask = masking_viz.mask_levels(T, prefix_length)
    assert m.tolist() == [round(k * (T - prefix_length) / 10) for k in range(1, 11)]
    assert mask.sum(1).tolist() == m.tolist()
    assert not mask[:, :prefix_length].any() and mask[-1, prefix_length:].all()


def test_the_calls_of_a_sampler_are_counted_by_level():
    # Ten linear steps of 100 tokens are called at 100, 90 .. 10 hidden: each level once. One call: the last.
    assert masking_viz.calls_by_level("linear", 100, 10) == [1] * 10
    assert masking_viz.calls_by_level("cosine", 100, 1) == [0] * 9 + [1]
    assert masking_viz.calls_by_level("linear", 10, 256) == [1] * 10
    assert sum(masking_viz.calls_by_level("exponential", 256, 20)) == 20


def test_belief_is_the_probability_of_the_true_token_where_hidden():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    mask = torch.zeros(10, 2, dtype=torch.bool)
    mask[0, 1], mask[9] = True, True
    model = Fixed(p.log())
    model.config = SimpleNamespace(mask_id=3)
    shown = masking_viz.belief(model, torch.tensor([1, 2]), mask)
    torch.testing.assert_close(shown[[0, 9]], torch.tensor([[math.nan, 0.8], [0.3, 0.8]]), equal_nan=True)
    assert shown[1:9].isnan().all()


def test_masking_viz_shows_what_is_hidden_as_blocks(twins_flags, end):
    lines, result = end(masking_viz, [twins_flags[0], twins_flags[2], "--rows=4", "--prefix-length=6"])
    assert [row["hidden"] for row in result["levels"]] == [2, 3, 5, 6, 8, 10, 11, 13, 14, 16]
    assert sum(row["linear"] for row in result["levels"]) == N  # 20 steps are more than 16 tokens
    views = [line for line in lines if masking_viz.HIDDEN in line]
    hidden = [row["hidden"] for row in result["levels"]] + list(range(1, 11))  # 10 places after the prefix
    assert [view.count(masking_viz.HIDDEN) for view in views] == hidden
    assert all("  the qu" in view for view in views[10:])
    assert not any("\033" in line for line in lines)  # a pipe gets no colours


# --- Writing and judging --------------------------------------------------------------------------


def test_the_figures_are_those_computed_by_hand(twins):
    texts = ["the fox the fox ", "aaaaaaaaaaaaaaaa"]
    tokens = torch.tensor([list(text.encode()) for text in texts])
    found = samplers.figures(twins, tokens)
    shifted = torch.cat([torch.full((2, 1), 257), tokens[:, :-1]], dim=1)
    nats = -twins.judge(shifted).log_softmax(-1).gather(2, tokens[..., None]).squeeze(2).mean(1)
    assert found["judge"] == pytest.approx(nats.mean().item(), abs=1e-4)
    assert found["error"] == pytest.approx(nats.std().item() / 2**0.5, abs=1e-4)
    shares = [count / 16 for count in (2, 2, 2, 4, 2, 2, 2)]  # t, h, e, space, f, o, x
    assert found["entropy"] == pytest.approx(-sum(p * math.log(p) for p in shares) / 2, abs=1e-6)
    assert found["distinct"] == (8 + 1) / 28  # 8 runs of three of "the fox ", repeated, and aaa
    assert found["words"] == 4 / 5


def test_the_distance_from_real_text_adds_relative_differences():
    real = dict(judge=1.0, entropy=2.0, distinct=0.5, words=1.0)
    assert samplers.distance(real, real) == 0
    row = dict(judge=1.5, entropy=1.0, distinct=0.25, words=0.9)
    assert samplers.distance(row, real) == pytest.approx(0.5 + 0.5 + 0.5 + 0.1)


def test_a_row_prints_text_numbers_and_gaps_under_their_names(capsys):
    samplers.show({"sampler": "a", "calls": 1234, "tokens_per_second": None, "judge": 1.5, "options": {}},
                  heading=True)
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split() == ["sampler", "calls", "tokens/s", "judge"]
    assert row.split() == ["a", "1,234", "-", "1.500"]
    assert [len(heading), heading.index("tokens/s") + 8] == [len(row), row.index("-") + 1]


def test_greedy_in_a_fixed_order_is_the_same_for_every_seed_and_in_random_order_is_not(twins):
    def two_seeds(**options):
        return [samplers.write(twins.model, masked(3, N, 257), 257, seed=seed, steps=4, temperature=0.0,
                               **options)[0][-1].tokens for seed in (1, 2)]

    for order in ("left_to_right", "confidence"):
        one, two = two_seeds(order=order)
        assert torch.equal(one, two) and torch.equal(one, one[:1].expand(3, -1))
    one, two = two_seeds(order="random")
    assert not torch.equal(one, two)


def test_shared_runs_are_those_of_other_texts():
    tokens = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 9], [6, 7, 8, 6, 7]])
    # Texts of two runs each: 0 and 1 have one in common, 2 has none with either: 2 x 1/2 of 6 ordered pairs.
    assert sampling_methods.shared_runs(tokens) == pytest.approx(1 / 6)
    assert sampling_methods.shared_runs(tokens[:1].expand(3, -1)) == 1
    assert math.isnan(sampling_methods.shared_runs(tokens[:1]))


def test_calls_are_counted_for_each_text_until_it_is_finished():
    rows = [[[9, 9, 9], [9, 1, 1]], [[9, 9, 1], [1, 1, 1]], [[9, 1, 1], [1, 1, 1]], [[1, 1, 1], [1, 1, 1]]]
    states = [State(torch.tensor(tokens), torch.zeros(2, 3), calls) for calls, tokens in enumerate(rows)]
    assert adaptive.calls_of_texts(states, 9) == (3 + 1) / 2


def test_right_is_the_share_of_hidden_tokens_restored():
    x_0 = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    x = torch.tensor([[9, 2, 9, 4], [9, 9, 7, 8]])
    written = torch.tensor([[1, 2, 0, 4], [5, 6, 7, 8]])
    assert adaptive.right(written, x, x_0, 9) == pytest.approx((0.75, 0.25))


def test_a_sure_model_needs_one_call_and_an_unsure_one_as_many_as_tokens(twins, capsys):
    x = masked(2, 4, 257)
    for p, calls in ((0.99, 1.0), (0.5, 4.0)):
        logits = torch.full((4, 257), math.log((1 - p) / 256))
        logits[:, 7] = math.log(p)
        sure, fixed = adaptive.compare(twins._replace(model=Fixed(logits)), "fill", torch.full_like(x, 7), x,
                                       [0.9], 0.0)
        assert (sure["calls"], fixed["calls"], sure["right"], fixed["right"]) == (calls, calls, 1.0, 1.0)


def test_adaptive_decoding_is_better_only_beyond_two_standard_errors():
    rows = [dict(sampler=how, task=task, calls=3.0, hidden=9, judge=judge, error=0.03, right=right,
                 right_error=0.04) for how, task, judge, right in (
        ("free a", "free", 1.00, 0), ("fixed", "free", 1.09, 0),  # 0.09 > 2 x 0.042
        ("free b", "free", 1.00, 0), ("fixed", "free", 1.08, 0),
        ("fill c", "fill", 0.00, 0.50), ("fixed", "fill", 0.00, 0.62))]  # 0.12 > 2 x 0.057
    said = adaptive.summary(rows)
    assert "in 1 of 3 comparisons, and worse in 1: free a: 3 calls for 9 tokens, 1.00 nats" in said
    assert said.endswith("fill c: 3 calls for 9 tokens, 50.0% right against 62.0%.")


# --- Each script to its end -----------------------------------------------------------------------

FEW = ["--num-samples=3"]


def test_schedules_prices_and_samples(twins_flags, end):
    lines, result = end(schedules, [*twins_flags, *FEW, "--rows=8", "--curve-points=4", "--steps=5"])
    measured = Curve(*result["measured"])
    assert measured.counts == [1, 4, 8, 12, 16]
    for name in SCHEDULES:
        for count, nats in result["table"][name].items():
            assert nats == pytest.approx(schedule_nelbo(measured, name, int(count)))
    assert [(row["schedule"], row["order"]) for row in result["rows"]] == [
        (name, order) for order in ("random", "confidence") for name in (*SCHEDULES, "optimal")]
    assert {row["calls"] for row in result["rows"]} == {5}
    assert sum("optimal, random" in line for line in lines) == 2  # a row, and a sample


def test_sampling_methods_shows_who_repeats_himself(twins_flags, end):
    _, result = end(sampling_methods, [*twins_flags, *FEW, "--steps=4"])
    rows = {row["sampler"]: row for row in result["rows"]}
    assert list(rows) == list(sampling_methods.METHODS)
    fixed = rows["greedy, left to right"]
    assert (fixed["same"], fixed["shared"]) == (1.0, 1.0)
    assert rows["everything"]["same"] < 0.2 and rows["everything"]["shared"] < 0.2


def test_temperature_finds_the_row_nearest_to_real_text(twins_flags, end):
    lines, result = end(temperature, [*twins_flags, *FEW, "--steps=4", "--temperatures", "0", "0.5", "2"])
    assert [(row["sampler"], row["temperature"]) for row in result["rows"]] == [
        (sampler, tau) for sampler in temperature.ORDERS for tau in (0, 0.5, 2)]
    for sampler, tau in result["best"].items():
        line = [row for row in result["rows"] if row["sampler"] == sampler]
        assert min(line, key=lambda row: samplers.distance(row, result["real"]))["temperature"] == tau
    count = sum(0.5 <= tau <= 0.8 for tau in result["best"].values())
    assert f"holds for {count} of 3 orders" in lines[-1]


def test_steps_has_the_exact_price_beside_the_judged_ones(twins_flags, end):
    _, result = end(steps, [*twins_flags, *FEW, "--steps", "1", "4", "64", "--rows=8"])
    assert [(row["sampler"], row["steps"], row["calls"]) for row in result["rows"]] == [
        ("random", 1, 1), ("random", 4, 4), ("random", N, N), ("confident", 1, 1), ("confident", 4, 4),
        ("confident", N, N), ("left to right", N, N)]
    curve = Curve(**result["curve"])
    assert [row["price"] for row in result["rows"]] == [
        *(schedule_nelbo(curve, "linear", count) for count in (1, 4, N)), *[None] * 4]
    assert result["rows"][0]["price"] == curve.nats[-1]  # one-shot: all cost what a token costs from nothing


def test_adaptive_gives_the_fixed_schedule_as_many_calls(twins_flags, end):
    lines, result = end(adaptive, [*twins_flags, *FEW, "--thresholds", "0.01", "1", "--fill-samples=4",
                                   "--length=12", "--share=0.5"])
    assert [(row["task"], row["adaptive"]) for row in result["rows"]] == [
        (task, adaptive) for task in ("free", "fill") for _ in range(2) for adaptive in (True, False)]
    for sure, fixed in zip(result["rows"][::2], result["rows"][1::2], strict=True):
        assert fixed["calls"] == max(1, round(sure["calls"]))
    never = [row["calls"] for row in result["rows"] if row["adaptive"] and row["threshold"] == 1]
    assert never == [12, 6]  # nothing is that sure: a token a call
    # Then both do the same thing, up to the random numbers they draw: filling in, at temperature 0, has none.
    assert result["rows"][-2]["right"] == result["rows"][-1]["right"]
    assert "of 4 comparisons" in lines[-1]


def test_samplers_ends_with_the_nearest_setting(twins_flags, end, monkeypatch):
    few = [("random", dict(steps=2, order="random", remask=remask, temperature=tau))
           for remask in ("none", "renoise") for tau in (0.5, 1.0)]
    monkeypatch.setattr(samplers, "settings", lambda *_: few)
    lines, result = end(samplers, [*twins_flags, *FEW, "--temperatures", "0.5"])
    assert [row["sampler"] for row in result["rows"]] == ["the twin, left to right", *["random"] * 4]
    best = min(result["rows"][1:], key=lambda row: samplers.distance(row, result["real"]))
    assert f"{best['sampler']} at temperature {best['temperature']}" in lines[-1]


def test_the_grid_has_every_order_and_remasking():
    grid = [options for _, options in samplers.settings(64, [0.7, 0.5], 256) if "remask" in options]
    assert len(grid) == 2 * 5 * 7 and {options["steps"] for options in grid} == {64}


@pytest.mark.parametrize("script, flags, says", [
    (temperature, ["--temperatures=-1"], "temperature must be 0 (greedy) or positive, not -1.0"),
    (adaptive, ["--thresholds=2"], "threshold must be in (0, 1], not 2.0"),
    (adaptive, ["--share=0"], "--share must be in (0, 1], not 0.0"),
    (steps, ["--steps=0"], "must be at least 1, not 0"),
    (sampling_methods, ["--num-samples=1"], "must be at least 2, not 1"),
    (schedules, ["--rows=3"], "--rows must be at least 4, not 3"),
    (samplers, ["--checkpoint=nowhere"], "nowhere/model.pt does not exist"),
    (samplers, ["--judge=nowhere"], "configs/quickstart.toml --objective autoregressive --out-dir nowhere"),
    (temperature, ["--data-dir=nowhere"], "no nowhere/meta.json"),
])
def test_mistakes_get_one_line_and_exit_code_2(twins_flags, capsys, script, flags, says):
    try:
        code = script.main([*twins_flags, *flags])
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and error.startswith("experiments.") and says in error


def test_a_twin_sees_no_hidden_text(twins_flags, capsys):
    _, judge, data = twins_flags
    assert masking_viz.main([judge.replace("--judge", "--checkpoint"), data]) == 2
    assert "is autoregressive: it never sees hidden text" in capsys.readouterr().err


def test_a_judge_that_is_no_twin_and_a_prefix_too_long_are_refused(twins_flags, capsys):
    checkpoint, judge, data = twins_flags
    assert steps.main([checkpoint, checkpoint.replace("--checkpoint", "--judge"), data]) == 2
    assert "is no autoregressive twin" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        masking_viz.main([checkpoint, data, "--prefix-length=7"])
    assert "--prefix-length must be in 0..6, not 7" in capsys.readouterr().err


def test_counts_are_whole_and_positive():
    assert lab.count("3") == 3
    with pytest.raises(ValueError):
        lab.count("3.5")
