"""What is hidden, and what does it cost to restore? python -m experiments.masking

First a passage of validation text at ten levels of masking, as training shows it, and CE(m), what a
hidden token costs when m of N are hidden: the mean height of this curve is the NELBO. Then half of
the text is hidden, by masks of different kinds, the same number of tokens by each:

    in_16_calls  nats per hidden token if they are written in 16 calls, in order spread
    more         what that is more than with the random mask, text by text, with its own error

To try a mask of your own, add it to `scores`: a number for each token. The highest half is hidden.
"""

import sys

import numpy as np
import torch
from torch import Tensor

from diffusion import draw_mask, keyed_generator, mean_and_error
from experiments.lab.command import count, flags, report, several
from experiments.lab.judge import load_writer, print_row
from experiments.lab.pictures import draw
from experiments.lab.runs import rows_of
from experiments.prices import costs
from model import Transformer
from plumbing.command import command
from plumbing.terminal import HIDDEN, harmless
from prepare_data import TokenFile


def scores(x_0: Tensor, spelled: list[str], frequency: Tensor) -> dict[str, Tensor]:
    """By the name of a mask, a score for each token of the rows x_0 (B,T).

    spelled: every token of the vocabulary as text; frequency: how often the training text has it.
    """
    position = torch.arange(x_0.size(1)).expand(x_0.shape)
    # A token continues a word if it begins with a letter: those that begin one have a space before.
    begins = torch.tensor([not text[:1].isalpha() for text in spelled])
    word = begins[x_0].long().cumsum(1)
    generator = keyed_generator(0, 0, "masks")

    def random(units: Tensor) -> Tensor:  # a number for each unit, the same at all of its tokens
        return torch.rand(x_0.shape, generator=generator).gather(1, units)

    return {
        "random": random(position),
        "every second": position % 2,
        "whole words": random(word - word[:, :1]),
        "spans of 8": random(position // 8),
        "the second half": position,
        "the first half": -position,
        "common tokens": frequency[x_0],
        "rare tokens": -frequency[x_0],
    }


def hide_half(score: Tensor) -> Tensor:
    """(B,T) bool: the half of each row with the highest scores (B,T)."""
    chosen = score.argsort(dim=1, descending=True, stable=True)[:, : score.size(1) // 2]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, chosen, True)


def price(model: Transformer, x_0: Tensor, mask: Tensor, calls: int) -> Tensor:
    """(B,) float64: nats per hidden token of writing x_0 where it is hidden, in so many calls."""
    mask_id = model.config.mask_id
    x = x_0.masked_fill(mask, mask_id)
    return costs(model, x, x_0, mask_id, order="spread", steps=calls).sum(1) / mask.sum(1)


def compare(model: Transformer, x_0: Tensor, masks: dict[str, Tensor]) -> list[dict]:
    """A row for each mask (B,T) of the texts x_0 (B,T), also printed."""
    prices: dict[str, Tensor] = {}  # (B,) each
    rows = []
    for name, mask in masks.items():
        prices[name] = price(model, x_0, mask, 16)
        nats, error = mean_and_error(prices[name])
        more, more_error = mean_and_error(prices[name] - prices["random"])
        rows.append({"hidden half": name, "in_16_calls": nats, "error": error, "more": more,
                     "more_error": more_error})
        print_row(rows[-1], heading=len(rows) == 1)
    return rows


@torch.no_grad()
def paint(axes, model: Transformer, x_0: Tensor, masks: dict[str, Tensor],
          texts: list[str]) -> None:
    """A row for each mask (T,): words where x_0 (T,) is visible, where hidden the colour of the
    probability of the true token."""
    hidden = torch.stack([*masks.values()])
    p = model(x_0.where(~hidden, model.config.mask_id)).softmax(-1)  # (n,T,V)
    p = p.gather(2, x_0.expand(len(p), -1)[..., None]).squeeze(2).masked_fill(~hidden, torch.nan)
    image = axes.imshow(p[:, : len(texts)].numpy(), aspect="auto", vmin=0, vmax=1)
    for row, t in (~hidden[:, : len(texts)]).nonzero().tolist():
        axes.text(t, row, texts[t].strip()[:9], ha="center", va="center", fontsize=7,
                  parse_math=False)
    axes.set(xlabel="position", xticks=range(len(texts)), yticks=range(len(masks)),
             yticklabels=list(masks))
    axes.figure.colorbar(image, ax=axes, label="probability of the true token", pad=0.01)


@command("experiments.masking")
def main(arguments: list[str]) -> None:
    parser = flags("masking", __doc__)
    parser.add_argument("--rows", type=several, default=64, help="texts (default: 64)")
    parser.add_argument("--width", type=count, default=20, help="tokens to show (default: 20)")
    args = parser.parse_args(arguments)
    model, tokenizer = load_writer(args.checkpoint)
    T = model.config.context_length
    x_0 = rows_of(args.data_dir, args.rows, T)
    spelled = [tokenizer.decode([i]) for i in range(tokenizer.n_vocab)]
    texts = [spelled[i].replace("\n", " ") for i in x_0[0, : args.width]]

    levels = {}
    shown = {}  # masks (T,) of the first text, to be drawn
    print(f"{'m of ' + str(T):>8}{'CE(m)':>17}   what the network sees")
    for level in range(1, 11):
        m = T * level // 10
        mask = draw_mask(torch.full((len(x_0),), m), T, 0, keyed_generator(0, m, "levels"))  # (B,T)
        levels[m], error = mean_and_error(price(model, x_0, mask, 1))
        shown[f"{level}0% hidden"] = mask[0]
        seen = (f" {HIDDEN}" if mask[0, t] else text for t, text in enumerate(texts))
        print(f"{m:8}{levels[m]:8.3f} +- {error:.3f}   {harmless(''.join(seen).strip())}")
    print()
    train = TokenFile(args.data_dir, "train")
    frequency = torch.from_numpy(np.bincount(train.tokens, minlength=len(spelled)))
    masks = {name: hide_half(score)
             for name, score in scores(x_0, spelled, frequency).items()}
    rows = compare(model, x_0, masks)
    shown |= {name: mask[0] for name, mask in masks.items()}
    draw(args.picture, lambda axes: paint(axes, model, x_0[0], shown, texts), width=13, height=6)
    report({"levels": levels, "masks": rows})


if __name__ == "__main__":
    sys.exit(main())
