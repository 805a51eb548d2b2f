"""Whether a GGUF file holds what its header announces, checked before a reader believes it.

The readers of `gguf` and transformers take lengths as they find them: one changed byte makes them collect 2⁶⁰ items of
a list, or build a model of a thousand times the file's size.

    magic, version, tensors, entries · key, type, value … · name, dimensions, type, offset … · padding · data
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from theodora.config import is_int, is_number
from theodora.errors import CheckpointError, shown

_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_DEEPEST = 4  # lists within lists; files in use have none
_MOST_ITEMS = 2_000_000  # gguf's reader takes 20 µs and 700 bytes for each; a vocabulary of 262,144 has 1.3 million
_MOST_DIMENSIONS = 4  # ggml's
_SPARE = 2.0
"""Parameters of a model for each number in its file: norms may be left out, and a head that shares the embedding's."""


@dataclass
class _Cursor:
    """A place in the file; a ValueError where what is asked for ends behind it."""

    data: mmap.mmap
    order: str = "<"
    at: int = 0
    items: int = 0
    """Of all lists so far."""

    def skip(self, length: int) -> int:
        """Go on by `length` bytes; where they begin."""
        begin = self.at
        if length > len(self.data) - begin:
            raise ValueError(f"{length} bytes are announced at byte {begin}, and {len(self.data) - begin} are left")
        self.at += length
        return begin

    def number(self, code: str) -> Any:
        size = struct.calcsize(self.order + code)
        return struct.unpack_from(self.order + code, self.data, self.skip(size))[0]

    def text(self) -> bytes:
        length = self.number("Q")
        begin = self.skip(length)
        return self.data[begin : begin + length]

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value; of a list its length."""
        if kind in _FORMATS:
            return self.number(_FORMATS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _LIST or depth > _DEEPEST:
            raise ValueError(f"a value of type {kind} at byte {self.at}")
        kind, count = self.number("I"), self.number("Q")
        self.items += count
        if self.items > _MOST_ITEMS:
            raise ValueError(f"lists of {self.items:,} items or more; expected {_MOST_ITEMS:,} at most")
        if kind in _FORMATS:
            self.skip(count * struct.calcsize(self.order + _FORMATS[kind]))
            return count
        for _ in range(count):  # ends at the end of the file at the latest
            self.value(kind, depth + 1)
        return count


@dataclass(frozen=True)
class Contents:
    """What a file holds, as far as it says how much."""

    numbers: int
    """In all tensors."""
    names: tuple[str, ...] = field(repr=False)
    """Of the tensors."""
    values: dict[str, Any] = field(repr=False)

    def value(self, key: str) -> Any:
        """What the header says under a key of the file's architecture; None if nothing."""
        architecture = self.values.get("general.architecture", b"")
        return self.values.get(f"{architecture.decode()}.{key}") if isinstance(architecture, bytes) else None

    def size(self, key: str) -> int | None:
        """The same where it is a whole number above 0; else None."""
        value = self.value(key)
        return value if is_int(value) and value > 0 else None


@dataclass(frozen=True)
class Described:
    """The model that a file describes."""

    config: Any
    """transformers' configuration."""
    shapes: dict[str, torch.Size]
    """See `shapes_of`."""
    completed: tuple[str, ...]
    """Fields of the configuration that transformers' reader left out and that were read here."""
    scaling: str | None
    """The scaling of positions that the file asks for and that neither transformers' reader nor this one applies."""


