"""Adapted layers as one autograd step each: less memory than autograd's own trace, and fewer passes.

Plain autograd keeps or makes, for each layer, the low-rank output, the sum, the scaled sum and their float32 copies.
Here the forward makes z = x Wᵀ and, in one pass, the output, and keeps only what the gradients need: x (shared by all
layers that read it), xa = x Aᵀ (T, R) and, for DoRA, z.

    y  = g ⊙ (z + s·xa Bᵀ) + bias      dz = g ⊙ dy          dm = Σ_T dy ⊙ (z + s·xa Bᵀ) / norm
    dB = s·dzᵀ xa                      dA = (s·dz B)ᵀ x     dx = dz W + (s·dz B) A

Layers that read one x (q, k and v; gate and up) make one step together: one product with all their A, one accumulated
dx. Works on any device and dtype; base weights and biases get no gradient. Shapes as in `functional.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from theodora.autocast import backward_without_autocast
from theodora.functional import dora_scale
from theodora.kernels import onednn
from theodora.kernels.base_weight import Stack, add_product, products
from theodora.kernels.beside import stacked_rows, times_scaled_b
from theodora.kernels.compose import (
    compose,
    compose_backward,
    compose_backward_from_output,
    compose_backward_into,
    compose_backward_with_output,
    compose_in_place,
    compose_onto,
)
from theodora.kernels.flat_layers import LayerForm, LayerGradients, flat_gradients, flat_layers, layers_of
from theodora.kernels.library_weight import LibraryStack
from theodora.kernels.notes import Output, norm_of, note_output
from theodora.kernels.operators import runs_triton
from theodora.kernels.parts import MOST_FUSED_RANK, Parts
from theodora.kernels.residual import Remade
from theodora.kernels.shared_outputs import SharedOutputs, add_zero_scales, saves_through_hooks


def adapted_linears(
    x_TI: Tensor,
    layers: Sequence[Parts],
    x_lora_TI: Tensor | None = None,
    stack: Stack | None = None,
    shared: SharedOutputs | None = None,
) -> list[Tensor]:
    """The outputs of several adapted layers that read the same x, each (…, O).

    `x_lora_TI` is what the low-rank branches see instead of x (x after dropout); `stack` holds the layers' weights,
    perhaps; with `shared`, somebody else keeps the outputs.
    """
    x, x_lora = flat(x_TI), None if x_lora_TI is None else flat(x_lora_TI)
    source = NormedInput.of(x_TI) if x_lora is None else None
    forms, tensors = flat_layers(layers)
    if stack is None and len(layers) > 1:
        stack = LibraryStack.of([layer.weight for layer in layers], x)
    # Without magnitudes the outputs are the base products themselves, which must not be views of one another.
    if stack is not None and (x_lora is not None or not _scaled(layers) or not stack_holds(stack, layers)):
        stack = None
    if shared is not None and (x_lora is not None or not shared.fit(x, layers, stacked=stack is not None)):
        shared = None
    ys: Any = _AdaptedLinears.apply(x, x_lora, source, stack, shared, forms, *tensors)
    return [y.view(*x_TI.shape[:-1], y.shape[-1]) for y in ys]


class _AdaptedLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        x_lora_TI: Tensor | None,
        source: NormedInput | None,
        stack: Stack | None,
        shared: SharedOutputs | None,
        forms: Sequence[LayerForm],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        layers = layers_of(forms, tensors)
        a = stacked_a(layers, x_TI.dtype)
        xa = None if a is None else (x_TI if x_lora_TI is None else x_lora_TI) @ a.T
        ys: list[Tensor] = []
        kept: list[Tensor | None] = []
        zs = base_products(x_TI, layers, stack, [inner_bias(layer) for layer in layers])
        for layer, z, xa_TR in zip(layers, zs, split_ranks(xa, layers), strict=True):
            y, z = composed(z, xa_TR, layer)
            ys.append(y)
            kept.append(z if shared is None else None)
        ctx.forms, ctx.stack, ctx.shared, ctx.outputs = forms, stack, shared, None
        if shared is not None:  # not among what is saved, where a stranger's writing to them would be an error
            ctx.outputs = [Output(y, read_by_rotary=turned) for y, turned in zip(ys, shared.turned, strict=True)]
            for y, output in zip(ys, ctx.outputs, strict=True):
                note_output(y, output)
        # What one layer's output is added to, and the z that it keeps, let the residual stream do without the sum.
        ctx.output_dtype = x_TI.dtype
        ctx.output_onto = _output_onto if len(layers) == 1 and remakes(layers[0], kept[0], xa) else None
        ctx.set_materialize_grads(False)
        save_input(ctx, x_TI if x_lora_TI is None else x_lora_TI, source, xa, *kept, *tensors)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    @backward_without_autocast
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        needs_x, needs_x_lora = ctx.needs_input_grad[:2]
        source, (xa, *saved) = saved_input(ctx)
        kept, layers = saved[: len(dys)], layers_of(ctx.forms, saved[len(dys) :])
        xas = split_ranks(xa, layers)
        # A layer whose output was not used has nothing to learn, and adds nothing to dx.
        used = [i for i, dy in enumerate(dys) if dy is not None]
        chosen = [layers[i] for i in used]
        whole = len(used) == len(layers)
        # Autograd frees what it saved when this pass has run; of the outputs it knows nothing, so they are let go here.
        outputs: list[Output] | None = ctx.outputs
        ctx.outputs = None
        if outputs is not None and whole and all(output.known for output in outputs):
            kept = [output.y_TO for output in outputs]
        elif ctx.shared is not None:
            ctx.shared.possible = ctx.shared.possible and (outputs is None or not whole)
            kept, outputs = base_products(input_of(source), layers, ctx.stack), None
        found = layers_backward(
            [LayerStep(layers[i], dys[i], kept[i], xas[i]) for i in used],  # pyright: ignore[reportArgumentType]
            ctx.stack if whole else None,
            needs_x=needs_x,
            joins_x=needs_x and not needs_x_lora,
            from_outputs=outputs is not None,
        )
        if outputs is not None:
            normed = isinstance(source, NormedInput)
            x = (source.h_TI, source.rstd_T, source.weight_I) if normed else (source, None, None)
            for of_layer, dy, xa_TR, layer in zip(found.gradients, dys, xas, layers, strict=True):
                add_zero_scales(of_layer.magnitude_O, dy, x, xa_TR, layer)  # pyright: ignore[reportArgumentType]
        dx_lora = None
        if needs_x_lora and found.dzb_TR is not None:
            a = stacked_a(chosen, found.dzb_TR.dtype)
            assert a is not None
            dx_lora = found.dzb_TR @ a
        gradients = [LayerGradients() for _ in layers]
        for i, of_layer, da in zip(used, found.gradients, a_gradients(found.dzb_TR, chosen, source), strict=True):
            of_layer.a_RI = da
            gradients[i] = of_layer
        return found.dx_TI, dx_lora, None, None, None, None, *flat_gradients(ctx.forms, gradients)


def _output_onto(node: Any, residual_TO: Tensor) -> Tensor:
    """residual + y of the one layer of `node`."""
    _, (xa, z, *tensors) = saved_input(node)
    return layer_onto(layers_of(node.forms, tensors)[0], z, xa, residual_TO)


# The steps that `_AdaptedLinears` and the gated MLP share -----------------------------------------------------------


class NormedInput:
    """x as the output of an RMSNorm, x = h · rstd · weight: kept as h, or the way to it, and rstd, as the norm does."""

    __slots__ = ("_h_TI", "rstd_T", "weight_I")

    def __init__(self, h_TI: Tensor | Remade, rstd_T: Tensor, weight_I: Tensor) -> None:
        self._h_TI, self.rstd_T, self.weight_I = h_TI, rstd_T, weight_I

    @property
    def h_TI(self) -> Tensor:
        """h, (T, I)."""
        return self._h_TI.get() if isinstance(self._h_TI, Remade) else self._h_TI

    @property
    def kept(self) -> tuple[Tensor | None, Remade | None]:
        """h, or the way to it."""
        return (None, self._h_TI) if isinstance(self._h_TI, Remade) else (self._h_TI, None)

    @classmethod
    def of(cls, x: Tensor) -> NormedInput | None:
        """Where x came from, if our RMSNorm made it (see `rms_norm.fast_forward`)."""
        norm = norm_of(x)
        if norm is None:
            return None
        h_TI, rstd_T, weight_I, offset = norm
        if h_TI.dtype == torch.float16:  # gradients times rstd leave its range
            return None
        return cls(h_TI, rstd_T, weight_I + offset if offset else weight_I)

    def left_product(self, left_TR: Tensor) -> Tensor:
        """leftᵀ x, (R, I), without forming x."""
        h_TI = self.h_TI
        left = torch.empty_like(left_TR, dtype=h_TI.dtype, memory_format=torch.contiguous_format)
        torch.mul(left_TR, self.rstd_T[:, None], out=left)
        return wide_product(left.T, h_TI).mul_(self.weight_I)


def save_input(ctx: Any, x_TI: Tensor, source: NormedInput | None, *others: Tensor | None) -> None:
    """Save x, or what it can be had from, beside the other tensors."""
    ctx.normed, ctx.remade = source is not None, None
    kept = (x_TI, None, None)
    if source is not None:
        h, ctx.remade = source.kept
        kept = h, source.rstd_T, source.weight_I
    ctx.save_for_backward(*kept, *others)


def saved_input(ctx: Any) -> tuple[Tensor | NormedInput, list[Any]]:
    """What `save_input` saved."""
    x, rstd, weight, *others = ctx.saved_tensors
    return (NormedInput(x if ctx.remade is None else ctx.remade, rstd, weight) if ctx.normed else x), others


def input_of(source: Tensor | NormedInput) -> Tensor:
    """x itself, (T, I)."""
    if not isinstance(source, NormedInput):
        return source
    return (source.h_TI * source.rstd_T[:, None] * source.weight_I).to(source.h_TI.dtype)


def stacked_a(layers: Sequence[Parts], dtype: torch.dtype) -> Tensor | None:
    """All A of the layers one above the other, (ΣR, I), in the dtype of the products."""
    all_a = [layer.a_RI for layer in layers if layer.a_RI is not None]
    if len(all_a) < 2:
        return all_a[0].to(dtype) if all_a else None
    if torch.compiler.is_compiling():
        return torch.cat([a.to(dtype) for a in all_a])
    return stacked_rows(all_a, all_a[0].new_empty(sum(a.shape[0] for a in all_a), all_a[0].shape[1], dtype=dtype))


def split_ranks(stacked_TR: Tensor | None, layers: Sequence[Parts]) -> list[Tensor | None]:
    """The columns of each layer in a product with `stacked_a`."""
    if stacked_TR is None:
        return [None] * len(layers)
    parts = iter(stacked_TR.split([layer.a_RI.shape[0] for layer in layers if layer.a_RI is not None], dim=1))
    return [None if layer.a_RI is None else next(parts) for layer in layers]


def composed(z_TO: Tensor, xa_TR: Tensor | None, layer: Parts) -> tuple[Tensor, Tensor | None]:
    """The layer's output from its base product, which holds its `inner_bias`, and what `composed_backward` needs of it.

    May write to z.
    """
    magnitude, norm, bias = layer.magnitude_O, layer.norm_O, None if inner_bias(layer) is not None else layer.bias_O
    if xa_TR is not None and layer.b_OR is not None:
        if in_one_pass(z_TO, layer):
            if norm is not None or torch.compiler.is_compiling():
                return compose(z_TO, xa_TR, layer.b_OR, layer.scale, magnitude, norm, bias), z_TO
            compose_in_place(z_TO, xa_TR, layer.b_OR, layer.scale, bias, [])
            return z_TO, None
        z_TO = add_product(z_TO, xa_TR, scaled_b(layer, z_TO.dtype).T)
    if norm is None or magnitude is None:
        return z_TO if bias is None else z_TO + bias, None
    return _scale_rows(z_TO, magnitude, norm, bias), z_TO


def remakes(layer: Parts, z_TO: Tensor | None, xa_TR: Tensor | None) -> bool:
    """Whether `layer_onto` can make the layer's output from z to the bit, and what is saved can be read for it."""
    if z_TO is None or xa_TR is None or layer.norm_O is None or torch.compiler.is_compiling():
        return False
    return in_one_pass(z_TO, layer) and not saves_through_hooks()


