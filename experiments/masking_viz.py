"""What does the model see? python -m experiments.masking_viz

One validation text at ten levels of masking, as training shows it, without and with a preserved
prefix: at level k of 10 exactly m = round(k N / 10) of the N positions after the prefix are hidden,
at random; the prefix never is. Then, level by level,

    CE(m)       what the model loses there, in nats per hidden token: mean and standard error over
                --rows texts. The mean height of this curve over all m = 1..N is the NELBO
    linear ...  a sampler of --steps steps: how many of its calls find between (k-1)/10 and k/10
                hidden

The picture shows the same text: letters are visible, colours say how probable the model finds a
hidden one.
"""

import os
import sys

import torch
from torch import Tensor

from diffusion import SCHEDULES, Curve, draw_mask, hidden_counts, keyed_generator
from experiments.lab.command import answer, count, flags, several
from experiments.lab.pictures import draw
from experiments.lab.runs import measure_curve
from model import Transformer
from plumbing.checkpoint import load_checkpoint
from plumbing.command import command
from plumbing.config import ConfigError
from plumbing.terminal import HIDDEN
from plumbing.text import token_texts
from prepare_data import TokenFile, get_tokenizer

LEVELS = 10


def mask_levels(T: int, prefix_length: int) -> tuple[Tensor, Tensor]:
    """(m (10,), mask (10,T)): how many positions each level hides, and which; no prefix."""
    N = T - prefix_length
    m = (torch.arange(1, LEVELS + 1) * N / LEVELS).round().long()
    return m, draw_mask(m, T, prefix_length, keyed_generator(0, 0, "masking_viz"))


def calls_by_level(schedule: str, N: int, steps: int) -> list[int]:
    """How many of a sampler's calls see as much hidden as level k, or less but more than k-1."""
    counts = hidden_counts(schedule, torch.tensor([N]), steps)[:-1, 0]  # before each call
    return torch.searchsorted(mask_levels(N, 0)[0], counts).bincount(minlength=LEVELS).tolist()


@torch.no_grad()
def belief(model: Transformer, x_0: Tensor, mask: Tensor) -> Tensor:
    """(10,T): the probability of the true token where hidden, NaN where visible.

    x_0 (T,), mask (10,T).
    """
    p = model(x_0.where(~mask, model.config.mask_id)).softmax(-1)  # (10,T,V)
    truth = x_0.expand(len(mask), -1)[..., None]
    return p.gather(2, truth).squeeze(2).masked_fill(~mask, torch.nan)


def paint_grid(axes, p: Tensor, texts: list[str], m: Tensor, title: str) -> None:
    """Level x position: a letter where visible, a colour where hidden."""
    image = axes.imshow(p.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1,
                        interpolation="nearest")
    for k, t in p.isnan().nonzero().tolist():
        axes.text(t, k, texts[t], ha="center", va="center", fontsize=8, family="monospace",
                  parse_math=False)
    labels = [f"{k + 1}0%: {number}" for k, number in enumerate(m.tolist())]
    axes.set(title=title, xlabel="position", ylabel="hidden", yticks=range(LEVELS),
             yticklabels=labels)
    axes.figure.colorbar(image, ax=axes, label="probability of the true token", pad=0.01)


def paint_curve(axes, curve: Curve, steps: int) -> None:
    """CE by level, and the levels at which each schedule's sampler calls the model."""
    N = curve.N
    axes.errorbar([m / N for m in curve.counts], curve.nats, curve.stderr, color="black",
                  marker=".", label="CE(m) +- standard error")
    for i, schedule in enumerate(SCHEDULES):
        ratios = hidden_counts(schedule, torch.tensor([N]), steps)[:-1, 0] / N
        axes.plot(ratios, [-0.2 - 0.25 * i] * len(ratios), "|", markersize=10,
                  label=f"{steps} calls, {schedule}")
    axes.set(title="What it knows at each level, and where samplers call it", xlabel="mask ratio",
             ylabel="nats per hidden token", yticks=range(4))
    axes.legend(loc="upper left")  # the curve rises to the right


