"""One batch, many adapters: each token goes through the low-rank branch and the row scale of its own slot.

    y_t = g[slot_t] ⊙ (z_t + xa_t (sB)[slot_t]) + bias,  xa_t = x_t A[slot_t]ᵀ,  z = x Wᵀ

Slots hold what is ready-made for serving: A and s·B in the dtype of x, g = m / ‖W + s·B·A‖ in float32 (ones for LoRA).
Slot 0 is the base model: zeros and ones. Lower ranks are padded with zeros. The operator has no gradient.

Shapes: T tokens, I in features, O out features, S slots, R the largest rank. s·B is held as (S, R, O), the layout whose
rows a token reads in one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from theodora.kernels.operators import interpreted, runs_triton
from theodora.kernels.parts import TILE, SlottedWeights

BASE = 0
"""The slot of the base model."""

# On the CPU: adapters up to which one product each is faster than one batched product, and what a batched one may
# waste, in tokens that are padding and slots that nobody uses (measured on SmolLM2's shapes).
_FEW = 3
_MOST_PADDING = 2
_MOST_UNUSED = 2


@dataclass(frozen=True)
class Routes:
    """Which slot each token of a batch goes through, sorted once for all layers. See `routes`."""

    slots_T: Tensor
    """(T,) int64: the slot of each token."""
    order_T: Tensor
    """(T,) int64: the tokens, those of one slot one after the other."""
    tiles: Tensor
    """(tiles, 3) int32, for the kernel: slot, first and last + 1 place in `order_T`; empty tiles come last."""
    groups: Sequence[tuple[int, int, int]] | None = None
    """On the CPU: (slot, first, last + 1) in `order_T` of each slot in use."""
    in_order: bool = False
    """On the CPU: whether `order_T` is 0, 1, 2, …"""


def routes(slots_T: Tensor, slots: int) -> Routes:
    """Sort the tokens by slot. On a GPU nothing waits for the host and all shapes depend on T alone.

    Args:
        slots_T: (T,) integers from 0 to slots - 1.
        slots: S.
    """
    slots_T = slots_T.long()
    count = slots_T.shape[0]
    if slots_T.device.type == "cpu" and not interpreted():
        return _host_routes(slots_T)
    ranked = torch.sort(slots_T, stable=True)
    # Tiles of each slot, then which slot the n-th tile of all belongs to.
    every = torch.arange(slots + 1, device=slots_T.device)
    starts = torch.searchsorted(ranked.values, every)
    first_tile = torch.zeros_like(starts)
    torch.cumsum((starts.diff() + TILE - 1) // TILE, 0, out=first_tile[1:])
    tile = torch.arange(min(count, count // TILE + min(count, slots)), device=slots_T.device)
    slot = (torch.searchsorted(first_tile, tile, right=True) - 1).clamp_max(slots - 1)
    start = starts[slot] + (tile - first_tile[slot]) * TILE
    stop = torch.minimum(start + TILE, starts[slot + 1])
    return Routes(slots_T, ranked.indices, torch.stack([slot, start, torch.maximum(start, stop)], 1).int())


def _host_routes(slots_T: Tensor) -> Routes:
    values = slots_T.tolist()
    in_order = all(a <= b for a, b in pairwise(values))
    order = torch.arange(len(values)) if in_order else torch.argsort(slots_T, stable=True)
    groups: list[tuple[int, int, int]] = []
    start = 0
    for at, slot in enumerate(ranked := values if in_order else sorted(values)):
        if at + 1 == len(ranked) or ranked[at + 1] != slot:
            groups.append((slot, start, at + 1))
            start = at + 1
    return Routes(slots_T, order, slots_T.new_zeros(0, 3, dtype=torch.int32), tuple(groups), in_order)


def routed_reference(
    z_TO: Tensor,
    x_TI: Tensor,
    a_SRI: Tensor,
    b_SRO: Tensor,
    g_SO: Tensor | None,
    bias_O: Tensor | None,
    slots_T: Tensor,
) -> Tensor:
    """y, (T, O), in the dtype of x, token by token: what everything else here is held against.

    `g_SO` is None where no slot holds a DoRA adapter.
    """
    xa = torch.bmm(a_SRI[slots_T], x_TI[:, :, None])[:, :, 0]
    y = z_TO + torch.bmm(xa[:, None], b_SRO[slots_T])[:, 0]
    if g_SO is not None:
        y = (y * g_SO[slots_T]).to(x_TI.dtype)
    return y if bias_O is None else y + bias_O


def routed(
    z_TO: Tensor, x_TI: Tensor, a_SRI: Tensor, b_SRO: Tensor, g_SO: Tensor | None, bias_O: Tensor | None, to: Routes
) -> Tensor:
    """`routed_reference`, by the fastest way that fits; z may be overwritten.

    Safe in a CUDA graph: no look at values, no shape that depends on them. No operator of torch's, which would cost a
    copy of z, because nothing that serves is differentiated or compiled.
    """
    return routed_together([z_TO], x_TI, [SlottedWeights(a_SRI, b_SRO, g_SO, bias_O)], to)[0]


def routed_together(
    zs: Sequence[Tensor], x_TI: Tensor, weights: Sequence[SlottedWeights], to: Routes
) -> Sequence[Tensor]:
    """`routed` for up to `MOST_LAYERS` layers of one x: on a GPU with as many launches as for one.

    Args:
        zs: x Wᵀ of each layer, (T, O); may be overwritten.
        x_TI: what all of them read.
        weights: of each layer.
        to: where the tokens go.
    """
    if x_TI.numel() == 0:
        return zs
    if to.groups is not None:
        return [_grouped(z, x_TI, *its, to) for z, its in zip(zs, weights, strict=True)]
    if not runs_triton(x_TI):
        return [routed_reference(z, x_TI, *its, to.slots_T) for z, its in zip(zs, weights, strict=True)]
    from theodora.kernels.triton.routed import routed as triton

    return triton(zs, x_TI, weights, to.order_T, to.tiles)


def _grouped(z: Tensor, x: Tensor, a: Tensor, b: Tensor, g: Tensor | None, bias: Tensor | None, to: Routes) -> Tensor:
    """On the CPU: the tokens of each adapter as one product, or all adapters as one batched product."""
    assert to.groups is not None
    groups = [group for group in to.groups if group[0] != BASE]
    if not groups:
        return z if bias is None else z.add_(bias)
    if not to.in_order:
        x, z = x[to.order_T], z[to.order_T]
    first, last = groups[0][1], groups[-1][2]
    span, most = groups[-1][0] - groups[0][0] + 1, max(stop - start for _, start, stop in groups)
    padded = len(groups) * most > _MOST_PADDING * (last - first)
    if len(groups) <= _FEW or padded:
        for slot, start, stop in groups:
            _one_adapter(z[start:stop], x[start:stop], a[slot], b[slot], None if g is None else g[slot])
    else:
        _many_adapters(z, x, a, b, g, groups, most, dense=span <= _MOST_UNUSED * len(groups))
    if bias is not None:
        z = z.add_(bias)
    if to.in_order:
        return z
    y = torch.empty_like(z)
    y[to.order_T] = z
    return y


def _one_adapter(z: Tensor, x: Tensor, a: Tensor, b: Tensor, g: Tensor | None) -> None:
    z.addmm_(x @ a.T, b)
    if g is not None:
        z.copy_(z * g) if z.dtype != g.dtype else z.mul_(g)


def _many_adapters(
    z: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor | None,
    groups: Sequence[tuple[int, int, int]],
    most: int,
    dense: bool,
) -> None:
    """All adapters at once, each with `most` tokens, some of them padding.

    Where few slots between the first and the last are unused (dense), their tensors are read where they lie.
    """
    low, first, last = groups[0][0], groups[0][1], groups[-1][2]
    if dense:
        count, pick = groups[-1][0] - low + 1, slice(low, groups[-1][0] + 1)
        rows = [slot - low for slot, _, _ in groups]
    else:
        count, pick = len(groups), torch.tensor([slot for slot, _, _ in groups])
        rows = list(range(count))
    a, b = a[pick], b[pick]
    whole = count == len(groups) and most * count == last - first  # nothing is padding
    place = torch.empty(0, dtype=torch.int64)
    if whole:
        x_pad, z_pad = x[first:last].view(count, most, -1), z[first:last].view(count, most, -1)
    else:
        place = torch.cat(
            [
                torch.arange(row * most, row * most + stop - start)
                for row, (_, start, stop) in zip(rows, groups, strict=True)
            ]
        )
        x_pad, z_pad = x.new_zeros(count * most, x.shape[1]), z.new_zeros(count * most, z.shape[1])
        x_pad[place], z_pad[place] = x[first:last], z[first:last]
        x_pad, z_pad = x_pad.view(count, most, -1), z_pad.view(count, most, -1)
    xa = torch.bmm(x_pad, a.transpose(1, 2))
    z_pad.baddbmm_(xa, b)
    if g is not None:
        scale = g[pick][:, None]
        z_pad.copy_(z_pad * scale) if z_pad.dtype != g.dtype else z_pad.mul_(scale)
    if not whole:
        z[first:last] = z_pad.view(count * most, -1)[place]
