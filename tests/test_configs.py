"""Configurations: what is asked for is what runs, and what makes no sense is refused in one line."""

import dataclasses
import tomllib
from pathlib import Path

import pytest

from configs import ConfigError, load
from model import ModelConfig
from train import TrainConfig

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "configs").glob("*.toml"))


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_flags_override_the_file_which_overrides_the_defaults(tmp_path):
    path = toml(tmp_path, "steps = 7\nbatch_size = 4\n")
    cfg = load(TrainConfig, path, ["--batch-size", "6", "--ema_decay=0.5"])
    assert (cfg.steps, cfg.batch_size, cfg.ema_decay) == (7, 6, 0.5)
    assert cfg.n_layer == TrainConfig().n_layer


@pytest.mark.parametrize("field", dataclasses.fields(TrainConfig), ids=lambda field: field.name)
def test_every_field_is_a_flag_with_dash_or_underscore(field):
    text = {bool: "true", str: field.default, int: str(field.default), float: str(field.default)}
    value = text.get(type(field.default), "none")
    for flag in {"--" + field.name, "--" + field.name.replace("_", "-")}:
        expected = True if field.default is False else field.default
        assert getattr(load(TrainConfig, None, [f"{flag}={value}"]), field.name) == expected


def test_a_switch_needs_no_value():
    assert load(TrainConfig, None, ["--resume"]).resume is True
    assert load(TrainConfig, None, ["--compile", "false"]).compile is False


@pytest.mark.parametrize("text, says", [
    ("learning_rat = 1e-3", "did you mean 'learning_rate'"),
    ("steps = 'many'", "steps must be int, not 'many'"),
    ("steps = 1.5", "steps must be int, not 1.5"),
    ("compile = 1", "compile must be bool, not 1"),
    ("steps = 0", "steps is out of range: 0"),
    ("learning_rate = nan", "learning_rate is out of range: nan"),
    ("objective = 'gpt'", "objective must be diffusion or mlm or autoregressive, not 'gpt'"),
    ("steps = ", "is not TOML"),
    ("prefix_length = 256", "does not fit rows of 256 tokens"),
    ("weighting = 'row'", "weighting must be nelbo or token, not 'row'"),
    ("steps = 5 # \udcff".encode("utf-8", "surrogateescape"), "is not TOML"),
])
def test_mistakes_in_the_file_are_named(tmp_path, text, says):
    path = tmp_path / "run.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=".") as error:
        load(TrainConfig, path)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("flags, says", [
    (["--learning-rat", "1"], "did you mean --learning-rate"),
    (["--steps", "few"], "steps must be int, not 'few'"),
    (["stray"], "unknown argument 'stray'"),
])
def test_mistakes_in_the_flags_are_named(flags, says):
    with pytest.raises(ConfigError) as error:
        load(TrainConfig, None, flags)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match="nowhere.toml: No such file"):
        load(TrainConfig, "nowhere.toml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_say_what_to_expect(path):
    cfg = load(TrainConfig, path)
    ModelConfig(257, cfg.context_length, cfg.n_layer, cfg.n_head, cfg.n_embd)
    header = path.read_text().split("\n\n")[0]
    assert header.startswith("#") and "expect" in header.lower()
    assert cfg.out_dir == f"out/{path.stem}"
    # Only what differs from the defaults is written down.
    for name, value in tomllib.loads(path.read_text()).items():
        assert name == "out_dir" or getattr(TrainConfig(), name) != value, name


def test_the_shipped_configs_are_those_of_the_readme():
    assert {path.stem for path in SHIPPED} == {"quickstart", "shakespeare", "gpt2", "gpt2-ar", "mlm"}
