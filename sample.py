"""Write with a trained model: `python sample.py --checkpoint out/quickstart --prefix "The state of the Union"`

    free text       python sample.py --checkpoint out/x --length 200
    continuation    python sample.py --checkpoint out/x --prefix "Fellow citizens"
    infilling       python sample.py --checkpoint out/x --text "The [MASK:20] of the Union"
    measuring       python sample.py --checkpoint out/x --score FILE

All three kinds of writing are one call of diffusion.denoise: places that hold the mask token are filled,
everything else is given. The text goes to stdout, figures to stderr.
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


def encode_template(text: str, tokenizer: tiktoken.Encoding, mask_id: int) -> list[int]:
    """"The [MASK:20] of" -> token ids with 20 mask tokens in the hole; the text around is encoded as it stands."""
    ids, end = [], 0
    for hole in HOLE.finditer(text):
        ids += tokenizer.encode_ordinary(text[end : hole.start()]) + [mask_id] * int(hole[1] or 1)
        end = hole.end()
    if end == 0:
        raise UsageError('--text has no hole; write one as [MASK:20], for 20 hidden tokens')
    return ids + tokenizer.encode_ordinary(text[end:])


def starting_tokens(args: argparse.Namespace, model: Transformer, tokenizer: tiktoken.Encoding) -> Tensor:
    """(num_samples, T): what is given, and mask tokens where the model shall write."""
    limit, mask_id = model.config.context_length, model.config.mask_id
    if args.text is not None:
        ids = encode_template(args.text, tokenizer, mask_id)
    else:
        prefix = tokenizer.encode_ordinary(args.prefix)
        length = limit - len(prefix) if args.length is None else args.length
        if length < 1:
            raise UsageError(f"the prefix fills {len(prefix)} of {limit} tokens and leaves --length {length} to write")
        ids = prefix + [mask_id] * length
    if len(ids) > limit:
        raise UsageError(f"{len(ids)} tokens asked for, but the model's context is {limit}: shorten the text or --length")
    return torch.tensor([ids] * args.num_samples)


def readable(ids: list[int], tokenizer: tiktoken.Encoding, mask_id: int, whole: bool) -> str:
    """Text of the tokens, hidden places as blocks, cut at the end-of-text token unless `whole`."""
    if not whole and tokenizer.eot_token in ids:
        ids = ids[: ids.index(tokenizer.eot_token)]
    pieces, run = [], []
    for token in [*ids, mask_id]:
        if token != mask_id:
            run.append(token)
            continue
        pieces += [tokenizer.decode(run, errors="replace"), "\N{LIGHT SHADE}"]
        run = []
    text = "".join(pieces[:-1])
    # What a model writes must not drive the terminal: control characters other than newline and tab are shown.
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def score(path: Path, model: Transformer, info: dict, tokenizer: tiktoken.Encoding, device: str) -> None:
    """Print the bound (or, for an autoregressive model, the exact figure) on a text, and the loss by mask level."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--score {path}: {getattr(error, 'strerror', None) or error}") from None
    ids, T = tokenizer.encode_ordinary(text), model.config.context_length
    if not ids:
        raise UsageError(f"--score {path}: the file is empty")
    T = min(T, len(ids))
    rows = len(ids) // T
    x_0 = torch.tensor(ids[: rows * T]).view(rows, T).to(device)
    objective = info["config"]["objective"]
    bound = evaluate(model, x_0, model.config.mask_id, objective)
    num_bytes = len(tokenizer.decode_bytes(ids[: rows * T]))
    sign = "NLL =" if objective == "autoregressive" else "NELBO <="
    print(f"{sign} {bound.nats:.4f} +- {bound.stderr:.4f} nats/token, "
          f"{bound.nats * x_0.numel() / num_bytes / math.log(2):.4f} bits/byte, over {rows} rows of {T} tokens"
          + (f"; the last {len(ids) - rows * T} tokens do not fill a row and were left out" if len(ids) > rows * T else ""))
    if bound.curve:
        print("hidden  nats/token")
        for m, nats, stderr in zip(bound.curve.counts, bound.curve.nats, bound.curve.stderr):
            print(f"{m / bound.curve.N:6.1%}  {nats:.3f} +- {stderr:.3f}")


