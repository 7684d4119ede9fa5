"""Does repeated text teach diffusion for longer than GPT? python -m experiments.repetition

Two twins, the same network at the same settings, read a corpus of 32 KB for many epochs. GPT gets
the same questions in every epoch: the next byte after the same left side. Diffusion gets others
each time, since every epoch hides other positions. So it should profit from repetition for longer
(arXiv:2507.15857).

The corpus is taken evenly from the training text; validation text is the usual one. Learning rates
are constant after the warm-up, so that a curve falls or rises by what was read, not by the
schedule.

    epochs    how often the corpus has been read
    training  the loss of the steps since the row before: for diffusion the default objective (the
              bell of mask ratios, hidden tokens weighed alike), not the bound
    NELBO <=  of the diffusion model on validation text, nats per byte; an upper bound
    NLL       of the twin there; exact
"""

import sys
from pathlib import Path

from experiments.lab.command import answer, count, flags
from experiments.lab.pictures import draw
from experiments.lab.runs import OUT, read_log, read_run, small_corpus, trained
from plumbing.command import command
from prepare_data import TokenFile

OBJECTIVES = {"diffusion": "NELBO <=", "autoregressive": "NLL"}


def curves_of(folder: Path, tokens: int) -> dict[str, list[float]]:
    """A number for each evaluation of a run: epochs, training, validation, stderr."""
    points = read_run(folder).points
    training = {line["step"]: line["loss"] for line in read_log(folder)[0]}
    return {"epochs": [point.tokens / tokens for point in points],
            "training": [training[point.step] for point in points],
            "validation": [point.nats for point in points],
            "stderr": [point.stderr for point in points]}


def verdict(run: dict[str, list[float]]) -> dict:
    """The best evaluation and the last; `turned`: the last is worse by more than its stderr."""
    best = min(range(len(run["validation"])), key=lambda i: run["validation"][i])
    last = run["validation"][-1]
    return {"best": run["validation"][best], "best_epoch": run["epochs"][best], "last": last,
            "last_epoch": run["epochs"][-1],
            "turned": last - run["validation"][best] > run["stderr"][-1]}


def describe(name: str, end: dict) -> str:
    """A run in a clause."""
    best = f"{name} is best after {end['best_epoch']:.0f} epochs ({end['best']:.3f} nats/byte)"
    if end["turned"]:
        return f"{best} and has risen to {end['last']:.3f} after {end['last_epoch']:.0f}"
    return f"{best} and has not turned after {end['last_epoch']:.0f}"


def paint(axes, runs: dict[str, dict]) -> None:
    """Validation and training loss against epochs."""
    for axis, what in zip(axes, ("validation", "training"), strict=True):
        for (objective, run), color in zip(runs.items(), ("tab:orange", "black"), strict=True):
            label = "diffusion" if objective == "diffusion" else "the twin"
            if what == "validation":
                label += ", " + OBJECTIVES[objective]
                best = run[what].index(min(run[what]))
                axis.plot(run["epochs"][best], run[what][best], "*", color=color, markersize=16)
            axis.plot(run["epochs"], run[what], marker=".", color=color, label=label)
        axis.set(xlabel="epochs", ylabel=f"{what} loss, nats per byte", ylim=0)
        axis.legend()
    axes[0].set_title("On text it has not seen (star: the best)")
    axes[1].set_title("On the text it reads again and again")


@command("experiments.repetition")
def main(arguments: list[str]) -> None:
    parser = flags("repetition", __doc__, checkpoint=False)
    add = parser.add_argument
    add("--tokens", type=count, default=32768, help="of the corpus (default: 32768)")
    add("--steps", type=count, default=800, help="of each run (default: 800)")
    add("--config", default="configs/bytes.toml", help="(default: %(default)s)")
    args = parser.parse_args(arguments)
    corpus = small_corpus(args.data_dir, args.tokens, OUT / "repetition-data")
    tokens = TokenFile(corpus, "train").num_tokens
    interval = max(1, args.steps // 20)
    runs = {}
    for objective in OBJECTIVES:
        settings = ["--data-dir", corpus, "--objective", objective, "--steps", args.steps,
                    "--decay-fraction", 0, "--log-interval", interval,
                    "--eval-interval", interval, "--final-eval-rows", 64]
        folder = trained(f"repetition-{objective}", *map(str, settings), config=args.config)
        runs[objective] = curves_of(folder, tokens)

    print(f"\n{tokens:,} tokens\n        | diffusion          | the twin\n"
          "epochs  | training  NELBO <= | training       NLL")
    columns = [runs[objective][what] for objective in OBJECTIVES
               for what in ("training", "validation")]
    for epoch, *row in zip(runs["diffusion"]["epochs"], *columns, strict=True):
        print("{:7.1f} | {:8.3f} {:9.3f} | {:8.3f} {:9.3f}".format(epoch, *row))
    diffusion, twin = (verdict(runs[objective]) for objective in OBJECTIVES)
    draw(args.picture, lambda axes: paint(axes, runs), columns=2)
    holds = twin["turned"] and diffusion["best_epoch"] > twin["best_epoch"]
    claim = "teaches diffusion longer, as claimed" if holds else "does not show the claim here"
    best = "the twin" if twin["best"] < diffusion["best"] else "diffusion"
    answer(f"{describe('The twin', twin)}; {describe('diffusion', diffusion)}. So repeated text "
           f"{claim}; {'yet ' if holds else ''}the best of both is {best}, by "
           f"{abs(twin['best'] - diffusion['best']):.3f} nats/byte (of a bound against an exact "
           "number).",
           {"tokens": tokens, "diffusion": diffusion, "twin": twin, "runs": runs})


if __name__ == "__main__":
    sys.exit(main())
