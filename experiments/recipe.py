"""How were the quickstart's settings chosen? python -m experiments.recipe --seeds 1 2 3

Each row is the quickstart with the flags that it names, trained once per seed: bits per byte of
validation text, an upper bound, and the seconds of training. Seeds share their questions, so
compare within a column: the last one says how much worse than the first row, on average over the
seeds, with the standard error of that. All rows take 40 minutes per seed on 2 CPU cores; --rows
picks from them.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

import prepare_data
from diffusion import mean_and_error
from experiments.lab.command import answer, count, flags
from experiments.lab.pictures import draw
from experiments.lab.runs import OUT, read_log, trained
from plumbing.command import command

# name: (tokenizer, flags of train.py). To try something, add a row.
ROWS = {
    "quickstart": ("bpe:8192", ""),
    "random masks": ("bpe:8192", "--mask-positions random"),
    "mask ratio bell": ("bpe:8192", "--mask-ratio bell"),
    "mask ratio uniform": ("bpe:8192", "--mask-ratio uniform"),
    "weighting nelbo": ("bpe:8192", "--weighting nelbo"),
    "Muon 0.005": ("bpe:8192", "--muon-learning-rate 0.005"),
    "Muon 0.02": ("bpe:8192", "--muon-learning-rate 0.02"),
    "AdamW 0.01": ("bpe:8192", "--learning-rate 0.01"),
    "AdamW 0.03": ("bpe:8192", "--learning-rate 0.03"),
    "warm-up of 10 steps": ("bpe:8192", "--warmup-steps 10"),
    "warm-up of 200 steps": ("bpe:8192", "--warmup-steps 200"),
    "rates fall at once": ("bpe:8192", "--decay-fraction 1"),
    "averages of 100 steps": ("bpe:8192", "--ema-decay 0.99"),
    "16 rows, 400 steps": ("bpe:8192", "--batch-size 16 --steps 400"),
    "4 rows, 1600 steps": ("bpe:8192", "--batch-size 4 --steps 1600"),
    "400 steps": ("bpe:8192", "--steps 400"),
    "1 layer": ("bpe:8192", "--n-layer 1"),
    "3 layers": ("bpe:8192", "--n-layer 3"),
    "2 layers of 192": ("bpe:8192", "--n-embd 192"),
    "2 layers of 320": ("bpe:8192", "--n-embd 320"),
    "4 layers of 192": ("bpe:8192", "--n-layer 4 --n-embd 192"),
    "1,024 tokens": ("bpe:1024", ""),
    "2,048 tokens": ("bpe:2048", ""),
    "4,096 tokens": ("bpe:4096", ""),
    "16,384 tokens": ("bpe:16384", ""),
    # As many steps as take the time of 800 with 8,192 tokens, on two CPU cores.
    "1,024 for as long": ("bpe:1024", "--steps 1321"),
    "2,048 for as long": ("bpe:2048", "--steps 1152"),
    "4,096 for as long": ("bpe:4096", "--steps 976"),
    "16,384 for as long": ("bpe:16384", "--steps 543"),
    "bytes": ("byte", ""),
}


def prepared(corpus: str, tokenizer: str) -> Path:
    """The folder of the corpus in these tokens, made if it isn't there."""
    folder = OUT / "recipe-data" / tokenizer.replace(":", "-")
    if not (folder / "meta.json").exists():
        code = prepare_data.main([corpus, "--tokenizer", tokenizer, "--out-dir", str(folder)])
        if code:
            sys.exit(code)
    return folder


def paint(axes, results: dict[str, Tensor]) -> None:
    for height, bits in enumerate(results.values()):
        axes.plot(bits, [height] * len(bits), "o", color="tab:blue")
        axes.plot(bits.mean(), height, "|", color="black", markersize=20)
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.set_xlabel("NELBO, bits per byte (a dot is a seed)")


@command("experiments.recipe")
def main(arguments: list[str]) -> None:
    parser = flags("recipe", __doc__, checkpoint=False, data_dir=False)
    add = parser.add_argument
    add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW",
        help=f"of {'; '.join(ROWS)} (default: all); the first is compared with")
    add("--seeds", nargs="+", type=count, default=[1], help="(default: 1)")
    add("--config", default="configs/quickstart.toml", help="(default: %(default)s)")
    add("--corpus", default="sotu", help="what prepare_data.py takes (default: %(default)s)")
    args = parser.parse_args(arguments)

    results = {}
    seconds = {}
    for name in args.rows:
        tokenizer, changes = ROWS[name]
        data_dir = prepared(args.corpus, tokenizer)
        bits = []
        for seed in args.seeds:
            folder = trained(f"recipe-{name.replace(' ', '-').replace(',', '')}-{seed}",
                             *changes.split(), "--seed", str(seed), "--data-dir", str(data_dir),
                             config=args.config)
            training, evaluations = read_log(folder)
            bits.append(evaluations[-1]["bits_per_byte"])
        results[name] = torch.tensor(bits)
        seconds[name] = training[-1]["seconds"]

    base = results[args.rows[0]]
    seeds = "".join(f"{f'seed {seed}':>8}" for seed in args.seeds)
    print(f"\n{'':24}{seeds}  seconds   worse by")
    for name, bits in results.items():
        more, error = mean_and_error(bits - base)
        known = f" +- {error:.3f}" if len(bits) > 1 else ""  # one seed has no error
        print(f"{name:24}" + "".join(f"{value:8.3f}" for value in bits)
              + f" {seconds[name]:8.0f}   {more:+.3f}{known}")
    draw(args.picture, lambda axes: paint(axes, results), width=7)
    best = min(results, key=lambda name: results[name].mean())
    answer(f"the lowest bound has {best}: <= {results[best].mean():.3f} bits per byte.",
           {"bits_per_byte": {name: bits.tolist() for name, bits in results.items()},
            "seconds": seconds})


if __name__ == "__main__":
    sys.exit(main())
