"""What does each layer know? python -m experiments.layers

Every block adds to one running sum, and the head turns the sum after the last one into logits. The
*logit lens* applies the head earlier: to the embedding, and after each block.

    guesses       what the lens finds likeliest at the holes of a sentence (--text)
    CE by layer   cross-entropy of the hidden tokens of validation text, in nats, by mask ratio
    decided       while the model writes in 16 calls: of the positions still hidden before a call,
                  the fraction where the lens's first choice is what will finally be written there
    attention     softmax(q k' / sqrt(D)), which the fused kernel never shows, where half of a text
                  is hidden: how much weight each head puts on hidden positions, on the position
                  itself, on those at a distance of 1 or 2, and how far away it looks on average
"""

import sys

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from diffusion import draw_mask, keyed_generator
from experiments.lab.command import count, flags, report, several
from experiments.lab.pictures import draw
from experiments.lab.runs import autocast, rows_of
from model import Attention, Transformer, mix_neighbours, norm, rotate
from plumbing.checkpoint import load_checkpoint
from plumbing.command import command
from plumbing.config import ConfigError
from plumbing.text import tokens_with_holes
from prepare_data import get_tokenizer
from sample import denoise

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


def states(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """The running sum, (B,T,C), as it enters each block, and as it leaves the last one."""
    rotary = model.rotary[:, : tokens.size(1)]
    x = norm(model.embedding(tokens))
    found = [x]
    for block in model.blocks:
        x = block(x, rotary)
        found.append(x)
    return found


@torch.no_grad()
def lens(model: Transformer, tokens: Tensor, positions: Tensor) -> Tensor:
    """(L+1,P,V): the logits at `positions` if the head came after the embedding, block 1, ... L."""
    table = model.embedding.weight[: model.config.vocab_size]
    return torch.stack([F.linear(norm(x.flatten(0, 1)[positions]), table)
                        for x in states(model, tokens)])


def attention_weights(attention: Attention, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """(weights (B,H,T,T), v (B,H,T,D)) of `attention(x, rotary)`, which is proj(weights @ v)."""
    B, T, C = x.shape
    D = C // attention.n_head
    q, k, v = attention.qkv(x).view(B, T, 3 * attention.n_head, D).chunk(3, dim=2)  # (B,T,H,D)
    q = rotate(norm(q), rotary).transpose(1, 2)  # (B,H,T,D)
    k = rotate(norm(k), rotary).transpose(1, 2)
    scores = q @ k.mT / D**0.5  # (B,H,T,T)
    if attention.causal:
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    return scores.softmax(-1), v.transpose(1, 2)


@torch.no_grad()
def all_attention(model: Transformer, tokens: Tensor) -> Tensor:
    """(L,B,H,T,T): who looks at whom, in every layer and head; row = the position that looks."""
    rotary = model.rotary[:, : tokens.size(1)]
    found = []
    for block, x in zip(model.blocks, states(model, tokens), strict=False):
        x = mix_neighbours(x, block.neighbours, block.attention.causal)
        found.append(attention_weights(block.attention, norm(x), rotary)[0])
    return torch.stack(found)


def loss_by_layer(model: Transformer, x_0: Tensor) -> Tensor:
    """(L+1, levels): CE of the hidden tokens of x_0 (R,T) under the lens."""
    R, T = x_0.shape
    columns = []
    for level in LEVELS:
        m = max(1, round(level * T))
        mask = draw_mask(torch.full((R,), m), T, 0, keyed_generator(0, m, "layers"))
        sums = 0
        for rows, hidden in zip(x_0.split(8), mask.split(8), strict=True):  # all would be gigabytes
            positions = hidden.flatten().nonzero().squeeze(1)
            with autocast():
                logits = lens(model, rows.masked_fill(hidden, model.config.mask_id), positions)
            targets = rows.flatten()[positions]
            sums = sums + torch.stack([F.cross_entropy(layer.float(), targets, reduction="sum")
                                       for layer in logits])
        columns.append(sums / (R * m))
    return torch.stack(columns, dim=1)


def decided(model: Transformer, x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Write into x (B,T) in `steps` calls.

    Returns (L+1, steps), the fraction of the positions hidden before a call where the lens's first
    choice is what will be written, and the final tokens (B,T).
    """
    fractions = []
    with autocast():
        *before, last = denoise(model, x, model.config.mask_id, Generator().manual_seed(1),
                                steps=steps, order="spread", temperature=0.85)
        for state in before:
            positions = (state.tokens == model.config.mask_id).flatten().nonzero().squeeze(1)
            first_choice = lens(model, state.tokens, positions).argmax(-1)  # (L+1,P)
            right = first_choice == last.tokens.flatten()[positions]
            fractions.append(right.float().mean(1))
    return torch.stack(fractions, dim=1), last.tokens


def look(weights: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Habits of attention (L,B,H,T,T), means over rows and positions, (L,H) each.

    mask (B,T): what is hidden.
    """
    T = mask.size(1)
    distance = (torch.arange(T)[:, None] - torch.arange(T)).abs()
    near = (distance == 1) | (distance == 2)
    found = {"hidden": weights * mask[:, None, None, :], "itself": weights * (distance == 0),
             "neighbours": weights * near, "distance": weights * distance}
    return {name: value.sum(-1).mean((1, 3)) for name, value in found.items()}


def paint(panels, ce: Tensor, fractions: Tensor, weights: Tensor) -> None:
    """CE by layer; what is decided when; the weight by distance of each head of `weights`
    (L,H,T,T)."""
    losses, choices, profile = panels
    for level, column in zip(LEVELS, ce.T, strict=True):
        losses.plot(column.tolist(), marker="o", label=f"{level:.0%} hidden")
    losses.set(title="Loss under the lens", xlabel="blocks", xticks=range(len(ce)),
               ylabel="CE, nats per hidden token")
    for blocks, row in enumerate(fractions):
        choices.plot(range(1, len(row) + 1), 100 * row, marker=".", label=f"after {blocks} blocks")
    choices.set(title="Already decided, of what is still hidden", xlabel="call",
                ylabel="% of the final tokens")
    reach = range(-min(12, weights.size(-1) - 1), min(12, weights.size(-1) - 1) + 1)
    for layer, heads in enumerate(weights):
        for head, matrix in enumerate(heads):
            by_offset = [100 * matrix.diagonal(offset).mean() for offset in reach]
            profile.plot(reach, by_offset, marker=".", label=f"block {layer + 1}, head {head + 1}")
    profile.set(title="Where the heads look", xlabel="positions to the right",
                ylabel="mean weight, %")
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
    model, info = load_checkpoint(args.checkpoint)
    if model.config.causal:
        raise ConfigError(f"{args.checkpoint} is autoregressive: it has no hidden tokens to fill")
    tokenizer = get_tokenizer(info["tokenizer"], args.checkpoint)
    mask_id = model.config.mask_id
    T = model.config.context_length
    names = ["embedding", *(f"block {i + 1}" for i in range(model.config.n_layer))]
    text = torch.tensor([tokens_with_holes(args.text, tokenizer, mask_id)])
    x_0 = rows_of(args.data_dir, args.rows, T)

    print(args.text)
    for name, logits in zip(names, lens(model, text, (text[0] == mask_id).nonzero()[:, 0]),
                            strict=True):
        guesses = logits.softmax(-1).topk(3)
        print(f"{name:12}" + "   ".join(", ".join(
            f"{tokenizer.decode([token])!r} {p:.0%}" for p, token in zip(*hole, strict=True))
            for hole in zip(guesses.values.tolist(), guesses.indices.tolist(), strict=True)))

    ce = loss_by_layer(model, x_0)
    x = torch.full((args.num_samples, T), mask_id)
    fractions, _ = decided(model, x, 16)
    calls = [0, 4, 8, 12, fractions.size(1) - 1]
    print(f"\n{'CE, hidden':12}" + "".join(f"{level:>8.0%}" for level in LEVELS)
          + f"{'decided, before call':>24}" + "".join(f"{call + 1:6}" for call in calls))
    for name, row, done in zip(names, ce, fractions, strict=True):
        print(f"{name:12}" + "".join(f"{nats:8.3f}" for nats in row) + " " * 24
              + "".join(f"{done[call]:6.0%}" for call in calls))

    mask = draw_mask(torch.full((min(16, len(x_0)),), T // 2), T, 0,
                     keyed_generator(0, 0, "attention"))
    weights = all_attention(model, x_0[: len(mask)].masked_fill(mask, mask_id))
    habits = look(weights, mask)
    print(f"\n{'attention':20}" + "".join(f"{name:>12}" for name in habits))
    for layer, head in torch.cartesian_prod(*map(torch.arange, weights.shape[::2][:2])).tolist():
        *parts, distance = (value[layer, head] for value in habits.values())
        print(f"block {layer + 1}, head {head + 1:<5}"
              + "".join(f"{part:12.0%}" for part in parts) + f"{distance:12.1f}")
    draw(args.picture, lambda panels: paint(panels, ce, fractions, weights.mean(1)), columns=3)
    report({"levels": LEVELS, "ce": dict(zip(names, ce.tolist(), strict=True)),
            "decided": dict(zip(names, fractions.tolist(), strict=True)),
            "attention": {name: value.tolist() for name, value in habits.items()}})


if __name__ == "__main__":
    sys.exit(main())
