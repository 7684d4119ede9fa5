"""The network: what it may see and say, what it computes, and what that costs."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracles import seeded

import model
from model import ModelConfig, Transformer
from plumbing.machine import attention_written_out, count_parameters, flops_per_token

SHAPE = {"vocab_size": 11, "context_length": 12, "n_layer": 2, "n_head": 2, "n_embd": 32}


def fresh(**changes) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**SHAPE | changes)).eval()


@torch.no_grad()
def randomised(**changes) -> Transformer:
    """A network that computes something: fresh ones have output projections of zero."""
    net = fresh(**changes)
    for weight in net.parameters():
        weight.normal_(std=weight.size(-1) ** -0.5)
    return net


def some_tokens(net: Transformer, B: int = 2, T: int = 12) -> torch.Tensor:
    """Random inputs, the mask token among them."""
    return torch.randint(0, net.config.vocab_size + 1, (B, T), generator=seeded(1))


# --- Inputs and outputs ---------------------------------------------------------------------------


@pytest.mark.parametrize("V", [2, 5, 64, 65, 257])
def test_logits_are_for_exactly_the_V_real_tokens_in_texts_up_to_the_context(V):
    net = randomised(vocab_size=V)
    for T in (1, 7, 12):
        assert net(some_tokens(net, 3, T)).shape == (3, T, V)
        assert net(some_tokens(net, 3, T), torch.tensor([0, 3 * T - 1])).shape == (2, V)
    with pytest.raises(ValueError, match="13 tokens .* 12"):
        net(torch.zeros(1, 13, dtype=torch.int64))


def test_asking_for_some_positions_gives_rows_of_the_full_answer():
    net = randomised()
    tokens = some_tokens(net)
    positions = torch.tensor([23, 0, 7, 7, 12])  # flat b*T + t, in any order, repeats allowed
    expected = net(tokens)[torch.tensor([1, 0, 0, 0, 1]), torch.tensor([11, 0, 7, 7, 0])]
    torch.testing.assert_close(net(tokens, positions), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_mask_token_is_an_input_of_its_own_and_padding_reaches_no_output():
    net = randomised(vocab_size=65)
    assert net.config.mask_id == net.config.vocab_size == 65 and len(net.embedding.weight) > 66
    alone = net(torch.arange(66)[:, None])[:, 0]  # (66,V): what the network says of each input
    assert ((alone[:65] - alone[65]).abs().amax(1) > 1e-2).all()
    net.embedding.weight[66:] = math.nan  # the mask token's row is number 65
    assert torch.equal(net(torch.arange(66)[:, None])[:, 0], alone)


@pytest.mark.parametrize("V", [257, 50257])
def test_an_untrained_network_is_the_identity_and_as_good_as_guessing(V):
    net = fresh(vocab_size=V)
    x = torch.randn(2, 12, 32)
    assert all(torch.equal(block(x, model.rotary_table(12, 16)), x) for block in net.blocks)
    # At hidden positions it multiplies the mask token's embedding, after norm(), with all others,
    # of deviation 0.02: logits of deviation 0.02 sqrt(C) = 0.11, which costs half its square.
    logits = net(torch.full((1, 1), net.config.mask_id))[0, 0]
    cross_entropy = (logits.logsumexp(-1) - logits.mean()).item()  # of a target drawn evenly
    assert math.log(V) <= cross_entropy < math.log(V) + 0.02


def test_every_parameter_takes_part_in_learning_and_in_one_optimizer_group():
    net = randomised()
    tokens = some_tokens(net)
    F.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten().clamp(max=10)).backward()
    assert all(weight.grad.abs().max() > 0 for weight in net.parameters())
    matrices, tables = model.optimizer_groups(net)
    assert sorted(map(id, matrices + tables)) == sorted(map(id, net.parameters()))
    # What Muon is to orthogonalise: the matrices that are multiplied with, four in each block.
    assert len(matrices) == 4 * net.config.n_layer
    assert all(min(weight.shape) >= net.config.n_embd for weight in matrices)


# --- What it computes -----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_the_network_is_its_recipe_written_out(causal):
    net = randomised(causal=causal).double()
    tokens = some_tokens(net)
    B, T, H, D = 2, 12, 2, 16

    def rms(x):
        return x / x.square().mean(-1, keepdim=True).sqrt()

    def turn(x):  # channels i and i + D/2 are a complex number, times exp(i * position * frequency)
        angle = torch.arange(T)[:, None] * 10000 ** -(torch.arange(0, D, 2).double() / D)
        turned = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.exp(1j * angle)
        return torch.cat([turned.real, turned.imag], -1)

    visible = torch.ones(T, T).tril().bool() if causal else torch.ones(T, T).bool()
    x = rms(net.embedding.weight[tokens])
    for block in net.blocks:
        alone = rms(x)
        x = x.clone()
        for t in range(T):
            if t > 0:
                x[:, t] += block.neighbours[0] * alone[:, t - 1]
            if t + 1 < T and not causal:
                x[:, t] += block.neighbours[1] * alone[:, t + 1]
        qkv = (rms(x) @ block.attention.qkv.weight.T).view(B, T, 3, H, D)
        heads = []
        for h in range(H):
            q, k, v = turn(rms(qkv[:, :, 0, h])), turn(rms(qkv[:, :, 1, h])), qkv[:, :, 2, h]
            scores = (q @ k.mT / D**0.5).masked_fill(~visible, -math.inf)
            heads.append(scores.softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ block.attention.proj.weight.T
        x = x + (rms(x) @ block.up.weight.T).clamp(min=0).square() @ block.down.weight.T
    expected = (rms(x) @ net.embedding.weight.T)[..., :11]
    torch.testing.assert_close(net(tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("t", [0, 5, 11])
def test_a_token_is_seen_from_both_sides_but_with_causal_never_before_itself(t, causal):
    net = randomised(causal=causal)
    tokens = some_tokens(net)
    changed = tokens.clone()
    changed[0, t] = (changed[0, t] + 1) % 11
    differs = (net(tokens) - net(changed)).abs().amax(-1) > 1e-4  # rounding does not count
    assert differs[0].tolist() == [not causal or position >= t for position in range(12)]
    assert not differs[1].any()  # rows do not influence each other


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 16, generator=seeded(0))
    rotary = model.rotary_table(20, 16)
    rotated = [model.rotate(x.expand(1, 20, 1, 16), rotary)[0, :, 0] for x in (q, k)]
    scores = rotated[0] @ rotated[1].T  # [i, j] = <R_i q, R_j k>
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], atol=1e-4, rtol=0)  # by diagonal
    by_distance = torch.cat([scores[0].flip(0), scores[1:, 0]])  # distances i - j = -19..19
    assert by_distance.unique().numel() == 39  # each, sign included, is told from every other
    torch.testing.assert_close(scores[7, 7], q @ k, atol=1e-4, rtol=0)  # distance 0: no turn at all
    cosine, sine = model.rotary_table(5, 8).double().squeeze(2)
    angles = torch.atan2(sine[1], cosine[1])  # between neighbours, for each of the 4 pairs
    expected = torch.tensor([1.0, 0.1, 0.01, 0.001]).double()  # 10000^(-2i/8)
    torch.testing.assert_close(angles, expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("T", [1, 7, 1024])
def test_attention_written_out_is_the_fused_kernel(T, causal):
    q, k, v, upstream = torch.randn(4, 2, 3, T, 16, generator=seeded(0))
    results = []
    for attend, dtype in ((attention_written_out, torch.bfloat16), (model.attend, torch.float32)):
        inputs = [x.to(dtype).requires_grad_() for x in (model.norm(q), model.norm(k), v)]
        y = attend(*inputs, causal)
        gradients = torch.autograd.grad(y, inputs, upstream.to(dtype))
        results.append([x.float() for x in (y, *gradients)])
    for written_out, kernel in zip(*results, strict=True):
        # bfloat16 keeps 8 bits, also of what cancels: with one token, q and k have no gradient
        noise = 0.005 * upstream.norm() * (T == 1)
        assert (written_out - kernel).norm() < 0.02 * kernel.norm() + noise


def test_attention_written_out_bears_the_largest_scores():
    q = torch.full((1, 1, 8, 4096), 1.0, dtype=torch.bfloat16, requires_grad=True)  # scores of 64
    v = torch.randn(1, 1, 8, 4096, generator=seeded(0)).bfloat16()
    y = attention_written_out(q, q, v, False)
    expected = v.float().mean(2, keepdim=True).expand_as(v)
    torch.testing.assert_close(y.float(), expected, atol=0.02, rtol=0.02)
    assert torch.autograd.grad(y.sum(), q)[0].isfinite().all()


def test_only_compiled_bfloat16_of_a_cpu_and_short_rows_are_written_out(monkeypatch):
    monkeypatch.setattr(model, "attention_written_out", lambda q, k, v, causal: v * 0 + 7)

    def written_out(compiling, T, dtype):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        q = torch.ones(1, 1, T, 2, dtype=dtype)
        return (model.attend(q, q, q, False) == 7).all()

    assert written_out(True, 1024, torch.bfloat16)
    assert not written_out(True, 1025, torch.bfloat16)
    assert not written_out(True, 1024, torch.float32)
    assert not written_out(False, 1024, torch.bfloat16)


# --- Configuration, costs, parameter groups -------------------------------------------------------


@pytest.mark.parametrize("changes, named", [
    *(({name: value}, rf"\b{name}\b.*{value}") for name in SHAPE for value in (0, -1, 1.5, True)),
    # (30, 2) would give heads of 15 channels, (6, 6) of 1: rotary embeddings turn pairs
    *(({"n_embd": C, "n_head": H}, f"n_embd {C}.*n_head") for C, H in ((32, 3), (30, 2), (6, 6))),
    ({"causal": 1}, "causal.*1"), ({"context_length": 2**30}, f"context_length {2**30}"),
], ids=str)
def test_a_shape_that_makes_no_sense_is_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        ModelConfig(**SHAPE | changes)


@pytest.mark.parametrize("V, rows", [(2, 64), (63, 64), (64, 128), (257, 320)])
def test_number_of_parameters_is_the_closed_formula(V, rows):
    # A block: 3C*C for queries, keys and values, C*C for their projection, 4C*C up and 4C*C down.
    # for the two neighbours 2C. One table: V+1 embeddings of C channels, rows rounded up to a
    # multiple of 64.
    for L, C in [(1, 32), (3, 48)]:
        net = fresh(vocab_size=V, n_layer=L, n_embd=C)
        assert count_parameters(net) == 12 * L * C**2 + 2 * L * C + rows * C


def test_flops_are_six_per_weight_used_plus_attention():
    config = ModelConfig(vocab_size=100, context_length=10, n_layer=2, n_head=2, n_embd=8)
    # Blocks 6*12*2*64 = 9216, of which the last MLP 6*8*64 = 3072 at a fraction of the positions;
    # the head 6*800 = 4800, likewise; scores and mixing 12*2*8*10 = 1920.
    assert flops_per_token(config) == pytest.approx(9216 + 4800 + 1920)
    assert flops_per_token(config, 0.25) == pytest.approx(6144 + 768 + 1200 + 1920)
    # GPT-2: 6 * 84,934,656 block weights + 12*12*768*1024 attention = 622.9 M, of it the last MLP
    # 28.3 M; the head 6 * 38,597,376 = 231.6 M
    gpt2 = ModelConfig(50257, context_length=1024, n_layer=12, n_head=12, n_embd=768)
    assert flops_per_token(gpt2, predicted_fraction=0.5) == pytest.approx(724.6e6, rel=1e-3)
    assert flops_per_token(gpt2) == pytest.approx(855e6, rel=1e-3)
