"""The safetensors format, read from bytes in memory: every word of the header is checked before it is believed.

    8 bytes                    N, the length of the header
    N bytes                    JSON: {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, …}
    the rest                   the tensors, one after the other, without gaps

The safetensors library maps a file, or copies its bytes twice. Here the bytes are read once, from one descriptor, and
tensors are views of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from theodora.errors import CheckpointError, shown
from theodora.files.folder import OpenFile
from theodora.files.memory import available_memory
from theodora.parse import parse_json

LONGEST_HEADER = 32 << 20
"""Bytes, enough for 150,000 tensors. Parsed JSON takes some twenty times as much memory as its text."""
_MOST_DIMENSIONS = 64  # of NumPy's arrays, and of several of torch's operations
_MOST = 2**63  # bytes that a tensor may seem to have, as 64 bits count them
_METADATA = "__metadata__"
_PIECE = 32 << 20  # bytes on their way to a GPU
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}


@dataclass(frozen=True)
class Described:
    """One tensor, as the header describes it."""

    kind: str
    """Its dtype, as the format calls it: F32, BF16, I64, …"""
    shape: tuple[int, ...]
    begin: int
    """Its first byte, counted from the end of the header."""
    end: int

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype, as torch calls it."""
        return _DTYPES[self.kind]


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    tensors: dict[str, Described]
    metadata: dict[str, str]
    length: int
    """Bytes before the tensors begin."""


def read_safetensors(
    file: OpenFile, device: torch.device | None = None, longest: int = LONGEST_HEADER
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata; memory is bounded by the file's size.

    Args:
        file: is read once, into memory.
        device: a GPU that is to hold the tensors; where None, or without room there, they are in host memory.
        longest: bytes that the header may have.

    Raises:
        ValueError: it is no safetensors file, or says something twice.
        CheckpointError: it cannot be read, is too large for this machine, or is written to meanwhile.
    """
    header = read_header(file, longest)
    if file.size > (room := available_memory()):
        raise CheckpointError(f"{file.path} has {file.size:,} bytes; this machine has {room:,} bytes of memory left")
    content = None
    if device is not None:
        with suppress(torch.OutOfMemoryError):
            content = _content(file, header.length, device)
    if content is None:
        content = torch.empty(file.size - header.length, dtype=torch.uint8)
        file.fill(content.numpy().data, header.length)
    file.check()
    return {name: _tensor(content, described) for name, described in header.tensors.items()}, header.metadata


def read_header(file: OpenFile, longest: int = LONGEST_HEADER) -> Header:
    """The header of a safetensors file, checked; errors as in `read_safetensors`."""
    start = memoryview(bytearray(min(8, file.size)))
    file.fill(start)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > file.size - 8:
        raise ValueError(f"its header would have {length:,} bytes, and the file has {file.size:,}")
    if length > longest:
        raise ValueError(f"its header has {length:,} bytes; expected at most {longest:,}")
    text = memoryview(bytearray(length))
    file.fill(text, 8)
    tensors, metadata = parse_header(bytes(text), file.size - 8 - length)
    return Header(tensors, metadata, 8 + length)


def read_tensor(file: OpenFile, header: Header, described: Described) -> Tensor:
    """One tensor of a large file, in memory of its own.

    Raises:
        CheckpointError: the file cannot be read, or was written to since it was opened.
    """
    content = torch.empty(described.end - described.begin, dtype=torch.uint8)
    file.fill(content.numpy().data, header.length + described.begin)
    file.check()
    return content.view(described.dtype).view(described.shape)


def parse_header(text: bytes, size: int) -> tuple[dict[str, Described], dict[str, str]]:
    """What the header of a safetensors file describes, and its metadata.

    Args:
        text: the header.
        size: bytes that follow it.

    Raises:
        ValueError: it is no such header, says something twice, or the tensors do not fill the file from end to end.
    """
    if not text.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    header = parse_json(text.decode("utf-8"))
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(map(_is_text, (*metadata, *metadata.values()))):
        raise ValueError(f"its {_METADATA} is {shown(metadata)}; expected texts by name")
    tensors = {name: _described(name, fields) for name, fields in header.items()}
    at = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != at:
            raise ValueError(
                f"{shown(name)} begins at byte {tensor.begin:,}; expected {at:,}, where the one before ends"
            )
        at = tensor.end
    if at != size:
        raise ValueError(f"its tensors have {at:,} bytes, and the file has {size:,} for them")
    return tensors, metadata


def _described(name: str, fields: Any) -> Described:
    if not _is_text(name):
        raise ValueError(f"the name {shown(name)} holds half a character")
    if not isinstance(fields, Mapping):
        raise ValueError(f"{shown(name)} is described by {shown(fields)}; expected dtype, shape and data_offsets")
    dtype = _DTYPES.get(kind) if isinstance(kind := fields.get("dtype"), str) else None
    if dtype is None or not isinstance(kind, str):
        raise ValueError(f"{shown(name)} has dtype {shown(kind)}; expected one of {', '.join(_DTYPES)}")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    if not _are_sizes(shape):
        raise ValueError(f"{shown(name)} has shape {shown(shape)}; expected whole numbers of at least 0")
    if len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{shown(name)} has {len(shape)} dimensions; expected at most {_MOST_DIMENSIONS}")
    if math.prod(size or 1 for size in shape) * dtype.itemsize >= _MOST:  # beside a 0, too: strides are products
        raise ValueError(f"{shown(name)} has shape {shown(shape)}, which is more than any memory holds")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{shown(name)} has data_offsets {shown(offsets)}; expected its first byte and its end")
    begin, end = offsets
    if end - begin != (wanted := math.prod(shape) * dtype.itemsize):
        raise ValueError(f"{shown(name)} lies in {end - begin:,} bytes; expected {wanted:,} of its shape and dtype")
    return Described(kind, tuple(shape), begin, end)


def _is_text(value: Any) -> bool:
    """Whether it is a text of whole characters: JSON can hold halves of them, which no terminal and no file takes."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < _MOST for size in value)


def _content(file: OpenFile, begin: int, device: torch.device) -> Tensor:
    """All after the header on a GPU, in pieces through a little host memory: new memory is slower than copying."""
    content = torch.empty(file.size - begin, dtype=torch.uint8, device=device)
    memory = torch.empty(min(_PIECE, len(content)), dtype=torch.uint8)
    for part in content.split(_PIECE):
        piece = memory[: len(part)]
        file.fill(piece.numpy().data, begin)
        part.copy_(piece)
        begin += len(piece)
    return content


def _tensor(content: Tensor, described: Described) -> Tensor:
    part = content[described.begin : described.end]
    if described.begin % described.dtype.itemsize:  # torch views numbers only at multiples of their size
        part = part.clone()
    return part.view(described.dtype).view(described.shape)
