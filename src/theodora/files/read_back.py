"""Writing files, and reading each back before it counts as written.

Libraries report a file as written that is not: a disk or a quota may be full at the last flush, a write cut short, a
device fail. So each file is flushed to the disk, read again, and compared bit for bit with what it was to hold, before
the folder around it gets its name. That is one pass over what the system still has in memory. The safetensors library
reads its files here, and not our own reader: it is what other programs will read them with.

All this happens in the hidden siblings of `atomic.py`, so that nothing is left of a file that is refused.
"""

from __future__ import annotations

import filecmp
import json
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from theodora.errors import CheckpointError, bullet_list
from theodora.files.atomic import flush
from theodora.files.finite import not_finite

TOKENIZER_NAME = "tokenizer.json"
"""Of a tokenizer in native code: megabytes, which are compared with what it says rather than parsed."""
_NAMES_TOLD = 12
_ROOM = 2**20  # bytes; a disk with less room counts as full


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None, *, checked: bool = False
) -> None:
    """Write tensors on the CPU as a safetensors file, and read them back.

    Args:
        tensors: finite ones.
        path: the file.
        metadata: of its header.
        checked: whether the caller has made sure that they are finite, or wants them as they are.

    Raises:
        CheckpointError: they are not finite, and nothing was written; or the file does not hold them.
    """
    bad = [] if checked else not_finite(tensors.items())
    if bad:
        raise CheckpointError(
            f"{_called(path)} would hold NaN or infinite values, and was not written:" + bullet_list(bad, _NAMES_TOLD)
        )
    save_file(dict(tensors), path, dict(metadata) if metadata is not None else None)
    check_tensors(path, tensors, metadata)


def check_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Read a safetensors file and compare it with what it was to hold.

    Raises:
        CheckpointError: it holds something else.
    """
    flush(path)
    try:
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != set(tensors):
                raise unlike(path, "it holds other tensors")
            if metadata is not None and (file.metadata() or {}) != dict(metadata):
                raise unlike(path, "its header says something else")
            wrong = [name for name, tensor in tensors.items() if not same_bits(file.get_tensor(name), tensor)]
    except (SafetensorError, OSError, ValueError) as error:
        raise unlike(path, str(error)) from error
    if wrong:
        raise unlike(path, f"other values in {', '.join(wrong[:3])}{', …' if len(wrong) > 3 else ''}")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same in shape, dtype and every bit (NaN is like itself)."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(_bytes(one), _bytes(other))


def check_model(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Look at a model folder that transformers wrote: its files are whole, and hold the tensors under these names.

    (transformers writes some tensors under names of its own, and weights that share their values once. Whatever has
    no counterpart in `tensors` is only read.)

    Raises:
        CheckpointError: a file is damaged, or holds other values.
    """
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        flush(path)
        try:
            with safe_open(path, framework="pt") as file:
                stored = {name: file.get_tensor(name) for name in file.keys() if name in tensors}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise unlike(path, str(error)) from error
        for name, tensor in stored.items():
            if tensor.shape == tensors[name].shape and not same_bits(tensor, tensors[name].to(tensor.dtype)):
                raise unlike(path, f"other values in {name}")
    check_json(folder)
    if not files:
        raise unlike(folder / "model.safetensors", "it is missing")


def check_json(folder: Path, pattern: str = "*.json", known: Collection[str] = ()) -> None:
    """Raise a CheckpointError if a JSON file in a folder is none; `known` ones were looked at."""
    for path in folder.glob(pattern):
        if path.name in known:
            continue
        flush(path)
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            raise unlike(path, str(error)) from error


def write_text(path: Path, text: str) -> None:
    """Write a file of text, and read it back.

    Raises:
        CheckpointError: it holds something else.
    """
    data = text.encode()
    path.write_bytes(data)
    check_bytes(path, data)


def write_json(path: Path, value: Any, **options: Any) -> None:
    """Write a value as JSON of several lines, and read it back; `options` are those of `json.dumps`."""
    write_text(path, json.dumps(value, indent=2, **options) + "\n")


def check_bytes(path: Path, data: bytes) -> None:
    """Raise a CheckpointError if a file holds anything else than `data`."""
    flush(path)
    read = path.read_bytes()
    if read != data:
        raise unlike(path, f"{len(read):,} bytes, of which some are others; {len(data):,} were written")


def check_lines(path: Path, count: int) -> None:
    """Raise a CheckpointError if a file of JSON lines does not hold so many of them, each whole."""
    flush(path)
    try:
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    except ValueError as error:
        raise unlike(path, str(error)) from error
    if len(lines) != count:
        raise unlike(path, f"{len(lines):,} lines; {count:,} were written")


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's contents, and compare.

    Raises:
        CheckpointError: the copy is another one; or `source` is a link, which has taken the place of the file that was
            looked at.
    """
    shutil.copyfile(source, target, follow_symlinks=False)
    if target.is_symlink():
        target.unlink()
        raise CheckpointError(f"{source} became a link while it was copied; expected a file. Nothing was written.")
    flush(target)
    if not filecmp.cmp(source, target, shallow=False):
        raise unlike(target, f"it is no copy of {source}")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer's files, and read back what they say.

    Raises:
        CheckpointError: one of them is damaged.
    """
    tokenizer.save_pretrained(folder)
    check_tokenizer(tokenizer, folder)


def check_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Raise a CheckpointError if a tokenizer's files in a folder do not say what it is."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # by native code, whole
        check_bytes(folder / TOKENIZER_NAME, backend.to_str(pretty=True).encode())
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str) and (folder / "chat_template.jinja").is_file():
        check_bytes(folder / "chat_template.jinja", template.encode())
    known = {TOKENIZER_NAME} if backend is not None else set[str]()
    check_json(folder, "*token*.json", known)


def unlike(path: Path, why: str) -> CheckpointError:
    """The error for a file that is not what was written."""
    if shutil.disk_usage(path.parent).free < _ROOM:
        return CheckpointError(
            f"No space left on the disk: {_called(path)} does not read back as it was written ({why})."
        )
    return CheckpointError(
        f"{_called(path)} does not read back as it was written ({why}), so it was not kept. The program that wrote it "
        "reported no error: look at the disk, and at quotas and limits on the size of files."
    )


def _called(path: Path) -> str:
    """The name that a file will have; see `atomic.partial_name`."""
    return re.sub(r"^\.(.+)\.(partial|begun)-.*$", r"\1", path.name)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
