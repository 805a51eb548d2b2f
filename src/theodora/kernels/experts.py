"""A mixture's experts, with adapters on either of their products, as one autograd step.

    y_s = W₁ x_t + …        h_s = act(gate) ⊙ up of y_s        out_t = Σ_k weight_tk · (W₂ h_s + …)

each product with the adapter of its expert, g ⊙ (x Wᵀ + s·(x Aᵀ) Bᵀ) + bias. Rows are sorted by expert once. torch's
grouped product runs the base weights; our kernels do all else in few passes (`triton/experts.py`). The gradient of a
gather is a gather by the inverse permutation and a sum over K: no atomics, the same bits every time.

What it keeps for the backward pass, in bytes of half precision for each row (S = T·K rows): 4·I for z = x W₁ᵀ, 2·R for
each x Aᵀ, and with a magnitude on the down projection 2·H for its product, unless experts are narrow (`_keeps_v`). A
frozen model by transformers keeps 6·I and 2·H: gate and up, the activated gate, and the down projection's output.
Neither h nor the gathered x are kept: h comes anew from z, x from the tokens. A routing weight's gradient is ⟨h, dh⟩
for a weight of 1, which needs no output.

Shapes: T tokens, K experts for each, S rows, E experts, H hidden, I intermediate features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from theodora.autocast import backward_without_autocast
from theodora.functional import dora_scale
from theodora.kernels.experts_weight import ExpertsWeight, grouped_product
from theodora.kernels.fused import wide_product
from theodora.kernels.gated import ACTIVATIONS
from theodora.kernels.operators import interpreted, operator, runs_triton
from theodora.kernels.parts import EXPERT_CHUNK, EXPERT_TILE, Gate, Parts

MOST_RANK = 64
"""Ranks that the kernels hold at once."""
Between = Callable[[Tensor], Tensor]
"""A gate of which nothing is known: (S, 2·I), or (S, I) without one, to (S, I), each row for itself."""


class Side(NamedTuple):
    """One of the two products, as the passes read it."""

    weight: Tensor
    """(E, O, I)."""
    bias_EO: Tensor | None
    a_ERI: Tensor | None
    b_EOR: Tensor | None
    scale: float
    g_EO: Tensor | None
    """m / ‖W + s·B·A‖, float32; None for LoRA."""
    norm_EO: Tensor | None = None


class Kept(NamedTuple):
    """What the forward pass leaves; empty where there is no such thing."""

    z_SO: Tensor
    """x W₁ᵀ; where the gate is not ours, with the low-rank update."""
    xa_SR: Tensor
    ha_SR: Tensor
    v_SH: Tensor
    """The down projection before its scale, where `_keeps_v`."""
    order_S: Tensor
    back_S: Tensor
    ends_E: Tensor
    tiles_N3: Tensor
    chunks_N3: Tensor
    firsts_E: Tensor


def fits(x_TH: Tensor, index_TK: Tensor, up: Parts, down: Parts, gate: Gate | Between) -> bool:
    """Whether `adapted_experts` takes these; `kernels.fast()` is not asked."""
    weights = [side.weight for side in (up, down)]
    plain = all(isinstance(w, ExpertsWeight) and w.tensor.is_contiguous() for w in weights)
    if not plain or not runs_triton(x_TH) or x_TH.numel() == 0 or index_TK.numel() == 0:
        return False
    if any(t.requires_grad for side in (up, down) for t in (*side.weight.tensors(), side.bias_O) if t is not None):
        return False
    if any(side.drops or (side.a_RI is not None and side.a_RI.shape[1] > MOST_RANK) for side in (up, down)):
        return False
    if not isinstance(gate, Gate) and (x_TH.is_meta or torch.compiler.is_compiling()):
        return False
    if any(w.dtype != weights[0].dtype for w in weights):
        return False
    if interpreted() and not x_TH.is_cuda:
        return weights[0].dtype in (torch.float32, torch.bfloat16)
    aligned = not any(size % 8 for w in weights for size in w.shape[1:])
    if weights[0].dtype != torch.bfloat16 or not aligned or not hasattr(F, "grouped_mm"):
        return False
    return x_TH.is_meta or torch.cuda.get_device_capability(x_TH.device) >= (8, 0)


def adapted_experts(
    x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor, up: Parts, down: Parts, gate: Gate | Between
) -> Tensor:
    """What transformers' experts compute, (T, H), in the dtype of x, with adapters.

    Args:
        x_TH: tokens.
        index_TK: the experts of each token. Numbers of E and more stand for no expert.
        weights_TK: what each expert's output counts.
        up: the first product, with A (E, R, I), B (E, O, R), m and norm (E, O).
        down: the second.
        gate: what comes between them.
    """
    x, dtype = x_TH.to(up.weight.dtype), x_TH.dtype
    sides: list[Tensor | None] = []
    for side in (up, down):
        norm, magnitude = side.norm_O, side.magnitude_O
        g = None if norm is None or magnitude is None else dora_scale(magnitude.detach(), norm)
        assert isinstance(side.weight, ExpertsWeight)
        sides += [side.weight.weight_EOI, side.bias_O, side.a_RI, side.b_OR, magnitude, g, norm]
    y: Any = _Experts.apply(x, index_TK.contiguous(), weights_TK.contiguous(), gate, (up.scale, down.scale), *sides)
    return y.to(dtype)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        gate: Gate | Between,
        scales: tuple[float, float],
        *sides: Tensor | None,
    ) -> Tensor:
        ctx.gate, ctx.scales = gate, scales
        up, down = _sides(sides, scales)
        given = (x, index, weights, *_without_norm(up), *_without_norm(down))
        if isinstance(gate, Gate):
            out, *kept = _forward_op(*given, *_spread(gate))
        else:
            out, *kept = forward(x, index, weights, up, down, gate)
        ctx.save_for_backward(x, index, weights, *sides, *kept)
        return out

    @staticmethod
    @once_differentiable
    @backward_without_autocast
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, index, weights, *rest = ctx.saved_tensors
        sides, kept = rest[:14], Kept(*rest[14:])
        up, down = _sides(sides, ctx.scales)
        needs_x = ctx.needs_input_grad[0]
        if isinstance(ctx.gate, Gate):
            spread = (*_spread(ctx.gate), needs_x)
            found = _backward_op(dout, x, index, weights, *up, *down, *kept, *spread)
        else:
            found = backward(dout, x, index, weights, up, down, kept, ctx.gate, needs_x)
        dx, dw, *gradients = found
        flat: list[Tensor | None] = []
        for side, (da, db, dm) in ((sides[:7], gradients[:3]), (sides[7:], gradients[3:])):
            each = zip(side[2:5], (da, db, dm), strict=True)
            own = [None if t is None else d.to(t.dtype) for t, d in each]
            flat += [None, None, *own, None, None]
        return dx if needs_x else None, None, dw, None, None, *flat


def _sides(tensors: Any, scales: tuple[float, float]) -> tuple[Side, Side]:
    """Of what `adapted_experts` gives autograd."""
    each = zip((tensors[:7], tensors[7:]), scales, strict=True)
    up, down = (Side(w, bias, a, b, scale, g, norm) for (w, bias, a, b, _, g, norm), scale in each)
    return up, down


def _without_norm(side: Side) -> tuple[Any, ...]:
    return side[:-1]


def forward(
    x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor, up: Side, down: Side, gate: Gate | Between
) -> tuple[Tensor, ...]:
    """The output (T, H), and `Kept`."""
    from theodora.kernels.triton import experts as triton
    from theodora.kernels.triton import experts_gate

    rows = _rows(index_TK, up.weight.shape[0])
    none = x_TH.new_empty
    a = None if up.a_ERI is None else triton.columns_of_a(up.a_ERI)
    x_SH, xa = triton.project(x_TH, rows, a, of_tokens=True, keep=True)
    assert x_SH is not None
    z = grouped_product(x_SH, up.weight.mT, rows.ends_E)
    del x_SH
    if isinstance(gate, Gate):
        h = experts_gate.gate(z, rows, xa, up.b_EOR, up.scale, up.g_EO, up.bias_EO, gate)
    else:
        if xa is not None and up.b_EOR is not None:
            triton.add_low(z, rows, xa, triton.columns_of_b(up.b_EOR, up.scale))
        h = gate(_scaled(z, rows, up)).contiguous()
    v, ha = grouped_product(h, down.weight.mT, rows.ends_E), None
    if down.a_ERI is not None and down.b_EOR is not None:
        _, ha = triton.project(h, rows, triton.columns_of_a(down.a_ERI))
        assert ha is not None
        triton.add_low(v, rows, ha, triton.columns_of_b(down.b_EOR, down.scale))
    out = triton.combine(v, rows, index_TK, weights_TK, down.g_EO, down.bias_EO)
    kept = Kept(
        z, none(0) if xa is None else xa, none(0) if ha is None else ha, v if _keeps_v(down) else none(0), *rows
    )
    return out, *kept


def _keeps_v(down: Side) -> bool:
    """Whether the down projection's output is kept, which its magnitude's gradient needs.

    Where experts are narrow it is the largest of all that is kept, and its product is done once more instead.
    """
    _, hidden, features = down.weight.shape
    return down.g_EO is not None and hidden <= 2 * features


def _rows(index_TK: Tensor, experts: int) -> Any:
    """Who has which row, found without a look at it by the host."""
    from theodora.kernels.triton import experts as triton

    expert_S, order_S = index_TK.reshape(-1).sort(stable=True)
    order = order_S.to(torch.int32)
    ends = torch.searchsorted(expert_S, torch.arange(1, experts + 1, device=expert_S.device), out_int32=True)
    back = torch.empty_like(order)
    back.scatter_(0, order_S, torch.arange(len(order), dtype=torch.int32, device=order.device))
    tiles, _ = triton.split_rows(ends, len(order), triton.TILE)
    chunks, firsts = triton.split_rows(ends, len(order), triton.CHUNK)
    return triton.Rows(order, back, ends, tiles, chunks, firsts)


def backward(
    dout_TH: Tensor,
    x_TH: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    up: Side,
    down: Side,
    kept: Kept,
    gate: Gate | Between,
    needs_x: bool,
) -> tuple[Tensor, ...]:
    """(dx, dweights, and those of A, B and m of `up` and `down`); empty where there is none."""
    from theodora.kernels.triton import experts as triton

    rows, dout, none = triton.Rows(*kept[4:]), dout_TH.contiguous(), x_TH.new_empty
    # The down projection. dz, and what comes of it, is for a routing weight of 1, whose gradient ⟨h, dh⟩ is so.
    b = None if down.b_EOR is None else triton.columns_of_b(down.b_EOR, down.scale)
    dz, low = triton.project(dout, rows, b, of_tokens=True, g_EC=down.g_EO, keep=True)
    assert dz is not None
    dh = grouped_product(dz, down.weight, rows.ends_E)
    del dz
    again = down.g_EO is not None and not _keeps_v(down)
    through = _gate_backward(dh, low, rows, weights_TK, up, down, kept, gate, again)
    del dh
    db_down, dm_down = _of_down(dout, through.h_SI, rows, weights_TK, down, kept)
    da_down = none(0)
    if through.da_parts is not None and down.a_ERI is not None:
        da_down = triton.sum_chunks(through.da_parts, rows, down.a_ERI.dtype)
    db_up, dm_up = _b_and_m(through.db_parts, through.dg_parts, rows, up, through.db_scale)
    dweights = _weight_gradient(through.dw_S, rows, dout, index_TK, down).to(weights_TK.dtype)
    # The up projection.
    da_up, low, dz = none(0), None, through.dz_SO
    if up.a_ERI is not None and up.b_EOR is not None:
        _, low = triton.project(dz, rows, triton.columns_of_b(up.b_EOR, up.scale))
        parts, _ = triton.outer(x_TH, rows, low, of_tokens=True, ranks_first=True)
        assert parts is not None
        da_up = triton.sum_chunks(parts, rows, up.a_ERI.dtype)
        del parts
    dx = none(0)
    if needs_x:
        dx_SH = grouped_product(dz, up.weight, rows.ends_E)
        if low is not None and up.a_ERI is not None:
            triton.add_low(dx_SH, rows, low, triton.columns_of_a(up.a_ERI))
        dx = triton.combine(dx_SH, rows, index_TK, None, None, None)
    return dx, dweights, da_up, db_up, dm_up, da_down, db_down, dm_down


class _Through(NamedTuple):
    """What the gate's backward pass gives."""

    dz_SO: Tensor
    dw_S: Tensor
    db_parts: Tensor | None
    db_scale: Tensor | None
    """What the columns of dB are still to be multiplied by."""
    dg_parts: Tensor | None
    da_parts: Tensor | None
    h_SI: Tensor | None
    """The gate's output, if asked for."""


