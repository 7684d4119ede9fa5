"""Train a masked diffusion language model: `python train.py configs/quickstart.toml --learning-rate 1e-3`

Every field of TrainConfig is a flag. `train` is one loop, to be read from top to bottom:

    clean tokens -> corrupt -> loss -> backward -> optimizers -> averaged weights -> sometimes evaluate and save

On several GPUs: `torchrun --nproc_per_node=8 train.py configs/gpt2.toml`. Every random draw is keyed by
(seed, step) and made for the whole global batch, of which each process and micro-batch takes its rows: any number of
processes trains the same model, and a resumed run is the run that was interrupted.
"""

import copy
import dataclasses
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from configs import ConfigError, load
from diffusion import MASK_RATIOS, Bound, corrupt, evaluate, keyed_generator, loss
from model import (
    CheckpointError, ModelConfig, Transformer, count_parameters, digest, flops_per_token, load_checkpoint,
    optimizer_groups, read_checkpoint_file,
)
from prepare_data import DataError, TokenFile


def knob(default, help: str):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that can be set, by a TOML file or a flag."""

    # what and where
    data_dir: str = knob("data/sotu", "folder that prepare_data.py wrote")
    out_dir: str = knob("out/quickstart", "checkpoint folder")
    resume: bool = knob(False, "continue the run in out_dir where it stopped")
    init_from: str = knob("", "checkpoint folder whose weights to start from (fine-tuning)")
    # the network
    n_layer: int = knob(4, "blocks")
    n_head: int = knob(3, "attention heads")
    n_embd: int = knob(192, "channels")
    context_length: int = knob(256, "tokens per row")
    # the question asked of it: see diffusion.corrupt
    objective: str = knob("diffusion", "diffusion, mlm (BERT) or autoregressive (GPT)")
    mask_ratio: str = knob("uniform", f"distribution of the share hidden in training: {', '.join(MASK_RATIOS)}")
    weighting: str = knob("token", "weight of a hidden token: nelbo, row or token")
    mask_levels: int = knob(0, "0: every number of hidden tokens; 10: only 10%, 20% .. 100%")
    mlm_ratio: float = knob(0.15, "share hidden by the mlm objective")
    prefix_length: int = knob(0, "the first tokens of a row that are never hidden")
    prefix_length_max: int | None = knob(None, "draw the prefix length of each step from prefix_length to this")
    # the optimization
    steps: int = knob(2000, "length of the run; the learning rate depends on steps alone")
    batch_size: int = knob(16, "rows per step, over all processes and micro-batches")
    micro_batch_size: int = knob(0, "rows per forward pass, to fit memory (0: all rows of the process)")
    optimizer: str = knob("muon", "muon (matrices, with adamw for the rest) or adamw (everything)")
    muon_learning_rate: float = knob(0.01, "for the matrices inside the blocks")
    learning_rate: float = knob(3e-3, "for embedding and head, or everything if optimizer is adamw")
    weight_decay: float = knob(0.0, "decoupled, on all weights")
    warmup_steps: int = knob(50, "linear rise of the learning rates")
    decay_share: float = knob(0.6, "the last share of the run, in which they fall linearly to zero")
    grad_clip: float = knob(1.0, "largest gradient norm (0: no clipping)")
    ema_decay: float = knob(0.999, "of the averaged weights, which are the ones evaluated and saved")
    # the machine
    seed: int = knob(1, "of weights, data order and masks")
    device: str = knob("auto", "auto, cuda, mps or cpu")
    precision: str = knob("auto", "auto, bfloat16 or float32; auto takes bfloat16 where the hardware has it")
    compile: bool = knob(True, "torch.compile the training step")
    # looking and stopping
    log_interval: int = knob(20, "steps between lines of log.jsonl")
    eval_interval: int = knob(500, "steps between evaluations; each also saves")
    eval_rows: int = knob(64, "rows of validation text per evaluation")
    final_eval_rows: int = knob(512, "rows of the evaluation that ends the run")
    max_steps: int | None = knob(None, "stop and save after this step, without changing the learning rates")
    max_minutes: float | None = knob(None, "stop and save after so many minutes")

    def __post_init__(self):
        for name, choices in {
            "objective": ("diffusion", "mlm", "autoregressive"), "mask_ratio": tuple(MASK_RATIOS),
            "weighting": ("nelbo", "row", "token"), "optimizer": ("muon", "adamw"),
            "device": ("auto", "cuda", "mps", "cpu"), "precision": ("auto", "bfloat16", "float32"),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        for name in ("steps", "batch_size", "log_interval", "eval_interval", "eval_rows", "final_eval_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("learning_rate", "muon_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("mask_levels", "prefix_length", "micro_batch_size", "weight_decay", "warmup_steps", "grad_clip",
                     "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} cannot be {getattr(self, name)}")
        for name in ("mlm_ratio", "ema_decay", "decay_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")
        longest = self.prefix_length if self.prefix_length_max is None else self.prefix_length_max
        if not self.prefix_length <= longest < self.context_length:
            raise ValueError(f"a prefix of {self.prefix_length} to {longest} tokens does not fit context_length "
                             f"{self.context_length}")
        if self.mask_levels > self.context_length - longest:
            raise ValueError(f"mask_levels {self.mask_levels} is more than the tokens that can be hidden")
        if self.weighting == "nelbo" and self.mask_ratio == "middle" and self.objective == "diffusion":
            raise ValueError("mask_ratio middle never draws some levels, so weighting cannot be nelbo: use row or token")

    def masking(self) -> dict:
        """The arguments of diffusion.corrupt."""
        return {name: getattr(self, name) for name in (
            "objective", "mask_ratio", "weighting", "mask_levels", "mlm_ratio", "prefix_length", "prefix_length_max")}

    def rate(self, step: int) -> float:
        """The share of the full learning rates in force at `step`: a short rise, a plateau, a long linear fall."""
        rise = (step + 1) / (self.warmup_steps + 1)
        fall = (self.steps - step) / max(1.0, self.decay_share * self.steps)
        return min(1.0, rise, fall)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is replaced by the nearest orthogonal matrix (Jordan et al., 2024).

    torch.optim.Muon with two changes: matrices of equal shape are orthogonalised together, and in `dtype`, since
    bfloat16 products are a hundred times slower than float32 on a CPU without them.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0,
                 dtype: torch.dtype = torch.bfloat16):
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for matrix in group["params"]:
                by_shape.setdefault(matrix.shape, []).append(matrix)
            for (rows, columns), matrices in by_shape.items():
                for matrix in matrices:
                    if not self.state[matrix]:
                        self.state[matrix]["momentum"] = torch.zeros_like(matrix)
                averages = [self.state[matrix]["momentum"] for matrix in matrices]
                gradients = torch.stack([matrix.grad for matrix in matrices])
                torch._foreach_lerp_(averages, list(gradients), 1 - momentum)
                nesterov = gradients.lerp(torch.stack(averages), momentum)
                updates = orthogonalize(nesterov.to(self.dtype)).to(matrices[0].dtype)
                torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
                torch._foreach_add_(matrices, list(updates), alpha=-lr * max(1, rows / columns) ** 0.5)


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """(n,rows,columns): each matrix with its singular values moved to about 1, by Newton-Schulz iteration.

    X <- aX + b(XX')X + c(XX')^2 X, with coefficients that trade exactness for speed: values end in [0.7, 1.2].
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.size(1) > matrices.size(2)
    X = matrices.mT if tall else matrices  # the products below are then of the smaller side
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


