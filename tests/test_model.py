"""The network: what it may see and say, what it costs, and how far a checkpoint file is trusted."""

import json
import math
import os
import pickle
import random
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

import model
from model import CheckpointError, ModelConfig, Transformer

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
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, net.config.vocab_size + 1, (B, T), generator=generator)


def differs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Which places have other logits: rounding does not count."""
    return (a - b).abs().amax(-1) > 1e-4


# ---- inputs and outputs ---------------------------------------------------------------------------


@pytest.mark.parametrize("V", [2, 5, 64, 65, 257])
def test_logits_are_for_exactly_the_V_real_tokens(V):
    net = randomised(vocab_size=V)
    tokens = some_tokens(net, B=3, T=7)
    assert net(tokens).shape == (3, 7, V)
    assert net(tokens, torch.tensor([0, 20])).shape == (2, V)


@pytest.mark.parametrize("T", [1, 5, 12])
def test_any_length_up_to_the_context_is_accepted(T):
    net = randomised()
    assert net(some_tokens(net, T=T)).shape == (2, T, 11)


def test_a_text_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="12"):
        fresh()(torch.zeros(1, 13, dtype=torch.int64))


@pytest.mark.parametrize("V", [257, 50257])
def test_an_untrained_network_has_a_cross_entropy_of_about_ln_V_at_hidden_places(V):
    # There it sees the mask token, whose embedding, drawn like all others with deviation 0.02, it multiplies
    # with theirs after norm(): logits of deviation 0.02 sqrt(C) = 0.11, which costs half its square.
    net = fresh(vocab_size=V)
    logits = net(torch.full((1, 1), net.config.mask_id))[0, 0]
    cross_entropy = (logits.logsumexp(-1) - logits.mean()).item()  # for a target drawn evenly
    assert math.log(V) <= cross_entropy < math.log(V) + 0.02


def test_an_untrained_block_is_the_identity():
    net = fresh()
    x = torch.randn(2, 12, 32)
    for block in net.blocks:
        assert torch.equal(block(x, model.rotary_table(12, 16)), x)


def test_the_mask_token_is_an_input_of_its_own():
    net = randomised()
    assert net.config.mask_id == net.config.vocab_size == 11
    logits_after = [net(torch.full((1, 1), token)).flatten() for token in range(12)]
    for token in range(11):
        assert (logits_after[token] - logits_after[net.config.mask_id]).abs().max() > 1e-2


def test_padded_rows_of_the_tables_never_reach_the_output():
    net = randomised(vocab_size=65)
    tokens = some_tokens(net)
    before = net(tokens)
    assert len(net.embedding.weight) > 66  # otherwise this proves nothing
    with torch.no_grad():
        net.embedding.weight[66:] = math.nan  # the mask token's row is number 65
    assert torch.equal(net(tokens), before)


def test_asking_for_some_places_gives_rows_of_the_full_answer():
    net = randomised()
    tokens = some_tokens(net)
    positions = torch.tensor([23, 0, 7, 7, 12])  # flat b*T + t, in any order, repeats allowed
    expected = net(tokens)[torch.tensor([1, 0, 0, 0, 1]), torch.tensor([11, 0, 7, 7, 0])]
    torch.testing.assert_close(net(tokens, positions), expected, atol=1e-5, rtol=1e-5)


def test_every_parameter_takes_part_in_the_loss():
    net = randomised()
    tokens = some_tokens(net)
    F.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten().clamp(max=10)).backward()
    for name, weight in net.named_parameters():
        assert weight.grad.abs().max() > 0, name


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_the_network_is_its_recipe_written_out(causal):
    net = randomised(causal=causal).double()
    tokens = some_tokens(net)
    B, T, H, D = 2, 12, 2, 16

    def rms(x):
        return x / x.square().mean(-1, keepdim=True).sqrt()

    def turn(x):  # channels i and i + D/2 are a complex number, multiplied by exp(i * place * frequency)
        angle = torch.arange(T)[:, None] * 10000 ** -(torch.arange(0, D, 2).double() / D)
        turned = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.exp(1j * angle)
        return torch.cat([turned.real, turned.imag], -1)

    visible = torch.ones(T, T).tril().bool() if causal else torch.ones(T, T).bool()
    x = rms(net.embedding.weight[tokens])
    for block in net.blocks:
        qkv = (rms(x) @ block.attention.qkv.weight.T).view(B, T, 3, H, D)
        heads = []
        for h in range(H):
            q, k, v = turn(rms(qkv[:, :, 0, h])), turn(rms(qkv[:, :, 1, h])), qkv[:, :, 2, h]
            scores = (q @ k.mT / D**0.5).masked_fill(~visible, -math.inf)
            heads.append(scores.softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ block.attention.proj.weight.T
        x = x + (rms(x) @ block.up.weight.T).clamp(min=0).square() @ block.down.weight.T
    torch.testing.assert_close(net(tokens), (rms(x) @ net.embedding.weight.T)[..., :11], atol=1e-5, rtol=1e-5)


# ---- who sees whom --------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 5, 11])
def test_a_token_is_seen_from_both_sides(t):
    net = randomised()
    tokens = some_tokens(net)
    changed = tokens.clone()
    changed[:, t] = (changed[:, t] + 1) % 11
    assert differs(net(tokens), net(changed)).all()


@pytest.mark.parametrize("t", [0, 5, 11])
def test_with_causal_a_token_is_seen_from_itself_on_and_never_before(t):
    net = randomised(causal=True)
    tokens = some_tokens(net)
    changed = tokens.clone()
    changed[:, t] = (changed[:, t] + 1) % 11
    assert differs(net(tokens), net(changed)).tolist() == [[place >= t for place in range(12)]] * 2


def test_with_causal_the_logits_of_a_beginning_do_not_depend_on_what_follows():
    net = randomised(causal=True)
    tokens = some_tokens(net)
    torch.testing.assert_close(net(tokens[:, :5]), net(tokens)[:, :5], atol=1e-5, rtol=1e-5)


def test_rows_of_a_batch_do_not_influence_each_other():
    net = randomised()
    tokens = some_tokens(net, B=3)
    together = net(tokens)
    for b in range(3):
        torch.testing.assert_close(net(tokens[b : b + 1])[0], together[b], atol=1e-5, rtol=1e-5)


def test_the_network_knows_the_order_of_its_tokens():
    net = randomised()
    tokens = torch.arange(8)[None]
    swapped = torch.tensor([[0, 1, 2, 3, 5, 4, 6, 7]])
    # Attention without positions is a set function: place 0 could not tell these two texts apart.
    assert differs(net(tokens), net(swapped))[0, 0]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("T", [1, 7, 1024])
def test_attention_written_out_is_the_fused_kernel(T, causal):
    torch.manual_seed(0)
    q, k, v, upstream = torch.randn(4, 2, 3, T, 16)
    results = []
    for function, dtype in ((model.attend_written_out, torch.bfloat16), (model.attend, torch.float32)):
        inputs = [x.to(dtype).requires_grad_() for x in (model.norm(q), model.norm(k), v)]
        y = function(*inputs, causal)
        gradients = torch.autograd.grad(y, inputs, upstream.to(dtype))
        results.append([x.float() for x in (y, *gradients)])
    for written_out, kernel in zip(*results, strict=True):
        # bfloat16 keeps 8 bits, also of what cancels: with one token, q and k have no gradient at all
        assert (written_out - kernel).norm() < 0.02 * kernel.norm() + 0.005 * upstream.norm() * (T == 1)


def test_attention_written_out_bears_the_largest_scores():
    q = torch.full((1, 1, 8, 4096), 1.0, dtype=torch.bfloat16, requires_grad=True)  # scores of 64
    v = torch.randn(1, 1, 8, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = model.attend_written_out(q, q, v, False)
    torch.testing.assert_close(y.float(), v.float().mean(2, keepdim=True).expand_as(v), atol=0.02, rtol=0.02)
    assert torch.autograd.grad(y.sum(), q)[0].isfinite().all()


def test_only_compiled_bfloat16_of_a_cpu_and_short_rows_are_written_out(monkeypatch):
    monkeypatch.setattr(model, "attend_written_out", lambda q, k, v, causal: torch.full_like(v, 7))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)

    def written_out(T, dtype):
        q = torch.ones(1, 1, T, 2, dtype=dtype)
        return model.attend(q, q, q, False).unique().tolist() == [7]

    assert written_out(1024, torch.bfloat16)
    assert not written_out(1025, torch.bfloat16) and not written_out(1024, torch.float32)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    assert not written_out(1024, torch.bfloat16)


def test_rotary_scores_depend_on_the_distance_alone():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 16, generator=generator)
    rotary = model.rotary_table(20, 16)
    rotated_q, rotated_k = (model.rotate(x.expand(1, 1, 20, 16), rotary)[0, 0] for x in (q, k))
    scores = rotated_q @ rotated_k.T  # [i, j] = <R_i q, R_j k>
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], atol=1e-4, rtol=0)  # one value a diagonal
    by_distance = torch.cat([scores[0].flip(0), scores[1:, 0]])  # distances i - j = -19..19
    assert by_distance.unique().numel() == 39  # and a distance, sign included, is told from every other
    torch.testing.assert_close(scores[7, 7], q @ k, atol=1e-4, rtol=0)  # distance 0: no turn at all


def test_rotation_preserves_norms_and_leaves_place_0_alone():
    x = torch.randn(2, 3, 20, 16, generator=torch.Generator().manual_seed(0))
    rotated = model.rotate(x, model.rotary_table(20, 16))
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotated[:, :, 0], x[:, :, 0])
    assert differs(rotated, x)[:, :, 1:].all()


def test_rotary_frequencies_fall_geometrically_from_1():
    cosine, sine = model.rotary_table(5, 8).double()
    turn = torch.atan2(sine[1], cosine[1])  # the angle between neighbours, for each of the 4 pairs
    expected = torch.tensor([1.0, 0.1, 0.01, 0.001])  # 10000^(-2i/8)
    torch.testing.assert_close(turn, expected.double(), atol=1e-7, rtol=1e-5)


# ---- configuration, costs, parameter groups -------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("field", SHAPE)
def test_a_size_below_one_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"\b{field}\b.*{value}"):
        ModelConfig(**SHAPE | {field: value})


@pytest.mark.parametrize("n_embd, n_head", [(32, 3), (30, 2), (6, 6)])
def test_channels_that_heads_or_rotary_pairs_cannot_share_are_refused_by_name(n_embd, n_head):
    # (30, 2) would give heads of 15 channels, (6, 6) of 1: rotary positions need pairs.
    with pytest.raises(ValueError, match="n_embd.*n_head"):
        ModelConfig(**SHAPE | {"n_embd": n_embd, "n_head": n_head})


@pytest.mark.parametrize("V, rows", [(2, 64), (63, 64), (64, 128), (257, 320)])
def test_number_of_parameters_is_the_closed_formula(V, rows):
    # A block: 3C*C for queries, keys, values, C*C for their projection, 4C*C up and 4C*C down: 12 C^2.
    # One table: V+1 embeddings of C channels, rows rounded up to a multiple of 64.
    for L, C in [(1, 32), (3, 48)]:
        net = fresh(vocab_size=V, n_layer=L, n_embd=C)
        assert model.count_parameters(net) == 12 * L * C**2 + rows * C


def test_flops_are_six_per_weight_used_plus_attention():
    config = ModelConfig(vocab_size=100, context_length=10, n_layer=2, n_head=2, n_embd=8)
    # Blocks 6*12*2*64 = 9216, of which the last MLP 6*8*64 = 3072 at a share of the places; the head of 800
    # weights, 6*800 = 4800, likewise; scores and mixing 12*2*8*10 = 1920.
    assert model.flops_per_token(config) == pytest.approx(9216 + 4800 + 1920)
    assert model.flops_per_token(config, predicted_share=0.25) == pytest.approx(6144 + 768 + 1200 + 1920)


def test_flops_of_gpt2_with_half_and_with_the_full_head():
    gpt2 = ModelConfig(vocab_size=50257, context_length=1024, n_layer=12, n_head=12, n_embd=768)
    # 6 * 84,934,656 block weights + 12*12*768*1024 attention = 622.9 M, of it the last MLP 28.3 M;
    # the head 6 * 38,597,376 = 231.6 M
    assert model.flops_per_token(gpt2, 0.5) == pytest.approx(724.6e6, rel=1e-3)
    assert model.flops_per_token(gpt2, 1.0) == pytest.approx(855e6, rel=1e-3)


def test_optimizer_groups_hold_every_parameter_exactly_once():
    net = fresh(n_layer=3)
    matrices, tables = model.optimizer_groups(net)
    assert sorted(map(id, matrices + tables)) == sorted(map(id, net.parameters()))
    assert {id(weight) for weight in matrices} == {id(weight) for weight in net.blocks.parameters()}
    assert all(weight.ndim == 2 for weight in matrices)  # what Muon can orthogonalise


# ---- checkpoints ----------------------------------------------------------------------------------


def write_checkpoint(folder, net, **replaced) -> dict:
    """The file that training writes; `replaced` puts a foreign value in one of its three entries."""
    tensors = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    info = {"format": 1, "model": asdict(net.config), "config": {"objective": "diffusion"},
            "tokenizer": "byte", "step": 7}
    info_text = json.dumps(info | {"evaluation": {"nats": 1.5}})
    content = {"tensors": tensors, "info": info_text, "digest": model.digest(tensors, info_text)}
    torch.save(content | replaced, folder / "model.pt")
    return content


def assert_refused(folder, reason: str | None = None) -> None:
    """As a CheckpointError of one line that names the file, whatever is wrong with it."""
    with pytest.raises(CheckpointError, match=reason) as refusal:
        model.load_checkpoint(folder)
    assert "\n" not in str(refusal.value) and str(folder) in str(refusal.value)


@pytest.mark.parametrize("causal", [False, True])
def test_round_trip_gives_bit_identical_logits(tmp_path, causal):
    net = randomised(causal=causal)
    write_checkpoint(tmp_path, net)
    loaded, info = model.load_checkpoint(tmp_path)
    tokens = some_tokens(net)
    assert torch.equal(loaded(tokens), net(tokens))
    assert loaded.config == net.config and not loaded.training
    assert info["step"] == 7 and info["tokenizer"] == "byte" and info["evaluation"] == {"nats": 1.5}


def test_a_missing_folder_and_a_folder_without_a_checkpoint_are_refused(tmp_path):
    assert_refused(tmp_path, "does not exist")
    assert_refused(tmp_path / "nowhere", "does not exist")


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    write_checkpoint(tmp_path, randomised())
    path = tmp_path / "model.pt"
    data = path.read_bytes()
    for size in [*range(0, len(data), len(data) // 40), len(data) - 1]:
        path.write_bytes(data[:size])
        assert_refused(tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("start", [b"", b"\x80\x02"])  # the second begins like a pickle
def test_a_file_of_random_bytes_is_refused(tmp_path, start):
    source = random.Random(0)
    for _ in range(200):
        (tmp_path / "model.pt").write_bytes(start + source.randbytes(source.randrange(1, 300)))
        assert_refused(tmp_path)


class Payload:
    """Unpickling this calls os.mkdir: harmless, and easy to notice."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, writer):
    path, evidence = tmp_path / "model.pt", tmp_path / "it ran"
    if writer == "torch":
        write_checkpoint(tmp_path, fresh(), info=Payload(evidence))
    else:
        path.write_bytes(pickle.dumps({"tensors": {}, "info": Payload(evidence), "digest": ""}))
    assert_refused(tmp_path)
    assert not evidence.exists()
    # The payload is live: a loader that trusts the file does run it.
    _ = torch.load(path, weights_only=False) if writer == "torch" else pickle.loads(path.read_bytes())
    assert evidence.exists()


