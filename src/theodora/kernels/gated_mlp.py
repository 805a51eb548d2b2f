"""A gated MLP, down(act(gate(x)) ⊙ up(x)), with adapters on any of its three layers, as one autograd step.

What it keeps beyond the frozen model's own needs is down's z. The activation's output h is neither kept nor written
again in the backward pass, and the gradients of z₁ and z₂ take their place in memory: a second backward through the
same graph is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from theodora.autocast import backward_without_autocast
from theodora.functional import wide_dtype
from theodora.kernels.base_product import base_product
from theodora.kernels.fused import (
    NormedInput,
    a_gradients,
    add_product,
    base_products,
    composed,
    flat,
    in_one_pass,
    inner_bias,
    input_gradient,
    layers_backward,
    layers_of,
    save_input,
    saved_input,
    scaled_b,
    set_gradients,
    side_by_side,
    split_ranks,
    stacked_a,
    tensors_of,
)
from theodora.kernels.gated import gated, gated_backward
from theodora.kernels.parts import MOST_FUSED_RANK, Parts, Update
from theodora.kernels.recompute import once_in_a_block
from theodora.kernels.stack import Stack

_MOST_DH = 2**27  # bytes


def gated_mlp(
    x_TI: Tensor, gate: Parts, up: Parts, down: Parts, activation: str, stacks: Sequence[Stack | None] = (None, None)
) -> Tensor:
    """down(act(gate(x)) ⊙ up(x)), shaped like x.

    Args:
        x_TI: the input, (…, I).
        gate: (F, I), with or without an adapter.
        up: (F, I), likewise.
        down: (I, F), likewise.
        activation: one of `theodora.kernels.gated.ACTIVATIONS`.
        stacks: what holds the weights of gate and up, and what holds down's, perhaps.
    """
    layers = (gate, up, down)
    tensors = [t for layer in layers for t in tensors_of(layer)]
    inner, outer = stacks
    found = (
        inner if inner is not None and inner.fits([gate, up]) else None,
        outer if outer is not None and outer.fits([down]) else None,
    )
    source = NormedInput.of(x_TI)
    y: Any = _GatedMLP.apply(flat(x_TI), source, found, [layer.scale for layer in layers], activation, *tensors)
    return y.view(*x_TI.shape[:-1], y.shape[-1])


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        source: NormedInput | None,
        stacks: tuple[Stack | None, Stack | None],
        scales: list[float],
        activation: str,
        *tensors: Tensor | None,
    ) -> Tensor:
        gate, up, down = layers_of(tensors, scales)
        a = stacked_a([gate, up], x_TI.dtype)
        xa = None if a is None else x_TI @ a.T
        xa1, xa2 = split_ranks(xa, [gate, up])
        z, z1, z2 = _base_products(x_TI, gate, up, stacks[0], 0 if a is None else a.shape[0])
        z1, z2 = _with_large_update(z1, xa1, gate), _with_large_update(z2, xa2, up)
        h = gated(z1, z2, _update(gate, xa1), _update(up, xa2), activation)
        xa3 = None if down.a_RI is None else h @ down.a_RI.to(h.dtype).T
        z3, room3 = _product_of_down(h, down, stacks[1])
        y, z3 = composed(z3, xa3, down)
        ctx.stacks, ctx.scales, ctx.activation = stacks, scales, activation
        # Views are not saved beside what they are views of: whoever moves saved tensors (offloading) moves them apart.
        zs = (None, z1, z2) if z is None else (z, None, None)
        save_input(ctx, x_TI, source, xa, xa3, *zs, z3 if room3 is None else None, room3, *tensors)
        return y

    @staticmethod
    @once_differentiable
    @backward_without_autocast
    def backward(ctx: Any, dy_TI: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        source, (xa, xa3, z, z1, z2, z3, room3, *tensors) = saved_input(ctx)
        gate, up, down = layers_of(tensors, ctx.scales)
        xa1, xa2 = split_ranks(xa, [gate, up])
        grads: list[Any] = [None] * len(tensors)
        if z is not None:
            z1, z2 = _columns(z, gate, up)
        if room3 is not None:
            z3 = room3[:, : down.weight_OI.shape[0]]

        tokens = dy_TI.shape[0]
        size = -(-tokens // _slices(z1, down))
        dzb1, dzb2, (db1, dm1, db2, dm2, db3, dm3, da3) = _joined(
            [
                _to_gate_and_up(
                    *(None if t is None else t[at : at + size] for t in (dy_TI, z1, z2, z3, xa1, xa2, xa3, room3)),
                    gate, up, down, ctx.stacks[1], ctx.activation,  # pyright: ignore[reportCallIssue]
                )  # pyright: ignore[reportArgumentType]
                for at in range(0, tokens, size)
            ]
        )  # fmt: skip
        torch.autograd.graph.increment_version([z1, z2] if room3 is None else [z1, z2, room3])
        if down.a_RI is not None and da3 is not None:
            set_gradients(grads, 2, da=da3.to(down.a_RI.dtype), db=db3)
        set_gradients(grads, 2, dm=dm3)

        dzbs: list[Tensor | None] = []
        for i, (layer, xa_TR, dz, dzb, db, dm) in enumerate(
            ((gate, xa1, z1, dzb1, db1, dm1), (up, xa2, z2, dzb2, db2, dm2))
        ):
            if layer.magnitude_O is not None and dm is not None:
                set_gradients(grads, i, dm=dm.to(layer.magnitude_O.dtype))
            if layer.b_OR is None or xa_TR is None:
                dzbs.append(None)
                continue
            if not _small(layer):
                dzb, db = dz @ scaled_b(layer, dz.dtype), (dz.T @ xa_TR).float() * layer.scale
            assert db is not None
            dzbs.append(dzb)
            set_gradients(grads, i, db=db.to(layer.b_OR.dtype))
        dzb = side_by_side(dzbs)
        for i, da in enumerate(a_gradients(dzb, [gate, up], source)):
            set_gradients(grads, i, da=da)
        dx = _input_gradient(z, z1, z2, dzb, gate, up, ctx.stacks[0]) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None, *grads


def _slices(z_TF: Tensor, down: Parts) -> int:
    """Into how many slices of tokens the backward is cut, so that dh, which is as wide as the MLP, is never whole."""
    # A float8 weight is transposed for each product, so it has one.
    return 1 if down.weight_scale_O is not None else -(-z_TF.numel() * z_TF.element_size() // _MOST_DH)


def _to_gate_and_up(
    dy_TI: Tensor,
    z1_TF: Tensor,
    z2_TF: Tensor,
    z3_TI: Tensor | None,
    xa1_TR: Tensor | None,
    xa2_TR: Tensor | None,
    xa3_TR: Tensor | None,
    room3: Tensor | None,
    gate: Parts,
    up: Parts,
    down: Parts,
    stack: Stack | None,
    activation: str,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """From dy to dz₁ and dz₂, written over z₁ and z₂: (dzb₁, dzb₂, [dB₁, dm₁, dB₂, dm₂, dB₃, dm₃, dA₃])."""
    # A small update of down's joins dh in the kernel, and gives dA there; a large one is dealt with outside.
    inside = down.b_OR is not None and _small(down)
    joins = inside and stack is None
    dh, dzb3, (db3,), (dm3,) = layers_backward([dy_TI], [z3_TI], [xa3_TR], [down], stack, True, not joins, room3)
    assert dh is not None
    h, dzb1, db1, dm1, dzb2, db2, dm2, da3 = gated_backward(
        dh,
        dzb3 if inside else None,
        down.a_RI if joins else None,
        z1_TF,
        z2_TF,
        _update(gate, xa1_TR),
        _update(up, xa2_TR),
        activation,
        z1_TF,
        z2_TF,
        dzb3 is not None and not inside,
    )
    if not inside:
        da3 = None if dzb3 is None else (dzb3.T @ h).to(wide_dtype(h.dtype))
    return dzb1, dzb2, [db1, dm1, db2, dm2, db3, dm3, da3]


def _joined(
    slices: Sequence[tuple[Tensor, Tensor, list[Tensor | None]]],
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The results for all tokens: rows one after the other, sums added up."""
    if len(slices) == 1:
        return slices[0]
    dzb1, dzb2, sums = zip(*slices, strict=True)
    totals = [None if first is None else torch.stack([first, *rest]).sum(0) for first, *rest in zip(*sums, strict=True)]
    return torch.cat(dzb1), torch.cat(dzb2), totals


