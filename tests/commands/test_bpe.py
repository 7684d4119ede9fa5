"""A vocabulary of one's own: it is learned as the definition says, tiktoken encodes as it was
learned, nothing of a text is lost, and a model takes its vocabulary along."""

import ast
import base64
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiny_runs
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data
import sample
from experiments.lab import judge, runs
from plumbing import bpe, vocabulary
from plumbing.bpe import PATTERN, train_bpe
from plumbing.checkpoint import read_tensors, write_tensors
from plumbing.vocabulary import VOCABULARY
from prepare_data import DataError, TokenFile, get_tokenizer, write_dataset

ROOT = Path(__file__).parent.parent.parent
ENGLISH = """It's been 12 months since we've met; the country's finances aren't what they'd been
in 1819, and I'll say why. "Nobody," he wrote, "shall (or should) pay $1,000.50 twice!" -- yet...
    An indented line, then a list: one, two, three. Didn't they?


"""
CHINESE = "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。寒来暑往，秋收冬藏。闰余成岁，律吕调阳。"
HINDI = "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता है। १२३"
TEXTS = {"English": ENGLISH, "Chinese": CHINESE, "Hindi": HINDI, "code": Path(__file__).read_text(),
         "all": ENGLISH + CHINESE + HINDI + "🙂👩‍👩‍👧 שלום مرحبا \u3000\x85\0"}


def encoding(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding("test", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


def learned(text: str, wanted: int = 1 << 20) -> dict[bytes, int]:
    """So many tokens, or all that there are."""
    try:
        return train_bpe([text], wanted)
    except DataError as error:
        return train_bpe([text], int(re.search(r"it has (\d+) tokens", str(error))[1]))


@pytest.fixture(scope="module")
def english() -> tiktoken.Encoding:
    return encoding(learned(ENGLISH + CHINESE + HINDI))


@pytest.fixture(scope="module")
def bpe_data(tmp_path_factory) -> Path:
    """A folder such as prepare_data.py writes, with 300 tokens."""
    folder = tmp_path_factory.mktemp("bpe")
    documents = [("train", [ENGLISH * 20]), ("val", [ENGLISH * 10])]
    write_dataset(iter(documents), "bpe:300", folder, "test")
    return folder


def name_of(folder: Path) -> str:
    return json.loads((folder / "meta.json").read_text())["tokenizer"]


def main(*arguments) -> int:
    return prepare_data.main([str(argument) for argument in arguments])


# --- What is learned ------------------------------------------------------------------------------


def join(word: list[bytes], token: bytes) -> list[bytes]:
    """The neighbours that spell `token` become one, from left to right."""
    for i in range(len(word) - 1):
        if word[i] + word[i + 1] == token:
            return [*word[:i], token, *join(word[i + 2 :], token)]
    return word


def naive_bpe(text: str, wanted: int) -> list[tuple[bytes, int]]:
    """(token, how often its pair occurs), all pairs counted anew for each."""
    words = [[bytes([byte]) for byte in word.encode()] for word in re.findall(PATTERN, text)]
    found = []
    while len(found) < wanted:
        counts = Counter(a + b for word in words for a, b in itertools.pairwise(word))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))  # of equals the first in bytes
        found.append((best, counts[best]))
        words = [join(word, best) for word in words]
    return found


def random_text(chance: random.Random) -> str:
    """Few letters and short words: many ties, many runs of one letter."""
    letters = chance.choice(["ab", "abc", "aab ", "aé漢\n", "a1-! '", "a \n", "त्रs"])
    return "".join(chance.choices(letters + " ", k=chance.randrange(1, 120)))


def test_it_learns_what_counting_everything_anew_for_each_token_would():
    chance = random.Random(1)
    ties = 0
    texts = [random_text(chance) for _ in range(300)]
    for text in [*texts, "aaaaaaa", ENGLISH, CHINESE, HINDI]:
        found = naive_bpe(text, 60)
        counts = [count for _, count in found]
        ties += len(counts) > len(set(counts))
        tokens = list(learned(text, 256 + len(found) + 1))
        assert tokens == [bytes([i]) for i in range(256)] + [token for token, _ in found]
    assert ties > 200


