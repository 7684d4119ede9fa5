"""The plain recipe: what one writes first, to be compared with in experiments/quality.py.

GPT-2's block with the causal mask left out, and masked diffusion in its simplest form: each row
hides a uniformly drawn fraction of its tokens, all positions get logits, the loss is the mean
cross-entropy over the hidden ones. AdamW at a constant 3e-4, float32, nothing compiled, nothing
averaged. Nothing in it is wrong.

It reads the same windows of text in the same order as train.py, and answers model(tokens,
positions) as well, so that diffusion.nelbo measures it as it measures every other network.
"""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from diffusion import keyed_generator
from model import ModelConfig
from prepare_data import TokenFile


class Block(nn.Module):
    """GPT-2's: LayerNorm before attention and MLP, GELU, biases everywhere."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.norm_1 = nn.LayerNorm(C)
        self.qkv = nn.Linear(C, 3 * C)
        self.proj = nn.Linear(C, C)
        self.norm_2 = nn.LayerNorm(C)
        self.up = nn.Linear(C, 4 * C)
        self.down = nn.Linear(4 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(self.norm_1(x)).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (B,H,T,D) each
        y = F.scaled_dot_product_attention(q, k, v)  # is_causal=True would make it GPT-2's
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class PlainTransformer(nn.Module):
    """model(tokens) -> logits (B,T,V);  model(tokens, positions) -> (P,V), at no lower cost."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size + 1, config.n_embd)  # 1: the mask token
        self.position = nn.Embedding(config.context_length, config.n_embd)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.n_layer)))
        self.norm = nn.LayerNorm(config.n_embd)
        for name, parameter in self.named_parameters():  # GPT-2's initialisation
            if parameter.dim() == 2:
                ends_a_branch = name.endswith(("proj.weight", "down.weight"))
                std = 0.02 / (2 * config.n_layer) ** (0.5 * ends_a_branch)
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """tokens (B,T) int64, `config.mask_id` where hidden; positions (P,), flat: b*T + t."""
        t = torch.arange(tokens.size(1), device=tokens.device)
        x = self.norm(self.blocks(self.embedding(tokens) + self.position(t)))  # (B,T,C)
        logits = F.linear(x, self.embedding.weight[: self.config.vocab_size])  # tied, as GPT-2's
        return logits if positions is None else logits.flatten(0, 1)[positions]


def draw_mask(B: int, T: int, generator: Generator) -> Tensor:
    """(B,T) bool: each token is hidden with its row's mask ratio, which is uniform in [0, 1]."""
    mask_ratio = torch.rand(B, 1, generator=generator)
    return torch.rand(B, T, generator=generator) < mask_ratio


def plain_loss(model: nn.Module, x_0: Tensor, mask: Tensor, mask_id: int) -> Tensor:
    """The mean cross-entropy over the hidden tokens, in nats; x_0 and mask are (B,T)."""
    logits = model(x_0.masked_fill(mask, mask_id))
    return F.cross_entropy(logits[mask], x_0[mask])


def train_plainly(model: PlainTransformer, train_file: TokenFile, batch_size: int,
                  seed: int) -> Iterator[float]:
    """Train for as long as somebody wants the next loss: a step for each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    device = model.embedding.weight.device
    T = model.config.context_length
    for step in itertools.count():
        x_0 = torch.from_numpy(train_file.batch(seed, step, batch_size, T))
        mask = draw_mask(batch_size, T, keyed_generator(seed, step, "plain"))
        value = plain_loss(model, x_0.to(device), mask.to(device), model.config.mask_id)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        yield value.item()
