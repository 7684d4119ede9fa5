"""Can a pretrained RoBERTa learn to write? python -m experiments.roberta_start

RoBERTa (arXiv:1907.11692) has learned to restore texts of which 15% are hidden. That is one mask
level; the NELBO, the mean of CE(m) over m = 1..N, needs all of them. Are its weights a good start
nevertheless?

--checkpoint names a published folder (config.json, model.safetensors, the tokenizer's files), which
the package transformers reads; nothing is downloaded. Without it a small RoBERTa is pretrained
first, on bytes at 15%, and saved as such a folder in out/experiments/ (delete it to pretrain
again). Then networks train as diffusion models, at all mask levels, from these weights and from
random ones, on the same text and masks, each from --seeds. The mean over seeds +- its error, of

    100 steps             the NELBO <= nats per token of validation text after so much training
    100 steps, 9% hidden  CE(m) after it, a point of the curve of which the NELBO is the mean height
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion import Bound, Masking, corrupt, keyed_generator, loss, mean_and_error, nelbo
from experiments.lab.command import count, flags, report
from experiments.lab.judge import mean_entropy
from experiments.lab.pictures import draw
from experiments.lab.runs import OUT, autocast
from model import rotate
from plumbing.checkpoint import CheckpointError
from plumbing.command import command
from plumbing.config import ConfigError
from plumbing.machine import choose_device, hand_over, keep_freed_memory
from prepare_data import DataError, TokenFile, get_tokenizer

try:
    import tokenizers
    import transformers
except ImportError:
    transformers = None

ROWS = 32  # of a step
LENGTH = 64  # tokens of a row
EVAL_ROWS = 256  # of validation text
SMALL = dict(hidden_size=192, num_hidden_layers=4, num_attention_heads=3, intermediate_size=768,
             max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)


class Roberta(nn.Module):
    """model(tokens) -> logits (B,T,V);  model(tokens, positions) -> (P,V), as model.Transformer: so
    `corrupt`, `loss`, `nelbo` and `generate` work on it as they are."""

    def __init__(self, network, tokenizer):
        """A RobertaForMaskedLM and its RobertaTokenizerFast, both of transformers."""
        super().__init__()
        self.network = network.eval()  # no dropout, not even in training
        self.tokenizer = tokenizer
        self.mask_id = tokenizer.mask_token_id
        words = set(range(len(tokenizer))) - set(tokenizer.all_special_ids)
        banned = sorted(set(range(network.config.vocab_size)) - words)
        self.register_buffer("banned", torch.tensor(banned))  # <s>, </s>, <mask>, spare rows ...

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """tokens: (B,T) int64, `mask_id` where hidden. positions: (P,), flat: b*T + t."""
        # RoBERTa knows only rows that begin with <s> and end with </s>. They are put around the
        # text here, and taken off again, so that nobody outside can hide or predict them.
        start = tokens.new_full((len(tokens), 1), self.tokenizer.bos_token_id)
        end = tokens.new_full((len(tokens), 1), self.tokenizer.eos_token_id)
        x = self.network.roberta(torch.cat([start, tokens, end], dim=1)).last_hidden_state
        x = x[:, 1:-1]  # (B,T,C)
        if positions is not None:
            x = x.flatten(0, 1)[positions]  # (P,C)
        return self.network.lm_head(x).index_fill(-1, self.banned, -math.inf)


def load_roberta(folder: Path) -> Roberta:
    """The network of a published folder; CheckpointError with one line if it has none, or half."""
    options = dict(local_files_only=True, use_safetensors=True, dtype=torch.float32,
                   attn_implementation="sdpa", output_loading_info=True)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config["model_type"] != "roberta" or config.get("is_decoder"):
            raise ValueError("its model_type is not roberta, or it is a decoder")
        network, found = transformers.RobertaForMaskedLM.from_pretrained(folder, **options)
        if missing := sorted(found["missing_keys"]):  # transformers has filled them with noise
            raise ValueError(f"it lacks {len(missing)} tensors, such as {missing[0]}")
        tokenizer = transformers.RobertaTokenizerFast.from_pretrained(folder, local_files_only=True)
        if not 256 < len(tokenizer) <= network.config.vocab_size:
            raise ValueError(f"its tokenizer has {len(tokenizer)} tokens")
    except Exception as error:  # the package has many of its own
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder} holds no RoBERTa: {reason:.150}") from None
    return Roberta(network, tokenizer)


@torch.no_grad()
def random_roberta(config, tokenizer, seed: int) -> Roberta:
    """From random weights, but each head looks at one neighbour: head h at a distance of h - H/2.

    RoBERTa starts from random numbers alone, and reads much text before it looks anywhere.
    """
    torch.manual_seed(seed)
    network = transformers.RobertaForMaskedLM(config)
    C = config.hidden_size
    H = config.num_attention_heads

    def waves(t: Tensor) -> Tensor:  # as model.rotary_table: to turn by waves(n) is to go n on
        # Frequencies up to pi, evenly spaced: slow waves alone make neighbours look alike.
        angle = t[:, None] * torch.arange(0, C, 2) * (math.pi / C)
        return torch.stack([angle.cos(), angle.sin()])  # (2, n, C/2)

    embeddings = network.roberta.embeddings
    embeddings.token_type_embeddings.weight.zero_()  # the same at all positions, it only blurs them
    t = torch.arange(config.max_position_embeddings)
    embeddings.position_embeddings.weight.copy_(0.06 * torch.cat([*waves(t)], dim=1))
    for layer in network.roberta.encoder.layer:
        attention = layer.attention.self
        query = nn.init.normal_(attention.query.weight, std=C**-0.5).view(H, C // H, C)
        turned = rotate(query, waves(torch.arange(H) - H // 2)[:, :, None])
        attention.key.weight.copy_(turned.flatten(0, 1))
    return Roberta(network, tokenizer)


def read_tokens(folder: str, split: str, tokenizer) -> Tensor:
    """(n,) int64: a split of a data folder in RoBERTa's tokens, an empty line after each document
    (RoBERTa has </s> there, which must not be written)."""
    file = TokenFile(folder, split)
    text = get_tokenizer(file.tokenizer, folder).decode(file.tokens.tolist())
    documents = [document + "\n\n" for document in text.split("<|endoftext|>") if document]
    encoded = tokenizer(documents, add_special_tokens=False)["input_ids"]
    tokens = torch.cat([torch.tensor(ids) for ids in encoded])
    if torch.isin(tokens, torch.tensor(tokenizer.all_special_ids)).any():
        raise DataError(f"{file.path} has special tokens of this RoBERTa in its text")
    return tokens


def train(model: Roberta, tokens: Tensor, objective: str, steps: int, rate: float,
          seed: int) -> Iterator[int]:
    """Train on random windows of `tokens` (n,); yield the number of steps done: 0, 1, 2 ...

    The windows and the masks of a step depend on the seed alone. Nothing is compiled: for runs this
    short that takes longer than it saves.
    """
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), eps=1e-6,
                                  weight_decay=0.01, fused=True)
    masking = Masking(objective, mask_ratio="bell", weighting="token")
    device = model.banned.device
    yield 0
    for step in range(1, steps + 1):
        starts = torch.randint(len(tokens) - LENGTH + 1, (ROWS,),
                               generator=keyed_generator(seed, step, "windows"))
        x_0 = tokens.unfold(0, LENGTH, 1)[starts]
        batch = corrupt(x_0, model.mask_id, masking, keyed_generator(seed, step, "mask"))
        with autocast(device.type):
            value = loss(model, hand_over(batch, device))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate * min(1.0, step / 50)  # a short warmup
        optimizer.step()
        if step % 50 == 0:
            print(f"{objective}, step {step} of {steps}: loss {value.item():.3f}", file=sys.stderr)
        yield step


def pretrained(data_dir: str, steps: int, device: torch.device) -> Path:
    """The folder of a small RoBERTa that has learned what RoBERTa learns; if need be, made now."""
    folder = OUT / f"roberta-{steps}-steps"
    if not (folder / "model.safetensors").exists():
        letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())  # of the 256 bytes
        words = ["<s>", "<pad>", "</s>", "<unk>", *letters, "<mask>"]
        tokenizer = transformers.RobertaTokenizerFast({word: i for i, word in enumerate(words)})
        config = transformers.RobertaConfig(vocab_size=len(words), **SMALL)
        model = random_roberta(config, tokenizer, seed=1).to(device)
        tokens = read_tokens(data_dir, "train", tokenizer)
        for _ in train(model, tokens, "mlm", steps, rate=3e-4, seed=0):
            pass
        tokenizer.save_pretrained(folder)
        model.network.save_pretrained(folder)
    return folder


def paint(axes, runs: dict[str, list[list[Bound]]], marks: list[int]) -> None:
    """Left the bounds by step, right the losses by mask ratio; both of the first seed."""
    curves = {"RoBERTa itself": runs["from RoBERTa"][0][0].curve}
    for start, (bounds, *_) in runs.items():
        axes[0].plot(marks, [bound.nats for bound in bounds], marker="o", label=start)
        curves[f"{start}, {marks[-1]} steps"] = bounds[-1].curve
    for label, curve in curves.items():
        axes[1].plot([m / LENGTH for m in curve.counts], curve.nats, marker=".", label=label)
    axes[0].set(xlabel="steps of diffusion training", ylabel="NELBO <=, nats per token")
    axes[1].set(xlabel="mask ratio", ylabel="CE(m), nats per hidden token")
    for axis in axes:
        axis.legend()


@command("experiments.roberta_start")
def main(arguments: list[str]) -> None:
    parser = flags("roberta_start", __doc__)
    add = parser.add_argument
    add("--pretrain-steps", type=count, default=500, help="without --checkpoint (default: 500)")
    add("--steps", type=count, default=100, help="of diffusion training (default: 100)")
    add("--seeds", type=count, nargs="+", default=[1, 2, 3], help="(default: 1 2 3)")
    parser.set_defaults(checkpoint=None)
    args = parser.parse_args(arguments)
    if transformers is None:
        raise ConfigError("a RoBERTa needs the package: pip install transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    keep_freed_memory()
    device = choose_device("auto")
    folder = Path(args.checkpoint or pretrained(args.data_dir, args.pretrain_steps, device))
    rate = 1e-4 if args.checkpoint else 3e-4
    roberta = load_roberta(folder)
    tokens = read_tokens(args.data_dir, "train", roberta.tokenizer)
    val = read_tokens(args.data_dir, "val", roberta.tokenizer)
    starts = torch.linspace(0, len(val) - LENGTH, EVAL_ROWS).long()
    x_0 = val.unfold(0, LENGTH, 1)[starts].to(device)
    marks = sorted({0, args.steps // 4, args.steps})
    runs = {"from RoBERTa": [], "from random weights": []}
    for seed in args.seeds:
        random = random_roberta(roberta.network.config, roberta.tokenizer, seed)
        for found, model in zip(runs.values(), (load_roberta(folder), random), strict=True):
            bounds = []
            for step in train(model.to(device), tokens, "diffusion", args.steps, rate, seed):
                if step in marks:
                    with autocast(device.type):
                        bounds.append(nelbo(model, x_0, model.mask_id))
            found.append(bounds)

    labels = [f"{step} steps" for step in marks] + [
        f"{args.steps} steps, {m / LENGTH:.0%} hidden" for m in bounds[-1].curve.counts]
    numbers = {start: torch.tensor([[bound.nats for bound in bounds] + bounds[-1].curve.nats
                                    for bounds in found])
               for start, found in runs.items()}  # (seeds, labels) each
    print(f"\n{'nats per token':24}" + "".join(f"{start:>24}" for start in numbers))
    for i, label in enumerate(labels):
        cells = [mean_and_error(values[:, i]) for values in numbers.values()]
        print(f"{label:24}" + "".join(f"{nats:15.3f} +- {error:.3f}" for nats, error in cells))
    frequencies = mean_entropy(tokens[None])
    print(f"{'token frequencies alone':24}{frequencies:15.3f}")
    draw(args.picture, lambda axes: paint(axes, runs, marks), columns=2)
    report({"checkpoint": str(folder), "frequencies": frequencies, "rows": labels,
            "nats": {start: values.tolist() for start, values in numbers.items()}})


if __name__ == "__main__":
    sys.exit(main())