def test_all_pairs_are_found_until_none_is_left():
    chance = random.Random(2)
    for _ in range(100):
        text = random_text(chance)
        assert list(learned(text))[256:] == [token for token, _ in naive_bpe(text, 999)]


@pytest.mark.parametrize("name", TEXTS)
def test_the_tokenizers_package_learns_the_same_or_equally_frequent_tokens(name):
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import models, pre_tokenizers, trainers
    text = TEXTS[name][:4000]
    ours = list(learned(text, 256 + 101))[256:]
    theirs = tokenizers.Tokenizer(models.BPE())
    # It splits with another library, Oniguruma, which takes the same pattern.
    theirs.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=256 + len(ours), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    theirs.train_from_iterator([text], trainer)
    merges = json.loads(theirs.to_str())["model"]["merges"]
    spelled = bytes_of_characters()
    merges = [bytes(spelled[character] for character in "".join(pair)) for pair in merges]
    # Which of equally frequent pairs comes first is a matter of taste, and changes what follows. So
    # each of theirs must be most frequent at its turn, and ours too, until the first that differs.
    words = [[bytes([byte]) for byte in word.encode()] for word in re.findall(PATTERN, text)]
    for i, (our_token, token) in enumerate(zip(ours, merges, strict=True)):
        counts = Counter(a + b for word in words for a, b in itertools.pairwise(word))
        assert counts[token] == max(counts.values())
        assert counts[our_token] == counts[token] or ours[:i] != merges[:i]
        words = [join(word, token) for word in words]
    assert len(ours) > 80


