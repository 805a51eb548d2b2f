"""Reading files of adapters and models that nobody vouches for: every way they can be wrong is a CheckpointError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from theodora.errors import CheckpointError, shown
from theodora.parse import parse_json

_LARGEST = 1e38  # float32's; NaN is not less either
METADATA_KEY = "theodora"
"""In the header of a safetensors file: what we keep beside PEFT's tensors."""


def expanded(name: str | Path) -> Path:
    """The path that a name says, `~` included.

    Raises:
        CheckpointError: no path can have that name.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a user (~name) who does not exist
        raise CheckpointError(f"{shown(str(name))} is no folder: {error}") from error
    return path


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: the file cannot be read, is no JSON, or holds something else.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}; expected an object")
    return content


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a safetensors file, and what we keep in its metadata; memory is bounded by the file's size.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or says something twice.
    """
    try:
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            metadata = _checked_metadata((file.metadata() or {}).get(METADATA_KEY, "{}"))
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or incomplete ({error}). Use another copy, or an earlier checkpoint."
        ) from error


def _check_header(path: Path) -> None:
    """A ValueError if a safetensors file describes a tensor twice: readers differ in which description they believe.

    Everything else (offsets that overlap, leave gaps or end elsewhere than the file) safetensors itself refuses.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length <= path.stat().st_size:  # otherwise safetensors says what is wrong
            parse_json(file.read(length))


def _checked_metadata(text: str) -> dict[str, Any]:
    """What we keep beside PEFT's tensors; a ValueError if it is not of our making."""
    metadata = parse_json(text)
    if not isinstance(metadata, dict):
        raise ValueError(f"its {METADATA_KEY} metadata is no object")
    probe = metadata.get("probe") or {}
    if not isinstance(probe, dict) or not all(
        isinstance(values, list) and all(isinstance(value, float) and abs(value) < _LARGEST for value in values)
        for values in probe.values()
    ):
        raise ValueError(f"its {METADATA_KEY} metadata holds no probe of a base model")
    if not isinstance(metadata.get("starts", False), bool):
        raise ValueError(f"its {METADATA_KEY} metadata does not say whether there are start factors")
    return metadata
