"""What does the model see? python -m experiments.masking_viz

One validation text at ten levels of masking, as training shows it, without and with a preserved prefix: at
level k of 10 exactly m = round(k N / 10) of the N places after the prefix are hidden, at random; the prefix
never is. Then, level by level,

    CE(m)       what the model loses there, in nats per hidden token: mean and standard error over --rows
                texts. The mean height of this curve over all m = 1..N is the bound on -log p, the NELBO
    linear ...  a sampler of --steps steps: how many of its calls find between (k-1)/10 and k/10 hidden

The picture shows the same text: letters are visible, colours say how probable the model finds a hidden one.
"""

import os
import sys

import torch
from torch import Tensor

from configs import ConfigError
from diffusion import SCHEDULES, Curve, draw_mask, hidden_counts, keyed_generator
from experiments import lab
from experiments.schedules import measure
from model import Transformer, load_checkpoint
from prepare_data import TokenFile, get_tokenizer
from sample import HIDDEN, token_texts

LEVELS = 10


def mask_levels(T: int, prefix_length: int) -> tuple[Tensor, Tensor]:
    """(m (10,), mask (10,T)): how many places each level hides, and which; never one of the prefix."""
    N = T - prefix_length
    m = (torch.arange(1, LEVELS + 1) * N / LEVELS).round().long()
    return m, draw_mask(m, T, prefix_length, keyed_generator(0, 0, "masking_viz"))


def calls_by_level(schedule: str, N: int, steps: int) -> list[int]:
    """How many of a sampler's calls see as much hidden as level k, or less but more than level k-1."""
    counts = hidden_counts(schedule, torch.tensor([N]), steps)[:-1, 0]  # before each call
    return torch.searchsorted(mask_levels(N, 0)[0], counts).bincount(minlength=LEVELS).tolist()


@torch.no_grad()
def belief(model: Transformer, x_0: Tensor, mask: Tensor) -> Tensor:
    """(10,T): the probability of the true token where hidden, NaN where visible; x_0 (T,), mask (10,T)."""
    p = model(x_0.where(~mask, model.config.mask_id)).softmax(-1)  # (10,T,V)
    return p.gather(2, x_0.expand(len(mask), -1)[..., None]).squeeze(2).masked_fill(~mask, torch.nan)


