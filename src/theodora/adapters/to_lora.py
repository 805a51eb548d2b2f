"""DoRA as plain LoRA, for everything that knows nothing else: the best low-rank approximation of what it changes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from theodora.adapters.combine import put_on, storage_dtype, wanted_by
from theodora.adapters.fit import FitReport, hold
from theodora.adapters.inject import active_name, adapter_layers, check_name, originals_in_place, require_state
from theodora.config import is_int
from theodora.errors import ConfigError


def to_lora(model: nn.Module, name: str | None, rank: int | None, into: str) -> FitReport:
    """Make a plain LoRA adapter that does what another one does, and make it the active one; nothing of it trains.

    W' − W of a DoRA adapter has full rank, so a lower rank approximates it: by the singular values of the true change
    of the weight, magnitudes included. Nothing of the same rank comes nearer (Eckart and Young). A LoRA adapter whose
    rank is no larger than `rank` stays as it is.

    Example:
        `to_lora(model, "default", 64, into="plain").worst`

    Args:
        model: carries the adapter, not merged.
        name: which adapter; None for the active one.
        rank: of the result, at most. None for an exact one, of up to min(out, in).
        into: the new adapter's name.

    Returns:
        Ranks and errors, module by module.

    Raises:
        ConfigError: there is no such adapter, the name is taken, or the rank is none; nothing was changed.
    """
    state = require_state(model, name)
    name = active_name(state, name)
    check_name(state, into)
    check_rank(rank)
    held = {}
    with torch.no_grad(), originals_in_place(model):
        for path, layer in adapter_layers(model, name).items():
            w_OI, wanted = layer.base_weight_OI, wanted_by(layer, name)
            assert wanted is not None
            held[path] = hold(w_OI, wanted, dora=False, rank=rank, dtype=storage_dtype(w_OI))
    full = {path: nn.Parameter(parameter.detach().clone()) for path, parameter in state.full[name].items()}
    return put_on(model, into, held, full, "lora")


def check_rank(rank: int | None) -> None:
    """Raise a ConfigError if this is no rank."""
    if rank is not None and (not is_int(rank) or rank < 1):
        raise ConfigError(f"rank is {rank!r}; expected a whole number of at least 1, or None for an exact conversion")


def folder_to_lora(
    adapter: str | Path, output: str | Path, rank: int | None, *, base_model: str | Path | None = None
) -> FitReport:
    """`to_lora` for a saved adapter and its base on disk, layer by layer."""
    raise NotImplementedError
