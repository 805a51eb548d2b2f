"""RMSNorm with a frozen weight, forward and backward in one pass over the data each.

    r = 1/√(mean(x²) + eps)      h = x·r      y = h ⊙ (offset + w)                    (arXiv 1910.07467)
    dh = dy ⊙ (offset + w)       dx = r·(dh − h·mean(dh ⊙ h))

Models differ in two points. `offset` is 1 where the weight is kept as its distance from one (Gemma). `cast` says where
half precision begins: "llama" rounds h before it meets the weight, "gemma" rounds y alone.

Only x and r are kept for the backward pass, or the way to x and r (`residual.py`). Layers that read y find them by a
note on it, see `fast_forward`.
Legend: T tokens (rows), I features.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from theodora.functional import wide_dtype
from theodora.kernels.notes import Norm, note_norm
from theodora.kernels.operators import operator, runs_triton
from theodora.kernels.residual import Remade, read_by_norm, remade

Cast = Literal["llama", "gemma"]

WIDEST = 32768
"""Features of a row up to which it fits the registers of one program; wider ones take the reference."""


def rms_norm(
    x_TI: Tensor,
    weight_I: Tensor,
    eps: float,
    offset: float = 0.0,
    cast: Cast = "llama",
    remade: Remade | None = None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of each row, differentiable in x alone.

    Args:
        x_TI: (…, I).
        weight_I: the frozen weight; it gets no gradient.
        eps: what is added to the mean square.
        offset: what is added to the weight.
        cast: where half precision begins.
        remade: the way to x, which is not kept then.

    Returns:
        y (…, I), of x's dtype (with "llama" of the wider one of x's and the weight's), and r (T,), float32 or float64,
        without gradient, T being all leading dimensions.
    """
    y, rstd = RmsNormFunction.apply(x_TI, weight_I, eps, offset, cast, remade)  # pyright: ignore[reportGeneralTypeIssues]
    return y, rstd


def rms_norm_reference(
    x_TI: Tensor, weight_I: Tensor, eps: float, offset: float = 0.0, cast: Cast = "llama"
) -> tuple[Tensor, Tensor]:
    """`rms_norm` in plain torch."""
    wide_x = x_TI.to(wide_dtype(x_TI.dtype))
    rstd = torch.rsqrt(wide_x.square().mean(-1, keepdim=True) + eps)
    h = wide_x * rstd
    if cast == "llama":
        y = (offset + weight_I) * h.to(x_TI.dtype)
    else:
        y = ((offset + weight_I.to(h.dtype)) * h).to(x_TI.dtype)
    return y, rstd.flatten()


def rms_norm_backward_reference(
    dy_TI: Tensor, x_TI: Tensor, rstd_T: Tensor, weight_I: Tensor, offset: float = 0.0
) -> Tensor:
    """The gradient of x in plain torch, in x's dtype."""
    wide = rstd_T.dtype
    h = x_TI.to(wide) * rstd_T.view(*x_TI.shape[:-1], 1)
    dh = dy_TI.to(wide) * (offset + weight_I.to(wide))
    dx = (dh - h * (dh * h).mean(-1, keepdim=True)) * rstd_T.view(*x_TI.shape[:-1], 1)
    return dx.to(x_TI.dtype)


