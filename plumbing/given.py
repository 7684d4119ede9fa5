"""What sample.py is given: the text to continue or to fill, and the file to score."""

import math
from pathlib import Path

import tiktoken
import torch
from torch import Tensor

from diffusion import evaluate
from model import Transformer
from plumbing.terminal import describe
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


def score(cmd, model: Transformer, info: dict, tokenizer: tiktoken.Encoding) -> None:
    """Print what a text costs the model: the bound (GPT: exact), and the loss by mask level."""
    try:
        ids = tokenizer.encode_ordinary(Path(cmd.score).read_bytes().decode())  # line ends as is
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--score {cmd.score}: {reason}") from None
    if not ids:
        raise ValueError(f"--score {cmd.score}: the file is empty")
    T = min(model.config.context_length, len(ids))
    x_0 = torch.tensor(ids[: len(ids) // T * T]).view(-1, T)  # (B,T), without an unfinished row
    bound = evaluate(model, x_0.to(model.rotary.device), model.config.mask_id,
                     info["config"]["objective"], curve_points=20)
    # Bits per byte compare models of different tokenizers; nats per token don't.
    num_bytes = len(tokenizer.decode_bytes(x_0.flatten().tolist()))
    bits_per_byte = bound.nats * x_0.numel() / math.log(2) / num_bytes
    print(describe(bound, bits_per_byte))
    print(f"  from {x_0.numel()} of {len(ids)} tokens, in rows of {T}")
