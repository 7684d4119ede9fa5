"""Why is my loss like this? python -m experiments.training_dynamics

Trains one good run and three bad ones, each bad in one way, and reads their logs:

    good      the byte model's settings, cut short
    too hot   learning rates 30 times as high, gradients not clipped
    starved   4 KB of text
    leak      a collator bug: the positions to hide are chosen, but the network sees the clean text

Then it answers, by numbers measured on --checkpoint and on validation text:

    ln V       the loss before training: all V tokens alike. If it is much more, look at the head
    letters    the plateau that comes next: the entropy of single tokens, all that can be known of a
               position when everything is hidden. Also where the 100% level ends
    factor 2   the same cross-entropies summed over the hidden tokens, divided by all tokens instead
               of the hidden ones: (N+1)/2N, as half are hidden on average
    spikes     the standard deviation of the loss from batch to batch at fixed weights: if hidden
               tokens count alike; by 1/m, the bound's weight, with levels drawn in strata and
               pairs; and as often written elsewhere, each row its own t, each token hidden by its
               own coin, weight 1/t
    height     the NELBO, and the area under the curve of the loss by mask level: the same by
               definition
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion import Batch, Masking, Model, ask, corrupt, keyed_generator, loss, nelbo
from experiments.lab.command import answer, flags, several
from experiments.lab.pictures import draw
from experiments.lab.runs import OUT, autocast, read_log, small_corpus, trained
from model import Transformer
from plumbing.checkpoint import load_checkpoint
from plumbing.command import command
from plumbing.config import ConfigError
from prepare_data import TokenFile

LETTERS = "letters: the good run's end at 100% hidden"
LEAKING = ("-c", "import sys, train; from experiments.training_dynamics import leak; "
                 "train.ask = leak; sys.exit(train.main())")

SIGNS = {"too hot": "Too hot: both are high, and jump",
         "starved": "Starved: training falls, validation turns",
         "leak": "Leak: training falls to 0, validation does not"}


def leak(x_0: Tensor, *arguments) -> Batch:
    """`ask` with a bug that is easily made: masked_fill returns a copy, which is thrown away."""
    return ask(x_0, *arguments)._replace(inputs=x_0)


def train_all(args: argparse.Namespace) -> dict[str, Path]:
    """{name: folder} of the four runs."""
    starved = small_corpus(args.data_dir, args.starved_tokens, OUT / "dynamics-data")

    def run(name: str, steps: int, *settings: str, data: str | Path = args.data_dir,
            **how) -> Path:
        interval = max(1, args.steps // 20)
        common = ["--data-dir", data, "--steps", steps, "--log-interval", 5, "--eval-interval",
                  interval, "--eval-rows", args.rows, "--final-eval-rows", args.rows]
        return trained(f"dynamics-{name}", *map(str, common), *settings, config=args.config, **how)

    hot = ["--muon-learning-rate", "0.6", "--learning-rate", "0.3", "--grad-clip", "0"]
    return {"good": run("good", args.steps),
            "too hot": run("hot", args.steps // 2, *hot),
            "starved": run("starved", 3 * args.steps // 2, data=starved),
            "leak": run("leak", args.steps // 2, program=LEAKING)}


def curves_of(folder: Path) -> dict[str, list]:
    """Losses of training and of validation, with their steps, and the evaluations."""
    lines, evaluations = read_log(folder)
    return {"training_steps": [line["step"] for line in lines],
            "training": [line["loss"] for line in lines],
            "steps": [line["step"] for line in evaluations], "evaluations": evaluations,
            "validation": [line["nats"] for line in evaluations]}


def levels(evaluations: list[dict]) -> dict[float, list[float]]:
    """{mask ratio: CE at each evaluation but the last, which has more levels on other rows}."""
    curves = [line["curve"] for line in evaluations[:-1]]
    N = curves[0]["N"]
    return {m / N: [curve["nats"][i] for curve in curves]
            for i, m in enumerate(curves[0]["counts"])}


def name_of(mask_ratio: float) -> str:
    """A level as the table and the picture call it; the least is a single token."""
    return f"{mask_ratio:.0%}" if mask_ratio > 0.01 else "one"


def unigram(data_dir: str) -> float:
    """Nats per token of validation text under the frequencies of the training text's tokens."""
    train = TokenFile(data_dir, "train")
    val = TokenFile(data_dir, "val")
    counts = np.bincount(train.tokens, minlength=train.vocab_size) + 1  # nothing is impossible
    return float(-np.log(counts / counts.sum())[val.tokens].mean())


