"""Write with a trained model: python sample.py --checkpoint out/quickstart --prefix "The state of the Union"

    free text       python sample.py --checkpoint out/quickstart --length 200
    continuation    python sample.py --checkpoint out/quickstart --prefix "Fellow citizens" --length 200
    infilling       python sample.py --checkpoint out/quickstart --text "The [MASK:20] of the Union"
    measuring       python sample.py --checkpoint out/quickstart --score FILE

All three kinds of writing are one call of diffusion.denoise: hidden places are filled, everything else is
given. The text goes to stdout, figures to stderr.
"""

import argparse
import math
import re
import sys
import time
from pathlib import Path

import tiktoken
import torch
from torch import Tensor

from configs import Parser
from diffusion import ORDERS, SCHEDULES, denoise, evaluate, left_to_right_model
from model import CheckpointError, Transformer, load_checkpoint
from prepare_data import DataError, get_tokenizer

HOLE = re.compile(r"\[MASK(?::(\d+))?\]")


class UsageError(Exception):
    """A request that cannot be met; the message is one line for the user."""


def starting_tokens(args: argparse.Namespace, model: Transformer, tokenizer: tiktoken.Encoding) -> Tensor:
    """(num_samples, T): the given tokens, and mask tokens where the model shall write."""
    limit, mask_id = model.config.context_length, model.config.mask_id
    if args.text is not None:
        # re.split with one group: given, size of the hole, given, size of the hole, given ...
        given, sizes = HOLE.split(args.text)[::2], HOLE.split(args.text)[1::2]
        if not sizes:
            raise UsageError("--text has no hole; write one as [MASK:20], for 20 hidden tokens")
        ids = tokenizer.encode_ordinary(given[0])  # the text between holes is encoded as it stands
        for size, text in zip(sizes, given[1:], strict=True):
            ids += [mask_id] * int(size or 1) + tokenizer.encode_ordinary(text)
    else:
        prefix = tokenizer.encode_ordinary(args.prefix or "")
        length = limit - len(prefix) if args.length is None else args.length
        if length < 1:
            raise UsageError(f"a prefix of {len(prefix)} tokens and --length {length} leave nothing to write "
                             f"in a context of {limit}")
        ids = prefix + [mask_id] * length
    if len(ids) > limit:
        raise UsageError(f"{len(ids)} tokens asked for, but the model's context is {limit}: ask for fewer")
    if mask_id not in ids:
        raise UsageError("nothing is hidden, so there is nothing to write")
    return torch.tensor([ids] * args.num_samples)


def readable(ids: list[int], tokenizer: tiktoken.Encoding, mask_id: int, whole: bool) -> str:
    """The text of `ids`, hidden places as blocks, cut at the end-of-text token unless `whole`."""
    if tokenizer.eot_token in ids and not whole:
        ids = ids[: ids.index(tokenizer.eot_token)]
    text, shown = "", []
    for token in [*ids, mask_id]:  # decode runs of visible tokens: one character may take several
        if token == mask_id:
            text, shown = text + tokenizer.decode(shown) + "\N{LIGHT SHADE}", []
        else:
            shown.append(token)
    # What a model writes must not drive the terminal: control characters are spelled out.
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text[:-1])


