"""Whether the parts of a quantised weight fit each other, by their sizes, before a library reads them.

bitsandbytes hands addresses to native code, which goes as far as its numbers say: a block that is smaller than the
scales allow, or a shape that is larger than the bytes, reads the memory beyond. Those numbers stand in a short JSON
text that is stored as a tensor.

    X.weight                                    2 numbers a byte
    X.weight.absmax                             a scale for each block, float32; uint8 where scales are quantised, too
    X.weight.quant_map                          the 16 numbers of the format
    X.weight.nested_absmax, .nested_quant_map   of the scales: a scale for each block of them, and 256 numbers
    X.weight.quant_state.bitsandbytes__nf4      {"quant_type": …, "blocksize": …, "dtype": …, "shape": [O, I], …}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from theodora.errors import CheckpointError, bullet_list, shown
from theodora.files.folder import OpenFile
from theodora.files.safetensors import Described, Header, read_header, read_tensor
from theodora.parse import parse_json

_STATE = "weight.quant_state."
_LONGEST_STATE = 4096
"""Bytes; they are 200 or so."""
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NUMBERS, _NESTED_NUMBERS = 16, 256
_KINDS = ("nf4", "fp4")
_DTYPES = ("float32", "float16", "bfloat16")
_KNOWN = {"quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"}
_TOLD = 5


@dataclass(frozen=True)
class Part:
    """A tensor by its size."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numbers(self) -> int:
        """How many it holds."""
        return math.prod(self.shape)

    @classmethod
    def of(cls, tensor: Tensor | Described) -> Part:
        """One that is read, or described by a header."""
        return cls(tuple(tensor.shape), tensor.dtype)


def check_parts(parts: Mapping[str, Tensor]) -> None:
    """See that the parts of one weight fit each other.

    Args:
        parts: as `packed.group_parts` calls them.

    Raises:
        ValueError: they do not; with what was found and what was expected.
    """
    sizes = {name: Part.of(part) for name, part in parts.items()}
    states = [name for name in parts if name.startswith(_STATE)]
    if states:
        _check_4bit(sizes, states, parts[states[0]])
    elif "SCB" in parts:
        _check_8bit(sizes)


def check_packed_folder(folder: Path) -> None:
    """See that the weights that bitsandbytes packed in a folder are whole, by the headers of its files.

    Raises:
        CheckpointError: they are not; the first few are named.
    """
    found: dict[str, dict[str, Part]] = {}
    states: dict[str, tuple[str, Tensor]] = {}
    problems: list[str] = []
    for path in sorted(path for path in folder.glob("*.safetensors") if path.is_file()):
        with suppress(OSError, ValueError, CheckpointError), OpenFile.at(path) as file:  # whoever loads it says so
            _look_into(file, read_header(file), found, states, problems)
    for name, (state, content) in states.items():
        try:
            _check_4bit(found[name], [state], content)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    for name, parts in found.items():
        packed = "weight" in parts and parts["weight"].dtype in (torch.uint8, torch.int8)
        if name not in states and (
            any(part.startswith("weight.") for part in parts) or (packed and "SCB" not in parts)
        ):
            problems.append(f"{name}: its weight is packed, and its quant_state or its scales (SCB) are missing")
        if "SCB" in parts:
            try:
                _check_8bit(parts)
            except ValueError as error:
                problems.append(f"{name}: {error}")
    if problems:
        raise CheckpointError(f"{folder} holds packed weights that are not whole:" + bullet_list(problems, _TOLD))


def _look_into(
    file: OpenFile,
    header: Header,
    found: dict[str, dict[str, Part]],
    states: dict[str, tuple[str, Tensor]],
    problems: list[str],
) -> None:
    for key, described in header.tensors.items():
        module, _, part = key.rpartition(".weight.")
        if not module:
            module, _, part = key.rpartition(".")
        else:
            part = f"weight.{part}"
        found.setdefault(module, {})[part] = Part.of(described)
        if not part.startswith(_STATE):
            continue
        if module in states:
            problems.append(f"{module}: it has two states, {states[module][0]} and {part}")
        elif described.end - described.begin > _LONGEST_STATE:
            problems.append(f"{module}: its {part} has {described.end - described.begin:,} bytes; {_STATE_EXPECTED}")
        else:
            states[module] = part, read_tensor(file, header, described)


