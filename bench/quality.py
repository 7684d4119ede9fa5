"""What does the time buy? Three measurements, each of which ends with a table and one JSON line:

    python -m bench.quality time-to-loss configs/shakespeare.toml --minutes 20 --our-minutes 4
        minutes until train.py's validation NELBO is where the plain recipe (bench/plain.py) ends
    python -m bench.quality twin out/quickstart out/quickstart-ar
        a run's NELBO beside its autoregressive twin's exact NLL, at equal tokens and at equal time
    python -m bench.quality frontier --checkpoint out/quickstart --judge out/quickstart-ar
        likelihood under the twin against entropy of what is written, by steps and temperature

Time is time spent training: compiling counts; starting, measuring and saving do not.
"""

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator

from bench.plain import PlainTransformer, train_plainly
from configs import ConfigError, Parser, load
from diffusion import REMASKS, denoise, left_to_right_model, nelbo
from experiments.lab import TRAIN
from experiments.samplers import ORDERS, figures, load_twins, real_text
from model import CheckpointError, ModelConfig, count_parameters
from prepare_data import DataError, TokenFile
from train import TrainConfig, choose_device, show


class Point(NamedTuple):
    """An evaluation: validation nats per token, after so many steps, tokens and seconds of training."""

    step: int
    tokens: int
    seconds: float
    nats: float
    stderr: float
    rows: int


class Run(NamedTuple):
    """A training run, as its folder tells it."""

    config: dict
    points: list[Point]
    compiling: float  # seconds that the first steps took beyond the usual: compiling, almost all of it