@pytest.mark.parametrize("bit", range(8))
def test_a_single_flipped_bit_in_a_tensor_is_noticed(tmp_path, bit):
    tensors = write_checkpoint(tmp_path, randomised())["tensors"]
    path = tmp_path / "model.pt"
    data = bytearray(path.read_bytes())
    start = bytes(data).index(tensors["blocks.1.up.weight"].numpy().tobytes())
    data[start + 4 * 100 + 1] ^= 1 << bit  # in the mantissa of the hundredth number
    path.write_bytes(data)
    assert_refused(tmp_path, "damaged|not a readable")


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_flipped_bit_anywhere_is_noticed_or_harmless(tmp_path):
    net = randomised(n_layer=1, n_embd=4, vocab_size=5)
    write_checkpoint(tmp_path, net)
    path, source, refused = tmp_path / "model.pt", random.Random(0), 0
    data = path.read_bytes()
    for _ in range(400):
        flipped = bytearray(data)
        flipped[source.randrange(len(data))] ^= 1 << source.randrange(8)
        path.write_bytes(flipped)
        try:  # harmless: a bit of the archive's own bookkeeping
            loaded, info = model.load_checkpoint(tmp_path)
            assert info["step"] == 7 and loaded.config == net.config
            assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), net.parameters(), strict=True))
        except CheckpointError:
            refused += 1
    assert refused > 200  # most of the file is not bookkeeping


