"""How many of the words a model wrote are words? python -m experiments.words data/sotu FILE

Prints the fraction of the words in the file that occur anywhere in the training text, beside that
of the validation text (real English, the ceiling) and of validation letters in random order
(chance). Ends with one JSON line.
"""

import random
import sys
from pathlib import Path

from experiments.lab.command import report
from experiments.lab.judge import fraction_known, vocabulary_of, words
from plumbing.command import command
from plumbing.config import Parser
from plumbing.corpora import read_text
from prepare_data import TokenFile, get_tokenizer


@command("experiments.words", OSError)  # of a file that isn't there
def main(arguments: list[str]) -> None:
    parser = Parser(prog="experiments.words", description=__doc__.split("\n")[0])
    parser.add_argument("data_dir", help="folder that prepare_data.py wrote")
    parser.add_argument("file", type=Path, help="what the model wrote")
    args = parser.parse_args(arguments)
    vocabulary = vocabulary_of(TokenFile(args.data_dir, "train"))
    val = TokenFile(args.data_dir, "val")
    real = get_tokenizer(val.tokenizer, args.data_dir).decode(val.tokens[:200_000].tolist())
    shuffled = "".join(random.Random(0).sample(real, len(real)))
    written = "".join(read_text(args.file))
    results = {}
    for name, text in {"written": written, "validation": real, "shuffled": shuffled}.items():
        results[name] = {"share": fraction_known(text, vocabulary), "words": len(words(text))}
        print("{:10}  {share:6.1%} of {words} words occur in the training text".format(
            name, **results[name]))
    report(results)


if __name__ == "__main__":
    sys.exit(main())
