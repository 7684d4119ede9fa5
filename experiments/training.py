"""What helps a network to learn? python -m experiments.training QUESTION

A question is a table of trainings: each row is the quickstart, cut short, with the flags it names.
Every row is trained with seeds 1, 2 and 3. In one seed all rows start from the same weights, read
the same text in the same order, and are measured on the same masks; so look at the differences to
the first row: their mean over the seeds, +- its standard error.

    masking     How much to hide? NELBO and CE by mask ratio, nats per token
    prefixes    Does it help prompts to keep the beginning visible? NELBO of the end of a text after
                prompts of so many tokens, nats per token
    repetition  Does text that is read again and again teach diffusion for longer than GPT? Nats per
                token of new text (NELBO <=, or GPT's exact NLL), by epochs
    dynamics    Why is my loss like this? A good run and three that are bad in one way each
    twin        What does GPT know after as much text? Bits per byte (NELBO <=, or the exact NLL),
                by millions of tokens read
    recipe      How were the quickstart's settings chosen? Bits per byte after its 800 steps, and
                seconds of training; 40 minutes per seed on 2 CPU cores
"""

import argparse
import math
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion import Batch, Curve, ask, mean_and_error, nelbo
from experiments.lab.command import count, flags, report, several
from experiments.lab.judge import print_row
from experiments.lab.pictures import draw
from experiments.lab.runs import OUT, Run, autocast, read_run, rows_of, small_corpus, trained
from plumbing.checkpoint import load_checkpoint
from plumbing.command import command
from prepare_data import TokenFile


class Row(NamedTuple):
    """A training: in what it differs from the quickstart."""

    flags: str = ""  # of train.py
    tokens: int = 0  # of training text, if not all
    leak: bool = False  # with a bug


Numbers = dict[str | float, float]  # by column; a column that is a number is the picture's x


class Question(NamedTuple):
    measure: Callable[[Run, argparse.Namespace], Numbers]  # of a run
    rows: dict[str, Row]  # the first one is compared with
    steps: int  # of training, if the flags of a row don't say
    evaluations: int = 1
    x: str = ""  # what the columns that are numbers count
    y: str = "nats per token"


# --- What is measured on a run --------------------------------------------------------------------

RATIOS = (0.05, 0.15, 0.3, 0.5, 0.7, 0.85, 1.0)
PROMPTS = (0, 16, 64, 192)
END = 64  # tokens that are scored after a prompt


def by_mask_ratio(run: Run, *_) -> Numbers:
    """The bound, and points of the curve whose mean height it is."""
    last = run.evaluations[-1]
    curve = Curve(**last["curve"])
    at = np.interp([ratio * curve.N for ratio in RATIOS], curve.counts, curve.nats)
    return {"NELBO": last["nats"], **dict(zip(RATIOS, at.tolist(), strict=True))}


def by_prompt(run: Run, args: argparse.Namespace) -> Numbers:
    model, _ = load_checkpoint(run.folder)
    x_0 = rows_of(args.data_dir, args.rows, model.config.context_length)
    with autocast():  # always of the same tokens, the last of a row
        return {p: nelbo(model, x_0[:, -END - p :], model.config.mask_id, p).nats
                for p in PROMPTS if p + END <= x_0.size(1)}


def by_epoch(run: Run, *_) -> Numbers:
    tokens = TokenFile(run.config["data_dir"], "train").num_tokens
    return {line["tokens"] / tokens: line["nats"] for line in run.evaluations}


def by_tokens(run: Run, *_) -> Numbers:
    return {line["tokens"] / 1e6: line["bits_per_byte"] for line in run.evaluations}


def both_losses(run: Run, *_) -> Numbers:
    nats = [line["nats"] for line in run.evaluations]
    return {"training, first": run.training[0]["loss"], "last": run.training[-1]["loss"],
            "NELBO, best": min(nats), "at the end": nats[-1]}


def bits_and_seconds(run: Run, *_) -> Numbers:
    return {"bits/byte": run.evaluations[-1]["bits_per_byte"],
            "seconds": run.training[-1]["seconds"]}


# --- The tables: to try something, add a row ------------------------------------------------------

