"""How near does training come to the truth? python -m experiments.proof_corpus

On a text whose entropy is known, a bound can be compared with what it bounds. The text here is
written by a Markov chain of eight letters, in which the end of a text is a ninth state: state v
follows state s with probability A[s,v]. With pi = pi A, the entropy of T tokens in a row is, per
token,

    H = (H(pi) + (T-1) h) / T,    h = sum_s pi[s] H(A[s])    (nats)

and the exact answer to "what is hidden here?" is known too: `exact_denoiser` computes it, and is
one more model(tokens, positions), so that everything in diffusion.py takes it for a network. For it
NELBO = H. For any other model the NELBO is larger, by that model's error and nothing else.

Writes the text into out/experiments/proof-corpus, trains a small network on it with train.py, and
its autoregressive twin, whose negative log-likelihood (NLL) is no bound but exact, and prints

    NELBO, NLL       during the training, on 512 rows of validation text
    gap              minus what the exact denoiser has, or the chain itself, on the same rows with
                     the same masks: most of these rows' luck cancels, and the network's error
                     remains
    exact, trained   CE(m) of the exact denoiser and of the network, and last the NELBO, the mean
                     over all m
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
from experiments.lab.command import answer, flags, several
from experiments.lab.pictures import draw
from experiments.lab.runs import OUT, read_run, trained
from plumbing.checkpoint import load_checkpoint
from plumbing.command import command
from prepare_data import TokenFile, get_tokenizer, write_dataset

LETTERS = "abcdefgh"
SETTINGS = ("--context-length 64 --batch-size 32 --n-layer 3 --n-head 4 --n-embd 128 --steps 800 "
            "--eval-interval 50 --eval-rows 512 --final-eval-rows 512").split()


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
def compare(exact: Model, model: Model, x_0: Tensor, mask_id: int,
            num_masked: Tensor) -> list[float]:
    """[CE of `exact`, CE of `model`, their difference, its standard error].

    num_masked[b] tokens are hidden in row b.
    """
    mask = draw_mask(num_masked, x_0.size(1), 0, keyed_generator(0, 0, "compare"))
    x_t = x_0.masked_fill(mask, mask_id)
    known = row_losses(exact, x_t, x_0, mask, batch_size=128)
    learned = row_losses(model, x_t, x_0, mask, batch_size=128)
    return [known.mean().item(), learned.mean().item(), *mean_and_error(learned - known)]


def gap_by_level(exact: Model, model: Model, x_0: Tensor, mask_id: int) -> dict[str, list[float]]:
    """What `compare` says of one hidden token, of each tenth of them, and of the mean over all."""
    R, T = x_0.shape
    counts = sorted({1, *(max(1, round(T * i / 10)) for i in range(1, 11))})
    levels = {str(m): torch.full((R,), m) for m in counts}
    levels["NELBO"] = draw_num_masked(R, T, generator=keyed_generator(0, 0, "levels"))
    print(f"\n{'m of ' + str(T):>8}{'exact':>9}{'trained':>9}{'gap':>10}")
    table = {}
    for level, num_masked in levels.items():
        table[level] = compare(exact, model, x_0, mask_id, num_masked)
        known, learned, gap, error = table[level]
        print(f"{level:>8}{known:9.4f}{learned:9.4f}{gap:+10.4f} +- {error:.4f}", flush=True)
    return table


def over_training(folder: Path, reference: Callable[[Tensor], float], val: TokenFile, T: int,
                  H: float, name: str) -> list[dict]:
    """The evaluations of a run: {"step", "seconds", "nats", "gap"} each, also printed.

    `reference` says what the best possible network has on the same rows. Seconds are of training,
    without compiling.
    """
    run = read_run(folder)
    points = []
    best = {}  # by number of rows
    print(f"\n{'step':>8}{'seconds':>9}{name:>9}{'gap':>10}")
    for point in run.points:
        if point.rows not in best:
            best[point.rows] = reference(torch.from_numpy(val.spread(point.rows, T)))
        gap = point.nats - best[point.rows]
        seconds = point.seconds - run.compiling
        points.append({"step": point.step, "seconds": seconds, "nats": point.nats, "gap": gap})
        print(f"{point.step:8}{seconds:9.1f}{point.nats:9.4f}{gap:+10.4f} {gap / H:8.2%} of H")
    return points


def paint(panels, H: float, unigram: float, runs: dict[str, list[dict]],
          table: dict[str, list[float]]) -> None:
    """NELBO and NLL over the training and the entropy they bound; their gaps; CE(m)."""
    left, middle, right = panels
    for name, run in runs.items():
        seconds = [point["seconds"] for point in run]
        left.plot(seconds, [point["nats"] for point in run], marker=".", label=name)
        middle.plot(seconds, [100 * point["gap"] / H for point in run], marker=".", label=name)
    left.axhline(unigram, color="grey", linestyle=":",
                 label=f"entropy of a token alone, {unigram:.3f}")
    left.axhline(H, color="black", linestyle="--", label=f"exact entropy, {H:.3f}")
    left.margins(y=0.1)  # the upper line would lie on the frame
    left.set(title="The bound and what it bounds", ylabel="nats per token",
             xlabel="seconds of training")
    middle.axhline(1, color="black", linestyle="--", label="1%")
    middle.set(title="The gap is the network's error", ylabel="gap, % of the entropy",
               yscale="log", xlabel="seconds of training")
    middle.yaxis.set_major_formatter("{x:g}")
    levels = [level for level in table if level != "NELBO"]
    counts = [int(level) for level in levels]
    right.plot(counts, [table[level][0] for level in levels], color="black",
               label="the exact denoiser")
    right.plot(counts, [table[level][1] for level in levels], ".", markersize=9,
               label="the network")
    right.set(title="The loss by mask level", ylabel="CE(m), nats per hidden token",
              xlabel=f"m, hidden of {counts[-1]} tokens")
    for panel, corner in zip(panels, ("center right", "upper right", "upper left"), strict=True):
        panel.legend(loc=corner)


@command("experiments.proof_corpus")
def main(arguments: list[str]) -> None:
    parser = flags("proof_corpus", __doc__, checkpoint=False, data_dir=False)
    add = parser.add_argument
    add("--tokens", type=int, default=2_000_000, help="of training text (default: 2 million)")
    add("--rows", type=several, default=2048, help="of validation text (default: 2048)")
    args, settings = parser.parse_known_args(arguments)  # what else is given goes to train.py
    if args.tokens < 5:
        parser.error(f"--tokens must be at least 5, not {args.tokens}")

    chain = make_chain(len(LETTERS), seed=0)
    data_dir = OUT / "proof-corpus/data"
    write_corpus(chain, data_dir, args.tokens)
    settings = ["--data-dir", str(data_dir), *SETTINGS, *settings]
    folder = trained("proof-corpus/run", *settings)
    twin = trained("proof-corpus/twin", *settings, "--objective", "autoregressive")
    model, _ = load_checkpoint(folder)
    mask_id = model.config.mask_id
    T = model.config.context_length
    ids = [*LETTERS.encode(), get_tokenizer("byte").eot_token]
    exact = exact_denoiser(chain, ids, mask_id)
    H = exact_entropy(chain, T)
    unigram = exact_entropy(chain, 1)

    val = TokenFile(data_dir, "val")
    ours = over_training(folder, lambda x: nelbo(exact, x, mask_id).nats, val, T, H, "NELBO")
    other = over_training(twin, lambda x: exact_nll(chain, ids, x), val, T, H, "NLL")
    runs = {"NELBO": ours, "the twin's NLL": other}
    x_0 = torch.from_numpy(val.spread(args.rows, T))
    table = gap_by_level(exact, model, x_0, mask_id)
    bound = nelbo(exact, x_0, mask_id, batch_size=128)
    print(f"\nthe entropy of {T} tokens in a row is {H:.4f} nats per token ({unigram:.4f} for one "
          f"alone)\nthe exact denoiser's NELBO is {bound.nats:.4f} +- {bound.stderr:.4f}, "
          f"{(bound.nats - H) / bound.stderr:+.1f} standard errors off")

    draw(args.picture, lambda panels: paint(panels, H, unigram, runs, table), columns=3)
    *_, gap, error = table["NELBO"]
    within = [point["seconds"] for point in ours if point["gap"] <= 0.01 * H]
    reached = f"within 1% after {within[0]:.0f} s" if within else "never within 1%"
    answer(f"after {ours[-1]['seconds']:.0f} s of training the NELBO is {gap / H:.2%} +- "
           f"{error / H:.2%} over the exact entropy, all of it the network's error; it was "
           f"{reached}. The autoregressive twin's NLL is {other[-1]['gap'] / H:.2%} over.",
           {"entropy": H, "unigram": unigram, "exact": [bound.nats, bound.stderr], "table": table,
            "runs": runs})


if __name__ == "__main__":
    sys.exit(main())
