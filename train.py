"""Train a masked diffusion language model: python train.py configs/quickstart.toml --learning-rate 1e-3

Every field of TrainConfig is a flag. `train` is one loop, to be read from top to bottom:

    clean tokens -> corrupt -> loss -> backward -> optimizers -> averaged weights -> measure and save

On several GPUs: torchrun --nproc_per_node=8 train.py configs/gpt2.toml. Every random draw is keyed by
(seed, step) and made for the whole global batch, of which each process and micro-batch takes its rows: any
number of processes trains the same model, and a resumed run is the run that was interrupted.
"""

import copy
import ctypes
import dataclasses
import datetime
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from configs import ConfigError, load
from diffusion import MASK_RATIOS, OBJECTIVES, WEIGHTINGS, Bound, corrupt, evaluate, keyed_generator, loss
from model import (
    CheckpointError,
    ModelConfig,
    Transformer,
    choose_dtype,
    count_parameters,
    digest,
    flops_per_token,
    load_checkpoint,
    optimizer_groups,
    read_checkpoint_file,
)
from prepare_data import DataError, TokenFile


def knob(default, help: str, choices: tuple = (), low: float = -math.inf, high: float = 1e15):
    """A field of TrainConfig: its default, its --help, and the values it may take."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high))


@dataclass(frozen=True)
class TrainConfig:
    """Everything that can be set, by a TOML file or a flag."""

    # what and where
    data_dir: str = knob("data/sotu", "folder that prepare_data.py wrote")
    out_dir: str = knob("out/run", "checkpoint folder")
    resume: bool = knob(False, "continue the run in out_dir where it stopped")
    init_from: str = knob("", "checkpoint folder whose weights to start from (fine-tuning)")
    # the network
    n_layer: int = knob(4, "blocks", low=1)
    n_head: int = knob(3, "attention heads", low=1)
    n_embd: int = knob(192, "channels", low=1)
    context_length: int = knob(256, "tokens per row", low=1)
    # the question asked of it: the arguments of diffusion.corrupt
    objective: str = knob("diffusion", "diffusion, mlm (BERT) or autoregressive (GPT)", OBJECTIVES)
    mask_ratio: str = knob("bell", "distribution: uniform or bell", tuple(MASK_RATIOS))
    weighting: str = knob("token", "of hidden tokens: nelbo or token", WEIGHTINGS)
    mask_levels: int = knob(0, "0: any number of hidden tokens; 10: only tenths of the row", low=0)
    mlm_ratio: float = knob(0.15, "share hidden by the mlm objective", low=0, high=1)
    prefix_length: int = knob(0, "the first tokens of a row that are never hidden", low=0)
    prefix_length_max: int | None = knob(None, "draw each step's prefix length from prefix_length to this")
    # the optimization
    steps: int = knob(2000, "length of the run; the learning rates depend on steps alone", low=1)
    batch_size: int = knob(8, "rows per step, over all processes and micro-batches", low=1)
    micro_batch_size: int = knob(0, "rows per forward pass, to fit memory (0: all)", low=0)
    optimizer: str = knob("muon", "muon (for matrices, adamw for the rest) or adamw", ("muon", "adamw"))
    muon_learning_rate: float = knob(0.02, "for the matrices inside the blocks", low=1e-12)
    learning_rate: float = knob(0.01, "for the embedding (adamw: for everything; try 1e-3)", low=1e-12)
    weight_decay: float = knob(0.0, "decoupled, on all weights", low=0)
    warmup_steps: int = knob(50, "linear rise of the learning rates", low=0)
    decay_share: float = knob(0.6, "last share of the run, in which they fall linearly", low=0, high=1)
    grad_clip: float = knob(1.0, "largest gradient norm (0: no clipping)", low=0)
    ema_decay: float = knob(0.999, "of the averaged weights, the ones evaluated and saved", low=0, high=1)
    # the machine
    seed: int = knob(1, "of weights, data order and masks", low=0)
    device: str = knob("auto", "auto, cuda, mps or cpu", ("auto", "cuda", "mps", "cpu"))
    precision: str = knob("auto", "auto: bfloat16 if the hardware has it", ("auto", "bfloat16", "float32"))
    compile: bool = knob(True, "torch.compile the training step")
    # looking and stopping
    log_interval: int = knob(20, "steps between lines of log.jsonl", low=1)
    eval_interval: int = knob(500, "steps between evaluations, each of which also saves", low=1)
    eval_rows: int = knob(64, "rows of validation text per evaluation", low=1)
    final_eval_rows: int = knob(512, "rows of the evaluation that ends the run", low=1)
    max_steps: int | None = knob(None, "stop and save after this step, at the rates of the full run", low=1)
    max_minutes: float | None = knob(None, "stop and save after so many minutes", low=0)

    def __post_init__(self):
        """Refuse values that make no sense; ValueError names the field."""
        for field in dataclasses.fields(self):
            value, allowed = getattr(self, field.name), field.metadata
            if allowed["choices"] and value not in allowed["choices"]:
                raise ValueError(f"{field.name} must be {' or '.join(allowed['choices'])}, not {value!r}")
            if type(value) in (int, float) and not allowed["low"] <= value <= allowed["high"]:
                raise ValueError(f"{field.name} is out of range: {value}")
        ModelConfig(1, self.context_length, self.n_layer, self.n_head, self.n_embd)  # both check the rest
        corrupt(torch.zeros(2, self.context_length).long(), 1, torch.Generator(), **self.masking())

    def masking(self) -> dict:
        """The arguments of diffusion.corrupt."""
        names = "objective mask_ratio weighting mask_levels mlm_ratio prefix_length prefix_length_max"
        return {name: getattr(self, name) for name in names.split()}

    def rate(self, step: int) -> float:
        """The share of the full learning rates at `step`: a short rise, a plateau, a long linear fall."""
        rise = (step + 1) / (self.warmup_steps + 1)
        fall = (self.steps - step) / max(1.0, self.decay_share * self.steps)
        return min(1.0, rise, fall)


class Muon(torch.optim.Optimizer):
    """Momentum, with each matrix's update made orthogonal: all directions move alike (Jordan et al., 2024).

    Like torch.optim.Muon, but matrices of equal shape are orthogonalised together, each process taking its
    share of them, and in `dtype`: on a CPU without bfloat16 instructions the stock optimizer's bfloat16
    products are a hundred times slower.
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
            torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
            torch._foreach_add_(matrices, list(updates), alpha=-lr * max(1, shape[0] / shape[1]) ** 0.5)