def bytes_of_characters() -> dict[str, int]:
    """The printable characters by which GPT-2 and the package write bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return ({chr(byte): byte for byte in plain}
            | {chr(256 + i): byte for i, byte in enumerate(others)})


def test_more_text_than_fits_is_cut_and_long_words_are_cut_into_parts(monkeypatch):
    counted = bpe.count_words(["a" * 70 + " b b"])
    assert counted == {b"a" * 32: 2, b"a" * 6: 1, b" b": 2}
    monkeypatch.setattr(bpe, "DIFFERENT", 10)
    counted = bpe.count_words(["abc " * 50, "defghijkl mnopqrs tuv abc"])
    assert counted == {b"abc": 1, b" abc": 49, b" ": 1, b"defghijkl": 1}  # stops before " mnopqrs"


def test_two_seeds_of_pythons_hashes_learn_the_same_file(tmp_path):
    (tmp_path / "text.txt").write_text(TEXTS["all"] * 3)
    for seed in "12":
        command = [sys.executable, ROOT / "prepare_data.py", "text.txt", "--tokenizer", "bpe:400"]
        subprocess.run([*command, "--out-dir", seed], cwd=tmp_path, check=True,
                       stdout=subprocess.PIPE, env=os.environ | {"PYTHONHASHSEED": seed})
    for name in (VOCABULARY, "train.bin", "meta.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_only_training_text_is_learned_from_wherever_it_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "SAMPLE", 100)
    documents = [("val", ["zz" * 500] * 3), ("train", ["xy " * 30, "uv " * 40]),
                 ("val", ["qq" * 9]), ("train", ["uv " * 99])]  # the sample ends in the first "uv"
    meta = write_dataset(iter(documents), "bpe:258", tmp_path, "test")
    tokenizer = get_tokenizer(meta["tokenizer"], tmp_path)
    assert tokenizer.decode_single_token_bytes(256) == b"xy"
    for split in ("train", "val"):
        ids = TokenFile(tmp_path, split).tokens.tolist()
        texts = ["".join(pieces) for which, pieces in documents if which == split]
        assert tokenizer.decode(ids) == "".join(text + "<|endoftext|>" for text in texts)


# --- Encoding -------------------------------------------------------------------------------------


def encode_by_definition(text: str, ranks: dict[bytes, int]) -> list[int]:
    """In each word the pair that became a token first is joined, until no pair is a token."""
    ids = []
    for match in re.finditer(PATTERN, text):
        word = [bytes([byte]) for byte in match[0].encode()]
        while found := [ranks[a + b] for a, b in itertools.pairwise(word) if a + b in ranks]:
            token = next(token for token, rank in ranks.items() if rank == min(found))
            word = join(word, token)
        ids += [ranks[part] for part in word]
    return ids


def test_tiktoken_encodes_as_it_was_learned(english):
    chance = random.Random(3)
    ranks = {english.decode_single_token_bytes(i): i for i in range(english.n_vocab - 1)}
    shorter = 0
    for i in range(300):
        text = random_text(chance) if i % 2 else "".join(chance.choices(TEXTS["all"], k=60))
        text += ENGLISH[: chance.randrange(99)]
        ids = english.encode_ordinary(text)
        assert ids == encode_by_definition(text, ranks)
        shorter += len(ids) < len(text.encode())
    assert shorter > 250


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text() | st.text(st.sampled_from("ab '\n\u3000\x85漢१1!🙂")))
def test_any_unicode_comes_back(english, text):
    assert english.decode_bytes(english.encode_ordinary(text)) == text.encode()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary())
def test_any_bytes_can_be_spelled(english, content):
    ids = [english.encode_single_token(bytes([byte])) for byte in content]
    assert english.decode_bytes(ids) == content and ids == list(content)
    assert english.decode_bytes(english._encode_bytes(content)) == content


def test_python_and_rust_cut_every_character_alike():
    chance = random.Random(4)
    characters = [chr(code) for code in range(0x3100)]
    characters += [chr(code) for code in chance.sample(range(0xE000, 0x110000), 2000)]
    text = "".join(f"a{c}b {c} 1'{c}!\n{c}" for c in characters)
    words = re.findall(PATTERN, text)
    assert "".join(words) == text  # no character is lost
    ranks = {bytes([byte]): byte for byte in range(256)}
    for word in words:  # each a token, so that the tokens show the cuts
        ranks.setdefault(word.encode(), len(ranks))
    tokenizer = encoding(ranks)
    assert [tokenizer.decode([token]) for token in tokenizer.encode_ordinary(text)] == words


def test_no_token_crosses_from_one_word_into_the_next(english):
    tokens = [english.decode_single_token_bytes(i) for i in range(256, english.n_vocab - 1)]
    words = {word.encode() for word in re.findall(PATTERN, ENGLISH + CHINESE + HINDI)}
    assert all(any(token in word for word in words) for token in tokens)
    for token in tokens:
        text = token.decode(errors="ignore")  # a token may hold part of a character
        assert len(re.findall(PATTERN, text)) <= 1
        assert not re.search("[0-9]", text)


def test_a_million_spaces_and_letters_are_no_problem(english):
    for text in (" " * 1_000_000 + "a", "a" * 1_000_000, "\n \t" * 300_000, "!" * 1_000_000):
        assert english.decode(english.encode_ordinary(text)) == text


@pytest.mark.parametrize("name, least", [("English", 2.5), ("Chinese", 3), ("Hindi", 3),
                                         ("code", 2.5)])
def test_what_it_learned_from_makes_few_tokens(name, least):
    text = TEXTS[name]
    tokenizer = encoding(learned(text, 1000))
    assert len(text.encode()) / len(tokenizer.encode_ordinary(text)) > least
    if name == "code":
        code = tokenizer.decode(tokenizer.encode_ordinary(text))
        assert ast.dump(ast.parse(code)) == ast.dump(ast.parse(text))


# --- The command, and mistakes --------------------------------------------------------------------


@pytest.mark.parametrize("size", [257, 258, 300])
def test_the_size_counts_the_end_of_text(tmp_path, monkeypatch, size):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(ENGLISH * 20)
    assert main("text.txt", "--tokenizer", f"bpe:{size}") == 0
    meta = json.loads(Path("data/text/meta.json").read_text())
    content = Path("data/text", VOCABULARY).read_bytes()
    assert meta["tokenizer"] == f"bpe:{size}:{hashlib.sha256(content).hexdigest()[:16]}"
    assert (meta["vocab_size"], meta["mask_id"]) == (size, size)
    tokenizer = get_tokenizer(meta["tokenizer"], "data/text")
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (size, size - 1)
    ids = TokenFile("data/text", "train").tokens.tolist()
    assert len(ids) == meta["train"]["tokens"] and ids[-1] == size - 1
    assert len(tokenizer.decode(ids[:-1]).encode()) == meta["train"]["bytes"]
    assert content.count(b"\n") == size - 1 and b"\r" not in content


MISTAKES = [
    ("bpe:", "unknown tokenizer 'bpe:': bpe: wants a number of tokens from 257"),
    ("bpe:many", "unknown tokenizer 'bpe:many': bpe: wants"),
    ("bpe:256", "unknown tokenizer 'bpe:256': bpe: wants a number of tokens from 257"),
    ("bpe:-5", "unknown tokenizer 'bpe:-5': bpe: wants"),
    ("bpe:1048577", "to 1048576, as in bpe:4096"),
    ("bpe:" + "9" * 5000, "unknown tokenizer 'bpe:999"),
    ("bpe:٤٠٩٦", "bpe: wants a number of tokens"),
    ("bpe:300:xyz", "unknown tokenizer 'bpe:300:xyz': bpe: wants"),
    ("bpe:300:0123456789abcdef", f"out/{VOCABULARY} is missing: copy it"),
    ("bpe", "unknown tokenizer 'bpe'; known: byte, bpe:4096, gpt2"),
    ("bpe:4096", "bpe:4096 is too much for this text: it has 266 tokens at most"),
]


@pytest.mark.parametrize("name, message", MISTAKES, ids=lambda text: text[:20])
def test_a_mistake_gets_one_line_and_changes_nothing(tmp_path, monkeypatch, capsys, name, message):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("abcdefgh" * 9 + "\n")
    before = sorted(tmp_path.rglob("*"))
    assert main("text.txt", "--tokenizer", name, "--out-dir", "out") == 2
    output, errors = capsys.readouterr()
    assert errors.startswith("prepare_data.py: ") and message in errors
    assert errors.count("\n") == 1 and len(errors) < 250 and output == ""
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "out") == before


@pytest.mark.parametrize("renames", [0, 1, 2, 3, 4])
def test_a_crash_between_the_files_leaves_no_mixture_of_datasets(tmp_path, monkeypatch, renames):
    replace = os.replace
    for text, number in ((ENGLISH, 99), (HINDI * 9, renames + 1)):  # one more: the vocabulary's own
        left = [replace] * number  # none left: the crash
        monkeypatch.setattr(os, "replace", lambda *paths, left=left: left.pop()(*paths))
        documents = [("train", [text]), ("val", [text])]
        try:
            write_dataset(iter(documents), "bpe:260", tmp_path, "test")
        except IndexError:
            with pytest.raises(DataError, match="run prepare_data.py"):
                TokenFile(tmp_path, "train")
            assert renames < 4
    if renames == 4:
        tokenizer = get_tokenizer(name_of(tmp_path), tmp_path)
        assert tokenizer.decode(TokenFile(tmp_path, "val").tokens[:-1].tolist()) == HINDI * 9


def test_a_dataset_of_bytes_in_its_place_removes_the_vocabulary(tmp_path):
    for name, left in (("bpe:260", True), ("byte", False)):
        write_dataset(iter([("train", [ENGLISH]), ("val", [ENGLISH])]), name, tmp_path, "test")
        assert (tmp_path / VOCABULARY).exists() == left


def test_another_text_can_be_prepared_with_a_vocabulary_that_there_is(tmp_path, bpe_data):
    name = name_of(bpe_data)
    shutil.copy(bpe_data / VOCABULARY, tmp_path)
    write_dataset(iter([("train", [HINDI]), ("val", [CHINESE])]), name, tmp_path, "test")
    assert name_of(tmp_path) == name
    tokens = TokenFile(tmp_path, "val").tokens[:-1].tolist()
    assert get_tokenizer(name, tmp_path).decode(tokens) == CHINESE


# --- Vocabularies that lie ------------------------------------------------------------------------


def lines_of(tokens: list[bytes]) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(t), i) for i, t in enumerate(tokens))


BYTES = [bytes([i]) for i in range(256)]
LIES = [
    b"", b"\n" * 1_000_000, b"\0" * 1000, b"a" * 1_000_000, b" 0\n", b"AA== " + b"9" * 9999,
    lines_of(BYTES[:255]), lines_of([*BYTES, b"ab", b"ab"]), lines_of([*BYTES, b"", b"ab"]),
    lines_of([*BYTES[::-1], b"ab", b"cd"]), lines_of([b"ab", b"cd", *BYTES]),
    lines_of([*BYTES, b"a", b"ab"]),
    lines_of([*BYTES, b"ab"]), lines_of([*BYTES, b"ab", b"cd", b"ef"]),  # one too few, too many
    lines_of([*BYTES, b"ab", b"cd"]).replace(b" 257\n", b" 256\n"),
    lines_of([*BYTES, b"ab", b"cd"]).replace(b" 257\n", b" -1\n"),
    lines_of([*BYTES, b"ab", b"cd"]).replace(b" 257\n", b"\n"),
    lines_of([*BYTES, b"ab", b"cd"]).replace(b"\n", b" 1\n", 1),
    lines_of([*BYTES, b"ab", b"cd"]).replace(b"AQ==", b"A!Q==", 1),
    lines_of([*BYTES, b"ab", b"ab", b"cd"]).replace(b" 258\n", b" 257\n"),
]


@pytest.mark.parametrize("content", LIES, ids=range(len(LIES)))
def test_a_file_that_lies_is_refused_although_its_digest_is_right(tmp_path, content):
    (tmp_path / VOCABULARY).write_bytes(content)
    with pytest.raises(DataError, match=f"{VOCABULARY} is no vocabulary of bpe:259:") as error:
        get_tokenizer(f"bpe:259:{vocabulary.digest(content)}", tmp_path)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_random_damage_is_refused_or_a_vocabulary(tmp_path):
    chance = random.Random(5)
    good = lines_of([*BYTES, b"ab", b"cd"])
    refused = 0
    for _ in range(500):
        content = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            content[chance.randrange(len(content))] = chance.choice(b"\n\r 0123456789=ABCz\xff\0")
        (tmp_path / VOCABULARY).write_bytes(content)
        if content == good:
            continue
        with pytest.raises(DataError, match="is damaged or not that of"):
            get_tokenizer(f"bpe:259:{vocabulary.digest(good)}", tmp_path)
        try:
            tokenizer = get_tokenizer(f"bpe:259:{vocabulary.digest(content)}", tmp_path)
            assert tokenizer.decode(tokenizer.encode_ordinary(ENGLISH)) == ENGLISH
        except DataError as error:
            assert str(error).isprintable()
            refused += 1
    assert 250 < refused < 500


def test_what_is_no_file_or_endless_is_refused(tmp_path, monkeypatch):
    name = "bpe:259:0123456789abcdef"
    path = tmp_path / VOCABULARY
    with pytest.raises(DataError, match="is missing"):
        get_tokenizer(name, tmp_path)
    path.mkdir()
    with pytest.raises(DataError, match="is missing"):
        get_tokenizer(name, tmp_path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(DataError, match="is missing"):
        get_tokenizer(name, tmp_path)
    path.unlink()
    with open(path, "wb") as file:
        file.truncate(2**40)  # a sparse file
    with pytest.raises(DataError, match="is damaged"):
        get_tokenizer(name, tmp_path)


@pytest.mark.parametrize("name", ["bpe:4096", "bpe:", "bpe:1:2", "bpe:../../x:0123456789abcdef",
                                  "bpe:259:0123456789ABCDEF", "bpe:259:0123456789abcdef\n"])
def test_a_name_that_is_not_whole_is_unknown(tmp_path, name):
    with pytest.raises(DataError, match="unknown tokenizer '"):
        get_tokenizer(name, tmp_path)


# --- Models that take their vocabulary along ------------------------------------------------------


def test_a_checkpoint_moved_elsewhere_writes_with_nothing_else(tmp_path, bpe_data, capsys):
    data = Path(shutil.copytree(bpe_data, tmp_path / "data"))
    out_dir = tiny_runs.run(data, tmp_path / "out", steps=2, warmup_steps=1)
    _, info = read_tensors(out_dir / "model.safetensors")
    assert info["tokenizer"] == name_of(data) and info["model"]["vocab_size"] == 300
    shutil.rmtree(data)
    moved = Path(shutil.move(out_dir, tmp_path / "elsewhere"))
    capsys.readouterr()
    assert sample.main(["--checkpoint", str(moved), "--prefix", "It's been", "--length", "8"]) == 0
    assert capsys.readouterr().out.startswith("It's been")
    (tmp_path / "text.txt").write_text(ENGLISH)
    assert sample.main(["--checkpoint", str(moved), "--score", str(tmp_path / "text.txt")]) == 0
    assert "bits/byte" in capsys.readouterr().out
    (moved / VOCABULARY).unlink()
    assert sample.main(["--checkpoint", str(moved)]) == 2
    assert f"{moved}/{VOCABULARY} is missing: copy it from" in capsys.readouterr().err


def test_a_run_resumes_on_its_own_vocabulary_only(tmp_path, bpe_data, capsys):
    out_dir = tiny_runs.run(bpe_data, tmp_path / "out", steps=4, warmup_steps=1, max_steps=2)
    other = tmp_path / "other"  # as many tokens, but others
    documents = [("train", [CHINESE * 40]), ("val", [CHINESE * 20])]
    write_dataset(iter(documents), "bpe:300", other, "test")
    before = (out_dir / VOCABULARY).read_bytes()
    flags = [*tiny_runs.flags(other, out_dir, steps=4, warmup_steps=1), "--resume"]
    assert tiny_runs.train.main(flags) == 2
    assert "the run has another vocabulary" in capsys.readouterr().err
    assert (out_dir / VOCABULARY).read_bytes() == before
    tiny_runs.run(bpe_data, out_dir, steps=4, warmup_steps=1, resume=True)
    assert (out_dir / VOCABULARY).read_bytes() == before


def test_training_refuses_data_without_their_vocabulary(tmp_path, bpe_data, capsys):
    data = Path(shutil.copytree(bpe_data, tmp_path / "data"))
    (data / VOCABULARY).write_bytes(b"another")
    assert tiny_runs.train.main(tiny_runs.flags(data, tmp_path / "out")) == 2
    assert f"{data}/{VOCABULARY} is damaged or not that of bpe:300:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_whose_tokenizer_is_larger_than_its_network_is_refused(tmp_path, bpe_data,
                                                                            networks, capsys):
    tensors, info = read_tensors(networks / "run/model.safetensors")  # 257 tokens
    write_tensors(tmp_path / "model.safetensors", tensors, info | {"tokenizer": name_of(bpe_data)})
    shutil.copy(bpe_data / VOCABULARY, tmp_path)
    assert sample.main(["--checkpoint", str(tmp_path)]) == 2
    assert "does not have the vocabulary of its tokenizer" in capsys.readouterr().err


def test_experiments_find_the_vocabulary_of_a_data_folder(tmp_path, bpe_data):
    small = runs.small_corpus(bpe_data, 500, tmp_path / "small")
    assert name_of(small) == name_of(bpe_data)
    assert np.isin(TokenFile(small, "train").tokens, TokenFile(bpe_data, "train").tokens).all()
    assert "finances" in judge.vocabulary_of(TokenFile(bpe_data, "train"))
