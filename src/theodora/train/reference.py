"""What a policy is compared with: the same model without its adapter, or with a frozen copy of the one it started from.

No second model is held. Without an adapter the policy's own modules run, switched off for one pass; a copy of an
adapter needs modules of its own (`reference_model`), on the same frozen weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from theodora.adapters.load import load_adapter
from theodora.adapters.merge import adapter_disabled
from theodora.adapters.reference import reference_model
from theodora.adapters.remove import remove_adapter
from theodora.adapters.state import adapter_layers, require_state, set_adapter
from theodora.adapters.token_rows import token_layers

BASE = "base"
"""The word for the model without an adapter."""
_NAME = "reference"


class Reference:
    """Runs the reference of a policy.

    Args:
        model: the policy, with its adapter as it is before training.
        adapter: the folder of the adapter that the reference has; None for the base model.
        started_from: the folder that the policy's own adapter was read from, if it was.
    """

    def __init__(self, model: PreTrainedModel, adapter: str | None, started_from: str | None = None) -> None:
        self.model = model
        self.twin: PreTrainedModel | None = None
        if adapter is not None:
            self.twin = _with_adapter(model, adapter, started_from)
        self._layers = list(adapter_layers(model).values())
        # Parameters that an adapter has in the base's places are exchanged by name.
        self._switch_all = bool(require_state(model).originals or token_layers(model))

    def place(self) -> None:
        """Put the copy where the policy is by now: frozen parameters are shared, and have moved with it."""
        devices = {parameter.device for parameter in self.model.parameters()}
        if self.twin is not None and len(devices) == 1:
            self.twin.to(devices.pop())  # pyright: ignore[reportArgumentType]

    @contextmanager
    def running(self) -> Iterator[PreTrainedModel]:
        """Within the block the model that is yielded is the reference, and keeps nothing for a backward pass."""
        if self.twin is not None:
            # Nothing in it asks for gradients. (Without them a layer's norm is kept, and looked at for changes, for
            # which the device would be waited for after each step of the optimizer.)
            yield self.twin
            return
        with torch.no_grad(), adapter_disabled(self.model) if self._switch_all else self._switched_off():
            yield self.model

    @contextmanager
    def _switched_off(self) -> Iterator[None]:
        """`adapter_disabled` without a walk through all modules, twice in each step."""
        active = [layer.active_adapter for layer in self._layers]
        try:
            for layer in self._layers:
                layer.active_adapter = None
            yield
        finally:
            for layer, name in zip(self._layers, active, strict=True):
                layer.active_adapter = name


def _with_adapter(model: PreTrainedModel, adapter: str, started_from: str | None) -> PreTrainedModel:
    own = require_state(model).active
    if adapter == started_from:
        return reference_model(model, own)
    load_adapter(model, adapter, name=_NAME)
    try:
        return reference_model(model, _NAME)
    finally:
        remove_adapter(model, _NAME)
        set_adapter(model, own)
