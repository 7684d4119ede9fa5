"""What the experiments share: training runs that are kept, pictures, the answer at the end.

    python -m experiments.NAME [--checkpoint out/quickstart] [--data-dir data/sotu] [--picture FILE.png]

An experiment trains what it needs in out/experiments/, where a second run finds it, prints a table, draws it
(in out/experiments/NAME.png by default), and ends with the answer in a sentence and a JSON line.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from configs import ConfigError, Parser
from diffusion import Model, draw_mask, draw_num_masked, keyed_generator, row_losses
from model import CheckpointError, choose_dtype
from prepare_data import DataError, TokenFile, get_tokenizer, write_dataset

TRAIN = Path(__file__).parent.parent / "train.py"
OUT = Path("out/experiments")


def command(main: Callable) -> Callable[..., int]:
    """`main(arguments)` as a command: a mistake of the user's is one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(arguments: list[str] | None = None) -> int:
        try:
            main(arguments)
        except (CheckpointError, ConfigError, DataError) as error:
            name = Path(sys.modules[main.__module__].__file__).stem
            print(f"experiments.{name}: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
        return 0

    return wrapped


def flags(name: str, doc: str, checkpoint: bool = True, data_dir: bool = True) -> Parser:
    """A parser with what all experiments take, or without the flag of a folder that this one does not read.

    doc: of the module; its first line is the question.
    """
    parser = Parser(prog=f"experiments.{name}", description=doc.split("\n")[0])
    if checkpoint:
        parser.add_argument("--checkpoint", default="out/quickstart", help="(default: %(default)s)")
    if data_dir:
        parser.add_argument("--data-dir", default="data/sotu", help="(default: %(default)s)")
    parser.add_argument("--picture", type=Path, default=OUT / f"{name}.png", help="the PNG to draw")
    return parser


def count(text: str) -> int:
    """The type of a flag that counts something: 1 or more."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def several(text: str) -> int:
    """The type of a flag that counts what a standard error is taken over: 2 or more."""
    if (number := int(text)) < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, not {number}")
    return number


def trained(name: str, *settings: str, config: str = "configs/quickstart.toml",
            program: tuple[str | Path, ...] = (TRAIN,), out: Path = OUT) -> Path:
    """The folder of a finished run of train.py: found in out/experiments/NAME, continued, or trained now.

    settings: flags of train.py. If it fails, it has said why, and we end with its exit code; a run of this
    name with other settings is such a failure: delete its folder to train anew.
    program: what Python runs, if not train.py itself: a module of ours that calls train.main in its turn.
    """
    folder = out / name
    resume = ["--resume"] if (folder / "state.pt").exists() else []
    shown = " ".join("train.py" if word == TRAIN else str(word) for word in program)
    print(f"$ python {shown} {' '.join([config, *settings])} --out-dir {folder}", flush=True)
    large_pages = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # faster on Linux, see bench/NOTES.md
    result = subprocess.run([sys.executable, *program, config, *settings, "--out-dir", folder, *resume],
                            env=large_pages | os.environ | {"PYTHONPATH": str(TRAIN.parent)})
    if result.returncode:
        sys.exit(result.returncode)
    return folder


def small_corpus(data_dir: str, tokens: int, out_dir: Path) -> Path:
    """A corpus in which training text is scarce: `tokens` of it, the validation text whole; its folder.

    The text is taken in windows of up to 1024 tokens, evenly spread: its beginning alone would be the oldest.
    """
    train, val = (TokenFile(data_dir, split) for split in ("train", "val"))
    tokenizer, length = get_tokenizer(train.tokenizer), min(1024, tokens)
    end = tokenizer.decode([tokenizer.eot_token])
    windows = train.spread(max(1, tokens // length), length)
    texts = [("train", window) for window in windows.tolist()] + [("val", val.tokens.tolist())]
    documents = ((split, [text]) for split, ids in texts for text in tokenizer.decode(ids).split(end) if text)
    write_dataset(documents, train.tokenizer, out_dir, f"{tokens} tokens of {data_dir}")
    return out_dir


def read_log(folder: Path) -> tuple[list[dict], list[dict]]:
    """(lines of training, evaluations) of a run's log.jsonl."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "nats" in line]


def autocast(device: str = "cpu") -> torch.autocast:
    """Matrix products in bfloat16 where the hardware has them: writing and measuring take half the time."""
    fast = choose_dtype("auto", torch.device(device)) == torch.bfloat16
    return torch.autocast(device, torch.bfloat16, enabled=fast)


def rows_of(data_dir: str, rows: int, length: int) -> Tensor:
    """(rows or fewer, length) int64: windows of validation text, always the same ones, an even number."""
    x_0 = torch.from_numpy(TokenFile(data_dir, "val").spread(rows, length))
    if len(x_0) < 2:
        raise DataError(f"{data_dir} has too little validation text to measure on: prepare more")
    return x_0[: len(x_0) // 2 * 2]


@torch.no_grad()
def pair_nelbos(model: Model, x_0: Tensor, mask_id: int, prefix_length: int = 0, seed: int = 0) -> Tensor:
    """(B/2,) float64: what `diffusion.nelbo` is the mean of, an antithetic pair of rows each; B even.

    Models are asked the same questions, so their difference, taken pair by pair, is known far better than
    the NELBO of either.
    """
    B, T = x_0.shape
    generator = keyed_generator(seed, 0, "nelbo")
    num_masked = draw_num_masked(B, T - prefix_length, generator)
    mask = draw_mask(num_masked, T, prefix_length, generator)
    by_row = row_losses(model, x_0.masked_fill(mask, mask_id), x_0, mask, batch_size=32)
    return by_row.view(-1, 2).mean(1)


def share_and_error(yes: Sequence[bool] | Tensor) -> tuple[float, float]:
    """The share of True in n answers and its standard error, as if one more of each had been seen: 0 of 32
    is not known to be none at all."""
    n, count = len(yes), int(sum(yes))
    p = (count + 1) / (n + 2)
    return count / max(1, n), (p * (1 - p) / max(1, n)) ** 0.5


def draw(path: Path, paint: Callable, columns: int = 1, rows: int = 1, width: float = 5.0,
         height: float = 4.0) -> None:
    """Save what `paint(axes)` draws, or say in one line why not. width, height: inches of a panel."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure = pyplot.figure(figsize=(width * columns, height * rows), layout="constrained")
        paint(figure.subplots(rows, columns))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        print(f"picture: {path}")
    except ImportError:
        print("no picture: it needs matplotlib (pip install matplotlib)", file=sys.stderr)
    except OSError as error:
        print(f"no picture: {error}", file=sys.stderr)


def answer(sentence: str, figures: dict) -> None:
    """The end of every experiment: the answer, and one JSON line with what it rests on."""
    print(f"\nAnswer: {sentence}\n{json.dumps(figures)}")
