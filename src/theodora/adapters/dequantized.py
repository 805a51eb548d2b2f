"""A model of quantised layers as it is saved after a merge: a plain one.

The merged layers are plain already; layers without an adapter are dequantised as they are written. Nothing on the model
changes, and what says that it is quantised is back in its place afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from theodora.layers.libraries import library_weight

_PARTS = ("weight.", "SCB", "weight_format")
"""What libraries put into a state dict beside a module's weight, by the beginnings of the names."""


def plain_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state`, with a dense weight (O, I) in place of each that a library stores, in the dtype that it computes in."""
    plain = dict(state)
    for path, module in model.named_modules():
        tensor = module._parameters.get("weight")  # pyright: ignore[reportPrivateUsage]
        key, prefix = f"{path}.weight", f"{path}."
        weight = None if tensor is None or key not in plain else library_weight(module, tensor)
        if weight is None:
            continue
        for name in [name for name in plain if name.startswith(tuple(prefix + part for part in _PARTS))]:
            del plain[name]
        plain[key] = weight.dense()
    return plain


@contextmanager
def saved_as_plain(model: Any) -> Iterator[None]:
    """While it lasts, transformers takes the model for one without quantisation."""
    quantizer, config = getattr(model, "hf_quantizer", None), model.config
    described = config.__dict__.pop("quantization_config", None)
    if quantizer is not None:
        model.hf_quantizer = None
    try:
        yield
    finally:
        if quantizer is not None:
            model.hf_quantizer = quantizer
        if described is not None:
            config.quantization_config = described
