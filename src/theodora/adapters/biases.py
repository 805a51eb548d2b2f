"""Biases of the base that an adapter trains or adds to: PEFT's `bias` and `lora_bias`. Here each is a parameter trained
in full."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from theodora.adapters.base_copies import base_parameter
from theodora.adapters.checkpoint import AdapterFile
from theodora.adapters.targets import find_modules_to_save
from theodora.config import AdapterConfig


def trained_biases(model: nn.Module, full: Iterable[str], config: AdapterConfig) -> set[str]:
    """Those of the parameters trained in full that are biases by themselves, and part of no module trained in full."""
    modules = set(find_modules_to_save(model, config.modules_to_save))
    return {
        path for path in full if path.endswith(".bias") and not any(path.startswith(f"{module}.") for module in modules)
    }


def sums_of_biases(model: nn.Module, file: AdapterFile) -> Mapping[str, Tensor]:
    """Parameter path → the base's bias plus what a file adds to it; the base's own have to be in place."""
    return {
        (path := f"{module}.bias"): base_parameter(model, path)
        + file.modules[module].scale * bias.to(base_parameter(model, path))
        for module, bias in file.added_biases.items()
    }


def bias_problems(model: nn.Module, file: AdapterFile) -> list[str]:
    """What stands against adding a file's biases to those of the model."""
    problems: list[str] = []
    modules = dict(model.named_modules())
    for module, bias in file.added_biases.items():
        found = getattr(modules.get(module), "bias", None)
        if not isinstance(found, Tensor):
            problems.append(f"{module}: lora_bias adds a bias to it, and it has none to add to: only PEFT runs this")
        elif module not in file.modules or found.shape != bias.shape:
            problems.append(f"{module}: a bias of {tuple(bias.shape)} for one of {tuple(found.shape)}")
    return problems