def read_run(folder: Path) -> Run:
    """The run that train.py wrote into `folder`. CheckpointError with one line if there is none.

    Its log says how fast each stretch of steps was, measuring and saving excluded: added up, the clock.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        trained, measured = ([line for line in lines if key in line] for key in ("tokens_per_second", "nats"))
        tokens = config["batch_size"] * config["context_length"]  # of a step
        steps = [0, *(line["step"] for line in trained)]
        seconds = [tokens / max(1, line["tokens_per_second"]) for line in trained]  # of a step
        clock = [0.0, *np.cumsum(np.diff(steps) * seconds)]
        compiling = steps[1] * max(0.0, seconds[0] - statistics.median(seconds[1:] or seconds))
        points = [Point(line["step"], line["step"] * tokens, float(np.interp(line["step"], steps, clock)),
                        line["nats"], line["stderr"], line["rows"]) for line in measured]
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}; name a folder of train.py") from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{folder} has no readable log of a training run ({error!r})") from None
    if not points:
        raise CheckpointError(f"{folder} was never evaluated: train on, or with a smaller --eval-interval")
    return Run(config, points, compiling)


# --- Time to loss ---------------------------------------------------------------------------------


def train_ours(config: Path, flags: list[str], out_dir: Path) -> Run:
    """Run train.py in a process of its own, which compiles from nothing. Where it fails, so do we."""
    sys.stdout.flush()
    with tempfile.TemporaryDirectory() as empty:
        command = [sys.executable, str(TRAIN), str(config), *flags, f"--out-dir={out_dir}"]
        result = subprocess.run(command, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": empty})
    if result.returncode:
        sys.exit(result.returncode)  # it has said why
    return read_run(out_dir)


def affordable_steps(config: Path, flags: list[str], out_dir: Path, minutes: float) -> int:
    """How many steps train.py makes in so many minutes, compiling included, judged by its first six."""
    few = ["--max-steps=6", "--log-interval=1", "--eval-interval=6", "--eval-rows=2", "--final-eval-rows=2"]
    _, (*_, last), compiling = train_ours(config, flags + few, out_dir)
    return max(1, int((60 * minutes - compiling) / ((last.seconds - compiling) / last.step)))


def train_plain(cfg: TrainConfig, minutes: float, measurements: int) -> list[Point]:
    """The plain recipe on the data, shape and batch of `cfg`, measured on the windows that train.py uses."""
    train_file, val_file = TokenFile(cfg.data_dir, "train"), TokenFile(cfg.data_dir, "val")
    device, T, limit = choose_device(cfg.device), cfg.context_length, 60 * minutes
    torch.manual_seed(cfg.seed)
    config = ModelConfig(train_file.vocab_size, T, cfg.n_layer, cfg.n_head, cfg.n_embd)
    model = PlainTransformer(config).to(device)
    x_0 = torch.from_numpy(val_file.spread(cfg.eval_rows, T)).to(device)
    show(f"plain: {count_parameters(model) / 1e6:.1f}M parameters on {device}, float32, eager", stays=True)
    points: list[Point] = []
    seconds, shown, tick = 0.0, 0.0, time.monotonic()
    for step, value in enumerate(train_plainly(model, train_file, cfg.batch_size, cfg.seed), start=1):
        seconds += time.monotonic() - tick
        if not math.isfinite(value):
            raise FloatingPointError(f"the plain recipe's loss of step {step} is {value}")
        if seconds - shown > 5:
            show(f"plain: step {step}  loss {value:.3f}  {seconds / step:.3f} s/step  "
                 f"{max(0, limit - seconds):.0f} s left")
            shown = seconds
        if seconds >= limit * min(1, (len(points) + 1) / measurements):
            bound = nelbo(model, x_0, config.mask_id, batch_size=cfg.batch_size)
            tokens = step * cfg.batch_size * T
            points.append(Point(step, tokens, seconds, bound.nats, bound.stderr, len(x_0)))
            show(f"plain: {seconds / 60:.2f} min, step {step}: NELBO <= {bound.nats:.3f} "
                 f"+- {bound.stderr:.3f} nats/token", stays=True)
        if seconds >= limit:
            return points
        tick = time.monotonic()


def time_to_loss(args: argparse.Namespace, flags: list[str]) -> dict:
    """Train ours, then the plain recipe (in this order, as train.py checks the flags), and compare."""
    cfg = load(TrainConfig, args.config, flags, "bench.quality time-to-loss")
    if cfg.objective != "diffusion" or cfg.prefix_length or cfg.resume or cfg.init_from:
        raise ConfigError("time-to-loss wants a new run of objective diffusion, without a prefix")
    print(f"{args.config}: {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        steps = args.steps
        if steps is None:
            print(f"six steps, to see how many fit into {args.our_minutes:g} minutes:", flush=True)
            steps = affordable_steps(args.config, flags, Path(temporary) / "six", args.our_minutes)
        pace = {"steps": steps, "log-interval": 1, "eval-interval": math.ceil(steps / args.measurements),
                "final-eval-rows": cfg.eval_rows}
        ours = train_ours(args.config, flags + [f"--{name}={value}" for name, value in pace.items()],
                          args.out_dir or Path(temporary) / "ours")
    plain = train_plain(cfg, args.minutes, args.measurements)

    goal, last, compiling = plain[-1], ours.points[-1], ours.compiling
    reached = next((point for point in ours.points if point.nats <= goal.nats), None)
    print("\nrun     step   minutes  without compiling  NELBO <=")
    for name, points, extra in (("plain", plain, 0.0), ("ours", ours.points, compiling)):
        for point in points:
            print(f"{name:6} {point.step:5} {point.seconds / 60:9.2f} {(point.seconds - extra) / 60:18.2f}  "
                  f"{point.nats:.3f} +- {point.stderr:.3f}" + ("  <- reached" if point is reached else ""))
    step_seconds = {"plain": goal.seconds / goal.step, "ours": (last.seconds - compiling) / last.step}
    print(f"\na step: plain {step_seconds['plain']:.3f} s, ours {step_seconds['ours']:.3f} s and once "
          f"{compiling:.1f} s of compiling")
    result = {"config": str(args.config), "flags": flags, "steps": steps, "step_seconds": step_seconds,
              "torch": torch.__version__, "threads": torch.get_num_threads(), "compiling": compiling,
              "plain": [point._asdict() for point in plain],
              "ours": [point._asdict() for point in ours.points],
              "goal": goal.nats, "minutes": None, "ratio": None, "ratio_without_compiling": None}
    if reached:
        result["minutes"] = reached.seconds / 60
        result["ratio"] = goal.seconds / reached.seconds
        result["ratio_without_compiling"] = goal.seconds / (reached.seconds - compiling)
        print("{goal:.3f} nats/token: ours after {minutes:.2f} minutes, {ratio:.1f} times as fast as plain "
              "({ratio_without_compiling:.1f} times without compiling)".format(**result))
    else:
        print(f"{goal.nats:.3f} nats/token: ours has not reached it, but {last.nats:.3f}: give it more steps")
    draw(args.picture, {name: [(point.seconds / 60, point.nats) for point in points] for name, points in
                        (("plain", plain), ("ours", ours.points))}, "minutes", "NELBO <=, nats per token")
    return result


# --- The twin -------------------------------------------------------------------------------------


def at(points: list[Point], what: str, value: float) -> float | None:
    """Nats where the field `what` (tokens or seconds) is `value`, on a straight line between evaluations;
    None before the first and after the last."""
    xs = [getattr(point, what) for point in points]
    return float(np.interp(value, xs, [point.nats for point in points])) if xs[0] <= value <= xs[-1] else None


def twin(args: argparse.Namespace) -> dict:
    """A table with a row for each evaluation of the run. The twin's NLL is interpolated."""
    run, other = read_run(args.run), read_run(args.twin)
    for folder, config, causal in ((args.run, run.config, False), (args.twin, other.config, True)):
        if (config.get("objective") == "autoregressive") != causal:
            raise ConfigError(f"{folder} is a run of objective {config.get('objective')}; name the diffusion "
                              "run first and its autoregressive twin second")
    for name in ("data_dir", "context_length", "n_layer", "n_head", "n_embd"):
        if run.config.get(name) != other.config.get(name):
            raise ConfigError(f"{args.twin} is no twin of {args.run}: {name} {other.config.get(name)} is not "
                              f"{run.config.get(name)}")
    print(f"{'':31}| at equal tokens | at equal time\n{'tokens':>12} minutes  NELBO <= | "
          f"   NLL  NELBO-NLL|    NLL  NELBO-NLL   rows")
    rows = []
    for point in run.points:
        row = {"nll_at_equal_tokens": at(other.points, "tokens", point.tokens),
               "nll_at_equal_time": at(other.points, "seconds", point.seconds)}
        cells = ("     -          - " if nll is None else f"{nll:7.3f} {point.nats - nll:+10.3f}"
                 for nll in row.values())
        print(f"{point.tokens:12,} {point.seconds / 60:7.2f}  {point.nats:8.3f} |{'|'.join(cells)} "
              f"{point.rows:6}")
        rows.append(point._asdict() | row)
    end = other.points[-1]
    print(f"the twin ends at {end.nats:.3f} +- {end.stderr:.3f} after {end.tokens:,} tokens and "
          f"{end.seconds / 60:.2f} minutes")
    draw(args.picture, {name: [(point.seconds / 60, point.nats) for point in points] for name, points in
                        (("NELBO <=", run.points), ("the twin's NLL", other.points))},
         "minutes", "nats per token")
    return {"run": str(args.run), "twin": str(args.twin), "rows": rows,
            "twin_points": [point._asdict() for point in other.points]}


