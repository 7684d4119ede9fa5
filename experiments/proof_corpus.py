"""How near does training come to the truth? python -m experiments.proof_corpus

On a text whose entropy is known, a bound can be compared with what it bounds. The text here is
written by a Markov chain of eight letters, in which the end of a text is a ninth state: state v
follows state s with probability A[s,v]. With pi = pi A, the entropy of T tokens in a row is

    H = (H(pi) + (T-1) h) / T,    h = sum_s pi[s] H(A[s])    (nats per token)

and the exact answer to "what is hidden here?" is known too: `exact_denoiser` is one more
model(tokens, positions), so everything in diffusion.py takes it for a network. For it NELBO = H.
For any other model the NELBO is larger, by that model's error and nothing else.

Trains small networks and their autoregressive twins, whose negative log-likelihood (NLL) is no
bound but exact, on three seeds each. Prints by how many percent of H they exceed the exact denoiser
on the same questions, so that most of the luck of the rows cancels; +- is the standard error over
seeds.
"""

import sys
from bisect import bisect
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion import Curve, Model, mean_and_error, nelbo
from experiments.lab.command import at_least, count, flags, report, several
from experiments.lab.pictures import draw
from experiments.lab.runs import OUT, measure_curve, read_run, trained
from plumbing.checkpoint import load_checkpoint
from plumbing.command import command
from prepare_data import TokenFile, get_tokenizer, write_dataset
from sample import exact_nll

LETTERS = "abcdefgh"
SETTINGS = ("--context-length 64 --batch-size 32 --n-layer 3 --n-embd 128 --steps 400 "
            "--eval-interval 50 --mask-positions random").split()


