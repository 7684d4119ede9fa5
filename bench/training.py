"""How fast is a training step, and what is the limit? python -m bench.training --shape gpt2

Four ways to train the same network, one step of each in turn, in one process:

    masked   this repository: the vocabulary head at the hidden places only, one static shape
    full     logits of all places, as other masked diffusion code has them; otherwise the same
    naive    the same as such code usually has it: float32 logits, and the loss outside the compiled part
    gpt      the causal twin with its full head: a nanoGPT step

Figures are medians over the repeats, after the first steps (which compile). MFU is the share of a ceiling:
the FLOP/s that plain matrix products reach in the same run. Peak memory is each way's own on a GPU; on a CPU
it is the process's, so ask for one way at a time (`--ways masked`). Ends with one JSON line.

On a CPU under Linux, GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in front of the command makes all of them faster.
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import ConfigError, Parser
from diffusion import Batch, corrupt, keyed_generator, loss
from model import (
    ModelConfig,
    Transformer,
    choose_dtype,
    count_parameters,
    flops_per_token,
    optimizer_groups,
)
from train import Muon, can_compile, choose_device, keep_freed_memory, matmul_ceiling

SHAPES = {  # ModelConfig, rows per step on a CPU, rows per step on a GPU
    "quickstart": (ModelConfig(257, 256, n_layer=4, n_head=3, n_embd=192), 8, 256),
    "shakespeare": (ModelConfig(257, 256, n_layer=6, n_head=6, n_embd=384), 32, 256),
    "gpt2": (ModelConfig(50257, 1024, n_layer=12, n_head=12, n_embd=768), 2, 32),
}


WAYS = ("masked", "full", "naive", "gpt")


def full_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss from logits of all places; `batch` asks about every place, some with weight 0."""
    ce = F.cross_entropy(model(batch.inputs).float().flatten(0, 1), batch.targets, reduction="none")
    return (batch.weights * ce).sum()


def everywhere(batch: Batch, x_0: Tensor) -> Batch:
    """The same question asked of all places: the weights of the visible ones are 0."""
    weights = torch.zeros(x_0.numel()).index_add_(0, batch.positions, batch.weights)
    return Batch(batch.inputs, torch.arange(x_0.numel()), x_0.flatten(), weights)


