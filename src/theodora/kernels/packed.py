"""Weights of a few bits a number, as the Triton kernels read them: without a dequantised W in memory.

    W = round(table[q] · absmax of q's block)        4 bits; absmax may be quantised itself
    W = round(q · scale of the row / 127)            8 bits

rounded as the library that quantised them rounds, so that the kernels see the very numbers of its dequantised W.

Shapes: I in features, O out features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from theodora.kernels.operators import runs_triton

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
FP4 = (*_FP4, *(-value for value in _FP4))
"""What the four bits of a number stand for, as in bitsandbytes' kernels (`csrc/kernels.cu`)."""
TABLES = {"nf4": NF4, "fp4": FP4}
LEAST_BLOCK = 32
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Some rows of a weight of 4 or 8 bits."""

    tensors: tuple[Tensor, ...]
    """4 bits: the numbers, two in a byte, the first one in its upper half, and the largest number of each block,
    float32; or five tensors: the numbers, the blocks' largest in 8 bits, the largest of each `nested` of those, their
    table (256,) and their mean. 8 bits: the numbers (…, I) int8 and the largest of each row, float32."""
    form: tuple[int, ...]
    """(O, I, bits, numbers in a block, numbers in a block of the blocks' largest or 0, the first row)."""
    table: str
    """nf4, fp4, or int8."""
    dtype: torch.dtype
    """To which W is rounded."""

    @classmethod
    def of(
        cls,
        tensors: tuple[Tensor, ...],
        shape: tuple[int, int],
        table: str,
        dtype: torch.dtype,
        block: int = 0,
        nested: int = 0,
    ) -> Packed | None:
        """A whole weight, or None if the kernels cannot read it."""
        if dtype not in DTYPES or not all(t.is_contiguous() for t in tensors):
            return None
        if table != "int8":
            power = block >= LEAST_BLOCK and block & (block - 1) == 0 and nested & (nested - 1) == 0
            floats = [t for t in tensors[1:] if t.is_floating_point()]
            if not power or shape[1] % block or table not in TABLES or any(t.dtype != torch.float32 for t in floats):
                return None
        return cls(tensors, (*shape, 8 if table == "int8" else 4, block, nested, 0), table, dtype)

    def rows(self, start: int, stop: int) -> Packed:
        """Some of its rows."""
        _, *rest, first = self.form
        return Packed(self.tensors, (stop - start, *rest, first + start), self.table, self.dtype)

    @property
    def runs(self) -> bool:
        """Whether Triton kernels can read it where it lies."""
        return runs_triton(self.tensors[0])


@lru_cache(maxsize=64)
def table_on(name: str, device: torch.device) -> Tensor:
    """The table of `TABLES`, (16,) float32; made before CUDA graphs are recorded, and kept."""
    with torch.inference_mode(False):
        return torch.tensor(TABLES[name], dtype=torch.float32, device=device)
