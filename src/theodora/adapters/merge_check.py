"""A merge checks itself: the merged layer and the unmerged one do the same to random inputs.

The unmerged output comes from the layer's own forward pass, by whatever kernels it runs, through the factored norm; the
merged one from the dense weight. Rounding is all that may differ. A magnitude left out, a scale applied twice or a
kernel gone wrong makes a difference far beyond it.

Every output feature (of each expert; of an embedding, every token) is compared by itself, over T random inputs. The
norm of its difference may be 8 u times the larger of two norms: that of the merged output, and g·‖W‖, the base's share
of it. Here u is half the spacing of the weight's dtype at 1, and rounding makes one to two u.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from theodora import kernels
from theodora.errors import CheckpointError, bullet_list
from theodora.functional import dora_linear, dora_norm, dora_scale, lora_linear
from theodora.kernels.sharded_weight import whole_here
from theodora.layers import AdapterLayer
from theodora.layers.conv import ConvAdapterLayer
from theodora.layers.linear import GROUP

_TOKENS = 16  # T
_UNITS = 8.0  # of u, see above


class Unmerged:
    """What an unmerged layer makes of random inputs: the merged layer is held against it."""

    def __init__(self, layer: AdapterLayer) -> None:
        """Run the layer, whose adapter is active, as it is."""
        adapter = layer.active
        assert adapter is not None
        self._dtype = layer.base_weight.dtype
        self._embedding = isinstance(layer, nn.Embedding)
        self._x = _inputs_of(layer, self._dtype)
        with torch.no_grad():
            self._adapted = _run(layer, self._x)
            scale = 1.0 if adapter.magnitude is None else dora_scale(adapter.magnitude, layer.norm(adapter))
            if self._embedding:
                self._base = (_base_rows(layer, self._x) * scale).norm(dim=-1)
            else:
                self._base = layer.weight_norm_squared().sqrt() * scale * self._adapted.shape[-2] ** 0.5

    def excess(self, layer: AdapterLayer) -> Tensor:
        """The merged layer's largest difference as a share of what rounding allows, a number on the device."""
        with torch.no_grad():
            merged = _run(layer, self._x)
        return _excess(self._adapted, merged, self._base, self._dtype, dim=-1 if self._embedding else -2)


def check_excess(excess: dict[str, Tensor]) -> None:
    """Raise a CheckpointError with every layer that does something else when it is merged."""
    values = torch.stack([value.cpu() for value in excess.values()]).tolist() if excess else []
    wrong = {path: value for path, value in zip(excess, values, strict=True) if not value <= 1}
    if wrong:
        raise CheckpointError(
            "The merged weights do not do what base and adapter do together, so nothing was merged. This is a fault of "
            "Theodora or of the hardware, and worth a report. Difference between merged and unmerged outputs, as a "
            "multiple of what rounding allows:" + bullet_list([f"{path}: {x:.3g}" for path, x in wrong.items()])
        )


def weight_excess(
    w_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float, magnitude_O: Tensor | None, merged_OI: Tensor
) -> float:
    """The same for weights alone: how far x W'ᵀ is from the unmerged formula, as a share of what rounding allows."""
    wide = torch.promote_types(torch.promote_types(w_OI.dtype, merged_OI.dtype), torch.float32)
    w, a, b, merged = (t.to(wide) for t in (w_OI, a_RI, b_OR, merged_OI))
    x = _inputs(w.shape, False, wide, w.device)
    base = w.norm(dim=1) * _TOKENS**0.5
    if magnitude_O is None:
        adapted = lora_linear(x, w, None, a, b, scale)
    else:
        norm = dora_norm(w, a, b, scale)
        adapted = dora_linear(x, w, None, a, b, scale, magnitude_O, norm)
        base = base * dora_scale(magnitude_O, norm)
    return float(_excess(adapted, x @ merged.T, base, merged_OI.dtype, dim=0))


def _excess(adapted: Tensor, merged: Tensor, base_size: Tensor, dtype: torch.dtype, dim: int) -> Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    adapted, merged = adapted.to(wide), merged.to(wide)
    allowed = torch.maximum(merged.norm(dim=dim), base_size.abs().to(wide)) * (_UNITS * _unit(dtype, merged.device))
    # What is below the dtype's normal numbers has no relative precision; a sum of them adds up.
    allowed += 64 * torch.finfo(dtype).tiny * torch.finfo(dtype).eps * merged.shape[dim] ** 0.5
    return ((adapted - merged).norm(dim=dim) / allowed).max()


def _unit(dtype: torch.dtype, device: torch.device) -> float:
    """Half the spacing of the dtype's numbers at 1, or the error of a product's sum where that is larger."""
    if dtype == torch.float32:
        # A GPU's kernels, and torch's faster float32 products, round factors to fewer bits.
        return 2.0**-20 if device.type == "cpu" and torch.get_float32_matmul_precision() == "highest" else 2.0**-9
    return 2.0**-44 if dtype == torch.float64 else torch.finfo(dtype).eps / 2


def _inputs_of(layer: AdapterLayer, dtype: torch.dtype) -> Tensor:
    weight = layer.current_weight
    if isinstance(layer, ConvAdapterLayer):
        shape = layer.input_shape()
        return _inputs((0, math.prod(shape)), False, dtype, weight.device).view(-1, *shape)
    return _inputs(weight.shape, isinstance(layer, nn.Embedding), dtype, weight.device)


def _inputs(shape: Sequence[int], embedding: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Inputs (T, I) for a weight (O, I), (E, T, I) for one of (E, O, I), or T tokens."""
    generator, (*experts, _, in_features) = torch.Generator().manual_seed(0), shape
    if embedding:
        return torch.randint(in_features, (_TOKENS,), generator=generator).to(device)
    return torch.randn(*experts, _TOKENS, in_features, generator=generator).to(device, dtype)


def _base_rows(layer: AdapterLayer, ids: Tensor) -> Tensor:
    """The base embedding's output, (T, O)."""
    name, layer.active_adapter = layer.active_adapter, None
    try:
        return _run(layer, ids)
    finally:
        layer.active_adapter = name


def _run(layer: AdapterLayer, x: Tensor) -> Tensor:
    """The layer alone: without hooks, dropout, autocast, or the layers that read the same input; (T, O).

    Of a convolution T is the places of all outputs.
    """
    own: Any = type(layer)
    with _alone(layer), whole_here(layer):
        # A product of float8 rounds x, which a merged weight does not; so do some of int8, outside training only.
        exactly = kernels.reference() if layer.base_weight.rounds_input else nullcontext()
        with exactly, torch.autocast(x.device.type, enabled=False):
            y = own.forward(layer, x)
            return y.movedim(1, -1).flatten(0, -2) if isinstance(layer, ConvAdapterLayer) else y


@contextmanager
def _alone(layer: AdapterLayer) -> Iterator[None]:
    group = layer.__dict__.pop(GROUP, None)
    modes = {module: module.training for module in layer.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        if group is not None:
            layer.__dict__[GROUP] = group
