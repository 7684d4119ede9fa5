"""How fast is the classical stack? python -m bench.transformers_baseline --shape shakespeare

    masked    this repository, as bench/training.py measures it
    roberta   the transformers package: RobertaForMaskedLM of the same shape with its own loss, rows masked by
              DataCollatorForLanguageModeling, PyTorch's attention kernel, no dropout

A step of each in turn, in one process, with equally many rows, autocast, AdamW, both compiled or neither.
Figures are medians over the repeats, after the first steps (which compile). Ends with one JSON line. Needs
pip install transformers.
"""

import argparse
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable

import torch

from bench.training import SHAPES, Way
from configs import ConfigError, Parser
from diffusion import keyed_generator
from model import ModelConfig, choose_dtype, count_parameters
from train import can_compile, choose_device, keep_freed_memory

START, PAD, SPECIAL = 0, 1, 2  # RoBERTa's first ids; real tokens follow these two, the mask token is the last


def roberta(config: ModelConfig, mlm_probability: float) -> tuple[torch.nn.Module, Callable]:
    """(RobertaForMaskedLM of this shape, the collator that masks for it). Every hidden token is shown as the
    mask token; rows are full, so there is nothing to pad."""
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    transformers.logging.set_verbosity_error()
    V, T = config.vocab_size, config.context_length
    names = ["<s>", "<pad>", *map(str, range(V)), "<mask>"]
    ids = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<s>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=ids, pad_token="<pad>", mask_token="<mask>", model_input_names=["input_ids"])
    collator = transformers.DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=mlm_probability, mask_replace_prob=1.0, random_replace_prob=0.0)
    model = transformers.RobertaForMaskedLM(transformers.RobertaConfig(
        vocab_size=math.ceil(len(names) / 64) * 64,  # as this repository's table
        max_position_embeddings=T + SPECIAL,  # it counts places from PAD + 1
        hidden_size=config.n_embd, num_hidden_layers=config.n_layer, num_attention_heads=config.n_head,
        intermediate_size=4 * config.n_embd, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        type_vocab_size=1, bos_token_id=START, pad_token_id=PAD, eos_token_id=START,
        attn_implementation="sdpa"))
    return model.train(), collator


class Classical:
    """What bench.training.Way is, with the other stack."""

    def __init__(self, args: argparse.Namespace):
        torch.manual_seed(0)
        self.name, self.config, self.rows, self.args = "roberta", args.config, args.rows, args
        self.model, self.collator = roberta(args.config, args.mlm_probability)
        self.model.to(args.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.network = torch.compile(self.model) if args.compile else self.model
        self.seconds: list[float] = []

    def step(self, number: int) -> float:
        """One step on random tokens, its masking included; its loss."""
        device, T = self.args.device, self.config.context_length
        x_0 = torch.randint(self.config.vocab_size, (self.rows, T), generator=keyed_generator(0, number, "x"))
        no_special = torch.zeros(T, dtype=torch.int64)  # saves the collator a search in Python
        examples = [{"input_ids": row, "special_tokens_mask": no_special} for row in x_0 + SPECIAL]
        started = time.perf_counter()
        batch = self.collator(examples)
        inputs, labels = batch["input_ids"].to(device), batch["labels"].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.args.dtype == torch.bfloat16):
            value = self.network(input_ids=inputs, labels=labels).loss
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - started)
        return value.item()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="bench.transformers_baseline", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="shakespeare")
    add("--rows", type=int, help="per step (default: fits the device)")
    add("--mlm-probability", type=float, default=0.15, help="share hidden by the collator (default: 0.15)")
    add("--repeats", type=int, default=5)
    add("--warm-up", type=int, default=2, help="steps of each that are not counted (default: 2)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add("--precision", default="auto", choices=("auto", "bfloat16", "float32"))
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="both stacks (default: yes)")
    args = parser.parse_args(arguments)
    if importlib.util.find_spec("transformers") is None:
        parser.error("the classical stack is not installed: pip install transformers")
    if min(args.repeats, args.warm_up + 1, 1 if args.rows is None else args.rows) < 1:
        parser.error("--repeats and --rows must be at least 1, --warm-up at least 0")
    if not 0 < args.mlm_probability <= 1:
        parser.error(f"--mlm-probability must be in (0, 1], not {args.mlm_probability}")
    try:
        args.device = choose_device(args.device)
    except ConfigError as error:
        parser.error(str(error))
    args.dtype, args.optimizer = choose_dtype(args.precision, args.device), "adamw"
    args.compile = args.compile and can_compile()
    args.config, rows_cpu, rows_gpu = SHAPES[args.shape]
    args.rows = args.rows or (rows_gpu if args.device.type == "cuda" else rows_cpu)
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    import transformers

    keep_freed_memory()
    ways, tokens = [Way("masked", args), Classical(args)], args.rows * args.config.context_length
    print(f"{args.shape}: {args.rows} rows of {args.config.context_length} tokens, {args.dtype}, "
          f"{'compiled' if args.compile else 'eager'}, AdamW, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    for number in range(args.warm_up + args.repeats):
        for way in ways:
            value = way.step(number)
            print(f"  step {number} of {args.warm_up + args.repeats} {way.name}: {way.seconds[-1]:.2f} s, "
                  f"loss {value:.3f}", file=sys.stderr, flush=True)

    figures = {}
    print("\nway      parameters  tokens/s   spread  first step")
    for way in ways:
        seconds = way.seconds[args.warm_up :]
        row = figures[way.name] = {
            "parameters": count_parameters(way.model), "spread": max(seconds) / min(seconds) - 1,
            "tokens_per_second": tokens / statistics.median(seconds),
            "first_step_seconds": way.seconds[0]}
        print(f"{way.name:8} {row['parameters'] / 1e6:9.1f}M {row['tokens_per_second']:9,.0f} "
              f"{row['spread']:8.1%} {row['first_step_seconds']:9.1f} s")
    ratio = figures["masked"]["tokens_per_second"] / figures["roberta"]["tokens_per_second"]
    print(f"masked is {ratio:.2f} times as fast")
    print(json.dumps({"shape": args.shape, "rows": args.rows, "config": vars(args.config),
                      "dtype": str(args.dtype), "device": str(args.device), "compiled": args.compile,
                      "torch": torch.__version__, "transformers": transformers.__version__,
                      "mlm_probability": args.mlm_probability, "ratio": ratio, "ways": figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