def layer_onto(layer: Parts, z_TO: Tensor, xa_TR: Tensor, residual_TO: Tensor) -> Tensor:
    """residual + y, rounded as `composed` and an addition after it have rounded."""
    factors, magnitude, norm = (xa_TR, layer.b_OR, layer.scale), layer.magnitude_O, layer.norm_O
    return compose_onto(z_TO, *factors, magnitude, norm, layer.bias_O, residual_TO)


@dataclass(frozen=True, slots=True)
class LayerStep:
    """One layer as its backward pass begins."""

    layer: Parts
    dy_TO: Tensor
    kept_TO: Tensor | None
    """z as `composed` gave it, or the output (see `layers_backward`)."""
    xa_TR: Tensor | None


def composed_backward(step: LayerStep, from_output: bool = False) -> tuple[Tensor, Tensor | None, LayerGradients]:
    """dz and dzb of `composed`, and the gradients of B and the magnitude; perhaps from the output that was kept."""
    layer, dy_TO, z_TO, xa_TR = step.layer, step.dy_TO, step.kept_TO, step.xa_TR
    magnitude, norm, b = layer.magnitude_O, layer.norm_O, layer.b_OR
    if xa_TR is not None and b is not None and in_one_pass(dy_TO, layer):
        backward: Any = compose_backward_with_output if from_output else compose_backward
        dz, dzb, db, dm = backward(dy_TO, None if norm is None else z_TO, xa_TR, b, layer.scale, magnitude, norm)
        if norm is None or magnitude is None:
            return dy_TO, dzb, LayerGradients(b_OR=db.to(b.dtype))
        return dz, dzb, LayerGradients(b_OR=db.to(b.dtype), magnitude_O=dm.to(magnitude.dtype))
    dm = None
    if norm is None or magnitude is None:
        # Attention hands its gradients back transposed, and the CPU's bfloat16 products are slow on those.
        dz = dy_TO.contiguous()
    else:
        assert z_TO is not None
        dz, dm = _scale_rows_backward(dy_TO, z_TO, magnitude, norm)
    if xa_TR is None or b is None:
        return dz, None, LayerGradients(magnitude_O=dm)
    db = onednn.thin_product(dz.T, xa_TR).to(b.dtype).mul_(layer.scale)
    return dz, onednn.thin_product(dz, scaled_b(layer, dz.dtype)), LayerGradients(b_OR=db, magnitude_O=dm)