def test_changed_information_is_noticed(tmp_path):
    info = write_checkpoint(tmp_path, fresh())["info"]
    write_checkpoint(tmp_path, fresh(), info=info.replace('"step": 7', '"step": 8'))
    assert_refused(tmp_path, "damaged")


FOREIGN = {
    "a tensor": torch.zeros(3),
    "a list": [1, 2],
    "nothing": None,
    "another project's weights": {"model_state_dict": {"w": torch.zeros(2, 2)}, "epoch": 3},
    "no tensors in it": {"tensors": {"w": 3}, "info": "{}", "digest": ""},
}


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_from_something_else_is_refused(tmp_path, kind):
    torch.save(FOREIGN[kind], tmp_path / "model.pt")
    assert_refused(tmp_path)


@pytest.mark.parametrize("change", [{"n_layer": 3}, {"n_embd": 64}, {"n_embd": 31}, {"dropout": 0.1}])
def test_weights_of_another_architecture_are_refused(tmp_path, change):
    # Intact, with the right digest, but not what this network is made of.
    content = write_checkpoint(tmp_path, fresh())
    info = json.dumps(json.loads(content["info"]) | {"model": SHAPE | change})
    digest = model.digest(content["tensors"], info)
    write_checkpoint(tmp_path, fresh(), info=info, digest=digest)
    assert_refused(tmp_path, "does not fit")
