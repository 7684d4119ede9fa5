"""Train a masked diffusion language model: python train.py configs/quickstart.toml --seed 2

    clean tokens -> how many to hide -> which -> ask -> loss -> backward -> step -> average

That is `loop`, the function to read. Every field of TrainConfig is a flag. On several GPUs it is
torchrun --nproc_per_node=8 train.py configs/gpt2.toml

Random draws depend on (seed, step) alone, and are made for the whole batch, of which each process
takes its rows. So any number of processes trains the same model, and a resumed run is the one that
was interrupted (on a CPU bit for bit; a GPU adds in an order that varies).
"""

import copy
import dataclasses
import datetime
import math
import statistics
import sys
from dataclasses import dataclass

import torch
from torch import nn

from diffusion import MASK_POSITIONS, MASK_RATIOS, OBJECTIVES, WEIGHTINGS, Masking
from diffusion import ask, draw_mask, draw_num_maskable, draw_num_masked, weigh
from diffusion import evaluate, keyed_generator, loss
from model import ModelConfig, Transformer, optimizer_groups
from plumbing.checkpoint import load_checkpoint, shape_of_start
from plumbing.command import command
from plumbing.config import ConfigError, check_knobs, knob, load
from plumbing.machine import Machine, compiled, count_parameters, flops_per_token
from plumbing.machine import hand_over, keep_freed_memory
from plumbing.muon import Muon
from plumbing.run_folder import Run, RunFolder, StopSignals
from plumbing.terminal import describe, show
from prepare_data import TokenFile


@dataclass(frozen=True)
class TrainConfig:
    """Every knob there is. A TOML file sets it, or a flag: --learning-rate 1e-3."""

    data_dir: str = knob("data/sotu", "folder that prepare_data.py wrote")
    out_dir: str = knob("out/run", "checkpoint folder")
    resume: bool = knob(False, "continue the run in out_dir where it stopped")
    init_from: str = knob("", "checkpoint folder whose weights to start from (fine-tuning)")
    # the network: 1.8 million parameters with bytes; GPT-2 small is 12, 12, 768, 1024
    n_layer: int = knob(4, "blocks", low=1)
    n_head: int = knob(3, "attention heads", low=1)  # n_embd/64 is a good default
    n_embd: int = knob(192, "channels", low=1)
    context_length: int = knob(256, "tokens per row", low=1)
    # what is hidden from it, and how its errors count: see diffusion.Masking
    objective: str = knob("diffusion", "diffusion, mlm (BERT) or autoregressive (GPT)", OBJECTIVES)
    mask_ratio: str = knob("bell", "distribution of the mask ratio", tuple(MASK_RATIOS))
    mask_positions: str = knob("random", "which positions are hidden", MASK_POSITIONS)
    weighting: str = knob("token", "how hidden tokens are weighted", WEIGHTINGS)
    mask_levels: int = knob(0, "0: any number of hidden tokens; 10: only tenths of the row", low=0)
    mlm_ratio: float = knob(0.15, "the mask ratio of the mlm objective", low=0, high=1)
    prefix_length: int = knob(0, "the first tokens of a row that are never hidden", low=0)
    prefix_length_max: int | None = knob(None, "draw each step's prefix length, up to this")
    # the optimization: docs/recipe.md says what else was tried
    steps: int = knob(2000, "length of the run; the learning rates follow it", low=1)
    batch_size: int = knob(8, "rows per step, over all processes and micro-batches", low=1)
    micro_batch_size: int = knob(0, "rows per forward pass, to fit memory (0: all)", low=0)
    optimizer: str = knob("muon", "muon: for matrices, adamw for the rest", ("muon", "adamw"))
    muon_learning_rate: float = knob(0.02, "for the matrices inside the blocks", low=1e-12)
    learning_rate: float = knob(0.01, "for all else: embedding (adamw: try 1e-3)", low=1e-12)
    weight_decay: float = knob(0.0, "decoupled, on all weights", low=0)
    warmup_steps: int = knob(50, "linear rise of the learning rates", low=0)
    decay_fraction: float = knob(0.6, "last part, in which the rates fall", low=0, high=1)
    grad_clip: float = knob(1.0, "largest gradient norm (0: no clipping)", low=0)
    ema_decay: float = knob(0.999, "of the averaged weights, which are saved", low=0, high=1)
    # the machine: on a GPU and on a CPU with bfloat16, leave it as it is
    seed: int = knob(1, "of weights, data order and masks", low=0)
    device: str = knob("auto", "where to compute", ("auto", "cuda", "mps", "cpu"))
    precision: str = knob("auto", "of matrix products", ("auto", "bfloat16", "float32"))
    compile: bool = knob(True, "torch.compile the training step")
    # looking and stopping
    log_interval: int = knob(20, "steps between lines of log.jsonl", low=1)
    eval_interval: int = knob(500, "steps between evaluations, each of which also saves", low=1)
    eval_rows: int = knob(64, "rows of validation text per evaluation", low=1)
    final_eval_rows: int = knob(512, "rows of the evaluation that ends the run", low=1)
    max_steps: int | None = knob(None, "stop and save after this step of the full run", low=1)
    max_minutes: float | None = knob(None, "stop and save after so many minutes", low=0)

    def __post_init__(self):
        check_knobs(self)  # ValueError names the field, here and below
        self.network(vocab_size=1)
        self.masking().check_rows_of(self.context_length)

    def network(self, vocab_size: int) -> ModelConfig:
        return ModelConfig(vocab_size, self.context_length, self.n_layer, self.n_head, self.n_embd,
                           causal=self.objective == "autoregressive")

    def masking(self) -> Masking:
        names = (field.name for field in dataclasses.fields(Masking))
        return Masking(**{name: getattr(self, name) for name in names})

    def rate(self, step: int) -> float:
        """The fraction of the full learning rates: a short rise, a plateau, a long linear fall."""
        rise = (step + 1) / (self.warmup_steps + 1)
        fall = (self.steps - step) / max(1.0, self.decay_fraction * self.steps)
        return min(1.0, rise, fall)


