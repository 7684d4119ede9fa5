"""How fast is a training step, and what is the limit? python -m bench.training --shape gpt2

Four ways to train the same network, one step of each in turn, in one process:

    masked   this repository: the vocabulary head at hidden positions only, one static shape
    full     logits of all positions, as other masked diffusion code has them; otherwise the same
    naive    as such code usually is: float32 logits, and the loss outside the compiled part
    gpt      the causal twin with its full head: a nanoGPT step

A turn is one step on a CPU. On a GPU it is ten, and nobody waits between them, as in train.py: the
next batch is prepared while the device computes. The numbers are medians over the turns, after the
first one (which compiles). MFU is a fraction of the FLOP/s that plain matrix products reach in the
same run. Peak memory is each way's own on a GPU; on a CPU it is the process's, so ask for one way
at a time (`--ways masked`). `--profile FILE` writes down where the first way's time goes, by
kernel. Ends with one JSON line.

On a CPU under Linux, GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in front of the command makes all of
them faster.
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

from diffusion import Batch, Masking, corrupt, keyed_generator, loss
from model import ModelConfig, Transformer, optimizer_groups
from plumbing.command import command
from plumbing.config import Parser
from plumbing.machine import (
    autocast,
    can_compile,
    choose_device,
    choose_dtype,
    count_parameters,
    device_name,
    flops_per_token,
    hand_over,
    keep_freed_memory,
    matmul_ceiling,
)
from plumbing.muon import Muon

SHAPES = {  # ModelConfig, rows per step on a CPU, rows per step on a GPU
    "bytes": (ModelConfig(257, 256, n_layer=4, n_head=3, n_embd=192), 8, 256),
    "quickstart": (ModelConfig(8192, 256, n_layer=2, n_head=4, n_embd=256), 8, 256),
    "shakespeare": (ModelConfig(257, 256, n_layer=6, n_head=6, n_embd=384), 32, 256),
    "gpt2": (ModelConfig(50257, 1024, n_layer=12, n_head=12, n_embd=768), 2, 32),
}
WAYS = ("masked", "full", "naive", "gpt")
Time = float | torch.cuda.Event


def full_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss from logits of all positions; `batch` predicts all of them, some with weight 0."""
    logits = model(batch.inputs).float().flatten(0, 1)
    ce = F.cross_entropy(logits, batch.targets, reduction="none")
    return (batch.weights * ce).sum()


def everywhere(batch: Batch, x_0: Tensor) -> Batch:
    """The same question about all positions: the weights of the visible ones are 0."""
    weights = torch.zeros(x_0.numel()).index_add_(0, batch.positions, batch.weights)
    return Batch(batch.inputs, torch.arange(x_0.numel()), x_0.flatten(), weights)


def now(device: torch.device) -> Time:
    """The time; on a GPU, a mark in its queue of work, which has a time once it is reached."""
    if device.type != "cuda":
        return time.perf_counter()
    mark = torch.cuda.Event(enable_timing=True)
    mark.record()
    return mark


def elapsed(start: Time, end: Time) -> float:
    """Seconds."""
    return start.elapsed_time(end) / 1000 if isinstance(start, torch.cuda.Event) else end - start


