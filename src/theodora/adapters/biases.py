"""Biases of the base that an adapter trains (PEFT's `bias`) or adds to (`lora_bias`): here they are trained in full."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from torch import Tensor, nn

from theodora.adapters.embeddings import base_parameter
from theodora.files.adapter import AdapterFile


def trained_biases(full: Iterable[str]) -> set[str]:
    """Biases among the parameters trained in full whose weight is not trained in full, too."""
    paths = set(full)
    return {path for path in paths if path.endswith(".bias") and f"{path.removesuffix('.bias')}.weight" not in paths}


def bias_key(path: str, adapted: Container[str]) -> str:
    """A bias's key in PEFT's files, within the wrapper of a module that has a low-rank update."""
    module = path.removesuffix(".bias")
    return f"{module}.base_layer.bias" if module in adapted else path


def sums_of_biases(model: nn.Module, file: AdapterFile) -> Mapping[str, Tensor]:
    """Parameter path → the base's bias plus what a file adds to it (within `originals_in_place`)."""
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
        own = getattr(modules.get(module), "bias", None)
        if not isinstance(own, Tensor):
            problems.append(f"{module}: lora_bias adds a bias to it, and it has none to add to: only PEFT runs this")
        elif module not in file.modules or own.shape != bias.shape:
            problems.append(f"{module}: a bias of {tuple(bias.shape)} for one of {tuple(own.shape)}")
    return problems