def score(args: argparse.Namespace, model: Transformer, info: dict, tokenizer: tiktoken.Encoding) -> None:
    """Print what a text costs the model: the bound (GPT: the exact figure), and the loss by mask level."""
    try:
        ids = tokenizer.encode_ordinary(args.score.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--score {args.score}: {getattr(error, 'strerror', None) or error}") from None
    if not ids:
        raise UsageError(f"--score {args.score}: the file is empty")
    T = min(model.config.context_length, len(ids))
    x_0 = torch.tensor(ids[: len(ids) // T * T]).view(-1, T)  # (B,T): a last row that is not full is left out
    objective = info["config"]["objective"]
    bound = evaluate(model, x_0.to(args.device), model.config.mask_id, objective, curve_points=20)
    bits = bound.nats * x_0.numel() / math.log(2) / len(tokenizer.decode_bytes(x_0.flatten().tolist()))
    print(f"{'NLL' if objective == 'autoregressive' else 'NELBO <='} {bound.nats:.4f} +- {bound.stderr:.4f} "
          f"nats/token, {bits:.4f} bits/byte ({x_0.numel()} of {len(ids)} tokens, in rows of {T})")
    if bound.curve:
        N, *points = bound.curve
        for m, nats, stderr in zip(*points, strict=True):
            print(f"{m / N:6.1%} hidden: {nats:.3f} +- {stderr:.3f} nats/token")


def write(args: argparse.Namespace, model: Transformer, info: dict, tokenizer: tiktoken.Encoding) -> None:
    """Sample, print the texts, and say what they cost."""
    mask_id, objective = model.config.mask_id, info["config"]["objective"]
    x = starting_tokens(args, model, tokenizer).to(args.device)
    hidden = x == mask_id
    options = dict(steps=args.steps if args.steps is not None else int(hidden.sum(1).max()),
                   schedule=args.schedule, order=args.order, temperature=args.temperature,
                   top_k=args.top_k, top_p=args.top_p)
    if objective == "autoregressive":
        options |= dict(steps=x.size(1), schedule="linear", order="left_to_right")
        print("note: an autoregressive model writes left to right, a token per step", file=sys.stderr)
    elif objective == "mlm":
        print("note: this model learned to restore a fixed, small share of a text (BERT). It has never seen "
              "emptier ones: expect word salad when most of the text is hidden", file=sys.stderr)
    network = left_to_right_model(model, mask_id) if objective == "autoregressive" else model
    started = time.perf_counter()
    states = denoise(network, x, mask_id, generator=torch.Generator().manual_seed(args.seed), **options)
    for calls, state in enumerate(states):
        if args.show_steps:
            print(f"--- step {calls}: {int((state == mask_id).sum())} tokens hidden")
            for row in state.tolist():
                print(readable(row, tokenizer, mask_id, args.whole))
    seconds = time.perf_counter() - started
    if not args.show_steps:
        print("\n---\n".join(readable(row, tokenizer, mask_id, args.whole) for row in state.tolist()))
    print(f"{int(hidden.sum())} new tokens in {calls} model calls, {hidden.sum() / seconds:,.0f} tokens/s",
          file=sys.stderr)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="sample.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default="out/quickstart", help="folder that train.py wrote (default: out/quickstart)")
    add("--prefix", help="text to continue")
    add("--text", help='text with holes to fill, such as "The [MASK:20] of the Union"')
    add("--length", type=int, help="tokens to write (default: as many as the context holds)")
    add("--num-samples", type=int, default=1, help="texts to write (default: 1)")
    add("--steps", type=int, help="model calls; fewer is faster and worse (default: one per hidden token)")
    add("--schedule", default="linear", choices=list(SCHEDULES), help="of hidden tokens (default: linear)")
    add("--order", default="random", choices=ORDERS, help="which are committed next (default: random)")
    add("--sampling", choices=("greedy", "topk", "nucleus"), help="how a token is drawn (default: from all)")
    add("--top-k", type=int, help="draw from the K likeliest tokens (50 with --sampling topk)")
    add("--top-p", type=float, help="draw from the likeliest that reach probability P (nucleus: 0.9)")
    add("--temperature", type=float, default=1.0, help="below 1 safer, above 1 wilder, 0 greedy (default: 1)")
    add("--seed", type=int, default=1, help="the same seed writes the same text (default: 1)")
    add("--show-steps", action="store_true", help="print the text after every step")
    add("--whole", action="store_true", help="do not cut the text at the end-of-text token")
    add("--score", type=Path, metavar="FILE", help="measure the model on a text instead of writing")
    add("--device", default="cpu", choices=("cpu", "cuda", "mps"), help="(default: cpu)")
    args = parser.parse_args(arguments)
    if (args.sampling == "greedy" or args.temperature == 0) and (args.top_k or args.top_p):
        parser.error("greedy takes the likeliest token: drop --top-k and --top-p")
    if args.sampling == "topk" and args.top_p or args.sampling == "nucleus" and args.top_k:
        parser.error(f"--sampling {args.sampling} contradicts the other limit: leave it out to use both")
    if args.text is not None and (args.prefix is not None or args.length is not None):
        parser.error("--text says what is given and what is hidden: drop --prefix and --length")
    if args.num_samples < 1:
        parser.error(f"--num-samples must be at least 1, not {args.num_samples}")
    args.temperature = 0.0 if args.sampling == "greedy" else args.temperature
    args.top_k = 50 if args.sampling == "topk" and args.top_k is None else args.top_k
    args.top_p = 0.9 if args.sampling == "nucleus" and args.top_p is None else args.top_p
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        if not {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}[args.device].is_available():
            raise UsageError(f"device {args.device} is not available here; use --device cpu")
        model, info = load_checkpoint(args.checkpoint, args.device)
        (score if args.score else write)(args, model, info, get_tokenizer(info["tokenizer"]))
    except (UsageError, CheckpointError, DataError, ValueError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