def paint_grid(axes, p: Tensor, texts: list[str], m: Tensor, title: str) -> None:
    """Level x place: a letter where visible, a colour where hidden."""
    image = axes.imshow(p.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    for k, place in p.isnan().nonzero().tolist():
        axes.text(place, k, texts[place], ha="center", va="center", fontsize=8, family="monospace",
                  parse_math=False)
    axes.set(title=title, xlabel="place", ylabel="hidden",
             yticks=range(LEVELS), yticklabels=[f"{k + 1}0%: {count}" for k, count in enumerate(m.tolist())])
    axes.figure.colorbar(image, ax=axes, label="probability of the true token", pad=0.01)


def paint_curve(axes, curve: Curve, steps: int) -> None:
    """CE by level, and the levels at which each schedule's sampler calls the model."""
    N = curve.N
    axes.errorbar([m / N for m in curve.counts], curve.nats, curve.stderr, color="black", marker=".",
                  label="CE(m) +- standard error")
    for i, schedule in enumerate(SCHEDULES):
        share = hidden_counts(schedule, torch.tensor([N]), steps)[:-1, 0] / N
        axes.plot(share, [-0.2 - 0.25 * i] * len(share), "|", markersize=10,
                  label=f"{steps} calls, {schedule}")
    axes.set(title="What it knows at each level, and where samplers call it", xlabel="share hidden",
             ylabel="nats per hidden token", yticks=range(4))
    axes.legend(loc="upper left")  # the curve rises to the right


@lab.command
def main(arguments: list[str] | None = None) -> None:
    parser = lab.flags("masking_viz", __doc__)
    parser.add_argument("--rows", type=lab.several, default=64, help="texts to measure CE on (default: 64)")
    parser.add_argument("--width", type=lab.count, default=64, help="places to show (default: 64)")
    parser.add_argument("--prefix-length", type=int, default=16, help="places preserved (default: 16)")
    parser.add_argument("--steps", type=lab.count, default=20, help="of the sampler (default: 20)")
    args = parser.parse_args(arguments)
    model, info = load_checkpoint(args.checkpoint)
    if model.config.causal:
        raise ConfigError(f"{args.checkpoint} is autoregressive: it never sees hidden text")
    T, mask_id = model.config.context_length, model.config.mask_id
    tokenizer = get_tokenizer(info["tokenizer"])
    if not 0 <= args.prefix_length <= T - LEVELS:
        parser.error(f"--prefix-length must be in 0..{T - LEVELS}, not {args.prefix_length}")
    x_0 = torch.from_numpy(TokenFile(args.data_dir, "val").spread(args.rows, T))

    def spell(tokens: Tensor) -> list[str]:
        """What stands at each of the first places, on one line; a block where hidden."""
        texts = token_texts(tokens[: args.width].tolist(), tokenizer, mask_id, whole=True)
        return [HIDDEN if text is None else text.replace("\n", " ") for text in texts]

    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    views = {f"a prefix of {length} preserved" if length else "no prefix": mask_levels(T, length)
             for length in (0, args.prefix_length)}
    for title, (m, mask) in views.items():
        print(f"\n{title}\nlevel  hidden  what the model sees, the first places of {T}")
        for k in range(LEVELS):
            text = "".join(spell(x_0[0].where(~mask[k], mask_id)))
            text = text.replace(HIDDEN, f"\033[36m{HIDDEN}\033[0m") if color else text
            print(f"{(k + 1) / LEVELS:5.0%}  {m[k]:6}  {text}")

    curve = measure(model, x_0, LEVELS, "CE by level")
    calls = {schedule: calls_by_level(schedule, T, args.steps) for schedule in SCHEDULES}
    ce = {m: (nats, error) for m, nats, error in zip(*curve[1:], strict=True)}
    rows = []
    print(f"\n{'':30}calls of {args.steps} steps\nlevel  hidden     CE(m)         "
          + "".join(f"{name:>12}" for name in SCHEDULES))
    for k, m in enumerate(mask_levels(T, 0)[0].tolist()):
        (nats, error), by_schedule = ce[m], {name: calls[name][k] for name in SCHEDULES}
        rows.append({"level": (k + 1) / LEVELS, "hidden": m, "nats": nats, "error": error} | by_schedule)
        print(f"{(k + 1) / LEVELS:5.0%}  {m:6}  {nats:.3f} +- {error:.3f}"
              + "".join(f"{number:12}" for number in by_schedule.values()))

    def paint(panels) -> None:
        for axes, (title, (m, mask)) in zip(panels, views.items(), strict=False):
            paint_grid(axes, belief(model, x_0[0], mask)[:, : args.width], spell(x_0[0]), m, title)
        paint_curve(panels[-1], curve, args.steps)

    lab.draw(args.picture, paint, rows=len(views) + 1, width=13, height=3.4)
    missed = [name for name in SCHEDULES if 0 in calls[name]]
    passes = f"misses some levels ({', '.join(missed)})" if missed else "passes through all ten levels"
    lab.answer(
        f"a hidden token costs {rows[0]['nats']:.2f} nats when {rows[0]['level']:.0%} are hidden and "
        f"{rows[-1]['nats']:.2f} when all are, where a text written from nothing begins. A sampler of "
        f"{args.steps} steps {passes}: a model trained at one of them is asked what it never learned.",
        {"T": T, "levels": rows, "hidden": {title: m.tolist() for title, (m, _) in views.items()}})


if __name__ == "__main__":
    sys.exit(main())