def _gate_backward(
    dh_SI: Tensor,
    low_SR: Tensor | None,
    rows: Any,
    weights_TK: Tensor,
    up: Side,
    down: Side,
    kept: Kept,
    gate: Gate | Between,
    keep_h: bool,
) -> _Through:
    from theodora.kernels.triton import experts as triton
    from theodora.kernels.triton import experts_gate

    xa = None if up.b_EOR is None else kept.xa_SR
    if isinstance(gate, Gate):
        given = (xa, up.b_EOR, up.scale, up.g_EO, up.bias_EO, gate)
        dz, dw, db, dg, da, h = experts_gate.gate_backward(
            dh_SI, rows, weights_TK, low_SR, down.a_ERI, kept.z_SO, *given, keep_h=keep_h
        )
        return _Through(dz, dw, db, None, dg, da, h)
    if low_SR is not None and down.a_ERI is not None:
        triton.add_low(dh_SI, rows, low_SR, triton.columns_of_a(down.a_ERI))
    with torch.enable_grad():
        y = _scaled(kept.z_SO, rows, up).detach().requires_grad_()
        h = gate(y)
    weight = weights_TK.reshape(-1)[rows.order_S][:, None]
    dw = (h.detach() * dh_SI).sum(1, dtype=torch.float32)
    (dy,) = torch.autograd.grad(h, y, (dh_SI * weight).to(h.dtype))
    da = None
    if low_SR is not None:
        da, _ = triton.outer(h.detach().contiguous(), rows, (low_SR * weight).to(low_SR.dtype), ranks_first=True)
    db = dg = None
    if xa is not None or up.g_EO is not None:
        db, dg = triton.outer(dy, rows, xa, v_SC=None if up.g_EO is None else kept.z_SO)
    dz = dy.contiguous()
    if up.g_EO is not None:
        dz = triton.scaled(dz, rows, up.g_EO, None)
    return _Through(dz, dw, db, up.g_EO, dg, da, h.detach().contiguous() if keep_h else None)


