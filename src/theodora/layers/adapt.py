"""Which modules can be adapted, and giving them their adapter layer; `AdapterLayer.end` takes it away."""

from __future__ import annotations

from torch import nn

from theodora.layers.base import AdapterLayer
from theodora.layers.base_weights import Unfit, base_weight_of
from theodora.layers.conv import ConvAdapterLayer
from theodora.layers.embedding import EmbeddingAdapterLayer
from theodora.layers.experts import ExpertParameter, why_experts_unfit
from theodora.layers.kinds import is_conv1d, is_convolution, is_embedding, is_linear
from theodora.layers.linear import Conv1DAdapterLayer, LinearAdapterLayer, PackedAdapterLayer
from theodora.layers.packed import owns_forward, packed_tensor, refused, why_replaced
from theodora.layers.swap import swap_class


def adapt(module: nn.Module) -> AdapterLayer:
    """Turn `module` into an adapter layer in place; does nothing to one that is.

    The place of a parameter of fused experts (`named_places`) is hung on its module.

    Raises:
        TypeError: the module cannot be adapted (see `cannot_adapt`).
    """
    if isinstance(module, ExpertParameter):
        if (reason := why_experts_unfit(module)) is not None:
            raise TypeError(reason)
        module.attach()
    if isinstance(module, AdapterLayer):
        return module
    mixin = _mixin(module)
    if mixin is None:
        raise TypeError(cannot_adapt(module))
    swap_class(module, mixin)
    assert isinstance(module, AdapterLayer)
    module.begin()
    return module


def cannot_adapt(module: nn.Module) -> str | None:
    """Why `module` cannot take an adapter, or None if it can."""
    if isinstance(module, ExpertParameter):
        return why_experts_unfit(module)
    kind, mixin = type(module).__name__, _mixin(module)
    if isinstance(module, AdapterLayer):
        return None
    if (reason := refused(module)) is not None:
        return reason
    if mixin is None and isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return f"{kind} has a forward pass of its own, which an adapter would bypass"
    if mixin is not None and "forward" in module.__dict__ and not owns_forward(module):
        if (reason := why_replaced(module)) is not None:
            return reason
        return f"this {kind}'s forward method was replaced (by an offloading hook, say), and would bypass the adapter"
    weight = base_weight_of(module)
    return weight.reason + _instead(module) if isinstance(weight, Unfit) else None


def _instead(module: nn.Module) -> str:
    """What to do with a module that PEFT adapts and that nothing here does."""
    if isinstance(module, nn.MultiheadAttention):
        return ": it computes with its weights itself, past any layer. Train it in full (modules_to_save)"
    if isinstance(module, nn.modules.conv._ConvTransposeNd):  # pyright: ignore[reportPrivateUsage]
        return ": transposed convolutions are not supported. Train it in full (modules_to_save)"
    return ""


def _mixin(module: nn.Module) -> type[AdapterLayer] | None:
    """The kind of adapter layer that fits the module, known by how the module runs rather than by its name."""
    if is_linear(module):
        return LinearAdapterLayer if packed_tensor(module) is None else PackedAdapterLayer
    if is_conv1d(module):
        return Conv1DAdapterLayer
    if is_embedding(module):
        return EmbeddingAdapterLayer
    if is_convolution(module):
        return ConvAdapterLayer
    return None
