"""Reading files of adapters and models that nobody vouches for: every way they can be wrong is a CheckpointError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from theodora.errors import CheckpointError, shown
from theodora.parse import parse_json

_LARGEST = 1e38  # float32's; NaN is not less either
# Names in safetensors headers of the dtypes that weights and adapters are computed in. Anything else is quantised.
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
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


def read_tensors(path: Path, device: torch.device | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a safetensors file, and what we keep in its metadata; memory is bounded by the file's size.

    Args:
        path: the file.
        device: a GPU that is to hold the tensors; where None, or without room there, they are the file itself, mapped.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or says something twice.
    """
    try:
        header, begin = _header(path)
        with safe_open(path, framework="pt") as file:
            metadata = _checked_metadata((file.metadata() or {}).get(METADATA_KEY, "{}"))
            keys = list(file.keys())
            # Not by `get_tensor`, which loses 64 bytes of memory at each call (safetensors 0.8): a server that reads
            # adapters all day would notice. And a GPU gets the file in one piece, in half the time of many copies.
            content = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
            content = content if device is None else content.to(device)
            found = {key: _tensor(content, header[key], begin) for key in keys}
            on = content.device
            return {key: file.get_tensor(key).to(on) if t is None else t for key, t in found.items()}, metadata
    except torch.OutOfMemoryError:
        return read_tensors(path)
    except (SafetensorError, ValueError, OSError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged or incomplete ({error}). Use another copy, or an earlier checkpoint."
        ) from error


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, and where its data begin; a ValueError if it describes one twice.

    Readers differ in which description they believe. Everything else (offsets that overlap, leave gaps or end elsewhere
    than the file) safetensors itself refuses.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        # If that is more than there is, safetensors says what is wrong.
        return parse_json(file.read(length)) if length <= path.stat().st_size else {}, 8 + length


def _tensor(content: Tensor, described: dict[str, Any], begin: int) -> Tensor | None:
    """A tensor in the content of its file, (bytes,); None if its numbers are of a kind or in a place that torch wants
    copied."""
    dtype = FLOAT_DTYPES.get(described["dtype"])
    first, end = (begin + offset for offset in described["data_offsets"])
    if dtype is None or first % dtype.itemsize:
        return None
    return content[first:end].view(dtype).view(described["shape"])


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