def in_one_pass(z_TO: Tensor, layer: Parts) -> bool:
    """Whether the update joins z in the kernel that scales it, rather than by a product of its own."""
    return layer.b_OR is not None and layer.b_OR.shape[1] <= MOST_FUSED_RANK and runs_triton(z_TO)


def inner_bias(layer: Parts) -> Tensor | None:
    """The bias, where it goes into the base product, as in `nn.Linear`: where nothing scales it afterwards."""
    bias, weight = layer.bias_O, layer.weight
    inside = bias is not None and layer.norm_O is None and weight.product_takes_bias and bias.dtype == weight.dtype
    return bias if inside else None


def stack_holds(stack: Stack, layers: Sequence[Parts]) -> bool:
    """Whether the stack holds the layers' weights, and has room for their A."""
    ranks = sum(layer.a_RI.shape[0] for layer in layers if layer.a_RI is not None)
    return stack.holds([layer.weight for layer in layers], ranks)


def base_products(
    x_TI: Tensor, layers: Sequence[Parts], stack: Stack | None, biases: Sequence[Tensor | None] | None = None
) -> Sequence[Tensor]:
    """x Wᵀ of each layer; with a stack, whose layers have no inner bias, views of one product."""
    if stack is None:
        return products(x_TI, [layer.weight for layer in layers], biases)
    return stack.product(x_TI).split([layer.weight.shape[0] for layer in layers], dim=1)


