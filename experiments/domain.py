"""Does it learn a language of your own? python -m experiments.domain

Your own corpus is three commands: prepare_data.py FILES, train.py --data-dir, and a measurement.
The loss says how well the text is predicted. What a user wants to know is whether the output
*works*: a domain needs a metric of its own. Here the domain is the Python source that every machine
with Python has, the standard library, in tokens learned from it, and the metric: does it parse?

A line counts if it has 8 characters or more and is no comment. It parses if it is a statement by
itself, or the head of a block ("if x:", "else:"). The first and last line of a sample are cut.

    parse      fraction of the lines that parse, with its standard error
    lines      how many there were to judge
    different  fraction of different ones among those that parse
    filled     3 tokens inside a real line that parses are hidden, and written in 3 calls: fraction
               of these lines that still parse
    exact      fraction of these holes in which the very tokens of the real text were written

Real text, its tokens in random order and tokens by their frequency say what a number is worth.
"""

import ast
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor

import prepare_data
from experiments.lab.command import count, flags, report, several
from experiments.lab.judge import fraction_and_error, print_row
from experiments.lab.pictures import draw
from experiments.lab.runs import OUT, autocast, rows_of, trained
from plumbing.checkpoint import load_checkpoint
from plumbing.command import command
from prepare_data import DataError, get_tokenizer
from sample import generate

Decode = Callable[[list[int]], str]
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}
SAMPLERS = {
    "spread, 16 calls, 0.85": dict(order="spread", steps=16, temperature=0.85),
    "spread, 16 calls, 0.5": dict(order="spread", steps=16, temperature=0.5),
    "spread, 64 calls, 0.85": dict(order="spread", steps=64, temperature=0.85),
    "spread, 64 calls, 0.5": dict(order="spread", steps=64, temperature=0.5),
    "random, 64 calls, 0.5": dict(order="random", steps=64, temperature=0.5),
    "margin, 64 calls, 0.5": dict(order="margin", steps=64, temperature=0.5),
}
SIZE = 3  # tokens of a hole