class RmsNormFunction(torch.autograd.Function):
    """(x, weight, eps, offset, cast, the way to x) -> (y, r)."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, x_TI: Tensor, weight_I: Tensor, eps: float, offset: float, cast: Cast, remade: Remade | None
    ) -> tuple[Tensor, Tensor]:
        x_TI = x_TI.contiguous()
        y, rstd = _rms_norm(x_TI, weight_I, eps, offset, cast)
        ctx.save_for_backward(x_TI if remade is None else None, rstd, weight_I)
        ctx.offset, ctx.remade = offset, remade
        ctx.mark_non_differentiable(rstd)
        return y, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TI: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # noqa: D102  # pyright: ignore[reportIncompatibleMethodOverride]
        x, rstd, weight = ctx.saved_tensors
        x = x if ctx.remade is None else ctx.remade.take().view(dy_TI.shape)
        dx = _rms_norm_backward(dy_TI.contiguous(), x, rstd, weight, ctx.offset)
        return dx, None, None, None, None, None


def _forward(x_TI: Tensor, weight_I: Tensor, eps: float, offset: float, cast: Cast) -> tuple[Tensor, Tensor]:
    if not _takes(x_TI, weight_I):
        return rms_norm_reference(x_TI, weight_I, eps, offset, cast)
    from theodora.kernels.triton import rms_norm as triton

    y, rstd = _fake_forward(x_TI, weight_I, eps, offset, cast)
    triton.forward(x_TI, weight_I.contiguous(), y, rstd, eps, offset, cast == "llama")
    return y, rstd


def _backward(dy_TI: Tensor, x_TI: Tensor, rstd_T: Tensor, weight_I: Tensor, offset: float) -> Tensor:
    if not _takes(x_TI, weight_I):
        return rms_norm_backward_reference(dy_TI, x_TI, rstd_T, weight_I, offset)
    from theodora.kernels.triton import rms_norm as triton

    return triton.backward(dy_TI, x_TI, rstd_T, weight_I.contiguous(), offset)


def _takes(x: Tensor, weight: Tensor) -> bool:
    fits = weight.dtype != torch.float64 and x.numel() > 0 and x.shape[-1] <= WIDEST
    return fits and runs_triton(x)


def _fake_forward(x_TI: Tensor, weight_I: Tensor, eps: float, offset: float, cast: Cast) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x_TI.dtype, weight_I.dtype) if cast == "llama" else x_TI.dtype
    rows = x_TI.shape[:-1].numel()
    return torch.empty_like(x_TI, dtype=dtype), x_TI.new_empty(rows, dtype=wide_dtype(x_TI.dtype))


_rms_norm = operator(
    "rms_norm(Tensor x, Tensor weight, float eps, float offset, str cast) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
_rms_norm_backward = operator(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor rstd, Tensor weight, float offset) -> Tensor",
    _backward,
    lambda dy, x, rstd, weight, offset: torch.empty_like(x),
)


# Other people's RMSNorm modules.


@dataclass(frozen=True)
class NormStyle:
    """How a module computes RMSNorm."""

    eps: float
    offset: float
    cast: Cast


def is_rms_norm(module: nn.Module) -> NormStyle | None:
    """How the module computes RMSNorm, or None if it computes something else.

    Found out by running the module's own forward on random numbers, with a random weight, so that nothing depends on
    the names of classes. The module, its weight and the global random state stay as they are.
    """
    tensors, eps = dict(module.named_parameters()), _eps(module)
    weight = tensors.pop("weight", None)
    others = tensors or [*module.buffers(), *module.children()]
    if others or weight is None or weight.dim() != 1 or eps is None or "forward" in module.__dict__:
        return None
    parameters = inspect.signature(type(module).forward).parameters.values()
    if len(parameters) != 2 or any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.shape[0], generator=generator, device="cpu")
    x *= torch.tensor([1.0, 30.0, eps**0.5], device="cpu")[:, None]  # the last row shows where eps goes in
    w = torch.randn(weight.shape[0], generator=generator, device="cpu")
    styles = [NormStyle(eps, offset, cast) for offset in (0.0, 1.0) for cast in ("llama", "gemma")]
    exact = [_distance(module, style, x, w) for style in styles]
    fits = [style for style, distance in zip(styles, exact, strict=True) if distance < 1e-5]
    halves = {style: _distance(module, style, x.bfloat16(), w.bfloat16()) for style in fits}
    best = min(halves, key=lambda style: halves[style], default=None)
    return best if best is not None and halves[best] < 1e-3 else None


def _eps(module: nn.Module) -> float | None:
    values = [v for name, v in vars(module).items() if "eps" in name.lower() and isinstance(v, float) and 0 < v < 0.1]
    return values[0] if len(values) == 1 else None


def _distance(module: nn.Module, style: NormStyle, x: Tensor, weight: Tensor) -> float:
    """The largest relative difference of a row of the module's output from that of the style; infinite if none."""
    # The copy shares nothing that is written to: it has a dictionary of parameters of its own, and no hooks run.
    copied = copy.copy(module)
    copied.__dict__["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False)}
    with torch.no_grad():
        try:
            y: Any = type(module).forward(copied, x)
        except Exception:  # whatever a stranger's forward raises: it is no RMSNorm
            return float("inf")
        expected, _ = rms_norm_reference(x, weight, style.eps, style.offset, style.cast)
        if not isinstance(y, Tensor) or y.shape != expected.shape or y.dtype != expected.dtype:
            return float("inf")
        difference = (y.double() - expected.double()).norm(dim=1) / expected.double().norm(dim=1)
        return float(difference.nan_to_num(float("inf")).max())


def fast_forward(module: nn.Module, style: NormStyle, x: Tensor, original: Callable[[Tensor], Tensor]) -> Tensor:
    """What the forward of a module of this style returns, by `rms_norm`; `original(x)` where that does not fit.

    Where gradients are recorded a note on the result says how it was made (`notes.Norm`), so that a layer that reads y
    need not keep it: yᵀ·d = ((x ⊙ r)ᵀ·d) ⊙ (offset + weight).
    """
    weight: Any = module.weight
    if weight.requires_grad or type(x) is not Tensor or type(weight) is not nn.Parameter:
        return original(x)
    x = x.contiguous()
    noted = torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()
    way = remade(x) if noted else None
    y, rstd = rms_norm(x, weight, style.eps, style.offset, style.cast, way)
    if noted:
        note_norm(y, Norm(x.detach().view(-1, x.shape[-1]) if way is None else way, rstd, weight, style.offset))
        read_by_norm(y.grad_fn)
    return y
