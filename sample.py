"""Write with a trained model: python sample.py --checkpoint out/quickstart --prefix "The state of the Union"

    free text       python sample.py --checkpoint out/quickstart --length 200
    continuation    python sample.py --checkpoint out/quickstart --prefix "Fellow citizens" --length 200
    infilling       python sample.py --checkpoint out/quickstart --text "The [MASK:20] of the Union"
    measuring       python sample.py --checkpoint out/quickstart --score FILE

All three kinds of writing are one call of diffusion.denoise: hidden places are filled, everything else is
given. The text goes to stdout, figures to stderr. --show-steps shows it being written.
"""

import argparse
import codecs
import contextlib
import itertools
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import tiktoken
import torch
from torch import Tensor

import diffusion
from configs import Parser
from model import CheckpointError, Transformer, has_bfloat16, load_checkpoint
from prepare_data import DataError, get_tokenizer

HOLE = re.compile(r"\[MASK(?::(\d+))?\]")


def starting_tokens(args: argparse.Namespace, model: Transformer, tokenizer: tiktoken.Encoding) -> Tensor:
    """(num_samples, T): the given tokens, and mask tokens where the model shall write."""
    limit, mask_id = model.config.context_length, model.config.mask_id
    if args.text is not None:
        # re.split with one group: given, size of the hole, given, size of the hole, given ...
        texts, sizes = HOLE.split(args.text)[::2], HOLE.split(args.text)[1::2]
        if not sizes:
            raise ValueError("--text has no hole; write one as [MASK:20], for 20 hidden tokens")
        given = [tokenizer.encode_ordinary(text) for text in texts]  # as it stands, spaces included
        holes = [int(size or 1) for size in sizes]
    else:
        prefix = tokenizer.encode_ordinary(args.prefix or "")
        length = limit - len(prefix) if args.length is None else args.length
        if length < 1:
            raise ValueError(f"a prefix of {len(prefix)} tokens and --length {length} leave nothing to write "
                             f"in a context of {limit}")
        given, holes = [prefix, []], [length]
    total = sum(map(len, given)) + sum(holes)
    if total > limit:
        raise ValueError(f"{total} tokens asked for, but the model's context is {limit}: ask for fewer")
    if not any(holes):
        raise ValueError("nothing is hidden, so there is nothing to write")
    ids = given[0]
    for hole, following in zip(holes, given[1:], strict=True):
        ids = ids + [mask_id] * hole + following
    return torch.tensor([ids] * args.num_samples)


def token_texts(ids: list[int], tokenizer: tiktoken.Encoding, mask_id: int, whole: bool) -> list[str | None]:
    """What each token adds to the text, None where hidden; up to the end-of-text token unless `whole`.

    A character of several tokens comes with the last of them. What a model writes must not drive the
    terminal: control characters are spelled out.
    """
    if tokenizer.eot_token in ids and not whole:
        ids = ids[: ids.index(tokenizer.eot_token)]
    decoder, texts = codecs.getincrementaldecoder("utf-8")("replace"), []
    for token, following in zip(ids, [*ids[1:], mask_id], strict=False):
        text = None
        if token != mask_id:
            text = decoder.decode(tokenizer.decode_single_token_bytes(token), final=following == mask_id)
            text = "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
        texts.append(text)
    return texts


HIDDEN, REMASKED = "\N{LIGHT SHADE}", "\N{DARK SHADE}"


def draw(text: str | None, before: int, now: int, probability: float, color: bool) -> str:
    """One place of the view. In colour: black on green where just committed, red where hidden again, plain
    where given, otherwise grey, the brighter the surer the network was."""
    if text is None:
        style, text = ("2", HIDDEN) if before == now else ("31", REMASKED)
    elif before != now:
        style = "30;42"
    else:
        style = f"38;5;{240 + int(15 * probability)}" if probability < 1 else "0"
    return f"\033[{style}m{text}\033[0m" if color else text


