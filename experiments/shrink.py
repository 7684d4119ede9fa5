"""A checkpoint to give away: python -m experiments.shrink out/pretrained pretrained

It keeps the weights in bfloat16, which is half of the bytes and costs next to nothing (compare them
with sample.py --score), with the log and the vocabulary. sample.py and --init-from read it as any
other.
"""

import shutil
import sys
from pathlib import Path

import torch

from plumbing.checkpoint import read_tensors, write_tensors
from plumbing.command import command
from plumbing.config import Parser
from plumbing.vocabulary import copy_file


@command("experiments.shrink")
def main(arguments: list[str]) -> None:
    parser = Parser(prog="experiments.shrink", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="the folder of a finished run")
    parser.add_argument("out_dir", type=Path, help="the folder to write")
    args = parser.parse_args(arguments)
    tensors, info = read_tensors(args.checkpoint / "model.safetensors")
    args.out_dir.mkdir(parents=True, exist_ok=True)
    copy_file(info["tokenizer"], args.checkpoint, args.out_dir)
    shutil.copyfile(args.checkpoint / "log.jsonl", args.out_dir / "log.jsonl")
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    write_tensors(args.out_dir / "model.safetensors", halves, info)
    print(f"{args.out_dir}: {(args.out_dir / 'model.safetensors').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
