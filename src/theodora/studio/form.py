"""The form of a run: its fields with their docstrings as help, and what is typed into it, checked as by the command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

from theodora.cli.arguments import field_docstrings
from theodora.cli.plan import flag_words
from theodora.cli.train import GROUPS
from theodora.coerce import alternatives, type_hints
from theodora.config import OPTION_NAMES, AdapterConfig, TrainConfig
from theodora.errors import ConfigError
from theodora.parse import parse_yaml, to_yaml

FIRST = (
    *("model", "data", "output", "objective", "method", "rank"),
    *("learning_rate", "num_train_epochs", "per_device_train_batch_size", "max_length"),
)
"""What most people decide; the rest is folded."""
# Said on a command line alone (`theodora.trust`), or by the buttons of a run.
_NOT_HERE = ("trust_remote_code", "push_to_hub", "resume")
_EXTRA = "trainer"
_HEADINGS = {"What": "Where it starts"}  # of what is left of the group


def form() -> list[dict[str, Any]]:
    """Groups of fields: heading, and of each field what the page needs to show it."""
    first = {"heading": "", "fields": [_field(name) for name in FIRST]}
    elsewhere = {*FIRST, *_NOT_HERE}
    left = {heading: [n for n in names if n not in elsewhere] for heading, (_, names) in GROUPS.items()}
    folded = [
        {"heading": _HEADINGS.get(heading, heading), "fields": [_field(name) for name in names]}
        for heading, names in left.items()
    ]
    extra = {
        "name": _EXTRA,
        "help": "Any other fields of trl.SFTConfig, and of the objective's own configuration: name: value, one a line.",
        "kind": "yaml",
        "choices": [],
        "default": "",
    }
    return [first, *(group for group in folded if group["fields"]), {"heading": "Others", "fields": [extra]}]


def _field(name: str) -> dict[str, Any]:
    config_class = AdapterConfig if name in {f.name for f in fields(AdapterConfig)} else TrainConfig
    kinds = alternatives(type_hints(config_class)[name])
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    return {
        "name": name,
        "help": " ".join(field_docstrings(config_class).get(name, "").split()),
        "kind": "choice" if words else _kind([get_origin(kind) or kind for kind in kinds]),
        "choices": words,
        "default": _default(config_class, name),
    }


def _kind(kinds: list[Any]) -> str:
    if bool in kinds:
        return "truth"
    if Mapping in kinds and tuple not in kinds:
        return "pairs"
    if tuple in kinds:
        return "words"
    return "number" if int in kinds or float in kinds else "text"


def _default(config_class: type, name: str) -> str:
    default = next(f.default for f in fields(config_class) if f.name == name)
    if default is True or default is False:
        return "yes" if default else "no"
    if isinstance(default, str | int | float):
        return f"{default:g}" if isinstance(default, float) else str(default)
    return ""


def options_of(typed: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What was typed, by name of field, as options of a run, and what is wrong with single fields.

    Empty fields are not given: their defaults hold.
    """
    options: dict[str, Any] = {}
    problems: dict[str, str] = {}
    kinds = {field["name"]: field["kind"] for group in form() for field in group["fields"]}
    for name, value in typed.items():
        text = value.strip() if isinstance(value, str) else value
        if text in ("", None, [], {}):
            continue
        if name not in kinds:
            problems[name] = "is no field of this form"
        elif not isinstance(text, str):
            options[name] = text
        elif kinds[name] == "truth":
            options[name] = {"yes": True, "no": False}.get(text, text)
        elif kinds[name] == "words":
            words = text.split()
            options[name] = words if len(words) > 1 else text
        elif kinds[name] == "pairs":
            options[name] = _pairs(text)
        elif name == _EXTRA:
            more, problem = _yaml(text)
            options |= more
            if problem:
                problems[name] = problem
        else:
            options[name] = _number(text) if kinds[name] == "number" else text
    order = {name: place for place, name in enumerate(kinds)}
    return dict(sorted(options.items(), key=lambda item: order.get(item[0], len(order)))), problems


def typed_of(options: Mapping[str, Any]) -> dict[str, str]:
    """Options as they would be typed into the form: those of it that differ from their defaults."""
    typed: dict[str, str] = {}
    for field in (field for group in form() for field in group["fields"]):
        name, value = field["name"], options.get(field["name"])
        if value in (None, "", [], {}):
            continue
        if name == _EXTRA:
            text = to_yaml(value)
        elif isinstance(value, bool):
            text = "yes" if value else "no"
        elif isinstance(value, Mapping):
            text = " ".join(f"{key}={inner}" for key, inner in value.items())
        elif isinstance(value, list | tuple):
            text = " ".join(map(str, value))
        else:
            text = f"{value:g}" if isinstance(value, float) else str(value)
        if text != field["default"]:
            typed[name] = text
    more = {name: value for name, value in options.items() if name not in OPTION_NAMES}
    return typed | ({_EXTRA: (typed.get(_EXTRA, "") + to_yaml(more))} if more else {})


def _pairs(text: str) -> Any:
    """KEY=VALUE, as many as there are; as it stands where it is something else, for the configuration to refuse."""
    pairs = [word.rpartition("=") for word in text.split()]
    return {key: _number(value) for key, _, value in pairs} if all(key for key, _, _ in pairs) else text


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _yaml(text: str) -> tuple[dict[str, Any], str]:
    try:
        found = parse_yaml(text)
    except ValueError as error:
        return {}, f"is no valid YAML: {error}"
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        return {}, "expected lines of the form name: value"
    if own := sorted(found.keys() & OPTION_NAMES):
        return {}, f"{', '.join(own)}: has a field of its own"
    return found, ""


def check(typed: Mapping[str, Any]) -> dict[str, Any]:
    """Problems by field (those of none under ""), and the YAML and the command that would do the same."""
    options, found = options_of(typed)
    problems = {name: [text] for name, text in found.items()}
    try:
        TrainConfig.from_options(options)
    except ConfigError as error:
        for name, text in by_field(str(error), [*options, *OPTION_NAMES]):
            problems.setdefault(name, []).append(text)
    return {
        "options": options,
        "problems": problems,
        "yaml": to_yaml(options) if options else "",
        "command": command(options),
    }


def by_field(message: str, names: list[str]) -> list[tuple[str, str]]:
    """An error's misses, each with the field that it begins with; "" where it begins with none."""
    head, *items = message.split("\n  - ")
    found: list[tuple[str, str]] = []
    for item in items or [head]:
        first = re.match(r"\w+", item)
        named = first is not None and first[0] in names
        found.append((first[0] if first and named else "", item))
    return found


def command(options: Mapping[str, Any]) -> str:
    """The line that begins the run from a terminal."""
    words = [shlex.join(flag_words(name, value)) for name, value in options.items()]
    return " \\\n  ".join(["theodora train", *words])
