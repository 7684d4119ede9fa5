"""How near does training come to the truth? python -m experiments.proof_corpus

On a text whose entropy is known, a bound can be compared with what it bounds. The text here is written by a
Markov chain of eight letters, in which the end of a text is a ninth state: state v follows state s with
probability A[s,v]. With pi = pi A, the entropy of T tokens in a row is, per token,

    H = (H(pi) + (T-1) h) / T,    h = sum_s pi[s] H(A[s])    (nats)

and the exact answer to "what is hidden here?" is known too: `exact_denoiser` computes it, and is one more
model(tokens, positions), so that everything in diffusion.py takes it for a network. For it NELBO = H. For any
other model the NELBO is larger, by that model's error and nothing else.

Writes the text into out/experiments/proof-corpus/data, trains a small network on it with train.py, and prints

    exact, trained   CE(m) of the exact denoiser and of the network, on the same rows with the same masks
    gap              their difference, which is free of the luck of these rows, and its standard error

and last the NELBO, which has every m alike. The picture has the NELBO over the training.
"""

from bisect import bisect
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.quality import read_run
from diffusion import Model, draw_mask, draw_num_masked, keyed_generator, mean_and_error, nelbo, row_losses
from experiments.lab import OUT, answer, command, draw, flags, trained
from model import load_checkpoint
from prepare_data import TokenFile, get_tokenizer, write_dataset

LETTERS = "abcdefgh"
SETTINGS = ("--context-length 64 --batch-size 32 --n-layer 3 --n-head 4 --n-embd 128 --steps 1500 "
            "--eval-interval 100 --eval-rows 512 --final-eval-rows 512").split()


# --- The source ------------------------------------------------------------------------------------


def make_chain(letters: int, seed: int, peak: float = 0.3, end: float = 1 / 200) -> Tensor:
    """A (S,S), float64, S = letters + 1: A[s,v] is the probability that state v follows state s.

    The last state is the end of a text, which comes with probability `end` whatever was before. What follows
    each state is drawn from a Dirichlet distribution: the smaller `peak`, the fewer letters are likely.
    """
    following = np.random.default_rng(seed).dirichlet(np.full(letters, peak), letters + 1)
    return torch.from_numpy(np.hstack([(1 - end) * following, np.full((letters + 1, 1), end)]))


def stationary(chain: Tensor) -> Tensor:
    """pi (S,): how often each state occurs."""
    return torch.linalg.matrix_power(chain, 2**12)[0]


def exact_entropy(chain: Tensor, T: int) -> float:
    """H, the entropy of T tokens in a row, in nats per token."""
    pi = stationary(chain)
    return ((torch.special.entr(pi).sum() + (T - 1) * pi @ torch.special.entr(chain).sum(1)) / T).item()


def draw_states(chain: Tensor, length: int, seed: int) -> list[int]:
    """A walk through the chain, as if a text had just ended."""
    sums, last = chain.cumsum(1)[:, :-1].tolist(), len(chain) - 1
    states, state = [], last
    for u in np.random.default_rng(seed).random(length):
        state = bisect(sums[state], u)
        states.append(state)
    return states


