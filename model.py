"""The network: a transformer that reads the whole text at once, in both directions.

    tokens (B,T) -> embedding -> n_layer x [neighbours, attention, MLP] -> head -> logits (B,T,V)

Its GPT twin, with which every claim of this repository is compared, differs in one word:
`causal=True` puts GPT's mask on, and a token attends to earlier ones only.

The letters, everywhere: B rows, T tokens, C channels, H heads, D = C/H channels per head,
V vocabulary entries, P predicted positions.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbing.machine import attention_written_out, fused_attention_is_slow


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the network."""

    vocab_size: int  # V, real tokens only: 8192 in the quickstart, 50257 for GPT-2
    context_length: int  # the longest T it can read: 256 on a laptop, 1024 for GPT-2
    n_layer: int  # 2 to 4 on a laptop, 12 for GPT-2
    n_head: int  # C/64 is a good default
    n_embd: int  # C: 256 on a laptop, 768 for GPT-2
    causal: bool = False  # True: attend to the left only, as GPT does

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type or field.type is int and value < 1:
                raise ValueError(f"{field.name} must be at least 1, not {value!r}")
        if self.n_embd % (2 * self.n_head):  # rotary embeddings turn pairs of channels
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of 2 * n_head = "
                             f"{2 * self.n_head}")
        if self.context_length * self.n_embd > self.n_head * 2**22:  # a rotary table of 16 MB
            raise ValueError(f"context_length {self.context_length} is too long for such heads")

    @property
    def mask_id(self) -> int:
        """The mask token: one more *input* than the vocabulary has, and never an output."""
        return self.vocab_size


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the channels, x / sqrt(mean(x^2)), without parameters."""
    return F.rms_norm(x, (x.size(-1),))


def rotary_table(length: int, dim: int) -> Tensor:
    """(2,T,1,D/2): cosine and sine of position * frequency, frequencies from 1 to 1/10000."""
    frequency = 10000.0 ** -(torch.arange(0, dim, 2) / dim)  # (D/2,)
    angle = torch.arange(length)[:, None, None] * frequency  # (T,1,D/2), 1 for all heads
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn each channel pair of x (B,T,H,D) by its position's angle (RoPE, arXiv:2104.09864).

    The product q.k then depends on how far apart two tokens are, not on where they stand.
    """
    cos, sin = rotary.to(x.dtype)
    a, b = x.chunk(2, dim=-1)  # (B,T,H,D/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """softmax(q k' / sqrt(D)) v by PyTorch's fused kernel; q, k, v and the result are (B,H,T,D)."""
    if fused_attention_is_slow(q):  # an exception: compiled for a CPU, in bfloat16
        return attention_written_out(q, k, v, causal)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def mix_neighbours(x: Tensor, weights: Tensor, causal: bool) -> Tensor:
    """Add to each token of x (B,T,C) a bit of the one before it, and if not causal of the next.

    weights: (2,C), how much of each, by channel.
    """
    # A hidden token depends most on its neighbours. Attention needs a quarter of a short run to
    # find out where they are, so they are shown to it (compare Primer, arXiv:2109.08668).
    before, after = weights.to(x.dtype)  # (C,) each
    y = norm(x)
    x = x + before * F.pad(y[:, :-1], (0, 0, 1, 0))
    return x if causal else x + after * F.pad(y[:, 1:], (0, 0, 0, 1))


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_head = config.n_head
        self.causal = config.causal
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)  # one product for all 3
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3 * self.n_head, -1).chunk(3, dim=2)  # (B,T,H,D) each
        # Normalised queries and keys: scores stay small, so attention can't saturate.
        q = rotate(norm(q), rotary)
        k = rotate(norm(k), rotary)
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self.causal)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.neighbours = nn.Parameter(torch.zeros(2, config.n_embd))
        self.attention = Attention(config)
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)  # 4, as in GPT-2
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, rotary: Tensor, positions: Tensor | None = None) -> Tensor:
        """x (B,T,C) -> (B,T,C); in the last block only what is at `positions` (P,): (P,C)."""
        x = mix_neighbours(x, self.neighbours, self.attention.causal)
        x = x + self.attention(norm(x), rotary)
        if positions is not None:  # after the last attention, tokens no longer look at each other
            x = x.flatten(0, 1)[positions]  # (P,C)
        return x + self.down(F.relu(self.up(norm(x))).square())  # ReLU^2


class Transformer(nn.Module):
    """model(tokens) -> logits (B,T,V);  model(tokens, positions) -> logits (P,V)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # One table is both embedding and head: better than two, and a third fewer parameters.
        # Matrix units like multiples of 64 rows; those beyond the mask token are never used.
        rows = math.ceil((config.vocab_size + 1) / 64) * 64
        self.embedding = nn.Embedding(rows, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        rotary = rotary_table(config.context_length, config.n_embd // config.n_head)
        self.register_buffer("rotary", rotary, persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        nn.init.normal_(self.embedding.weight, std=0.02)
        for block in self.blocks:
            for matrix in (block.attention.qkv, block.up):
                nn.init.normal_(matrix.weight, std=matrix.in_features**-0.5)
            # Output projections start at zero: every block begins as the identity.
            for matrix in (block.attention.proj, block.down):
                nn.init.zeros_(matrix.weight)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits of the V real tokens, at every position or only at some.

        tokens: (B,T) int64, `config.mask_id` where hidden; T at most `context_length`.
        positions: (P,) flat positions b*T + t. A masked model learns from hidden positions only,
            and the head is a third of GPT-2's work: predicting just those halves that third.
        """
        T = tokens.size(1)
        if T > self.config.context_length:
            raise ValueError(f"{T} tokens are more than the context length "
                             f"{self.config.context_length}")
        *blocks, last = self.blocks
        rotary = self.rotary[:, :T]
        x = norm(self.embedding(tokens))  # (B,T,C)
        if torch.is_autocast_enabled(x.device.type):  # blocks exchange bfloat16, half the bytes
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for block in blocks:
            x = block(x, rotary)
        x = norm(last(x, rotary, positions))  # (B,T,C) or (P,C)
        # Cut off the rows of the mask token and of the padding: what isn't there can't be sampled.
        return F.linear(x, self.embedding.weight)[..., : self.config.vocab_size]


def optimizer_groups(model: Transformer) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices, the rest): what the blocks multiply with, for Muon; all else, for AdamW."""
    matrices = [layer.weight for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]
    return matrices, [model.embedding.weight, *(block.neighbours for block in model.blocks)]