def write(args: argparse.Namespace, model: Transformer, info: dict, tokenizer: tiktoken.Encoding, device: str) -> None:
    """Sample, print the texts, and say how fast that was."""
    mask_id, objective = model.config.mask_id, info["config"]["objective"]
    x = starting_tokens(args, model, tokenizer).to(device)
    new_tokens = int((x == mask_id).sum())
    options = dict(schedule=args.schedule, order=args.order, temperature=args.temperature)
    if args.sampling == "greedy":
        options["temperature"] = 0.0
    if args.sampling == "topk" or args.top_k is not None:
        options["top_k"] = 50 if args.top_k is None else args.top_k
    if args.sampling == "nucleus" or args.top_p is not None:
        options["top_p"] = 0.9 if args.top_p is None else args.top_p
    steps, network = args.steps or x.size(1), model
    if objective == "autoregressive":  # can only write left to right, a token per call
        network, options["order"], options["schedule"] = left_to_right_model(model, mask_id), "left_to_right", "linear"
        steps = x.size(1)
    elif objective == "mlm":
        print("note: this model was trained to restore a fixed share of hidden tokens (BERT). With more hidden than that, "
              "as in writing from nothing, expect word salad.", file=sys.stderr)
    calls, started = -1, time.perf_counter()
    for state in denoise(network, x, mask_id, steps, generator=torch.Generator().manual_seed(args.seed), **options):
        calls += 1
        if args.show_steps:
            print(f"--- step {calls}: {int((state == mask_id).sum())} tokens hidden")
            for row in state.tolist():
                print(readable(row, tokenizer, mask_id, args.whole))
    seconds = time.perf_counter() - started
    for row in state.tolist() if not args.show_steps else ():
        print(readable(row, tokenizer, mask_id, args.whole), end="\n" if args.num_samples == 1 else "\n---\n")
    print(f"{new_tokens} new tokens in {calls} model calls, {new_tokens / seconds:,.0f} tokens/s", file=sys.stderr)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default="out/quickstart", help="folder that train.py wrote (default: out/quickstart)")
    add("--prefix", help="text to continue")
    add("--text", help="text with holes to fill, such as \"The [MASK:20] of the Union\"")
    add("--length", type=int, help="tokens to write (default: as many as the context holds)")
    add("--num-samples", type=int, default=1, help="texts to write (default: 1)")
    add("--steps", type=int, help="model calls; fewer is faster and worse (default: one for every token)")
    add("--schedule", default="linear", choices=list(SCHEDULES), help="how many tokens stay hidden after each step")
    add("--order", default="random", choices=ORDERS, help="which hidden tokens are committed next (default: random)")
    add("--sampling", choices=("greedy", "topk", "nucleus"), help="how a token is drawn (default: from all)")
    add("--top-k", type=int, help="draw from the K likeliest tokens")
    add("--top-p", type=float, help="draw from the likeliest tokens that together reach probability P")
    add("--temperature", type=float, default=1.0, help="below 1 safer, above 1 wilder, 0 greedy (default: 1)")
    add("--seed", type=int, default=1, help="the same seed writes the same text (default: 1)")
    add("--show-steps", action="store_true", help="print the text after every step")
    add("--whole", action="store_true", help="do not cut the text at the end-of-text token")
    add("--score", type=Path, metavar="FILE", help="measure the model on a text instead of writing")
    add("--device", default="cpu", help="cpu, cuda or mps (default: cpu)")
    args = parser.parse_args(arguments)
    greedy = args.sampling == "greedy" or args.temperature == 0
    if greedy and (args.top_k is not None or args.top_p is not None):
        parser.error("greedy always takes the likeliest token: drop --top-k and --top-p")
    if args.sampling == "topk" and args.top_p is not None or args.sampling == "nucleus" and args.top_k is not None:
        parser.error(f"--sampling {args.sampling} contradicts --top-{'p' if args.sampling == 'topk' else 'k'}; "
                     "leave --sampling out to use both")
    if args.text is not None and (args.prefix is not None or args.length is not None):
        parser.error("--text already says what is given and what is hidden: drop --prefix and --length")
    if args.num_samples < 1:
        parser.error(f"--num-samples must be at least 1, not {args.num_samples}")
    args.prefix = args.prefix or ""
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("device cuda is not available here; use --device cpu")
        model, info = load_checkpoint(args.checkpoint, args.device)
        tokenizer = get_tokenizer(info["tokenizer"])
        if tokenizer.n_vocab != model.config.vocab_size:
            raise UsageError(f"the checkpoint has {model.config.vocab_size} tokens, its tokenizer {tokenizer.n_vocab}")
        if args.score:
            score(args.score, model, info, tokenizer, args.device)
        else:
            write(args, model, info, tokenizer, args.device)
    except (UsageError, CheckpointError, DataError, ValueError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
