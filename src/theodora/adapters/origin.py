"""Which base an adapter belongs to, where it was loaded onto another: an NF4 one's adapter on plain weights, say."""

from __future__ import annotations

import torch
from torch import nn

from theodora.adapters.quantized import trained_on
from theodora.adapters.state import Origin, find_state, trained_tensors
from theodora.files.adapter import AdapterFile
from theodora.files.trained_on import TrainedOn
from theodora.kernels.sharded_weight import is_sharded


def remember_origin(model: nn.Module, name: str, file: AdapterFile) -> None:
    """Note the base that a loaded adapter was trained on, if the model's is quantised otherwise."""
    state = find_state(model)
    if state is None or file.trained_on is None:
        return
    state.origins.pop(name, None)
    if _stored_as(file.trained_on) != _stored_as(trained_on(model)):
        state.origins[name] = Origin(file.trained_on, file.fingerprint, _hashes(model, name))


def origin_of(model: nn.Module, name: str) -> Origin | None:
    """The other base that an adapter was trained on; None if it is the model's own, or training has gone on here."""
    state = find_state(model)
    origin = None if state is None else state.origins.get(name)
    if origin is not None and any(is_sharded(tensor) for tensor in trained_tensors(model, name).values()):
        return None  # nobody shards an adapter but to train it
    return origin if origin is not None and origin.hashes == _hashes(model, name) else None


def stored_quantised(base: TrainedOn) -> bool:
    """Whether the base's folder itself holds quantised weights."""
    return base.quantization is not None and base.quantize is None


def _stored_as(base: TrainedOn) -> tuple[str | None, str | None, str | None]:
    return base.quantization, base.quantize, base.dtype


def _hashes(model: nn.Module, name: str) -> dict[str, int]:
    """Of the bits of the adapter's tensors."""
    tensors = trained_tensors(model, name)
    return {path: int(torch.hash_tensor(tensor.detach()).item()) for path, tensor in tensors.items()}
