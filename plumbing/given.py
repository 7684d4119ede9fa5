"""What sample.py is given: how to write, the text to continue or to fill, the file to score."""

import math
from collections.abc import Callable
from pathlib import Path

import tiktoken
import torch
from torch import Tensor

from diffusion import Bound, Curve, evaluate, optimal_schedule, smooth
from model import Transformer
from plumbing.adjust import ban, chain, penalize_repetition
from plumbing.terminal import describe, put
from plumbing.text import tokens_with_holes


def starting_tokens(cmd, model: Transformer, tokenizer: tiktoken.Encoding) -> Tensor:
    """(num_samples,T): the given tokens, and mask tokens where the model shall write."""
    limit = model.config.context_length
    mask_id = model.config.mask_id
    if cmd.text is not None:
        ids = tokens_with_holes(cmd.text, tokenizer, mask_id)
    else:
        prefix = tokenizer.encode_ordinary(cmd.prefix or "")
        length = limit - len(prefix) if cmd.length is None else cmd.length
        ids = prefix + [mask_id] * min(length, 10**7)  # a typo must not fill the memory
    if len(ids) > limit:
        raise ValueError(f"{len(ids)} tokens are too many: the model's context is {limit}")
    if mask_id not in ids:
        raise ValueError(f"nothing is hidden in {len(ids)} tokens, so there is nothing to write")
    return torch.tensor([ids] * cmd.num_samples, device=model.rotary.device)


def options_for(cmd, info: dict, tokenizer: tiktoken.Encoding, x: Tensor) -> dict:
    """The options of `denoise`: what the user asked for, as far as this model can do it, to fill
    x (B,T), whose rows have the same holes."""
    hidden = (x[0] == info["model"]["vocab_size"]).tolist()
    tail = hidden[::-1].index(False) if False in hidden else len(hidden)  # the last hole
    infilling = sum(hidden) > tail
    autoregressive = info["config"]["objective"] == "autoregressive"
    if infilling and autoregressive:
        raise ValueError("an autoregressive model (GPT) does not see what follows a hole: "
                         "end --text with its only hole")
    options = cmd.sampler_options()
    short = {"greedy": {"temperature": 0.0}, "topk": {"top_k": cmd.top_k or 200},
             "nucleus": {"top_p": cmd.top_p or 0.9, "top_k": None}}
    options |= short.get(cmd.sampling, {})
    if cmd.exact:
        options |= {"order": "random", "top_k": None}
    elif cmd.block_length is None:
        options["steps"] = cmd.steps or 16
    banned = [ban(tokenizer.encode_ordinary(cmd.ban))] if cmd.ban else []
    penalty = [penalize_repetition(cmd.repetition_penalty)] if cmd.repetition_penalty else []
    if infilling:  # an end of the text would cut off what is given after it
        banned.append(ban([tokenizer.eot_token], before=len(hidden) - tail))
    options["adjust"] = chain(banned + penalty)
    if autoregressive:
        put("note: an autoregressive model (GPT) writes left to right, one token per step, "
            "whatever the other options say", screen="stderr")
        kept = ("temperature", "top_k", "top_p", "adjust")
        return {name: options[name] for name in kept} | {"order": "left_to_right"}
    if info["config"]["objective"] == "mlm":
        put("note: BERT never learned to write a whole text: expect word salad", screen="stderr")
    if cmd.schedule == "optimal":
        try:
            # The context length of the network, whatever the curve of the file claims.
            curve = info["evaluation"]["curve"] | {"N": info["model"]["context_length"]}
            curve = smooth(Curve(**curve))
        except (ArithmeticError, AttributeError, LookupError, TypeError):
            raise ValueError("schedule optimal needs a checkpoint that was evaluated") from None
        options["schedule"] = optimal_schedule(curve, options["steps"])
    return options


def score(cmd, model: Transformer, info: dict, tokenizer: tiktoken.Encoding,
          exact_nll: Callable[..., Bound]) -> None:
    """Print what a text costs: the bound (GPT: exact), the loss by mask level, and the price of the
    sampler that the options describe, by exact_nll of sample.py, which plumbing may not import."""
    try:
        ids = tokenizer.encode_ordinary(Path(cmd.score).read_bytes().decode())  # line ends as is
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"--score {cmd.score}: {reason}") from None
    if not ids:
        raise ValueError(f"--score {cmd.score}: the file is empty")
    T = min(model.config.context_length, len(ids))
    x_0 = torch.tensor(ids[: len(ids) // T * T]).view(-1, T)  # (B,T), without an unfinished row
    x_0 = x_0.to(model.rotary.device)
    mask_id = model.config.mask_id
    objective = info["config"]["objective"]
    bound = evaluate(model, x_0, mask_id, objective, curve_points=20)
    # Bits per byte compare models of different tokenizers; nats per token don't.
    num_bytes = len(tokenizer.decode_bytes(x_0.flatten().tolist()))
    bits_per_nat = x_0.numel() / math.log(2) / num_bytes
    print(describe(bound, bound.nats * bits_per_nat))
    if objective == "diffusion" and cmd.exact:
        print("the sampler of --exact (random order, a call per token) costs at most that")
    elif objective == "diffusion":
        options = options_for(cmd, info, tokenizer, torch.full_like(x_0, mask_id))
        for name in ("temperature", "top_k", "top_p"):  # it is of temperature 1
            del options[name]
        try:
            exact = exact_nll(model, x_0, mask_id, **options)
            print(f"order {cmd.order} in {options['steps'] or T} calls, at temperature 1: "
                  f"{describe(exact, exact.nats * bits_per_nat)}")
        except ValueError as error:
            print(f"order {cmd.order}: {error}")
    print(f"  from {x_0.numel()} of {len(ids)} tokens, in rows of {T}")
