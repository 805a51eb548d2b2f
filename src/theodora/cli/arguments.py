"""Flags from configuration classes: each field is one flag, and its docstring is the help."""

from __future__ import annotations

import argparse
import ast
import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, Literal, get_args, get_origin

from theodora.coerce import alternatives, type_hints
from theodora.files.trained_on import KINDS


def add_field(group: Any, config_class: type, name: str) -> None:
    """Add the flag of one field to a parser or argument group. A flag that is not given leaves no attribute behind.

    Truth values take `--packing`, `--no-packing` and `--packing false`; lists take several words, mappings KEY=VALUE.
    """
    flag = "--" + name.replace("_", "-")
    hint = type_hints(config_class)[name]
    kinds = [get_origin(choice) or choice for choice in alternatives(hint)]
    keywords: dict[str, Any] = {"default": argparse.SUPPRESS, "help": field_help(config_class, name), "dest": name}
    if bool in kinds:
        group.add_argument(flag, nargs="?", const=True, metavar="BOOL", **keywords)
        keywords["help"] = argparse.SUPPRESS
        group.add_argument("--no-" + name.replace("_", "-"), action="store_const", const=False, **keywords)
    elif Mapping in kinds and tuple not in kinds:
        group.add_argument(flag, nargs="+", type=_pair, metavar="KEY=VALUE", action=_ToDict, **keywords)
    elif tuple in kinds:
        numbers = any(int in get_args(choice) for choice in alternatives(hint) if get_origin(choice) is tuple)
        group.add_argument(flag, nargs="+", metavar="N" if numbers else "NAME", action=_WordOrList, **keywords)
    elif Literal in kinds:
        words = [word for choice in alternatives(hint) if get_origin(choice) is Literal for word in get_args(choice)]
        group.add_argument(flag, choices=words, metavar="|".join(words), **keywords)
    else:
        kind = next(kind for kind in (float, int, str) if kind in kinds)
        group.add_argument(flag, metavar={float: "NUMBER", int: "N", str: "TEXT"}[kind], **keywords)


def field_help(config_class: type, name: str) -> str:
    """The docstring under a field on one line, with the default if the docstring does not say it."""
    text = " ".join(field_docstrings(config_class).get(name, "").split())
    default = next(f.default for f in fields(config_class) if f.name == name)
    if "Default:" not in text and default is not MISSING and default not in (None, (), False):
        text += f" Default: {_as_text(default)}."
    return text.replace("%", "%%")


@cache
def field_docstrings(config_class: type) -> dict[str, str]:
    """The string literals under the fields of a class. Python drops them, so they are read from the source."""
    tree = ast.parse(inspect.getsource(config_class))
    body = tree.body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: text.value.value
        for field, text in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def add_quantize(parser: Any) -> None:
    """Add `--quantize` of commands that load a model and perhaps an adapter."""
    parser.add_argument(
        "--quantize",
        choices=["none", *KINDS],
        help="what the weights of linear layers are quantised to as they are loaded. Default: as they were when the "
        "adapter was trained",
    )


def other_options(arguments: list[str]) -> dict[str, Any]:
    """`--optim adafactor --neftune-noise-alpha=5 --full-determinism` as options: name -> text, list of texts or True.

    Raises:
        ValueError: an argument that belongs to no flag.
    """
    options: dict[str, list[str]] = {}
    name = None
    for argument in arguments:
        if argument.startswith("--"):
            flag, equals, value = argument[2:].partition("=")
            name = flag.replace("-", "_")
            options[name] = [value] if equals else []
        elif name is None:
            raise ValueError(f"unexpected argument {argument!r}")
        else:
            options[name].append(argument)
    return {key: True if not words else words[0] if len(words) == 1 else words for key, words in options.items()}


def positive(text: str) -> int:
    """A whole number of at least 1, for a parser's `type`, whose own errors would name this function."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return number


def not_negative(text: str) -> float:
    """A number of at least 0, likewise."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 0")
    return number


class _WordOrList(argparse.Action):
    """One word stays text (it may be a regular expression); several become a list."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


class _ToDict(argparse.Action):
    """KEY=VALUE pairs become a mapping."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        setattr(namespace, self.dest, dict(values))


def _pair(text: str) -> tuple[str, float]:
    key, equals, value = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        number = float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} has no number after the =") from error
    return key, int(number) if number.is_integer() else number


def _as_text(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)
