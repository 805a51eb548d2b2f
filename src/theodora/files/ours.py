"""Which folder we wrote, and has stayed as we wrote it: what `--overwrite` may replace.

Names of files do not tell: a model that was downloaded, an adapter and a training run have the same. So what is written
as a whole lists its files in `theodora_files.json`, the last of them, and is not ours any more once others lie beside
them or one was written to. The list holds a hash of each file, by which what was damaged or exchanged is told
(`changes`); an adapter, whose two files travel alone, carries its own in the header of its weights.
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
from theodora.files.read_back import write_json
from theodora.files.safetensors import read_safetensors
from theodora.parse import parse_json

MARK = "theodora_files.json"
CHECKPOINT = "checkpoint"
"""The form of a checkpoint of a run, which no export and no merge may replace."""
HASHES_KEY = "theodora_sha256"
"""Where an adapter's weights tell, in their header, what they and their configuration were when they were written."""
_SHOWN = 5
_WHERE = ("base_model_name_or_path", "revision")
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def mark_written(folder: Path, form: str) -> None:
    """Write into a folder that is finished what it is and which files it consists of."""
    names = [name for name in _files(folder) if name != MARK]
    hashes = {name: sha256(folder / name) for name in names if (folder / name).is_file()}
    fields = {"form": form, "files": names, "sha256": hashes}
    with atomic_write(folder / MARK) as file:
        write_json(file, fields)


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changes(folder: Path) -> list[str] | None:
    """What is not as it was written in a folder that says so: each file, with what was found and expected.

    Returns:
        an empty list if all is; None if nothing says how it was.
    """
    if (folder / MARK).is_file():
        return _changes_by_list(folder)
    return _changes_by_header(folder)


def hashes_of_adapter(tensors: Mapping[str, Tensor], config: str) -> str:
    """What `HASHES_KEY` stands for in the header of an adapter's weights."""
    return json.dumps({_WEIGHTS: _hash_of_tensors(tensors), _CONFIG: _hash_of_config(config)})


def described(folder: Path) -> str | None:
    """Whether a folder is as it was written, in words; None where it is none."""
    if not folder.is_dir():
        return None
    found = changes(folder)
    if found is None:
        return "nothing says how it was written"
    return f"NOT as it was written: {'; '.join(found)}" if found else "as it was written"


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
        found = sha256(path)
    except OSError as error:
        return f"{_told(name)} cannot be read ({error.strerror})"
    return None if found == expected else _difference(name, found, expected)


def _difference(name: str, found: str, expected: str) -> str:
    return f"{_told(name)} has changed (sha256 {found[:12]}…, written as {expected[:12]}…)"


def _told(name: str) -> str:
    return name if name.isprintable() else shown(name)


def _changes_by_header(folder: Path) -> list[str] | None:
    try:
        with OpenFile.at(folder / _WEIGHTS) as file:
            tensors, metadata = read_safetensors(file)
        written = metadata.get(HASHES_KEY)
        if written is None:
            return None
        expected: dict[str, Any] = parse_json(written)
        config = _hash_of_config(read_file(folder / _CONFIG).decode("utf-8"))
        found = {_WEIGHTS: _hash_of_tensors(tensors), _CONFIG: config}
    except FileNotFoundError as error:
        return [f"{Path(str(error.filename)).name} is missing"] if (folder / _WEIGHTS).is_file() else None
    except (OSError, ValueError, AttributeError, CheckpointError) as error:
        return [f"{_WEIGHTS} or {_CONFIG} cannot be read ({error})"]
    return [
        _difference(name, value, str(expected.get(name)))
        for name, value in found.items()
        if value != expected.get(name)
    ]


def _hash_of_config(text: str) -> str:
    """Of what a configuration says, however it is laid out; where the base lies is for everybody to change."""
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


def check_apart(output: Path, inputs: Mapping[str, Path]) -> None:
    """Raise a UsageError if `output` is, or contains, one of the `inputs`, given by what they are called."""
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
    found = _files(folder)
    if others := [name for name in found if name not in known]:
        more = ", …" if len(others) > _SHOWN else ""
        return f"it also holds {', '.join(shown(name) for name in others[:_SHOWN])}{more}"
    changed = [name for name in found if (folder / name).lstat().st_mtime_ns > last]
    return f"{shown(changed[0])} was written to since" if changed else None


def _files(folder: Path) -> list[str]:
    """What lies in a folder, however deep: files, and links to whatever."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in paths)
