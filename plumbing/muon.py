"""Muon, the optimizer of the matrices inside the blocks (Jordan et al., 2024)."""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum, with each matrix's update made orthogonal: it moves equally far in all directions.

    Like torch.optim.Muon, but matrices of equal shape are orthogonalised together, each process
    taking some of them, and in `dtype`: on a CPU without bfloat16 instructions the stock
    optimizer's bfloat16 products are a hundred times slower.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95,
                 weight_decay: float = 0.0, dtype: torch.dtype = torch.bfloat16):
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        lr, momentum = group["lr"], group["momentum"]
        for shape in dict.fromkeys(matrix.shape for matrix in group["params"]):
            matrices = [matrix for matrix in group["params"] if matrix.shape == shape]
            for matrix in matrices:
                if not self.state[matrix]:
                    self.state[matrix]["momentum"] = torch.zeros_like(matrix)
            averages = [self.state[matrix]["momentum"] for matrix in matrices]
            gradients = torch.stack([matrix.grad for matrix in matrices])
            torch._foreach_lerp_(averages, list(gradients), 1 - momentum)
            ahead = gradients.lerp(torch.stack(averages), momentum)  # Nesterov
            updates = shared_out(orthogonalize, ahead.to(self.dtype)).to(matrices[0].dtype)
            scale = max(1, shape[0] / shape[1]) ** 0.5  # tall matrices need larger updates
            torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
            torch._foreach_add_(matrices, list(updates), alpha=-lr * scale)


def shared_out(function: Callable[[Tensor], Tensor], items: Tensor) -> Tensor:
    """function(items), which maps every items[i] by itself: each process takes some of them."""
    if not dist.is_initialized():
        return function(items)
    world = dist.get_world_size()
    each = math.ceil(len(items) / world)
    padded = torch.cat([items, items.new_zeros(world * each - len(items), *items.shape[1:])])
    mine = function(padded[dist.get_rank() * each :][:each]).contiguous()
    dist.all_gather_into_tensor(padded, mine)
    return padded[: len(items)]


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """(n,rows,columns): each matrix with its singular values moved near 1, by Newton-Schulz.

    X <- aX + b(XX')X + c(XX')^2 X. The coefficients trade exactness for speed: singular values end
    in about [0.7, 1.2], which serves as well (Jordan et al., 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.size(1) > matrices.size(2)
    X = matrices.mT if tall else matrices  # XX' is then of the smaller side
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X