class Way:
    """One way to train: a network, its optimizers, and a step that is timed in two parts."""

    def __init__(self, name: str, args: argparse.Namespace):
        torch.manual_seed(0)
        self.name, self.rows, self.device, self.dtype = name, args.rows, args.device, args.dtype
        self.config = dataclasses.replace(args.config, causal=name == "gpt")
        self.model = Transformer(self.config).to(self.device)
        matrices, tables = optimizer_groups(self.model)
        if args.optimizer == "muon":
            self.optimizers = [Muon(matrices, 0.02, dtype=self.dtype), torch.optim.AdamW(tables, fused=True)]
        else:
            self.optimizers = [torch.optim.AdamW(self.model.parameters(), fused=True)]
        compiled = torch.compile if args.compile else lambda function: function
        network: Callable = self.model
        if name == "naive":
            network, self.loss = compiled(self.model), full_loss
        else:
            self.loss = compiled(loss if name == "masked" else full_loss)
        self.network = network
        self.seconds: list[float] = []
        self.optimizer_seconds: list[float] = []
        self.predicted_share = 1.0

    def step(self, number: int) -> float:
        """One step on random tokens, its masking included; its loss."""
        T, mask_id = self.config.context_length, self.config.mask_id
        x_0 = torch.randint(self.config.vocab_size, (self.rows, T), generator=keyed_generator(0, number, "x"))
        started = time.perf_counter()
        objective = "autoregressive" if self.name == "gpt" else "diffusion"
        batch = corrupt(x_0, mask_id, keyed_generator(0, number, "mask"), objective, weighting="token")
        if self.name == "masked":
            self.predicted_share = batch.positions.numel() / x_0.numel()
        elif self.name != "gpt":
            batch = everywhere(batch, x_0)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            value = self.loss(self.network, batch.to(self.device))
        value.backward()
        self.synchronize()
        before_optimizer = time.perf_counter()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.synchronize()
        self.seconds.append(time.perf_counter() - started)
        self.optimizer_seconds.append(time.perf_counter() - before_optimizer)
        return value.item()

    def bytes(self) -> int:
        """What stays allocated between steps: weights and optimizer state."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        tensors += [tensor for state in states for tensor in state.values() if tensor.is_cuda]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def figures(self, warm_up: int, ceiling: float) -> dict:
        seconds, median = self.seconds[warm_up:], statistics.median(self.seconds[warm_up:])
        speed = self.rows * self.config.context_length / median
        flops = flops_per_token(self.config, self.predicted_share)
        return {"tokens_per_second": round(speed), "spread": max(seconds) / min(seconds) - 1,
                "gflop_per_token": flops / 1e9, "mfu": speed * flops / ceiling,
                "optimizer_share": statistics.median(self.optimizer_seconds[warm_up:]) / median,
                "first_step_seconds": self.seconds[0]}


def compilations() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def parse() -> argparse.Namespace:
    parser = Parser(prog="bench.training", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="shakespeare")
    add("--rows", type=int, help="per step (default: fits the device)")
    add("--context-length", type=int, help="instead of the shape's")
    add("--n-embd", type=int, help="instead of the shape's, in heads of 64 channels")
    add("--vocab-size", type=int, help="instead of the shape's")
    add("--ways", nargs="+", choices=WAYS, default=WAYS)
    add("--optimizer", choices=("adamw", "muon"), default="adamw")
    add("--repeats", type=int, default=5)
    add("--warm-up", type=int, default=2)
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add("--precision", default="auto", choices=("auto", "bfloat16", "float32"))
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    try:
        args.device = choose_device(args.device)
    except ConfigError as error:
        parser.error(str(error))
    args.dtype = choose_dtype(args.precision, args.device)
    args.compile = args.compile and can_compile()
    config, rows_cpu, rows_gpu = SHAPES[args.shape]
    args.rows = args.rows or (rows_gpu if args.device.type == "cuda" else rows_cpu)
    changes = {"context_length": args.context_length, "vocab_size": args.vocab_size, "n_embd": args.n_embd,
               "n_head": args.n_embd and max(1, args.n_embd // 64)}
    args.config = ModelConfig(**vars(config) | {name: value for name, value in changes.items() if value})
    return args


def main() -> int:
    args = parse()
    keep_freed_memory()
    ways, compiled, memory, ceilings = [Way(name, args) for name in args.ways], {}, {}, []
    print(f"{args.shape}: {count_parameters(ways[0].model) / 1e6:.1f}M parameters, {args.rows} rows of "
          f"{args.config.context_length} tokens, {args.dtype}, {'compiled' if args.compile else 'eager'}, "
          f"{args.optimizer}, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    for number in range(args.warm_up + args.repeats):
        ceilings.append(matmul_ceiling(args.device, args.dtype))
        for way in ways:
            before = compilations()
            if args.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                others = torch.cuda.memory_allocated() - way.bytes()
            way.step(number)
            compiled[way.name] = compiled.get(way.name, 0) + compilations() - before
            if args.device.type == "cuda":
                memory[way.name] = (torch.cuda.max_memory_allocated() - others) / 1e9
            elif len(ways) == 1:
                memory[way.name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
            print(f"  step {number} {way.name}: {way.seconds[-1]:.2f} s", file=sys.stderr, flush=True)

    ceiling, figures = max(ceilings), {}
    print(f"matrix products reach {ceiling / 1e9:,.0f} GFLOP/s\n")
    print("way      tokens/s   spread  GFLOP/token    MFU  optimizer  compilations  first step  peak memory  "
          f"{ways[0].name} is")
    for way in ways:
        row = way.figures(args.warm_up, ceiling)
        row |= {"compilations": compiled[way.name], "peak_gb": memory.get(way.name)}
        figures[way.name] = row
        relative = figures[ways[0].name]["tokens_per_second"] / row["tokens_per_second"]
        peak = f"{row['peak_gb']:.2f} GB" if row["peak_gb"] else "-"
        print(f"{way.name:8} {row['tokens_per_second']:8,} {row['spread']:8.1%} "
              f"{row['gflop_per_token']:12.3f} {row['mfu']:6.1%} {row['optimizer_share']:10.1%} "
              f"{row['compilations']:13} {row['first_step_seconds']:9.1f} s {peak:>12} {relative:7.2f}x")
    print(json.dumps({"shape": args.shape, "rows": args.rows, "config": vars(args.config),
                      "dtype": str(args.dtype), "compiled": args.compile, "optimizer": args.optimizer,
                      "torch": torch.__version__, "device": str(args.device),
                      "malloc": os.environ.get("GLIBC_TUNABLES"), "ceiling_gflops": ceiling / 1e9,
                      "ways": figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
