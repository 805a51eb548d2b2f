"""PEFT's linear LoRA and DoRA layers on our kernels: their parameters, their formulas, another forward pass.

`FastPeftLinear` is a class that PEFT's own layers are given in place (see `peft_models.py`), and the layers that PEFT
puts around bitsandbytes' get one made of `FastPeft` and theirs. These add no parameter, buffer or submodule, and go by
the name of PEFT's class, which people and libraries read. Where their conditions do not hold, in this very pass, PEFT's
forward runs instead.

Shapes: T tokens (any leading dimensions), I in features, O out features, R rank.
"""

from __future__ import annotations

import copyreg
import logging
import sys
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from theodora import kernels
from theodora.autocast import autocast_dtype, without_autocast
from theodora.functional import wide_dtype
from theodora.kernels import BaseWeight, Parts
from theodora.kernels.recompute import once_in_a_block
from theodora.layers.adapt import cannot_adapt
from theodora.layers.base import norm_of
from theodora.layers.base_weights import FLOATS, weight_in
from theodora.layers.identity import base_output, changes_nothing, with_value_of
from theodora.layers.kinds import is_conv1d
from theodora.layers.libraries import library_weight
from theodora.layers.linear import GROUP, in_dtype
from theodora.layers.low_rank import drops
from theodora.layers.norm_cache import NormCache, one_token_each

__all__ = ["BaseTunerLayer", "FastPeftLinear", "accelerate_layer", "restore_layer"]

_log = logging.getLogger(__name__)
_PIECE = 1 << 22  # elements of the weight that are widened together, in whole rows


class Fallback(NamedTuple):
    """Why a forward pass is PEFT's own."""

    reason: str
    idle: bool = False
    """Whether PEFT's forward is nothing but the base layer: as fast as it gets, and no reason to say anything."""


_DISABLED = Fallback("its adapters are disabled", idle=True)
_MERGED = Fallback("an adapter is merged", idle=True)
_INACTIVE = Fallback("no adapter is active on it", idle=True)


