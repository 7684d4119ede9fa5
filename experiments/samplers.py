"""Which sampler writes best? python -m experiments.samplers --judge out/quickstart-ar --picture samplers.png

The judge is the autoregressive twin, trained on the same text:

    python train.py configs/quickstart.toml --objective autoregressive --out-dir out/quickstart-ar

For every order, remasking and temperature the table says

    judge     nats per token under the judge: how likely the text is. Real text has the first row's figure;
              less than that is not better, but more repetitive or timid than people are
    entropy   of a sample's own tokens, in nats: falls when a sample repeats itself
    distinct  share of different ones among all runs of three tokens of the samples: falls likewise
    words     share of the words that occur in the training text

A good sampler is near real text in all of them. Prints the table, draws the frontier of likelihood against
entropy, and ends with the setting nearest to real text and a JSON line.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from bench.words import share_known, words
from diffusion import REMASKS, denoise, evaluate, left_to_right_model
from model import CheckpointError, load_checkpoint
from prepare_data import DataError, TokenFile, get_tokenizer

ORDERS = {
    "random": dict(order="random"),
    "left_to_right": dict(order="left_to_right"),
    "ancestral": dict(order="ancestral"),
    "confidence": dict(order="confidence"),
    "confidence, gumbel 1": dict(order="confidence", gumbel=1.0),
    "margin": dict(order="margin"),
    "entropy": dict(order="entropy"),
}


def settings(steps: int, temperatures: list[float], N: int) -> list[tuple[str, dict]]:
    """(label, arguments of `denoise`): order x remask x temperature, then variations of plain ones."""
    found = []
    for temperature in temperatures:
        for remask in REMASKS:
            for order, options in ORDERS.items():
                options = options | dict(steps=steps, remask=remask, temperature=temperature)
                found.append((order + (f" + {remask}" if remask != "none" else ""), options))
    plain = dict(temperature=temperatures[0])
    for count in (N // 16, N // 8, N // 2, N):
        found.append(("random", dict(steps=count, order="random") | plain))
        found.append(("confidence", dict(steps=count, order="confidence") | plain))
    for threshold in (0.5, 0.7, 0.9):
        found.append((f"confidence, threshold {threshold}",
                      dict(steps=N, order="confidence", threshold=threshold) | plain))
    for length in (N // 16, N // 4):
        found.append((f"random, blocks of {length}", dict(steps=steps, block_length=length) | plain))
        found.append((f"confidence, blocks of {length}",
                      dict(steps=steps, block_length=length, order="confidence") | plain))
    for top_p in (0.8, 0.9):
        found.append((f"random, top-p {top_p}", dict(steps=steps, top_p=top_p, temperature=1.0)))
    return found


def figures(tokens: Tensor, judge, mask_id: int, decode, vocabulary: set[str]) -> dict[str, float]:
    """What the table says of finished samples (n,T)."""
    runs = tokens.unfold(1, 3, 1).reshape(-1, 3)
    entropies = [torch.special.entr(row.bincount() / len(row)).sum().item() for row in tokens]
    known, _ = share_known("\n".join(decode(row) for row in tokens.tolist()), vocabulary)
    return {"judge": evaluate(judge, tokens, mask_id, "autoregressive").nats,
            "entropy": sum(entropies) / len(entropies), "distinct": len(runs.unique(dim=0)) / len(runs),
            "words": known}


def draw(path: Path, real: dict, rows: list[dict]) -> None:
    """Likelihood against entropy: a line per order through its temperatures, the real text as a star."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    axis.plot(real["entropy"], real["judge"], "*", markersize=18, color="black", label="real text")
    for order in ORDERS:
        line = [row for row in rows if row["sampler"] == order and row["grid"]]
        line.sort(key=lambda row: row["options"]["temperature"])
        axis.plot([row["entropy"] for row in line], [row["judge"] for row in line], marker="o", label=order)
    for row in rows:
        if row["grid"] and row["options"]["remask"] != "none":
            color = "black" if row["options"]["remask"] == "renoise" else "grey"
            axis.plot(row["entropy"], row["judge"], ".", color=color, zorder=0)
    axis.set(xlabel="entropy of a sample's tokens, nats", ylabel="nats per token under the twin",
             title="Orders, a dot for each temperature; small dots: with remasking (black: renoise)")
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(prog="experiments.samplers", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default="out/quickstart")
    parser.add_argument("--judge", default="out/quickstart-ar")
    parser.add_argument("--data-dir", default="data/sotu")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=64, help="of the grid")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 0.5, 1.0])
    parser.add_argument("--picture", type=Path, help="draw the frontier into this PNG")
    args = parser.parse_args()
    try:
        model, info = load_checkpoint(args.checkpoint)
        judge, judge_info = load_checkpoint(args.judge)
        train, val = (TokenFile(args.data_dir, split) for split in ("train", "val"))
        N = model.config.context_length
        if (judge.config.causal, judge_info["tokenizer"], judge.config.context_length) != (
                True, info["tokenizer"], N):
            raise DataError(f"--judge {args.judge} is no autoregressive model of the same text")
        real_text = torch.from_numpy(val.spread(args.num_samples, N))
    except (CheckpointError, DataError) as error:
        print(f"experiments.samplers: {error}", file=sys.stderr)
        return 2
    mask_id, decode = model.config.mask_id, get_tokenizer(info["tokenizer"]).decode
    vocabulary = set(words(decode(train.tokens.tolist())))

    names = ("judge", "entropy", "distinct", "words")
    print(f"{'sampler':28} {'temp':>4} {'calls':>5} {'tokens/s':>8}"
          + "".join(f"{name:>9}" for name in names))

    def report(label: str, temperature: float, calls: int, speed: float, row: dict) -> None:
        print(f"{label:28} {temperature:4.1f} {calls:5} {speed:8,.0f}"
              + "".join(f"{row[name]:9.3f}" for name in names), flush=True)

    real = figures(real_text, judge, mask_id, decode, vocabulary)
    report("real text", 1, 0, 0, real)
    twin = left_to_right_model(judge, mask_id)
    plans = [("the twin, left to right", twin, dict(steps=N, order="left_to_right", temperature=temperature))
             for temperature in args.temperatures]
    plans += [(label, model, options) for label, options in settings(args.steps, args.temperatures, N)]
    rows = []
    for label, network, options in plans:
        x = torch.full((args.num_samples, N), mask_id)
        started = time.perf_counter()
        states = list(denoise(network, x, mask_id, generator=torch.Generator().manual_seed(1), **options))
        speed = x.numel() / (time.perf_counter() - started)
        row = figures(states[-1].tokens, judge, mask_id, decode, vocabulary)
        report(label, options["temperature"], states[-1].calls, speed, row)
        rows.append({"sampler": label, "options": options, "grid": "remask" in options,
                     "calls": states[-1].calls, "tokens_per_second": round(speed)} | row)

    def distance(row: dict) -> float:  # from real text, each figure relative to real text's
        return sum(abs(row[name] / real[name] - 1) for name in names)

    best = min((row for row in rows if row["grid"]), key=distance)
    print(f"\nNearest to real text at {args.steps} steps: {best['sampler']} at temperature "
          f"{best['options']['temperature']}.")
    if args.picture:
        try:
            draw(args.picture, real, rows)
        except (ImportError, OSError) as error:
            print(f"no picture: {error} (it needs: pip install matplotlib)", file=sys.stderr)
    print(json.dumps({"real": real, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
