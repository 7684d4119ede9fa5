"""What is compared must compute the same thing."""

import json

import pytest
import torch

import diffusion
from bench import sampling, training
from model import ModelConfig, Transformer
from tests.test_sampling import EXACT, JOINT, ROWS, T, V, chi_square_p, counts_of, masked, seeded


@pytest.fixture
def twin():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(20, 16, n_layer=2, n_head=2, n_embd=32, causal=True))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_the_cache_changes_nothing(twin):
    x = torch.full((3, 16), 20)
    x[:, :4] = torch.randint(20, (3, 4), generator=seeded(0))
    model = diffusion.left_to_right_model(twin, 20)
    for temperature in (0.0, 1.0):
        plain = diffusion.generate(model, x, 20, steps=12, order="left_to_right", temperature=temperature,
                                   generator=seeded(1))
        cached = sampling.write_cached(twin, x, temperature, seeded(1))
        assert torch.equal(cached[:, :4], x[:, :4]) and (cached < 20).all()
        if temperature == 0:
            assert torch.equal(cached, plain)
    with torch.no_grad():  # and call by call, the logits
        cache = sampling.CachedTwin(twin)
        starts = torch.cat([torch.full((3, 1), 20), plain[:, :-1]], 1)
        logits = [cache(starts[:, :3]), *(cache(starts[:, t : t + 1]) for t in range(3, 16))]
        torch.testing.assert_close(torch.stack(logits, 1), twin(starts)[:, 2:], rtol=1e-4, atol=1e-4)


def test_the_straightforward_loop_draws_from_the_same_distribution():
    x = sampling.write_straightforward(EXACT_EVERYWHERE, masked(ROWS, T, V), V, steps=T, generator=seeded(0))
    assert chi_square_p(counts_of(x, V), JOINT) > 1e-3


def EXACT_EVERYWHERE(tokens):
    return EXACT(tokens).nan_to_num(0.0)  # the table poisons what should not be asked; this loop asks it


def test_the_ways_to_train_have_the_same_loss_and_gradients():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(20, 16, n_layer=2, n_head=2, n_embd=32))
    x_0 = torch.randint(20, (4, 16), generator=seeded(0))
    batch = diffusion.corrupt(x_0, 20, seeded(1))
    gradients = []
    for loss, question in ((diffusion.loss, batch), (training.full_loss, training.everywhere(batch, x_0))):
        model.zero_grad()
        loss(model, question).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("module, arguments", [
    (training, ["--rows", "2", "--context-length", "16", "--n-embd", "48", "--warm-up", "1"]),
    (sampling, ["--new-tokens", "6", "--batch-sizes", "1", "--steps", "2", "3"]),
])
def test_a_bench_ends_with_one_json_line(module, arguments, capsys, monkeypatch):
    quickly = ["--shape", "quickstart", "--repeats", "1", "--no-compile", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["bench", *quickly, "--precision", "float32", *arguments])
    monkeypatch.setattr(training, "matmul_ceiling", lambda device, dtype: 1e11)
    assert module.main() == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = last["rows"] if "rows" in last and isinstance(last["rows"], list) else list(last["ways"].values())
    assert len(rows) >= 4 and all(row["tokens_per_second"] > 0 for row in rows)
