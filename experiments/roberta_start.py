"""Can a pretrained RoBERTa learn to write? python -m experiments.roberta_start

RoBERTa (arXiv:1907.11692) has learned to restore texts of which 15% are hidden. That is one mask
level; the NELBO, the mean of CE(m) over m = 1..N, needs all of them. Are its weights a good start
nevertheless?

Here is the network, by hand, as one more model(tokens, positions): `corrupt`, `loss`, `nelbo` and
`generate` work on it as they are. It reads a published folder (--checkpoint: model.safetensors,
config.json, vocab.json, merges.txt). Without --checkpoint a small one is pretrained first, on bytes
at 15%, and saved as such a folder in out/experiments/ (delete it to pretrain again). Then networks
train as diffusion models, at all mask levels, from these weights and from random ones, on the same
text and masks, each from --seeds:

    step           of diffusion training
    pretrained     NELBO <= nats per token on validation text, mean and standard error over seeds
    - random       that, minus what the network from random weights has after as many steps
    loss by mask ratio: CE(m), the curve of which the NELBO is the mean height
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from diffusion import Bound, Masking, corrupt, keyed_generator, loss, mean_and_error, nelbo
from experiments.lab.command import count, flags, report, several
from experiments.lab.pictures import draw
from experiments.lab.runs import OUT, autocast
from model import rotate
from plumbing.checkpoint import CheckpointError
from plumbing.command import command
from plumbing.config import ConfigError
from plumbing.machine import choose_device, count_parameters, hand_over, keep_freed_memory
from prepare_data import DataError, TokenFile, get_tokenizer
from sample import generate

# --- The network ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RobertaConfig:
    """The shape, under the names of config.json."""

    vocab_size: int  # 50265 in roberta-base: all rows of its table, those of the special tokens too
    hidden_size: int  # 768: C
    num_hidden_layers: int  # 12
    num_attention_heads: int  # 12: H
    intermediate_size: int  # 3072: channels inside the MLP
    max_position_embeddings: int  # 514, but counted from pad_token_id + 1 on
    type_vocab_size: int  # 1: what is left of BERT's first and second sentence
    pad_token_id: int  # 1
    layer_norm_eps: float  # 1e-5

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            least = 1 if field.type is int and field.name != "pad_token_id" else 0
            if type(value) is not field.type or value < least:
                raise ValueError(f"{field.name} cannot be {value!r}")
        if self.hidden_size % (2 * self.num_attention_heads) or self.context_length < 1:
            raise ValueError("hidden_size is no multiple of 2 * num_attention_heads, or "
                             "max_position_embeddings too few")

    @property
    def context_length(self) -> int:
        """The longest text, in tokens: <s> and </s> take a position each."""
        return self.max_position_embeddings - (self.pad_token_id + 1) - 2


class Block(nn.Module):
    """Post-norm: LayerNorm follows each sum; in model.py and GPT-2 it starts each branch."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        C = config.hidden_size
        eps = config.layer_norm_eps
        self.n_head = config.num_attention_heads
        self.query = nn.Linear(C, C)
        self.key = nn.Linear(C, C)
        self.value = nn.Linear(C, C)
        self.proj = nn.Linear(C, C)
        self.attention_norm = nn.LayerNorm(C, eps)
        self.up = nn.Linear(C, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, C)
        self.mlp_norm = nn.LayerNorm(C, eps)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (layer(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B,H,T,D)
                   for layer in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, C)
        x = self.attention_norm(x + self.proj(y))
        return self.mlp_norm(x + self.down(F.gelu(self.up(x))))


