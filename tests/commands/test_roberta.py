"""RoBERTa as a diffusion model: the logits of transformers, and folders that are no RoBERTa."""

import json
import random
import socket
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracles import seeded

import diffusion
from experiments import roberta_start
from experiments.lab.runs import OUT
from experiments.roberta_start import Roberta, load_roberta, random_roberta, read_tokens
from prepare_data import DataError, write_dataset
from sample import generate

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
safetensors = pytest.importorskip("safetensors.torch")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

MERGES = ["t h", "Ġ th", "th e", "Ġ the", "Ġ a", "e r", "i n", "in g"]
TEXTS = ["The house of the people was the first of the houses. " * 30,
         "It's a day; another day. Café \U0001f600\n" * 20]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """The folder of a small RoBERTa of random weights, as they are published."""
    folder = tmp_path_factory.mktemp("roberta")
    words = [*tokenizers.pre_tokenizers.ByteLevel.alphabet(),
             *(merge.replace(" ", "") for merge in MERGES)]
    random.Random(0).shuffle(words)
    words = ["<s>", "<pad>", "</s>", "<unk>", *words, "<mask>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    torch.manual_seed(0)
    network = transformers.RobertaForMaskedLM(transformers.RobertaConfig(
        vocab_size=len(words) + 3, hidden_size=24, num_hidden_layers=3, num_attention_heads=3,
        intermediate_size=40, max_position_embeddings=70, layer_norm_eps=1e-5))
    with torch.no_grad():  # biases and norms too
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    network.save_pretrained(folder)
    return folder


@pytest.fixture
def model(published) -> Roberta:
    return load_roberta(published)


@pytest.fixture
def copy(published, tmp_path) -> Path:
    """A folder like `published`, to be damaged."""
    for path in published.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture
def texts(workplace, monkeypatch) -> Path:
    """A corpus of these texts, and small rows to learn it from."""
    monkeypatch.setattr(roberta_start, "ROWS", 4)
    monkeypatch.setattr(roberta_start, "LENGTH", 16)
    monkeypatch.setattr(roberta_start, "EVAL_ROWS", 8)
    documents = [(split, [text]) for split in ("train", "val") for text in TEXTS]
    write_dataset(iter(documents), "byte", Path("texts"), "a test")
    return Path("texts")


# --- The network ----------------------------------------------------------------------------------


def test_logits_are_those_of_transformers(published, model):
    theirs = transformers.RobertaForMaskedLM.from_pretrained(published).eval()
    tokens = torch.randint(4, 268, (4, 7), generator=seeded(0))
    tokens[0] = tokens[1, 3] = model.mask_id
    positions = torch.tensor([0, 10, 27])
    with torch.no_grad():
        logits = model(tokens)  # (4,7,V)
        expected = theirs(F.pad(F.pad(tokens, (1, 0), value=0), (0, 1), value=2)).logits[:, 1:-1]
        some = model(tokens, positions)
    assert expected.std() > 1  # so that 1e-4 says something
    torch.testing.assert_close(logits[..., 4:268], expected[..., 4:268], atol=1e-4, rtol=0)
    torch.testing.assert_close(some, logits.flatten(0, 1)[positions], atol=1e-5, rtol=0)


def test_no_special_token_and_no_spare_row_is_ever_written(model):
    x = torch.full((20, 16), model.mask_id)
    x[:, 3] = 99
    written = generate(model, x, model.mask_id, seeded(1))
    assert model.mask_id == 268 and written.min() >= 4 and written.max() < 268
    assert (written[:, 3] == 99).all() and len(written.unique()) > 50


def test_from_random_weights_each_head_looks_at_a_position_of_its_own(model):
    config = transformers.RobertaConfig(
        vocab_size=300, hidden_size=96, num_hidden_layers=50, num_attention_heads=3,
        intermediate_size=96, max_position_embeddings=64, type_vocab_size=1)
    network = random_roberta(config, model.tokenizer, seed=0).network.roberta
    x = network.embeddings.position_embeddings(torch.arange(20, 50))
    scores = 0  # (heads, from, to), added up over layers: each is blurred by its random matrices
    for layer in network.encoder.layer:
        attention = layer.attention.self
        q, k = (part(x).view(30, 3, 32).transpose(0, 1) for part in (attention.query,
                                                                     attention.key))
        scores = scores + q @ k.mT
    looked_at = scores.argmax(2) - torch.arange(30)
    assert [row[1:-1].tolist() for row in looked_at] == [[offset] * 28 for offset in (-1, 0, 1)]


# --- The folder -----------------------------------------------------------------------------------


def edit(name, **changes):
    """A damage: other values in a JSON file of the folder; None removes one."""
    def damage(folder):
        content = json.loads((folder / name).read_text()) | changes
        content = {key: value for key, value in content.items() if value is not None}
        (folder / name).write_text(json.dumps(content))
    return damage


def replace(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(name):
    return lambda folder: (folder / name).unlink()


def lose_a_tensor(folder):
    path = folder / "model.safetensors"
    tensors = safetensors.load_file(path)
    del tensors["lm_head.dense.weight"]
    path.unlink()  # the tensors just read may still be in the old file
    safetensors.save_file(tensors, path, metadata={"format": "pt"})


def only_a_pickle(folder):
    tensors = safetensors.load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


DAMAGES = [
    (remove("config.json"), "config.json"),
    (replace("config.json", "{"), ""),
    (replace("config.json", "[]"), ""),
    (edit("config.json", model_type="bert"), "its model_type is not roberta"),
    (edit("config.json", model_type=None), "model_type"),
    (edit("config.json", is_decoder=True), "or it is a decoder"),
    (edit("config.json", hidden_size="24"), "hidden_size"),
    (edit("config.json", num_hidden_layers=4), "it lacks 16 tensors"),
    (edit("config.json", num_attention_heads=5), "not a multiple of the number of attention heads"),
    (edit("config.json", hidden_size=48), "size"),
    (edit("config.json", max_position_embeddings=50), "size"),
    (remove("vocab.json"), ""),
    (remove("merges.txt"), ""),
    (replace("vocab.json", "{"), ""),
    (replace("vocab.json", '{"a": 0, "<mask>": 1}'), ""),
    (replace("merges.txt", "x y\n"), ""),
    (remove("model.safetensors"), "model.safetensors"),
    (only_a_pickle, "model.safetensors"),
    (replace("model.safetensors", "\x10\0\0\0\0\0\0\0{"), ""),
    (lose_a_tensor, "it lacks 1 tensors, such as lm_head.dense.weight"),
]


@pytest.mark.parametrize("damage, message", DAMAGES)
def test_a_folder_that_is_no_roberta_gets_one_line(damage, message, copy, capsys, offline):
    damage(copy)
    assert roberta_start.main(["--checkpoint", str(copy)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"experiments.roberta_start: {copy} holds no RoBERTa: ")
    assert error.count("\n") == 1 and message in error


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_):
        pytest.fail("it went online")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_a_name_on_the_hub_is_no_folder(workplace, capsys, offline):
    assert roberta_start.main(["--checkpoint", "FacebookAI/roberta-base"]) == 2
    assert "FacebookAI/roberta-base holds no RoBERTa" in capsys.readouterr().err


def test_without_the_package_one_line_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(roberta_start, "transformers", None)
    assert roberta_start.main([]) == 2
    error = capsys.readouterr().err
    assert "pip install transformers" in error and len(error.splitlines()) == 1


# --- The experiment -------------------------------------------------------------------------------


def test_documents_are_joined_by_empty_lines(texts, model):
    tokens = read_tokens(texts, "train", model.tokenizer)
    assert model.tokenizer.decode(tokens) == "".join(text + "\n\n" for text in TEXTS)
    assert len(tokens) < 2200  # of 2,450 bytes: some are merged


def test_a_special_token_in_the_text_is_refused(texts, model):
    documents = [(split, ["Hide <mask> here. " * 9]) for split in ("train", "val")]
    write_dataset(iter(documents), "byte", Path("marked"), "a test")
    with pytest.raises(DataError, match="special tokens"):
        read_tokens("marked", "train", model.tokenizer)


def test_roberta_start(texts, finish, offline):
    flags = "--data-dir=texts --steps=4 --seeds 1 2 --pretrain-steps=3"
    _, result = finish(roberta_start, flags)
    assert result["rows"][:4] == ["0 steps", "1 steps", "4 steps", "4 steps, 6% hidden"]
    ours, other = (torch.tensor(values) for values in result["nats"].values())
    assert ours.shape == other.shape == (2, len(result["rows"]))
    assert (ours[0, 0] == ours[1, 0]) and (ours[0, 2] != ours[1, 2])  # one start, two seeds
    assert (other[0] != other[1]).all()
    folder = OUT / "roberta-3-steps"
    before = (folder / "model.safetensors").read_bytes()
    assert finish(roberta_start, flags)[1] == result  # from the folder it finds
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_folder_of_the_users_own(texts, finish, published, offline):
    _, result = finish(roberta_start, f"--data-dir=texts --steps=4 --checkpoint={published}")
    assert result["checkpoint"] == str(published)
    assert all(len(values) == 3 for values in result["nats"].values())


def test_training_learns_and_is_repeatable(texts, published):
    def trained():
        model = load_roberta(published)
        for _ in roberta_start.train(model, tokens, "diffusion", 60, 3e-3, seed=1):
            pass
        return model

    start = load_roberta(published)
    tokens = read_tokens(texts, "train", start.tokenizer)
    one = trained()
    other = trained()
    x_0 = tokens[:320].view(20, 16)
    before, after = (diffusion.nelbo(model, x_0, model.mask_id).nats for model in (start, one))
    assert after < 0.7 * before
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
