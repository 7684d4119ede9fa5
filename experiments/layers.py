"""What does each layer know? python -m experiments.layers --checkpoint out/bytes

Every block of the network adds to one running sum, and the head turns the sum after the last block
into logits. The *logit lens* applies the head earlier: to the embedding, and after each block.
Three tables:

    CE by layer   cross-entropy of the hidden tokens of validation text, in nats, by layer and mask
                  ratio
    decided       while the model writes (confidence order, a prefix given): of the positions still
                  hidden at a step, the fraction where the lens's first choice is what will finally
                  be written there
    attention     softmax(q k' / sqrt(D)), which the network's fused kernel never shows: how much
                  weight each head puts on hidden positions (half of the text is hidden), on the
                  position itself, on its neighbours at a distance of 1 or 2, and how many positions
                  away it looks on average
"""

import itertools
import sys

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from diffusion import draw_mask, keyed_generator
from experiments.lab.command import answer, count, flags, several
from experiments.lab.pictures import draw
from experiments.lab.runs import autocast, rows_of
from model import Attention, Transformer, mix_neighbours, norm, rotate
from plumbing.checkpoint import load_checkpoint
from plumbing.command import command
from plumbing.config import ConfigError
from plumbing.terminal import HIDDEN
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
    """(L+1, levels): CE of the hidden tokens under the lens."""
    R, T = x_0.shape
    columns = []
    for level in LEVELS:
        m = max(1, round(level * T))
        mask = draw_mask(torch.full((R,), m), T, 0, keyed_generator(0, m, "layers"))
        positions = mask.flatten().nonzero().squeeze(1)
        x_t = x_0.masked_fill(mask, model.config.mask_id)
        with autocast():
            logits = lens(model, x_t, positions).float()
        targets = x_0.flatten()[positions]
        columns.append(torch.stack([F.cross_entropy(layer, targets) for layer in logits]))
    return torch.stack(columns, dim=1)


