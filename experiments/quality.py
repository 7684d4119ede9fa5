"""What does the time buy? Two measurements, each of which ends with a table and one JSON line:

    python -m experiments.quality time-to-loss configs/shakespeare.toml --minutes 20 --our-minutes 4
        minutes until train.py's validation NELBO is where the plain recipe (lab/plain.py) ends
    python -m experiments.quality twin out/bytes out/bytes-ar
        a run's NELBO beside its autoregressive twin's exact NLL, at equal tokens and at equal time

Time is time spent training: compiling counts; starting, measuring and saving do not.
"""

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from diffusion import nelbo
from experiments.lab.pictures import draw
from experiments.lab.plain import PlainTransformer, train_plainly
from experiments.lab.runs import TRAIN, Point, Run, read_run
from model import ModelConfig
from plumbing.command import command
from plumbing.config import ConfigError, Parser, load
from plumbing.machine import choose_device, count_parameters
from plumbing.terminal import show
from prepare_data import TokenFile
from train import TrainConfig

# --- Time to loss ---------------------------------------------------------------------------------


def train_ours(config: Path, flags: list[str], out_dir: Path) -> Run:
    """Run train.py in a process of its own, which compiles from nothing. If it fails, so do we."""
    sys.stdout.flush()
    with tempfile.TemporaryDirectory() as empty:
        words = [sys.executable, str(TRAIN), str(config), *flags, f"--out-dir={out_dir}"]
        result = subprocess.run(words, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": empty})
    if result.returncode:
        sys.exit(result.returncode)  # it has said why
    return read_run(out_dir)


def affordable_steps(config: Path, flags: list[str], out_dir: Path, minutes: float) -> int:
    """How many steps train.py makes in so many minutes, compiling included, by its first six."""
    few = ["--max-steps=6", "--log-interval=1", "--eval-interval=6", "--eval-rows=2",
           "--final-eval-rows=2"]
    run = train_ours(config, flags + few, out_dir)
    last = run.points[-1]
    seconds_per_step = (last.seconds - run.compiling) / last.step
    return max(1, int((60 * minutes - run.compiling) / seconds_per_step))


def train_plain(cfg: TrainConfig, minutes: float, measurements: int) -> list[Point]:
    """The plain recipe on the data, shape and batch of `cfg`, measured on train.py's windows."""
    train_file = TokenFile(cfg.data_dir, "train")
    val_file = TokenFile(cfg.data_dir, "val")
    device = choose_device(cfg.device)
    T = cfg.context_length
    limit = 60 * minutes
    torch.manual_seed(cfg.seed)
    config = ModelConfig(train_file.vocab_size, T, cfg.n_layer, cfg.n_head, cfg.n_embd)
    model = PlainTransformer(config).to(device)
    x_0 = torch.from_numpy(val_file.spread(cfg.eval_rows, T)).to(device)
    show(f"plain: {count_parameters(model) / 1e6:.1f}M parameters on {device}, float32, eager",
         stays=True)
    points: list[Point] = []
    seconds = 0.0
    shown = 0.0
    tick = time.monotonic()
    losses = train_plainly(model, train_file, cfg.batch_size, cfg.seed)
    for step, value in enumerate(losses, start=1):
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
    """Train ours, then the plain recipe (in this order: train.py checks the flags), and compare."""
    cfg = load(TrainConfig, args.config, flags, "experiments.quality time-to-loss")
    if cfg.objective != "diffusion" or cfg.prefix_length or cfg.resume or cfg.init_from:
        raise ConfigError("time-to-loss wants a new run of objective diffusion, without a prefix")
    print(f"{args.config}: {torch.get_num_threads()} threads, torch {torch.__version__}",
          flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        steps = args.steps
        if steps is None:
            print(f"six steps, to see how many fit into {args.our_minutes:g} minutes:", flush=True)
            six = Path(temporary) / "six"
            steps = affordable_steps(args.config, flags, six, args.our_minutes)
        pace = [f"--steps={steps}", "--log-interval=1",
                f"--eval-interval={math.ceil(steps / args.measurements)}",
                f"--final-eval-rows={cfg.eval_rows}"]
        ours = train_ours(args.config, flags + pace, args.out_dir or Path(temporary) / "ours")
    plain = train_plain(cfg, args.minutes, args.measurements)

    goal = plain[-1]
    last = ours.points[-1]
    compiling = ours.compiling
    reached = next((point for point in ours.points if point.nats <= goal.nats), None)
    print("\nrun     step   minutes  without compiling  NELBO <=")
    for name, points, extra in (("plain", plain, 0.0), ("ours", ours.points, compiling)):
        for point in points:
            mark = "  <- reached" if point is reached else ""
            print(f"{name:6} {point.step:5} {point.seconds / 60:9.2f} "
                  f"{(point.seconds - extra) / 60:18.2f}  "
                  f"{point.nats:.3f} +- {point.stderr:.3f}{mark}")
    step_seconds = {"plain": goal.seconds / goal.step,
                    "ours": (last.seconds - compiling) / last.step}
    print(f"\na step: plain {step_seconds['plain']:.3f} s, ours {step_seconds['ours']:.3f} s, "
          f"and {compiling:.1f} s of compiling, once")
    result = {"config": str(args.config), "flags": flags, "steps": steps,
              "step_seconds": step_seconds, "torch": torch.__version__,
              "threads": torch.get_num_threads(), "compiling": compiling,
              "plain": [point._asdict() for point in plain],
              "ours": [point._asdict() for point in ours.points],
              "goal": goal.nats, "minutes": None, "ratio": None, "ratio_without_compiling": None}
    if reached:
        result["minutes"] = reached.seconds / 60
        result["ratio"] = goal.seconds / reached.seconds
        result["ratio_without_compiling"] = goal.seconds / (reached.seconds - compiling)
        print("{goal:.3f} nats/token: ours after {minutes:.2f} minutes, {ratio:.1f} times as fast "
              "as plain ({ratio_without_compiling:.1f} times without compiling)".format(**result))
    else:
        print(f"{goal.nats:.3f} nats/token: ours has not reached it, but {last.nats:.3f}: "
              "give it more steps")
    draw_over_time(args.picture, {"plain": plain, "ours": ours.points}, "NELBO <=, nats per token")
    return result


def draw_over_time(path: Path | None, runs: dict[str, list[Point]], label: str) -> None:
    """Nats against minutes, if a picture is wanted."""

    def paint(axes) -> None:
        for name, points in runs.items():
            minutes = [point.seconds / 60 for point in points]
            axes.plot(minutes, [point.nats for point in points], marker="o", label=name)
        axes.set(xlabel="minutes", ylabel=label)
        axes.legend()

    if path is not None:
        draw(path, paint, width=8, height=5)


# --- The twin -------------------------------------------------------------------------------------


def nats_at(points: list[Point], what: str, value: float) -> float | None:
    """Nats where the field `what` (tokens or seconds) is `value`, on a straight line between
    evaluations; None before the first and after the last."""
    xs = [getattr(point, what) for point in points]
    if not xs[0] <= value <= xs[-1]:
        return None
    return float(np.interp(value, xs, [point.nats for point in points]))


def twin(args: argparse.Namespace) -> dict:
    """A table with a row for each evaluation of the run. The twin's NLL is interpolated."""
    run = read_run(args.run)
    other = read_run(args.twin)
    for folder, config, causal in ((args.run, run.config, False), (args.twin, other.config, True)):
        if (config.get("objective") == "autoregressive") != causal:
            raise ConfigError(f"{folder} is a run of objective {config.get('objective')}; name the "
                              "diffusion run first and its autoregressive twin second")
    for name in ("data_dir", "context_length", "n_layer", "n_head", "n_embd"):
        if run.config.get(name) != other.config.get(name):
            raise ConfigError(f"{args.twin} is no twin of {args.run}: {name} "
                              f"{other.config.get(name)} is not {run.config.get(name)}")
    print(f"{'':31}| at equal tokens | at equal time\n{'tokens':>12} minutes  NELBO <= | "
          f"   NLL  NELBO-NLL|    NLL  NELBO-NLL   rows")
    rows = []
    for point in run.points:
        row = {"nll_at_equal_tokens": nats_at(other.points, "tokens", point.tokens),
               "nll_at_equal_time": nats_at(other.points, "seconds", point.seconds)}
        cells = ("     -          - " if nll is None else f"{nll:7.3f} {point.nats - nll:+10.3f}"
                 for nll in row.values())
        print(f"{point.tokens:12,} {point.seconds / 60:7.2f}  {point.nats:8.3f} |{'|'.join(cells)} "
              f"{point.rows:6}")
        rows.append(point._asdict() | row)
    end = other.points[-1]
    print(f"the twin ends at {end.nats:.3f} +- {end.stderr:.3f} after {end.tokens:,} tokens and "
          f"{end.seconds / 60:.2f} minutes")
    runs = {"NELBO <=": run.points, "the twin's NLL": other.points}
    draw_over_time(args.picture, runs, "nats per token")
    return {"run": str(args.run), "twin": str(args.twin), "rows": rows,
            "twin_points": [point._asdict() for point in other.points]}


# --- The command ----------------------------------------------------------------------------------


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the flags of time-to-loss that are train.py's."""
    parser = Parser(prog="experiments.quality", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True,
                                     metavar="time-to-loss or twin")
    look = dict(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    further = "train.py's flags may follow, such as --data-dir"
    for_loss = commands.add_parser("time-to-loss", epilog=further, **look)
    add = for_loss.add_argument
    add("config", type=Path, help="the run: a file of configs/")
    add("--minutes", type=float, default=20, help="for the plain recipe")
    add("--our-minutes", type=float, default=4, help="for train.py, which makes the steps that fit")
    add("--steps", type=int, help="for train.py, instead of --our-minutes")
    add("--measurements", type=int, default=12, help="of each run")
    add("--out-dir", type=Path, help="where train.py's run shall stay")
    for_twin = commands.add_parser("twin", **look)
    for_twin.add_argument("run", type=Path, help="folder of a diffusion run")
    for_twin.add_argument("twin", type=Path, help="folder of its autoregressive twin's run")
    for one in (for_loss, for_twin):
        one.add_argument("--picture", type=Path, help="draw it into this PNG")
    args, flags = parser.parse_known_args(arguments)
    if flags and args.command != "time-to-loss":
        parser.error(f"unknown argument {flags[0]!r}; {args.command} --help lists all")
    for name in ("minutes", "our_minutes", "steps", "measurements"):
        value = getattr(args, name, None)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {value}")
    if args.picture and not args.picture.parent.is_dir():
        parser.error(f"--picture {args.picture}: there is no folder {args.picture.parent}")
    if args.picture and importlib.util.find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib: pip install matplotlib")
    return args, flags


@command("experiments.quality")
def main(arguments: list[str]) -> None:
    args, flags = parse(arguments)
    if args.command == "time-to-loss":
        result = time_to_loss(args, flags)
    else:
        result = twin(args)
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