@torch.no_grad()
def spikes(model: Model, file: TokenFile, batches: int, rows: int, N: int,
           mask_id: int) -> dict[str, list[float]]:
    """{weighting: the loss of each batch}. The first two get the very same questions."""
    losses: dict[str, list[float]] = {"token": [], "1/m": [], "1/t": [], "over all": []}
    for step in range(batches):
        x_0 = torch.from_numpy(file.batch(0, step, rows, N))
        for name, weighting in (("token", "token"), ("1/m", "nelbo")):
            generator = keyed_generator(0, step, "spikes")
            batch = corrupt(x_0, mask_id, Masking(weighting=weighting), generator)
            losses[name].append(loss(model, batch).item())
        hidden = batch.positions.numel()  # (N+1)/2 a row
        losses["over all"].append(losses["token"][-1] * hidden / x_0.numel())
        generator = keyed_generator(0, step, "coins")
        t = torch.rand(rows, 1, generator=generator).expand(rows, N)
        mask = torch.rand(rows, N, generator=generator) < t
        logits = model(x_0.masked_fill(mask, mask_id), mask.flatten().nonzero().squeeze(1))
        ce = F.cross_entropy(logits.float(), x_0[mask], reduction="none")
        losses["1/t"].append(((ce / t[mask]).sum() / x_0.numel()).item())
    return losses


def height(counts: list[int], nats: list[float], N: int) -> float:
    """The mean height of a curve of the loss by mask level, straight between its points."""
    return float(np.interp(np.arange(1, N + 1), counts, nats).mean())


def paint(axes, runs: dict[str, dict], by_level: dict[float, list[float]], letters: float) -> None:
    """The good run level by level, and each bad run beside it."""
    good, *bad = runs
    first, *others = axes.flat
    steps = runs[good]["steps"][:-1]
    for ratio, nats in by_level.items():
        color = (1.0, 0.75 * (1 - ratio), 0.0) if ratio < 1 else "black"
        first.plot(steps, nats, color=color, label=name_of(ratio))
    first.axhline(letters, color="grey", linestyle=":")
    first.text(steps[-1], letters + 0.05, "letter frequencies", ha="right", color="grey")
    first.set(title="Good: the loss by mask ratio", ylabel="nats per hidden byte", xlabel="steps",
              ylim=0)
    first.legend(fontsize=8, ncols=3, loc="lower left", title="hidden")
    for axis, name in zip(others, bad, strict=True):
        for label, color in ((good, "grey"), (name, "tab:red")):
            run = runs[label]
            axis.plot(run["training_steps"], run["training"], color=color, linestyle="--",
                      label=f"{label}: training loss")
            axis.plot(run["steps"], run["validation"], color=color,
                      label=f"{label}: validation NELBO")
        worst = max(max(runs[name]["training"]), max(runs[name]["validation"]))
        axis.set(title=SIGNS[name], xlabel="steps", ylabel="nats per byte")
        if worst > 10:
            ticks = [2, 5, 10, 20, 50]
            axis.set(yscale="log", yticks=ticks, yticklabels=ticks)
            axis.minorticks_off()
        else:
            axis.set_ylim(0)
        axis.legend(fontsize=8)


def explain(args: argparse.Namespace, model: Transformer,
            good: dict) -> dict[str, tuple[float | None, float]]:
    """{what: (expected if that is known, measured)} for "why is my loss like this"."""
    N = model.config.context_length
    mask_id = model.config.mask_id
    x_0 = torch.from_numpy(TokenFile(args.data_dir, "val").spread(4 * args.rows, N))
    torch.manual_seed(1)
    untrained = nelbo(Transformer(model.config).eval(), x_0[: args.rows], mask_id, batch_size=8)
    print(f"measuring {args.batches} batches three times", file=sys.stderr)
    losses = spikes(model, TokenFile(args.data_dir, "train"), args.batches, args.batch_rows, N,
                    mask_id)
    bound = nelbo(model, x_0, mask_id, curve_points=30, batch_size=8)
    ratio = float(np.mean(losses["over all"]) / np.mean(losses["token"]))
    spread = {name: float(np.std(values, ddof=1)) for name, values in losses.items()}
    curve_height = height(bound.curve.counts, bound.curve.nats, N)
    return {"ln V: an untrained network": (math.log(model.config.vocab_size), untrained.nats),
            LETTERS: (unigram(args.data_dir), good["evaluations"][-1]["curve"]["nats"][-1]),
            "factor 2: over all tokens / over hidden ones": ((N + 1) / (2 * N), ratio),
            "spikes: deviation, hidden tokens alike": (None, spread["token"]),
            "spikes: deviation, weight 1/m": (None, spread["1/m"]),
            "spikes: deviation, weight 1/t and coins": (None, spread["1/t"]),
            "height: NELBO, and the curve's mean height": (bound.nats, curve_height)}