def make_chain(letters: int, seed: int, peak: float = 0.3, end: float = 1 / 200) -> Tensor:
    """A (S,S), float64, S = letters + 1: A[s,v] is the probability that state v follows state s.

    The last state is the end of a text, always as likely. What follows a state is drawn from a
    Dirichlet distribution: the smaller `peak`, the fewer letters are likely.
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
    states = [len(chain) - 1]
    for u in np.random.default_rng(seed).random(length):
        states.append(bisect(sums[states[-1]], u))
    return states[1:]


def write_corpus(chain: Tensor, folder: Path, tokens: int) -> None:
    """train.bin with so many tokens, val.bin with a fifth of them; each ends with one more."""
    documents = []
    for split, length, seed in (("train", tokens, 1), ("val", tokens // 5, 2)):
        walk = "".join((LETTERS + "\n")[state] for state in draw_states(chain, length, seed))
        documents += [(split, [text]) for text in walk.split("\n")]
    write_dataset(iter(documents), "byte", folder, "a Markov chain")


def exact_denoiser(chain: Tensor, ids: list[int], vocab_size: int) -> Model:
    """The network that training can at best become: P(token at a position | all visible tokens).

    ids: the token of each state. All other tokens have probability 0, and must not occur.
    """
    states = torch.tensor(ids)

    def model(tokens: Tensor, positions: Tensor) -> Tensor:
        seen = tokens[..., None]
        evidence = ((seen == states) | (seen == vocab_size)).double()  # (B,T,S); 1 where hidden
        # Forward-backward: the positions to the left say something about the state here, those to
        # the right something else, and the answer is the product.
        from_left = messages(stationary(chain), evidence, chain)
        from_right = messages(torch.ones(len(chain)).double(), evidence.flip(1), chain.T).flip(1)
        p = F.normalize(from_left * from_right, p=1, dim=2).flatten(0, 1)[positions]  # (P,S)
        log_p = torch.full((len(positions), vocab_size), -torch.inf)
        log_p[:, states] = p.log().float()
        return log_p

    return model


def messages(message: Tensor, evidence: Tensor, chain: Tensor) -> Tensor:
    """(B,T,S): what each position hears from those before it; the first hears `message` (S,)."""
    message = message.expand(len(evidence), -1)
    heard = []
    for passed in evidence.unbind(1):  # (B,S); through d hidden positions a message takes A^d
        heard.append(message)
        message = F.normalize(message * passed, p=1) @ chain
    return torch.stack(heard, 1)


def percent_over(best: float, H: float, folders: list[Path]) -> dict[int, Tensor]:
    """{step: (seeds,)}: what some runs have over the `best` possible on these rows, in % of H."""
    runs = [read_run(folder).evaluations for folder in folders]
    return {lines[0]["step"]: 100 * (torch.tensor([line["nats"] for line in lines]) - best) / H
            for lines in zip(*runs, strict=True)}


def paint(panels, gaps: dict[str, dict[int, Tensor]], exact: Curve, curves: list[Curve]) -> None:
    """The gaps in percent over the training; CE(m) of the exact denoiser and of the networks."""
    left, right = panels
    for name, by_step in gaps.items():
        means, errors = zip(*map(mean_and_error, by_step.values()), strict=True)
        left.errorbar(list(by_step), means, errors, marker=".", label=name)
    left.axhline(1, color="black", linestyle="--", label="1%")
    left.set(title="The gap is the network's error", ylabel="gap, % of the entropy", yscale="log",
             xlabel="steps of training")
    left.yaxis.set_major_formatter("{x:g}")
    right.plot(exact.counts, exact.nats, color="black", label="the exact denoiser")
    right.plot(exact.counts, np.mean([curve.nats for curve in curves], 0), ".", markersize=9,
               label="the networks, mean")
    right.set(title="The loss by mask level", ylabel="CE(m), nats per hidden token",
              xlabel=f"m, hidden of {exact.N} tokens")
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
    settings = [*SETTINGS, *settings, "--data-dir", str(data_dir), "--eval-rows", str(args.rows),
                "--final-eval-rows", str(args.rows)]
    ours, twins = ([trained(f"proof-corpus/{objective}-{seed}", *settings, "--objective", objective,
                            "--seed", str(seed)) for seed in args.seeds]
                   for objective in ("diffusion", "autoregressive"))
    models = [load_checkpoint(folder)[0] for folder in ours]
    T = models[0].config.context_length
    mask_id = models[0].config.mask_id
    exact = exact_denoiser(chain, [*LETTERS.encode(), get_tokenizer("byte").eot_token], mask_id)
    H = exact_entropy(chain, T)
    x_0 = torch.from_numpy(TokenFile(data_dir, "val").spread(args.rows, T))
    bound = nelbo(exact, x_0, mask_id)
    nll = exact_nll(exact, x_0, mask_id, batch_size=256)  # exact: the same in whatever order

    gaps = {"NELBO": percent_over(bound.nats, H, ours),
            "the twin's NLL": percent_over(nll.nats, H, twins)}
    print(f"\n{'step':>8}" + "".join(f"{name + ', % over H':>28}" for name in gaps))
    for step in gaps["NELBO"]:
        cells = ("{:.2f} +- {:.2f}".format(*mean_and_error(run[step])) for run in gaps.values())
        print(f"{step:8}" + "".join(f"{cell:>28}" for cell in cells))
    print(f"\nthe entropy of {T} tokens in a row is {H:.4f} nats per token\n"
          f"the exact denoiser's NELBO is {bound.nats:.4f} +- {bound.stderr:.4f}")
    curves = [measure_curve(model, x_0, mask_id, 10, "levels") for model in (exact, *models)]
    draw(args.picture, lambda panels: paint(panels, gaps, curves[0], curves[1:]), columns=2)
    report({"entropy": H, "exact": [bound.nats, bound.stderr], "ce": [c.nats for c in curves],
            "gaps": {name: {step: gap.tolist() for step, gap in run.items()}
                     for name, run in gaps.items()}})


if __name__ == "__main__":
    sys.exit(main())
