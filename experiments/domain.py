"""Does it learn a language of your own? python -m experiments.domain

The corpus of one's own is here the Python source that every machine with Python has: the standard
library, prepared by prepare_data.py as any files would be. Two models of the byte model's shape
train on it for as many steps: from scratch, and from the byte model's weights (--init-from), which
know English only.

The loss says how well. What a user wants to know is whether the output *works*, so a domain needs a
metric of its own; here: does it parse? Whole samples of 256 bytes hardly ever do, but lines can. A
line parses if it is a statement by itself, or the head of a block ("if x:", "else:"); empty lines,
comments and lines of less than 8 characters do not count, nor the first and last line of a sample,
which are cut.

    parse      fraction of the lines of samples that parse, with its standard error
    lines      how many there were to judge: a sampler may write none, but spaces
    different  fraction of different ones among the lines that parse: it may repeat one that does
    filled     8 bytes inside a real line that parses are hidden and filled: fraction that still
               parse
    exact      fraction of these holes in which the very bytes of the real text were written

Real text, its characters in random order and bytes drawn by their frequency say what a number is
worth.
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
from diffusion import mean_and_error
from experiments.lab.command import answer, count, flags, several
from experiments.lab.judge import fraction_and_error
from experiments.lab.pictures import draw
from experiments.lab.runs import OUT, autocast, pair_nelbos, rows_of, trained
from model import Transformer
from plumbing.checkpoint import load_checkpoint
from plumbing.command import command
from prepare_data import DataError, get_tokenizer
from sample import generate

Decode = Callable[[list[int]], str]
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}
SAMPLERS = {
    "random, temperature 1": dict(order="random", temperature=1.0),
    "random, temperature 0.7": dict(order="random", temperature=0.7),
    "random, temperature 0.5": dict(order="random", temperature=0.5),
    "the byte model's": dict(order="confidence", gumbel=1.0, remask="renoise", temperature=0.5),
    "margin + renoise, 0.5": dict(order="margin", remask="renoise", temperature=0.5),
}
SHORT = ("random, temperature 1", "the byte model's")  # for the other model
CHANCE = ("real text", "its lines shuffled", "bytes by frequency", "its bytes shuffled")
HOLE = 8  # bytes


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


def counted(text: str) -> list[str]:
    """The whole lines of a text that count: no comments, none of less than 8 characters."""
    lines = (line.strip() for line in text.split("\n")[1:-1])
    return [line for line in lines if len(line) >= 8 and not line.startswith("#")]


def judge(texts: list[str]) -> dict:
    """What the first table says of samples."""
    lines = [line for text in texts for line in counted(text)]
    verdicts = [parses(line) for line in lines]
    good = [line for line, verdict in zip(lines, verdicts, strict=True) if verdict]
    fraction, error = fraction_and_error(verdicts)
    example = min(good, key=lambda line: abs(len(line) - 20), default="")
    return {"parse": fraction, "stderr": error, "lines": len(lines),
            "different": len({*good}) / max(1, len(good)), "example": example}


class Hole(NamedTuple):
    """A row of real text with HOLE hidden bytes inside a line that parses."""

    row: Tensor  # (T,) int64, as it really is
    line: slice  # where the line is
    hidden: slice  # where the hole is, inside the line


def holes(x_0: Tensor, most: int) -> list[Hole]:
    """A hole in each row that has a line to put it into, `most` at most; always the same ones."""
    chance = random.Random(0)
    found = []
    for row in x_0:
        text = row.clamp(max=255).to(torch.uint8).numpy().tobytes()  # a byte is a token
        lines = [match for match in re.finditer(rb"(?<=\n) *([!-~][ -~]{15,})(?=\n)", text)
                 if counted(f"\n{match[1].decode()}\n") and parses(match[1].decode())]
        if lines and len(found) < most:
            start, end = chance.choice(lines).span(1)
            first = chance.randint(start, end - HOLE)
            found.append(Hole(row, slice(start, end), slice(first, first + HOLE)))
    if not found:
        raise DataError("no line of the validation text has room for a hole: use more text")
    return found


def judge_filled(filled: Tensor, real: list[Hole], decode: Decode) -> dict[str, float]:
    """What the second table says of rows (n,T) whose holes were filled."""
    pairs = list(zip(filled, real, strict=True))
    good = [parses(decode(row[hole.line].tolist())) for row, hole in pairs]
    exact = [torch.equal(row, hole.row) for row, hole in pairs]
    fraction, error = fraction_and_error(good)
    same, same_error = fraction_and_error(exact)
    return {"filled": fraction, "stderr": error, "exact": same, "exact_stderr": same_error}


def prepared(source: Path, folder: str) -> str:
    """The folder of the corpus, made as a user would make it, once."""
    if not (Path(folder) / "meta.json").exists():
        files = source_files(source)
        print(f"$ python prepare_data.py {files[0]} ... ({len(files)} files) --tokenizer byte "
              f"--out-dir {folder}", flush=True)
        how = ["--tokenizer", "byte", "--out-dir", folder]
        if code := prepare_data.main([*map(str, files), *how]):
            sys.exit(code)
    return folder


def baselines(x_0: Tensor, decode: Decode) -> dict[str, list[str]]:
    """Real rows, the same with the characters of each line shuffled, and bytes by frequency."""
    chance = random.Random(0)
    generator = Generator().manual_seed(0)
    texts = [decode(row) for row in x_0.tolist()]
    shuffled = ["\n".join("".join(chance.sample(line, len(line))) for line in text.split("\n"))
                for text in texts]
    drawn = x_0.flatten()[torch.randint(x_0.numel(), x_0.shape, generator=generator)]
    return {"real text": texts, "its lines shuffled": shuffled,
            "bytes by frequency": [decode(row) for row in drawn.tolist()]}


def write(model: Transformer, samples: int, steps: int, decode: Decode,
          options: dict) -> list[str]:
    """So many texts of the context's length, from nothing."""
    x = torch.full((samples, model.config.context_length), model.config.mask_id)
    with autocast():
        written = generate(model, x, model.config.mask_id, Generator().manual_seed(1), steps=steps,
                           **options)
    return [decode(row) for row in written.tolist()]