class FastPeft(nn.Module):
    """y = x Wᵀ + bias + s·(x Aᵀ) Bᵀ, or DoRA's, from the tensors PEFT keeps in `base_layer`, `lora_A`, `lora_B`, ..."""

    base_layer: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_magnitude_vector: Any

    scaling: Any
    lora_variant: Any
    fan_in_fan_out: bool
    merged_adapters: list[str]
    _disable_adapters: bool
    _theodora_norms: NormCache  # of ‖W‖² alone

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The adapted product, (T, I) to (T, O), of the dtype that PEFT's forward gives."""
        why = Fallback("arguments beside its input (`adapter_names`, say)") if args or kwargs else self.fallback()
        dtype = autocast_dtype(x)
        if why is None and dtype is None and not self._weight().takes(x.dtype):
            why = Fallback("an input of another dtype than its weight")
        if why is None and dtype not in (None, x.dtype) and self._weight().stored == "library":
            why = Fallback("an input of another dtype than autocast's on a quantised weight")
        if why is not None:
            if not why.idle and not torch.compiler.is_compiling():
                _say_once(why.reason)
            return super().forward(x, *args, **kwargs)
        group = self.__dict__.get(GROUP)
        if group is not None and (y := group.output(self, x)) is not None:
            return y
        if dtype is None:
            return self._adapted(x)
        with without_autocast(x.device):
            return self._adapted(x.to(dtype))

    def fallback(self) -> Fallback | None:
        """Why this forward pass is PEFT's own, or None if it is ours."""
        if self._disable_adapters:
            return _DISABLED
        if self.merged_adapters:
            return _MERGED
        names = self._active_here()
        if len(names) != 1:
            return Fallback("several adapters are active at once") if names else _INACTIVE
        reason = self._slow_adapter(names[0]) or self._slow_base()
        return None if reason is None else Fallback(reason)

    def parts(self) -> Parts | None:
        """What the layer computes in this pass, for those who stand in for it; None where its own forward must run."""
        if _touched(self) or self._trained_bias():
            return None
        why = self.fallback()
        if why is not None and why.idle:
            unmerges = self._disable_adapters and self.merged_adapters  # PEFT's forward changes the weight first
            return None if unmerges or self._slow_base() else Parts(self._weight(), self.base_layer.bias)
        if why is not None:
            return None
        (name,) = self._active_here()
        drops = self._drops(name)
        return None if drops and name in self.lora_variant else self._parts(name, drops)  # see `_product`

    def _parts(self, name: str, drops: bool, one_token: bool = False) -> Parts:
        weight, bias, scale = self._weight(), self.base_layer.bias, self.scaling[name]
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        if name not in self.lora_variant:
            return Parts(weight, bias, a, b, scale, drops=drops)
        norm = self._norm(name, one_token)
        return Parts(weight, bias, a, b, scale, self.lora_magnitude_vector[name].weight, norm, drops)

    def _adapted(self, x: Tensor) -> Tensor:
        (name,) = self._active_here()
        dropped = self.lora_dropout[name](x) if self._drops(name) else None
        parts = in_dtype(self._parts(name, False, one_token_each(x)), x.dtype)
        drops_base = dropped is not None and name in self.lora_variant
        fresh = not self._trained_bias() and changes_nothing(parts, rounds=drops_base)
        y = self._product(x, dropped, parts, drops_base)
        return with_value_of(base_output(x, parts), y) if fresh else y

    def _product(self, x: Tensor, dropped: Tensor | None, parts: Parts, drops_base: bool) -> Tensor:
        bias = parts.bias_O
        if self._trained_bias():
            parts = replace(parts, bias_O=None)
        if dropped is not None and drops_base:
            # PEFT's DoRA drops the base weight's input, too, where it changes the product:
            #     y = x Wᵀ + (g - 1) ⊙ (x' Wᵀ) + g ⊙ s·(x' Aᵀ) Bᵀ + bias = (x - x') Wᵀ + dora(x') + bias
            y, rest = kernels.adapted_linears(dropped, [parts])[0], x - dropped
            w_OI = parts.weight.plain()
            base = [Parts(parts.weight, None)]
            y = y + (kernels.adapted_linears(rest, base)[0] if w_OI is None else F.linear(rest, w_OI))
        else:
            y = kernels.adapted_linears(x, [parts], dropped)[0]
        return y if bias is None or not self._trained_bias() else y + bias

    def _norm(self, name: str, one_token: bool) -> Tensor:
        """‖W + s·B·A‖ of each output row, (O,), float32 or float64: ours, or PEFT's own while it caches norms."""
        a_RI, b_OR, scale = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        dora = self.lora_magnitude_vector[name]
        if peft_dora.ENABLE_DORA_CACHING and not dora.training:
            return self._cached_norm(name).to(wide_dtype(self._weight().dtype))
        if dora._dora_cache:
            dora._cache_clear()  # as PEFT does in a pass that does not cache
        weight, w_norm_sq = self._weight(), self._weight_norm_squared(a_RI.dtype, one_token)
        return once_in_a_block(("norm", id(self)), lambda: norm_of(weight, a_RI, b_OR, scale, w_norm_sq))

    def _cached_norm(self, name: str) -> Tensor:
        """By PEFT's methods, which fill its cache and read it (`peft.helpers.DoraCaching`)."""
        a, b, dora = self.lora_A[name], self.lora_B[name], self.lora_magnitude_vector[name]
        with torch.no_grad():
            update = dora.get_lora_weight(lora_A=a, lora_B=b, adapter_name=name)
            base = self._weight()
            weight = (
                base.dense(a.weight.dtype) if base.stored == "library" else self.base_layer.weight.to(a.weight.dtype)
            )
            return dora.get_weight_norm(weight, update, scaling=self.scaling[name], adapter_name=name).detach()

    def _active_here(self) -> list[str]:
        active: Any = self.active_adapters
        return [name for name in active if name in self.lora_A]

    def _slow_adapter(self, name: str) -> str | None:
        variant, a, b = self.lora_variant.get(name), self.lora_A[name], self.lora_B[name]
        inner = [a, b]
        if variant is not None:
            if type(variant) is not DoraLinearVariant:
                return f"a LoRA variant without kernels ({type(variant).__name__.removesuffix('LinearVariant')})"
            inner.append(self.lora_magnitude_vector[name])
        if {type(a), type(b)} != {nn.Linear}:
            return f"lora_A or lora_B is wrapped ({type(a).__name__}, {type(b).__name__})"
        if b.bias is not None or a.bias is not None:
            return "lora_bias: its B has a bias"
        for module in inner:
            if _touched(module):
                return "hooks on its lora_A, lora_B or lora_magnitude_vector"
            if not _plain(module.weight):
                return "its adapter's parameters are sharded"
        if not isinstance(self.scaling[name], float | int):
            return "its scaling is a tensor (prepared for hot-swapping)"
        if not isinstance(self.lora_dropout[name], nn.Dropout | nn.Identity):
            return f"its dropout is a {type(self.lora_dropout[name]).__name__}"
        return None

    def _slow_base(self) -> str | None:
        base = self.base_layer
        weight = base.weight
        if _touched(base):
            return "hooks on its base layer (offloading, say)"
        if library_weight(base, weight) is None and (not _plain(weight) or weight.dtype not in FLOATS):
            return f"its base weight is sharded or quantised ({type(weight).__name__})"
        if hasattr(weight, "ds_id"):
            return "DeepSpeed ZeRO-3 gathers its weights only when PEFT's own forward runs"
        if weight.requires_grad:
            return "its base weight is trained, too"
        return None

    def _drops(self, name: str) -> bool:
        """Whether dropout changes the adapter's input in this pass."""
        return drops(self.lora_dropout[name])

    def _weight(self) -> BaseWeight:
        base = self.base_layer
        return weight_in(base, base.weight, getattr(self, "is_target_conv_1d_layer", False))

    def _trained_bias(self) -> bool:
        bias = self.base_layer.bias
        return bias is not None and bias.requires_grad

    def _weight_norm_squared(self, dtype: torch.dtype, one_token: bool) -> Tensor:
        """‖W‖² of each output row, (O,), as PEFT rounds ‖W‖ beside adapters of `dtype`: once for each frozen weight.

        A fresh magnitude is that ‖W‖, and its g is 1.

        Where no gradients flow, a pass over more than `one_token` of each sequence looks at values, as our own layers'
        do (see `theodora.layers.norm_cache`); a training step does not.
        """
        weight, look = self._weight(), not (one_token or torch.is_grad_enabled())
        return self._theodora_norms.weight_norm_squared(
            weight, lambda: _row_norm_squared(weight, dtype), rounding=dtype, look=look
        )

    # PEFT writes to the base weight through `.data`, which leaves no version behind: forget at each of its doors.

    def forget(self) -> None:
        """Forget what is known of the base weight."""
        self._theodora_norms.invalidate(weight=True)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        super().merge(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        self.forget()

    def unmerge(self) -> None:
        super().unmerge()  # pyright: ignore[reportAttributeAccessIssue]
        self.forget()

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        # PiSSA and its like change the base weight
        super().update_layer(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        self.forget()

    def train(self, mode: bool = True):
        if mode != self.training:
            self.forget()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any):
        self.forget()
        return super()._apply(*args, **kwargs)

    def __reduce__(self) -> Any:
        # What goes by another class's name is not found under it: pickle and deepcopy make it here.
        made = (_new, (own_class(self),)) if is_ours(self) else (copyreg.__newobj__, (type(self),))  # pyright: ignore[reportAttributeAccessIssue]
        return *made, self.__getstate__()


class FastPeftLinear(FastPeft, Linear):
    """PEFT's layer around `nn.Linear` and `Conv1D`."""


def is_ours(layer: FastPeft) -> bool:
    """Whether the layer's class is the very one that it was given: no other library has put one on top."""
    return type(layer) is _fast(own_class(layer))


def own_class(layer: FastPeft) -> type[nn.Module]:
    """PEFT's class of the layer."""
    mro = type(layer).__mro__
    return mro[mro.index(FastPeft) + 1]


@cache
def _fast(own: type[nn.Module]) -> type[FastPeft]:
    made = FastPeftLinear if own is Linear else type(own.__name__, (FastPeft, own), {})
    # `repr`, `get_layer_status` and whoever else tells layers by their class find what they would without us.
    for attribute in ("__name__", "__qualname__", "__module__"):
        setattr(made, attribute, getattr(own, attribute))
    return made


def _new(own: type[nn.Module]) -> FastPeft:
    made = _fast(own)
    return made.__new__(made)


def _known(layer: nn.Module) -> bool:
    """Whether the layer is one of PEFT's that our forward pass can stand in for."""
    around_bnb = sys.modules.get("peft.tuners.lora.bnb")
    return type(layer) in (Linear, *(getattr(around_bnb, name, None) for name in ("Linear4bit", "Linear8bitLt")))


_fast(Linear)


def accelerate_layer(layer: nn.Module) -> str | None:
    """Give `layer` our forward pass if it can ever use it; says why not, or why not at present, else None."""
    if _known(layer):
        why = _cannot(layer)
        if why is not None:
            return why
        layer.__class__ = _fast(type(layer))
        layer._theodora_norms = NormCache()  # pyright: ignore[reportArgumentType]
    if not isinstance(layer, FastPeft):
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}".removeprefix("peft.tuners.")
        return f"{kind} is not PEFT's plain LoRA layer (lora.layer.Linear)"
    why = layer.fallback()
    return None if why is None else why.reason


