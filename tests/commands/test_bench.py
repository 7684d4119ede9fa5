"""What is compared in speed must compute the same thing."""

import json
from pathlib import Path

import pytest
import torch
from oracles import EXACT, JOINT, ROWS, Exact, T, V, fits, masked, seeded

import diffusion
from bench import gpu, sampling, training, transformers_baseline
from model import ModelConfig, Transformer, optimizer_groups
from sample import generate, left_to_right_model

CONFIG = ModelConfig(20, 16, n_layer=2, n_head=2, n_embd=32)
ROOT = Path(gpu.__file__).parents[1]
QUICK = "--repeats=1 --no-compile --device=cpu --precision=float32".split()


@pytest.fixture
def twin() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(20, 16, n_layer=2, n_head=2, n_embd=32, causal=True))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_the_cache_changes_nothing(twin):
    x = torch.full((3, 16), 20)
    x[:, :4] = torch.randint(20, (3, 4), generator=seeded(0))
    cached = sampling.CachedTwin(twin, 3)
    greedy = sampling.write_cached(cached, x, 0.0)
    assert torch.equal(greedy, generate(left_to_right_model(twin, 20), x, 20, temperature=0,
                                        order="left_to_right"))
    drawn = sampling.write_cached(cached, x, 1.0, seeded(1))  # in the old cache, all overwritten
    assert torch.equal(drawn[:, :4], x[:, :4]) and (drawn < 20).all()
    with torch.no_grad():  # and call by call, the logits
        starts = diffusion.shift_right(drawn, 20)
        pieces = torch.arange(16).split([3] + [1] * 13)
        cached.restart()
        logits = [cached(starts[:, at], at) for at in pieces]
        torch.testing.assert_close(torch.stack(logits, 1), twin(starts)[:, 2:], rtol=1e-4,
                                   atol=1e-4)


def test_the_straightforward_loop_draws_from_the_same_distribution():
    everywhere = Exact(JOINT, poison=False)  # this loop looks at given tokens, too
    x = sampling.write_straightforward(everywhere, masked(ROWS, T, V), V, T, seeded(0))
    assert fits(x, JOINT)
    assert fits(generate(EXACT, masked(ROWS, T, V), V, seeded(0)), JOINT)


def test_the_ways_to_train_have_the_same_loss_and_gradients():
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    x_0 = torch.randint(20, (4, 16), generator=seeded(0))
    batch = diffusion.corrupt(x_0, 20, generator=seeded(1))
    gradients = []
    for loss, question in ((diffusion.loss, batch),
                           (training.full_loss, training.everywhere(batch, x_0))):
        model.zero_grad()
        loss(model, question).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_timed_trains(optimizer):
    flags = ["--rows=4", "--context-length=16", "--n-embd=48", f"--optimizer={optimizer}"]
    args = training.parse([*QUICK, *flags])
    for name in training.WAYS:
        way = training.Way(name, args)
        first = way.turn(0, 1)
        assert first == pytest.approx(5.55, abs=0.1)  # ln 257
        for _ in range(3):
            last = way.turn(0, 1)
        assert last < first
        assert way.predicted_fraction == (17 / 32 if name == "masked" else 1)


