"""A checkpoint comes back exactly as it was written, or it is refused in one line."""

import json
import os
import random
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from model import ModelConfig, Transformer
from plumbing import checkpoint
from plumbing.checkpoint import CheckpointError, load_checkpoint, read_tensors, write_tensors

FIXTURES = Path(__file__).parents[1] / "fixtures"
SHAPE = dict(vocab_size=11, context_length=12, n_layer=2, n_head=2, n_embd=32)
INFO = {"model": SHAPE, "config": {"objective": "diffusion"}, "tokenizer": "byte", "step": 7}


@torch.no_grad()
def network(**changes) -> Transformer:
    """One that computes something: fresh ones have output projections of zero."""
    torch.manual_seed(0)
    net = Transformer(ModelConfig(**SHAPE | changes)).eval()
    for weight in net.parameters():
        weight.normal_(std=weight.size(-1) ** -0.5)
    return net


def refusal(path: Path) -> str:
    """What a file, or the checkpoint of a folder, is refused with: one line that names it."""
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(path) if path.is_dir() else read_tensors(path)
    message = str(refused.value)
    assert message.isprintable() and str(path) in message
    return message


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


# ---- what comes back -----------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_computes_what_it_computed(tmp_path, causal, dtype):
    net = network(causal=causal)
    info = INFO | {"model": asdict(net.config), "evaluation": {"nats": 1.5}}
    weights = {name: tensor.to(dtype) for name, tensor in net.state_dict().items()}
    write_tensors(tmp_path / "model.safetensors", weights, info)
    loaded, found = load_checkpoint(tmp_path)
    net.load_state_dict(weights)  # rounded, if they are stored in half the bytes
    tokens = torch.randint(0, 12, (2, 12), generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded(tokens), net(tokens))
    assert loaded.config == net.config and not loaded.training and found == info


def test_all_kinds_of_tensors_come_back_here_and_in_the_safetensors_package(tmp_path):
    path = tmp_path / "state.safetensors"
    tensors = {
        "half": torch.randn(3).bfloat16(),  # 6 bytes: what followed it would not be aligned
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "transposed": torch.randn(3, 4).T,
        "a step": torch.tensor(3.0),
        "expanded": torch.ones(1).expand(5),
        "double": torch.tensor([0.1, float("inf")]).double(),
        "integers": torch.tensor([2**62, -1]),
        "no losses": torch.zeros(0, dtype=torch.float64),
        "no rows \u05e9": torch.zeros(3, 0),
    }
    info = {"step": 3, "text": 'a "\u05e9"\n\ud800', "nothing": None, "nested": [[1.5], {}]}
    write_tensors(path, tensors, info)
    found = read_tensors(path)
    assert same(found[0], tensors) and found[1] == info
    with safe_open(path, "pt") as file:
        assert same({name: file.get_tensor(name) for name in file.keys()}, tensors)  # noqa: SIM118
        assert file.metadata().keys() == {"format", "info", "digest"}
    # Every tensor begins at a multiple of its own item size, as a reader that maps files expects.
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, tensor in tensors.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.itemsize == 0


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda part, path: calls.append((part.name, path.name)))
    write_tensors(tmp_path / "model.safetensors", {}, INFO)
    assert calls == ["fsync", ("model.safetensors.part", "model.safetensors")]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensors(path, network().state_dict(), INFO)
    before = path.read_bytes()
    (tmp_path / "model.safetensors.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="^step 7 cannot be saved; is the disk full.*No space.*$"):
        write_tensors(path, network().state_dict(), INFO)
    assert path.read_bytes() == before


# ---- what is refused -----------------------------------------------------------------------------


def test_a_missing_checkpoint_and_one_of_an_older_version_are_named(tmp_path):
    assert "does not exist: train a model first" in refusal(tmp_path)
    assert "does not exist: train a model first" in refusal(tmp_path / "nowhere")
    old = "is a pickle, from an older version: train again"
    assert f"model.pt {old}" in refusal(FIXTURES / "old")
    (tmp_path / "state.pt").touch()
    with pytest.raises(CheckpointError, match=f"state.pt {old}"):
        read_tensors(tmp_path / "state.safetensors")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(3)}, path)  # of the right layout, but somebody else's
    assert "its format is None, not '2'" in refusal(path)
    save_file({"w": torch.zeros(3)}, path, {"format": "pt"})
    assert "its format is 'pt', not '2'" in refusal(path)
    for info in ([1, 2], None, "step", float("nan")):
        write_tensors(path, {}, info)
        assert "its info is" in refusal(path)
    shutil.copy(FIXTURES / "old/model.pt", path)
    assert "its header would have" in refusal(path)
    path.unlink()
    path.mkdir()
    assert "it is not a file" in refusal(tmp_path)
    path.rmdir()
    os.mkfifo(path)  # to open it would wait for a writer, for ever
    assert "it is not a file" in refusal(path)


def test_a_file_is_refused_wherever_it_ends(tmp_path):
    path = tmp_path / "model.safetensors"
    data = (FIXTURES / "first/model.safetensors").read_bytes()
    for size in [*range(0, len(data), 7), len(data) - 1]:
        path.write_bytes(data[:size])
        refusal(path)
    path.write_bytes(data + b"\0")
    assert "it goes on after its last tensor" in refusal(path)


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    write_tensors(path, {"w": torch.zeros(10**5)}, INFO)
    real = checkpoint.read_header

    def cut(file):
        header = real(file)
        os.truncate(path, 10**5)
        return header

    monkeypatch.setattr(checkpoint, "read_header", cut)
    assert "it became shorter" in refusal(path)


def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path):
    path = tmp_path / "model.safetensors"
    data = (FIXTURES / "first/model.safetensors").read_bytes()
    source = random.Random(0)
    for i in range(0, len(data), 3):
        flipped = bytearray(data)
        flipped[i] ^= 1 << source.randrange(8)
        path.write_bytes(flipped)
        refusal(path)


@pytest.mark.parametrize("change", [
    {"n_layer": 3}, {"n_embd": 64}, {"n_embd": 31}, {"dropout": 0.1}, {"vocab_size": 64}], ids=str)
def test_weights_of_another_architecture_are_refused(tmp_path, change):
    info = INFO | {"model": SHAPE | change}
    write_tensors(tmp_path / "model.safetensors", network().state_dict(), info)
    assert "does not fit this model.py" in refusal(tmp_path)