class Roberta(nn.Module):
    """model(tokens) -> logits (B,T,V);  model(tokens, positions) -> (P,V), as model.Transformer.

    The rows of its table are V real tokens, then the mask token V, <s> V+1, </s> V+2 and what is
    never used. So the mask token is an input without an output, and no special token can be
    written. RoBERTa knows only rows that begin with <s> and end with </s>: they are put around the
    text here, and taken off again, so that nobody outside can hide or predict them.
    """

    def __init__(self, config: RobertaConfig, vocab_size: int):
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.mask_id = vocab_size
        C = config.hidden_size
        eps = config.layer_norm_eps
        self.embedding = nn.Embedding(config.vocab_size, C)
        self.position = nn.Embedding(config.max_position_embeddings, C)
        self.sentence = nn.Embedding(config.type_vocab_size, C)
        self.norm = nn.LayerNorm(C, eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(C, C)
        self.head_norm = nn.LayerNorm(C, eps)
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Each head starts by looking at one neighbour: head h at a distance of h - H/2.

        RoBERTa starts from random numbers alone, and reads much text before it looks anywhere.
        """
        C = self.config.hidden_size
        H = self.config.num_attention_heads

        def waves(t: Tensor) -> Tensor:  # as model.rotary_table: to turn by waves(n) is to go n on
            # Frequencies up to pi, evenly spaced: slow waves alone make neighbours look alike.
            angle = t[:, None] * torch.arange(0, C, 2) * (math.pi / C)
            return torch.stack([angle.cos(), angle.sin()])  # (2, n, C/2)

        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.zeros_(self.sentence.weight)
        t = torch.arange(self.config.max_position_embeddings)
        self.position.weight.copy_(0.06 * torch.cat([*waves(t)], dim=1))
        for block in self.blocks:
            query = block.query.weight.view(H, C // H, C)
            turned = rotate(query, waves(torch.arange(H) - H // 2)[:, :, None])
            block.key.weight.copy_(turned.flatten(0, 1))

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """tokens: (B,T) int64, `mask_id` where hidden. positions: (P,), flat: b*T + t."""
        T = tokens.size(1)
        V = self.vocab_size
        if T > self.config.context_length:
            raise ValueError(f"{T} tokens are more than the context length "
                             f"{self.config.context_length}")
        tokens = F.pad(F.pad(tokens, (1, 0), value=V + 1), (0, 1), value=V + 2)  # <s> text </s>
        t = torch.arange(T + 2, device=tokens.device) + self.config.pad_token_id + 1
        x = self.norm(self.embedding(tokens) + self.position(t) + self.sentence.weight[0])
        for block in self.blocks:
            x = block(x)
        x = x[:, 1:-1]  # (B,T,C)
        if positions is not None:
            x = x.flatten(0, 1)[positions]  # (P,C)
        x = self.head_norm(F.gelu(self.head(x)))
        return F.linear(x, self.embedding.weight[:V], self.head_bias[:V])


# --- A published folder ---------------------------------------------------------------------------

# What this file calls a part of the network: what checkpoints call it.
PUBLISHED = {
    "embedding": "roberta.embeddings.word_embeddings",
    "position": "roberta.embeddings.position_embeddings",
    "sentence": "roberta.embeddings.token_type_embeddings",
    "norm": "roberta.embeddings.LayerNorm",
    "blocks": "roberta.encoder.layer",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "proj": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
    "head": "lm_head.dense",
    "head_norm": "lm_head.layer_norm",
    "head_bias": "lm_head.bias",
}
# The tensors with a row for each token: the name of the copy that some checkpoints have of them.
TABLES = {"embedding.weight": "lm_head.decoder.weight", "head_bias": "lm_head.decoder.bias"}


def published(name: str) -> str:
    """blocks.3.query.weight -> roberta.encoder.layer.3.attention.self.query.weight"""
    return ".".join(PUBLISHED.get(part, part) for part in name.split("."))


def alphabet() -> dict[str, int]:
    """{letter: byte}: how vocab.json spells the 256 bytes, in the order of their ranks.

    Bytes that print in Latin-1 stand for themselves, the others are spelled with the letters from
    256 on: a space is \u0120, a line end \u010a.
    """
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printing]
    letters = {chr(byte): byte for byte in printing}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


# How GPT-2 and RoBERTa cut a text into words, inside of which bytes are then merged.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def read_tokenizer(folder: Path, vocab_size: int) -> tuple[tiktoken.Encoding, Tensor]:
    """(encoding, rows): the BPE of vocab.json and merges.txt, and RoBERTa's ids of our tokens.

    To tiktoken an id is also the priority of a merge, while RoBERTa numbers its tokens by
    frequency. So texts keep tiktoken's ids, the 256 bytes and then the merges in order (GPT-2's
    ids, if it is GPT-2's BPE), and the table is brought into this order when it is read: our row i
    is RoBERTa's row rows[i], rows (vocab_size,).
    """
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    letters = alphabet()
    merges = [line.replace(" ", "") for line in lines if line and not line.startswith("#version")]
    words = [*letters, *merges]
    ranks = {bytes(letters[letter] for letter in word): i for i, word in enumerate(words)}
    used = [vocab[word] for word in (*words, "<mask>", "<s>", "</s>")]
    rows = used + sorted(set(range(vocab_size)) - set(used))
    if len(ranks) < len(words) or sorted(rows) != list(range(vocab_size)):
        raise ValueError("two tokens share a spelling or an id, or an id is outside the table")
    encoding = tiktoken.Encoding("roberta", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
    return encoding, torch.tensor(rows)


def read_config(path: Path) -> RobertaConfig:
    """The shape in a config.json; ValueError or KeyError if it is of another network."""
    required = {"model_type": "roberta", "hidden_act": "gelu"}
    usual = {"is_decoder": False, "position_embedding_type": "absolute",
             "tie_word_embeddings": True}
    content = json.loads(path.read_text(encoding="utf-8"))
    for name, value in (required | usual).items():
        if (found := content.get(name, usual.get(name))) != value:
            raise ValueError(f"{name} is {found!r}, not {value!r}")
    return RobertaConfig(**{field.name: content[field.name] for field in fields(RobertaConfig)})


def safetensors():
    """The package's part for PyTorch, or one line on how to get it."""
    try:
        import safetensors.torch
    except ImportError:
        raise CheckpointError("a RoBERTa needs the package: pip install safetensors") from None
    return safetensors.torch


def load_roberta(folder: Path) -> tuple[Roberta, tiktoken.Encoding]:
    """The network of a published folder, in float32, and the encoding of its texts.

    What the file has beyond it, such as a pooler, is named on stderr. CheckpointError with one line
    where something is missing, damaged or of another shape than config.json says.
    """
    path = folder / "model.safetensors"
    try:
        config = read_config(folder / "config.json")
        encoding, rows = read_tokenizer(folder, config.vocab_size)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}; a RoBERTa's folder has config."
                              "json, model.safetensors, vocab.json, merges.txt") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder} holds no RoBERTa: {error!r:.150}") from None
    load_file = safetensors().load_file
    try:
        tensors = load_file(path)
    except Exception as error:  # the package has an exception of its own
        raise CheckpointError(f"{path} is missing or damaged: {error!r:.150}") from None
    if config.num_hidden_layers > len(tensors):
        raise CheckpointError(f"{path}: {len(tensors)} tensors are no {config.num_hidden_layers} "
                              "layers")
    with torch.device("meta"):  # no memory and no time for random weights
        model = Roberta(config, encoding.n_vocab)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if missing := [published(name) for name in shapes if published(name) not in tensors]:
        raise CheckpointError(f"{path} is no RoBERTa with its head: it lacks {len(missing)} of its "
                              f"{len(shapes)} tensors, such as {missing[-1]}")
    state = {name: tensors.pop(published(name)) for name in shapes}
    for name, tensor in state.items():
        if tuple(tensor.shape) != shapes[name]:
            raise CheckpointError(f"{path}: {published(name)} is {tuple(tensor.shape)}; by "
                                  f"config.json it is {shapes[name]}")
    for name, copy in TABLES.items():
        if not torch.equal(tensors.pop(copy, state[name]), state[name]):
            raise CheckpointError(f"{path}: {copy} is not {published(name)}; in a RoBERTa they are "
                                  "one")
        state[name] = state[name][rows]
    if tensors:
        print(f"note: {path} also has {', '.join(sorted(tensors))}; not used", file=sys.stderr)
    model.load_state_dict(state, assign=True)
    return model.float(), encoding