class Way:
    """One way to train: a network, its optimizers, and a step that is timed in two parts."""

    def __init__(self, name: str, args: argparse.Namespace):
        torch.manual_seed(0)
        self.name = name
        self.rows = args.rows
        self.device = args.device
        self.dtype = args.dtype
        self.config = dataclasses.replace(args.config, causal=name == "gpt")
        objective = "autoregressive" if name == "gpt" else "diffusion"
        self.masking = Masking(objective, weighting="token")
        self.model = Transformer(self.config).to(self.device)
        matrices, tables = optimizer_groups(self.model)
        if args.optimizer == "muon":
            self.optimizers = [Muon(matrices, 0.02, dtype=self.dtype),
                               torch.optim.AdamW(tables, fused=True)]
        else:
            self.optimizers = [torch.optim.AdamW(self.model.parameters(), fused=True)]
        compiled = torch.compile if args.compile else lambda function: function
        self.network: Callable = self.model
        self.loss: Callable = compiled(loss if name == "masked" else full_loss)
        if name == "naive":
            self.network = compiled(self.model)
            self.loss = full_loss
        self.seconds: list[float] = []  # per step, of each turn
        self.optimizer_seconds: list[float] = []
        self.predicted_fraction = 1.0

    def turn(self, number: int, steps: int) -> float:
        """Time `steps` steps in a row; the loss of the last."""
        self.synchronize()
        started = time.perf_counter()
        optimizer_times = []
        for i in range(steps):
            value, *times = self.step(number * steps + i)
            optimizer_times.append(times)
        self.synchronize()
        self.seconds.append((time.perf_counter() - started) / steps)
        optimizing = sum(elapsed(*times) for times in optimizer_times)
        self.optimizer_seconds.append(optimizing / steps)
        return value.item()

    def step(self, number: int) -> tuple[Tensor, Time, Time]:
        """One step on random tokens, its masking included: (loss, before and after optimizing)."""
        B = self.rows
        T = self.config.context_length
        x_0 = torch.randint(self.config.vocab_size, (B, T),
                            generator=keyed_generator(0, number, "x"))
        batch = corrupt(x_0, self.config.mask_id, self.masking, keyed_generator(0, number, "mask"))
        if self.name == "masked":
            self.predicted_fraction = batch.positions.numel() / x_0.numel()
        elif self.name != "gpt":
            batch = everywhere(batch, x_0)
        with autocast(self.device, self.dtype):
            value = self.loss(self.network, hand_over(batch, self.device))
        value.backward()
        before = now(self.device)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return value.detach(), before, now(self.device)

    def resident_bytes(self) -> int:
        """What stays on the GPU between steps: weights and optimizer state."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                tensors += state.values()
        return sum(tensor.nbytes for tensor in tensors if tensor.is_cuda)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def results(self, warm_up: int, ceiling: float) -> dict:
        seconds = self.seconds[warm_up:]
        median = statistics.median(seconds)  # per step
        speed = self.rows * self.config.context_length / median
        flops = flops_per_token(self.config, self.predicted_fraction)
        optimizing = statistics.median(self.optimizer_seconds[warm_up:])
        return {"tokens_per_second": round(speed), "spread": max(seconds) / min(seconds) - 1,
                "gflop_per_token": flops / 1e9, "mfu": speed * flops / ceiling,
                "optimizer_share": optimizing / median, "first_turn_seconds": self.seconds[0]}


def compilations() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def profile(way: Way, path: str) -> float | None:
    """Write ten steps' time by kernel (on a CPU: by operator); the fraction a GPU was idle."""
    on_gpu = way.device.type == "cuda"
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA if on_gpu else kinds.CPU]) as profiler:
        way.turn(0, 10)
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=80)
    kernels = sorted((event.time_range.start, event.time_range.end) for event in profiler.events()
                     if event.device_type == torch.autograd.DeviceType.CUDA
                     and not event.is_user_annotation)
    idle = None
    if kernels:
        busy = 0.0
        reached = first = kernels[0][0]
        for start, end in kernels:
            busy += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        idle = 1 - busy / (reached - first)
    with open(path, "w") as file:
        print(f"{way.name}, {way.rows} rows, ten steps of {way.seconds.pop():.4f} s", file=file)
        print("" if idle is None else f"no kernel runs for {idle:.1%} of the time", file=file)
        print(table, file=file)
    return idle