def decided(model: Transformer, x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Write into x (B,T) in `steps` steps.

    Returns (L+1, steps), the fraction of the positions hidden before a step where the lens's first
    choice is what will be written, and the final tokens (B,T).
    """
    mask_id = model.config.mask_id
    fractions = []
    with autocast():
        *before, last = denoise(model, x, mask_id, Generator().manual_seed(1), steps=steps,
                                order="confidence", gumbel=1.0, temperature=0.7)
        for state in before:
            positions = (state.tokens == mask_id).flatten().nonzero().squeeze(1)
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


def tick(text: str) -> str:
    """A token as a tick label."""
    return text if text.isprintable() and text.strip() else "\N{MIDDLE DOT}"


def names_of(L: int) -> list[str]:
    return ["embedding", *(f"block {i}" for i in range(1, L + 1))]


def paint(axes, ce: Tensor, fractions: Tensor, weights: Tensor, texts: list[str],
          chosen: dict[str, tuple[int, int]]) -> None:
    """Above: CE by layer, what is decided when, weight by distance. Below: maps of `chosen` heads.

    weights: (L,H,T,T) of one row; texts: what stands at as many positions as the maps show.
    """
    (losses, heat, profile), maps = axes
    for level, column in zip(LEVELS, ce.T, strict=True):
        losses.plot(column.tolist(), marker="o", label=f"{level:.0%}")
    losses.set(title="Loss under the lens", ylabel="CE, nats per hidden token")
    losses.set_xticks(range(len(ce)), names_of(len(ce) - 1), rotation=30)
    losses.legend(title="hidden")
    image = heat.imshow(100 * fractions.numpy(), aspect="auto", origin="lower", vmin=0,
                        extent=(0, 100, -0.5, len(fractions) - 0.5))
    heat.set(title="Already decided, of what is still hidden", xlabel="steps done, %")
    heat.set_yticks(range(len(fractions)), names_of(len(fractions) - 1))
    heat.figure.colorbar(image, ax=heat, label="% of the final tokens")
    T = weights.size(-1)
    reach = range(-min(12, T - 1), min(12, T - 1) + 1)
    for layer, head in dict.fromkeys(chosen.values()):
        by_offset = [weights[layer, head].diagonal(offset).mean().item() * 100 for offset in reach]
        profile.plot(reach, by_offset, marker=".", label=f"block {layer + 1}, head {head + 1}")
    profile.set(title="Where these heads look", xlabel="positions to the right",
                ylabel="mean weight, %")
    profile.legend()
    n = len(texts)
    for axis, (name, (layer, head)) in zip(maps, chosen.items(), strict=True):
        seen = weights[layer, head, :n, :n].sqrt()  # small weights show too
        axis.imshow(seen.numpy(), cmap="Greys")
        axis.set(title=f"block {layer + 1}, head {head + 1}: {name}", ylabel="looking",
                 xlabel=f"looked at ({HIDDEN} hidden)")
        for ticks in (axis.set_xticks, axis.set_yticks):
            ticks(range(n), texts, family="DejaVu Sans Mono", fontsize=8)


def conclude(ce: Tensor, fractions: Tensor) -> str:
    """The answer in words, from `loss_by_layer` and `decided`."""
    half = ce[:, LEVELS.index(0.5)]
    middle = fractions.size(1) // 2
    drops = ", ".join(f"{drop:.2f}" for drop in -half.diff())
    return (f"with half of the text hidden the embedding's own guess costs {half[0]:.2f} nats per "
            f"token, that of the last block {half[-1]:.2f}; the blocks take off {drops} in turn. "
            f"Of what is still hidden, the last block has decided {fractions[-1, 0]:.0%} before "
            f"the first step and {fractions[-1, middle]:.0%} halfway, the block before it "
            f"{fractions[-2, 0]:.0%} and {fractions[-2, middle]:.0%}")


@command("experiments.layers")
def main(arguments: list[str]) -> None:
    parser = flags("layers", __doc__)
    add = parser.add_argument
    add("--rows", type=several, default=64, help="validation texts for the losses (default: 64)")
    add("--num-samples", type=count, default=8, help="texts to write (default: 8)")
    add("--steps", type=count, default=64, help="to write them in (default: 64)")
    add("--prefix", default="The state of the Union is ", help="given text that they begin with")
    args = parser.parse_args(arguments)
    model, info = load_checkpoint(args.checkpoint)
    if model.config.causal:
        raise ConfigError(f"{args.checkpoint} is autoregressive: it has no hidden tokens to fill")
    tokenizer = get_tokenizer(info["tokenizer"], args.checkpoint)
    mask_id = model.config.mask_id
    T = model.config.context_length
    H = model.config.n_head
    names = names_of(model.config.n_layer)
    prefix = tokenizer.encode_ordinary(args.prefix)
    if not 2 <= args.steps <= T - len(prefix):
        raise ConfigError(f"--steps must be from 2 to the {T - len(prefix)} positions after the "
                          f"prefix, not {args.steps}")
    x_0 = rows_of(args.data_dir, args.rows, T)

    ce = loss_by_layer(model, x_0)
    print(f"{'CE by layer, mask ratio':28}" + "".join(f"{level:>8.0%}" for level in LEVELS))
    for name, row in zip(names, ce, strict=True):
        print(f"{name:28}" + "".join(f"{nats:8.3f}" for nats in row))

    x = torch.full((args.num_samples, T), mask_id)
    x[:, : len(prefix)] = torch.tensor(prefix, dtype=torch.int64)
    fractions, written = decided(model, x, args.steps)
    quarters = [round(k * (fractions.size(1) - 1) / 4) for k in range(5)]
    print(f"\n{'decided, before step':28}" + "".join(f"{step + 1:8}" for step in quarters))
    for name, row in zip(names, fractions, strict=True):
        print(f"{name:28}" + "".join(f"{row[step]:8.0%}" for step in quarters))
    print(f"a sample: {tokenizer.decode(written[0].tolist())[:80]!r}")

    half = torch.full((min(16, len(x_0)),), T // 2)
    mask = draw_mask(half, T, 0, keyed_generator(0, 0, "attention"))
    seen = x_0[: len(mask)].masked_fill(mask, mask_id)
    weights = all_attention(model, seen)
    habits = look(weights, mask)
    print(f"\n{'attention':28}" + "".join(f"{name:>12}" for name in habits))
    for layer, head in itertools.product(range(model.config.n_layer), range(H)):
        *parts, distance = (value[layer, head] for value in habits.values())
        print(f"block {layer + 1}, head {head + 1:<13}"
              + "".join(f"{part:12.0%}" for part in parts) + f"{distance:12.1f}")

    chosen = {label: divmod(int(habits[name].argmax()), H) for label, name in (
        ("most on neighbours", "neighbours"), ("looks farthest", "distance"),
        ("most on hidden", "hidden"))}
    texts = [HIDDEN if token == mask_id else tick(tokenizer.decode([token]))
             for token in seen[0, :40].tolist()]
    draw(args.picture, lambda axes: paint(axes, ce, fractions, weights[:, 0], texts, chosen),
         columns=3, rows=2, width=5.5, height=5)
    answer(conclude(ce, fractions) + ".", {
        "ce": dict(zip(names, ce.tolist(), strict=True)), "levels": LEVELS, "steps": quarters,
        "decided": fractions[:, quarters].tolist(),
        "attention": {name: value.tolist() for name, value in habits.items()}})


if __name__ == "__main__":
    sys.exit(main())
