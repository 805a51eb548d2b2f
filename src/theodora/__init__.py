"""Theodora: exact, fast LoRA and DoRA fine-tuning of language models."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

# The public names and the module each lives in. They are imported on first use (PEP 562), because importing
# torch and transformers takes seconds and `theodora --help` needs neither.
_HOMES = {
    "AdapterConfig": "theodora.config",
    "TrainConfig": "theodora.config",
    "TheodoraError": "theodora.errors",
    "ConfigError": "theodora.errors",
    "DataError": "theodora.errors",
    "CheckpointError": "theodora.errors",
    "inject_adapter": "theodora.adapters",
    "remove_adapter": "theodora.adapters",
    "save_adapter": "theodora.adapters",
    "load_adapter": "theodora.adapters",
    "set_adapter": "theodora.adapters",
    "adapter_disabled": "theodora.adapters",
    "merge_adapter": "theodora.adapters",
    "unmerge_adapter": "theodora.adapters",
    "merge_checkpoint": "theodora.merging",
    "quantize_base": "theodora.adapters",
    "combine_adapters": "theodora.merging.combine",
    "to_lora": "theodora.merging.to_lora",
    "reference_model": "theodora.adapters.reference",
    "swap_adapter_weights": "theodora.adapters.swap_weights",
    "save_mlx": "theodora.adapters.save_mlx",
    "accelerate": "theodora.fastpath.accelerate",
    "checkpoint_contexts": "theodora.kernels.recompute",
    "accelerate_peft": "theodora.fastpath.peft_models",
    "restore_peft": "theodora.fastpath.peft_models",
    "train": "theodora.train",
    "evaluate": "theodora.evaluate",
    "inspect_adapter": "theodora.analysis",
}

__version__ = "0.1.0"
__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from theodora.adapters import (
        adapter_disabled,
        inject_adapter,
        load_adapter,
        merge_adapter,
        quantize_base,
        remove_adapter,
        save_adapter,
        set_adapter,
        unmerge_adapter,
    )
    from theodora.adapters.reference import reference_model
    from theodora.adapters.save_mlx import save_mlx
    from theodora.adapters.swap_weights import swap_adapter_weights
    from theodora.analysis import inspect_adapter
    from theodora.config import AdapterConfig, TrainConfig
    from theodora.errors import CheckpointError, ConfigError, DataError, TheodoraError
    from theodora.evaluate import evaluate
    from theodora.fastpath.accelerate import accelerate
    from theodora.fastpath.peft_models import accelerate_peft, restore_peft
    from theodora.kernels.recompute import checkpoint_contexts
    from theodora.merging import merge_checkpoint
    from theodora.merging.combine import combine_adapters
    from theodora.merging.to_lora import to_lora
    from theodora.train import train


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'theodora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps `theodora.train` and `theodora.evaluate` functions, although the packages they live in share their names.

    Python sets an imported submodule as an attribute of its package; its function takes that place here.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        is_home = isinstance(value, ModuleType) and _HOMES.get(name) == value.__name__
        super().__setattr__(name, getattr(value, name) if is_home else value)


sys.modules[__name__].__class__ = _Package
