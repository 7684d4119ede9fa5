"""Configurations: a frozen dataclass says what exists, a TOML file what differs, flags what differs today.

    load(TrainConfig, "configs/quickstart.toml", ["--learning-rate", "1e-3"]) -> TrainConfig

Every field is a flag, with `-` or `_`. An unknown name, a wrong type or a value out of range is a
`ConfigError`: one line that names the value and the fix.
"""

import argparse
import difflib
import tomllib
import types
from dataclasses import fields
from pathlib import Path
from typing import TypeVar, get_args, get_origin, get_type_hints

Config = TypeVar("Config")


class ConfigError(Exception):
    """A mistake in a configuration; the message is one line for the user."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line on stderr and exit code 2, without the usage text."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def convert(name: str, value, kind: type):
    """`value`, from TOML or a flag's text, as the type that the dataclass declares, or a ConfigError."""
    if get_origin(kind) is types.UnionType:  # `int | None`: the text "none" switches the option off
        if value is None or value == "none":
            return None
        kind = get_args(kind)[0]
    wrong = ConfigError(f"{name} must be {kind.__name__}, not {value!r}")
    if isinstance(value, str) and kind is not str:
        try:
            if kind is bool:
                return {"true": True, "false": False}[value.lower()]
            return kind(value)
        except (KeyError, ValueError):
            raise wrong from None
    if kind is float and type(value) is int:  # 1 for 1.0
        return float(value)
    if type(value) is not kind:
        raise wrong
    return value


def load(config_class: type[Config], path: str | Path | None, flags: list[str] = (), prog: str = "train.py",
         description: str | None = None) -> Config:
    """The dataclass's defaults, overridden by the TOML file, overridden by the flags."""
    kinds = get_type_hints(config_class)
    values = {}
    if path is not None:
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; the shipped ones are in configs/") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not TOML: {error}") from None
    for name in values:
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; train.py --help lists all"
            raise ConfigError(f"{path}: unknown key {name!r}{hint}")
    parser = Parser(prog=prog, description=description, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(config_class):
        dashed, plain = "--" + field.name.replace("_", "-"), "--" + field.name
        bare = {"nargs": "?", "const": "true"} if kinds[field.name] is bool else {}  # --resume alone is true
        parser.add_argument(*dict.fromkeys([dashed, plain]), dest=field.name, metavar="VALUE", **bare,
                            help=f"{field.metadata.get('help', '')} (default: {field.default})")
    given, unknown = parser.parse_known_args(flags)
    if unknown:
        name = unknown[0].split("=")[0].lstrip("-").replace("-", "_")
        near = difflib.get_close_matches(name, kinds, n=1)
        fix = f"; did you mean --{near[0].replace('_', '-')}?" if near else "; --help lists all"
        raise ConfigError(f"unknown argument {unknown[0]!r}{fix}")
    values |= vars(given)
    try:
        return config_class(**{name: convert(name, value, kinds[name]) for name, value in values.items()})
    except ValueError as error:  # the dataclass checks its own ranges
        raise ConfigError(str(error)) from None
    except TypeError as error:  # a field without default is missing
        raise ConfigError(str(error).split("__init__() ")[-1]) from None
