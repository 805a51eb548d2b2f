"""Taking adapters off a model."""

from __future__ import annotations

from theodora.adapters.merge import unmerge_adapter
from theodora.adapters.state import STATE, Model, adapter_layers, require_state, set_adapter
from theodora.adapters.token_rows import drop_token_rows
from theodora.adapters.trainer_hooks import remove_hooks
from theodora.fastpath.accelerate import off_the_fast_path
from theodora.layers import restore


def remove_adapter(model: Model, name: str | None = None) -> Model:
    """Take one adapter (or all of them) off `model`, in place; the base model is bit for bit what it was.

    Returns:
        The same model.

    Raises:
        ConfigError: there is no such adapter.
    """
    state = require_state(model, name)
    if state.merged is not None:
        unmerge_adapter(model)
    leaving = list(state.configs) if name is None else [name]
    if state.active in leaving:
        set_adapter(model, None)
    with off_the_fast_path(model):
        for adapter in leaving:
            for layer in adapter_layers(model).values():
                if adapter in layer.adapters:
                    del layer.adapters[adapter]
            del state.configs[adapter], state.full[adapter]
            state.loaded.pop(adapter, None)
            drop_token_rows(model, adapter)
        for layer in adapter_layers(model).values():
            if not layer.adapters:
                restore(layer)
    if not state.configs:
        remove_hooks(model)
        delattr(model, STATE)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(key in state.trainable_before)
    return model