def _of_down(
    dout_TH: Tensor, h_SI: Tensor | None, rows: Any, weights_TK: Tensor, down: Side, kept: Kept
) -> tuple[Tensor, Tensor]:
    """dB and dm of the down projection; with h, whose product with W it takes anew."""
    from theodora.kernels.triton import experts as triton

    ha = None if down.b_EOR is None else kept.ha_SR
    v = None if down.g_EO is None else kept.v_SH
    if h_SI is not None:
        v = grouped_product(h_SI, down.weight.mT, rows.ends_E)
    if ha is None and v is None:
        return _b_and_m(None, None, rows, down, None)
    parts = triton.outer(dout_TH, rows, ha, of_tokens=True, weights_TK=weights_TK, v_SC=v)
    if h_SI is None:
        return _b_and_m(*parts, rows, down, down.g_EO)
    # The update's part of dm comes of dB: Σ dout ⊙ (s·ha Bᵀ) = (s·Σ doutᵀ ha) ⊙ B, summed over the rank.
    db, dm = _b_and_m(*parts, rows, down, None, torch.float32)
    assert down.b_EOR is not None
    assert down.g_EO is not None
    assert down.norm_EO is not None
    by_update = (db * down.b_EOR).sum(-1) / down.norm_EO
    dm += by_update.masked_fill(down.norm_EO == 0, 0)
    return (db * down.g_EO[..., None]).to(down.b_EOR.dtype), dm


