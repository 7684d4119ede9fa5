"""How fast is the classical stack? python -m bench.transformers_baseline --shape shakespeare

    masked    this repository, as bench/training.py measures it
    roberta   the transformers package: RobertaForMaskedLM of the same shape with its own loss, rows
              masked by DataCollatorForLanguageModeling, PyTorch's attention kernel, no dropout

A step of each in turn, in one process, with equally many rows, autocast, AdamW, both compiled or
neither. The numbers are medians over the repeats, after the first steps (which compile). Ends with
one JSON line. Needs pip install transformers.
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
from torch import Tensor

from bench.training import SHAPES, Way
from diffusion import keyed_generator
from model import ModelConfig
from plumbing.command import command
from plumbing.config import Parser
from plumbing.machine import (
    autocast,
    can_compile,
    choose_device,
    choose_dtype,
    count_parameters,
    keep_freed_memory,
)

# RoBERTa's first ids. Real tokens follow these two, the mask token is the last.
START = 0
PAD = 1
SPECIAL = 2


def roberta(config: ModelConfig, mlm_probability: float) -> tuple[torch.nn.Module, Callable]:
    """(RobertaForMaskedLM of this shape, the collator that masks for it).

    Every hidden token is shown as the mask token; rows are full, so there is nothing to pad.
    """
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    transformers.logging.set_verbosity_error()
    names = ["<s>", "<pad>", *map(str, range(config.vocab_size)), "<mask>"]
    ids = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<s>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=ids, pad_token="<pad>", mask_token="<mask>",
        model_input_names=["input_ids"])
    collator = transformers.DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=mlm_probability, mask_replace_prob=1.0, random_replace_prob=0.0)
    model = transformers.RobertaForMaskedLM(transformers.RobertaConfig(
        vocab_size=math.ceil(len(names) / 64) * 64,  # as this repository's table
        max_position_embeddings=config.context_length + SPECIAL,  # it counts from PAD + 1
        hidden_size=config.n_embd, num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head, intermediate_size=4 * config.n_embd,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, type_vocab_size=1,
        bos_token_id=START, pad_token_id=PAD, eos_token_id=START, attn_implementation="sdpa"))
    return model.train(), collator


class Classical:
    """What bench.training.Way is, with the other stack."""

    def __init__(self, args: argparse.Namespace):
        torch.manual_seed(0)
        self.name = "roberta"
        self.args = args
        self.model, self.collator = roberta(args.config, args.mlm_probability)
        self.model.to(args.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.network = torch.compile(self.model) if args.compile else self.model
        self.seconds: list[float] = []

    def turn(self, number: int, steps: int) -> float:
        """Time `steps` steps in a row; the loss of the last."""
        started = time.perf_counter()
        for i in range(steps):
            value = self.step(number * steps + i)
        loss = value.item()  # waits for the device
        self.seconds.append((time.perf_counter() - started) / steps)
        return loss

    def step(self, number: int) -> Tensor:
        """One step on random tokens, its masking included; its loss."""
        device = self.args.device
        T = self.args.config.context_length
        x_0 = torch.randint(self.args.config.vocab_size, (self.args.rows, T),
                            generator=keyed_generator(0, number, "x"))
        no_special = torch.zeros(T, dtype=torch.int64)  # saves the collator a search in Python
        examples = [{"input_ids": row, "special_tokens_mask": no_special} for row in x_0 + SPECIAL]
        batch = self.collator(examples)
        inputs = batch["input_ids"].to(device)
        labels = batch["labels"].to(device)
        with autocast(device, self.args.dtype):
            value = self.network(input_ids=inputs, labels=labels).loss
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value.detach()


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="bench.transformers_baseline", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="shakespeare")
    add("--rows", type=int, help="per step (default: fits the device)")
    add("--mlm-probability", type=float, default=0.15,
        help="fraction hidden by the collator (default: 0.15)")
    add("--repeats", type=int, default=5)
    add("--warm-up", type=int, default=2, help="turns of each that do not count (default: 2)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add("--precision", default="auto", choices=("auto", "bfloat16", "float32"))
    add("--compile", action=argparse.BooleanOptionalAction, default=True,
        help="both stacks (default: yes)")
    args = parser.parse_args(arguments)
    if importlib.util.find_spec("transformers") is None:
        parser.error("the classical stack is not installed: pip install transformers")
    if min(args.repeats, args.warm_up + 1, 1 if args.rows is None else args.rows) < 1:
        parser.error("--repeats and --rows must be at least 1, --warm-up at least 0")
    if not 0 < args.mlm_probability <= 1:
        parser.error(f"--mlm-probability must be in (0, 1], not {args.mlm_probability}")
    args.device = choose_device(args.device)
    args.dtype = choose_dtype(args.precision, args.device)
    args.optimizer = "adamw"
    args.compile = args.compile and can_compile()
    args.config, rows_cpu, rows_gpu = SHAPES[args.shape]
    args.rows = args.rows or (rows_gpu if args.device.type == "cuda" else rows_cpu)
    return args


@command("bench.transformers_baseline")
def main(arguments: list[str]) -> None:
    args = parse(arguments)
    import transformers

    keep_freed_memory()
    ways = [Way("masked", args), Classical(args)]
    tokens = args.rows * args.config.context_length
    print(f"{args.shape}: {args.rows} rows of {args.config.context_length} tokens, {args.dtype}, "
          f"{'compiled' if args.compile else 'eager'}, AdamW, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    steps = 10 if args.device.type == "cuda" else 1
    for number in range(args.warm_up + args.repeats):
        for way in ways:
            value = way.turn(number, steps)
            print(f"  turn {number} of {args.warm_up + args.repeats} {way.name}: "
                  f"{way.seconds[-1]:.3f} s a step, loss {value:.3f}", file=sys.stderr, flush=True)

    results = {}
    print("\nway      parameters  tokens/s   spread  first turn")
    for way in ways:
        seconds = way.seconds[args.warm_up :]
        row = {"parameters": count_parameters(way.model),
               "spread": max(seconds) / min(seconds) - 1,
               "tokens_per_second": tokens / statistics.median(seconds),
               "first_turn_seconds": way.seconds[0]}
        results[way.name] = row
        print(f"{way.name:8} {row['parameters'] / 1e6:9.1f}M {row['tokens_per_second']:9,.0f} "
              f"{row['spread']:8.1%} {row['first_turn_seconds']:9.1f} s")
    ratio = results["masked"]["tokens_per_second"] / results["roberta"]["tokens_per_second"]
    print(f"masked is {ratio:.2f} times as fast")
    print(json.dumps({"shape": args.shape, "rows": args.rows, "config": vars(args.config),
                      "dtype": str(args.dtype), "device": str(args.device),
                      "compiled": args.compile, "torch": torch.__version__,
                      "transformers": transformers.__version__,
                      "mlm_probability": args.mlm_probability, "ratio": ratio, "ways": results}))


if __name__ == "__main__":
    sys.exit(main())
