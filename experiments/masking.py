"""What is hidden, and what does it cost to restore? python -m experiments.masking

First a passage of validation text at ten levels of masking, as training shows it, and CE(m), what a
hidden token costs when m of N are hidden: the mean height of this curve is the NELBO. Then half of
the text is hidden, by masks of different kinds, the same number of tokens by each:

    at once      cross-entropy if all that is hidden is predicted in one call, nats per hidden token
    in 16 calls  its price if it is written in 16, in the order `spread`
    - random     that, minus what the random mask costs, text by text

To try a mask of your own, add a line to MASKS: a score for each token. The highest half is hidden.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from diffusion import Curve, draw_mask, keyed_generator, mean_and_error, row_losses
from experiments.lab.command import count, flags, report, several
from experiments.lab.pictures import draw
from experiments.lab.runs import autocast, measure_curve, rows_of
from experiments.prices import costs
from model import Transformer
from plumbing.checkpoint import load_checkpoint
from plumbing.command import command
from plumbing.config import ConfigError
from plumbing.terminal import HIDDEN, harmless
from plumbing.text import token_texts
from prepare_data import TokenFile, get_tokenizer

LEVELS = 10


class Text(NamedTuple):
    """What a mask may look at."""

    x_0: Tensor  # (B,T) the tokens
    word: Tensor  # (B,T) the number of the word that a token is part of
    frequency: Tensor  # (B,T) how often the training text has this token
    generator: Generator

    def random(self, units: Tensor) -> Tensor:
        """(B,T): a random number for each unit of a row, the same at all of its tokens."""
        return torch.rand(self.x_0.shape, generator=self.generator).gather(1, units)


def position(text: Text) -> Tensor:
    return torch.arange(text.x_0.size(1)).expand(text.x_0.shape)


MASKS: dict[str, Callable[[Text], Tensor]] = {  # by its name, the score of each token, (B,T)
    "random": lambda text: text.random(position(text)),
    "every second": lambda text: position(text) % 2,
    "whole words": lambda text: text.random(text.word),
    "spans of 8": lambda text: text.random(position(text) // 8),
    "the second half": position,
    "the first half": lambda text: -position(text),
    "common tokens": lambda text: text.frequency,
    "rare tokens": lambda text: -text.frequency,
}


def look_at(x_0: Tensor, train: TokenFile, folder: str) -> Text:
    """What there is to know about the rows (B,T), for the masks."""
    tokenizer = get_tokenizer(train.tokenizer, folder)
    spelled = [tokenizer.decode([i]) for i in range(tokenizer.n_vocab)]
    # A token continues a word if it begins with a letter: those that begin one have a space before.
    begins = torch.tensor([not text[:1].isalpha() for text in spelled])
    word = begins[x_0].long().cumsum(1)
    frequency = torch.from_numpy(np.bincount(train.tokens, minlength=tokenizer.n_vocab))[x_0]
    return Text(x_0, word - word[:, :1], frequency, keyed_generator(0, 0, "masks"))


def hide_half(score: Tensor) -> Tensor:
    """(B,T) bool: the half of each row with the highest scores (B,T)."""
    chosen = score.argsort(dim=1, descending=True, stable=True)[:, : score.size(1) // 2]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, chosen, True)


def price(model: Transformer, x_0: Tensor, mask: Tensor, steps: int) -> Tensor:
    """(B,) float64: nats per hidden token of writing x_0 where it is hidden, in `steps` calls."""
    mask_id = model.config.mask_id
    x = x_0.masked_fill(mask, mask_id)
    return costs(model, x, x_0, mask_id, order="spread", steps=steps).sum(1) / mask.sum(1)


def compare(model: Transformer, text: Text) -> tuple[list[dict], dict[str, Tensor]]:
    """(a row for each of the MASKS, also printed; the masks)."""
    masks = {name: hide_half(score(text)) for name, score in MASKS.items()}
    print(f"\n{'hidden half':18}{'at once':>10}{'in 16 calls':>22}{'- random':>20}")
    rows = []
    prices = {}
    for name, mask in masks.items():
        x_t = text.x_0.masked_fill(mask, model.config.mask_id)
        with autocast():
            once = row_losses(model, x_t, text.x_0, mask).mean().item()
            prices[name] = price(model, text.x_0, mask, 16)
        nats, error = mean_and_error(prices[name])
        more, more_error = mean_and_error(prices[name] - prices["random"])
        print(f"{name:18}{once:10.3f}{nats:12.3f} +- {error:.3f}{more:+11.3f} +- {more_error:.3f}",
              flush=True)
        rows.append({"mask": name, "at_once": once, "in_16_calls": nats, "error": error,
                     "more": more, "more_error": more_error})
    return rows, masks


@torch.no_grad()
def paint_grid(axes, model: Transformer, x_0: Tensor, masks: dict[str, Tensor],
               texts: list[str], title: str) -> None:
    """A row for each mask (T,): words where x_0 (T,) is visible, where hidden the colour of the
    probability of the true token."""
    hidden = torch.stack([*masks.values()])
    p = model(x_0.where(~hidden, model.config.mask_id)).softmax(-1)  # (n,T,V)
    p = p.gather(2, x_0.expand(len(p), -1)[..., None]).squeeze(2).masked_fill(~hidden, torch.nan)
    image = axes.imshow(p[:, : len(texts)].numpy(), aspect="auto", vmin=0, vmax=1)
    for row, t in (~hidden[:, : len(texts)]).nonzero().tolist():
        axes.text(t, row, texts[t].strip()[:9], ha="center", va="center", fontsize=7,
                  parse_math=False)
    axes.set(title=title, xlabel="position", yticks=range(len(masks)), yticklabels=list(masks))
    axes.figure.colorbar(image, ax=axes, label="probability of the true token", pad=0.01)


def paint_costs(axes, curve: Curve, rows: list[dict]) -> None:
    axes.errorbar([m / curve.N for m in curve.counts], curve.nats, curve.stderr, marker=".",
                  label="CE(m), random masks")
    for row in rows[1:]:
        axes.plot(0.5, row["at_once"], "o", label=f"half hidden: {row['mask']}")
    axes.set(title="What a hidden token costs, all predicted at once", xlabel="mask ratio",
             ylabel="nats per hidden token")
    axes.legend(ncols=2)


@command("experiments.masking")
def main(arguments: list[str]) -> None:
    parser = flags("masking", __doc__)
    add = parser.add_argument
    add("--rows", type=several, default=64, help="texts to measure on (default: 64)")
    add("--width", type=count, default=20, help="tokens to show of the first (default: 20)")
    args = parser.parse_args(arguments)
    model, info = load_checkpoint(args.checkpoint)
    if model.config.causal:
        raise ConfigError(f"{args.checkpoint} is autoregressive: it never sees hidden text")
    T = model.config.context_length
    x_0 = rows_of(args.data_dir, args.rows, T)
    tokenizer = get_tokenizer(info["tokenizer"], args.checkpoint)
    texts = token_texts(x_0[0, : args.width].tolist(), tokenizer, model.config.mask_id, whole=True)
    texts = [text.replace("\n", " ") for text in texts]

    def show(mask: Tensor) -> str:
        shown = (f" {HIDDEN}" if hidden else text
                 for hidden, text in zip(mask.tolist(), texts, strict=False))
        return harmless("".join(shown).strip())

    with autocast():
        curve = measure_curve(model, x_0, model.config.mask_id, LEVELS, "CE by level")
    ce = dict(zip(curve.counts, zip(curve.nats, curve.stderr, strict=True), strict=True))
    m = (torch.arange(1, LEVELS + 1) * T / LEVELS).round().long()
    levels = draw_mask(m, T, generator=keyed_generator(0, 0, "levels"))
    print(f"\n{'m of ' + str(T):>8}{'CE(m)':>17}   what the network sees")
    for number, mask in zip(m.tolist(), levels, strict=True):
        print("{:8}{:8.3f} +- {:.3f}   {}".format(number, *ce[number], show(mask)))
    rows, masks = compare(model, look_at(x_0, TokenFile(args.data_dir, "train"), args.data_dir))
    print()
    for name, mask in masks.items():
        print(f"{name:18}{show(mask[0])}")

    def paint(panels) -> None:
        by_level = {f"{number} hidden": mask for number, mask in zip(m.tolist(), levels,
                                                                   strict=True)}
        paint_grid(panels[0], model, x_0[0], by_level, texts, f"Ten levels, of {T} tokens")
        half = {name: mask[0] for name, mask in masks.items()}
        paint_grid(panels[1], model, x_0[0], half, texts, "Half hidden, by different masks")
        paint_costs(panels[2], curve, rows)

    draw(args.picture, paint, rows=3, width=13, height=3.6)
    report({"levels": dict(zip(curve.counts, curve.nats, strict=True)), "masks": rows})


if __name__ == "__main__":
    sys.exit(main())
