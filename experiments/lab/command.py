"""The command line of an experiment:

    python -m experiments.NAME [--checkpoint out/quickstart] [--data-dir data/sotu] [--picture FILE]

An experiment trains what it needs in out/experiments/, where a second run finds it, prints a table,
draws it (into out/experiments/ unless told otherwise), and ends with one JSON line of the numbers.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from experiments.lab.runs import OUT
from plumbing.config import Parser


def at_least(least: int) -> Callable[[str], int]:
    """The type of a flag that is a whole number, `least` or more."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
        return value

    return number


count = at_least(1)
several = at_least(2)  # what a standard error is taken over


def flags(name: str, doc: str, checkpoint: bool = True, data_dir: bool = True) -> Parser:
    """A parser with what all experiments take, less the flag of a folder that this one won't read.

    doc: of the module; its first line is the question.
    """
    parser = Parser(prog=f"experiments.{name}", description=doc.split("\n")[0])
    add = parser.add_argument
    if checkpoint:
        add("--checkpoint", default="out/quickstart", help="(default: %(default)s)")
    if data_dir:
        add("--data-dir", default="data/sotu", help="(default: %(default)s)")
    add("--picture", type=Path, default=OUT / f"{name}.png", help="the PNG to draw")
    return parser


def flags_with_judge(name: str, doc: str, num_samples: int = 16) -> Parser:
    """`flags`, and those of writing samples and judging them."""
    parser = flags(name, doc)
    parser.add_argument("--judge", default="out/quickstart-ar", help="(default: %(default)s)")
    parser.add_argument("--num-samples", type=several, default=num_samples,
                        help="texts of each row of the table (default: %(default)s)")
    return parser


def report(numbers: dict) -> None:
    """The end of every experiment: one JSON line with what its table rests on."""
    print("\n" + json.dumps(numbers))