def save_roberta(model: Roberta, rows: Tensor, folder: Path) -> None:
    """Write model.safetensors and config.json, in RoBERTa's names and by `rows` in its order."""
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    state |= {name: state[name][rows.argsort()] for name in TABLES}
    state = {published(name): tensor.contiguous() for name, tensor in state.items()}
    safetensors().save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"],
              "hidden_act": "gelu"}
    (folder / "config.json").write_text(json.dumps(config | asdict(model.config), indent=2) + "\n")


# --- Training and measuring -----------------------------------------------------------------------


def read_tokens(folder: str, split: str, encoding: tiktoken.Encoding, length: int) -> Tensor:
    """(n,) int64: a split of a data folder in this encoding, empty lines between its documents.

    (RoBERTa separates them by </s>, which must not be written.)
    """
    file = TokenFile(folder, split)
    text = get_tokenizer(file.tokenizer, folder).decode(file.tokens.tolist())
    tokens = torch.tensor(encoding.encode_ordinary(text.replace("<|endoftext|>", "\n\n")))
    if len(tokens) < length:
        raise DataError(f"{file.path} has {len(tokens)} tokens, fewer than one row of {length}")
    return tokens


def train(model: Roberta, tokens: Tensor, objective: str, steps: int, args: argparse.Namespace,
          seed: int) -> Iterator[int]:
    """Train on random windows of `tokens` (n,); yield the number of each step when it is done.

    AdamW with RoBERTa's betas, a short warmup and then a constant rate. The windows and the masks
    of a step depend on the seed alone. Nothing is compiled: for runs this short that takes longer
    than it saves.
    """
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), eps=1e-6,
                                  weight_decay=0.01, fused=True)
    masking = Masking(objective, mask_ratio="bell", weighting="token")
    device = model.head_bias.device
    for step in range(1, steps + 1):
        starts = torch.randint(len(tokens) - args.length + 1, (args.rows,),
                               generator=keyed_generator(seed, step, "windows"))
        x_0 = tokens.unfold(0, args.length, 1)[starts]
        batch = corrupt(x_0, model.mask_id, masking, keyed_generator(seed, step, "mask"))
        with autocast(device.type):
            value = loss(model, hand_over(batch, device))
        if not value.isfinite():
            raise ConfigError(f"the loss of step {step} is {value.item()}: choose a lower "
                              "--learning-rate")
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(1.0, step / 50)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"{objective}, step {step} of {steps}: loss {value.item():.3f}", file=sys.stderr)
        yield step


