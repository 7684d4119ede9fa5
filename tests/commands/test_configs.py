"""Settings: what is asked for is what runs, and what makes no sense is refused in one line."""

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from plumbing.config import ConfigError, check_knobs, knob, load
from sample import Command
from train import TrainConfig


@dataclass(frozen=True)
class Options:
    """One field of every kind."""

    steps: int | None = knob(None, "how many, 100% (default: all)", low=1)
    top_p: float | None = knob(None, "probability", low=0, high=1)
    order: str | Callable = knob("random", "what next", ("random", "none"))
    schedule: str | Sequence[int] = knob("linear", "how fast", ("linear", "cosine"))
    show_steps: bool = knob(False, "watch")
    prefix: str | None = knob(None, "text to continue")
    log: Path | None = knob(None, "a file")
    adjust: Callable | None = None  # for Python only

    def __post_init__(self):
        check_knobs(self)


def test_flags_override_the_file_which_overrides_the_defaults(tmp_path):
    (tmp_path / "run.toml").write_text("steps = 7\nbatch_size = 4\n")
    cfg = load(TrainConfig, tmp_path / "run.toml", ["--batch-size", "6", "--ema_decay=0.5"])
    assert (cfg.steps, cfg.batch_size, cfg.ema_decay) == (7, 6, 0.5)
    assert cfg.n_layer == TrainConfig().n_layer


@pytest.mark.parametrize("config_class", [TrainConfig, Command])
def test_every_knob_is_a_flag_with_dash_or_underscore(config_class):
    for field in fields(config_class):
        if "help" not in field.metadata:
            continue
        value = True if field.default is False else field.default
        if value is None and "str" in str(field.type):  # "none" would be a text
            value = "greedy" if field.metadata["choices"] else "text"
        for name in (field.name, field.name.replace("_", "-")):
            cfg = load(config_class, None, [f"--{name}={'none' if value is None else value}"])
            assert getattr(cfg, field.name) == value


@pytest.mark.parametrize("flags, wanted", [
    ("--steps 5 --top-p 1", {"steps": 5, "top_p": 1.0}),
    ("--steps none --order none --log none", {"steps": None, "order": "none", "log": None}),
    ("--prefix none --log a/b", {"prefix": "none", "log": Path("a/b")}),
    ("--show-steps --schedule cosine", {"show_steps": True, "schedule": "cosine"}),
    ("--show_steps false", {"show_steps": False}),
])
def test_what_a_flag_says_becomes_the_first_type_of_the_field(flags, wanted):
    assert load(Options, None, flags.split()) == Options(**wanted)
    Options(order=len, schedule=[4, 2, 0], adjust=len)  # what only Python can say passes, too


def test_help_shows_the_choices_and_the_defaults(capsys):
    with pytest.raises(SystemExit, match="0"):
        load(Options, None, ["--help"], "sample.py", "Writes.")
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("Writes.", "what next (random, none; default: random)", "100% (default: all) --",
                 "probability (default: none)", "--show-steps [VALUE], --show_steps [VALUE] watch"):
        assert part in shown
    assert "adjust" not in shown


