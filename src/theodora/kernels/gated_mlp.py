"""A gated MLP, down(act(gate(x)) ⊙ up(x)), with adapters on any of its three layers, as one autograd step.

What it keeps beyond the frozen model's own needs is down's z. The activation's output h is neither kept nor written
again in the backward pass, and the gradients of z₁ and z₂ take their place in memory: a second backward through the
same graph is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from theodora.autocast import backward_without_autocast
from theodora.functional import wide_dtype
from theodora.kernels.base_weight import Stack, add_product, products
from theodora.kernels.beside import times_scaled_b
from theodora.kernels.flat_layers import LayerForm, LayerGradients, flat_gradients, flat_layers, layers_of
from theodora.kernels.fused import (
    LayerStep,
    NormedInput,
    a_gradients,
    composed,
    flat,
    in_one_pass,
    inner_bias,
    input_gradient,
    layer_onto,
    layers_backward,
    remakes,
    save_input,
    saved_input,
    scaled_b,
    side_by_side,
    split_ranks,
    stack_holds,
    stacked_a,
)
from theodora.kernels.gated import gated, gated_backward
from theodora.kernels.library_weight import LibraryStack
from theodora.kernels.parts import MOST_FUSED_RANK, Parts, Update
from theodora.kernels.recompute import ToHost, in_a_block, once_in_a_block

_MOST_DH = 2**28  # bytes; as many as logits are held at once, before whose end all blocks hold what they keep
_MOST_DH_IN_A_BLOCK = 2**26  # where blocks are checkpointed, most is held while an MLP runs backward
# Of so many checkpointed blocks one keeps down's z on the device. Whoever quantises a base is short of memory: an 8B
# model would keep 64 MiB more for each block at 8192 tokens, as much as its input; computing z again takes 0.7 % of an
# NF4 step each. So on a GPU z waits in the host's memory, of all blocks, and this is for where there is none.
_BLOCKS_TO_A_Z = {"plain": 1, "float8": 1, "library": 2}
_Z_TO_HOST = ("library",)


class Stacks(NamedTuple):
    """What holds the weights of an MLP's layers, perhaps."""

    inner: Stack | None = None
    """Gate's and up's."""
    outer: Stack | None = None
    """Down's, with room for its A."""


UNSTACKED = Stacks()


def gated_mlp(x_TI: Tensor, gate: Parts, up: Parts, down: Parts, activation: str, stacks: Stacks = UNSTACKED) -> Tensor:
    """down(act(gate(x)) ⊙ up(x)), shaped like x.

    Args:
        x_TI: the input, (…, I).
        gate: (F, I), with or without an adapter.
        up: (F, I), likewise.
        down: (I, F), likewise.
        activation: one of `theodora.kernels.gated.ACTIVATIONS`.
        stacks: what holds the layers' weights; what does not hold them any more is left out.
    """
    forms, tensors = flat_layers([gate, up, down])
    inner, outer = stacks
    x = flat(x_TI)
    in_memory = inner is not None and stack_holds(inner, [gate, up])
    stacks = Stacks(
        inner if in_memory else LibraryStack.of([gate.weight, up.weight], x),
        outer if outer is not None and stack_holds(outer, [down]) else None,
    )
    source = NormedInput.of(x_TI)
    y: Any = _GatedMLP.apply(x, source, stacks, forms, activation, *tensors)
    return y.view(*x_TI.shape[:-1], y.shape[-1])