def parse(arguments: list[str]) -> argparse.Namespace:
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
    add("--repeats", type=int, default=5, help="turns that count")
    add("--warm-up", type=int, default=2, help="turns that don't")
    add("--steps-per-turn", type=int, help="default: 1 on a CPU, 10 on a GPU")
    add("--profile", metavar="FILE", help="write the first way's time by kernel to FILE")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add("--precision", default="auto", choices=("auto", "bfloat16", "float32"))
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(arguments)
    given = [args.repeats, args.warm_up + 1, args.rows, args.steps_per_turn]
    if min(number for number in given if number is not None) < 1:
        parser.error("--repeats, --rows and --steps-per-turn must be at least 1, --warm-up at "
                     "least 0")
    args.device = choose_device(args.device)
    args.dtype = choose_dtype(args.precision, args.device)
    args.compile = args.compile and can_compile()
    config, rows_cpu, rows_gpu = SHAPES[args.shape]
    on_gpu = args.device.type == "cuda"
    args.rows = args.rows or (rows_gpu if on_gpu else rows_cpu)
    args.steps_per_turn = args.steps_per_turn or (10 if on_gpu else 1)
    changes = {"context_length": args.context_length, "vocab_size": args.vocab_size,
               "n_embd": args.n_embd, "n_head": args.n_embd and max(1, args.n_embd // 64)}
    changes = {name: value for name, value in changes.items() if value}
    args.config = dataclasses.replace(config, **changes)
    return args


@command("bench.training")
def main(arguments: list[str]) -> None:
    args = parse(arguments)
    keep_freed_memory()
    ways = [Way(name, args) for name in args.ways]
    compiled = dict.fromkeys(args.ways, 0)
    memory = {}
    ceilings = []
    print(f"{args.shape}: {count_parameters(ways[0].model) / 1e6:.1f}M parameters, "
          f"{args.rows} rows of {args.config.context_length} tokens, {args.dtype}, "
          f"{'compiled' if args.compile else 'eager'}, {args.optimizer}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    for number in range(args.warm_up + args.repeats):
        ceilings.append(matmul_ceiling(args.device, args.dtype))
        for way in ways:
            before = compilations()
            if args.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                others = torch.cuda.memory_allocated() - way.resident_bytes()
            way.turn(number, args.steps_per_turn)
            compiled[way.name] += compilations() - before
            if args.device.type == "cuda":
                memory[way.name] = (torch.cuda.max_memory_allocated() - others) / 1e9
            elif len(ways) == 1:
                kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                memory[way.name] = kilobytes * 1024 / 1e9
            print(f"  turn {number} {way.name}: {way.seconds[-1]:.3f} s a step", file=sys.stderr,
                  flush=True)

    ceiling = max(ceilings)
    results = {}
    print(f"matrix products reach {ceiling / 1e9:,.0f} GFLOP/s\n")
    print("way      tokens/s   spread  GFLOP/token    MFU  optimizer  compilations  first turn  "
          f"peak memory  {ways[0].name} is")
    for way in ways:
        row = way.results(args.warm_up, ceiling)
        row |= {"compilations": compiled[way.name], "peak_gb": memory.get(way.name)}
        results[way.name] = row
        relative = results[ways[0].name]["tokens_per_second"] / row["tokens_per_second"]
        peak = f"{row['peak_gb']:.2f} GB" if row["peak_gb"] else "-"
        print(f"{way.name:8} {row['tokens_per_second']:8,} {row['spread']:8.1%} "
              f"{row['gflop_per_token']:12.3f} {row['mfu']:6.1%} {row['optimizer_share']:10.1%} "
              f"{row['compilations']:13} {row['first_turn_seconds']:9.1f} s {peak:>12} "
              f"{relative:7.2f}x")
    idle = profile(ways[0], args.profile) if args.profile else None
    print(json.dumps({"shape": args.shape, "rows": args.rows, "config": vars(args.config),
                      "dtype": str(args.dtype), "compiled": args.compile,
                      "optimizer": args.optimizer, "torch": torch.__version__,
                      "device": device_name(args.device),
                      "malloc": os.environ.get("GLIBC_TUNABLES"),
                      "ceiling_gflops": ceiling / 1e9, "idle": idle, "ways": results}))


if __name__ == "__main__":
    sys.exit(main())