@dataclass(frozen=True, slots=True)
class StepGradients:
    """What the backward pass of layers that read one x has found."""

    dx_TI: Tensor | None
    dzb_TR: Tensor | None
    """s·dz B of all layers, (T, ΣR), from which dA is still to come."""
    gradients: list[LayerGradients]
    """Of each layer; without dA."""


def layers_backward(
    steps: Sequence[LayerStep],
    stack: Stack | None,
    *,
    needs_x: bool,
    joins_x: bool,
    over: Tensor | None = None,
    from_outputs: bool = False,
) -> StepGradients:
    """The backward pass of layers that read one x, but for dA.

    Args:
        steps: the layers.
        stack: holds their weights, perhaps.
        needs_x: whether dx is wanted.
        joins_x: whether the low-rank branches read x too, and add to dx.
        over: with a stack, what holds the z, which [dz₁ | dz₂ | … | dzb] may be written over.
        from_outputs: whether the layers' outputs were kept, not z.
    """
    layers = [step.layer for step in steps]
    if stack is not None and _scaled(layers) and all(in_one_pass(steps[0].dy_TO, layer) for layer in layers):
        return _stacked_backward(steps, stack, needs_x, over, from_outputs)
    dzs: list[Tensor] = []
    dzbs: list[Tensor | None] = []
    gradients: list[LayerGradients] = []
    for step in steps:
        dz, dzb, of_layer = composed_backward(step, from_outputs)
        dzs.append(dz)
        dzbs.append(dzb)
        gradients.append(of_layer)
    dzb = side_by_side(dzbs)
    dx = input_gradient(dzs, layers, dzb if joins_x else None) if needs_x else None
    return StepGradients(dx, dzb, gradients)


