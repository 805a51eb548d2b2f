"""How other libraries store the frozen weight of a linear layer, and the products that they make with it.

A `Format` is what a weight is beside its tensors: small, frozen, hashable, so that autograd's context may hold it while
whoever saves and moves tensors is free to. `LibraryWeight` puts the two together, and `theodora.layers.libraries` finds
them in a module. The kernels are the libraries' own, called through torch's registry of operators: nothing is imported
here, because a module of a library's is there only where the library has been imported.

"The weight" means the numbers that the library's product multiplies by: dequantised in the dtype that it computes in.

| format | library | tensors |
|---|---|---|
| `Bits4` | bitsandbytes, NF4 and FP4 | packed (O·I/2, 1) uint8; absmax of each block, float32, or five tensors of it |
| `Bits8` | bitsandbytes, LLM.int8() | CB (O, I) int8; SCB (O,) float32 |
| `Subclass` | torchao | the weight, (O, I), a tensor of a class of its own |

Shapes: T tokens, I in features, O out features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from theodora.kernels.packed import Packed

Tensors = tuple[Tensor, ...]
Rows = slice | Tensor
"""Some rows of a weight: a slice without a step, a mask (O,), or indices."""


@dataclass(frozen=True, slots=True)
class Format(ABC):
    """How a library stores one linear weight."""

    shape: tuple[int, int]
    """(O, I)."""
    dtype: torch.dtype
    """In which the library dequantises it: that of the numbers it stands for."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The library's, and what it calls the format: "bitsandbytes nf4"."""

    @property
    def captures(self) -> bool:
        """Whether products may run inside a CUDA graph: none waits for the device."""
        return True

    @property
    def rounds_input(self) -> bool:
        """Whether `product` rounds x, as one of int8 does: then it is a few per cent from a product with `dense`."""
        return False

    @property
    def cuts(self) -> bool:
        """Whether `rows` costs no more than those rows."""
        return True

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of products with an x of `dtype`, which they are rounded to afterwards."""
        return self.dtype

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether `product` can take an x of `dtype`."""
        return dtype.is_floating_point and dtype != torch.float64

    @abstractmethod
    def dense(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """W, (O, I): its numbers, rounded to `dtype` if that holds fewer digits."""

    def dense_into(self, tensors: Tensors, out_OI: Tensor) -> None:
        """`dense`, written to a contiguous tensor of its dtype."""
        out_OI.copy_(self.dense(tensors, out_OI.dtype))

    def rows(self, tensors: Tensors, at: Rows, dtype: torch.dtype) -> Tensor:
        """Some rows of `dense`, (…, I)."""
        return self.dense(tensors, dtype)[at]

    def product(self, tensors: Tensors, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """x Wᵀ + bias, (…, O), to the bit as the library's module computes it, in the dtype of x."""
        dtype = self.computes_in(x_TI.dtype)
        bias = None if bias_O is None else bias_O.to(dtype)
        return F.linear(x_TI.to(dtype), self.dense(tensors, dtype), bias).to(x_TI.dtype)

    def watched(self, tensors: Tensors) -> Tensors:
        """The memory behind the tensors, by which a change shows."""
        return tensors

    def packed(self, tensors: Tensors) -> Packed | None:
        """The weight as our own kernels read it, if they can."""
        return None


@dataclass(frozen=True, slots=True)
class Bits4(Format):
    """Four bits a number, by a table of 16 values, times the largest number of each block along W's rows.

    Tensors: packed, absmax; where absmax is quantised itself ("double quantisation", `nested`): packed, absmax in 8
    bits, the largest of each of its blocks, its table (256,), and its mean.
    """

    table: str
    """nf4 or fp4."""
    block: int
    nested: int
    """The block size of the quantised absmax; 0 without double quantisation."""
    compute: torch.dtype | None
    """In which the module multiplies; None: in x's own."""

    @property
    def name(self) -> str:
        """As transformers spells it."""
        return f"bitsandbytes {self.table}" + (", double quantised" if self.nested else "")

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """The module's compute dtype."""
        return self.compute or dtype

    def dense(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """By the library's kernel, which multiplies in float32 and rounds once."""
        return self._dequantized(tensors[0], self._absmax(tensors), self.shape, dtype)

    def dense_into(self, tensors: Tensors, out_OI: Tensor) -> None:
        """On a GPU without a copy."""
        if out_OI.is_cuda and out_OI.dtype == self.dtype:
            dequantize: Any = torch.ops.bitsandbytes.dequantize_4bit.out
            dequantize(tensors[0], self._absmax(tensors), self.block, self.table, self.shape, out_OI.dtype, out=out_OI)
        else:
            Format.dense_into(self, tensors, out_OI)

    def rows(self, tensors: Tensors, at: Rows, dtype: torch.dtype) -> Tensor:
        """The blocks of those rows alone, where no block spans two."""
        outputs, inputs = self.shape
        if inputs % self.block:
            return self.dense(tensors, dtype)[at]
        packed = tensors[0].view(outputs, inputs // 2)[at]
        if isinstance(at, slice):
            start, stop, _ = at.indices(outputs)
            blocks = inputs // self.block
            absmax = self._absmax(tensors, start * blocks, stop * blocks)
        else:
            absmax = self._absmax(tensors).view(outputs, -1)[at].reshape(-1)
        return self._dequantized(packed.reshape(-1, 1), absmax, (packed.shape[0], inputs), dtype)

    def product(self, tensors: Tensors, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """By the library's operator: a kernel of its own for few tokens, else dequantised once for the product."""
        if self.nested not in (0, 256):
            return Format.product(self, tensors, x_TI, bias_O)
        dtype = self.computes_in(x_TI.dtype)
        bias = None if bias_O is None else bias_O.to(dtype)
        packed, absmax, *nested = tensors
        form = (self.block, self.table)
        product: Any = torch.ops.bitsandbytes.gemm_4bit.default
        if nested:
            outer, table, mean = nested
            rest = {"absmax_8bit": absmax, "absmax_code": table, "absmax_offset": mean}
            z = product(x_TI.to(dtype), packed, self.shape, outer, *form, bias=bias, **rest)
        else:
            z = product(x_TI.to(dtype), packed, self.shape, absmax, *form, bias=bias)
        return z.to(x_TI.dtype)

    def packed(self, tensors: Tensors) -> Packed | None:
        """Where no block spans two rows."""
        return Packed.of(tensors, self.shape, self.table, self.dtype, self.block, self.nested)

    def off(self, tensors: Tensors) -> float:
        """How far `dense` is from the numbers that are stored, relative to their norm: 0 where the kernel is right."""
        wide = replace(self, dtype=torch.float32)
        as_one_row = wide._dequantized(
            tensors[0], self._absmax(tensors), (1, self.shape[0] * self.shape[1]), wide.dtype
        )
        stored = as_one_row.view(self.shape)
        return float((wide.dense(tensors, wide.dtype) - stored).norm() / stored.norm().clamp_min(1e-30))

    def _dequantized(self, packed: Tensor, absmax: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        # Rounded to the dtype that it is multiplied in before any other.
        first = dtype if dtype in (torch.bfloat16, torch.float16) and self.dtype == torch.float32 else self.dtype
        dequantize: Any = torch.ops.bitsandbytes.dequantize_4bit.default
        return dequantize(packed, absmax, self.block, self.table, shape, first).to(dtype)

    def _absmax(self, tensors: Tensors, start: int = 0, stop: int | None = None) -> Tensor:
        """The blocks' largest numbers, from `start` to `stop`, float32.

        Those of some blocks are a tensor of their own: the library's kernels read scales behind the last one that they
        need, up to the end of their tile, which is harmless within what the allocator rounds a tensor up to, and at the
        end of a larger tensor may be memory that is nobody's.
        """
        absmax, *rest = tensors[1:]
        if (start, stop) == (0, None):
            if not rest:
                return absmax.float()
            dequantize: Any = torch.ops.bitsandbytes.dequantize_blockwise.default
            return dequantize(absmax, rest[0], rest[1], self.nested, torch.float32) + rest[2]
        if not rest:
            return absmax[start:stop].to(torch.float32, copy=True)
        outer, table, mean = rest
        numbers = table[absmax[start:stop].int()]
        block = torch.arange(start, start + len(numbers), device=outer.device) // self.nested
        return numbers * outer[block] + mean


@dataclass(frozen=True, slots=True)
class Bits8(Format):
    """W = CB ⊙ SCB / 127: eight bits a number, and the largest number of each output row.

    Where the module multiplies whole numbers (on a GPU, and on the CPU outside training) x is rounded to eight bits,
    token by token, but for its columns with a value beyond `threshold`, which stay as they are.
    """

    threshold: float
    int8_product: bool
    """Whether the module multiplies whole numbers; else it dequantises W."""

    @property
    def name(self) -> str:
        """As transformers spells it."""
        return "bitsandbytes int8"

    @property
    def captures(self) -> bool:
        """Not where the host waits to learn which columns are beyond the threshold."""
        return not (self.int8_product and self.threshold > 0)

    @property
    def rounds_input(self) -> bool:
        """Where it multiplies whole numbers."""
        return self.int8_product

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """That of x."""
        return dtype

    def dense(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """As the library computes it for its gradients; float64 holds what it has in `self.dtype`."""
        first = dtype if dtype != torch.float64 else self.dtype
        return _bits8(tensors[0], tensors[1], first).to(dtype)

    def rows(self, tensors: Tensors, at: Rows, dtype: torch.dtype) -> Tensor:
        """Of those rows alone."""
        return _bits8(tensors[0][at], tensors[1][at], self.dtype).to(dtype)

    def packed(self, tensors: Tensors) -> Packed | None:
        """Always."""
        return Packed.of(tensors, self.shape, "int8", self.dtype)

    def product(self, tensors: Tensors, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """As `bitsandbytes.matmul`, without autograd."""
        if not self.int8_product:
            return Format.product(self, tensors, x_TI, bias_O)
        cb, scb = tensors
        ops: Any = torch.ops.bitsandbytes
        x, bias = x_TI.reshape(-1, x_TI.shape[-1]), None if bias_O is None else bias_O.to(x_TI.dtype)
        x8, x_scale, beyond = ops.int8_vectorwise_quant.default(x.to(torch.float16), self.threshold)
        if self.threshold > 0:
            z = ops.int8_mixed_scaled_mm.default(x, x8, cb, x_scale, scb, beyond, bias)[0]
        else:
            z = ops.int8_scaled_mm.default(x8, cb, x_scale, scb, bias=bias, dtype=x.dtype)
        return z.view(*x_TI.shape[:-1], z.shape[-1])


def _bits8(cb: Tensor, scb: Tensor, dtype: torch.dtype) -> Tensor:
    return cb.to(dtype).mul_(scb[:, None].mul(1.0 / 127.0))


@dataclass(frozen=True, slots=True)
class Subclass(Format):
    """A tensor of a class of its own, which knows its products: torchao's."""

    kind: str
    """"torchao Int8Tensor": of library and class."""
    rounds: bool
    """Whether its products round x ("dynamic activation")."""

    @property
    def name(self) -> str:
        """Of library and class."""
        return self.kind

    @property
    def rounds_input(self) -> bool:
        """Where the activations are quantised, too."""
        return self.rounds

    def dense(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """As the class dequantises."""
        return tensors[0].dequantize().to(dtype)

    def rows(self, tensors: Tensors, at: Rows, dtype: torch.dtype) -> Tensor:
        """Of those rows alone, where the class can be cut."""
        weight: Any = tensors[0]
        if isinstance(at, slice):
            try:
                return weight[at].dequantize().to(dtype)
            except (NotImplementedError, RuntimeError, AssertionError, ValueError):
                pass
        return self.dense(tensors, dtype)[at]

    def product(self, tensors: Tensors, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """The class's own."""
        bias = None if bias_O is None else bias_O.to(self.dtype)
        return F.linear(x_TI.to(self.dtype), tensors[0], bias).to(x_TI.dtype)

    def watched(self, tensors: Tensors) -> Tensors:
        """The plain tensors inside."""
        return tuple(inner_tensors(tensors[0]))


def inner_tensors(tensor: Any) -> list[Tensor]:
    """The plain tensors that a tensor of a class of its own is made of; itself, if it is plain."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    return [inner for name in flatten()[0] for inner in inner_tensors(getattr(tensor, name))]


@dataclass(frozen=True, slots=True)
class Part(Format):
    """Some rows of a weight, of the same tensors: those of one of several layers that are stored as one."""

    whole: Format
    start: int

    @classmethod
    def of(cls, whole: Format, start: int, stop: int) -> Part:
        """Rows `start` to `stop`."""
        if isinstance(whole, Part):
            return replace(whole, shape=(stop - start, whole.shape[1]), start=whole.start + start)
        return cls((stop - start, whole.shape[1]), whole.dtype, whole, start)

    @property
    def name(self) -> str:
        """The whole's."""
        return self.whole.name

    @property
    def cuts(self) -> bool:
        """As the whole."""
        return self.whole.cuts

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """The whole's."""
        return self.whole.computes_in(dtype)

    def takes(self, dtype: torch.dtype) -> bool:
        """What the whole takes."""
        return self.whole.takes(dtype)

    def dense(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """Of the rows alone."""
        return self.whole.rows(tensors, slice(self.start, self.start + self.shape[0]), dtype)

    def rows(self, tensors: Tensors, at: Rows, dtype: torch.dtype) -> Tensor:
        """Of those rows alone, if `at` is a slice."""
        if not isinstance(at, slice):
            return self.dense(tensors, dtype)[at]
        start, stop, _ = at.indices(self.shape[0])
        return self.whole.rows(tensors, slice(self.start + start, self.start + stop), dtype)

    def watched(self, tensors: Tensors) -> Tensors:
        """The whole's."""
        return self.whole.watched(tensors)

    def packed(self, tensors: Tensors) -> Packed | None:
        """Those rows of the whole."""
        whole = self.whole.packed(tensors)
        return None if whole is None else whole.rows(self.start, self.start + self.shape[0])
