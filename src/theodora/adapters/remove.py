"""Taking adapters off a model."""

from __future__ import annotations

from torch import nn

from theodora.adapters.merge import unmerge_adapter
from theodora.adapters.state import STATE, Model, adapter_layers, require_state, set_adapter
from theodora.adapters.token_rows import drop_token_rows, token_layers
from theodora.adapters.trainer_hooks import remove_hooks
from theodora.fastpath.accelerate import check_fast_path, off_the_fast_path
from theodora.layers import AdapterLayer
from theodora.layers.experts import AdaptedExperts
from theodora.layers.swap import check_reachable
from theodora.layers.token_rows import TokenRowsLayer


def remove_adapter(model: Model, name: str | None = None) -> Model:
    """Take one adapter (or all of them) off `model`, in place; the base model is bit for bit what it was.

    Returns:
        The same model.

    Raises:
        ConfigError: there is no such adapter, or another library has put a class of its own on top of ours (FSDP2's
            `fully_shard`, say); nothing was changed.
    """
    state = require_state(model, name)
    leaving = list(state.configs) if name is None else [name]
    _check_classes(model, leaving)
    if state.merged is not None:
        unmerge_adapter(model)
    if state.active in leaving:
        set_adapter(model, None)
    with off_the_fast_path(model):
        for adapter in leaving:
            for layer in adapter_layers(model).values():
                if adapter in layer.adapters:
                    del layer.adapters[adapter]
            del state.configs[adapter], state.full[adapter]
            state.loaded.pop(adapter, None)
            state.origins.pop(adapter, None)
            drop_token_rows(model, adapter)
        for layer in adapter_layers(model).values():
            if not layer.adapters:
                layer.end()
    if not state.configs:
        remove_hooks(model)
        delattr(model, STATE)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(key in state.trainable_before)
    return model


def _check_classes(model: nn.Module, leaving: list[str]) -> None:
    """Raise a ConfigError if a module that is to be of its own class again, or to leave the fast path, cannot be."""
    held = [(path, layer.holder, layer.adapters) for path, layer in adapter_layers(model).items()]
    held += [(path, layer, layer.token_rows) for path, layer in token_layers(model).items()]
    empty = [(path, module) for path, module, names in held if not names.keys() - leaving]
    check_reachable(empty, AdapterLayer, AdaptedExperts, TokenRowsLayer)
    check_fast_path(model)
