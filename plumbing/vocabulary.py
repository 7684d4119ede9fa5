"""The vocabulary of a BPE tokenizer, in the folder of the data and of every checkpoint.

vocabulary.tiktoken has a line for each token: its bytes in base64, a space, its rank (tiktoken's
own format). The tokenizer's name ends in a digest of that file, "bpe:4096:0123456789abcdef": where
names are equal, so are vocabularies, and another or a damaged one is noticed.
"""

import base64
import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from plumbing import corpora
from plumbing.bpe import train_bpe
from plumbing.corpora import DataError, Documents

VOCABULARY = "vocabulary.tiktoken"
NAME = re.compile("bpe:([0-9]{1,7}):([0-9a-f]{16})")
MAX_SIZE = 2**25  # bytes of the file that are read; 4,096 tokens take some 60,000
SAMPLE = 2**25  # characters of training text to learn from: more would change next to nothing
Pieces = Iterator[tuple[str, str, bool]]  # (split, text, whether its document ends here)


# --- Learning -------------------------------------------------------------------------------------


def asked_for(name: str) -> int:
    """4096 for "bpe:4096", which is still to be learned; 0 for a tokenizer that there is."""
    if NAME.fullmatch(name) or not name.startswith("bpe:"):
        return 0
    number = name.removeprefix("bpe:")
    size = int(number) if re.fullmatch("[0-9]{1,7}", number) else 0
    if not 257 <= size <= 2**20:
        raise DataError(f"unknown tokenizer {name!r:.60}: bpe: wants a number of tokens from 257 "
                        f"(256 bytes and end-of-text) to {2**20}, as in bpe:4096")
    return size


def provide(name: str, documents: Documents, source: Path, target: Path) -> tuple[str, Pieces]:
    """Put the vocabulary into `target`: that of `source`, or one learned from the documents.

    Returns the tokenizer's full name, and the documents in pieces.
    """
    pieces = pieces_of(documents)
    size = asked_for(name)
    if not size:
        copy_file(name, source, target)
        return name, pieces
    taken = []  # a corpus can be read only once
    texts = []
    room = SAMPLE
    while room > 0 and (piece := next(pieces, None)):
        taken.append(piece)
        split, text, _ = piece
        if split == "train":
            texts.append(text[:room])
            room -= len(text)
    ranks = train_bpe(texts, size)
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())
    content = b"".join(lines)
    write_file(content, target)
    return f"bpe:{size}:{digest(content)}", itertools.chain(taken, pieces)


def pieces_of(documents: Documents) -> Pieces:
    """In pieces that tiktoken can take, cut before a space where possible."""
    for split, texts in documents:
        rest = ""
        for text in texts:
            rest += text
            start = 0
            while len(rest) - start > corpora.PIECE:
                end = rest.rfind(" ", start + 1, start + corpora.PIECE)  # GPT-2's tokens begin so
                end = end if end > 0 else start + corpora.PIECE
                yield split, rest[start:end], False
                start = end
            rest = rest[start:]
        yield split, rest, True


# --- The file -------------------------------------------------------------------------------------


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def write_file(content: bytes, folder: Path) -> None:
    """A kill leaves the old file or the new one, no mixture."""
    part = folder / f"{VOCABULARY}.part"
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / VOCABULARY)


def read_file(name: str, folder: str | Path) -> bytes:
    """The file, if it is the one that `name` means; nothing for a tokenizer without one."""
    if not name.startswith("bpe:"):
        return b""
    match = NAME.fullmatch(name)
    if not match:
        raise DataError(f"unknown tokenizer {name!r:.60}; known: byte, bpe:SIZE:DIGEST, gpt2")
    path = Path(folder) / VOCABULARY
    problem = "is missing"
    if path.is_file():  # not a pipe, say, from which we would read forever
        with open(path, "rb") as file:
            content = file.read(MAX_SIZE)
        if digest(content) == match[2]:
            return content
        problem = f"is damaged or not that of {name}"
    raise DataError(f"{path} {problem}: copy it from the data or a checkpoint that has it, or run "
                    "prepare_data.py and train.py again")


def copy_file(name: str, source: str | Path, target: Path) -> None:
    """So that a folder can move to another machine alone."""
    if content := read_file(name, source):
        write_file(content, target)


def read_vocabulary(name: str, folder: str | Path) -> dict[bytes, int]:
    """{token: rank}, the 256 bytes first; DataError if the file is not what `name` means."""
    content = read_file(name, folder)
    ranks = {}
    try:
        # Who wrote a lie can write its digest, too: each line is checked before the next is read.
        for line in io.BytesIO(content):
            text, _, rank = line.partition(b" ")
            token = base64.b64decode(text, validate=True)
            expected = token not in ranks and (token == bytes([len(ranks)]) if len(ranks) < 256
                                               else len(token) > 1)
            if not expected or int(rank) != len(ranks):
                raise ValueError(f"not token {len(ranks)}: {line!r:.40}")
            ranks[token] = len(ranks)
        if len(ranks) != int(name.split(":")[1]) - 1:
            raise ValueError(f"it has {len(ranks)} tokens")
    except ValueError as error:
        raise DataError(f"{Path(folder) / VOCABULARY} is no vocabulary of {name} ({error}): run "
                        "prepare_data.py and train.py again") from None
    return ranks