SMALL = RobertaConfig(vocab_size=261, hidden_size=192, num_hidden_layers=4, num_attention_heads=3,
                      intermediate_size=768, max_position_embeddings=514, type_vocab_size=1,
                      pad_token_id=1, layer_norm_eps=1e-5)  # 256 bytes and 5 special tokens


def pretrained(args: argparse.Namespace, device: torch.device) -> Path:
    """The folder of a small RoBERTa that has learned what RoBERTa learns; if need be, made now."""
    folder = OUT / f"roberta-{args.pretrain_steps}-steps"
    if not folder.exists():
        part = folder.with_name(folder.name + ".part")
        part.mkdir(parents=True, exist_ok=True)
        words = ["<s>", "<pad>", "</s>", "<unk>", *alphabet(), "<mask>"]  # its order, no merges
        (part / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        (part / "merges.txt").write_text("#version: 0.2\n")
        encoding, rows = read_tokenizer(part, SMALL.vocab_size)
        torch.manual_seed(1)
        model = Roberta(SMALL, encoding.n_vocab).to(device)
        tokens = read_tokens(args.data_dir, "train", encoding, args.length)
        for _ in train(model, tokens, "mlm", args.pretrain_steps, args, seed=0):
            pass
        save_roberta(model, rows, part)
        part.rename(folder)  # so that it is there whole or not at all
    return folder


def diffuse(model: Roberta, tokens: Tensor, x_0: Tensor, marks: list[int], seed: int,
            args: argparse.Namespace) -> dict[int, Bound]:
    """Train as a diffusion model; {step: the bound on x_0} at each of the `marks`, 0 the first."""
    bounds = {}
    for step in chain([0], train(model, tokens, "diffusion", marks[-1], args, seed)):
        if step in marks:
            with autocast(x_0.device.type):
                bounds[step] = nelbo(model, x_0, model.mask_id)
    return bounds


def paint(axes, nats: dict[str, Tensor], marks: list[int], curves: dict[str, Bound]) -> None:
    """Left the bounds (seeds, marks) by step, right the losses by mask ratio of the first seed."""
    left, right = axes
    for weights, values in nats.items():
        left.errorbar(marks, values.mean(0), values.std(0) / len(values) ** 0.5, marker="o",
                      label=f"{weights} weights")
    left.set(title="From both starts", xlabel="steps of diffusion training",
             ylabel="NELBO <=, nats per token")
    for label, bound in curves.items():
        N, counts, height, _ = bound.curve
        right.plot([m / N for m in counts], height, marker=".", label=label)
    right.set(title="The loss by mask level", xlabel="mask ratio",
              ylabel="CE(m), nats per hidden token")
    for axis in axes:
        axis.legend()


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = flags("roberta_start", __doc__)
    add = parser.add_argument
    add("--pretrain-steps", type=count, default=500,
        help="without --checkpoint, at 15%% (default: 500)")
    add("--steps", type=count, default=100, help="of diffusion training (default: 100)")
    add("--seeds", type=count, nargs="+", default=[1, 2, 3], help="(default: 1 2 3)")
    add("--rows", type=count, default=32, help="of a step (default: 32)")
    add("--length", type=count, default=64, help="tokens of a row (default: 64)")
    add("--eval-rows", type=several, default=256, help="of validation text (default: 256)")
    add("--learning-rate", type=float, help="(default: 3e-4; with --checkpoint 1e-4)")
    parser.set_defaults(checkpoint=None)
    args = parser.parse_args(arguments)
    if args.length > SMALL.context_length:
        raise ConfigError(f"--length {args.length} is more than {SMALL.context_length}, RoBERTa's "
                          "context length")
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if args.checkpoint else 3e-4
    return args


@command("experiments.roberta_start", ValueError)  # of a --length beyond another context length
def main(arguments: list[str]) -> None:
    args = parse(arguments)
    keep_freed_memory()
    device = choose_device("auto")
    folder = Path(args.checkpoint) if args.checkpoint else pretrained(args, device)
    model, encoding = load_roberta(folder)
    tokens = read_tokens(args.data_dir, "train", encoding, args.length)
    val = read_tokens(args.data_dir, "val", encoding, args.length)
    starts = torch.linspace(0, len(val) - args.length, args.eval_rows).long()
    x_0 = val.unfold(0, args.length, 1)[starts].to(device)
    print(f"{folder}: {count_parameters(model) / 1e6:.1f}M parameters, {model.vocab_size} tokens "
          "to write")
    marks = sorted({0, *(max(1, args.steps >> i) for i in range(3))})
    runs = {"pretrained": [], "random": []}
    for seed in args.seeds:
        torch.manual_seed(seed)
        networks = {"pretrained": load_roberta(folder)[0],
                    "random": Roberta(model.config, model.vocab_size)}
        for weights, network in networks.items():
            runs[weights].append(diffuse(network.to(device), tokens, x_0, marks, seed, args))
    nats = {weights: torch.tensor([[run[step].nats for step in marks] for run in found])
            for weights, found in runs.items()}  # (seeds, marks) each

    print(f"\n{'step':>5}{'pretrained':>19}{'random':>19}{'- random':>19}")
    for step, ours, other in zip(marks, nats["pretrained"].T, nats["random"].T, strict=True):
        cells = map(mean_and_error, (ours, other, ours - other))
        print(f"{step:5}" + "".join(f"{nat:10.3f} +- {error:.3f}" for nat, error in cells))
    curves = {f"{weights}, {step} steps": runs[weights][0][step]
              for weights in runs for step in (0, marks[-1])}
    counts = curves["random, 0 steps"].curve.counts
    print(f"\n{'loss by mask ratio':24}" + "".join(f"{m / args.length:>7.0%}" for m in counts))
    for label, bound in curves.items():
        print(f"{label:24}" + "".join(f"{height:7.2f}" for height in bound.curve.nats))
    frequencies = torch.special.entr(tokens.bincount() / len(tokens)).sum().item()
    print(f"{'token frequencies alone':24}{frequencies:7.2f}")
    x = torch.full((1, args.length), model.mask_id, device=device)
    text = generate(networks["pretrained"], x, model.mask_id, Generator().manual_seed(1),
                    order="spread", temperature=0.7)
    print(f"\nwritten from nothing: {encoding.decode(text[0].tolist())!r}")
    draw(args.picture, lambda axes: paint(axes, nats, marks, curves), columns=2)
    report({"checkpoint": str(folder), "frequencies": frequencies, "steps": marks,
            "nelbo": {weights: values.tolist() for weights, values in nats.items()},
            "curves": {label: bound.curve._asdict() for label, bound in curves.items()}})


if __name__ == "__main__":
    sys.exit(main())
