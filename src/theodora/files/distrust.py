"""Reading files of adapters and models that nobody vouches for: every way they can be wrong is a CheckpointError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from theodora.errors import CheckpointError, shown
from theodora.files.folder import OpenFile, read_file
from theodora.files.names import FINGERPRINT_KEY, METADATA_KEY
from theodora.files.safetensors import LONGEST_HEADER, read_safetensors
from theodora.parse import parse_json

_LARGEST = 1e38  # nearly float32's largest number; NaN is not less than it, either
# Names in safetensors headers of the dtypes that weights and adapters are computed in. Anything else is quantised.
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


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
        content = read_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return parse_object(content, path)


def parse_object(content: bytes, path: Path) -> dict[str, Any]:
    """What a JSON file holds, given its bytes; the path is for messages.

    Raises:
        CheckpointError: it is no JSON, or no object.
    """
    try:
        value = parse_json(content.decode("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}; expected an object")
    return value


def read_tensors(
    file: Path | OpenFile, device: torch.device | None = None, longest: int = LONGEST_HEADER
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a safetensors file, and what we store in its metadata; memory is bounded by the file's size.

    Args:
        file: the file. It is read once: what others write to it afterwards does not reach the tensors.
        device: a GPU that is to hold the tensors; where None, or without room there, they are in host memory.
        longest: bytes that the header may have.

    Raises:
        CheckpointError: the file cannot be read, is damaged, says something twice, or is written to meanwhile.
    """
    path = file if isinstance(file, Path) else file.path
    try:
        if isinstance(file, Path):
            with OpenFile.at(file) as opened:
                tensors, metadata = read_safetensors(opened, device, longest)
        else:
            tensors, metadata = read_safetensors(file, device, longest)
        return tensors, checked_metadata(metadata.get(METADATA_KEY, "{}"))
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"{path} is damaged or incomplete ({error}). Use another copy, or an earlier checkpoint."
        ) from error


def checked_metadata(text: str) -> dict[str, Any]:
    """What we store beside PEFT's tensors; a ValueError if it is not of our making."""
    metadata = parse_json(text)
    if not isinstance(metadata, dict):
        raise ValueError(f"its {METADATA_KEY} metadata is no object")
    fingerprint = metadata.get(FINGERPRINT_KEY) or {}
    if not isinstance(fingerprint, dict) or not all(
        isinstance(values, list) and all(isinstance(value, float) and abs(value) < _LARGEST for value in values)
        for values in fingerprint.values()
    ):
        raise ValueError(f"its {METADATA_KEY} metadata holds no probe of a base model")
    if not isinstance(metadata.get("starts", False), bool):
        raise ValueError(f"its {METADATA_KEY} metadata does not say whether there are start factors")
    return metadata
