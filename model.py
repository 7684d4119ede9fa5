"""The network: a transformer that sees the whole text at once, in both directions.

    tokens (B,T) -> embedding -> n_layer x [attention, MLP] -> RMSNorm -> head -> logits

It differs from GPT in one line, the attention mask: a token looks at all others, not only at earlier
ones. `causal=True` puts that line back, so the same file is also the autoregressive twin.

Of the modern recipe it takes what was measured to help (docs/recipe.md): rotary positions,
normalised queries and keys, parameter-free RMSNorm, ReLU^2, no biases, output projections that start
at zero (every block begins as the identity), and one table for embedding and head.

Letters used everywhere: B rows, T tokens, C channels, H heads, D = C/H, V vocabulary, P predictions.
"""

import hashlib
import io
import json
import math
import pickletools
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the network. `vocab_size` counts real tokens; the mask token comes on top."""

    vocab_size: int  # 257 for bytes + end-of-text, 50257 for GPT-2
    context_length: int  # the longest text it can see, in tokens
    n_layer: int  # 4 on a laptop, 12 for GPT-2
    n_head: int  # C/64 is a good default
    n_embd: int  # C: 192 on a laptop, 768 for GPT-2
    causal: bool = False  # True: attention looks left only, as GPT does

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type or field.type is int and value < 1:
                raise ValueError(f"{field.name} must be at least 1, not {value!r}")
        if self.n_embd % (2 * self.n_head):  # rotary positions turn pairs of channels
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of 2 * n_head = {2 * self.n_head}")
        if self.context_length * self.n_embd > self.n_head * 2**24:  # 64 MB of rotary_table
            raise ValueError(f"context_length {self.context_length} is too long for heads this wide")

    @property
    def mask_id(self) -> int:
        """The mask token: one more *input* than the vocabulary has, never an output."""
        return self.vocab_size


def norm(x: Tensor) -> Tensor:
    """RMSNorm without parameters: x / sqrt(mean(x^2)), over the channels."""
    return F.rms_norm(x, (x.size(-1),))


def rotary_table(length: int, dim: int) -> Tensor:
    """(2, T, D/2): cosine and sine of position * frequency, frequencies from 1 down to 1/10000."""
    frequency = 10000.0 ** -(torch.arange(0, dim, 2) / dim)
    angle = torch.arange(length)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn each channel pair by its position's angle, so that q.k depends on distance (arXiv:2104.09864)."""
    cos, sin = rotary.to(x.dtype)
    a, b = x.chunk(2, dim=-1)  # (B,H,T,D/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """softmax(q k' / sqrt(D)) v, all (B,H,T,D), for |q| = |k| = sqrt(D), by PyTorch's fused kernel.

    That kernel is slow in bfloat16 on a CPU. Written out and compiled, attention takes two thirds of its time
    or less (bench/NOTES.md), but B H T^2 numbers of memory: too many for long rows.
    """
    slow_kernel = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if slow_kernel and torch.compiler.is_compiling() and q.size(2) <= 1024:
        return attend_written_out(q, k, v, causal)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def attend_written_out(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The same. Scores are at most |q| |k| / sqrt(D) = sqrt(D), so exp needs no maximum taken off them."""
    weights = ((q * q.size(-1) ** -0.5) @ k.mT).exp()  # (B,H,T,T)
    if causal:
        weights = weights.tril()
    return ((weights @ v) / weights.sum(-1, keepdim=True, dtype=torch.float32)).to(v.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_head, self.causal = config.n_head, config.causal
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)  # one product for all three
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B,H,T,D)
        q, k = rotate(norm(q), rotary), rotate(norm(k), rotary)  # |q| = |k|: attention cannot saturate
        y = attend(q, k, v, self.causal)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention = Attention(config)
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, rotary: Tensor, positions: Tensor | None = None) -> Tensor:
        """x (B,T,C) -> (B,T,C), or with flat `positions` (P,) only what stands there, (P,C)."""
        x = x + self.attention(norm(x), rotary)
        if positions is not None:  # from the last attention on, places no longer look at each other
            x = x.flatten(0, 1)[positions]
        return x + self.down(F.relu(self.up(norm(x))).square())