_STATE_EXPECTED = f"expected JSON of at most {_LONGEST_STATE:,} bytes"


def _check_4bit(parts: Mapping[str, Part], states: list[str], content: Tensor) -> None:
    if len(states) > 1:
        raise ValueError(f"it has more than one state: {', '.join(states)}")
    kind = states[0].rpartition("bitsandbytes__")[2]
    state = _state(content)
    if kind not in _KINDS or state.get("quant_type") != kind:
        raise ValueError(f"quant_type is {shown(state.get('quant_type'))} in {states[0]}; expected nf4 or fp4, twice")
    if strange := sorted(map(str, state.keys() - _KNOWN)):
        raise ValueError(f"its state holds {shown(strange)}; expected {', '.join(sorted(_KNOWN))}")
    for name in ("dtype", *(("nested_dtype",) if "nested_dtype" in state else ())):
        if state.get(name) not in _DTYPES:
            raise ValueError(f"{name} is {shown(state.get(name))}; expected one of {', '.join(_DTYPES)}")
    shape = state.get("shape")
    if not isinstance(shape, list) or not shape or not all(type(n) is int and 0 < n < 2**31 for n in shape):
        raise ValueError(f"shape is {shown(shape)}; expected (out, in)")
    block = state.get("blocksize")
    if type(block) is not int or block not in _BLOCKS:
        raise ValueError(f"blocksize is {shown(block)}; expected one of {', '.join(map(str, _BLOCKS))}")
    numbers = math.prod(shape)
    weight = _part(parts, "weight")
    if (held := weight.numbers * weight.dtype.itemsize) != (wanted := -(-numbers // 2)):
        raise ValueError(
            f"its weight has {held:,} bytes; expected {wanted:,} for {' × '.join(map(str, shape))} in 4 bits"
        )
    blocks, nested = -(-numbers // block), "weight.nested_absmax" in parts
    _expect(parts, "weight.absmax", blocks, torch.uint8 if nested else torch.float32)
    _expect(parts, "weight.quant_map", _NUMBERS, torch.float32)
    if not nested:
        return
    outer, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(outer) is not int or outer not in _BLOCKS:
        raise ValueError(f"nested_blocksize is {shown(outer)}; expected one of {', '.join(map(str, _BLOCKS))}")
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not math.isfinite(offset):
        raise ValueError(f"nested_offset is {shown(offset)}; expected a finite number")
    _expect(parts, "weight.nested_absmax", -(-blocks // outer), torch.float32)
    _expect(parts, "weight.nested_quant_map", _NESTED_NUMBERS, torch.float32)


def _check_8bit(parts: Mapping[str, Part]) -> None:
    weight = _part(parts, "weight")
    if len(weight.shape) != 2 or weight.dtype != torch.int8:
        raise ValueError(f"its weight is {weight.shape} {weight.dtype}; expected (out, in) torch.int8")
    _expect(parts, "SCB", weight.shape[0], torch.float32)


def _state(content: Tensor) -> Mapping[str, Any]:
    if content.dtype != torch.uint8 or content.numel() > _LONGEST_STATE:
        raise ValueError(f"its state is {tuple(content.shape)} {content.dtype}; {_STATE_EXPECTED}")
    try:
        state = parse_json(content.numpy().tobytes().decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"its state is no JSON ({error})") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"its state is {shown(state)}; expected an object of JSON")
    return state


def _part(parts: Mapping[str, Part], name: str) -> Part:
    if name not in parts:
        raise ValueError(f"it lacks {name}")
    return parts[name]


def _expect(parts: Mapping[str, Part], name: str, numbers: int, dtype: torch.dtype) -> None:
    part = _part(parts, name)
    if part.numbers != numbers or part.dtype != dtype:
        raise ValueError(
            f"its {name.removeprefix('weight.')} has {part.numbers:,} numbers in {str(part.dtype)[6:]}; expected "
            f"{numbers:,} in {str(dtype)[6:]}"
        )