def train(cfg: TrainConfig) -> int:
    """Run `cfg`, writing cfg.out_dir. Returns the exit code: 0, or 128 + the number of a signal."""
    keep_freed_memory()  # makes a CPU faster
    machine = Machine(cfg)  # device, dtype, processes
    train_file = TokenFile(cfg.data_dir, "train")
    val_file = TokenFile(cfg.data_dir, "val")
    for file in (train_file, val_file):
        file.spread(1, cfg.context_length)  # refuse one too short before anything is written
    model = build_model(cfg, train_file).to(machine.device)
    ema_model = copy.deepcopy(model).eval().requires_grad_(False)  # what is evaluated and saved
    run = Run(model, ema_model, build_optimizers(cfg, model, machine.dtype))
    folder = RunFolder(cfg, train_file, val_file, machine.master)  # log, checkpoints
    folder.open(run)  # resumes, if asked to
    if machine.master:
        compiles = cfg.compile and run.step < folder.last_step
        compiling = "; the first step compiles, for about a minute" if compiles else ""
        show(f"{count_parameters(model) / 1e6:.1f}M parameters on {machine}; step {run.step} of "
             f"{cfg.steps}{compiling}", stays=True)
    with StopSignals(run) as signals:  # Ctrl-C finishes the step and saves
        loop(cfg, machine, train_file, val_file, run, folder, signals)
    if machine.master:
        show(folder.ending(run.step), stays=True)
    return signals.exit_code


def loop(cfg: TrainConfig, machine: Machine, train_file: TokenFile, val_file: TokenFile, run: Run,
         folder: RunFolder, signals: StopSignals) -> None:
    """Hide, predict, learn; now and then measure and save. What changes is in `run`."""
    B, T, mask_id = cfg.batch_size, cfg.context_length, run.model.config.mask_id
    masking = cfg.masking()
    network = machine.join(run.model)  # itself, or wrapped for several processes
    step_loss = compiled(loss) if cfg.compile else loss
    run.start_clock()
    stopping = False
    while run.step < folder.last_step and not stopping:
        # Hide some tokens. Every process draws the masks of the whole batch: they are the same.
        x_0 = torch.from_numpy(train_file.batch(cfg.seed, run.step, B, T))  # (B,T) clean tokens
        generator = keyed_generator(cfg.seed, run.step, "mask")
        N = draw_num_maskable(T, masking, generator)  # T, less the prefix if there is one
        num_masked = draw_num_masked(B, N, masking, generator)  # (B,) how many tokens to hide
        mask = draw_mask(num_masked, T, T - N, generator, cfg.mask_positions)  # (B,T) which
        weights = weigh(num_masked, N, masking)  # (B,) of each hidden token in the loss

        # Predict them in my rows. The losses and gradients of micro-batches add up.
        total = torch.zeros((), device=machine.device)
        for rows in machine.my_rows:
            batch = ask(x_0[rows], mask[rows], weights[rows], mask_id, masking)
            if machine.world > 1:  # exchange gradients once, with the last micro-batch
                network.require_backward_grad_sync = rows == machine.my_rows[-1]
            with machine.autocast():
                value = step_loss(network, hand_over(batch, machine.device))
            (value * machine.world).backward()  # DDP averages over processes, and this is a sum
            total += value.detach()
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), cfg.grad_clip or math.inf)

        # Learn from the errors.
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * cfg.rate(run.step)
            optimizer.step()
            optimizer.zero_grad()
        average(run.ema_model, run.model, cfg.ema_decay, run.step)

        # Look, measure, save. No line above waits for the device. So while a GPU computes, the next
        # batch is prepared, and the numbers of a step are read when the next one is under way.
        out_of_time = cfg.max_minutes is not None and run.minutes > cfg.max_minutes
        stop = torch.full_like(total, out_of_time or bool(signals.received))
        run.send(machine.sum(torch.stack([total, norm / machine.world, stop])))
        run.step += 1
        finished = run.step == cfg.steps  # the last step is always logged and measured
        logging = run.step % cfg.log_interval == 0 or finished
        measuring = run.step % cfg.eval_interval == 0 or finished
        last = run.step == folder.last_step
        late = 0 if logging or measuring or last else machine.steps_late
        stopping = run.receive(late) or last  # all processes read the same numbers
        if logging:
            report(cfg, machine, run, folder, len(batch.positions) / batch.inputs.numel())
        if machine.master and measuring:
            measure(cfg, machine, run, folder, val_file)
        if machine.master and (measuring or stopping):
            folder.save(run)
            run.start_clock()
    del network  # before its process group, which otherwise sometimes hangs
    machine.leave()


