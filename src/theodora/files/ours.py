"""Which folders we wrote, and whether they are still as we wrote them: only those may `--overwrite` replace.

Names of files do not tell: downloaded models, adapters and training runs have the same ones. So whoever writes a whole
folder writes a list of its files last, `theodora_files.json`. A folder that holds other files, or a file newer than the
list, is not ours any more. The list has a hash of each file, by which `changes` tells damaged and exchanged ones. The
two files of an adapter are copied without the list, so their hashes are in the header of the weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from theodora.errors import CheckpointError, UsageError, shown
from theodora.files.atomic import atomic_write
from theodora.files.folder import OpenFile, read_file
from theodora.files.names import CONFIG_NAME, WEIGHTS_NAME
from theodora.files.read_back import write_json
from theodora.files.safetensors import read_safetensors
from theodora.parse import parse_json

MARK = "theodora_files.json"
CHECKPOINT = "checkpoint"
"""The form of a checkpoint of a run, which no export and no merge may replace."""
HASHES_KEY = "theodora_sha256"
"""In the header of an adapter's weights: the hashes of its tensors and of its configuration."""
_NAMES_TOLD = 5
_WHERE = ("base_model_name_or_path", "revision")


def mark_written(folder: Path, form: str, onto: str | None = None) -> None:
    """Write into a folder that is finished what it is and which files it consists of.

    Args:
        folder: the folder.
        form: what it is.
        onto: of a merged model: which weights the adapter was merged onto (see `merging/onto.py`).
    """
    names = [name for name in _files(folder) if name != MARK]
    hashes = {name: sha256(folder / name) for name in names if (folder / name).is_file()}
    fields: dict[str, Any] = {"form": form, "files": names, "sha256": hashes}
    fields |= {} if onto is None else {"onto": onto}
    with atomic_write(folder / MARK) as file:
        write_json(file, fields)


def merged_onto(folder: Path) -> str | None:
    """Which weights an adapter was merged onto in a folder, as its list says; None where nothing says so."""
    try:
        said = parse_json(read_file(folder / MARK).decode("utf-8")).get("onto")
    except (OSError, ValueError, AttributeError, CheckpointError):
        return None
    return said if isinstance(said, str) else None


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changes(folder: Path) -> list[str] | None:
    """How a folder differs from what was written: each file that changed, with what was found and expected.

    Returns:
        an empty list if nothing changed; None if nothing says what was written.
    """
    if (folder / MARK).is_file():
        return _changes_by_list(folder)
    return _changes_by_header(folder)


def hashes_of_adapter(tensors: Mapping[str, Tensor], config: str) -> str:
    """What `HASHES_KEY` stands for in the header of an adapter's weights."""
    return json.dumps({WEIGHTS_NAME: _hash_of_tensors(tensors), CONFIG_NAME: _hash_of_config(config)})


def described(folder: Path) -> str | None:
    """Whether a folder is as it was written, in words; None where it is none."""
    if not folder.is_dir():
        return None
    differences = changes(folder)
    if differences is None:
        return "nothing says how it was written"
    return f"NOT as it was written: {'; '.join(differences)}" if differences else "as it was written"


def _changes_by_list(folder: Path) -> list[str] | None:
    try:
        fields = parse_json(read_file(folder / MARK).decode("utf-8"))
        hashes = fields.get("sha256")
        if hashes is None:  # of an earlier version
            return None
        expected = {str(name): str(value) for name, value in hashes.items()}
        if outside := [name for name in expected if Path(name).is_absolute() or ".." in Path(name).parts]:
            raise ValueError(f"it names {shown(outside[0])}, which is outside of its folder")
    except (OSError, ValueError, AttributeError, CheckpointError) as error:
        return [f"{MARK} cannot be read ({error})"]
    return [change for name, value in expected.items() if (change := _change(folder / name, name, value))]


def _change(path: Path, name: str, expected: str) -> str | None:
    if not path.is_file():
        return f"{_told(name)} is missing"
    try:
        hash_now = sha256(path)
    except OSError as error:
        return f"{_told(name)} cannot be read ({error.strerror})"
    return None if hash_now == expected else _difference(name, hash_now, expected)


def _difference(name: str, now: str, expected: str) -> str:
    return f"{_told(name)} has changed (sha256 {now[:12]}…, written as {expected[:12]}…)"


def _told(name: str) -> str:
    return name if name.isprintable() else shown(name)


def _changes_by_header(folder: Path) -> list[str] | None:
    try:
        with OpenFile.at(folder / WEIGHTS_NAME) as file:
            tensors, metadata = read_safetensors(file)
        written = metadata.get(HASHES_KEY)
        if written is None:
            return None
        expected: dict[str, Any] = parse_json(written)
        config = _hash_of_config(read_file(folder / CONFIG_NAME).decode("utf-8"))
        now = {WEIGHTS_NAME: _hash_of_tensors(tensors), CONFIG_NAME: config}
    except FileNotFoundError as error:
        return [f"{Path(str(error.filename)).name} is missing"] if (folder / WEIGHTS_NAME).is_file() else None
    except (OSError, ValueError, AttributeError, CheckpointError) as error:
        return [f"{WEIGHTS_NAME} or {CONFIG_NAME} cannot be read ({error})"]
    return [
        _difference(name, value, str(expected.get(name))) for name, value in now.items() if value != expected.get(name)
    ]


def _hash_of_config(text: str) -> str:
    """The hash of what a configuration says, however it is laid out, but for where the base lies, which may change."""
    fields = {name: value for name, value in parse_json(text).items() if name not in _WHERE}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _hash_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    hashed = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def check_outside(output: Path, inputs: Mapping[str, Path]) -> None:
    """Raise a UsageError if `output` is, or contains, one of the `inputs` (what it is called → folder)."""
    for what, folder in inputs.items():
        if folder.resolve().is_relative_to(output.resolve()):
            raise UsageError(f"The output {output} is, or contains, the {what} ({folder}). Choose another place.")


def check_replaceable(output: Path, overwrite: bool, kind: str, why_not: str | None) -> None:
    """Raise a UsageError if what stands at `output` may not be replaced.

    Args:
        output: what stands there.
        overwrite: whether anything may be.
        kind: what may be: an earlier merge, say.
        why_not: why it is none, if it is none.
    """
    if not overwrite:
        raise UsageError(f"{output} already exists. Choose another --output, or allow --overwrite.")
    if why_not is not None:
        raise UsageError(
            f"{output} is no earlier {kind} ({why_not}), so --overwrite does not delete it. Choose another --output, "
            "or remove it yourself."
        )


def why_not_ours(folder: Path) -> str | None:
    """Why a folder is not one that `mark_written` finished, as it was then; None for one."""
    try:
        fields = parse_json(read_file(folder / MARK).decode("utf-8"))
        written = fields["files"]
        last = (folder / MARK).stat().st_mtime_ns
        known = {MARK, *written}
    except (OSError, ValueError, KeyError, TypeError, CheckpointError):
        return f"it has no {MARK} that lists its files"
    if fields.get("form") == CHECKPOINT:
        return "it is a checkpoint of a training run"
    names = _files(folder)
    if others := [name for name in names if name not in known]:
        more = ", …" if len(others) > _NAMES_TOLD else ""
        return f"it also holds {', '.join(shown(name) for name in others[:_NAMES_TOLD])}{more}"
    changed = [name for name in names if (folder / name).lstat().st_mtime_ns > last]
    return f"{shown(changed[0])} was written to since" if changed else None


def _files(folder: Path) -> list[str]:
    """Paths of all that lies in a folder, however deep: files, and links to anything."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in paths)
