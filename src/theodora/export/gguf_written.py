"""Writing GGUF files, and reading back every tensor's bits and every field of the header.

The package `gguf` writes tensors with NumPy's `tofile`, which bypasses Python's file objects: an error that the disk
reports on closing may get lost.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from theodora.errors import CheckpointError, bullet_list
from theodora.export.gguf_files import open_reader
from theodora.files.atomic import flush
from theodora.files.read_back import unlike

_NAMES_TOLD = 12


def quantized(name: str, array: Any, kind: Any) -> Any:
    """An array as it is stored.

    Raises:
        CheckpointError: it holds NaN or infinite values, or the kind of numbers cannot hold its values.
    """
    import gguf

    if not bool(np.isfinite(array).all()):
        raise CheckpointError(f"{name}: the weight holds NaN or infinite values. Nothing was written.")
    with np.errstate(over="ignore", invalid="ignore"):
        data = gguf.quants.quantize(array, kind)
        finite = bool(np.isfinite(gguf.quants.dequantize(data, kind)).all())
    if not finite:
        raise CheckpointError(
            f"{name}: values beyond the range of {kind.name} (the largest is {np.abs(array).max():.3g}). Export with "
            "--dtype bf16 or fp32 instead. Nothing was written."
        )
    return data


def write_and_read_back(writer: Any, output: Path) -> None:
    """Have a `gguf.GGUFWriter` write its file, and compare what is there with what it was given.

    Raises:
        CheckpointError: the file holds something else.
    """
    tensors = {name: _hash(info.tensor) for name, info in writer.tensors[0].items()}
    fields = {name: _plain(value.value) for name, value in writer.kv_data[0].items()}
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    flush(output)
    try:
        reader = open_reader(output)
        hashes = {tensor.name: _hash(tensor.data) for tensor in reader.tensors}
        said = {name: field.contents() for name in fields if (field := reader.get_field(name)) is not None}
    except (CheckpointError, ValueError, IndexError, OSError, UnicodeDecodeError) as error:
        raise unlike(output, str(error)) from error
    wrong = [name for name in (*tensors, *(hashes.keys() - tensors)) if hashes.get(name) != tensors.get(name)]
    wrong += [name for name, value in fields.items() if name not in said or _plain(said[name]) != value]
    if wrong:
        raise unlike(output, f"other values in {', '.join(wrong[:3])}{', …' if len(wrong) > 3 else ''}")


def check_finite(path: Path) -> None:
    """Raise a CheckpointError for a file that another program wrote, if a tensor in it is not finite."""
    import gguf

    bad: list[str] = []
    for tensor in open_reader(path).tensors:
        with np.errstate(over="ignore", invalid="ignore"):
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if not bool(np.isfinite(values).all()):
            bad.append(f"{tensor.name} ({tensor.tensor_type.name})")
    if bad:
        raise CheckpointError(
            "The file holds NaN or infinite values, and was not kept; export with --dtype bf16 or fp32:"
            + bullet_list(bad, _NAMES_TOLD)
        )


def _hash(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()


def _plain(value: Any) -> Any:
    """A field's value as the file holds it: text, whole numbers, and floats of 32 bits."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bytes | bytearray):
        return [*value]
    if isinstance(value, list | tuple):
        return [_text(item) if isinstance(item, bytes | bytearray) else _plain(item) for item in value]
    if isinstance(value, float):
        return float(np.float32(value))
    return value


def _text(data: bytes | bytearray) -> str:
    return data.decode("utf-8", errors="backslashreplace")