class Transformer(nn.Module):
    """model(tokens) -> logits (B,T,V);  model(tokens, positions) -> logits (P,V)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # One table serves as embedding and as head: measured better than two, and a third fewer parameters.
        # Matrix units like multiples of 64 rows; those beyond the mask token are never addressed or shown.
        self.embedding = nn.Embedding(math.ceil((config.vocab_size + 1) / 64) * 64, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        rotary = rotary_table(config.context_length, config.n_embd // config.n_head)
        self.register_buffer("rotary", rotary, persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        nn.init.normal_(self.embedding.weight, std=0.02)
        for block in self.blocks:
            for matrix in (block.attention.qkv, block.up):
                nn.init.normal_(matrix.weight, std=matrix.in_features**-0.5)
            for matrix in (block.attention.proj, block.down):
                nn.init.zeros_(matrix.weight)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits of the V real tokens, for every place or only for some.

        tokens: (B,T) int64, the mask token being `config.mask_id`; T at most `context_length`.
        positions: (P,) flat places b*T + t. The head is about a third of GPT-2's work, and a masked
            model learns only from hidden places: asking for just those halves that third, and the last MLP.
        """
        T = tokens.size(1)
        if T > self.config.context_length:
            raise ValueError(f"{T} tokens are more than the context length {self.config.context_length}")
        *blocks, last = self.blocks
        x = norm(self.embedding(tokens))
        for block in blocks:
            x = block(x, self.rotary[:, :T])
        x = norm(last(x, self.rotary[:, :T], positions))  # (B,T,C) or (P,C)
        # The rows of the mask token and of the padding are cut off: what is not there cannot be sampled.
        return F.linear(x, self.embedding.weight)[..., : self.config.vocab_size]


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of matrix products. A CPU without bfloat16 instructions emulates them, far too slowly."""
    if precision == "auto":
        native = {"cuda": True, "mps": False, "cpu": torch.ops.mkldnn._is_mkldnn_bf16_supported()}
        precision = "bfloat16" if native[device.type] else "float32"
    return getattr(torch, precision)


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def flops_per_token(config: ModelConfig, predicted_share: float = 1.0) -> float:
    """Floating-point operations of one training step, per token of the batch.

    A matrix entry costs 2 per token forward and 4 backward. The blocks have 12 L C^2 entries, the head C V;
    the head and the last MLP, 8 C^2, work at `predicted_share` = P / (B T) of the places. Attention
    multiplies T x T twice: 4 C T per layer forward, 12 L C T in all; causal attention is not discounted.
    """
    L, C, T, V = config.n_layer, config.n_embd, config.context_length, config.vocab_size
    return 6 * ((12 * L - 8) * C**2 + predicted_share * (8 * C**2 + C * V)) + 12 * L * C * T


def optimizer_groups(model: Transformer) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices, tables): the 2-D weights inside the blocks, for Muon; the embedding, for AdamW."""
    return list(model.blocks.parameters()), [model.embedding.weight]


# --- Checkpoints: a folder holds config.json, log.jsonl, state.pt (all that resuming reads) and model.pt
# (the best averaged weights, all that sampling reads). train.py writes them; reading is here. --------


class CheckpointError(Exception):
    """A checkpoint that is missing, damaged or foreign; the message is one line for the user."""


def digest(tensors: dict[str, Tensor], info: str) -> str:
    """SHA-256 over everything in the file: torch.load alone lets most flipped bits through."""
    sha = hashlib.sha256(info.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


class Sparing(io.FileIO):
    """A file of which nobody can read more than a megabyte at once: no vast directory, no vast pickle."""

    def read(self, size: int = -1) -> bytes:
        if size > 2**20:
            raise ValueError("it has a megabyte besides the tensors")
        return super().read(2**20 if size < 0 else size)


def refuse_bombs(path: Path) -> None:
    """torch.load runs no code of a file, but lets a kilobyte fill the memory: ValueError for what could."""
    tensors = {"torch FloatStorage", "torch DoubleStorage", "torch._utils _rebuild_tensor_v2",
               "collections OrderedDict"}  # all that our own files call
    with Sparing(path) as file, zipfile.ZipFile(file) as archive:
        (pickle,) = (entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
        if any(entry.compress_type for entry in archive.infolist()):
            raise ValueError("it is compressed")
        opcodes = pickletools.genops(archive.read(pickle))
        if strange := {name for opcode, name, _ in opcodes if opcode.name == "GLOBAL"} - tensors:
            raise ValueError(f"it calls {max(strange)}")


def read_checkpoint_file(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, info) of a file train.py wrote, {"tensors", "info" (JSON text), "digest"}, verified."""
    try:
        refuse_bombs(path)
        content = torch.load(path, map_location="cpu", weights_only=True)  # never runs code of the file
        tensors, info = content["tensors"], json.loads(content["info"])
        if info["format"] != 1 or sum(tensor.nbytes for tensor in tensors.values()) > path.stat().st_size:
            raise ValueError(f"format {info['format']}, not 1, or larger than the file")
        intact = digest(tensors, content["info"]) == content["digest"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: train a model first, or name another folder") from None
    except Exception as error:  # a damaged file can fail in any way at all
        raise CheckpointError(f"{path} is not a readable checkpoint: {error!r:.200}") from None
    if not intact:
        raise CheckpointError(f"{path} is damaged: its tensors do not match their digest")
    return tensors, info


def load_checkpoint(folder: str | Path, device: str | torch.device = "cpu") -> tuple[Transformer, dict]:
    """The trained network of a checkpoint folder, in evaluation mode, and what is known about it.

    Returns (model, info) with the averaged (EMA) weights. info holds "model" (the ModelConfig as a dict),
    "config" (the training run's), "tokenizer", "step" and "evaluation" (figures, the curve among them).
    Raises CheckpointError with one line when the folder is missing, damaged or from something else.
    """
    path = Path(folder) / "model.pt"
    tensors, info = read_checkpoint_file(path)
    try:
        config, objective = ModelConfig(**info["model"]), info["config"]["objective"]
        if config.n_layer > len(tensors) or {type(objective), type(info["tokenizer"])} != {str}:
            raise ValueError("layers, tokenizer or objective are missing")
        with torch.device("meta"):  # no memory for what a hostile file claims, no time for random weights
            model = Transformer(config)
        model.load_state_dict(tensors, assign=True)
        model.rotary = rotary_table(config.context_length, config.n_embd // config.n_head)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit this model.py: {error!r:.200}") from None
    return model.to(device, torch.float32).eval(), info
