"""From text to tokens: python prepare_data.py sotu --tokenizer bpe:8192 --out-dir data/sotu

These files come out, under their final names only when they are complete:

    train.bin, val.bin    token ids, one after another, little-endian uint16 (uint32 above 65,535)
    meta.json             which tokenizer, how many tokens and bytes, where the text is from
    vocabulary.tiktoken   with --tokenizer bpe:4096: the tokens learned from the training text

and `TokenFile` reads them: it serves the global batch of a training step. How the text gets here,
by download or from your disk, is in plumbing/corpora.py.
"""

import argparse
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
import tiktoken

from plumbing.bpe import PATTERN
from plumbing.command import command
from plumbing.config import Parser
from plumbing.corpora import CORPORA, DataError, Documents, find_corpus
from plumbing.corpora import make_folder, open_split, refuse_to_replace, sha256_of
from plumbing.stopping import in_parallel, unfinished
from plumbing.terminal import Progress
from plumbing.vocabulary import VOCABULARY, Pieces, asked_for, provide, read_file, read_vocabulary

# --- Tokenizers -----------------------------------------------------------------------------------


def get_tokenizer(name: str, folder: str | Path = ".") -> tiktoken.Encoding:
    """"byte", "gpt2", or "bpe:4096:DIGEST", whose vocabulary is in `folder`, data or checkpoint."""
    if name == "gpt2":
        # 4 to 5 bytes of English per token: for gigabytes of text. In a small corpus most of the
        # 50257 tokens are too rare to be learned.
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever tiktoken's HTTP library raises
            raise DataError(f"the GPT-2 tokenizer cannot be downloaded ({type(error).__name__}): "
                            "go online once, point TIKTOKEN_CACHE_DIR at its files, or use "
                            "--tokenizer byte") from None
    if name == "byte":
        # Can spell any text in any language. But a row of 256 tokens is then only some 45 words,
        # and the model has to learn spelling before it can learn anything else.
        ranks = {bytes([i]): i for i in range(256)}
        pattern = r"(?s).+"
    elif name.startswith("bpe:"):
        ranks = read_vocabulary(name, folder)  # about 4 bytes per token, all of your text
        pattern = PATTERN
    else:
        raise DataError(f"unknown tokenizer {name!r}; known: byte, bpe:4096, gpt2")
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


# --- Writing --------------------------------------------------------------------------------------


def encode(tokenizer: tiktoken.Encoding,
           piece: tuple[str, str, bool]) -> tuple[str, int, bool, np.ndarray]:
    """(split, text, last) -> (split, bytes of the text, last, its token ids)."""
    split, text, last = piece
    # "ordinary": if a text contains the characters <|endoftext|>, they are text like any other
    ids = tokenizer.encode_ordinary(text)
    if last:
        ids.append(tokenizer.eot_token)  # a row may hold the end of one text and the next's start
    # 2 bytes a token are enough for GPT-2's 50257; "<": the files are the same on every machine
    dtype = "<u2" if tokenizer.n_vocab < 2**16 else "<u4"
    return split, len(text.encode()), last, np.array(ids, dtype)


def write_tokens(pieces: Pieces, tokenizer: tiktoken.Encoding, folder: Path, size: float) -> dict:
    """Write folder/train.bin and val.bin; returns the tokens, bytes and documents of each."""
    counts = {split: {"tokens": 0, "bytes": 0, "documents": 0} for split in ("train", "val")}
    progress = Progress("tokenizing", size)  # on stderr, if that is a terminal
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        # On every core, a few pieces at a time: memory is the same however large the corpus is, and
        # OpenWebText has 40 GB.
        for split, num_bytes, last, ids in in_parallel(encode, tokenizer, pieces):
            (train if split == "train" else val).write(ids.tobytes())
            counts[split]["tokens"] += len(ids)
            counts[split]["bytes"] += num_bytes
            counts[split]["documents"] += last
            progress.advance(num_bytes)
        for file in (train, val):
            file.flush()
            os.fsync(file.fileno())  # on the disk before meta.json vouches for them
    return counts