def check_bounds(path: Path) -> Contents:
    """Go through the header of a GGUF file.

    Raises:
        CheckpointError: it is none, or announces more than the file holds.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _contents(_Cursor(data))
    except (ValueError, OSError, struct.error) as error:
        raise CheckpointError(f"{path} is not a GGUF file, or is damaged: {error}") from error


def _contents(cursor: _Cursor) -> Contents:
    import gguf

    begin = cursor.skip(4)
    if cursor.data[begin : cursor.at] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("I")
    if version & 0xFFFF == 0:  # written by a machine of the other byte order
        cursor.order, version = ">", version >> 24
    if version not in (2, 3):
        raise ValueError(f"version {version}; expected 2 or 3")
    tensors, entries = cursor.number("Q"), cursor.number("Q")
    values: dict[str, Any] = {}
    for _ in range(entries):
        key = cursor.text().decode("utf-8")
        values[key] = cursor.value(cursor.number("I"))
    bytes_in_all, last, numbers = 0, 0, 0
    names: list[str] = []
    for _ in range(tensors):
        name = cursor.text().decode("utf-8")
        if (count := cursor.number("I")) > _MOST_DIMENSIONS:
            raise ValueError(f"{name} has {count} dimensions; expected {_MOST_DIMENSIONS} at most")
        dimensions = [cursor.number("Q") for _ in range(count)]
        kind, offset = cursor.number("I"), cursor.number("Q")
        per_block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        count = math.prod(dimensions)
        if count % per_block:
            raise ValueError(f"{name} has {count} numbers, which come in blocks of {per_block}")
        own = count // per_block * size
        names.append(name)
        last, bytes_in_all, numbers = max(last, offset + own), bytes_in_all + own, numbers + count
    alignment = values.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"an alignment of {alignment}")
    cursor.skip(-cursor.at % alignment if tensors else 0)
    cursor.skip(max(last, bytes_in_all))  # tensors do not share bytes
    return Contents(numbers, tuple(names), values)


def checked_config(path: Path) -> Described:
    """The model that a GGUF file describes, by transformers' reader and by what that leaves out of the header.

    Raises:
        CheckpointError: the file announces more than it holds, or speaks of a larger model, with both sizes.
    """
    contents = check_bounds(path)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    layers = getattr(config, "num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > len(contents.names):
        raise CheckpointError(f"{path} speaks of {layers} layers and holds {len(contents.names)} tensors")
    left_out = _left_out(contents, config)
    for name, value in left_out.items():
        setattr(config, name, value)
    shapes = shapes_of(config)
    parameters = sum(shape.numel() for shape in shapes.values())
    if parameters > _SPARE * contents.numbers:
        raise CheckpointError(f"{path} describes a model of {parameters:,} parameters and holds {contents.numbers:,}")
    return Described(config, shapes, tuple(left_out), _scaling(contents))


def _left_out(contents: Contents, config: Any) -> dict[str, Any]:
    """What llama.cpp reads in a file and transformers 5.23 does not, as fields of its configuration.

    It takes the family's usual head_dim, or the number of rotated features for it, no bias, no linear scaling, a
    rotation of all features, and GPT-2's usual sizes.
    """
    width, heads = contents.size("embedding_length"), contents.size("attention.head_count")
    fields: dict[str, Any] = {
        "head_dim": contents.size("attention.key_length") or (width // heads if width and heads else None),
        "attention_bias": "blk.0.attn_q.bias" in contents.names,
        "mlp_bias": "blk.0.ffn_up.bias" in contents.names,
        "n_inner": contents.size("feed_forward_length"),
        "vocab_size": contents.size("vocab_size"),
        "max_position_embeddings": contents.size("context_length"),
    }
    rope = dict(getattr(config, "rope_parameters", None) or {})
    factor, rotated = contents.value("rope.scaling.factor"), contents.size("rope.dimension_count")
    if contents.value("rope.scaling.type") == b"linear" and is_number(factor) and factor > 0:
        rope |= {"rope_type": "linear", "factor": factor}
    if "partial_rotary_factor" in rope and rotated and rotated <= (fields["head_dim"] or 0):
        rope["partial_rotary_factor"] = rotated / fields["head_dim"]
    fields["rope_parameters"] = rope or None
    return {
        name: value
        for name, value in fields.items()
        if value is not None and hasattr(config, name) and value != getattr(config, name)
    }


def _scaling(contents: Contents) -> str | None:
    """See `Described.scaling`."""
    said = contents.value("rope.scaling.type")
    if said not in (None, b"none", b"linear"):
        return shown(said.decode("utf-8", "replace") if isinstance(said, bytes) else said)
    return "rope_freqs.weight" if "rope_freqs.weight" in contents.names else None


def shapes_of(config: Any) -> dict[str, torch.Size]:
    """The parameters of the model that a transformers configuration describes, by name; it takes no memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return {name: p.shape for name, p in model.named_parameters()}