@pytest.mark.parametrize("module, flags, speeds", [
    (training, "--rows 2 --context-length 16 --n-embd 48 --warm-up 1",
     lambda result: [way["tokens_per_second"] for way in result["ways"].values()]),
    (sampling, "--new-tokens 6 --batch-sizes 1 --steps 2 3",
     lambda result: [row["tokens_per_second"] for row in result["rows"]]),
])
def test_a_bench_ends_with_one_json_line(module, flags, speeds, capsys, monkeypatch):
    monkeypatch.setattr(training, "matmul_ceiling", lambda device, dtype: 1e11)
    assert module.main(["--shape", "quickstart", *QUICK, *flags.split()]) == 0
    found = speeds(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert len(found) >= 4 and min(found) > 0


# --- A GPU in a few minutes -----------------------------------------------------------------------


def test_a_part_that_fails_or_takes_too_long_costs_the_others_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "OUT", tmp_path)
    report = gpu.Report("a machine", seconds=60)
    assert report.run("good", "-c 'print(1); print(2)'", 30) == ("1\n2\n", "")
    stdout, problem = report.run("bad", "-c 'print(1); raise SystemExit(3)'", 30)
    assert stdout == "1\n" and problem.startswith("exit code 3: see ")
    endless = "-c 'import time; print(1, flush=True); time.sleep(60)'"
    assert report.run("endless", endless, 5) == ("1\n", "stopped after 5 s")
    report.deadline = 0
    assert report.run("late", "-c 'print(1)'", 30) == ("", "no time was left")
    report.add("python x.py", "3 | 4\n5", {"speed": 3})
    report.add("python y.py", problem)
    assert "| `python x.py` | 3 / 4 5 |\n" in (tmp_path / "results.md").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["parts"] == {"python x.py": {"speed": 3}, "python y.py": None}


@pytest.mark.slow
def test_the_whole_of_make_gpu_in_tiny_sizes(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(gpu, "OUT", tmp_path)
    assert gpu.main(["--smoke", "--minutes=20"]) == 0
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert len(parts) == 11  # proofs, ceilings, 2 ways to train, sampling, 3 runs and their texts
    rows = (tmp_path / "results.md").read_text()
    for problem in ("exit code", "stopped after", "no time", "left out", "failed"):
        assert problem not in rows, rows
    assert " passed" in rows
    assert rows.count("after 30 steps <= ") == 3


# --- The classical stack --------------------------------------------------------------------------


def test_the_classical_stack_hides_tokens_and_scores_them_as_we_do():
    torch.manual_seed(0)
    model, collator = transformers_baseline.roberta(CONFIG, mlm_probability=0.5)
    assert model.config._attn_implementation == "sdpa"
    clean = torch.randint(20, (40, 16), generator=seeded(0)) + transformers_baseline.SPECIAL
    none = torch.zeros(16, dtype=torch.int64)
    batch = collator([{"input_ids": row, "special_tokens_mask": none} for row in clean])
    hidden = batch["labels"] != -100
    assert hidden.float().mean() == pytest.approx(0.5, abs=0.06)
    mask_token = 20 + transformers_baseline.SPECIAL
    assert torch.equal(batch["input_ids"], clean.masked_fill(hidden, mask_token))
    assert torch.equal(batch["labels"][hidden], clean[hidden])
    output = model(input_ids=batch["input_ids"], labels=batch["labels"])
    p = output.logits.softmax(-1)[hidden].gather(1, clean[hidden][:, None])
    assert output.loss.item() == pytest.approx(-p.log().mean().item(), abs=1e-5)
    ours = sum(p.numel() for p in optimizer_groups(Transformer(CONFIG))[0])
    theirs = sum(p.numel() for p in model.roberta.encoder.parameters() if p.dim() == 2)
    assert ours == theirs  # the same matrices


def test_the_classical_stack_is_measured_beside_ours(capsys, monkeypatch):
    monkeypatch.setattr(transformers_baseline, "SHAPES", {"tiny": (CONFIG, 4, 4)})
    flags = ["--shape=tiny", *QUICK, "--repeats=2", "--warm-up=1"]
    assert transformers_baseline.main(flags) == 0
    output, progress = capsys.readouterr()
    result = json.loads(output.splitlines()[-1])
    speeds = {name: way["tokens_per_second"] for name, way in result["ways"].items()}
    assert list(speeds) == ["masked", "roberta"] and min(speeds.values()) > 0
    assert result["ratio"] == speeds["masked"] / speeds["roberta"]
    assert [line.split()[4] for line in progress.splitlines()] == ["masked:", "roberta:"] * 3