def source_files(folder: Path) -> list[Path]:
    """The Python files below `folder` that are UTF-8, without tests and tables."""
    def is_text(path: Path) -> bool:
        try:
            return bool(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            return False

    found = [path for path in sorted(folder.rglob("*.py"))
             if not LEFT_OUT & set(path.relative_to(folder).parts) and is_text(path)]
    if not found:
        raise DataError(f"no Python files in {folder}: name another --source")
    return found


def prepared(source: Path, folder: str, tokenizer: str) -> None:
    """Make the corpus as a user would make it, once."""
    if not (Path(folder) / "meta.json").exists():
        files = source_files(source)
        how = ["--tokenizer", tokenizer, "--out-dir", folder]
        print(f"$ python prepare_data.py {files[0]} ... ({len(files)} files) {' '.join(how)}",
              flush=True)
        if code := prepare_data.main([*map(str, files), *how]):
            sys.exit(code)


def parses(line: str) -> bool:
    """Whether a line is Python by itself: one statement, or the head of a block, given a body."""
    code = line.strip()
    if len(code.splitlines()) != 1:
        return False
    if code.endswith(":"):
        code += " pass"
    elif code.startswith("@"):
        code += "\ndef f(): pass"
    if word := re.match(r"(elif|else|except|finally)\b", code):
        code = ("if x: pass\n" if word[1] in ("elif", "else") else "try: pass\n") + code
    try:
        with warnings.catch_warnings(action="ignore"):  # of invalid escapes
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def counts(line: str) -> bool:
    return len(line.strip()) >= 8 and not line.strip().startswith("#")


def judge_lines(name: str, texts: list[str]) -> dict:
    """A row of the first table."""
    lines = [line for text in texts for line in text.split("\n")[1:-1] if counts(line)]
    good = [line.strip() for line in lines if parses(line)]
    fraction, error = fraction_and_error([True] * len(good) + [False] * (len(lines) - len(good)))
    return {"lines of": name, "parse": fraction, "error": error, "lines": len(lines),
            "different": len({*good}) / max(1, len(good)),
            " one of them": min(good, key=lambda line: abs(len(line) - 24), default="")[:40]}


class Hole(NamedTuple):
    """A row of real text, a line in it that parses, and SIZE tokens of it that will be hidden."""

    row: Tensor  # (T,) int64, as it really is
    line: slice
    hidden: slice


def holes(x_0: Tensor, decode: Decode) -> list[Hole]:
    """One in each row (B,T) that has a line for it; always the same ones."""
    chance = random.Random(0)
    found = []
    for row in x_0:
        ends = [t for t, token in enumerate(row.tolist()) if "\n" in decode([token])]
        lines = [slice(a + 1, b) for a, b in zip(ends, ends[1:], strict=False) if b - a > SIZE + 1]
        texts = [decode(row[line].tolist()) for line in lines]
        lines = [line for line, text in zip(lines, texts, strict=True)
                 if counts(text) and parses(text)]
        if lines:
            line = chance.choice(lines)
            first = chance.randint(line.start, line.stop - SIZE)
            found.append(Hole(row, line, slice(first, first + SIZE)))
    if not found:
        raise DataError("no line of the validation text has room for a hole: use more text")
    return found


def judge_filled(name: str, filled: Tensor, real: list[Hole], decode: Decode) -> dict:
    """A row of the second table: of rows (n,T) whose holes were filled."""
    pairs = list(zip(filled, real, strict=True))
    good, error = fraction_and_error([parses(decode(row[hole.line].tolist()))
                                      for row, hole in pairs])
    exact, exact_error = fraction_and_error([torch.equal(row, hole.row) for row, hole in pairs])
    return {"holes filled by": name, "filled": good, "error": error, "exact": exact,
            "exact_error": exact_error}


def paint(panels, lines: list[dict], filled: list[dict]) -> None:
    """The two tables as bars, exact fillings black."""
    for axis, rows, value in zip(panels, (lines, filled), ("parse", "filled"), strict=True):
        names, *_ = zip(*(row.values() for row in rows), strict=True)
        axis.barh(names, [100 * row[value] for row in rows], capsize=3,
                  xerr=[100 * row["error"] * (row.get("lines", 1) > 0) for row in rows])
        axis.barh(names, [100 * row.get("exact", 0) for row in rows], height=0.3, color="black")
        axis.invert_yaxis()
        axis.set(xlim=(0, 100), xlabel=f"{value}, %")
    panels[0].set_title("Lines that parse")
    panels[1].set_title(f"The same after {SIZE} tokens were filled in; exactly so black")


@command("experiments.domain")
def main(arguments: list[str]) -> None:
    parser = flags("domain", __doc__, checkpoint=False)
    parser.set_defaults(data_dir=str(OUT / "python-source"))
    add = parser.add_argument
    add("--source", type=Path, default=Path(sysconfig.get_paths()["stdlib"]),
        help="folder of Python files")
    add("--tokenizer", default="bpe:2048", help="(default: %(default)s)")
    add("--config", default="configs/quickstart.toml", help="(default: %(default)s)")
    add("--steps", type=count, default=600, help="of training (default: %(default)s)")
    add("--num-samples", type=several, default=32, help="texts of each sampler (default: 32)")
    add("--rows", type=several, default=400, help="windows of real text (default: %(default)s)")
    args = parser.parse_args(arguments)
    prepared(args.source, args.data_dir, args.tokenizer)
    folder = trained("python", "--data-dir", args.data_dir, "--steps", str(args.steps),
                     config=args.config)
    model, info = load_checkpoint(folder)
    decode = get_tokenizer(info["tokenizer"], folder).decode
    mask_id = model.config.mask_id
    x_0 = rows_of(args.data_dir, args.rows, model.config.context_length)
    generator = Generator().manual_seed(1)

    shuffled = torch.stack([row[torch.randperm(len(row), generator=generator)] for row in x_0])
    drawn = x_0.flatten()[torch.randint(x_0.numel(), x_0.shape, generator=generator)]
    rows = {"real text": x_0, "its tokens shuffled": shuffled, "tokens by frequency": drawn}
    x = torch.full((args.num_samples, x_0.size(1)), mask_id)
    lines = []
    for name in [*rows, *SAMPLERS]:
        if name in SAMPLERS:
            with autocast():
                rows[name] = generate(model, x, mask_id, generator, **SAMPLERS[name])
        lines.append(judge_lines(name, [decode(row) for row in rows[name].tolist()]))
        print_row(lines[-1], heading=len(lines) == 1)

    real = holes(x_0, decode)
    x = torch.stack([hole.row for hole in real])
    hidden = torch.zeros_like(x, dtype=torch.bool)
    for row, hole in zip(hidden, real, strict=True):
        row[hole.hidden] = True
    own = torch.stack([row[torch.randperm(SIZE, generator=generator)]
                       for row in x[hidden].view(-1, SIZE)])
    by_frequency = x.flatten()[torch.randint(x.numel(), (int(hidden.sum()),), generator=generator)]
    rows = {"its own tokens shuffled": x.masked_scatter(hidden, own),
            "tokens by frequency": x.masked_scatter(hidden, by_frequency)}
    for temperature in (0.0, 0.5, 1.0):
        with autocast():
            rows[f"the model at temperature {temperature}"] = torch.cat([generate(
                model, part, mask_id, generator, order="margin", temperature=temperature)
                for part in x.masked_fill(hidden, mask_id).split(64)])
    print()
    filled = [judge_filled(name, row, real, decode) for name, row in rows.items()]
    for row in filled:
        print_row(row, heading=row is filled[0])
    draw(args.picture, lambda panels: paint(panels, lines, filled), columns=2, width=7)
    report({"lines": lines, "filled": filled})


if __name__ == "__main__":
    sys.exit(main())
