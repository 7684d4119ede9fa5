"""What does each layer know? python -m experiments.layers

Every block adds to one running sum, and the head turns the sum after the last one into logits. The
*logit lens* applies the head earlier: to the embedding, or after fewer blocks. What it sees through
is one more model(tokens, positions), so all of diffusion.py can measure it.

    guesses     what the lens finds likeliest at the holes of a sentence (--text)
    CE, hidden  cross-entropy of the hidden tokens of validation text, in nats, by mask ratio
    decided     while the model writes in 16 calls: of the positions still hidden before a call, the
                fraction where the lens's first choice is what will finally be written there

The picture also shows where each head looks when half of a text is hidden: the mean weight
softmax(q k' / sqrt(D)) by distance, which the fused kernel never shows.
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion import Curve, Model
from experiments.lab.command import count, flags, report, several
from experiments.lab.judge import load_writer, some_positions, write
from experiments.lab.pictures import draw
from experiments.lab.runs import autocast, measure_curve, rows_of
from model import Attention, Transformer, mix_neighbours, norm, rotate
from plumbing.command import command
from plumbing.text import tokens_with_holes


def lens(model: Transformer, blocks: int) -> Model:
    """The network with its head after so many blocks; all of them: the network itself."""
    table = model.embedding.weight[: model.config.vocab_size]  # (V,C)

    @torch.no_grad()
    def early(tokens: Tensor, positions: Tensor) -> Tensor:
        x = norm(model.embedding(tokens))  # (B,T,C)
        for block in model.blocks[:blocks]:
            x = block(x, model.rotary[:, : tokens.size(1)])
        return F.linear(norm(x.flatten(0, 1)[positions]), table)  # (P,V)

    return early


def decided(network: Model, states: list[Tensor], mask_id: int) -> list[float]:
    """Before each call: the fraction of the positions still hidden where the first choice of the
    network is what will be written. states: (B,T) before and after each call."""
    *before, last = states
    fractions = []
    for x in before:
        positions = (x == mask_id).flatten().nonzero().squeeze(1)  # (P,)
        right = network(x, positions).argmax(-1) == last.flatten()[positions]
        fractions.append(right.float().mean().item())
    return fractions


def attention_weights(attention: Attention, x: Tensor, rotary: Tensor) -> Tensor:
    """(B,H,T,T): attention(x, rotary) is proj(weights @ v); row = the position that looks."""
    B, T, _ = x.shape
    q, k, _ = attention.qkv(x).view(B, T, 3 * attention.n_head, -1).chunk(3, dim=2)  # (B,T,H,D)
    q = rotate(norm(q), rotary).transpose(1, 2)  # (B,H,T,D)
    k = rotate(norm(k), rotary).transpose(1, 2)
    return (q @ k.mT / q.size(-1) ** 0.5).softmax(-1)


@torch.no_grad()
def all_attention(model: Transformer, tokens: Tensor) -> Tensor:
    """(L,B,H,T,T): who looks at whom, in every layer and head, while the model reads tokens."""
    rotary = model.rotary[:, : tokens.size(1)]
    x = norm(model.embedding(tokens))  # (B,T,C)
    found = []
    for block in model.blocks:
        seen = norm(mix_neighbours(x, block.neighbours, causal=False))
        found.append(attention_weights(block.attention, seen, rotary))
        x = block(x, rotary)
    return torch.stack(found)


def paint(panels, curves: dict[str, Curve], fractions: dict[str, list], weights: Tensor) -> None:
    """Loss by mask ratio; what is decided when; where the heads look, by weights (L,H,T,T)."""
    losses, choices, profile = panels
    for name, curve in curves.items():
        losses.plot([m / curve.N for m in curve.counts], curve.nats, marker=".", label=name)
        choices.plot(range(1, 17), fractions[name], marker=".", label=name)
    losses.set(title="Loss under the lens", xlabel="mask ratio", ylabel="nats per hidden token")
    choices.set(title="Already decided, of what is still hidden", xlabel="before call",
                ylabel="fraction of the final tokens")
    reach = range(-12, 13)
    for layer, heads in enumerate(weights):
        for head, matrix in enumerate(heads):
            profile.plot(reach, [matrix.diagonal(offset).mean() for offset in reach], marker=".",
                         label=f"block {layer + 1}, head {head + 1}")
    profile.set(title="Where the heads look", xlabel="positions to the right", ylabel="mean weight")
    for panel in panels:
        panel.legend()


@command("experiments.layers", ValueError)  # of a --text without a hole
def main(arguments: list[str]) -> None:
    parser = flags("layers", __doc__)
    add = parser.add_argument
    add("--rows", type=several, default=64, help="validation texts (default: %(default)s)")
    add("--num-samples", type=count, default=16, help="texts to write (default: %(default)s)")
    add("--text", default="The state of the[MASK] is strong, and the people of the United[MASK] "
        "are at[MASK] with all the[MASK] of the world.", help="(default: %(default)s)")
    args = parser.parse_args(arguments)
    model, tokenizer = load_writer(args.checkpoint)
    mask_id = model.config.mask_id
    T = model.config.context_length
    text = torch.tensor([tokens_with_holes(args.text, tokenizer, mask_id)])
    x_0 = rows_of(args.data_dir, args.rows, T)
    lenses = {f"block {blocks}" if blocks else "embedding": lens(model, blocks)
              for blocks in range(model.config.n_layer + 1)}

    print(args.text)
    for name, network in lenses.items():
        best = network(text, (text[0] == mask_id).nonzero()[:, 0]).softmax(-1).topk(3)
        print(f"{name:12}" + "   ".join(", ".join(
            f"{tokenizer.decode([token])!r} {p:.0%}" for p, token in zip(*hole, strict=True))
            for hole in zip(best.values.tolist(), best.indices.tolist(), strict=True)))

    x = torch.full((args.num_samples, T), mask_id)
    states = write(model, x, mask_id, order="spread", steps=16, top_k=200)
    with autocast():
        curves = {name: measure_curve(network, x_0, mask_id, 10, "layers")
                  for name, network in lenses.items()}
        fractions = {name: decided(network, [state.tokens for state in states], mask_id)
                     for name, network in lenses.items()}
    print(f"\n{'CE, hidden':12}     10%     50%    100%    decided, before call 1     9    16")
    for name, curve in curves.items():
        nats = np.interp([0.1 * T, 0.5 * T, T], curve.counts, curve.nats)
        print(f"{name:12}" + "".join(f"{value:8.3f}" for value in nats) + " " * 20
              + "".join(f"{fractions[name][call]:6.0%}" for call in (0, 8, -1)))

    half_hidden = x_0.masked_fill(some_positions(x_0, T // 2, "attention"), mask_id)
    weights = all_attention(model, half_hidden[:16]).mean(1)  # (L,H,T,T)
    draw(args.picture, lambda panels: paint(panels, curves, fractions, weights), columns=3)
    report({"ce": {name: dict(zip(curve.counts, curve.nats, strict=True))
                   for name, curve in curves.items()}, "decided": fractions})


if __name__ == "__main__":
    sys.exit(main())
