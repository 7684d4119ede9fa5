"""How many of the words a model wrote are words? python -m experiments.words data/sotu FILE

Prints the fraction of the words in the text that occur anywhere in the training text, beside that
of the validation text (real English, the ceiling) and of validation letters in random order
(chance). FILE may be - for stdin. Ends with one JSON line.
"""

import json
import random
import sys
from pathlib import Path

from experiments.lab.judge import fraction_known, vocabulary_of, words
from plumbing.command import command
from plumbing.config import Parser
from prepare_data import DataError, TokenFile, get_tokenizer


@command("experiments.words")
def main(arguments: list[str]) -> None:
    parser = Parser(prog="experiments.words", description=__doc__.split("\n")[0])
    parser.add_argument("data_dir", help="folder that prepare_data.py wrote")
    parser.add_argument("file", help="what the model wrote (-: stdin)")
    args = parser.parse_args(arguments)
    train = TokenFile(args.data_dir, "train")
    val = TokenFile(args.data_dir, "val")
    try:
        written = sys.stdin.read() if args.file == "-" else Path(args.file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{args.file}: {getattr(error, 'strerror', None) or error}") from None
    vocabulary = vocabulary_of(train)
    real = get_tokenizer(val.tokenizer, args.data_dir).decode(val.tokens[:200_000].tolist())
    shuffled = "".join(random.Random(0).sample(real, len(real)))
    results = {}
    for name, text in (("written", written), ("validation", real), ("shuffled", shuffled)):
        fraction = fraction_known(text, vocabulary)
        count = len(words(text))
        results[name] = {"share": fraction, "words": count}
        print(f"{name:10}  {fraction:6.1%} of {count} words occur in the training text")
    print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(main())