def fill(model: Transformer, real: list[Hole], temperature: float) -> Tensor:
    """The rows of the holes, (n,T), with what the model writes into them, a byte at a time."""
    x = torch.stack([hole.row for hole in real])
    for row, hole in zip(x, real, strict=True):
        row[hole.hidden] = model.config.mask_id
    with autocast():
        return generate(model, x, model.config.mask_id, Generator().manual_seed(1), steps=HOLE,
                        order="confidence", temperature=temperature)


def fill_by_chance(real: list[Hole]) -> dict[str, Tensor]:
    """The same rows, filled with the hole's own bytes shuffled, and with bytes by frequency."""
    x = torch.stack([hole.row for hole in real])
    generator = Generator().manual_seed(0)
    shuffled = x.clone()
    drawn = x.clone()
    for i, hole in enumerate(real):
        order = torch.randperm(HOLE, generator=generator)
        shuffled[i, hole.hidden] = x[i, hole.hidden][order]
        positions = torch.randint(x.numel(), (HOLE,), generator=generator)
        drawn[i, hole.hidden] = x.flatten()[positions]
    return {"its bytes shuffled": shuffled, "bytes by frequency": drawn}


def paint(axes, lines: dict[str, dict], filled: dict[str, dict]) -> None:
    """Left the lines that parse; right those of lines whose hole was filled, exact ones black."""
    for axis, rows, value in zip(axes, (lines, filled), ("parse", "filled"), strict=True):
        names = list(rows)
        percent = [100 * row[value] for row in rows.values()]
        errors = [100 * row["stderr"] * (row.get("lines", 1) > 0) for row in rows.values()]
        colors = ["silver" if name in CHANCE else "tab:blue" for name in names]
        axis.barh(names, percent, xerr=errors, capsize=3, color=colors)
        axis.invert_yaxis()
        axis.set_xlim(0, 100)
        for i, row in enumerate(rows.values()):
            if not row.get("lines", 1):
                axis.annotate("no lines", (2, i), va="center", color="grey")
    left, right = axes
    right.barh(list(filled), [100 * row["exact"] for row in filled.values()], height=0.3,
               color="black", label="exactly the real bytes")
    left.set(title="Lines of samples", xlabel="lines that parse, %")
    right.set(title=f"Holes of {HOLE} bytes in real lines", xlabel="filled lines that parse, %")
    right.legend(loc="lower right")


def conclude(terms: dict[str, Tensor], lines: dict[str, dict], filled: dict[str, dict]) -> str:
    """The answer in words, from `pair_nelbos` of each model and the two tables."""
    def said(row: dict, value: str) -> str:
        return f"{row[value]:.0%} +- {row['stderr']:.0%}"

    ours = {name: row for name, row in lines.items() if name.startswith("continued")}
    best = max(ours, key=lambda name: ours[name]["parse"])
    gain, error = mean_and_error(terms["from scratch"] - terms["continued"])
    holes_of = {name: said(filled[f"{name}, greedy"], "filled") for name in terms}
    return (f"starting from English lowers the NELBO by {gain:.3f} +- {error:.3f} nats/byte of "
            f"Python. With the best sampler, {best.removeprefix('continued, ')}, "
            f"{said(ours[best], 'parse')} of the written lines parse (of real ones "
            f"{lines['real text']['parse']:.0%}, of the same shuffled "
            f"{lines['its lines shuffled']['parse']:.0%}). Of lines with a hole filled greedily "
            f"parse {holes_of['continued']}, from scratch {holes_of['from scratch']}, by the model "
            f"that knows only English {holes_of['English only']}.")