def input_gradient(dzs: Sequence[Tensor], layers: Sequence[Parts], dzb_TR: Tensor | None) -> Tensor:
    """Σ dz W + dzb A, (T, I), where the layers read one x."""
    dx = layers[0].weight.product_backward(dzs[0])
    others: list[Tensor] = []
    for dz, layer in zip(dzs[1:], layers[1:], strict=True):
        if layer.weight.backward_adds:
            dx = layer.weight.product_backward(dz, dx)
        else:
            others.append(layer.weight.product_backward(dz))
    a = None if dzb_TR is None else stacked_a(layers, dzb_TR.dtype)
    if a is None or dzb_TR is None:
        for other in others:
            dx.add_(other)
        return dx
    return add_low_rank(dx, dzb_TR, a, others)


def _stacked_backward(
    steps: Sequence[LayerStep], stack: Stack, needs_x: bool, over: Tensor | None, from_outputs: bool
) -> StepGradients:
    """`layers_backward` with one product for dx: [dz₁ | dz₂ | … | dzb] [W₁; W₂; …; A]."""
    dy, layers = steps[0].dy_TO, [step.layer for step in steps]
    all_a = [layer.a_RI for layer in layers if layer.a_RI is not None]
    all_b = [layer.b_OR for layer in layers if layer.b_OR is not None]
    ranks = sum(a.shape[0] for a in all_a)
    dz_dzb = dy.new_empty(dy.shape[0], stack.columns(ranks)) if over is None else over
    at = 0
    gradients: list[LayerGradients] = []
    backward = compose_backward_from_output if from_outputs else compose_backward_into
    for step in steps:
        layer, b, magnitude = step.layer, step.layer.b_OR, step.layer.magnitude_O
        assert b is not None
        assert magnitude is not None
        into = dz_dzb[:, at : at + b.shape[0]]
        db, dm = backward(step.dy_TO, step.kept_TO, step.xa_TR, b, layer.scale, magnitude, layer.norm_O, into)  # pyright: ignore[reportArgumentType]
        gradients.append(LayerGradients(b_OR=db.to(b.dtype), magnitude_O=dm.to(magnitude.dtype)))
        at += b.shape[0]
    dzb = times_scaled_b(dz_dzb[:, :at], all_b, [layer.scale for layer in layers], dz_dzb[:, at:])
    dx = dz_dzb @ stack.with_a(all_a) if needs_x else None
    return StepGradients(dx, dzb[:, :ranks], gradients)


def _scaled(layers: Sequence[Parts]) -> bool:
    return all(layer.norm_O is not None for layer in layers)


def side_by_side(dzbs: Sequence[Tensor | None]) -> Tensor | None:
    """The dzb of several layers as one (T, ΣR)."""
    parts = [dzb for dzb in dzbs if dzb is not None]
    if len(parts) < 2:
        return parts[0] if parts else None
    return torch.cat(parts, dim=1)


