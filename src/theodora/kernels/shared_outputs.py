"""Outputs that attention keeps for its own gradient, in the place of the base products that DoRA's would keep.

The gradient of a magnitude needs z + s·xa Bᵀ, which is the output over g = m / norm. Attention keeps q, k and v, and so
the same numbers need not be kept twice: a quarter of a gigabyte for each layer of an 8B model at 8192 tokens. What
stands in the way, and what is done about it:

- Rotary embeddings turn q and k in place. Whoever turns an output says so (`note_rotation`), and the kernel turns it
  back.
- An output that should have been turned and was not said to be may have been written to by a stranger: z is computed
  again, and from then on kept.
- A row whose magnitude is zero has lost its z: `zero_scale_gradient` has it from x again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from theodora.kernels.compose import MOST_FUSED_RANK
from theodora.kernels.operators import runs_triton
from theodora.kernels.parts import Parts

_MARK = "_theodora_output"


class Rotation(NamedTuple):
    """How the heads of an output were turned in place: the first D features of each by the angles of their token."""

    cos_TD: Tensor | None
    """(T, D), or (tokens of a sequence, D) where all sequences are turned alike; None where nothing was turned."""
    sin_TD: Tensor | None
    head_dim: int


class Output:
    """What has happened to an output since it was computed."""

    __slots__ = ("known", "rotation")

    def __init__(self, *, turned: bool) -> None:
        self.rotation: Rotation | None = None
        self.known = not turned  # an output that will be turned is known once that was noted


class SharedOutputs:
    """Whether the layers of one attention module may keep their outputs instead of base products."""

    def __init__(self, turned: Sequence[bool]) -> None:
        self.turned = list(turned)
        """For each layer, whether its output will be turned in place."""
        self.possible = True

    def records(self, x_TI: Tensor, layers: Sequence[Parts]) -> list[Output] | None:
        """A record for each layer's output, or None where base products are to be kept."""
        fits = self.possible and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        # float16 has not the range to be divided by a small g. Hooks (checkpointing, offloading) may keep copies from
        # before an output was turned.
        fits = fits and x_TI.dtype != torch.float16 and runs_triton(x_TI) and not _saves_through_hooks()
        return [Output(turned=t) for t in self.turned] if fits and all(map(_invertible, layers)) else None


def mark(y_TO: Tensor, record: Output) -> None:
    """Let whoever turns (a view of) y find its record."""
    setattr(y_TO, _MARK, record)


def note_rotation(before_BHTD: Tensor, after_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> None:
    """Say that `before`, perhaps a view of an output, was turned in place into `after`, if it was."""
    output: Any = before_BHTD._base
    record: Output | None = getattr(output, _MARK, None)
    if record is None or after_BHTD.data_ptr() != before_BHTD.data_ptr():
        return
    whole = before_BHTD.transpose(1, 2).is_contiguous() and before_BHTD.numel() == output.numel()
    first = record.rotation is None and before_BHTD.data_ptr() == output.data_ptr()
    record.known = whole and first
    record.rotation = Rotation(cos_BTD.flatten(0, 1), sin_BTD.flatten(0, 1), before_BHTD.shape[-1])


def _invertible(layer: Parts) -> bool:
    low = layer.b_OR is not None and layer.b_OR.shape[1] <= MOST_FUSED_RANK
    # A bias may be far larger than the rest of an output, whose digits it then costs.
    return low and layer.norm_O is not None and layer.bias_O is None and layer.weight_scale_O is None


def _saves_through_hooks() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # pyright: ignore[reportAttributeAccessIssue, reportPrivateUsage]
