"""The model that is shipped is the one that its README tells of."""

import re
import shutil
from pathlib import Path

import pytest

import sample
from experiments import shrink
from plumbing.checkpoint import load_checkpoint, read_tensors

PRETRAINED = Path(__file__).parents[2] / "pretrained"
README = (PRETRAINED / "README.md").read_text()


def test_it_costs_what_its_readme_says(capsys):
    excerpt = str(PRETRAINED / "excerpt.txt")
    assert sample.main(["--checkpoint", str(PRETRAINED), "--device", "cpu",
                        "--score", excerpt]) == 0
    bound, exact = (float(bits) for bits in re.findall(r"([\d.]+) bits/byte",
                                                       capsys.readouterr().out))
    claimed = re.findall(r"^\|.*\| (?:<= )?([\d.]+)", README, re.M)
    assert [bound, exact] == pytest.approx([float(bits) for bits in claimed[1:]], abs=2e-3)
    # The number for all of the validation text is in the checkpoint.
    _, info = read_tensors(PRETRAINED / "model.safetensors")
    assert f"{info['evaluation']['bits_per_byte']:.4f}" == claimed[0]


def test_it_is_small_and_writes_english_without_data_or_training(capsys):
    assert sum(path.stat().st_size for path in PRETRAINED.iterdir()) < 6e6
    model, info = load_checkpoint(PRETRAINED)
    assert (model.config.vocab_size, info["config"]["steps"], info["step"]) == (4096, 7000, 7000)
    assert sample.main(["--checkpoint", str(PRETRAINED), "--prefix", "The state of the Union",
                        "--device", "cpu"]) == 0
    text, numbers = capsys.readouterr()
    assert text.startswith("The state of the Union") and "in 16 model calls" in numbers
    words = re.findall("[a-z]+", text.lower())
    assert sum(word in ("the", "of", "and", "to", "in", "a") for word in words) > 0.15 * len(words)


def test_shrinking_halves_the_bytes_and_rounds_the_weights(workplace, capsys):
    shutil.copytree("run", "whole")
    Path("whole/log.jsonl").write_text("{}\n")
    assert shrink.main(["whole", "small"]) == 0
    assert "small: 0.1 MB" in capsys.readouterr().out
    whole, _ = load_checkpoint("whole")
    small, _ = load_checkpoint("small")
    for weight, rounded in zip(whole.parameters(), small.parameters(), strict=True):
        assert (weight.bfloat16().float() == rounded).all()
    before, after = (Path(folder, "model.safetensors").stat().st_size
                     for folder in ("whole", "small"))
    assert after < 0.6 * before
    assert Path("small/log.jsonl").read_text() == "{}\n"