CONSTANT = "--decay-fraction 0"  # or all curves would fall at the end, whatever was read
GPT = "--objective autoregressive"
QUESTIONS = {
    "masking": Question(by_mask_ratio, steps=120, x="mask ratio", rows={
        "all levels": Row(),
        "ten levels": Row("--mask-levels 10"),
        "always 50%": Row("--objective mlm --mlm-ratio 0.5"),
        "always 15%": Row("--objective mlm --mlm-ratio 0.15"),
    }),
    "prefixes": Question(by_prompt, steps=120, x="tokens of the prompt", rows={
        "none": Row(),
        "always 32": Row("--prefix-length 32"),
        "0 to 128": Row("--prefix-length-max 128"),
        "none, 6 rows": Row("--batch-size 6"),  # hides as many tokens as the row above: 3/4
    }),
    "repetition": Question(by_epoch, steps=240, evaluations=8, x="epochs", rows={
        "GPT": Row(f"{CONSTANT} {GPT}", tokens=16384),
        "diffusion": Row(CONSTANT, tokens=16384),
    }),
    "dynamics": Question(both_losses, steps=120, evaluations=12, rows={
        "good": Row(),
        "too hot": Row("--muon-learning-rate 0.3 --learning-rate 0.6 --grad-clip 0"),
        "starved": Row(tokens=4096),
        "leak": Row(leak=True),
    }),
    "twin": Question(by_tokens, steps=240, evaluations=6, x="million tokens read",
                     y="bits per byte", rows={
        "GPT": Row(GPT),
        "diffusion": Row(),
    }),
    "recipe": Question(bits_and_seconds, steps=800, rows={
        setting or "quickstart": Row(setting) for setting in (
            "", "--mask-positions random", "--mask-ratio bell", "--mask-ratio uniform",
            "--weighting nelbo", "--muon-learning-rate 0.005", "--muon-learning-rate 0.02",
            "--learning-rate 0.01", "--learning-rate 0.03", "--warmup-steps 10",
            "--warmup-steps 200", "--decay-fraction 1", "--ema-decay 0.99",
            "--batch-size 16 --steps 400", "--batch-size 4 --steps 1600", "--steps 400",
            "--n-layer 1", "--n-layer 3", "--n-embd 192", "--n-embd 320",
            "--n-layer 4 --n-embd 192")}),
}

# --- One runner -----------------------------------------------------------------------------------


def leak(x_0: Tensor, *arguments) -> Batch:
    """`ask` with a bug that is easily made: masked_fill returns a copy, which is thrown away."""
    return ask(x_0, *arguments)._replace(inputs=x_0)


LEAKING = ("-c", "import sys, train; from experiments.training import leak; "
                 "train.ask = leak; sys.exit(train.main())")


def path_of(*parts) -> str:
    """A name for a folder."""
    return re.sub("[^A-Za-z0-9]+", "-", " ".join(map(str, parts))).strip("-")