@torch.no_grad()  # or the averages would remember the autograd graph of every step
def average(ema_model: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the averaged weights (EMA) a little towards the weights."""
    decay = min(decay, (step + 1) / (step + 10))  # a short memory at first
    torch._foreach_lerp_(list(ema_model.parameters()), list(model.parameters()), 1 - decay)


def build_model(cfg: TrainConfig, train_file: TokenFile) -> Transformer:
    """The network with random weights, or with those of `init_from`."""
    torch.manual_seed(cfg.seed)
    config = cfg.network(train_file.vocab_size)
    model = Transformer(config)
    if cfg.init_from:
        pretrained, info = load_checkpoint(cfg.init_from)
        if info["tokenizer"] != train_file.tokenizer:  # its tokens would mean something else
            raise ConfigError(f"{cfg.init_from} has the vocabulary {info['tokenizer']}, "
                              f"{cfg.data_dir} {train_file.tokenizer}")
        for name in ("n_layer", "n_head", "n_embd", "causal"):  # the context may be another
            if (found := getattr(pretrained.config, name)) != getattr(config, name):
                raise ConfigError(f"init_from has {name} {found}, not {getattr(config, name)}")
        model.load_state_dict(pretrained.state_dict())
    return model


def build_optimizers(cfg: TrainConfig, model: Transformer,
                     dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and AdamW for the rest, or AdamW for all."""
    matrices, tables = optimizer_groups(model)
    adamw = dict(lr=cfg.learning_rate, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)
    if cfg.optimizer == "adamw":
        return [torch.optim.AdamW(matrices + tables, **adamw)]
    # Muon orthogonalises updates, which suits matrices; an embedding's rows are used one by one.
    muon = Muon(matrices, cfg.muon_learning_rate, weight_decay=cfg.weight_decay, dtype=dtype)
    return [muon, torch.optim.AdamW(tables, **adamw)]


def report(cfg: TrainConfig, machine: Machine, run: Run, folder: RunFolder,
           predicted_fraction: float) -> None:
    """A line for log.jsonl, and one for the person in front of the screen."""
    mean = statistics.fmean(run.losses)  # since the last line
    run.losses.clear()
    if machine.master:
        speed = run.steps_per_second() * cfg.batch_size * cfg.context_length  # tokens/s
        flops = flops_per_token(run.model.config, predicted_fraction)
        mfu = speed * flops / (machine.ceiling * machine.world)  # 45% to 75% is usual here
        folder.log({"step": run.step, "loss": mean, "rate": cfg.rate(run.step - 1),
                    "seconds": run.seconds, "tokens_per_second": round(speed), "mfu": mfu})
        left = datetime.timedelta(seconds=round((cfg.steps - run.step) / run.steps_per_second()))
        show(f"step {run.step}/{cfg.steps}  loss {mean:.3f}  {speed:,.0f} tokens/s  MFU {mfu:.0%}  "
             f"{left} left")
    run.start_clock()


def measure(cfg: TrainConfig, machine: Machine, run: Run, folder: RunFolder,
            val_file: TokenFile) -> None:
    """Evaluate the averaged weights on validation text: always the same rows and questions."""
    finished = run.step == cfg.steps
    # Steps are compared on the same rows. The last is measured on more, too, for a smaller error.
    for rows in dict.fromkeys([cfg.eval_rows, cfg.final_eval_rows][: 1 + finished]):
        x_0 = torch.from_numpy(val_file.spread(rows, cfg.context_length)).to(machine.device)
        with machine.autocast():
            bound = evaluate(run.ema_model, x_0, run.model.config.mask_id, cfg.objective,
                             cfg.prefix_length, 30 if finished else 10, machine.rows)
        # Nats per token depend on the tokenizer. Bits per byte can be compared.
        bits_per_byte = bound.nats * val_file.num_tokens / val_file.num_bytes / math.log(2)
        folder.log_evaluation(run.step, bound, bits_per_byte, len(x_0))
    show(f"step {run.step}: validation {describe(bound, bits_per_byte)}", stays=True)


@command("train.py")
def main(arguments: list[str]) -> int:
    path = None
    if arguments and not arguments[0].startswith("-"):
        path, *arguments = arguments  # the TOML file comes first
    return train(load(TrainConfig, path, arguments, "train.py", __doc__, shape_of_start))


if __name__ == "__main__":
    sys.exit(main())
