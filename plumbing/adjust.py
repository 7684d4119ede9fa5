"""Changes of the logits while a text is written: banned tokens, a penalty on repetition.

An `adjust` is any function (logits (P,V), x (B,T), positions (P,)) -> logits. Write your own for
guidance or constraints: experiments/guidance.py and experiments/structured.py do.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Adjust = Callable[[Tensor, Tensor, Tensor], Tensor]


def chain(adjusts: Sequence[Adjust]) -> Adjust:
    """One after the other."""

    def adjust(logits: Tensor, x: Tensor, positions: Tensor) -> Tensor:
        for change in adjusts:
            logits = change(logits, x, positions)
        return logits

    return adjust


def ban(tokens: Sequence[int], before: int | None = None) -> Adjust:
    """These tokens are never written; or only from the position `before` on."""
    banned = torch.tensor(tokens, dtype=torch.int64)

    def adjust(logits: Tensor, x: Tensor, positions: Tensor) -> Tensor:
        without = logits.index_fill(1, banned.to(logits.device), -math.inf)
        early = positions % x.size(1) < (x.size(1) if before is None else before)  # (P,)
        return without.where(early[:, None], logits)

    return adjust


def penalize_repetition(penalty: float) -> Adjust:
    """Divide by `penalty` the odds of every token that its row already holds; 1.2 is usual."""
    if not 0 < penalty < math.inf:
        raise ValueError(f"the repetition penalty must be positive, not {penalty}")

    def adjust(logits: Tensor, x: Tensor, positions: Tensor) -> Tensor:
        V = logits.size(1)
        seen = logits.new_zeros(len(x), V + 1).scatter_(1, x.clamp(max=V), 1)[:, :V]  # not the mask
        return logits - math.log(penalty) * seen[positions // x.size(1)]

    return adjust
