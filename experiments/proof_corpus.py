"""How near does training come to the truth? python -m experiments.proof_corpus

On a text whose entropy is known, a bound can be compared with what it bounds. The text here is
written by a Markov chain of eight letters, in which the end of a text is a ninth state: state v
follows state s with probability A[s,v]. With pi = pi A, the entropy of T tokens in a row is, per
token,

    H = (H(pi) + (T-1) h) / T,    h = sum_s pi[s] H(A[s])    (nats)

and the exact answer to "what is hidden here?" is known too: `exact_denoiser` computes it, and is
one more model(tokens, positions), so that everything in diffusion.py takes it for a network. For it
NELBO = H. For any other model the NELBO is larger, by that model's error and nothing else.

Writes the text into out/experiments/proof-corpus, trains small networks on it (seeds 1, 2, 3), and
their autoregressive twins, whose negative log-likelihood (NLL) is no bound but exact, and prints

    over H            NELBO and NLL during the training, minus what the exact denoiser has, or the
                      chain itself, on the same rows with the same masks: most of these rows' luck
                      cancels, and the network's error remains; in percent of H
    exact, - exact    CE(m) of the exact denoiser, and how much more the networks have; last the
                      NELBO, the mean over all m. The errors are standard errors over seeds
"""

import sys
from bisect import bisect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion import (
    Model,
    draw_mask,
    draw_num_masked,
    keyed_generator,
    mean_and_error,
    nelbo,
    row_losses,
)
from experiments.lab.command import at_least, count, flags, report, several
from experiments.lab.pictures import draw
from experiments.lab.runs import OUT, read_run, trained
from plumbing.checkpoint import load_checkpoint
from plumbing.command import command
from prepare_data import TokenFile, get_tokenizer, write_dataset

LETTERS = "abcdefgh"
CONFIG = "configs/quickstart.toml"
SETTINGS = ("--context-length 64 --batch-size 32 --n-layer 3 --n-embd 128 --steps 400 --eval-rows "
            "512 --final-eval-rows 512 --eval-interval 50 --mask-positions random").split()


# --- The source -----------------------------------------------------------------------------------


def make_chain(letters: int, seed: int, peak: float = 0.3, end: float = 1 / 200) -> Tensor:
    """A (S,S), float64, S = letters + 1: A[s,v] is the probability that state v follows state s.

    The last state is the end of a text, which comes with probability `end` whatever was before.
    What follows each state is drawn from a Dirichlet distribution: the smaller `peak`, the fewer
    letters are likely.
    """
    following = np.random.default_rng(seed).dirichlet(np.full(letters, peak), letters + 1)
    return torch.from_numpy(np.hstack([(1 - end) * following, np.full((letters + 1, 1), end)]))


def stationary(chain: Tensor) -> Tensor:
    """pi (S,): how often each state occurs."""
    return torch.linalg.matrix_power(chain, 2**12)[0]


def exact_entropy(chain: Tensor, T: int) -> float:
    """H, the entropy of T tokens in a row, in nats per token."""
    pi = stationary(chain)
    h = pi @ torch.special.entr(chain).sum(1)
    return ((torch.special.entr(pi).sum() + (T - 1) * h) / T).item()


def draw_states(chain: Tensor, length: int, seed: int) -> list[int]:
    """A walk through the chain, as if a text had just ended."""
    sums = chain.cumsum(1)[:, :-1].tolist()
    state = len(chain) - 1
    states = []
    for u in np.random.default_rng(seed).random(length):
        state = bisect(sums[state], u)
        states.append(state)
    return states


