"""Recipes of Axolotl and LLaMA-Factory, and scripts of Unsloth's, as recipes of ours: `theodora import`.

translation = translate(Path("qlora.yaml"))
translation.options   # for TrainConfig.from_options
translation.notes     # what became of every field: nothing is dropped in silence
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theodora.config import OPTION_NAMES, TrainConfig
from theodora.errors import ConfigError, in_line, shown
from theodora.foreign import axolotl, llama_factory, unsloth
from theodora.foreign.calls import calls_in
from theodora.foreign.reading import Checks, Note, Reading
from theodora.parse import parse_json, parse_yaml

__all__ = ["TOOLS", "Note", "Translation", "translate"]

TOOLS = {"axolotl": axolotl.TOOL, "llama-factory": llama_factory.TOOL, "unsloth": unsloth.TOOL}
_MARKS = {"axolotl": axolotl.MARKS, "llama-factory": llama_factory.MARKS}
_ORDER = list(TrainConfig(model="m", data="d", output="o").to_options())
_SCRIPTS = (".py", ".ipynb")


@dataclass(frozen=True, kw_only=True)
class Translation:
    """A recipe of another tool in our words."""

    tool: str
    """Whose it is, as people write it."""
    options: dict[str, Any]
    """Ours, which `TrainConfig.from_options` takes."""
    origins: dict[str, str]
    """Our option → what said so there."""
    notes: list[Note]
    """What became of each field."""


def translate(path: Path, tool: str | None = None, checks: Checks | None = None) -> Translation:
    """Read a file of another tool. Nothing of it is run.

    Args:
        path: a YAML or JSON file, a script or a notebook.
        tool: whose it is, a key of `TOOLS`. Default: what its fields say.
        checks: fields of TRL's, and what is wrong with a value for them; without, only those that are options here or
            that a tool's table names are translated.

    Raises:
        ConfigError: it cannot be read, is ambiguous, or asks for what is not trained here.
    """
    if path.suffix in _SCRIPTS:
        if tool not in (None, "unsloth"):
            raise ConfigError(f"{path} is a script, and {TOOLS[tool]} has none; expected its YAML or JSON file")
        calls = calls_in(path)
        if not unsloth.is_unsloth(calls):
            names = sorted({call.name for call in calls if call.name[:1].isupper() or call.name.startswith("from_")})
            raise ConfigError(
                f"{path} is no script of Unsloth's: it calls no FastLanguageModel.from_pretrained. Found calls of "
                f"{in_line(names, 9) or 'nothing that loads a model'}."
            )
        reading = Reading(unsloth.TOOL, checks or {})
        unsloth.read_unsloth(reading, calls)
        reading.check()
    else:
        given = _fields_of(path)
        tool = tool or _whose(path, given)
        if tool == "unsloth":
            raise ConfigError(f"{path} is no script; expected one of Unsloth's, which ends in {' or '.join(_SCRIPTS)}")
        reading = Reading(TOOLS[tool], checks or {})
        if tool == "axolotl":
            axolotl.read_axolotl(reading, given)
        else:
            llama_factory.read_llama_factory(reading, given, path.parent)
        reading.finish(given)
    TrainConfig.from_options(reading.options)
    order = [name for name in _ORDER if name in reading.options]
    options = {name: reading.options[name] for name in (*order, *sorted(reading.options.keys() - {*order}))}
    return Translation(tool=reading.tool, options=options, origins=reading.origins, notes=reading.notes)


def _fields_of(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        given = parse_json(text) if path.suffix == ".json" else parse_yaml(text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(
            f"{path} is no {'JSON' if path.suffix == '.json' else 'YAML'} that can be read: {error}"
        ) from error
    if not isinstance(given, dict) or not given:
        raise ConfigError(f"{path} holds {type(given).__name__}; expected fields of Axolotl or LLaMA-Factory.")
    odd = [name for name in given if not isinstance(name, str)]
    if odd:
        raise ConfigError(f"{path}: the name {shown(odd[0])} is no text; expected names of fields.")
    return given


def _whose(path: Path, given: Mapping[str, Any]) -> str:
    """The tool whose own fields are there, and no other's."""
    found = {tool: sorted(marks & given.keys()) for tool, marks in _MARKS.items()}
    (first, most), (_, fewer) = sorted(found.items(), key=lambda item: -len(item[1]))
    if most and not fewer:
        return first
    if not most:
        ours = sorted(OPTION_NAMES & given.keys())
        what = f"; {in_line(ours, 5)} are Theodora's own: is it a recipe already?" if ours else ""
        raise ConfigError(
            f"{path} holds none of the fields that tell whose recipe it is. Found {in_line(sorted(given), 9)}{what} "
            f"Pass --from {' or '.join(_MARKS)}."
        )
    both = "; ".join(f"{TOOLS[tool]} has {in_line(names, 6)}" for tool, names in found.items())
    raise ConfigError(f"{path} may be of two tools: {both}. Pass --from {' or '.join(_MARKS)}.")