class _Saved(NamedTuple):
    """What the forward pass saves beside x and the layers.

    Views are not saved beside what they are views of: whoever moves saved tensors (offloading) moves them apart.
    """

    xa_TR: Tensor | None
    """x Aᵀ of gate and up."""
    xa3_TR: Tensor | None
    """h Aᵀ of down."""
    z: Tensor | None
    """z₁ and z₂ side by side, with room for dzb behind them; or these two."""
    z1_TF: Tensor | None
    z2_TF: Tensor | None
    z3_TI: Tensor | None
    """Down's z, where it is needed; or `room3`, whose first columns it is."""
    room3: Tensor | None


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        source: NormedInput | None,
        stacks: Stacks,
        forms: Sequence[LayerForm],
        activation: str,
        *tensors: Tensor | None,
    ) -> Tensor:
        gate, up, down = layers_of(forms, tensors)
        a = stacked_a([gate, up], x_TI.dtype)
        xa = None if a is None else x_TI @ a.T
        xa1, xa2 = split_ranks(xa, [gate, up])
        z, z1, z2 = _base_products(x_TI, gate, up, stacks.inner, 0 if a is None else a.shape[0])
        z1, z2 = _with_large_update(z1, xa1, gate), _with_large_update(z2, xa2, up)
        recomputed = in_a_block()
        ctx.most_dh = _MOST_DH_IN_A_BLOCK if recomputed else _MOST_DH
        slices = _slices(z1, down, ctx.most_dh) if recomputed and stacks.outer is None else 1
        updates = _update(gate, xa1), _update(up, xa2)
        through_down = partial(_through_down, z1, z2, *updates, activation, down, stacks.outer, slices)
        # Without a magnitude z may be written to, and is not needed again.
        if down.norm_O is None or not in_one_pass(z1, down):
            xa3, z3, room3 = through_down()
        else:
            tensor = down.weight.tensors()[0]
            host = ToHost(1, beside=tensor) if down.weight.stored in _Z_TO_HOST else None
            every = _BLOCKS_TO_A_Z[down.weight.stored]
            xa3, z3, room3 = once_in_a_block(("z", tensor.data_ptr()), through_down, every, host)
        y, z3 = composed(z3, xa3, down)
        ctx.stacks, ctx.forms, ctx.activation = stacks, forms, activation
        zs = (None, z1, z2) if z is None else (z, None, None)
        saved = _Saved(xa, xa3, *zs, z3 if room3 is None else None, room3)
        ctx.output_dtype = x_TI.dtype
        ctx.output_onto = _output_onto if remakes(down, z3, xa3) else None
        save_input(ctx, x_TI, source, *saved, *tensors)
        return y

    @staticmethod
    @once_differentiable
    @backward_without_autocast
    def backward(ctx: Any, dy_TI: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        source, others = saved_input(ctx)
        count = len(_Saved._fields)
        saved = _Saved(*others[:count])
        gate, up, down = layers_of(ctx.forms, others[count:])
        z, z1, z2, z3 = saved.z, saved.z1_TF, saved.z2_TF, saved.z3_TI
        if z is not None:
            z1, z2 = _columns(z, gate, up)
        if saved.room3 is not None:
            z3 = saved.room3[:, : down.weight.shape[0]]
        assert z1 is not None
        assert z2 is not None
        xa1, xa2 = split_ranks(saved.xa_TR, [gate, up])

        slices = _slices(z1, down, ctx.most_dh)
        held = replace(down, weight=down.weight.held(dy_TI.dtype)) if slices > 1 else down
        mlp = _Layers(gate, up, held, ctx.stacks.outer, ctx.activation)
        tokens = _Tokens(dy_TI, z1, z2, z3, xa1, xa2, saved.xa3_TR, saved.room3)
        size = -(-dy_TI.shape[0] // slices)
        found = _joined(
            [_to_gate_and_up(tokens.some(slice(at, at + size)), mlp) for at in range(0, dy_TI.shape[0], size)]
        )
        del mlp, held
        torch.autograd.graph.increment_version([z1, z2] if saved.room3 is None else [z1, z2, saved.room3])
        if down.a_RI is not None and found.down.a_RI is not None:
            found.down.a_RI = found.down.a_RI.to(down.a_RI.dtype)

        for layer, xa_TR, dz, gradients in ((gate, xa1, z1, found.gate), (up, xa2, z2, found.up)):
            if layer.magnitude_O is None or gradients.magnitude_O is None:
                gradients.magnitude_O = None
            else:
                gradients.magnitude_O = gradients.magnitude_O.to(layer.magnitude_O.dtype)
            if layer.b_OR is None or xa_TR is None:
                gradients.b_OR = None
                continue
            if not _small(layer):
                gradients.b_OR = (dz.T @ xa_TR).float() * layer.scale
            assert gradients.b_OR is not None
            gradients.b_OR = gradients.b_OR.to(layer.b_OR.dtype)
        dzb = _times_b(z, z1, z2, gate, up, ctx.stacks.inner)
        found.gate.a_RI, found.up.a_RI = a_gradients(dzb, [gate, up], source)
        dx = _input_gradient(z, z1, z2, dzb, gate, up, ctx.stacks.inner) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None, *flat_gradients(ctx.forms, [found.gate, found.up, found.down])


def _output_onto(node: Any, residual_TI: Tensor) -> Tensor:
    """residual + the MLP's output, before its backward pass (see `residual.py`)."""
    _, others = saved_input(node)
    count = len(_Saved._fields)
    saved, (*_, down) = _Saved(*others[:count]), layers_of(node.forms, others[count:])
    z = saved.z3_TI if saved.room3 is None else saved.room3[:, : down.weight.shape[0]]
    assert z is not None
    assert saved.xa3_TR is not None
    return layer_onto(down, z, saved.xa3_TR, residual_TI)


def _slices(z_TF: Tensor, down: Parts, most_dh: int) -> int:
    """Into how many slices of tokens a pass is cut, so that h or dh, which is as wide as the MLP, is never whole."""
    return -(-z_TF.numel() * z_TF.element_size() // most_dh) if down.weight.backward_in_slices else 1


@dataclass(frozen=True, slots=True)
class _Layers:
    """The MLP in its backward pass."""

    gate: Parts
    up: Parts
    down: Parts
    stack: Stack | None
    """What holds down's weight."""
    activation: str


@dataclass(frozen=True, slots=True)
class _Tokens:
    """What the backward pass begins with, some tokens of it or all; dz₁ and dz₂ are written over z₁ and z₂."""

    dy_TI: Tensor
    z1_TF: Tensor
    z2_TF: Tensor
    z3_TI: Tensor | None
    xa1_TR: Tensor | None
    xa2_TR: Tensor | None
    xa3_TR: Tensor | None
    room3: Tensor | None

    def some(self, at: slice) -> _Tokens:
        """Those of the tokens `at`."""
        every = [getattr(self, field.name) for field in fields(self)]
        return _Tokens(*(None if t is None else t[at] for t in every))  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, slots=True)
class _Found:
    """What the backward pass through down and the activation has found, beside dz₁ and dz₂; dA of down alone."""

    gate: LayerGradients
    up: LayerGradients
    down: LayerGradients


def _to_gate_and_up(tokens: _Tokens, mlp: _Layers) -> _Found:
    """From dy to dz₁ and dz₂."""
    # A small update of down's joins dh in the kernel, and gives dA there; a large one is dealt with outside.
    inside = mlp.down.b_OR is not None and _small(mlp.down)
    joins = inside and mlp.stack is None
    step = LayerStep(mlp.down, tokens.dy_TI, tokens.z3_TI, tokens.xa3_TR)
    through_down = layers_backward([step], mlp.stack, needs_x=True, joins_x=not joins, over=tokens.room3)
    dh, dzb3, (down,) = through_down.dx_TI, through_down.dzb_TR, through_down.gradients
    assert dh is not None
    h, db1, dm1, db2, dm2, da3 = gated_backward(
        dh,
        dzb3 if inside else None,
        mlp.down.a_RI if joins else None,
        tokens.z1_TF,
        tokens.z2_TF,
        _update(mlp.gate, tokens.xa1_TR),
        _update(mlp.up, tokens.xa2_TR),
        mlp.activation,
        tokens.z1_TF,
        tokens.z2_TF,
        dzb3 is not None and not inside,
    )
    if inside:
        down.a_RI = da3
    elif dzb3 is not None:
        down.a_RI = (dzb3.T @ h).to(wide_dtype(h.dtype))
    gate, up = LayerGradients(b_OR=db1, magnitude_O=dm1), LayerGradients(b_OR=db2, magnitude_O=dm2)
    return _Found(gate, up, down)


def _joined(slices: Sequence[_Found]) -> _Found:
    """The results for all tokens, sums added up onto those of the first slice."""
    first, *others = slices
    for other in others:
        onto, more = _tensors(first), _tensors(other)
        torch._foreach_add_(onto, more)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    return first


def _tensors(found: _Found) -> list[Tensor]:
    """All gradients there are, in a fixed order, and in a list, so that one launch adds those of a shape."""
    each = (getattr(layer, field.name) for layer in (found.gate, found.up, found.down) for field in fields(layer))
    return [t for t in each if t is not None]


def _base_products(
    x_TI: Tensor, gate: Parts, up: Parts, stack: Stack | None, ranks: int
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(z, z₁, z₂): with a stack, z₁ and z₂ are columns of z, which has room for dzb behind them."""
    if stack is None:
        z1, z2 = products(x_TI, [gate.weight, up.weight])
        return None, z1, z2
    z = x_TI.new_empty(x_TI.shape[0], stack.columns(ranks))
    torch.mm(x_TI, stack.weight_OI.T, out=z[:, : stack.outputs])
    return z, *_columns(z, gate, up)


def _columns(z: Tensor, gate: Parts, up: Parts) -> tuple[Tensor, Tensor]:
    """z₁ and z₂ in z."""
    first, second = gate.weight.shape[0], up.weight.shape[0]
    return z[:, :first], z[:, first : first + second]


def _through_down(
    z1_TF: Tensor,
    z2_TF: Tensor,
    gate: Update,
    up: Update,
    activation: str,
    down: Parts,
    stack: Stack | None,
    slices: int = 1,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """(h Aᵀ, z, room) of down: with a stack and a magnitude, z is columns of room, with place for dzb behind them."""
    if slices > 1:
        return *_through_down_in_slices(z1_TF, z2_TF, gate, up, activation, down, slices), None
    h = gated(z1_TF, z2_TF, gate, up, activation)
    xa = None if down.a_RI is None else h @ down.a_RI.to(h.dtype).T
    if down.norm_O is None or not in_one_pass(h, down) or stack is None or down.a_RI is None:
        return xa, down.weight.product(h, inner_bias(down)), None
    room = h.new_empty(h.shape[0], stack.columns(down.a_RI.shape[0]))
    z = room[:, : stack.outputs]
    torch.mm(h, stack.weight_OI.T, out=z)
    return xa, z, room


def _through_down_in_slices(
    z1_TF: Tensor, z2_TF: Tensor, gate: Update, up: Update, activation: str, down: Parts, slices: int
) -> tuple[Tensor | None, Tensor]:
    """(h Aᵀ, z) of down, some tokens at a time."""
    weight, bias = down.weight.held(z1_TF.dtype), inner_bias(down)  # (of the held one it might be another)
    bias = None if bias is None else bias.to(z1_TF.dtype)
    a_RI = None if down.a_RI is None else down.a_RI.to(z1_TF.dtype)
    z, all_xa = z1_TF.new_empty(z1_TF.shape[0], down.weight.shape[0]), list[Tensor]()
    size = -(-z1_TF.shape[0] // slices)
    for start in range(0, z1_TF.shape[0], size):
        at = slice(start, start + size)
        first, second = (replace(t, xa_TR=None if t.xa_TR is None else t.xa_TR[at]) for t in (gate, up))
        h = gated(z1_TF[at], z2_TF[at], first, second, activation)
        z[at] = weight.product(h, bias)
        all_xa += [] if a_RI is None else [h @ a_RI.T]
    return torch.cat(all_xa) if all_xa else None, z


def _times_b(
    z: Tensor | None, dz1_TF: Tensor, dz2_TF: Tensor, gate: Parts, up: Parts, stack: Stack | None
) -> Tensor | None:
    """dzb of gate and up, (T, ΣR); with a stack behind dz₁ and dz₂, which z holds by now."""
    layers = (gate, up)
    all_b = [layer.b_OR for layer in layers if layer.b_OR is not None]
    if stack is None or z is None or len(all_b) < len(layers):
        each = zip(layers, (dz1_TF, dz2_TF), strict=True)
        return side_by_side([None if at.b_OR is None else dz @ scaled_b(at, dz.dtype) for at, dz in each])
    dz, behind = z[:, : stack.outputs], z[:, stack.outputs :]
    times_scaled_b(dz, all_b, [layer.scale for layer in layers], behind)
    return behind[:, : sum(b.shape[1] for b in all_b)]


def _input_gradient(
    z: Tensor | None,
    dz1_TF: Tensor,
    dz2_TF: Tensor,
    dzb_TR: Tensor | None,
    gate: Parts,
    up: Parts,
    stack: Stack | None,
) -> Tensor:
    """dx of gate and up; z holds dz₁ and dz₂ by now, and dzb behind them, if `_times_b` has put it there."""
    if stack is None or z is None:
        return input_gradient([dz1_TF, dz2_TF], [gate, up], dzb_TR)
    if dzb_TR is None:
        return z[:, : stack.outputs] @ stack.weight_OI
    all_a = [layer.a_RI for layer in (gate, up) if layer.a_RI is not None]
    if len(all_a) < 2:
        behind = z[:, stack.outputs :]
        behind[:, : dzb_TR.shape[1]].copy_(dzb_TR)
        behind[:, dzb_TR.shape[1] :].zero_()
    return z @ stack.with_a(all_a)


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
