"""The machine: device and dtype, whether it can compile, how fast it could be, other processes."""

import ctypes
import functools
import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from plumbing.config import ConfigError
from plumbing.terminal import put


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" takes the best there is. ConfigError if it isn't here."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise ConfigError(f"device {name} is not available here; use --device auto or cpu")
    if name == "cuda":
        return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)))  # set by torchrun
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """What its maker calls it, as far as PyTorch knows."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: "float32", "bfloat16", or "auto", the fastest native one."""
    if precision == "auto":
        # A CPU without bfloat16 instructions emulates them, far too slowly.
        native = {"cuda": True, "mps": False, "cpu": torch.ops.mkldnn._is_mkldnn_bf16_supported()}
        precision = "bfloat16" if native[device.type] else "float32"
    return getattr(torch, precision)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in bfloat16, if that is what `dtype` says; otherwise nothing changes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def can_compile() -> bool:
    """torch.compile writes C++ and needs a compiler; without one all is slower, not impossible."""
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++", "cl")
    found = any(shutil.which(name) for name in compilers)
    if not found:
        put("train.py: no C++ compiler found, so nothing is compiled; g++ would be faster",
            screen="stderr")
    return found


def compiled(function: Callable) -> Callable:
    """torch.compile(function); or, with one warning, the function itself if that fails here: there
    is no compiler, or the first call finds that it doesn't work."""
    chosen = torch.compile(function) if can_compile() else function

    def call(*arguments):
        nonlocal chosen
        try:
            return chosen(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            lines = str(error).splitlines()
            cause = next((line for line in lines if "error: " in line), lines[0])
            put(f"train.py: torch.compile fails, so nothing is compiled: {cause}", screen="stderr")
            chosen = function
            return function(*arguments)

    return call


def keep_freed_memory() -> None:
    """Ask the C library (glibc) to reuse freed memory instead of returning it to the system.

    On a CPU every step would otherwise get its gigabytes back page by zeroed page, which takes a
    sixth of GPT-2's step.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
        libc.mallopt(M_MMAP_MAX, 0)  # no block is too large to be kept ...
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # ... and there are never too many


def fused_attention_is_slow(q: Tensor) -> bool:
    """On a CPU in bfloat16. Written out and compiled, attention takes two thirds of its time or
    less (bench/NOTES.md), but B H T^2 numbers of memory, too many for long rows. q: (B,H,T,D)."""
    on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    return on_cpu and torch.compiler.is_compiling() and q.size(2) <= 1024


def attention_written_out(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """softmax(q k' / sqrt(D)) v, all (B,H,T,D), where |q| = |k| = sqrt(D), as after `norm`."""
    # No score exceeds |q| |k| / sqrt(D) = sqrt(D), so exp is safe without subtracting the maximum.
    weights = ((q * q.size(-1) ** -0.5) @ k.mT).exp()  # (B,H,T,T)
    if causal:
        weights = weights.tril()
    total = weights.sum(-1, keepdim=True, dtype=torch.float32)  # (B,H,T,1)
    return ((weights @ v) / total).to(v.dtype)


def hand_over(batch: NamedTuple, device: torch.device) -> NamedTuple:
    """A batch of tensors, to the device, without waiting."""
    return type(batch)(*(send(field, device) for field in batch))


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device; to a CUDA GPU without waiting, through pinned memory."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def fetch(numbers: Tensor) -> Callable[[], list[float]]:
    """Start to copy a few numbers from the device; calling the result waits for them."""
    if numbers.device.type != "cuda":
        values = numbers.tolist()
        return lambda: values
    copy = numbers.to("cpu", non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> list[float]:
        arrived.synchronize()  # for the work queued before the copy, not for later work
        return copy.tolist()

    return read


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of plain matrix products, here and now: what MFU is a fraction of. Takes a moment."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(10):
            product = a @ a
        product[0, 0].item()  # waits for the device
        best = max(best, 10 * 2 * size**3 / (time.perf_counter() - started))
    return best


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def flops_per_token(config, predicted_fraction: float = 1.0) -> float:
    """Floating-point operations of one training step, per token of the batch.

    `predicted_fraction` is P / (B T): 1.0 for GPT, about 0.5 for masked diffusion.
    """
    L, C, T, V = config.n_layer, config.n_embd, config.context_length, config.vocab_size
    # A matrix entry costs 2 FLOPs per token forward and 4 backward. Each block has 12 C^2 entries.
    # The head, C V, and the last MLP, 8 C^2, work at the predicted positions only.
    everywhere = (12 * L - 8) * C**2
    predicted = 8 * C**2 + C * V
    # Attention multiplies T x T twice: 4 C T forward per layer. No discount for causal attention.
    attention = 12 * L * C * T
    return 6 * (everywhere + predicted_fraction * predicted) + attention


class Machine:
    """Where a training run takes place: the device, the dtype of its matrix products, and this
    process among those that torchrun started. Usually it is the only one.

    The first process is the master: it evaluates, logs and saves.
    """

    def __init__(self, cfg):
        """cfg: a TrainConfig. ConfigError if the batch can't be shared out."""
        self.device = choose_device(cfg.device)
        self.dtype = choose_dtype(cfg.precision, self.device)
        world = os.environ.get("WORLD_SIZE", "1")
        rank = os.environ.get("RANK", "0")
        known = world == "1" or {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
        if not (known and world.isdecimal() and rank.isdecimal() and int(rank) < int(world)):
            raise ConfigError(f"WORLD_SIZE={world} and RANK={rank} are not all that torchrun sets "
                              "in the environment: unset them, or start with torchrun")
        self.world = int(world)
        self.rank = int(rank)
        self.master = self.rank == 0
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # what stays in float32 may use TF32
        torch.use_deterministic_algorithms(self.device.type == "cpu")  # or threads race to add
        # The rows of one forward pass, and this process's slices of the global batch.
        self.rows = cfg.micro_batch_size or max(1, cfg.batch_size // self.world)
        parts = cfg.batch_size // self.rows  # micro-batches over all processes
        if self.rows * parts != cfg.batch_size or parts % self.world:
            raise ConfigError(f"batch_size {cfg.batch_size} must be a multiple of {self.rows} rows "
                              f"x {self.world} processes")
        if parts > 1 and self.rows % 2 and cfg.objective == "diffusion":
            raise ConfigError(f"{self.rows} rows per micro-batch would split an antithetic pair: "
                              "use an even number")
        mine = range(self.rank * parts // self.world, (self.rank + 1) * parts // self.world)
        self.my_rows = [slice(i * self.rows, (i + 1) * self.rows) for i in mine]

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        device = device_name(self.device)
        return f"{device}; {name} matrix products reach {self.ceiling / 1e9:,.0f} GFLOP/s"

    @property
    def steps_late(self) -> int:
        """How much later a step's loss is read. A GPU works on while the next step is prepared."""
        return 1 if self.device.type == "cuda" else 0

    @functools.cached_property
    def ceiling(self) -> float:
        return matmul_ceiling(self.device, self.dtype)

    def autocast(self) -> torch.autocast:
        return autocast(self.device, self.dtype)

    def join(self, model: nn.Module) -> nn.Module:
        """Meet the other processes; the model, whose gradients are now averaged over all."""
        if self.world == 1:
            return model
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        return DistributedDataParallel(model)

    def sum(self, numbers: Tensor) -> Tensor:
        """Added up over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(numbers)
        return numbers

    def leave(self) -> None:
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()
