"""The two files of an adapter, opened once and read into memory, from a folder that others may write to meanwhile."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from theodora.errors import CheckpointError
from theodora.files.distrust import checked_metadata, expanded, parse_object, read_tensors
from theodora.files.folder import LARGEST_TEXT, Folder, Place, Seen
from theodora.files.names import CONFIG_NAME, METADATA_KEY, MLX_WEIGHTS_NAME, WEIGHTS_NAME
from theodora.files.safetensors import read_header

Stamp = tuple[Seen | None, Seen | None]
"""What tells an adapter's configuration and tensors from files that took their places or were written anew."""


@dataclass(frozen=True)
class Bounds:
    """How large an adapter's files may be, in bytes. (Python parses JSON in one go, and a server's other requests wait
    until it is done.)"""

    text: int = LARGEST_TEXT
    """Of the configuration, and of the header of the tensors."""
    file: int | None = None
    """Of the file of the tensors; None for all that memory holds."""


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter's two files hold; only their format has been checked."""

    folder: Path
    weights: Path
    """PEFT's file of tensors, or MLX's."""
    fields: dict[str, Any]
    """Of the configuration."""
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    """What we store beside the tensors."""
    stamp: Stamp
    """Of the files that were read."""


def read_adapter_files(
    path: str | Path | Place, device: torch.device | None = None, bounds: Bounds | None = None
) -> AdapterFiles:
    """Read an adapter's folder, or one of the hub's.

    Args:
        path: the folder, or its name on the hub.
        device: a GPU that is to hold the tensors; where None, they are in host memory.
        bounds: how large its files may be.

    Raises:
        CheckpointError: a file is missing, too large, damaged, or written to meanwhile.
    """
    with _open_folder(path) as folder, ExitStack() as stack:
        if (config := folder.open(CONFIG_NAME)) is None:
            raise CheckpointError(_what_is_missing(folder, has_config=False))
        stack.enter_context(config)
        if (weights := folder.open(WEIGHTS_NAME) or folder.open(MLX_WEIGHTS_NAME)) is None:
            raise CheckpointError(_what_is_missing(folder, has_config=True))
        stack.enter_context(weights)
        bounds = bounds or Bounds()
        if bounds.file is not None and weights.size > bounds.file:
            raise CheckpointError(f"{weights.path} has {weights.size:,} bytes; expected at most {bounds.file:,}")
        fields = parse_object(config.read(bounds.text), config.path)
        tensors, metadata = read_tensors(weights, device, bounds.text)
        stamp = config.seen, weights.seen
        if stamp_of(folder) != stamp:  # one file may be of another adapter than the other
            raise CheckpointError(f"{folder.path} changed while it was read. Read it again when it is written.")
        return AdapterFiles(folder.path, weights.path, fields, tensors, metadata, stamp)


def read_adapter_metadata(path: str | Path | Place) -> dict[str, Any]:
    """What we store beside the tensors, read from the header alone; empty where a damaged file does not tell.

    Raises:
        CheckpointError: there is no such folder.
    """
    with _open_folder(path) as folder:
        weights = folder.open(WEIGHTS_NAME) or folder.open(MLX_WEIGHTS_NAME)
        if weights is None:
            return {}
        with weights:
            try:
                return checked_metadata(read_header(weights).metadata.get(METADATA_KEY, "{}"))
            except (ValueError, OSError, CheckpointError):  # whoever reads the tensors says so
                return {}


def stamp_of(folder: Folder) -> Stamp:
    """The stamp of an adapter's folder as it is now; None for a file that is not there."""
    return folder.seen(CONFIG_NAME), folder.seen(WEIGHTS_NAME) or folder.seen(MLX_WEIGHTS_NAME)


def _what_is_missing(folder: Folder, has_config: bool) -> str:
    names = folder.names()
    if not has_config:
        held = ", ".join(names[:8]) or "nothing"
        return f"{folder.path} is no adapter folder: expected {CONFIG_NAME} and {WEIGHTS_NAME}, found {held}"
    if "adapter_model.bin" in names:
        return (
            f"{folder.path} holds its tensors in adapter_model.bin, a pickle file, which can run code when read. "
            "Convert it with PEFT: load it and call save_pretrained(..., safe_serialization=True)."
        )
    return f"{folder.path} has {CONFIG_NAME} but no {WEIGHTS_NAME}: the adapter was not saved whole."


def _open_folder(path: str | Path | Place) -> Folder:
    """The folder, held open; from the hub, if there is none of that name."""
    place = path if isinstance(path, Place) else Place(expanded(path))
    try:
        return place.open()
    except FileNotFoundError as error:
        text = "" if isinstance(path, Place) else str(path)
        if text.count("/") == 1 and not text.startswith((".", "/", "~")):
            return Place(_from_hub(text)).open()
        raise CheckpointError(
            f"{place.path} does not exist; expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}"
        ) from error
    except NotADirectoryError as error:
        raise CheckpointError(
            f"{place.path} is no adapter folder: expected {CONFIG_NAME} and {WEIGHTS_NAME}, found a file"
        ) from error
    except (OSError, ValueError) as error:  # no permission; no path can have that name
        raise CheckpointError(f"{place.path} cannot be read: {error}") from error


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME, MLX_WEIGHTS_NAME]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{name} is neither a folder here nor an adapter on the hub ({error})") from error
