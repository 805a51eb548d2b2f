"""A gated MLP, down(act(gate(x)) ⊙ up(x)), with adapters on any of its three layers, as one autograd step.

What it keeps beyond the frozen model's own needs is down's z. The activation's output h is neither kept nor written
again in the backward pass, and the gradients of z₁ and z₂ take their place in memory: a second backward through the
same graph is an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from theodora.kernels.base_product import base_product, base_product_backward
from theodora.kernels.compose import MOST_FUSED_RANK
from theodora.kernels.fused import (
    NormedInput,
    add_product,
    composed,
    composed_backward,
    flat,
    layers_of,
    low_rank_backward,
    plus,
    save_input,
    saved_input,
    scaled_b,
    set_gradients,
    split_ranks,
    stacked_a,
    tensors_of,
)
from theodora.kernels.gated import gated, gated_backward
from theodora.kernels.parts import Parts, Update


def gated_mlp(x_TI: Tensor, gate: Parts, up: Parts, down: Parts, activation: str) -> Tensor:
    """down(act(gate(x)) ⊙ up(x)), shaped like x.

    Args:
        x_TI: the input, (…, I).
        gate: (F, I), with or without an adapter.
        up: (F, I), likewise.
        down: (I, F), likewise.
        activation: one of `theodora.kernels.gated.ACTIVATIONS`.
    """
    layers = (gate, up, down)
    tensors = [t for layer in layers for t in tensors_of(layer)]
    source = NormedInput.of(x_TI)
    y: Any = _GatedMLP.apply(flat(x_TI), source, [layer.scale for layer in layers], activation, *tensors)
    return y.view(*x_TI.shape[:-1], y.shape[-1])


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        source: NormedInput | None,
        scales: list[float],
        activation: str,
        *tensors: Tensor | None,
    ) -> Tensor:
        gate, up, down = layers_of(tensors, scales)
        a = stacked_a([gate, up], x_TI.dtype)
        xa = None if a is None else x_TI @ a.T
        xa1, xa2 = split_ranks(xa, [gate, up])
        z1, update1 = _base(x_TI, xa1, gate)
        z2, update2 = _base(x_TI, xa2, up)
        h = gated(z1, z2, update1, update2, activation)
        xa3 = None if down.a_RI is None else h @ down.a_RI.to(h.dtype).T
        y, z3 = composed(base_product(h, down.weight_OI, down.weight_scale_O), xa3, down)
        ctx.scales, ctx.activation = scales, activation
        save_input(ctx, x_TI, source, xa, xa3, z1, z2, z3, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TI: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        source, (xa, xa3, z1, z2, z3, *tensors) = saved_input(ctx)
        gate, up, down = layers_of(tensors, ctx.scales)
        xa1, xa2 = split_ranks(xa, [gate, up])
        grads: list[Any] = [None] * len(tensors)

        dz3, dzb3, db3, dm3 = composed_backward(dy_TI, z3, xa3, down)
        set_gradients(grads, 2, db=db3, dm=dm3)
        dh = base_product_backward(dz3, down.weight_OI, down.weight_scale_O)
        # A small update of down's joins in the kernel; a large one is added beforehand, and dA taken from h.
        joins = down.b_OR is not None and _small(down)
        if dzb3 is not None and not joins:
            assert down.a_RI is not None
            dh = add_product(dh, dzb3, down.a_RI.to(dh.dtype))
        low, a3 = (dzb3, down.a_RI) if joins else (None, None)
        update1, update2 = _update(gate, xa1), _update(up, xa2)
        h, dzb1, db1, dm1, dzb2, db2, dm2, da3 = gated_backward(
            dh, low, a3, z1, z2, update1, update2, ctx.activation, z1, z2, dzb3 is not None and not joins
        )
        torch.autograd.graph.increment_version([z1, z2])
        if down.a_RI is not None:
            da3 = da3 if joins or dzb3 is None else dzb3.T @ h
            set_gradients(grads, 2, da=da3.to(down.a_RI.dtype))
        dx, dzbs = None, []
        for i, (layer, xa_TR, dz, dzb, db, dm) in enumerate(
            ((gate, xa1, z1, dzb1, db1, dm1), (up, xa2, z2, dzb2, db2, dm2))
        ):
            if layer.b_OR is not None and xa_TR is not None:
                if not _small(layer):
                    dzb, db = dz @ scaled_b(layer, dz.dtype), (dz.T @ xa_TR).float() * layer.scale
                dzbs.append(dzb)
                set_gradients(grads, i, db=db.to(layer.b_OR.dtype))
            else:
                dzbs.append(None)
            if layer.magnitude_O is not None:
                set_gradients(grads, i, dm=dm.to(layer.magnitude_O.dtype))
            if ctx.needs_input_grad[0]:
                dx = plus(dx, base_product_backward, dz, layer.weight_OI, layer.weight_scale_O)
        dx, _, das = low_rank_backward(dzbs, [gate, up], source, dx, ctx.needs_input_grad[0], False, True)
        for i, da in enumerate(das):
            set_gradients(grads, i, da=da)
        return dx, None, None, None, *grads


def _small(layer: Parts) -> bool:
    """Whether the update is small enough for the kernels to add it."""
    return layer.b_OR is None or layer.b_OR.shape[1] <= MOST_FUSED_RANK


def _base(x_TI: Tensor, xa_TR: Tensor | None, layer: Parts) -> tuple[Tensor, Update]:
    """The base product, a large update already in it, and what is still to be done to it."""
    z = base_product(x_TI, layer.weight_OI, layer.weight_scale_O)
    if xa_TR is not None and not _small(layer):
        z = add_product(z, xa_TR, scaled_b(layer, z.dtype).T)
    return z, _update(layer, xa_TR)


def _update(layer: Parts, xa_TR: Tensor | None) -> Update:
    small = xa_TR is not None and _small(layer)
    return Update(
        xa_TR if small else None,
        layer.b_OR if small else None,
        layer.scale,
        layer.magnitude_O,
        layer.norm_O,
        layer.bias_O,
    )