def choose_device(name: str) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise ConfigError(f"device {name} is not available here; use --device auto or cpu")
    return torch.device(name)


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of matrix products. CPUs without bfloat16 instructions emulate it, a hundred times slower."""
    if precision == "auto":
        native = device.type == "cuda" or device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        precision = "bfloat16" if native else "float32"
    return getattr(torch, precision)


def matmul_ceiling(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of a plain matrix product on this device, the ceiling that MFU is a share of; takes a moment."""
    a, b = torch.randn(2, size * (4 if device.type == "cuda" else 1), size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(10):
            c = a @ b[:size]
        c.sum().item()  # waits for the device
        best = max(best, 10 * 2 * a.size(0) * size**2 / (time.perf_counter() - started))
    return best


def write_atomically(path: Path, write) -> None:
    """write(file) under a temporary name, then rename: a kill leaves the old file or the new, never half of one."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def save(path: Path, tensors: dict[str, Tensor], info: dict) -> None:
    """A file that model.read_checkpoint_file reads."""
    text = json.dumps(info)
    content = {"tensors": tensors, "info": text, "digest": digest(tensors, text)}
    write_atomically(path, lambda file: torch.save(content, file))


def training_state(model: Transformer, ema_model: Transformer, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All that a run needs to go on, as one flat dict: "model.*", "ema.*" and "optimizer.<parameter>.<what>"."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in ema_model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for optimizer in optimizers:
            tensors |= {f"optimizer.{name}.{what}": value for what, value in optimizer.state.get(parameter, {}).items()}
    return tensors


def load_training_state(model: Transformer, ema_model: Transformer, optimizers: list[torch.optim.Optimizer],
                        tensors: dict[str, Tensor]) -> None:
    """Put back what `training_state` took."""
    for prefix, network in (("model.", model), ("ema.", ema_model)):
        network.load_state_dict({name: tensors[prefix + name] for name in network.state_dict()})
    for name, parameter in model.named_parameters():
        owner = next(optimizer for optimizer in optimizers for group in optimizer.param_groups
                     if any(parameter is p for p in group["params"]))
        prefix = f"optimizer.{name}."
        owner.state[parameter] = {key.removeprefix(prefix): tensor.to(parameter.device)
                                  for key, tensor in tensors.items() if key.startswith(prefix)}


def check_same_run(cfg: TrainConfig, saved: dict) -> None:
    """A resumed run must be the run that was interrupted: only where and how long it runs may differ."""
    may_differ = {"data_dir", "out_dir", "resume", "init_from", "micro_batch_size", "device", "precision", "compile",
                  "max_steps", "max_minutes"}
    for name, value in dataclasses.asdict(cfg).items():
        if name not in may_differ and saved.get(name) != value:
            raise ConfigError(f"cannot resume with {name} {value!r}: the run was started with {saved.get(name)!r}")


def asked_to_stop(signals: list[int], world: int, step: int) -> bool:
    return bool(signals)


def show(text: str, stays: bool = False) -> None:
    """A progress line, rewritten in place on a terminal; or, with `stays`, text that is kept."""
    if sys.stdout.isatty():
        print("\r\033[K" + text, end="\n" if stays else "", flush=True)
    else:
        print(text, flush=True)


def describe(bound: Bound, bits_per_byte: float, objective: str) -> str:
    """An evaluation in two lines: the figure, and the loss by mask level that it is the mean height of."""
    sign = "NLL =" if objective == "autoregressive" else "NELBO <="
    text = f"validation {sign} {bound.nats:.3f} +- {bound.stderr:.3f} nats/token, {bits_per_byte:.3f} bits/byte"
    if bound.curve:
        N, counts, nats, _ = bound.curve
        shown = [min(range(len(counts)), key=lambda i: abs(counts[i] - N * k / 10)) for k in range(1, 11)]
        text += "\n  loss by share hidden:" + "".join(f"  {counts[i] / N:.0%} {nats[i]:.2f}" for i in shown)
    return text


def clock(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def train(cfg: TrainConfig) -> int:
    """Run `cfg`, writing cfg.out_dir (see model.py). Returns the exit code: 0, or 128 + a signal that stopped it."""

    # --- the machine -------------------------------------------------------------------------------
    started = time.monotonic()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    master = rank == 0  # the process that evaluates, logs and saves
    device = choose_device(cfg.device)
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    dtype = choose_dtype(cfg.precision, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    # --- the data ----------------------------------------------------------------------------------
    train_file, val_file = TokenFile(cfg.data_dir, "train"), TokenFile(cfg.data_dir, "val")
    T = cfg.context_length
    train_file.check_length(T)
    rows = cfg.micro_batch_size or cfg.batch_size // world  # of one forward pass
    parts = cfg.batch_size // rows if rows else 0  # micro-batches of the global batch, over all processes
    if not parts or rows * parts != cfg.batch_size or parts % world:
        raise ConfigError(f"batch_size {cfg.batch_size} is not a multiple of {max(rows, 1)} rows x {world} processes")
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
            raise ConfigError(f"{cfg.init_from} has another shape: {pretrained.config}, asked for: {model_config}")
        model.load_state_dict(pretrained.state_dict())
    # The averaged weights stay float32 whatever the products are in: steps this small vanish in bfloat16.
    ema_model = copy.deepcopy(model).eval().requires_grad_(False)
    matrices, tables = optimizer_groups(model)
    adamw = dict(lr=cfg.learning_rate, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)
    if cfg.optimizer == "muon":
        optimizers = [Muon(matrices, cfg.muon_learning_rate, weight_decay=cfg.weight_decay, dtype=dtype),
                      torch.optim.AdamW(tables, **adamw)]
    else:
        optimizers = [torch.optim.AdamW(matrices + tables, **adamw)]
    full_rates = [optimizer.defaults["lr"] for optimizer in optimizers]

    # --- start or resume ---------------------------------------------------------------------------
    out_dir = Path(cfg.out_dir)
    step, best, log_size, seconds_before = 0, math.inf, 0, 0.0
    losses = torch.zeros(0, dtype=torch.float64)  # of the steps since the last line of the log
    if cfg.resume:
        tensors, info = (content := read_checkpoint_file(out_dir / "state.pt"))["tensors"], content["info"]
        check_same_run(cfg, info["config"])
        load_training_state(model, ema_model, optimizers, tensors)
        step, best, log_size, seconds_before = info["step"], info["best"], info["log_size"], info["seconds"]
        best, losses = math.inf if best is None else best, tensors["losses"]
    elif (out_dir / "state.pt").exists():
        raise ConfigError(f"{out_dir} holds a run already: continue it with --resume, or choose another --out-dir")
    if master:
        out_dir.mkdir(parents=True, exist_ok=True)
        described = json.dumps(dataclasses.asdict(cfg), indent=2) + "\n"
        write_atomically(out_dir / "config.json", lambda file: file.write(described.encode()))
        log = open(out_dir / "log.jsonl", "r+b" if cfg.resume else "wb", buffering=0)
        log.seek(log.truncate(log_size))  # what was logged after the checkpoint happens again
        ceiling = matmul_ceiling(device, dtype)
        print(f"{count_parameters(model) / 1e6:.1f}M parameters, {device}, {str(dtype).removeprefix('torch.')} products at "
              f"{ceiling / 1e9:,.0f} GFLOP/s; step {step} of {cfg.steps}", flush=True)

    # --- the loop ----------------------------------------------------------------------------------
    network = DistributedDataParallel(model) if world > 1 else model
    step_loss = torch.compile(loss) if cfg.compile else loss
    signals: list[int] = []  # SIGINT and SIGTERM: finish the step, save, stop
    handlers = {number: signal.signal(number, lambda number, frame: signals.append(number))
                for number in (signal.SIGINT, signal.SIGTERM)}
    stopping, tick, tick_step = False, time.monotonic(), step
    while step < cfg.steps and not stopping:
        for optimizer, rate in zip(optimizers, full_rates):
            for group in optimizer.param_groups:
                group["lr"] = rate * cfg.rate(step)

        # The global batch of this step, the same in every process; each takes its share of the micro-batches.
        x_0 = torch.from_numpy(train_file.batch(cfg.seed, step, cfg.batch_size, T))
        batch = corrupt(x_0, model_config.mask_id, keyed_generator(cfg.seed, step, "mask"), **cfg.masking())
        mine = batch.split(parts)[rank * parts // world : (rank + 1) * parts // world]
        step_sum = torch.zeros((), device=device)
        for i, micro_batch in enumerate(mine):
            if world > 1:
                network.require_backward_grad_sync = i == len(mine) - 1
            with autocast:
                share = step_loss(network, micro_batch.to(device))
            (share * world).backward()  # the weights add up over the global batch; processes are averaged
            step_sum += share.detach()
        if world > 1:
            dist.all_reduce(step_sum)
        if cfg.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        value = step_sum.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss of step {step} is {value}; {out_dir} keeps the last good checkpoint. "
                                     "Usual causes: a learning rate too high, no --grad-clip, damaged weights in --init-from")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        decay = min(cfg.ema_decay, (step + 1) / (step + 10))  # a short memory at first
        torch._foreach_lerp_(list(ema_model.parameters()), list(model.parameters()), 1 - decay)
        step += 1
        losses = torch.cat([losses, torch.tensor([value], dtype=torch.float64)])

        # Look: a line for log.jsonl, and one for the person in front of the screen.
        finished, seconds = step == cfg.steps, seconds_before + time.monotonic() - started
        if master and (step % cfg.log_interval == 0 or finished):
            speed = (step - tick_step) * cfg.batch_size * T / (time.monotonic() - tick)  # tokens/s
            share_predicted = batch.positions.numel() / x_0.numel()
            mfu = speed * flops_per_token(model_config, share_predicted) / (ceiling * world)
            tick, tick_step, mean = time.monotonic(), step, losses.mean().item()
            line = {"step": step, "loss": mean, "rate": cfg.rate(step - 1), "tokens_per_second": round(speed), "mfu": mfu,
                    "seconds": seconds}
            log.write((json.dumps(line) + "\n").encode())
            left = (cfg.steps - step) * cfg.batch_size * T / speed
            show(f"step {step}/{cfg.steps}  loss {mean:.3f}  {speed:,.0f} tokens/s  MFU {mfu:.0%}  {clock(left)} left")
        if step % cfg.log_interval == 0:
            losses = losses[:0]

        # Measure: the bound on validation text under the averaged weights. The best so far becomes model.pt.
        measuring = step % cfg.eval_interval == 0 or finished
        stopping = asked_to_stop(signals, world, step) or step == cfg.max_steps or (
            cfg.max_minutes is not None and time.monotonic() - started > 60 * cfg.max_minutes)
        figures = None
        if master and measuring:
            x_0 = torch.from_numpy(val_file.spread(cfg.final_eval_rows if finished else cfg.eval_rows, T)).to(device)
            with autocast:
                bound = evaluate(ema_model, x_0, model_config.mask_id, cfg.objective, curve_points=32 if finished else 10)
            bits_per_byte = bound.nats * val_file.num_tokens / val_file.num_bytes / math.log(2)
            figures = {"step": step, "nats": bound.nats, "stderr": bound.stderr, "bits_per_byte": bits_per_byte,
                       "rows": len(x_0), "curve": bound.curve and bound.curve._asdict()}
            log.write((json.dumps(figures) + "\n").encode())
            show(f"step {step}: " + describe(bound, bits_per_byte, cfg.objective), stays=True)

        # Save.
        if master and (measuring or stopping):
            info = {"format": 1, "model": dataclasses.asdict(model_config), "config": dataclasses.asdict(cfg),
                    "tokenizer": train_file.tokenizer, "step": step, "evaluation": figures}
            if figures and figures["nats"] < best or not (out_dir / "model.pt").exists():
                best = figures["nats"] if figures else best
                save(out_dir / "model.pt", ema_model.state_dict(), info)
            os.fsync(log.fileno())
            info |= {"best": best if math.isfinite(best) else None, "log_size": log.tell(), "seconds": seconds}
            save(out_dir / "state.pt", training_state(model, ema_model, optimizers) | {"losses": losses}, info)

    for number, handler in handlers.items():
        signal.signal(number, handler)
    if world > 1:
        dist.destroy_process_group()
    if master and step < cfg.steps:
        show(f"stopped after step {step}; continue with: python train.py ... --out-dir {out_dir} --resume", stays=True)
    return 128 + signals[0] if signals else 0


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    path = arguments[0] if arguments and not arguments[0].startswith("-") else None
    try:
        return train(load(TrainConfig, path, arguments[path is not None :], "train.py", __doc__))
    except (ConfigError, DataError, CheckpointError) as error:  # a mistake of the user's
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError) as error:  # a failure at run time: diverged, disk full
        print(f"train.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