def write_corpus(chain: Tensor, folder: Path, tokens: int) -> None:
    """train.bin with about so many tokens, val.bin with a fifth of them."""
    def texts(split: str, length: int, seed: int):
        walk = "".join((LETTERS + "\n")[state] for state in draw_states(chain, length, seed))
        return ((split, [text]) for text in walk.split("\n"))

    documents = [*texts("train", tokens, seed=1), *texts("val", tokens // 5, seed=2)]
    write_dataset(iter(documents), "byte", folder, "a Markov chain")


def exact_denoiser(chain: Tensor, ids: list[int], vocab_size: int) -> Model:
    """The network that training can at best become: P(token at a place | all visible tokens of the row).

    ids: the token of each state. All other tokens have probability 0, and must not occur.

    Forward-backward: the places to the left send a message (S,) about the state here, the places to the
    right another, and the answer is their product. A message is the one before, times the evidence of the
    place it passes (what is visible there; nothing, if hidden), times A: so d hidden places are A^d.
    """
    ids, pi, mask_id = torch.tensor(ids), stationary(chain), vocab_size

    def model(tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        seen = tokens[..., None]
        evidence = ((seen == ids) | (seen == mask_id)).double()  # (B,T,S)
        from_left, from_right = torch.empty_like(evidence), torch.empty_like(evidence)
        message = pi.expand(len(tokens), -1)
        for t in range(tokens.size(1)):
            from_left[:, t] = message
            message = normalized(message * evidence[:, t]) @ chain
        message = torch.ones_like(message)
        for t in reversed(range(tokens.size(1))):
            from_right[:, t] = message
            message = normalized(message * evidence[:, t]) @ chain.T
        log_p = torch.full((*tokens.shape, vocab_size), -torch.inf)
        log_p[..., ids] = normalized(from_left * from_right).log().float()
        return log_p if positions is None else log_p.flatten(0, 1)[positions]

    return model


def normalized(p: Tensor) -> Tensor:
    return p / p.sum(-1, keepdim=True)


# --- The experiment --------------------------------------------------------------------------------


@torch.no_grad()
def compare(exact: Model, model: Model, x_0: Tensor, mask_id: int, num_masked: Tensor) -> list[float]:
    """[CE of `exact`, CE of `model`, their difference, its standard error], num_masked[b] hidden in row b."""
    mask = draw_mask(num_masked, x_0.size(1), 0, keyed_generator(0, 0, "compare"))
    x_t = x_0.masked_fill(mask, mask_id)
    known, learned = (row_losses(either, x_t, x_0, mask, batch_size=128) for either in (exact, model))
    return [known.mean().item(), learned.mean().item(), *mean_and_error(learned - known)]


@command
def main(arguments: list[str] | None = None) -> None:
    parser = flags("proof_corpus", __doc__)
    parser.add_argument("--tokens", type=int, default=2_000_000, help="of training text")
    parser.add_argument("--rows", type=int, default=2048, help="of the table")
    args, settings = parser.parse_known_args(arguments)

    chain, data_dir = make_chain(len(LETTERS), seed=0), OUT / "proof-corpus/data"
    write_corpus(chain, data_dir, args.tokens)
    folder = trained("proof-corpus/run", "--data-dir", str(data_dir), *SETTINGS, *settings)
    model, info = load_checkpoint(folder)
    mask_id, T = model.config.mask_id, model.config.context_length
    exact = exact_denoiser(chain, [*LETTERS.encode(), get_tokenizer("byte").eot_token], mask_id)
    H = exact_entropy(chain, T)

    val = TokenFile(data_dir, "val")
    x_0 = torch.from_numpy(val.spread(args.rows, T))
    bound = nelbo(exact, x_0, mask_id, batch_size=128)
    print(f"H {H:.4f}, exact {bound.nats:.4f} +- {bound.stderr:.4f}")
    points = read_run(folder).points
    ref = nelbo(exact, torch.from_numpy(val.spread(points[-1].rows, T)), mask_id).nats
    for p in points:
        print(p.step, round(p.seconds, 1), round(p.nats, 4), f"{(p.nats - ref) / H:.2%}")
    R = len(x_0)
    for m in (1, *(round(T * i / 10) for i in range(1, 11))):
        print(m, [round(v, 4) for v in compare(exact, model, x_0, mask_id, torch.full((R,), m))])
    a = compare(exact, model, x_0, mask_id, draw_num_masked(R, T, keyed_generator(0, 0, "levels")))
    print("NELBO", a, f"{a[2] / H:.2%} +- {a[3] / H:.2%}")


if __name__ == "__main__":
    import sys

    sys.exit(main())
