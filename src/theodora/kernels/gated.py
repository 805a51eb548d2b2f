"""The middle of a gated MLP whose gate and up projections carry adapters: act(gate) ⊙ up, forward and backward.

    gate = g₁ ⊙ (z₁ + s₁·xa₁ B₁ᵀ) + bias₁        up likewise with 2        h = act(gate) ⊙ up

z₁ and z₂ are the base products, so what `compose` would write and the activation read again is never written. The
backward starts from dh without the low-rank part of the down projection, `low` A₃ with low = s·dz₃ B₃, and gives that
projection's dA₃ = lowᵀ h too, so that h is neither kept nor written again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from theodora.functional import wide_dtype
from theodora.kernels.compose import compose_backward_reference, compose_reference
from theodora.kernels.operators import operator, runs_triton
from theodora.kernels.parts import Update

ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")


def activate(x: Tensor, activation: str) -> Tensor:
    """One of `ACTIVATIONS`."""
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}[activation](x)


def _activation_backward(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    aten = torch.ops.aten
    if activation == "silu":
        return aten.silu_backward(dy, x)
    if activation == "relu":
        return aten.threshold_backward(dy, x, 0)
    return aten.gelu_backward(dy, x, approximate="tanh" if activation == "gelu_tanh" else "none")


def gated_reference(z1_TO: Tensor, z2_TO: Tensor, gate: Update, up: Update, activation: str) -> Tensor:
    """act(gate) ⊙ up, (T, O), in the dtype of z."""
    return activate(_composed(z1_TO, gate), activation) * _composed(z2_TO, up)


def gated_backward_reference(
    dh_TO: Tensor,
    low_TR: Tensor | None,
    a_RO: Tensor | None,
    z1_TO: Tensor,
    z2_TO: Tensor,
    gate: Update,
    up: Update,
    activation: str,
    dz1_TO: Tensor,
    dz2_TO: Tensor,
    keep_h: bool,
) -> tuple[Tensor, ...]:
    """Writes dz₁ and dz₂ (which may be z₁ and z₂ themselves) and gives (h, dB₁, dm₁, dB₂, dm₂, dA₃).

    What does not exist is empty; h only exists with `keep_h`.
    """
    if low_TR is not None and a_RO is not None:
        dh_TO = torch.addmm(dh_TO, low_TR, a_RO.to(dh_TO.dtype))
    y1, y2 = _composed(z1_TO, gate), _composed(z2_TO, up)
    activated = activate(y1, activation)
    h = activated * y2
    # Written out, because an operator runs below autograd.
    dy1, dy2 = _activation_backward(dh_TO * y2, y1, activation), dh_TO * activated
    results: list[Tensor] = [h if keep_h else dh_TO.new_empty(0)]
    for dy, z, update, dz in ((dy1, z1_TO, gate, dz1_TO), (dy2, z2_TO, up, dz2_TO)):
        found, _, *rest = compose_backward_reference(
            dy, z, update.xa_TR, update.b_OR, update.scale, update.magnitude_O, update.norm_O
        )
        dz.copy_(dy if update.norm_O is None else found)
        results += rest
    results.append(dh_TO.new_empty(0) if low_TR is None else (low_TR.T @ h).to(wide_dtype(dh_TO.dtype)))
    return tuple(results)


def _composed(z: Tensor, update: Update) -> Tensor:
    return compose_reference(
        z, update.xa_TR, update.b_OR, update.scale, update.magnitude_O, update.norm_O, update.bias_O
    )


def gated(z1: Tensor, z2: Tensor, gate: Update, up: Update, activation: str) -> Tensor:
    """`gated_reference`, by the fastest way there is."""
    return _gated_op(z1, z2, *_spread(gate), *_spread(up), activation)


def gated_backward(
    dh: Tensor,
    low: Tensor | None,
    a: Tensor | None,
    z1: Tensor,
    z2: Tensor,
    gate: Update,
    up: Update,
    activation: str,
    dz1: Tensor,
    dz2: Tensor,
    keep_h: bool,
) -> tuple[Tensor, ...]:
    """`gated_backward_reference`, by the fastest way there is."""
    return _backward_op(dh, low, a, z1, z2, *_spread(gate), *_spread(up), activation, dz1, dz2, keep_h)


def _spread(update: Update) -> tuple[Tensor | None, Tensor | None, float, Tensor | None, Tensor | None, Tensor | None]:
    return update.xa_TR, update.b_OR, update.scale, update.magnitude_O, update.norm_O, update.bias_O


def _run_gated(z1: Tensor, z2: Tensor, *rest: object) -> Tensor:
    *updates, activation = rest
    run = gated_reference
    if runs_triton(z1):
        from theodora.kernels.triton.gated import gated as run
    return run(z1, z2, Update(*updates[:6]), Update(*updates[6:]), activation)  # pyright: ignore[reportArgumentType]


def _run_backward(dh: Tensor, low: Tensor | None, a: Tensor | None, z1: Tensor, z2: Tensor, *rest: object) -> object:
    *updates, activation, dz1, dz2, keep_h = rest
    run = gated_backward_reference
    if runs_triton(dh):
        from theodora.kernels.triton.gated import gated_backward as run
    gate, up = Update(*updates[:6]), Update(*updates[6:])  # pyright: ignore[reportArgumentType]
    return run(dh, low, a, z1, z2, gate, up, activation, dz1, dz2, keep_h)  # pyright: ignore[reportArgumentType]


def _fake_backward(dh: Tensor, low: Tensor | None, a: Tensor | None, z1: Tensor, z2: Tensor, *rest: object) -> object:
    keep_h, wide = rest[-1], wide_dtype(dh.dtype)
    results = [dh.new_empty(dh.shape if keep_h else 0)]
    for t in (rest[1], rest[4], rest[7], rest[10]):  # B and norm of each
        results.append(dh.new_empty(t.shape if isinstance(t, Tensor) else 0, dtype=wide))
    results.append(dh.new_empty(0 if low is None else (low.shape[1], dh.shape[1]), dtype=wide))
    return tuple(results)


_UPDATE = "Tensor? xa{0}, Tensor? b{0}, float scale{0}, Tensor? magnitude{0}, Tensor? norm{0}, Tensor? bias{0}"
_UPDATES = f"{_UPDATE.format(1)}, {_UPDATE.format(2)}"
_gated_op = operator(
    f"gated(Tensor z1, Tensor z2, {_UPDATES}, str activation) -> Tensor",
    _run_gated,
    lambda z1, *rest: z1.new_empty(z1.shape),
)
_backward_op = operator(
    f"gated_backward(Tensor dh, Tensor? low, Tensor? a, Tensor z1, Tensor z2, {_UPDATES}, str activation, "
    "Tensor(a!) dz1, Tensor(b!) dz2, bool keep_h)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