def show(step: int, hidden: int, texts: list, before: list, now: list, probability: list) -> None:
    """A frame of --show-steps, lists (B,T): in place on a terminal, otherwise a group of lines."""
    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    color = terminal and not os.environ.get("NO_COLOR")
    print(("\033[H\033[J" if terminal else "") + f"--- step {step}: {hidden} tokens hidden")
    for row in zip(texts, before, now, probability, strict=True):
        print("".join(draw(*place, color) for place in zip(*row, strict=False)))


def score(args: argparse.Namespace, model: Transformer, info: dict, tokenizer: tiktoken.Encoding) -> None:
    """Print what a text costs the model: the bound (GPT: the exact figure), and the loss by mask level."""
    try:
        ids = tokenizer.encode_ordinary(args.score.read_bytes().decode())  # line ends as they are
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--score {args.score}: {getattr(error, 'strerror', None) or error}") from None
    if not ids:
        raise ValueError(f"--score {args.score}: the file is empty")
    T = min(model.config.context_length, len(ids))
    x_0 = torch.tensor(ids[: len(ids) // T * T]).view(-1, T)  # (B,T): a last row that is not full is left out
    objective = info["config"]["objective"]
    bound = diffusion.evaluate(model, x_0.to(args.device), model.config.mask_id, objective, curve_points=20)
    bits = bound.nats * x_0.numel() / math.log(2) / len(tokenizer.decode_bytes(x_0.flatten().tolist()))
    print(f"{'NLL' if objective == 'autoregressive' else 'NELBO <='} {bound.nats:.4f} +- {bound.stderr:.4f} "
          f"nats/token, {bits:.4f} bits/byte ({x_0.numel()} of {len(ids)} tokens, in rows of {T})")
    if bound.curve:
        N, *points = bound.curve
        for m, nats, stderr in zip(*points, strict=True):
            print(f"{m / N:6.1%} hidden: {nats:.3f} +- {stderr:.3f} nats/token")


def sampling_options(args: argparse.Namespace, info: dict, tokenizer: tiktoken.Encoding, holes: int) -> dict:
    """The arguments of `denoise` that the user asked for; `holes` are the hidden tokens of a row."""
    changes = [diffusion.ban(tokenizer.encode_ordinary(args.ban))] if args.ban else []
    if args.repetition_penalty is not None:
        changes.append(diffusion.penalize_repetition(args.repetition_penalty))

    def adjust(logits: Tensor, x: Tensor, positions: Tensor) -> Tensor:
        for change in changes:
            logits = change(logits, x, positions)
        return logits

    options = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, adjust=adjust)
    if info["config"]["objective"] == "autoregressive":
        print("note: an autoregressive model writes left to right, a token per step, whatever the schedule, "
              "order and remasking", file=sys.stderr)
        return options | dict(steps=holes, order="left_to_right")
    if info["config"]["objective"] == "mlm":
        print("note: this model learned to restore a fixed, small share of a text (BERT). It has never seen "
              "emptier ones: expect word salad when most of the text is hidden", file=sys.stderr)
    options |= dict(steps=holes if args.steps is None else args.steps, schedule=args.schedule,
                    order=args.order, remask=args.remask, threshold=args.threshold,
                    block_length=args.block_length, gumbel=args.gumbel)
    if args.schedule == "optimal":
        try:
            curve = info["evaluation"]["curve"] | {"N": info["model"]["context_length"]}  # whatever it claims
            curve = diffusion.smooth(diffusion.Curve(**curve))
        except (ArithmeticError, AttributeError, LookupError, TypeError):
            raise ValueError("schedule optimal needs a checkpoint that was evaluated; this was not") from None
        options["schedule"] = diffusion.optimal_schedule(curve, options["steps"])
    return options


def write(args: argparse.Namespace, model: Transformer, info: dict, tokenizer: tiktoken.Encoding) -> None:
    """Sample, print the texts (or every state of them), and say what they cost."""
    mask_id = model.config.mask_id
    x = starting_tokens(args, model, tokenizer).to(args.device)  # (B,T), the same holes in each row
    holes = int((x[0] == mask_id).sum())
    options = sampling_options(args, info, tokenizer, holes)
    network = diffusion.left_to_right_model(model, mask_id) if model.config.causal else model
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(args.seed)
    states = diffusion.denoise(network, x, mask_id, generator=generator, **options)
    start, before = next(states), x.tolist()  # bad options are refused here, before a file is opened
    with (torch.autocast(args.device, torch.bfloat16, enabled=has_bfloat16(x.device)),  # twice as fast
          open(args.jsonl, "w", encoding="utf-8") if args.jsonl else contextlib.nullcontext() as log):
        for step, state in enumerate(itertools.chain([start], states)):
            if log or args.show_steps:
                now, probability = state.tokens.tolist(), state.probability.tolist()
                texts = [token_texts(ids, tokenizer, mask_id, args.whole) for ids in now]
            if log:
                line = {"step": step, "tokens": now, "probability": probability, "texts": texts}
                print(json.dumps(line), file=log)
            if args.show_steps:
                show(step, int((state.tokens == mask_id).sum()), texts, before, now, probability)
                before = now
    seconds = time.perf_counter() - started
    if not args.show_steps:
        texts = [token_texts(ids, tokenizer, mask_id, args.whole) for ids in state.tokens.tolist()]
        print("\n---\n".join("".join(text) for text in texts))
    new = holes * len(x)
    print(f"{new} new tokens in {state.calls} model calls, {new / seconds:,.0f} tokens/s", file=sys.stderr)


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
    add("--schedule", default="linear", choices=[*diffusion.SCHEDULES, "optimal"],
        help="how many stay hidden after each step; optimal: by the model's losses on whole texts")
    add("--order", default="random", choices=list(diffusion.ORDERS), help="which are committed next")
    add("--gumbel", type=float, default=0.0, help="random noise on the order (0: none; 1: much)")
    add("--remask", default="none", choices=list(diffusion.REMASKS), help="which are hidden again")
    add("--threshold", type=float, help="also commit all tokens surer than this; suits --order confidence")
    add("--block-length", type=int, help="write blocks of so many tokens, left to right")
    add("--sampling", choices=("greedy", "topk", "nucleus"), help="how a token is drawn (default: from all)")
    add("--top-k", type=int, help="draw from the K likeliest tokens (50 with --sampling topk)")
    add("--top-p", type=float, help="draw from the likeliest that reach probability P (nucleus: 0.9)")
    add("--temperature", type=float, default=1.0, help="below 1 safer, above 1 wilder, 0 greedy (default: 1)")
    add("--repetition-penalty", type=float, help="divides the odds of tokens already there; 1.2 is usual")
    add("--ban", metavar="CHARACTERS", help="never write the tokens of this text")
    add("--seed", type=int, default=1, help="the same seed writes the same text (default: 1)")
    add("--show-steps", action="store_true", help="watch the text being written")
    add("--jsonl", type=Path, metavar="FILE", help="write every step to a file, for other programs")
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
    if args.schedule == "optimal" and args.block_length:
        parser.error("--schedule optimal is computed for whole texts: drop --block-length")
    if args.gumbel and diffusion.ORDERS[args.order] is None:
        parser.error(f"--gumbel changes nothing for order {args.order}: use confidence, margin or entropy")
    if args.jsonl and not args.jsonl.parent.is_dir():
        parser.error(f"--jsonl {args.jsonl}: there is no folder {args.jsonl.parent}")
    for name in ("prefix", "text", "ban"):
        if re.search("[\ud800-\udfff]", getattr(args, name) or ""):  # the tokenizer would replace them
            parser.error(f"--{name} is not Unicode text")
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
            raise ValueError(f"device {args.device} is not available here; use --device cpu")
        model, info = load_checkpoint(args.checkpoint, args.device)
        tokenizer = get_tokenizer(info["tokenizer"])
        if tokenizer.n_vocab != model.config.vocab_size:
            raise CheckpointError(f"{args.checkpoint} has not the vocabulary of {info['tokenizer']}")
        (score if args.score else write)(args, model, info, tokenizer)
    except (CheckpointError, DataError, ValueError, MemoryError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, OSError) else 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