def shared_out(function: Callable[[Tensor], Tensor], items: Tensor) -> Tensor:
    """function(items), for one that maps every items[i] by itself: each process maps its share of them."""
    if not dist.is_initialized():
        return function(items)
    world, share = dist.get_world_size(), math.ceil(len(items) / dist.get_world_size())
    padded = torch.cat([items, items.new_zeros(world * share - len(items), *items.shape[1:])])
    mine = function(padded[dist.get_rank() * share :][:share]).contiguous()
    dist.all_gather_into_tensor(padded, mine)
    return padded[: len(items)]


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """(n,rows,columns): each matrix with its singular values moved near 1, by Newton-Schulz iteration.

    X <- aX + b(XX')X + c(XX')^2 X with coefficients that trade exactness for speed: values end in about
    [0.7, 1.2], which serves as well (Jordan et al., 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.size(1) > matrices.size(2)
    X = matrices.mT if tall else matrices  # XX' is then of the smaller side
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


def keep_freed_memory() -> None:
    """Ask the C library (glibc) to reuse freed memory instead of giving it back to the system.

    Otherwise every step on a CPU gets its gigabytes anew, page by zeroed page: a sixth of GPT-2's step.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
        libc.mallopt(M_MMAP_MAX, 0)  # no block is too large to be kept ...
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # ... and never are there too many


def choose_device(name: str) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise ConfigError(f"device {name} is not available here; use --device auto or cpu")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


def can_compile() -> bool:
    """torch.compile writes C++ and needs a compiler; without one training is slower, not impossible."""
    found = any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))
    if not found:
        print("train.py: no C++ compiler found, so nothing is compiled; g++ would be faster", file=sys.stderr)
    return found


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of plain matrix products here and now, the ceiling that MFU is a share of; takes a moment."""
    size = 8192 if device.type == "cuda" else 1024
    a, best = torch.randn(size, size, device=device).to(dtype), 0.0
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(10):
            product = a @ a
        product[0, 0].item()  # waits for the device
        best = max(best, 10 * 2 * size**3 / (time.perf_counter() - started))
    return best


def save(path: Path, tensors: dict[str, Tensor], info: dict) -> None:
    """A file that model.read_checkpoint_file reads. A kill leaves the old file or the new one, no mixture."""
    text, part = json.dumps(info), path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save({"tensors": tensors, "info": text, "digest": digest(tensors, text)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError to torch.save
        raise OSError(f"step {info['step']} cannot be saved; is the disk full? ({error})"[:300]) from None


def training_state(model: Transformer, ema_model: Transformer,
                   optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All a run needs to go on, in one flat dict: "model.*", "ema.*", "optimizer.<parameter>.<what>"."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in ema_model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for optimizer in optimizers:
            state = optimizer.state.get(parameter, {})
            tensors |= {f"optimizer.{name}.{what}": tensor for what, tensor in state.items()}
    return tensors


@torch.no_grad()
def load_training_state(model: Transformer, ema_model: Transformer,
                        optimizers: list[torch.optim.Optimizer], saved: dict[str, Tensor]) -> None:
    """Put back what `training_state` took."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:  # an idle step makes the optimizers create their state
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in training_state(model, ema_model, optimizers).items():
        tensor.copy_(saved[name].view(tensor.shape))  # copy_ alone would repeat a smaller one


