"""Weights of a few bits on paper: tensors of the meta device, as large as a library would pack them.

No library is needed. What a product takes beside its result (the weight dequantised, x rounded) is made as the library
makes it, so that whoever counts memory sees it.

Shapes: T tokens, I in features, O out features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from theodora.adapters.targets import frozen_linear
from theodora.kernels.formats import Format, Rows, Tensors
from theodora.kernels.library_weight import LibraryWeight
from theodora.kernels.packed import Packed
from theodora.layers import base_weight
from theodora.layers.float8 import quantize
from theodora.layers.kinds import is_conv1d
from theodora.layers.libraries import PAPER

_BLOCK, _NESTED = 64, 256  # bitsandbytes' blocks of numbers, and of their scales
_GROUP = 128  # torchao's int4, as `--quantize int4` asks for it
_FLOAT8_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class PaperFormat(Format):
    """How a library would store one linear weight."""

    kind: str
    """nf4, int8, int4, or bits (a folder's own)."""

    @property
    def name(self) -> str:
        """The kind."""
        return self.kind

    def dense(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """As large as W dequantised."""
        return torch.empty(self.shape, dtype=dtype, device="meta")

    def rows(self, tensors: Tensors, at: Rows, dtype: torch.dtype) -> Tensor:
        """As large as those rows."""
        count = len(range(*at.indices(self.shape[0]))) if isinstance(at, slice) else int(at.shape[0])
        return torch.empty(count, self.shape[1], dtype=dtype, device="meta")

    def product(self, tensors: Tensors, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """As large as x Wᵀ, by way of what the library makes for it."""
        if self.kind == "int8":  # x in half precision and in eight bits, and the sums in 32
            x8 = x_TI.to(torch.float16).to(torch.int8)
            z = torch.empty(*x8.shape[:-1], self.shape[0], dtype=torch.int32, device="meta")
            return z.to(x_TI.dtype)
        if self.kind == "int4":  # torchao's kernel reads the packed numbers
            return x_TI.new_empty(*x_TI.shape[:-1], self.shape[0])
        return Format.product(self, tensors, x_TI, bias_O)

    def packed(self, tensors: Tensors) -> Packed | None:
        """For our kernels, which read NF4 and int8."""
        if self.kind == "nf4":
            return Packed.of(tensors, self.shape, "nf4", self.dtype, _BLOCK, _NESTED)
        return Packed.of(tensors, self.shape, "int8", self.dtype) if self.kind == "int8" else None


def store(model: nn.Module, kind: str, keep: tuple[str, ...], fields: Mapping[str, Any] | None = None) -> None:
    """Put the frozen linear layers of a model on the meta device into few bits.

    Args:
        model: without adapters.
        kind: nf4, int8, int4, fp8; or bits, as the folder's own quantisation says.
        keep: names of modules that stay plain.
        fields: the folder's `quantization_config`, for "bits".
    """
    for path in frozen_linear(model, keep):
        module: Any = model.get_submodule(path)
        transposed = is_conv1d(module)
        weight = base_weight(module)
        if kind == "fp8":
            if not any(size % _FLOAT8_MULTIPLE for size in weight.shape):
                quantize(module, stored_transposed=transposed)
            continue
        if transposed:
            continue
        tensors = tuple(
            torch.empty(size, dtype=dtype, device="meta") for size, dtype in _sizes(kind, *weight.shape, fields)
        )
        paper = LibraryWeight(PaperFormat(weight.shape, weight.dtype, kind), *tensors)
        module.weight = nn.Parameter(tensors[0], requires_grad=False)
        setattr(module.weight, PAPER, paper)


def bits_of(fields: Mapping[str, Any]) -> tuple[float, int]:
    """Bits of a number and numbers that share a scale, as far as a folder's `quantization_config` tells."""
    inner: Any = fields.get("quant_config")
    inner = inner.get("weight_quant_params") if isinstance(inner, Mapping) else None
    found: list[Any] = [
        fields.get("bits"),
        fields.get("nbits"),
        inner.get("nbits") if isinstance(inner, Mapping) else 0,
    ]
    groups: Any = fields.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            found.append(weights.get("num_bits"))
    if fields.get("load_in_8bit") or fields.get("quant_method") == "fp8":
        found.append(8)
    if fields.get("load_in_4bit"):
        found.append(4)
    bits = next((b for b in found if isinstance(b, int) and 1 <= b <= 16), 8 if "8" in str(fields)[:2000] else 4)
    group = fields.get("group_size")
    return bits, group if isinstance(group, int) and group > 0 else _BLOCK


def _sizes(
    kind: str, outputs: int, inputs: int, fields: Mapping[str, Any] | None
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the tensors of a weight, the numbers first."""
    numbers = outputs * inputs
    if kind == "nf4":
        blocks = math.ceil(numbers / _BLOCK)
        return [
            ((math.ceil(numbers / 2), 1), torch.uint8),
            ((blocks,), torch.uint8),
            ((math.ceil(blocks / _NESTED),), torch.float32),
            ((256,), torch.float32),
            ((), torch.float32),
        ]
    if kind == "int8":
        return [((outputs, inputs), torch.int8), ((outputs,), torch.float32)]
    if kind == "int4":  # a scale and a zero point for each group, in bfloat16
        return [((math.ceil(numbers / 2), 1), torch.uint8), ((math.ceil(numbers / _GROUP), 2), torch.bfloat16)]
    bits, group = bits_of(fields or {})
    return [((math.ceil(numbers * bits / 8), 1), torch.uint8), ((math.ceil(numbers / group), 2), torch.float16)]
