"""A place to run experiments in: a tiny corpus, tiny settings, two untrained networks."""

import dataclasses
import json
import unittest.mock
from pathlib import Path

import pytest
import torch

import train
from experiments import training
from experiments.lab import runs
from model import ModelConfig, Transformer
from plumbing.checkpoint import write_tensors

ROOT = Path(__file__).parent.parent.parent
N = 64  # tokens of a text
SHAPE = dict(n_layer=2, n_head=2, n_embd=32, context_length=N)
TINY = "".join(f"{name} = {value}\n" for name, value in SHAPE.items()) + """
batch_size = 8
eval_rows = 12
eval_interval = 99
final_eval_rows = 8
compile = false
precision = "float32"
"""


@pytest.fixture(scope="session")
def networks(tmp_path_factory) -> Path:
    """A folder with checkpoints of random weights: `run` is a diffusion model, `twin` its GPT."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    for name, objective in (("run", "diffusion"), ("twin", "autoregressive")):
        model = Transformer(ModelConfig(257, causal=name == "twin", **SHAPE))
        for parameter in model.parameters():  # blocks are born as the identity
            torch.nn.init.normal_(parameter, std=0.3)
        config = train.TrainConfig(objective=objective, data_dir="data/sotu-bytes", **SHAPE)
        info = {"model": dataclasses.asdict(model.config), "config": dataclasses.asdict(config),
                "tokenizer": "byte", "step": 1, "evaluation": None}
        (folder / name).mkdir()
        write_tensors(folder / name / "model.safetensors", model.state_dict(), info)
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch, data, networks) -> Path:
    """The folder to work in, with data/sotu/, data/sotu-bytes/ (the same), run/, twin/, configs/
    and tiny.toml."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for name, target in (("data/sotu", data), ("data/sotu-bytes", data),
                         ("configs", ROOT / "configs"),
                         ("run", networks / "run"), ("twin", networks / "twin")):
        Path(name).symlink_to(target)
    Path("tiny.toml").write_text(TINY + 'data_dir = "data/sotu-bytes"\n')
    return tmp_path


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """Runs of train.py take place in this process, as starting one takes seconds; the list is what
    was to be started."""
    commands = []

    def run(command: list, env: dict) -> unittest.mock.Mock:
        program, *arguments = map(str, command[1:])
        commands.append([program, *arguments])
        ask = train.ask
        if program == "-c":  # a bug is put into it before
            assert "train.ask = leak" in arguments.pop(0)
            ask = training.leak
        else:
            assert program == str(runs.TRAIN)
        with unittest.mock.patch("train.ask", ask):
            return unittest.mock.Mock(returncode=train.main(arguments))

    monkeypatch.setattr(runs.subprocess, "run", run)
    return commands


@pytest.fixture
def finish(workplace, started, capsys):
    """Run an experiment to its end: (its lines, its JSON line). It must draw, too: into
    SCRIPT.png, or SCRIPT-QUESTION.png if its flags begin with a question."""

    def run(script, flags: str) -> tuple[list[str], dict]:
        name = script.__name__.split(".")[1]
        if not flags.startswith("-"):
            name += "-" + flags.split()[0]
        assert script.main(flags.split()) == 0
        *lines, last = capsys.readouterr().out.splitlines()
        assert Path(f"out/experiments/{name}.png").read_bytes().startswith(b"\x89PNG")
        return lines, json.loads(last)

    return run