@command("experiments.masking_viz")
def main(arguments: list[str]) -> None:
    parser = flags("masking_viz", __doc__)
    add = parser.add_argument
    add("--rows", type=several, default=64, help="texts to measure CE on (default: 64)")
    add("--width", type=count, default=64, help="positions to show (default: 64)")
    add("--prefix-length", type=int, default=16, help="positions preserved (default: 16)")
    add("--steps", type=count, default=20, help="of the sampler (default: 20)")
    args = parser.parse_args(arguments)
    model, info = load_checkpoint(args.checkpoint)
    if model.config.causal:
        raise ConfigError(f"{args.checkpoint} is autoregressive: it never sees hidden text")
    T = model.config.context_length
    mask_id = model.config.mask_id
    tokenizer = get_tokenizer(info["tokenizer"], args.checkpoint)
    if not 0 <= args.prefix_length <= T - LEVELS:
        parser.error(f"--prefix-length must be in 0..{T - LEVELS}, not {args.prefix_length}")
    x_0 = torch.from_numpy(TokenFile(args.data_dir, "val").spread(args.rows, T))

    def spell(tokens: Tensor) -> list[str]:
        """What stands at each of the first positions, on one line; a block where hidden."""
        texts = token_texts(tokens[: args.width].tolist(), tokenizer, mask_id, whole=True)
        return [HIDDEN if text is None else text.replace("\n", " ") for text in texts]

    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    views = {"no prefix": mask_levels(T, 0)}
    if args.prefix_length:
        title = f"a prefix of {args.prefix_length} preserved"
        views[title] = mask_levels(T, args.prefix_length)
    for title, (m, mask) in views.items():
        print(f"\n{title}\nlevel  hidden  what the model sees, the first positions of {T}")
        for k in range(LEVELS):
            text = "".join(spell(x_0[0].where(~mask[k], mask_id)))
            text = text.replace(HIDDEN, f"\033[36m{HIDDEN}\033[0m") if color else text
            print(f"{(k + 1) / LEVELS:5.0%}  {m[k]:6}  {text}")

    curve = measure_curve(model, x_0, mask_id, LEVELS, "CE by level")
    calls = {schedule: calls_by_level(schedule, T, args.steps) for schedule in SCHEDULES}
    ce = {m: (nats, error) for m, nats, error in zip(*curve[1:], strict=True)}
    rows = []
    print(f"\n{'':30}calls of {args.steps} steps\nlevel  hidden     CE(m)         "
          + "".join(f"{name:>12}" for name in SCHEDULES))
    for k, m in enumerate(mask_levels(T, 0)[0].tolist()):
        nats, error = ce[m]
        by_schedule = {name: calls[name][k] for name in SCHEDULES}
        level = (k + 1) / LEVELS
        rows.append({"level": level, "hidden": m, "nats": nats, "error": error} | by_schedule)
        print(f"{level:5.0%}  {m:6}  {nats:.3f} +- {error:.3f}"
              + "".join(f"{number:12}" for number in by_schedule.values()))

    def paint(panels) -> None:
        for axes, (title, (m, mask)) in zip(panels, views.items(), strict=False):
            p = belief(model, x_0[0], mask)[:, : args.width]
            paint_grid(axes, p, spell(x_0[0]), m, title)
        paint_curve(panels[-1], curve, args.steps)

    draw(args.picture, paint, rows=len(views) + 1, width=13, height=3.4)
    missed = [name for name in SCHEDULES if 0 in calls[name]]
    passes = (f"misses some levels ({', '.join(missed)})" if missed
              else "passes through all ten levels")
    answer(f"a hidden token costs {rows[0]['nats']:.2f} nats when {rows[0]['level']:.0%} are "
           f"hidden and {rows[-1]['nats']:.2f} when all are, where a text written from nothing "
           f"begins. A sampler of {args.steps} steps {passes}: a model trained at one of them "
           "has not learned the others.",
           {"T": T, "levels": rows,
            "hidden": {title: m.tolist() for title, (m, _) in views.items()}})


if __name__ == "__main__":
    sys.exit(main())
