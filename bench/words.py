"""How many of the words a model wrote are words? python -m bench.words data/sotu FILE (- for stdin)

Prints the share of words in the text that occur anywhere in the training text, next to the same share for the
validation text (real English, the ceiling) and for validation letters in random order (chance).
Ends with one JSON line.
"""

import json
import random
import re
import sys
from pathlib import Path

from prepare_data import DataError, TokenFile, get_tokenizer


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def share_known(text: str, vocabulary: set[str]) -> tuple[float, int]:
    """(share of the words of `text` that are in `vocabulary`, number of words)."""
    found = words(text)
    return sum(word in vocabulary for word in found) / max(1, len(found)), len(found)


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m bench.words DATA_DIR TEXT_FILE", file=sys.stderr)
        return 2
    folder, path = arguments
    try:
        files = {split: TokenFile(folder, split) for split in ("train", "val")}
        written = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (DataError, OSError) as error:
        print(f"bench.words: {error}", file=sys.stderr)
        return 2
    decode = get_tokenizer(files["train"].tokenizer).decode
    vocabulary = set(words(decode(files["train"].tokens.tolist())))
    real = decode(files["val"].tokens[:200_000].tolist())
    shuffled = "".join(random.Random(0).sample(real, len(real)))
    results = {}
    for name, text in (("written", written), ("validation", real), ("shuffled", shuffled)):
        share, count = share_known(text, vocabulary)
        results[name] = {"share": share, "words": count}
        print(f"{name:10}  {share:6.1%} of {count} words occur in the training text")
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