def check_same_run(cfg: TrainConfig, saved: dict) -> None:
    """A resumed run must be the run that was interrupted: only where and how long it runs may differ."""
    free = "data_dir out_dir resume init_from micro_batch_size device precision compile max_steps max_minutes"
    for name, value in dataclasses.asdict(cfg).items():
        if name not in free.split() and saved.get(name) != value:
            raise ConfigError(f"cannot resume with {name} {value!r}: the run has {saved.get(name)!r}")


def check_finite(what: str, value: float, out_dir: Path) -> None:
    """Stop the run before a number that is none can reach a checkpoint."""
    if not math.isfinite(value):
        raise FloatingPointError(f"the {what} is {value}; {out_dir} keeps its checkpoint. Usual causes: a "
                                 "learning rate too high, no grad_clip, bad --init-from")


def show(text: str, stays: bool = False) -> None:
    """A progress line, rewritten in place on a terminal; with `stays`, text that is kept."""
    start, end = ("\r\033[K", "\n" if stays else "") if sys.stdout.isatty() else ("", "\n")
    print(start + text, end=end, flush=True)


def describe(bound: Bound, bits_per_byte: float, objective: str) -> str:
    """An evaluation in two lines: the figure, and the loss by mask level that it is the mean height of."""
    sign = "validation NLL" if objective == "autoregressive" else "validation NELBO <="
    text = f"{sign} {bound.nats:.3f} +- {bound.stderr:.3f} nats/token, {bits_per_byte:.3f} bits/byte"
    if bound.curve:
        N, counts, nats, _ = bound.curve
        tenths = {min(range(len(counts)), key=lambda i: abs(counts[i] - N * k / 10)) for k in range(1, 11)}
        levels = (f"  {counts[i] / N:.0%} {nats[i]:.2f}" for i in sorted(tenths))
        text += "\n  loss by share hidden:" + "".join(levels)
    return text


