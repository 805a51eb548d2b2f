"""Whether an adapter's file holds all of the modules that it says were trained in full."""

from __future__ import annotations

from collections.abc import Iterable

from theodora.files.adapter import AdapterFile
from theodora.paths import matches


def missing_in_full(file: AdapterFile, parameters: Iterable[str], held: Iterable[str] | None = None) -> list[str]:
    """What a file leaves out of the modules that it says were trained in full: a complaint about each parameter.

    Args:
        file: the adapter.
        parameters: paths of all parameters of the base model.
        held: the keys of `file.full` by the base model's names. Default: as they are.
    """
    names, present = (*file.full_names, *file.config.modules_to_save), set(file.full if held is None else held)
    return [
        f"{path}: its module was trained in full, but the file holds nothing for it"
        for path in parameters
        if names and path not in present and any(matches(names, module) for module in _modules_above(path))
    ]


def _modules_above(parameter: str) -> list[str]:
    parts = parameter.split(".")[:-1]
    return [".".join(parts[: n + 1]) for n in range(len(parts))]