def write_corpus(chain: Tensor, folder: Path, tokens: int) -> None:
    """train.bin with so many tokens, val.bin with a fifth of them; each ends with one more."""
    def texts(split: str, length: int, seed: int):
        walk = "".join((LETTERS + "\n")[state] for state in draw_states(chain, length, seed))
        return ((split, [text]) for text in walk.split("\n"))

    documents = [*texts("train", tokens, seed=1), *texts("val", tokens // 5, seed=2)]
    write_dataset(iter(documents), "byte", folder, "a Markov chain")


def exact_denoiser(chain: Tensor, ids: list[int], vocab_size: int) -> Model:
    """The network that training can at best become: P(token at a position | all visible tokens).

    ids: the token of each state. All other tokens have probability 0, and must not occur.

    Forward-backward: the positions to the left send a message (S,) about the state here, those to
    the right another, and the answer is their product. A message is the one before, times the
    evidence of the position it passes (what is visible there; nothing, if hidden), times A: so d
    hidden positions are A^d.
    """
    states = torch.tensor(ids)
    pi = stationary(chain)
    mask_id = vocab_size

    def model(tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        seen = tokens[..., None]
        evidence = ((seen == states) | (seen == mask_id)).double()  # (B,T,S)
        from_left = torch.empty_like(evidence)
        from_right = torch.empty_like(evidence)
        message = pi.expand(len(tokens), -1)
        for t in range(tokens.size(1)):
            from_left[:, t] = message
            message = normalized(message * evidence[:, t]) @ chain
        message = torch.ones_like(message)
        for t in reversed(range(tokens.size(1))):
            from_right[:, t] = message
            message = normalized(message * evidence[:, t]) @ chain.T
        log_p = torch.full((*tokens.shape, vocab_size), -torch.inf)
        log_p[..., states] = normalized(from_left * from_right).log().float()
        return log_p if positions is None else log_p.flatten(0, 1)[positions]

    return model


def exact_nll(chain: Tensor, ids: list[int], x_0: Tensor) -> float:
    """-log p(x_0) / T by the chain itself, nats per token, the mean over the rows of x_0 (R,T)."""
    states = (x_0[..., None] == torch.tensor(ids)).int().argmax(-1)
    first = stationary(chain)[states[:, :1]]
    p = torch.cat([first, chain[states[:, :-1], states[:, 1:]]], 1)
    return -p.log().mean().item()


def normalized(p: Tensor) -> Tensor:
    return p / p.sum(-1, keepdim=True)


# --- The experiment -------------------------------------------------------------------------------


@torch.no_grad()
def compare(exact: Model, models: list[Model], x_0: Tensor, mask_id: int,
            num_masked: Tensor) -> tuple[float, Tensor]:
    """(CE of `exact`, that of each model minus it by row (models,R)), num_masked[b] tokens of row b
    hidden."""
    mask = draw_mask(num_masked, x_0.size(1), 0, keyed_generator(0, 0, "compare"))
    x_t = x_0.masked_fill(mask, mask_id)
    known = row_losses(exact, x_t, x_0, mask, batch_size=128)
    gaps = [row_losses(model, x_t, x_0, mask, batch_size=128) - known for model in models]
    return known.mean().item(), torch.stack(gaps)


def over_training(folders: list[Path], reference: Callable[[Tensor], float], val: TokenFile,
                  T: int) -> dict[int, Tensor]:
    """{step: (seeds,)}, the evaluations of some runs minus `reference` of the same rows: what the
    best possible network has there."""
    gaps = {}
    best = {}  # by number of rows
    for point in (point for folder in folders for point in read_run(folder).points):
        if point.rows not in best:
            best[point.rows] = reference(torch.from_numpy(val.spread(point.rows, T)))
        gaps.setdefault(point.step, []).append(point.nats - best[point.rows])
    return {step: torch.tensor(values) for step, values in gaps.items()}


def paint(panels, H: float, runs: dict[str, dict[int, Tensor]], table: dict[str, dict]) -> None:
    """The gaps over the training; CE(m) of the exact denoiser and of the networks."""
    left, right = panels
    for name, gaps in runs.items():
        percent, errors = zip(*(mean_and_error(100 * gap / H) for gap in gaps.values()),
                              strict=True)
        left.errorbar(list(gaps), percent, errors, marker=".", label=name)
    left.axhline(1, color="black", linestyle="--", label="1%")
    left.set(title="The gap is the network's error", ylabel="gap, % of the entropy", yscale="log",
             xlabel="steps of training")
    left.yaxis.set_major_formatter("{x:g}")
    levels = {int(m): row for m, row in table.items() if m != "NELBO"}
    right.plot(list(levels), [row["exact"] for row in levels.values()], color="black",
               label="the exact denoiser")
    right.plot(list(levels), [row["exact"] + row["gap"] for row in levels.values()], ".",
               markersize=9, label="the networks, mean")
    right.set(title="The loss by mask level", ylabel="CE(m), nats per hidden token",
              xlabel=f"m, hidden of {max(levels)} tokens")
    for panel in panels:
        panel.legend()


@command("experiments.proof_corpus")
def main(arguments: list[str]) -> None:
    parser = flags("proof_corpus", __doc__, checkpoint=False, data_dir=False)
    add = parser.add_argument
    add("--tokens", type=at_least(5), default=2_000_000, help="of training text (default: 2000000)")
    add("--rows", type=several, default=1024, help="of validation text (default: %(default)s)")
    add("--seeds", type=count, nargs="+", default=[1, 2, 3], help="(default: 1 2 3)")
    args, settings = parser.parse_known_args(arguments)  # what else is given goes to train.py

    chain = make_chain(len(LETTERS), seed=0)
    data_dir = OUT / "proof-corpus/data"
    write_corpus(chain, data_dir, args.tokens)
    settings = ["--data-dir", str(data_dir), *SETTINGS, *settings]
    ours = [trained(f"proof-corpus/run-{seed}", *settings, "--seed", str(seed), config=CONFIG)
            for seed in args.seeds]
    twins = [trained(f"proof-corpus/twin-{seed}", *settings, "--seed", str(seed), "--objective",
                     "autoregressive", config=CONFIG) for seed in args.seeds]
    models = [load_checkpoint(folder)[0] for folder in ours]
    T = models[0].config.context_length
    mask_id = models[0].config.mask_id
    ids = [*LETTERS.encode(), get_tokenizer("byte").eot_token]
    exact = exact_denoiser(chain, ids, mask_id)
    H = exact_entropy(chain, T)

    val = TokenFile(data_dir, "val")
    runs = {"NELBO": over_training(ours, lambda x: nelbo(exact, x, mask_id).nats, val, T),
            "the twin's NLL": over_training(twins, lambda x: exact_nll(chain, ids, x), val, T)}
    print(f"\n{'step':>8}" + "".join(f"{name + ', % over H':>28}" for name in runs))
    for step in runs["NELBO"]:
        cells = ("{:.2f} +- {:.2f}".format(*mean_and_error(100 * run[step] / H))
                 for run in runs.values())
        print(f"{step:8}" + "".join(f"{cell:>28}" for cell in cells))

    x_0 = torch.from_numpy(val.spread(args.rows, T))
    counts = sorted({1, *(max(1, round(T * i / 10)) for i in range(1, 11))})
    levels = {str(m): torch.full((len(x_0),), m) for m in counts}
    levels["NELBO"] = draw_num_masked(len(x_0), T, generator=keyed_generator(0, 0, "levels"))
    print(f"\n{'m of ' + str(T):>8}{'exact':>9}{'trained - exact':>22}")
    table = {}
    for level, num_masked in levels.items():
        known, gaps = compare(exact, models, x_0, mask_id, num_masked)
        gap, error = mean_and_error(gaps.mean(1))  # over seeds
        table[level] = {"exact": known, "gap": gap, "error": error}
        print(f"{level:>8}{known:9.4f}{gap:+12.4f} +- {error:.4f}", flush=True)
    bound = nelbo(exact, x_0, mask_id, batch_size=128)
    print(f"\nthe entropy of {T} tokens in a row is {H:.4f} nats per token "
          f"({exact_entropy(chain, 1):.4f} for one alone)\n"
          f"the exact denoiser's NELBO is {bound.nats:.4f} +- {bound.stderr:.4f}")
    draw(args.picture, lambda panels: paint(panels, H, runs, table), columns=2)
    report({"entropy": H, "exact": [bound.nats, bound.stderr], "table": table, "runs": {
        name: {step: gaps.tolist() for step, gaps in run.items()} for name, run in runs.items()}})


if __name__ == "__main__":
    sys.exit(main())
