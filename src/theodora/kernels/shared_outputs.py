"""Outputs that attention keeps for its own gradient, in the place of the base products that DoRA's would keep.

The gradient of a magnitude needs z + s·xa Bᵀ, which is the output over g = m / norm. Attention keeps q, k and v, and so
the same numbers need not be kept twice: 96 MiB for each layer of an 8B model at 8192 tokens. What stands in the way,
and what is done about it:

- Rotary embeddings turn q and k, and attention keeps what was turned. What they were before can't be had from that
  (rounding leaves an error of the size of the *other* feature of a pair), but the other way round it can: attention
  keeps the output, and turns it again in its backward pass (see `fastpath/attention.py`).
- Nobody may write to an output, which `notes.Output` watches. Writing that autograd sees shows in its version; for what
  autograd does not see (a kernel that turns q in place) an output counts as known only once our rotary embeddings have
  read it. Where one is not known, z is computed again, and kept in all later steps.
- A row whose magnitude is zero has lost its z: `zero_scale_gradient` has it from x again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from theodora.kernels.compose import zero_scale_gradient
from theodora.kernels.operators import is_on_paper, runs_triton
from theodora.kernels.parts import MOST_FUSED_RANK, Parts


class SharedOutputs:
    """Whether the layers of one attention module may keep their outputs instead of base products."""

    def __init__(self, turned: Sequence[bool]) -> None:
        self.turned = list(turned)
        """For each layer, whether rotary embeddings are to read its output."""
        self.possible = True

    def fit(self, x_TI: Tensor, layers: Sequence[Parts], stacked: bool) -> bool:
        """Whether outputs may be kept in this pass; `stacked`: the layers' weights lie in one buffer."""
        # float16 has not the range to be divided by a small g. Where hooks take what autograd saves elsewhere
        # (checkpointing, offloading), outputs would be held past them.
        fits = self.possible and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        fits = fits and x_TI.dtype != torch.float16 and runs_triton(x_TI) and not saves_through_hooks()
        return fits and all(_invertible(layer, stacked) for layer in layers)


def saves_through_hooks() -> bool:
    """Whether hooks take what autograd saves."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # pyright: ignore[reportAttributeAccessIssue, reportPrivateUsage]


def add_zero_scales(
    dm_O: Tensor, dy_TO: Tensor, x: tuple[Tensor, Tensor | None, Tensor | None], xa_TR: Tensor, layer: Parts
) -> None:
    """`zero_scale_gradient` of one layer: x is (h, rstd, weight), or (x, None, None)."""
    rest = xa_TR, layer.b_OR, layer.scale, layer.magnitude_O, layer.norm_O
    if (packed := layer.weight.packed()) is None:
        zero_scale_gradient(dm_O, dy_TO, *x, layer.weight.plain(), *rest)
        return
    if is_on_paper():  # no number is there to be zero
        return
    from theodora.kernels.triton import compose as triton

    triton.zero_scale_gradient(dm_O, dy_TO, *x, packed, *rest)  # pyright: ignore[reportArgumentType]


def _invertible(layer: Parts, stacked: bool) -> bool:
    low = layer.b_OR is not None and layer.b_OR.shape[1] <= MOST_FUSED_RANK
    # A bias may be far larger than the rest of an output, whose digits it then costs.
    return low and layer.norm_O is not None and layer.bias_O is None and (stacked or layer.weight.packed() is not None)