def _scaled(v_SO: Tensor, rows: Any, side: Side) -> Tensor:
    """g ⊙ v + bias; v itself where there are neither."""
    from theodora.kernels.triton import experts as triton

    return v_SO if side.g_EO is None and side.bias_EO is None else triton.scaled(v_SO, rows, side.g_EO, side.bias_EO)


def _b_and_m(
    db_parts: Tensor | None,
    dg_parts: Tensor | None,
    rows: Any,
    side: Side,
    db_scale: Tensor | None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """dB, in its dtype or another, and dm, float32."""
    from theodora.kernels.triton import experts as triton

    none = side.weight.new_empty
    db = dm = None
    if db_parts is not None and side.b_EOR is not None:
        db = triton.sum_chunks(db_parts, rows, dtype or side.b_EOR.dtype, side.scale, db_scale)
    if dg_parts is not None:
        dm = triton.sum_chunks(dg_parts, rows, torch.float32, norm_EC=side.norm_EO)
    return none(0) if db is None else db, none(0) if dm is None else dm


def _weight_gradient(dw_S: Tensor, rows: Any, dout_TH: Tensor, index_TK: Tensor, down: Side) -> Tensor:
    """⟨output of each choice, dout⟩, (T, K) float32; zero where there is no expert."""
    dw = dw_S[rows.back_S].view(index_TK.shape)
    experts = down.weight.shape[0]
    if down.bias_EO is not None:
        dw = dw + wide_product(dout_TH, down.bias_EO.T.to(dout_TH.dtype)).gather(1, index_TK.clamp(max=experts - 1))
    return dw.masked_fill(index_TK >= experts, 0)


# As operators ---------------------------------------------------------------------------------------------------------


def _spread(gate: Gate) -> tuple[int, bool, float, float, bool, float]:
    kind = ACTIVATIONS.index(gate.activation)
    return kind, gate.in_turns, gate.alpha, gate.limit, gate.limited, gate.offset


def _gathered(kind: int, *rest: Any) -> Gate:
    return Gate(ACTIVATIONS[kind], *rest)


def _run_forward(x: Tensor, index: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    up, down, gate = Side(*rest[:6]), Side(*rest[6:12]), _gathered(*rest[12:])
    return forward(x, index, weights, up, down, gate)


def _fake_forward(x: Tensor, index: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    up, down = Side(*rest[:6]), Side(*rest[6:12])
    count, experts = index.numel(), up.weight.shape[0]

    def numbers(*shape: int) -> Tensor:
        return index.new_empty(shape, dtype=torch.int32)

    def rank(side: Side) -> tuple[int, ...]:
        return (0,) if side.a_ERI is None else (count, side.a_ERI.shape[1])

    tiles, chunks = (-(-count // size) + experts for size in (EXPERT_TILE, EXPERT_CHUNK))
    return (
        x.new_empty(x.shape[0], down.weight.shape[1]),
        x.new_empty(count, up.weight.shape[1]),
        x.new_empty(rank(up)),
        x.new_empty(rank(down)),
        x.new_empty((count, down.weight.shape[1]) if _keeps_v(down) else (0,)),
        numbers(count),
        numbers(count),
        numbers(experts),
        numbers(tiles, 3),
        numbers(chunks, 3),
        numbers(experts + 1),
    )


def _run_backward(dout: Tensor, x: Tensor, index: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    up, down, kept = Side(*rest[:7]), Side(*rest[7:14]), Kept(*rest[14:24])
    return backward(dout, x, index, weights, up, down, kept, _gathered(*rest[24:-1]), rest[-1])


def _fake_backward(dout: Tensor, x: Tensor, index: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    def like(t: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        return x.new_empty(0) if t is None else torch.empty_like(t, dtype=dtype)

    found = [torch.empty_like(x) if rest[-1] else x.new_empty(0), torch.empty_like(weights)]
    for side in (Side(*rest[:7]), Side(*rest[7:14])):
        found += [like(side.a_ERI), like(side.b_EOR), like(side.g_EO, torch.float32)]
    return tuple(found)


_SIDE = "Tensor w{0}, Tensor? bias{0}, Tensor? a{0}, Tensor? b{0}, float scale{0}, Tensor? g{0}"
_GATE = "int act, bool in_turns, float alpha, float limit, bool limited, float offset"
_KEPT = ", ".join(f"Tensor kept{n}" for n in range(10))
_forward_op = operator(
    f"experts(Tensor x, Tensor index, Tensor weights, {_SIDE.format(1)}, {_SIDE.format(2)}, {_GATE}) -> ("
    + ", ".join(["Tensor"] * 11)
    + ")",
    _run_forward,
    _fake_forward,
)
_backward_op = operator(
    f"experts_backward(Tensor dout, Tensor x, Tensor index, Tensor weights, {_SIDE.format(1)}, Tensor? norm1, "
    f"{_SIDE.format(2)}, Tensor? norm2, {_KEPT}, {_GATE}, bool needs_x) -> (" + ", ".join(["Tensor"] * 8) + ")",
    _run_backward,
    _fake_backward,
)
