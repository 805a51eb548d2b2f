"""What a typed name of a model or an adapter stands for, told without the libraries that load it."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theodora.errors import UsageError
from theodora.files.names import CONFIG_NAME
from theodora.studio.metrics import read

_ON_HUB = re.compile(r"\w[\w.-]*(/[\w.-]+)?")  # none that a command would take for a flag
_LARGEST_CONFIG = 1 << 20


@dataclass(frozen=True)
class Source:
    """A model or an adapter."""

    name: str
    """For a command: a folder's path, or a name on the hub."""
    base: str | None
    """Of an adapter the model that it names; None for a model."""
    told: str
    """What it is, for people: the method and rank of an adapter."""

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter."""
        return self.base is not None


def source_of(typed: str) -> Source:
    """Tell a run, an adapter, a model folder and a name on the hub apart.

    Raises:
        UsageError: it is none of them.
    """
    typed = typed.strip()
    if not typed:
        raise UsageError("is empty; expected a run, an adapter, or a model")
    path = Path(os.path.abspath(os.path.expanduser(typed)))
    if not path.is_dir():
        if path.exists() or typed.startswith(("/", ".", "~")) or not _ON_HUB.fullmatch(typed):
            raise UsageError(f"{path} is no folder of this machine")
        return Source(typed, None, "model")  # of the hub, where the command looks for it
    if (path / CONFIG_NAME).is_file():
        config = _json_of(path / CONFIG_NAME)
        rank = config.get("r")
        method = "DoRA" if config.get("use_dora") is True else "LoRA"
        base = config.get("base_model_name_or_path")
        return Source(
            str(path), base if isinstance(base, str) else "", f"{method} {rank}" if type(rank) is int else method
        )
    if (path / "config.json").is_file():
        return Source(str(path), None, "model")
    raise UsageError(f"{path} holds neither an adapter ({CONFIG_NAME}) nor a model (config.json); has the run ended?")


def _json_of(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(read(file, _LARGEST_CONFIG))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
