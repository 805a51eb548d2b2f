"""The fingerprint of the base under a model's adapter layers: a few values of a few weights (`files/fingerprint.py`).

A sharded weight's values lie in several processes, of which one alone writes files. So they are noted while the weights
are whole, when the adapter comes.
"""

from __future__ import annotations

from torch import nn

from theodora.adapters.quantize import module_fingerprint
from theodora.adapters.state import adapter_layers, require_state
from theodora.files.fingerprint import base_fingerprint
from theodora.kernels.sharded_weight import managed
from theodora.layers import AdapterLayer


def layers_fingerprint(model: nn.Module, layers: dict[str, AdapterLayer]) -> dict[str, list[float]]:
    """The fingerprint of the base weights under an adapter's layers; of sharded ones, as it was noted.

    Where nothing was noted of sharded weights, every process has to call this.
    """
    if any(managed(layer) for layer in layers.values()):
        noted = require_state(model).fingerprints
        if found := {path: noted[path] for path in sorted(layers) if path in noted}:
            return found
    return base_fingerprint(list(layers), lambda path: module_fingerprint(layers[path]))


def note_fingerprint(model: nn.Module, name: str) -> None:
    """Note the fingerprint of the base under the adapter `name`, for the time when its weights are sharded."""
    layers = adapter_layers(model, name)
    if not any(tensor.is_meta for layer in layers.values() for tensor in layer.base_weight.tensors()):
        require_state(model).fingerprints |= layers_fingerprint(model, layers)
