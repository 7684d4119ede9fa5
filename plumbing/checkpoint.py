"""Checkpoints: tensors, and what is known about them, in one file of the safetensors layout.

    8 bytes      length of the header, little-endian
    header       JSON: {"__metadata__": {...}, name: {"dtype", "shape", "data_offsets"}, ...}
    the rest     the numbers of one tensor after another, without holes

Any safetensors reader opens it, and there is no code in it that reading could run. The metadata is
ours: `info` as a JSON text, and a digest of everything, which notices a flipped bit. But a file may
come from a stranger, so what it claims is checked against its size before memory is taken for it.

A run's folder holds state.safetensors (all that resuming reads) and model.safetensors (the best
averaged weights, all that sampling reads).
"""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from model import ModelConfig, Transformer, rotary_table
from plumbing.command import Mistake

FORMAT = "2"  # 1 was a pickle, in model.pt and state.pt
MAX_HEADER = 2**19  # bytes; that of GPT-2's training state has about 25,000
DTYPES = {"F64": torch.float64, "I64": torch.int64, "F32": torch.float32, "BF16": torch.bfloat16}


class CheckpointError(Mistake):
    """A checkpoint that is missing, damaged or foreign; the message is one line for the user."""


def raw(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor: its own memory, not a copy, if it's contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def digest(tensors: dict[str, Tensor], info_text: str) -> str:
    """SHA-256 over everything in the file."""
    sha = hashlib.sha256(info_text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(raw(tensor))
    return sha.hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor], info: dict) -> None:
    """Write a file for `read_tensors`. A kill leaves the old file or the new one, no mixture."""
    info_text = json.dumps(info)
    metadata = {"format": FORMAT, "info": info_text, "digest": digest(tensors, info_text)}
    header = {"__metadata__": metadata}
    dtype_names = {dtype: name for name, dtype in DTYPES.items()}
    # The widest dtypes first: then every tensor begins at a multiple of its own item size.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    end = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": dtype_names[tensor.dtype], "shape": list(tensor.shape)}
        header[name]["data_offsets"] = [end, end + tensor.nbytes]
        end += tensor.nbytes
    header_text = json.dumps(header).encode()
    header_text += b" " * (-len(header_text) % 8)  # the numbers begin at a multiple of 8, too
    assert len(header_text) <= MAX_HEADER
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(len(header_text).to_bytes(8, "little") + header_text)
            for tensor in tensors.values():
                file.write(raw(tensor))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        problem = f"step {info['step']} cannot be saved; is the disk full? ({error})"[:300]
        raise OSError(f"{problem}; what was saved before is intact") from None


def without_repeats(pairs: list[tuple]) -> dict:
    """A JSON object as a dict. Of equal names `json` would silently keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def read_header(file: BinaryIO) -> tuple[dict, dict]:
    """(metadata, {name: entry}), where all but the format is still to be checked."""
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise ValueError(f"its header would have {length} bytes")
    header = json.loads(file.read(length).decode(), object_pairs_hook=without_repeats)
    metadata = header.pop("__metadata__", {})
    if metadata.get("format") != FORMAT:
        raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
    return metadata, header


def read_tensor(file: BinaryIO, entry: dict, data_start: int, size: int) -> Tensor:
    """The next tensor of a file of `size` bytes, if it is what its `entry` in the header says."""
    dtype = DTYPES[entry["dtype"]]
    shape = entry["shape"]
    offsets = entry["data_offsets"]
    # A dimension next to a 0 leaves no trace in the offsets, so each has a limit of its own.
    if len(shape) > 8 or not all(type(n) is int and 0 <= n <= size for n in shape + offsets):
        raise ValueError(f"a tensor has shape {shape} at {offsets}")
    start = file.tell() - data_start
    end = start + math.prod(shape) * dtype.itemsize
    if offsets != [start, end]:
        raise ValueError(f"a tensor is at {offsets}, not at {[start, end]}")
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    if file.readinto(raw(tensor)) < tensor.nbytes:
        raise ValueError("it became shorter while it was read")
    return tensor


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, info) of a file that `write_tensors` wrote, verified; else CheckpointError."""
    old_path = path.with_suffix(".pt")
    try:
        size = path.stat().st_size
        if not path.is_file():  # a pipe, say, from which we would read forever
            raise ValueError("it is not a file")
        with open(path, "rb") as file:
            metadata, entries = read_header(file)
            data_start = file.tell()
            tensors = {name: read_tensor(file, entries[name], data_start, size) for name in entries}
            if file.read(1):
                raise ValueError("it goes on after its last tensor")
        if digest(tensors, metadata["info"]) != metadata["digest"]:
            raise ValueError("its tensors do not match their digest")
        info = json.loads(metadata["info"])
        if type(info) is not dict:
            raise ValueError(f"its info is {info!r}")
    except FileNotFoundError:
        problem = f"{path} does not exist: train a model first, or name another folder"
        if old_path.exists():
            problem = f"{old_path} is a pickle, from an older version: train again"
        raise CheckpointError(problem) from None
    except Exception as error:  # a damaged file can fail in any way at all
        problem = f"{path} is damaged or no checkpoint of train.py: {error!r:.200}"
        raise CheckpointError(problem) from None
    return tensors, info


def shape_of_start(settings: dict) -> dict:
    """What --init-from implies: the shape of its network."""
    shape = load_checkpoint(settings["init_from"])[1]["model"] if settings.get("init_from") else {}
    return {name: size for name, size in shape.items() if name not in ("vocab_size", "causal")}


def load_checkpoint(
    folder: str | Path, device: str | torch.device = "cpu"
) -> tuple[Transformer, dict]:
    """(model, info): the network of a run with averaged (EMA) weights, and what is known about it.

    info holds "model" (the ModelConfig as a dict), "config" (of the training run), "tokenizer",
    "step" and "evaluation" (bits per byte, the curve). CheckpointError if that is not in `folder`.
    """
    path = Path(folder) / "model.safetensors"
    tensors, info = read_tensors(path)
    try:
        config = ModelConfig(**info["model"])
        if {type(info["config"]["objective"]), type(info["tokenizer"])} != {str}:
            raise ValueError("tokenizer or objective are missing")
        if 4 * config.n_layer > len(tensors):  # a block has four matrices
            raise ValueError(f"{config.n_layer} layers are not in {len(tensors)} tensors")
        with torch.device("meta"):  # no memory for what the file claims, no time for random weights
            model = Transformer(config)
        if "neighbours" in tensors:  # older networks saw them in the first block only,
            tensors["blocks.0.neighbours"] = tensors.pop("neighbours")
        unseen = torch.zeros(2, tensors["embedding.weight"].size(1))  # the first ones nowhere
        for i in range(config.n_layer):
            tensors.setdefault(f"blocks.{i}.neighbours", unseen.clone())
        model.load_state_dict(tensors, assign=True)
        model.rotary = rotary_table(config.context_length, config.n_embd // config.n_head)
    except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit this model.py: {error!r:.200}") from None
    return model.to(device, torch.float32).eval(), info
