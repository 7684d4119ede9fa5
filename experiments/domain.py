"""Does it learn a language of your own? python -m experiments.domain

The loss says how well the text is predicted. What a user wants to know is whether the output
*works*: a domain needs a metric of its own. Here the domain is the Python source that every machine
with Python has, the standard library, in tokens learned from it, and the metric: does it parse?

A line counts if it has 8 characters or more and is no comment. It parses if it is a statement by
itself, or the head of a block ("if x:", "else:"). The first and last line of a sample are cut.

    fraction  of the lines that parse, with its standard error over texts. Of "holes", 3 tokens
              inside a real line that parses were hidden and filled in again; "exactly": with the
              very tokens of the real text

Real text and its tokens in random order say what a number is worth.
"""

import ast
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Generator, Tensor

import prepare_data
from experiments.lab.command import count, flags, report, several
from experiments.lab.judge import print_row
from experiments.lab.pictures import draw
from experiments.lab.runs import OUT, autocast, rows_of, trained
from plumbing.checkpoint import load_checkpoint
from plumbing.command import command
from prepare_data import DataError, get_tokenizer
from sample import generate

LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}
SAMPLERS = {
    "spread, 16 calls": dict(order="spread", steps=16, top_k=200),
    "spread, 64 calls, 0.5": dict(order="spread", steps=64, temperature=0.5),
    "random, 64 calls, 0.5": dict(order="random", steps=64, temperature=0.5),
    "margin, 64 calls, 0.5": dict(order="margin", steps=64, temperature=0.5),
}
SIZE = 3  # tokens of a hole


def prepare(source: Path, folder: str, tokenizer: str) -> None:
    """Make the corpus from the Python files below `source`, as a user would make it, once."""
    if not (Path(folder) / "meta.json").exists():
        files = [str(path) for path in sorted(source.rglob("*.py"))
                 if not LEFT_OUT & set(path.relative_to(source).parts)]
        if not files:
            raise DataError(f"no Python files in {source}: name another --source")
        if code := prepare_data.main([*files, "--tokenizer", tokenizer, "--out-dir", folder]):
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


def whole_lines(text: str) -> list[str]:
    """Those that count, without the first and the last, which are cut."""
    return [line for line in text.split("\n")[1:-1] if counts(line)]


def line_around(row: list[int], hole: slice, decode: Callable[[list[int]], str]) -> str:
    """The line of a text that a hole is in, with the tokens that are in it now."""
    before = decode(row[: hole.start]).split("\n")[-1]
    behind = decode(row[hole.stop :]).split("\n")[0]
    return before + decode(row[hole]) + behind


def judge(name: str, verdicts: list[list[bool]]) -> dict:
    """A row of the table: of the verdicts on each of some texts."""
    good = torch.tensor([*map(sum, verdicts)], dtype=torch.float64)  # (texts,)
    judged = torch.tensor([*map(len, verdicts)], dtype=torch.float64)
    n = judged.sum().clamp(min=1)
    p = good.sum() / n
    # Lines of one text are alike, so the error is over texts: of what each has beyond its share.
    error = len(verdicts) ** 0.5 * (good - p * judged).std() / n
    return {"lines of": name, "fraction": p.item(), "error": error.item()}


def judge_lines(name: str, texts: list[list[str]]) -> dict:
    """A row with an example: of the lines of each of some texts."""
    good = [line.strip() for lines in texts for line in lines if parses(line)]
    example = min(good, key=lambda line: abs(len(line) - 24), default="")  # of a usual length
    row = judge(name, [[parses(line) for line in lines] for lines in texts])
    return row | {" one of them": example[:40]}


def paint(axes, rows: list[dict]) -> None:
    """The table as bars."""
    axes.barh([row["lines of"] for row in rows], [100 * row["fraction"] for row in rows],
              xerr=[100 * row["error"] for row in rows], capsize=3)
    axes.invert_yaxis()
    axes.set(title="Lines that parse, and holes filled exactly", xlim=(0, 100), xlabel="%")


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
    args = parser.parse_args(arguments)
    prepare(args.source, args.data_dir, args.tokenizer)
    folder = trained("python", "--data-dir", args.data_dir, "--steps", str(args.steps),
                     config=args.config)
    model, info = load_checkpoint(folder)
    decode = get_tokenizer(info["tokenizer"], folder).decode
    mask_id = model.config.mask_id
    x_0 = rows_of(args.data_dir, 800, model.config.context_length)
    T = x_0.size(1)
    generator = Generator().manual_seed(1)

    def shuffled(tokens: Tensor) -> Tensor:  # (B,T): each row in an order of its own
        return tokens.gather(1, torch.rand(tokens.shape, generator=generator).argsort(1))

    texts = {"real text": x_0, "its tokens shuffled": shuffled(x_0)}
    x = torch.full((args.num_samples, T), mask_id)
    with autocast():
        for name, options in SAMPLERS.items():
            texts[name] = generate(model, x, mask_id, generator, **options)
    table = [judge_lines(name, [whole_lines(decode(row)) for row in tokens.tolist()])
             for name, tokens in texts.items()]

    hole = slice(T // 2, T // 2 + SIZE)
    lines = [line_around(row, hole, decode) for row in x_0.tolist()]
    fit = ["\n" not in line and counts(line) and parses(line) for line in lines]
    real = x_0[torch.tensor(fit)]
    own = real.clone()
    own[:, hole] = shuffled(real[:, hole])
    x = real.clone()
    x[:, hole] = mask_id
    with autocast():
        filled = generate(model, x, mask_id, order="margin", temperature=0.0)
    for name, tokens in (("holes filled greedily", filled), ("holes shuffled", own)):
        lines = [[line_around(row, hole, decode)] for row in tokens.tolist()]
        exact = (tokens == real).all(1, keepdim=True).tolist()
        table += [judge_lines(name, lines), judge(f"{name}, exactly", exact)]
    for row in table:
        print_row(row, heading=row is table[0])
    draw(args.picture, lambda axes: paint(axes, table), width=8)
    report({"rows": table})


if __name__ == "__main__":
    sys.exit(main())
