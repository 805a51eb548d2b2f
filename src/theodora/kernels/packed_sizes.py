"""Whether the tensors of a packed weight fit each other and its shape, by their sizes, before anything reads them.

Kernels go as far as they are told. A tensor here is anything with a shape and a dtype: one in memory, or what a file's
header says of one. Each function gives part of a sentence, with what was found and what was expected; None if all fit.

Shapes: O out features, I in features, G groups of in features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

WORD = 32
"""Bits of the numbers that others are packed into."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_NARROW = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)


class Sized(Protocol):
    """What is known of a tensor."""

    @property
    def shape(self) -> Sequence[int]:
        """Its sizes."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""
        ...


Parts = Mapping[str, Sized]


def why_not_gptq(parts: Parts, bits: int, group: int | None, shape: tuple[int, int] | None = None) -> str | None:
    """Of GPTQ: qweight (⌈I·bits/32⌉, O), qzeros (G, ⌈O·bits/32⌉), scales (G, O), g_idx (I,).

    Args:
        parts: name -> tensor.
        bits: of a number.
        group: in features that share a scale; -1: all; None: nobody knows.
        shape: (O, I), if they are known otherwise than from the tensors.
    """
    if (told := _why_lacking(parts, ("qweight", "qzeros", "scales", "g_idx"), dims={"g_idx": 1})) is not None:
        return told
    outputs, inputs = shape or (parts["qweight"].shape[1], parts["g_idx"].shape[0])
    groups = parts["scales"].shape[0] if group is None else _groups(inputs, group)
    return (
        _why(parts, "qweight", (_words(inputs, bits), outputs), (torch.int32,))
        or _why(parts, "g_idx", (inputs,), (torch.int32, torch.int64))
        or _why(parts, "scales", (groups, outputs), _FLOATS)
        or _why(parts, "qzeros", (groups, _words(outputs, bits)), (torch.int32,))
    )


def why_not_awq(parts: Parts, bits: int, group: int, shape: tuple[int, int] | None = None) -> str | None:
    """Of AWQ (GEMM): qweight (I, ⌈O·bits/32⌉), qzeros (G, ⌈O·bits/32⌉), scales (G, O). Arguments as above."""
    if (told := _why_lacking(parts, ("qweight", "qzeros", "scales"))) is not None:
        return told
    outputs, inputs = shape or (parts["scales"].shape[1], parts["qweight"].shape[0])
    groups, words = _groups(inputs, group), _words(outputs, bits)
    return (
        _why(parts, "qweight", (inputs, words), (torch.int32,))
        or _why(parts, "scales", (groups, outputs), _FLOATS)
        or _why(parts, "qzeros", (groups, words), (torch.int32,))
    )


def why_not_compressed(
    parts: Parts, bits: int, scales: Sequence[int], symmetric: bool, shape: tuple[int, int]
) -> str | None:
    """Of compressed-tensors: weight_packed (O, ⌈I·bits/32⌉) or weight (O, I) of 8 bits, weight_scale, zero points.

    Args:
        parts: name -> tensor.
        bits: of a number.
        scales: rows and columns of the weight that share one: 0 means all of them.
        symmetric: whether there are no zero points.
        shape: (O, I).
    """
    packed = "weight_packed" in parts
    if (told := _why_lacking(parts, ("weight_packed" if packed else "weight",))) is not None:
        return told
    if "weight_scale" not in parts:
        return "it lacks weight_scale"
    rows, columns = (1 if not each else _groups(size, each) for size, each in zip(shape, scales, strict=True))
    told = (
        _why(parts, "weight_packed", (shape[0], _words(shape[1], bits)), (torch.int32,))
        if packed
        else _why(parts, "weight", shape, _NARROW)
    ) or _why(parts, "weight_scale", (rows, columns), _FLOATS)
    if told is not None or (symmetric and "weight_zero_point" not in parts):
        return told
    if "weight_zero_point" not in parts:
        return "it lacks weight_zero_point"
    if packed and not symmetric:
        return _why(parts, "weight_zero_point", (_words(rows, bits), columns), (torch.int32,))
    return _why(parts, "weight_zero_point", (rows, columns), (*_NARROW, torch.int32, torch.int64))


def why_groups_beyond(g_idx: torch.Tensor, groups: int) -> str | None:
    """Of GPTQ: each in feature's group must be one of those that have scales."""
    least, most = (int(value) for value in g_idx.aminmax()) if g_idx.numel() else (0, 0)
    if least >= 0 and most < groups:
        return None
    return f"its g_idx names groups from {least} to {most}; expected 0 to {groups - 1}, of which there are scales"


def _why_lacking(parts: Parts, names: Sequence[str], dims: Mapping[str, int] | None = None) -> str | None:
    if lost := [name for name in names if name not in parts]:
        return f"it lacks {', '.join(lost)}"
    for name in names:
        wanted = (dims or {}).get(name, 2)
        if len(parts[name].shape) != wanted:
            return f"its {name} has the shape {tuple(parts[name].shape)}; expected {wanted} sizes"
    return None


def _why(parts: Parts, name: str, shape: tuple[int, ...], dtypes: Sequence[torch.dtype]) -> str | None:
    part = parts[name]
    found, alone = tuple(part.shape), all(size == 1 for size in shape)
    if found != shape and not (alone and all(size == 1 for size in found)):  # (one number, with or without sizes)
        return f"its {name} has the shape {found}; expected {shape}"
    if part.dtype not in dtypes:
        return f"its {name} is {_named(part.dtype)}; expected {' or '.join(map(_named, dtypes))}"
    return None


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _groups(size: int, group: int) -> int:
    return -(-size // group) if group > 0 else 1


def _words(numbers: int, bits: int) -> int:
    return -(-numbers * bits // WORD)