def write_dataset(documents: Documents, tokenizer_name: str, out_dir: Path, source: str,
                  size: float = 0) -> dict:
    """Tokenize `documents` into out_dir/{train.bin,val.bin,meta.json}; returns what meta.json says.

    source: where the text is from, for the record; size: its bytes if known, to estimate the time.
    """
    # A wrong name ends here. "bpe:4096" learns a vocabulary, "bpe:4096:DIGEST" has it in out_dir.
    vocab_size = asked_for(tokenizer_name) or get_tokenizer(tokenizer_name, out_dir).n_vocab
    make_folder(out_dir, "--out-dir")
    with unfinished(out_dir) as folder:  # it vanishes, whatever happens: a full disk, Ctrl-C
        tokenizer_name, pieces = provide(tokenizer_name, documents, out_dir, folder)
        counts = write_tokens(pieces, get_tokenizer(tokenizer_name, folder), folder, size)
        for split, count in counts.items():
            if not count["bytes"]:
                raise DataError(f"{source} has no text for the {split} split")
            count["sha256"] = sha256_of(folder / f"{split}.bin")
        meta = {
            "format": 1,
            "tokenizer": tokenizer_name,
            "vocab_size": vocab_size,
            "mask_id": vocab_size,  # one id on top; the mask token itself is never in the files
            "dtype": "uint16" if vocab_size < 2**16 else "uint32",
            "source": source,
            **counts,
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        # Without meta.json there is no dataset, so a crash between these renames can't pair the
        # train.bin of one corpus with the val.bin of another.
        (out_dir / "meta.json").unlink(missing_ok=True)
        for name in (VOCABULARY, "train.bin", "val.bin", "meta.json"):  # in this order
            if (folder / name).exists():
                os.replace(folder / name, out_dir / name)
            else:  # an earlier vocabulary; byte and gpt2 need none
                (out_dir / name).unlink(missing_ok=True)
    return meta


# --- Reading --------------------------------------------------------------------------------------


class TokenFile:
    """The tokens of one split; DataError if they are not what meta.json says."""

    def __init__(self, folder: str | Path, split: str):
        self.path = Path(folder) / f"{split}.bin"
        self.file, meta = open_split(self.path)
        self.tokenizer = meta.tokenizer
        self.vocab_size = meta.vocab_size  # 8192 in the quickstart, 50257 for GPT-2
        self.num_tokens = meta.num_tokens
        self.num_bytes = meta.num_bytes  # the text's: end-of-text costs bits and has none
        read_file(self.tokenizer, folder)  # whether the vocabulary of bpe:4096 is there
        self.dtype = np.dtype(meta.dtype)
        self.sha256 = meta.sha256  # whether it is the text that a run began with

    @property
    def tokens(self) -> np.ndarray:
        """All of them, (num_tokens,), memory-mapped: for statistics. Training reads windows."""
        return np.memmap(self.path, self.dtype, mode="r")

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(rows, length) int64: the windows that begin at `starts`."""
        if self.num_tokens < length:
            raise DataError(f"{self.path} has {self.num_tokens} tokens, fewer than one context of "
                            f"{length}: use more text or a smaller context_length")
        size = self.dtype.itemsize
        windows = []
        for start in starts:
            self.file.seek(int(start) * size)
            windows.append(self.file.read(length * size))
        # Read through a memory map, a file that somebody has cut would be a bus error.
        if min(map(len, windows)) < length * size:
            raise DataError(f"{self.path} was cut short while in use: run prepare_data.py again")
        rows = np.frombuffer(b"".join(windows), self.dtype).reshape(-1, length)
        rows = rows.astype(np.int64)  # an embedding wants int64
        # An id too large would be taken for the mask token, or crash a kernel far away from here.
        if rows.max() >= self.vocab_size:
            raise DataError(f"{self.path} holds token {rows.max()}, outside the vocabulary of "
                            f"{self.vocab_size}: run prepare_data.py again")
        return rows

    def batch(self, seed: int, step: int, rows: int, length: int) -> np.ndarray:
        """(rows, length): the global batch of a step, windows that begin anywhere."""
        # They depend on (seed, step) alone: a run that is resumed gets the rows it would have got.
        # As in nanoGPT there are no epochs: some text is seen twice before other text is seen once.
        generator = np.random.default_rng([seed, step])
        starts = generator.integers(0, max(1, self.num_tokens - length + 1), rows)
        return self.read(starts, length)

    def spread(self, rows: int, length: int) -> np.ndarray:
        """(rows or fewer, length): always the same windows, to evaluate on."""
        # Evenly spread over the file and never overlapping; a short file has fewer of them.
        rows = min(rows, max(1, self.num_tokens // length))  # 64 is usual, 512 at the end
        starts = np.linspace(0, self.num_tokens - length, rows).astype(np.int64)
        return self.read(starts, length)


# --- The command ----------------------------------------------------------------------------------


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="prepare_data.py", description="Turn text into files of tokens.")
    add = parser.add_argument
    add("corpus", nargs="+", help=f"{', '.join(CORPORA)}; hf:NAME[:CONFIG], any Hugging Face "
        "dataset with a text column; or UTF-8 text of your own: files, folders of .txt files, "
        "quoted globs, - for standard input. In them a line <|endoftext|> ends a document")
    add("--val", help="a file, folder or glob for validation; all others are for training then "
        "(default: every tenth document; of fewer than ten, the last tenth of each)")
    add("--tokenizer", default="bpe:8192", help="bpe:8192, or another number of tokens, learned "
        "from the first 2^25 characters of the training text; byte; or gpt2 (default: %(default)s)")
    add("--out-dir", type=Path, help="where the files go (default: data/CORPUS)")
    add("--downloads", type=Path, default=Path("data/downloads"), help="where to keep downloads")
    add("--overwrite", action="store_true", help="replace a data set made from something else")
    add("--max-documents", type=int, help="stop after so many documents")
    args = parser.parse_args(arguments)
    if args.max_documents is not None and not 1 <= args.max_documents <= sys.maxsize:
        parser.error(f"--max-documents must be from 1 to 2^63, not {args.max_documents}")
    return args


@command("prepare_data.py")
def main(arguments: list[str]) -> None:
    args = parse(arguments)
    name, source, documents, size = find_corpus(args.corpus, args.val, args.downloads)
    out_dir = args.out_dir or Path("data") / name
    if not args.overwrite:
        refuse_to_replace(out_dir, source)
    documents = itertools.islice(documents, args.max_documents)
    meta = write_dataset(documents, args.tokenizer, out_dir, source, size)
    for split in ("train", "val"):
        line = "{path}: {tokens:,} tokens from {bytes:,} bytes in {documents:,} documents"
        print(line.format(path=out_dir / f"{split}.bin", **meta[split]))


if __name__ == "__main__":
    sys.exit(main())