def train(cfg: TrainConfig) -> int:
    """Run `cfg`, writing cfg.out_dir (see model.py). Returns the exit code: 0, or 128 + a signal's number."""
    signals: list[int] = []  # SIGINT and SIGTERM ask to finish the step, save and stop
    handlers = {number: signal.signal(number, lambda number, frame: signals.append(number))
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        run(cfg, signals)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 128 + signals[0] if signals else 0


def run(cfg: TrainConfig, signals: list[int]) -> None:
    """The run itself, which stops after a step when there are `signals`."""

    # --- the machine -------------------------------------------------------------------------------
    started = time.monotonic()
    keep_freed_memory()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    master = rank == 0  # the process that evaluates, logs and saves
    device = choose_device(cfg.device)
    dtype = choose_dtype(cfg.precision, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    # --- the data ----------------------------------------------------------------------------------
    train_file, val_file = TokenFile(cfg.data_dir, "train"), TokenFile(cfg.data_dir, "val")
    T = cfg.context_length
    train_file.spread(1, T), val_file.spread(1, T)  # if too short, refused before anything is written
    rows = cfg.micro_batch_size or max(1, cfg.batch_size // world)  # of one forward pass
    parts = cfg.batch_size // rows  # micro-batches of the global batch, over all processes
    if rows * parts != cfg.batch_size or parts % world:
        raise ConfigError(f"batch_size {cfg.batch_size} is no multiple of {rows} rows x {world} processes")
    if parts > 1 and rows % 2 and cfg.objective == "diffusion":
        raise ConfigError(f"{rows} rows per micro-batch would split an antithetic pair: use an even number")

    # --- the network and its optimizers ------------------------------------------------------------
    torch.manual_seed(cfg.seed)
    model_config = ModelConfig(train_file.vocab_size, T, cfg.n_layer, cfg.n_head, cfg.n_embd,
                               causal=cfg.objective == "autoregressive")
    model = Transformer(model_config).to(device)
    if cfg.init_from:
        pretrained, _ = load_checkpoint(cfg.init_from)
        if dataclasses.replace(pretrained.config, context_length=T) != model_config:
            raise ConfigError(f"{cfg.init_from} is a {pretrained.config}, asked for is a {model_config}")
        model.load_state_dict(pretrained.state_dict())
    # The averaged weights stay float32 whatever the products are in: steps this small vanish in bfloat16.
    ema_model = copy.deepcopy(model).eval().requires_grad_(False)
    matrices, tables = optimizer_groups(model)
    adamw = dict(lr=cfg.learning_rate, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)
    if cfg.optimizer == "muon":
        muon = Muon(matrices, cfg.muon_learning_rate, weight_decay=cfg.weight_decay, dtype=dtype)
        optimizers = [muon, torch.optim.AdamW(tables, **adamw)]
    else:
        optimizers = [torch.optim.AdamW(matrices + tables, **adamw)]

    # --- start or resume ---------------------------------------------------------------------------
    out_dir = Path(cfg.out_dir)
    step, best, log_size, seconds_before = 0, math.inf, 0, 0.0
    losses = torch.zeros(0, dtype=torch.float64)  # of the steps since the last line of the log
    if cfg.resume:
        tensors, info = read_checkpoint_file(out_dir / "state.pt")
        try:
            check_same_run(cfg, info["config"])
            if info["model"] != dataclasses.asdict(model_config) or info["tokenizer"] != train_file.tokenizer:
                raise ConfigError(f"cannot resume on {cfg.data_dir}: the run has another vocabulary")
            load_training_state(model, ema_model, optimizers, tensors)
            step, log_size = max(0, int(info["step"])), max(0, int(info["log_size"]))
            best = math.inf if info["best"] is None else float(info["best"])
            losses, seconds_before = tensors["losses"].flatten(), float(info["seconds"])
        except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{out_dir}/state.pt does not fit this run: {error!r:.200}") from None
    elif (out_dir / "state.pt").exists():
        raise ConfigError(f"{out_dir} holds a run: continue it with --resume, or choose another --out-dir")
    if master:
        out_dir.mkdir(parents=True, exist_ok=True)
        log = open(out_dir / "log.jsonl", "a+", buffering=1)
        try:  # to keep a second run out, until this process ends in whatever way
            import fcntl
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another run is writing {log.name}: wait for its end or stop it") from None
        except (ImportError, OSError):  # Windows and some network file systems have no such locks
            pass
        log.seek(log.truncate(min(log_size, log.seek(0, os.SEEK_END))))  # what came later will happen again
        (out_dir / "config.json.part").write_text(json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")
        os.replace(out_dir / "config.json.part", out_dir / "config.json")
        ceiling = matmul_ceiling(device, dtype)
        show(f"{count_parameters(model) / 1e6:.1f}M parameters on {device}; {str(dtype)[6:]} matrix products "
             f"reach {ceiling / 1e9:,.0f} GFLOP/s; step {step} of {cfg.steps}"
             + ("; the first step compiles, for about a minute" if cfg.compile else ""), stays=True)
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # --- the loop ----------------------------------------------------------------------------------
    network = DistributedDataParallel(model) if world > 1 else model
    step_loss = torch.compile(loss) if cfg.compile and can_compile() else loss
    stopping, tick, tick_step = False, time.monotonic(), step
    while step < cfg.steps and not stopping:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * cfg.rate(step)

        # The global batch of this step, the same in every process, of which each takes its micro-batches.
        x_0 = torch.from_numpy(train_file.batch(cfg.seed, step, cfg.batch_size, T))
        batch = corrupt(x_0, model_config.mask_id, keyed_generator(cfg.seed, step, "mask"), **cfg.masking())
        mine = batch.split(parts)[rank * parts // world : (rank + 1) * parts // world]
        total = torch.zeros((), device=device)
        for i, micro_batch in enumerate(mine):
            if world > 1:
                network.require_backward_grad_sync = i == len(mine) - 1
            with autocast:
                share = step_loss(network, micro_batch.to(device))
            (share * world).backward()  # weights add up over the global batch, but processes are averaged
            total += share.detach()
        if world > 1:
            dist.all_reduce(total)
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        check_finite(f"loss of step {step}", value := total.item(), out_dir)
        check_finite(f"gradient's norm of step {step}", norm.item(), out_dir)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        decay = min(cfg.ema_decay, (step + 1) / (step + 10))  # a short memory at first
        with torch.no_grad():  # or else the averages would remember every step that made them
            torch._foreach_lerp_(list(ema_model.parameters()), list(model.parameters()), 1 - decay)
        step += 1
        losses = torch.cat([losses, torch.tensor([value], dtype=torch.float64)])

        # Look: a line for log.jsonl, and one for the person in front of the screen.
        finished, seconds = step == cfg.steps, seconds_before + time.monotonic() - started
        if step % cfg.log_interval == 0 or finished:
            mean, losses = losses.mean().item(), losses[:0]
            if master:
                speed = (step - tick_step) * x_0.numel() / (time.monotonic() - tick)  # tokens/s
                flops = flops_per_token(model_config, batch.positions.numel() / x_0.numel())
                mfu = speed * flops / (ceiling * world)
                line = {"step": step, "loss": mean, "rate": cfg.rate(step - 1), "seconds": seconds,
                        "tokens_per_second": round(speed), "mfu": mfu}
                print(json.dumps(line), file=log)
                left = datetime.timedelta(seconds=round((cfg.steps - step) * x_0.numel() / speed))
                show(f"step {step}/{cfg.steps}  loss {mean:.3f}  {speed:,.0f} tokens/s  MFU {mfu:.0%}  "
                     f"{left} left")
            tick, tick_step = time.monotonic(), step

        # Measure: the bound on validation text under the averaged weights. The best so far becomes model.pt.
        figures, measuring = None, step % cfg.eval_interval == 0 or finished
        if master and measuring:
            x_0 = torch.from_numpy(val_file.spread(cfg.final_eval_rows if finished else cfg.eval_rows, T))
            with autocast:
                bound = evaluate(ema_model, x_0.to(device), model_config.mask_id, cfg.objective,
                                 curve_points=30 if finished else 10, batch_size=rows)
            check_finite(f"validation loss after step {step}", bound.nats, out_dir)
            bits_per_byte = bound.nats * val_file.num_tokens / val_file.num_bytes / math.log(2)
            figures = {"step": step, "nats": bound.nats, "stderr": bound.stderr, "rows": len(x_0),
                       "bits_per_byte": bits_per_byte, "curve": bound.curve and bound.curve._asdict()}
            figures = json.loads(json.dumps(figures), parse_constant=lambda nan: None)  # JSON has no NaN
            print(json.dumps(figures), file=log)
            show(f"step {step}: {describe(bound, bits_per_byte, cfg.objective)}", stays=True)

        # Save, when there is news or no more time.
        out_of_time = cfg.max_minutes is not None and time.monotonic() - started > 60 * cfg.max_minutes
        stopping = bool(signals) or out_of_time or step >= (cfg.max_steps or cfg.steps)
        if world > 1:  # all must leave the loop at the same step
            dist.all_reduce(wishes := torch.tensor(float(stopping), device=device))
            stopping = wishes.item() > 0
        if master and (measuring or stopping):
            info = {"format": 1, "model": dataclasses.asdict(model_config), "config": dataclasses.asdict(cfg),
                    "tokenizer": train_file.tokenizer, "step": step, "evaluation": figures}
            if best == math.inf or figures and figures["nats"] < best:  # unmeasured is better than no model
                best = figures["nats"] if figures else best
                save(out_dir / "model.pt", ema_model.state_dict(), info)
            os.fsync(log.fileno())
            info |= {"best": best if best < math.inf else None, "log_size": log.tell(), "seconds": seconds}
            tensors = training_state(model, ema_model, optimizers) | {"losses": losses}
            save(out_dir / "state.pt", tensors, info)
            tick, tick_step = time.monotonic(), step

    if world > 1:
        del network  # or else it outlives its process group, and now and then never returns from that
        dist.barrier()
        dist.destroy_process_group()
    if master and step < cfg.steps:
        show(f"stopped after step {step} of {cfg.steps}; the same command with --resume goes on", stays=True)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    path = arguments[0] if arguments and not arguments[0].startswith("-") else None
    try:
        return train(load(TrainConfig, path, arguments[path is not None :], "train.py", __doc__))
    except (ConfigError, DataError, CheckpointError) as error:  # the user's mistake
        code, message = 2, str(error)
    except (FloatingPointError, OSError) as error:  # diverged, disk full
        code, message = 1, f"{error}; what was saved before is intact"
    except (MemoryError, RuntimeError) as error:
        code, message = 1, f"out of memory, use a smaller --micro-batch-size ({error!r:.200})"
        if "alloc" not in message and not isinstance(error, MemoryError | torch.OutOfMemoryError):
            if not dist.is_initialized():
                raise
            message = f"a process of this run was lost, go on with --resume ({error!r:.200})"
    print(f"train.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