def a_gradients(dzb_TR: Tensor | None, layers: Sequence[Parts], source: Tensor | NormedInput) -> list[Tensor | None]:
    """dA of each layer: dzbᵀ x, one product for all."""
    if dzb_TR is None:
        return [None] * len(layers)
    da = source.left_product(dzb_TR) if isinstance(source, NormedInput) else wide_product(dzb_TR.T, source)
    split = iter(da.split([layer.a_RI.shape[0] for layer in layers if layer.a_RI is not None]))
    return [None if layer.a_RI is None else next(split).to(layer.a_RI.dtype) for layer in layers]


def wide_product(left_RT: Tensor, right_TI: Tensor) -> Tensor:
    """left @ right, in float32 where a GPU can give half precision's products unrounded."""
    half = left_RT.dtype in (torch.bfloat16, torch.float16)
    if left_RT.is_cuda and half and not torch.compiler.is_compiling():
        return torch.mm(left_RT, right_TI, out_dtype=torch.float32)
    return left_RT @ right_TI


def scaled_b(layer: Parts, dtype: torch.dtype) -> Tensor:
    """s·B in the dtype of the products. s goes in before rounding, so that it costs no precision."""
    assert layer.b_OR is not None
    return (layer.scale * layer.b_OR).to(dtype)


def add_low_rank(dx_TI: Tensor, dzb_TR: Tensor, a_RI: Tensor, others: Sequence[Tensor] = ()) -> Tensor:
    """dx + Σ others + dzb A, in place: by the compose kernel, in one pass, where it can."""
    fits = a_RI.shape[0] <= MOST_FUSED_RANK and runs_triton(dx_TI) and not torch.compiler.is_compiling()
    if fits:
        compose_in_place(dx_TI, dzb_TR, a_RI.T, 1.0, None, others)
        return dx_TI
    for other in others:
        dx_TI = dx_TI + other
    return add_product(dx_TI, dzb_TR, a_RI)


def flat(x: Tensor) -> Tensor:
    """Tokens and features alone."""
    return x.reshape(-1, x.shape[-1])


# y = g ⊙ z + bias, with g in float32 beside z in bfloat16, is what batch normalisation by fixed statistics (mean 0,
# variance 1) does in one pass on the CPU, and its backward gives g ⊙ dy and Σ_T dy ⊙ z in one more. Written with
# multiplications the CPU widens whole tensors to float32 first, at ten times the cost. (`F.batch_norm` itself refuses
# an epsilon of zero in torch 2.11.)


def _scale_rows(z_TO: Tensor, magnitude_O: Tensor, norm_O: Tensor, bias_O: Tensor | None) -> Tensor:
    if z_TO.device.type != "cpu" or runs_triton(z_TO):
        return compose(z_TO, None, None, 1.0, magnitude_O, norm_O, bias_O)
    g_O = dora_scale(magnitude_O, norm_O)
    zero, one = torch.zeros_like(g_O), torch.ones_like(g_O)
    bias = zero if bias_O is None else bias_O.to(g_O.dtype)
    return torch.native_batch_norm(z_TO, g_O, bias, zero, one, False, 0.0, 0.0)[0]


def _scale_rows_backward(dy_TO: Tensor, z_TO: Tensor, magnitude_O: Tensor, norm_O: Tensor) -> tuple[Tensor, Tensor]:
    """(g ⊙ dy, dm)."""
    if z_TO.device.type != "cpu" or runs_triton(z_TO):
        dz, _, _, dm = compose_backward(dy_TO, z_TO, None, None, 1.0, magnitude_O, norm_O)
        return dz, dm.to(magnitude_O.dtype)
    g_O = dora_scale(magnitude_O, norm_O)
    zero, one = torch.zeros_like(g_O), torch.ones_like(g_O)
    dz, dg, _ = torch.ops.aten.native_batch_norm_backward(
        dy_TO.contiguous(), z_TO, g_O, zero, one, zero, one, False, 0.0, [True, True, False]
    )
    # Where the norm is zero g is 1 by definition and does not depend on m.
    return dz, torch.where(norm_O == 0, 0, dg / norm_O).to(magnitude_O.dtype)