@pytest.mark.parametrize("config_class, given, says", [
    (TrainConfig, "learning_rat = 1", "unknown key 'learning_rat'; did you mean --learning-rate?"),
    (TrainConfig, "zzz = 1", "run.toml: unknown key 'zzz'; x.py --help lists all"),
    (TrainConfig, "steps = 'many'", "steps must be int, not 'many'"),
    (TrainConfig, "steps = 1.5", "steps must be int, not 1.5"),
    (TrainConfig, "compile = 1", "compile must be bool, not 1"),
    (TrainConfig, "steps = 0", "steps must be at least 1, not 0"),
    (TrainConfig, "learning_rate = nan", "learning_rate must be from 1e-12 to 1e+15, not nan"),
    (TrainConfig, "learning_rate = 1" + "0" * 400, "learning_rate must be float, not 100000"),
    (TrainConfig, "objective = 'gpt'", "must be diffusion or mlm or autoregressive, not 'gpt'"),
    (TrainConfig, "weighting = 'row'", "weighting must be nelbo or token, not 'row'"),
    (TrainConfig, "prefix_length = 256", "of 256 tokens"),
    (TrainConfig, "steps = ", "run.toml is not TOML"),
    (TrainConfig, "steps = 5 # \udcff", "run.toml is not TOML"),
    (TrainConfig, "steps = " + "[" * 9999, "run.toml is not TOML"),
    (TrainConfig, "steps = " + "9" * 9999, "run.toml is not TOML"),
    (Options, "adjust = 1", "run.toml: unknown key 'adjust'"),
    (Options, ["--step", "1"], "unknown argument '--step'; did you mean --steps?"),
    (Options, ["--zzz", "1"], "unknown argument '--zzz'; x.py --help lists all"),
    (TrainConfig, ["--block_size=64"], "did you mean --context-length?"),
    (TrainConfig, ["--max_iters=9"], "did you mean --steps?"),
    (TrainConfig, ["--lr=1e-3"], "did you mean --learning-rate?"),
    (TrainConfig, ["--dtype=bfloat16"], "did you mean --precision?"),
    (TrainConfig, ["--dropout=0.1"], "unknown argument '--dropout=0.1'; x.py has no dropout"),
    (TrainConfig, ["--min_lr=0"], "x.py has no min_lr"),
    (TrainConfig, "gradient_accumulation_steps = 4", "did you mean --micro-batch-size?"),
    (Command, ["--max_new_tokens=9"], "did you mean --length?"),
    (Command, ["--start=a"], "did you mean --prefix?"),
    (Command, ["--out_dir=a"], "did you mean --checkpoint?"),
    (Command, ["--dtype=bfloat16"], "x.py has no dtype"),
    (Options, ["--adjust=1"], "unknown argument '--adjust=1'"),
    (Options, ["stray"], "unknown argument 'stray'"),
    (Options, ["--steps", "few"], "steps must be int, not 'few'"),
    (Options, ["--top-p", "nan"], "top_p must be from 0 to 1, not nan"),
    (Options, ["--show-steps", "maybe"], "show_steps must be bool, not 'maybe'"),
    (Options, ["--schedule", "none"], "schedule must be linear or cosine, not 'none'"),
], ids=lambda value: str(value)[:20].encode("ascii", "replace").decode())
def test_a_mistake_is_one_line_that_names_it(tmp_path, config_class, given, says):
    in_file = isinstance(given, str)
    path = tmp_path / "run.toml"
    path.write_bytes(given.encode("utf-8", "surrogateescape") if in_file else b"")
    with pytest.raises(ConfigError) as error:
        load(config_class, path, [] if in_file else given, "x.py")
    assert says in str(error.value) and str(error.value).isprintable()


def test_a_missing_file_and_a_missing_value_are_named(capsys):
    with pytest.raises(ConfigError, match="^nowhere.toml: No such file"):
        load(TrainConfig, "nowhere.toml")
    with pytest.raises(SystemExit, match="2"):
        load(Options, None, ["--steps"], "sample.py")
    assert capsys.readouterr().err == "sample.py: argument --steps: expected one argument\n"


def test_the_shipped_configs_are_valid_and_say_what_to_expect():
    folder = Path(__file__).parents[2] / "configs"
    names = {"quickstart", "pretrained", "shakespeare", "gpt2", "gpt2-15min", "gpt2-ar"}
    assert {path.stem for path in folder.glob("*.toml")} == names
    assert not list(folder.glob("*.py"))
    for name in names:
        cfg = load(TrainConfig, folder / f"{name}.toml")
        text = (folder / f"{name}.toml").read_text()
        header = text.split("\n\n")[0]
        assert header.startswith("#") and "expect" in header.lower(), name
        assert cfg.out_dir == f"out/{name}"
        for key, value in tomllib.loads(text).items():  # only what differs from the defaults
            assert key == "out_dir" or getattr(TrainConfig(), key) != value, (name, key)