def line_table(models: dict[str, Transformer], x_0: Tensor, samples: int, steps: int,
               decode: Decode) -> dict:
    """Print and return what `judge` says of real rows, of chance, and of samples."""
    print(f"\n{'lines of':44} {'parse':>12} {'lines':>6} {'different':>10}   one that parses")
    table = {}

    def report(name: str, texts: list[str]) -> None:
        row = judge(texts)
        table[name] = row
        cell = f"{row['parse']:5.0%} +- {row['stderr']:3.0%}" if row["lines"] else "    no lines"
        print(f"{name:44} {cell} {row['lines']:6} {row['different']:10.0%}   "
              f"{row['example'][:40]!r}", flush=True)

    for name, texts in baselines(x_0, decode).items():
        report(name, texts)
    for name, choice in (("continued", SAMPLERS), ("from scratch", SHORT)):
        for sampler in choice:
            texts = write(models[name], samples, steps, decode, SAMPLERS[sampler])
            report(f"{name}, {sampler}", texts)
    return table


def hole_table(models: dict[str, Transformer], real: list[Hole], decode: Decode) -> dict:
    """Print and return what `judge_filled` says of holes, by who filled them."""
    title = f"{len(real)} holes of {HOLE} bytes, filled by"
    print(f"\n{title:36} {'filled':>12} {'exact':>12}")
    table = {}

    def report(name: str, rows: Tensor) -> None:
        row = judge_filled(rows, real, decode)
        table[name] = row
        print(f"{name:36} {row['filled']:5.0%} +- {row['stderr']:3.0%} {row['exact']:5.0%} +- "
              f"{row['exact_stderr']:3.0%}", flush=True)

    for name, rows in fill_by_chance(real).items():
        report(name, rows)
    for name, model in models.items():
        for label, temperature in (("greedy", 0.0), ("temperature 0.5", 0.5),
                                   ("temperature 1", 1.0)):
            report(f"{name}, {label}", fill(model, real, temperature))
    return table


@command("experiments.domain")
def main(arguments: list[str]) -> None:
    parser = flags("domain", __doc__)
    add = parser.add_argument
    parser.set_defaults(data_dir=str(OUT / "python-source"))
    add("--source", type=Path, default=Path(sysconfig.get_paths()["stdlib"]),
        help="folder of Python files")
    add("--config", default="configs/bytes.toml", help="(default: the byte model's)")
    add("--steps", type=count, default=400, help="of training, each (default: 400)")
    add("--num-samples", type=count, default=32, help="texts of each sampler (default: 32)")
    add("--sampling-steps", type=count, default=64, help="to write them in (default: 64)")
    add("--holes", type=count, default=160, help="to fill (default: 160)")
    add("--rows", type=several, default=384, help="windows of validation text (default: 384)")
    args = parser.parse_args(arguments)
    english, info = load_checkpoint(args.checkpoint)
    decode = get_tokenizer(info["tokenizer"], args.checkpoint).decode
    folder = prepared(args.source, args.data_dir)
    steps = str(args.steps)
    settings = ["--data-dir", folder, "--steps", steps, "--eval-interval", steps,
                "--final-eval-rows", "32"]  # we measure better below
    scratch = trained("python-scratch", *settings, config=args.config)
    continued = trained("python-continued", *settings, "--init-from", args.checkpoint,
                        config=args.config)
    models = {"English only": english, "from scratch": load_checkpoint(scratch)[0],
              "continued": load_checkpoint(continued)[0]}

    x_0 = rows_of(folder, args.rows, english.config.context_length)
    terms = {}
    print(f"\n{'model':36} NELBO <=, nats per byte of Python")
    for name, model in models.items():
        with autocast():
            terms[name] = pair_nelbos(model, x_0, model.config.mask_id)
        print("{:36} {:.3f} +- {:.3f}".format(name, *mean_and_error(terms[name])), flush=True)
    lines = line_table(models, x_0, args.num_samples, args.sampling_steps, decode)
    filled = hole_table(models, holes(x_0, args.holes), decode)
    draw(args.picture, lambda axes: paint(axes, lines, filled), columns=2, width=7, height=5)
    bounds = {name: values.mean().item() for name, values in terms.items()}
    answer(conclude(terms, lines, filled), {"nelbo": bounds, "lines": lines, "filled": filled})


if __name__ == "__main__":
    sys.exit(main())
