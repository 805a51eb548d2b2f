"""The frozen twin of a policy, which preference trainers compare it with."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from typing import Any

from torch import nn

from theodora.adapters.remove import remove_adapter
from theodora.adapters.state import Model, adapter_layers, require_state, set_adapter
from theodora.errors import ConfigError


def reference_model(model: Model, adapter: str | None = None) -> Model:
    """Another model of the same class on the same base weights, frozen, for DPO, KTO, GRPO and their like.

    It stays what it is while `model` trains: its adapter is a copy of the small tensors as they are now, and its
    modules are its own, so that nothing that is called on one (its backbone, its head, `generate`) runs the other. The
    frozen weights are the same tensors, so that it takes no more memory than an adapter.

    Example:
        `DPOTrainer(model, reference_model(model, "default"), args=...)`. With `ref_model=None` an injected or loaded
        model gets this one by itself, with the adapter that is active.

    Args:
        model: carries adapters; it is not changed.
        adapter: which of them the reference has; None for the base model alone.

    Returns:
        The reference, in eval mode.

    Raises:
        ConfigError: the model carries no adapter, none of that name, or one is merged.
    """
    state = require_state(model, adapter)
    if state.merged is not None:
        raise ConfigError(f"Adapter {state.merged!r} is merged into the weights; call unmerge_adapter(model) first.")
    shared = {id(part): part for part in _shared(model)}
    twin = copy.deepcopy(model, dict(shared))  # which copying adds to
    _without_patches(twin)
    require_state(twin).trainable_before.clear()  # or the frozen weights, which are the policy's, would train again
    if adapter is None:
        remove_adapter(twin)
    else:
        for other in [name for name in state.configs if name != adapter]:
            remove_adapter(twin, other)
        set_adapter(twin, adapter)
    for parameter in twin.parameters():
        if id(parameter) not in shared:
            parameter.requires_grad_(False)
    return twin.eval()


def shares_training(model: nn.Module, reference: nn.Module) -> bool:
    """Whether training `model` would change what `reference` computes: they hold the same trained tensors."""
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    return any(id(parameter) in trained for parameter in reference.parameters())


def _shared(model: nn.Module) -> Iterable[Any]:
    """Tensors that the reference shares with its policy: all that training leaves alone."""
    state = require_state(model)
    own = {id(p) for layer in adapter_layers(model).values() for p in layer.adapters.parameters()}
    own |= {id(p) for full in state.full.values() for p in full.values()}
    frozen = [p for p in (*model.parameters(), *state.originals.values()) if id(p) not in own and not p.requires_grad]
    # bitsandbytes keeps the scales of a quantised weight beside it.
    states = [quantised for p in frozen if (quantised := getattr(p, "quant_state", None)) is not None]
    return [*frozen, *states, *model.buffers()]


def _without_patches(twin: nn.Module) -> None:
    """Take off `forward`s that someone hung on the policy's modules, and that call the policy still.

    Accelerate's, which place a module on its device, are bound to the copy.
    """
    for module in twin.modules():
        forward = module.__dict__.get("forward")
        if forward is not None and not (hasattr(module, "_hf_hook") and isinstance(forward, functools.partial)):
            del module.__dict__["forward"]