def _base_products(
    x_TI: Tensor, gate: Parts, up: Parts, stack: Stack | None, ranks: int
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(z, z₁, z₂): with a stack, z₁ and z₂ are columns of z, which has room for dzb behind them."""
    if stack is None:
        z1, z2 = base_products(x_TI, [gate, up], None)
        return None, z1, z2
    z = x_TI.new_empty(x_TI.shape[0], stack.columns(ranks))
    torch.mm(x_TI, stack.weight.T, out=z[:, : stack.rows])
    return z, *_columns(z, gate, up)


def _columns(z: Tensor, gate: Parts, up: Parts) -> tuple[Tensor, Tensor]:
    """z₁ and z₂ in z."""
    first, both = gate.weight_OI.shape[0], gate.weight_OI.shape[0] + up.weight_OI.shape[0]
    return z[:, :first], z[:, first:both]


def _product_of_down(h_TF: Tensor, down: Parts, stack: Stack | None) -> tuple[Tensor, Tensor | None]:
    """(z, room): with a stack and a magnitude, z is columns of a tensor that has room for dzb behind them."""
    if down.norm_O is None or not in_one_pass(h_TF, down):  # z may be written to, or is not needed again
        return base_product(h_TF, down.weight_OI, down.weight_scale_O, inner_bias(down)), None
    return once_in_a_block(("z", down.weight_OI.data_ptr()), lambda: _product_with_room(h_TF, down, stack))


def _product_with_room(h_TF: Tensor, down: Parts, stack: Stack | None) -> tuple[Tensor, Tensor | None]:
    if stack is None or down.a_RI is None:
        return base_product(h_TF, down.weight_OI, down.weight_scale_O), None
    room = h_TF.new_empty(h_TF.shape[0], stack.columns(down.a_RI.shape[0]))
    z = room[:, : stack.rows]
    torch.mm(h_TF, stack.weight.T, out=z)
    return z, room


def _input_gradient(
    z: Tensor | None,
    dz1_TF: Tensor,
    dz2_TF: Tensor,
    dzb_TR: Tensor | None,
    gate: Parts,
    up: Parts,
    stack: Stack | None,
) -> Tensor:
    """dx of gate and up; z holds dz₁ and dz₂ by now."""
    if stack is not None and z is not None:
        a = None if dzb_TR is None else stacked_a([gate, up], dzb_TR.dtype)
        if a is None or dzb_TR is None:
            return z[:, : stack.rows] @ stack.weight
        z[:, stack.rows : stack.rows + a.shape[0]].copy_(dzb_TR)
        z[:, stack.rows + a.shape[0] :].zero_()
        return z @ stack.with_a(a)
    return input_gradient([dz1_TF, dz2_TF], [gate, up], dzb_TR)


def _small(layer: Parts) -> bool:
    """Whether the update is small enough for the kernels to add it."""
    return layer.b_OR is None or layer.b_OR.shape[1] <= MOST_FUSED_RANK


def _with_large_update(z_TF: Tensor, xa_TR: Tensor | None, layer: Parts) -> Tensor:
    """z, with an update in it that is too large for the kernels."""
    if xa_TR is None or _small(layer):
        return z_TF
    return add_product(z_TF, xa_TR, scaled_b(layer, z_TF.dtype).T)


def _update(layer: Parts, xa_TR: Tensor | None) -> Update:
    """What is still to be done to the base product."""
    small = xa_TR is not None and _small(layer)
    return Update(
        xa_TR if small else None,
        layer.b_OR if small else None,
        layer.scale,
        layer.magnitude_O,
        layer.norm_O,
        layer.bias_O,
    )