# --- The frontier ---------------------------------------------------------------------------------


def frontier(args: argparse.Namespace) -> dict:
    """A table with a row for each number of steps and temperature, and of the twin's own writing."""
    twins = load_twins(args.checkpoint, args.judge, args.data_dir)
    model, N, mask_id = twins.model, twins.N, twins.mask_id
    options = ORDERS[args.order] | {"remask": args.remask}
    writers = {"the twin": (left_to_right_model(twins.judge, mask_id), dict(order="left_to_right", steps=N))}
    writers |= {f"{steps} steps": (model, options | {"steps": steps}) for steps in args.steps}

    print(f"{args.order}, remasking {args.remask}, {args.num_samples} samples of {N} tokens\n"
          "writer      temperature   judge  entropy  distinct   words")
    rows = []

    def report(writer: str, temperature: float, tokens: torch.Tensor) -> None:
        row = figures(twins, tokens)
        rows.append({"writer": writer, "temperature": temperature} | row)
        print(f"{writer:12} {temperature:10.2f} {row['judge']:7.3f} {row['entropy']:8.3f} "
              f"{row['distinct']:9.3f} {row['words']:7.1%}", flush=True)

    report("real text", 1.0, real_text(twins, args.num_samples))
    for writer, (network, how) in writers.items():
        for temperature in args.temperatures:
            x, generator = torch.full((args.num_samples, N), mask_id), Generator().manual_seed(1)
            *_, last = denoise(network, x, mask_id, temperature=temperature, generator=generator, **how)
            report(writer, temperature, last.tokens)
    lines = {writer: [(row["entropy"], row["judge"]) for row in rows if row["writer"] == writer]
             for writer in ("real text", *writers)}
    draw(args.picture, lines, "entropy of a sample's tokens, nats", "nats per token under the twin")
    return {"checkpoint": str(args.checkpoint), "judge": str(args.judge), "order": args.order,
            "remask": args.remask, "rows": rows}