def train(row: Row, seed: int, args: argparse.Namespace) -> Run:
    """A finished run, in a folder named after its settings: two questions may share it."""
    question = QUESTIONS[args.question]
    steps = args.steps or question.steps
    interval = max(1, steps // question.evaluations)
    data_dir = args.data_dir
    if row.tokens:
        data_dir = OUT / "training-data" / path_of(args.data_dir, row.tokens)
        if not (data_dir / "meta.json").exists():
            small_corpus(args.data_dir, row.tokens, data_dir)
    name = path_of(row.flags or "as it is", row.tokens or "", "leak" * row.leak,
                   f"steps {steps} measured every {interval} seed {seed}")
    words = ["--data-dir", data_dir, "--seed", seed, "--steps", steps, "--eval-interval", interval,
             "--eval-rows", 32, "--final-eval-rows", args.rows, "--log-interval", 10]
    return read_run(trained(f"training/{name}", *map(str, words), *row.flags.split(),
                            config=args.config, program=LEAKING if row.leak else ()))


def differences(values: Tensor, base: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """How much more `values` are than `base`, both (S,K): means over seeds, and their errors."""
    means, errors = zip(*map(mean_and_error, (values - base).T), strict=True)
    return means, errors  # of a single seed the error is NaN


def compare(columns: list[str | float], numbers: dict[str, Tensor]) -> None:
    """Print the means over seeds of each row's numbers (S,K), and its differences to the first."""
    names = ["", *(name if isinstance(name, str) else f"{name:.3g}" for name in columns)]
    base = next(iter(numbers))
    for label, values in numbers.items():
        lines = [[label, *values.mean(0).tolist()]]
        if label != base:
            more, errors = differences(values, numbers[base])
            lines += [[f"  more than {base}", *more], ["  +-", *errors]]
        for line in lines:
            print_row(dict(zip(names, line, strict=True)), heading=line[0] == base)


def references(data_dir: str) -> dict[str, float]:
    """What two networks without any knowledge of the text would lose, nats per token."""
    file = TokenFile(data_dir, "train")
    counts = np.bincount(file.tokens, minlength=file.vocab_size) + 1  # nothing is impossible
    nats = -np.log(counts / counts.sum())[TokenFile(data_dir, "val").tokens].mean()
    return {"ln V: all tokens alike": math.log(file.vocab_size), "token frequencies": float(nats)}


def paint(panels, question: Question, columns: list[str | float],
          numbers: dict[str, Tensor]) -> None:
    """The means of each row over the columns, which are numbers; its differences to the first."""
    left, right = panels
    base = next(iter(numbers))
    chosen = [i for i, name in enumerate(columns) if not isinstance(name, str)]
    xs = [columns[i] for i in chosen]
    for label, values in numbers.items():
        left.plot(xs, values.mean(0)[chosen], marker=".", label=label)
        more, errors = differences(values[:, chosen], numbers[base][:, chosen])
        right.errorbar(xs, more, errors, marker=".", capsize=2)
    left.set(xlabel=question.x, ylabel=question.y, title="Mean over seeds")
    right.set(xlabel=question.x, title=f"More than {base}, with standard errors")
    left.legend()


def paint_dynamics(panels, runs: dict[str, list[Run]]) -> None:
    """The good run by mask ratio; training (dashed) and validation of all; of the first seed."""
    left, right = panels
    good = runs["good"][0].evaluations[:-1]
    counts = good[0]["curve"]["counts"]
    for i, m in list(enumerate(counts))[1:]:  # of m = 1 there are too few tokens
        ratio = m / counts[-1]
        left.plot([line["step"] for line in good], [line["curve"]["nats"][i] for line in good],
                  color=(ratio, 0.3, 1 - ratio), label=f"{ratio:.0%}")
    left.set(title="good: CE by mask ratio", xlabel="steps", ylabel="nats per hidden token")
    left.legend(fontsize=8, ncols=3)
    for i, (label, (run, *_)) in enumerate(runs.items()):
        right.plot([line["step"] for line in run.training],
                   [line["loss"] for line in run.training], f"C{i}--")
        right.plot([line["step"] for line in run.evaluations],
                   [line["nats"] for line in run.evaluations], f"C{i}-", label=label)
    right.set(title="dashed: training; solid: validation", xlabel="steps", ylim=(0, 16),
              ylabel="nats per token")
    right.legend()


@command("experiments.training")
def main(arguments: list[str]) -> None:
    parser = flags("training", __doc__, checkpoint=False)
    parser.set_defaults(picture=None)
    add = parser.add_argument
    add("question", choices=list(QUESTIONS))
    add("--seeds", type=count, nargs="+", default=[1, 2, 3], help="(default: 1 2 3)")
    add("--steps", type=count, help="of each training (default: 120 or 240; of recipe: 800)")
    add("--rows", type=several, default=256, help="of validation text (default: %(default)s)")
    add("--config", default="configs/quickstart.toml", help="(default: %(default)s)")
    args = parser.parse_args(arguments)
    picture = args.picture or OUT / f"training-{args.question}.png"
    question = QUESTIONS[args.question]
    runs = {}
    numbers = {}
    for label, row in question.rows.items():
        runs[label] = [train(row, seed, args) for seed in args.seeds]
        measured = [question.measure(run, args) for run in runs[label]]
        columns = list(measured[0])
        numbers[label] = torch.tensor([list(one.values()) for one in measured]).double()
    print(f"\n{args.question}: means over the seeds {args.seeds}")
    compare(columns, numbers)
    result = {"columns": columns, "seeds": args.seeds,
              "numbers": {label: values.tolist() for label, values in numbers.items()}}
    if args.question == "dynamics":
        result["references"] = references(args.data_dir)
        print(*(f"{what:30}{nats:.2f}" for what, nats in result["references"].items()), sep="\n")
        draw(picture, lambda panels: paint_dynamics(panels, runs), columns=2)
    elif question.x:
        draw(picture, lambda panels: paint(panels, question, columns, numbers), columns=2)
    report(result)


if __name__ == "__main__":
    sys.exit(main())