def restore_layer(layer: nn.Module) -> None:
    """Undo `accelerate_layer`; does nothing to other modules."""
    if isinstance(layer, FastPeft):
        del layer._theodora_norms  # pyright: ignore[reportPrivateUsage]
        layer.__class__ = own_class(layer)  # pyright: ignore[reportAttributeAccessIssue]


def _cannot(layer: Any) -> str | None:
    if "forward" in layer.__dict__:
        return "its forward method was replaced"
    home = type(layer).forward.__module__
    if home != type(layer).__module__:
        return f"{home} has replaced the forward of PEFT's LoRA layers"
    base: nn.Module = layer.base_layer
    why = cannot_adapt(base)
    if why is not None and hasattr(base.weight, "device_mesh"):
        return "its base weight is sharded already: call accelerate_peft before the model is sharded"
    if why is not None:
        return f"base layer: {why}"
    if is_conv1d(base) != layer.fan_in_fan_out or (
        getattr(layer, "is_target_conv_1d_layer", False) != layer.fan_in_fan_out
    ):
        return f"fan_in_fan_out={layer.fan_in_fan_out} does not fit its {type(base).__name__}"
    return None


def _touched(module: Any) -> bool:
    """Whether calling the module does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _row_norm_squared(weight: BaseWeight, dtype: torch.dtype) -> Tensor:
    """‖W‖² of each row, (O,), where ‖W‖ is what PEFT computes: in `dtype`."""
    outputs, inputs = weight.shape
    w_OI, some = weight.plain(), max(1, _PIECE // max(1, inputs))
    slices = [slice(at, at + some) for at in range(0, outputs, some)]
    pieces = (weight.rows(at) if w_OI is None else w_OI[at] for at in slices)
    norm = torch.cat([torch.linalg.norm(piece.to(dtype), dim=1) for piece in pieces])
    return norm.to(wide_dtype(weight.dtype)).square()


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in (nn.Parameter, Tensor)


@cache
def _say_once(why: str) -> None:
    _log.warning("A layer accelerated by theodora.accelerate_peft runs PEFT's own forward: %s.", why)