# --- Pictures and the command line ----------------------------------------------------------------


def draw(path: Path | None, lines: dict[str, list[tuple[float, float]]], xlabel: str, ylabel: str) -> None:
    """A PNG, if a path is given: a line through the points (x, y) of each label."""
    if path is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for label, points in lines.items():
        axis.plot(*zip(*points, strict=True), marker="o", label=label)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.legend()
    figure.savefig(path, dpi=110)


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the flags of time-to-loss that are train.py's."""
    parser = Parser(prog="bench.quality", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="time-to-loss, twin or frontier")
    look = dict(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for_loss, for_twin, for_frontier = (
        commands.add_parser("time-to-loss", epilog="train.py's flags may follow, such as --data-dir", **look),
        commands.add_parser("twin", **look), commands.add_parser("frontier", **look))
    add = for_loss.add_argument
    add("config", type=Path, help="the run: a file of configs/")
    add("--minutes", type=float, default=20, help="for the plain recipe")
    add("--our-minutes", type=float, default=4, help="for train.py, whose steps are chosen to fit into them")
    add("--steps", type=int, help="for train.py, instead of --our-minutes")
    add("--measurements", type=int, default=12, help="of each run")
    add("--out-dir", type=Path, help="where train.py's run shall stay")
    for_twin.add_argument("run", type=Path, help="folder of a diffusion run")
    for_twin.add_argument("twin", type=Path, help="folder of its autoregressive twin's run")
    add = for_frontier.add_argument
    add("--checkpoint", type=Path, default=Path("out/quickstart"), help="who writes")
    add("--judge", type=Path, default=Path("out/quickstart-ar"), help="its autoregressive twin")
    add("--data-dir", type=Path, default=Path("data/sotu"), help="what both have read")
    add("--num-samples", type=int, default=16, help="texts of each row")
    add("--steps", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="model calls")
    add("--temperatures", type=float, nargs="+", default=[0.5, 0.7, 0.85, 1.0], help="of the draws")
    add("--order", choices=list(ORDERS), default="random", help="which places are committed next")
    add("--remask", choices=list(REMASKS), default="none", help="which are hidden again")
    for command in (for_loss, for_twin, for_frontier):
        command.add_argument("--picture", type=Path, help="draw it into this PNG")
    args, flags = parser.parse_known_args(arguments)
    if flags and args.command != "time-to-loss":
        parser.error(f"unknown argument {flags[0]!r}; {args.command} --help lists all")
    for name in ("minutes", "our_minutes", "steps", "measurements", "num_samples", "temperatures"):
        given = getattr(args, name, None)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not 0 < value < math.inf:
                parser.error(f"--{name.replace('_', '-')} must be positive, not {value}")
    if args.picture and not args.picture.parent.is_dir():
        parser.error(f"--picture {args.picture}: there is no folder {args.picture.parent}")
    if args.picture and importlib.util.find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib: pip install matplotlib")
    return args, flags


def main(arguments: list[str] | None = None) -> int:
    args, flags = parse(arguments)
    try:
        if args.command == "time-to-loss":
            result = time_to_loss(args, flags)
        else:
            result = twin(args) if args.command == "twin" else frontier(args)
    except (ConfigError, DataError, CheckpointError) as error:  # the user's mistake
        print(f"bench.quality: {error}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError) as error:
        print(f"bench.quality: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
