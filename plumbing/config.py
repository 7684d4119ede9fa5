"""Settings: a frozen dataclass says what exists, a TOML file and flags say what differs from it.

    load(TrainConfig, "configs/quickstart.toml", ["--learning-rate", "1e-3"]) -> TrainConfig

Every field made by `knob` is a flag, with `-` or `_`, and a TOML key. An unknown name, a wrong type
or a value out of range is a `ConfigError`: one line that names the value and the fix.
"""

import argparse
import dataclasses
import difflib
import math
import tomllib
import types
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import TypeVar, Union, get_args, get_origin, get_type_hints

from plumbing.command import Mistake

Config = TypeVar("Config")


# What nanoGPT has by another name, or alone.
NANOGPT = dict(pair.split("=") for pair in """block_size=context_length max_iters=steps
    lr=learning_rate warmup_iters=warmup_steps gradient_accumulation_steps=micro_batch_size
    eval_iters=eval_rows dtype=precision dataset=data_dir out_dir=checkpoint init_from=checkpoint
    start=prefix max_new_tokens=length min_lr= lr_decay_iters= decay_lr= dropout= bias= beta1=
    beta2= eval_only= always_save_checkpoint= wandb_log= backend=""".split())


class ConfigError(Mistake):
    """A mistake in the settings; the message is one line for the user."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line on stderr and exit code 2, without the usage text."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def knob(default, help: str, choices: tuple = (), low: float = -math.inf, high: float = 1e15):
    """A field that can be set from outside: its default, its --help, and the values it may take."""
    allowed = dict(help=help, choices=tuple(choices), low=low, high=high)
    return dataclasses.field(default=default, metadata=allowed)


def check_knobs(config) -> None:
    """Refuse text outside the choices and numbers outside the range; ValueError names the field.

    Callables and sequences pass: whether they make sense is for the dataclass to say.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        allowed = field.metadata
        if "help" in allowed and value is None and field.default is not None:
            raise ValueError(f"{field.name} must not be None")
        if "help" not in allowed or not isinstance(value, (str, Real)):
            continue
        if allowed["choices"] and value not in allowed["choices"]:
            raise ValueError(f"{field.name} must be {' or '.join(allowed['choices'])}, "
                             f"not {value!r}")
        low, high = allowed["low"], allowed["high"]
        if isinstance(value, Real) and not low <= value <= high:  # or NaN
            rule = f"at least {low:g}" if value < low else f"from {low:g} to {high:g}"
            raise ValueError(f"{field.name} must be {rule}, not {value}")


def convert(name: str, value, kind: type):
    """`value`, from TOML or a flag's text, as the type that the dataclass declares.

    Of a union the first type counts: the text of a flag for `str | Callable` stays a str. "none"
    switches off what may be None, except where it is a text like any other, as in --prefix none.
    """
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    kind = kinds[0]
    if value == "none" and type(None) in kinds and kind is not str:
        return None
    try:
        if isinstance(value, str) and kind is bool:
            return {"true": True, "false": False}[value.lower()]
        if isinstance(value, str) or (kind is float and type(value) is int):  # 1 for 1.0
            return kind(value)
        if type(value) is kind:
            return value
    except (KeyError, ValueError, OverflowError):
        pass
    raise ConfigError(f"{name} must be {kind.__name__}, not {value!r}")


def read_toml(path: str | Path) -> dict:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; the shipped ones are in configs/") from None
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, nested a thousand times
        raise ConfigError(f"{path} is not TOML: {error}") from None


def add_flag(parser: Parser, field: dataclasses.Field, kind: type) -> None:
    names = ["--" + field.name.replace("_", "-"), "--" + field.name]
    bare = {"nargs": "?", "const": "true"} if kind is bool else {}  # --resume alone is true
    notes = [", ".join(field.metadata["choices"])] if field.metadata["choices"] else []
    text = field.metadata["help"]
    if "default:" not in text:  # some say in words what none means
        notes.append(f"default: {'none' if field.default is None else field.default}")
    text += f" ({'; '.join(notes)})" if notes else ""
    text = text.replace("%", "%%")  # argparse formats its help with %
    parser.add_argument(*dict.fromkeys(names), dest=field.name, metavar="VALUE", help=text, **bare)


def fix_for(name: str, knobs: dict, prog: str) -> str:
    """What to write instead of an unknown name."""
    known = [NANOGPT[name]] if name in NANOGPT else difflib.get_close_matches(name, knobs, 1, 0.7)
    if known and known[0] in knobs:
        return f"did you mean --{known[0].replace('_', '-')}?"
    return f"{prog} has no {name}" if known else f"{prog} --help lists all"


def load(config_class: type[Config], path: str | Path | None, flags: list[str] = (),
         prog: str = "train.py", description: str | None = None,
         implied: Callable[[dict], dict] = lambda values: {}) -> Config:
    """The dataclass's defaults, overridden by the TOML file, overridden by the flags.

    implied: from what was said there, values for what was not.
    """
    all_fields = dataclasses.fields(config_class)
    knobs = {field.name: field for field in all_fields if "help" in field.metadata}
    kinds = get_type_hints(config_class)
    values = {} if path is None else read_toml(path)
    for name in values:
        if name not in knobs:
            raise ConfigError(f"{path}: unknown key {name!r}; {fix_for(name, knobs, prog)}")
    parser = Parser(prog=prog, description=description, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, field in knobs.items():
        add_flag(parser, field, kinds[name])
    given, unknown = parser.parse_known_args(flags)
    if unknown:
        name = unknown[0].split("=")[0].lstrip("-").replace("-", "_")
        raise ConfigError(f"unknown argument {unknown[0]!r}; {fix_for(name, knobs, prog)}")
    values |= vars(given)
    values = {name: convert(name, value, kinds[name]) for name, value in values.items()}
    try:
        return config_class(**implied(values) | values)
    except ValueError as error:  # the dataclass checks its own ranges
        raise ConfigError(str(error)) from None
    except TypeError as error:  # a field without default is missing
        raise ConfigError(str(error).split("__init__() ")[-1]) from None