def sentence(runs: dict[str, dict], by_level: dict[float, list[float]]) -> str:
    """The answer, by the numbers."""
    fell = sum(nats[-1] < nats[0] for nats in by_level.values())
    evaluations = runs["good"]["evaluations"]
    top = sum(line["curve"]["nats"][-1] == max(line["curve"]["nats"]) for line in evaluations)
    training = {name: run["training"][-1] for name, run in runs.items()}
    validation = {name: run["validation"][-1] for name, run in runs.items()}
    return (f"In the good run {fell} of {len(by_level)} levels fall, and 100% hidden is the "
            f"highest at {top} of {len(evaluations)} evaluations. Too hot, validation ends at "
            f"{validation['too hot']:.2f}. Starved, training falls to {training['starved']:.2f} "
            f"while validation, at best {min(runs['starved']['validation']):.2f}, ends at "
            f"{validation['starved']:.2f}. With the leak, training falls to "
            f"{training['leak']:.3f} and validation stands at {validation['leak']:.2f}. So look at "
            "both losses, always.")


@command("experiments.training_dynamics")
def main(arguments: list[str]) -> None:
    parser = flags("training_dynamics", __doc__)
    add = parser.add_argument
    add("--config", default="configs/bytes.toml", help="(default: %(default)s)")
    for flag, default, help in (("--steps", 200, "of the good run"),
                                ("--rows", 96, "to evaluate on"),
                                ("--starved-tokens", 4096, "of the small corpus"),
                                ("--batches", 200, "to measure spikes"),
                                ("--batch-rows", 8, "of each batch")):
        add(flag, type=several, default=default, help=f"{help} (default: {default})")
    args = parser.parse_args(arguments)
    model, info = load_checkpoint(args.checkpoint)
    if info["config"]["objective"] != "diffusion":
        raise ConfigError(f"{args.checkpoint} is of objective {info['config']['objective']}, not "
                          "diffusion")

    runs = {name: curves_of(folder) for name, folder in train_all(args).items()}
    good = runs["good"]
    by_level = levels(good["evaluations"])
    shown = sorted({round(i * (len(good["steps"]) - 2) / 5) for i in range(6)})
    print("\nthe good run: nats per hidden byte, by mask ratio\nstep "
          + "".join(f"{name_of(ratio):>7}" for ratio in by_level) + "  NELBO <=")
    for i in shown:
        print(f"{good['steps'][i]:5}" + "".join(f"{nats[i]:7.2f}" for nats in by_level.values())
              + f"{good['validation'][i]:10.3f}")
    print(f"\n{'run':8} {'training: first':>15} {'last':>7}   {'NELBO: best':>11} {'last':>7}")
    for name, run in runs.items():
        training = run["training"]
        validation = run["validation"]
        print(f"{name:8} {training[0]:15.3f} {training[-1]:7.3f}   {min(validation):11.3f} "
              f"{validation[-1]:7.3f}")
    with autocast():
        table = explain(args, model, good)
    print(f"\n{'why is my loss like this':47} {'expected':>8} {'measured':>8}")
    for what, (expected, measured) in table.items():
        print(f"{what:47} {'' if expected is None else f'{expected:.3f}':>8} {measured:8.3f}")

    draw(args.picture, lambda axes: paint(axes, runs, by_level, table[LETTERS][0]), columns=2,
         rows=2)
    logged = {name: {key: run[key] for key in run if key != "evaluations"}
              for name, run in runs.items()}
    answer(sentence(runs, by_level), {"table": table, "levels": by_level, "runs": logged})


if __name__ == "__main__":
    sys.exit(main())
