"""Copies of the base's weights in a file: embeddings and heads, resized or trained, that PEFT saved with an adapter.

PEFT writes them over the base's weights. Here the base stays as it is without the adapter: it only takes the file's
number of tokens, and a copy with other values becomes a parameter that the adapter trains in full.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from theodora.files.adapter import AdapterFile
from theodora.files.fingerprint import OTHER_BASE
from theodora.layers import AdapterLayer
from theodora.layers.base_weights import FLOATS
from theodora.layers.kinds import token_ends


def resized_embeddings(model: nn.Module, file: AdapterFile) -> dict[str, Tensor]:
    """The weights (V', I) of embedding and output head for the number of tokens that a file brings; nothing is changed.

    Rows that the model has stay as they are; those of new tokens are the file's.

    Returns:
        Parameter path → weight; empty where the model has as many tokens, or cannot be resized for this file: one end
        would be left out or has other columns, a weight is quantised or sharded, it is no model of transformers, or
        the file's copy of the base says other things of the tokens that both have.
    """
    brought = {**file.full, **file.base_copies}  # a copy of the base's own goes before what replaces it
    resized: dict[int, Tensor] = {}
    ends = end_weights(model)
    for key, weight in ends.items():
        source = brought.get(key)
        if source is None or id(weight) in resized:
            continue
        if source.shape[1:] != weight.shape[1:] or type(weight.data) is not Tensor or weight.dtype not in FLOATS:
            return {}
        if not len(source) or (key in file.base_copies and _another(source, weight)):
            return {}
        resized[id(weight)] = torch.cat([weight.detach()[: len(source)], source[len(weight) :].to(weight)])
    tokens = {len(weight) for weight in resized.values()}
    if len(tokens) != 1 or any(id(weight) not in resized for weight in ends.values()):
        return {}
    if tokens == {len(weight) for weight in ends.values()}:
        return {}
    return {key: resized[id(weight)] for key, weight in ends.items()}


def resize_embeddings(model: Any, resized: Mapping[str, Tensor]) -> int | None:
    """Give the model the weights of `resized_embeddings`, in place; the new number of tokens, None without any."""
    if not resized:
        return None
    tokens = len(next(iter(resized.values())))
    model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        for key, weight in resized.items():
            model.get_parameter(key).copy_(weight)
    return tokens


def changed_copies_in_full(model: nn.Module, file: AdapterFile, resized: Mapping[str, Tensor]) -> AdapterFile:
    """The same file, with copies that differ from the base (and what is tied to them) as parameters trained in full.

    A copy of a weight that also has a low-rank update stays a copy: here an adapter is one or the other.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    full = dict(file.full)
    for key in changed_copies(model, file, resized):
        tied = [name for name, parameter in parameters.items() if parameter is parameters[key]]
        if not any(name.rpartition(".")[0] in file.modules for name in tied):
            for name in tied:
                full.setdefault(name, file.base_copies[key])
    return replace(file, full=full)


def changed_copies(model: nn.Module, file: AdapterFile, resized: Mapping[str, Tensor]) -> list[str]:
    """Paths of a file's copies that differ from the base's weights by more than rounding, and are not in `full`."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return [
        key
        for key, copy in file.base_copies.items()
        if key not in file.full
        and key in parameters
        and not _equal_but_for_rounding(resized.get(key, base_parameter(model, key)), copy)
    ]


def end_weights(model: Any) -> dict[str, nn.Parameter]:
    """Parameter path → weight, of a transformers model's input embedding and output head; of another model none."""
    if not hasattr(model, "resize_token_embeddings"):
        return {}
    ends = [end for end in token_ends(model) if end is not None]
    modules = model.named_modules(remove_duplicate=False)
    return {f"{path}.weight": module.weight for path, module in modules if any(module is end for end in ends)}


def _another(copy: Tensor, weight: Tensor) -> bool:
    """Whether a copy of an embedding is of another model, as fingerprints measure it, in the rows that both have."""
    both = min(len(copy), len(weight))
    base = weight.detach()[:both].float()
    return bool((copy[:both].to(base) - base).norm() > OTHER_BASE * base.norm())


def _equal_but_for_rounding(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not one.is_floating_point():
        return False
    unit = max(torch.finfo(tensor.dtype).eps for tensor in (one, other))
    return torch.allclose(one.detach().float().cpu(), other.float().cpu(), rtol=unit, atol=0)


def base_parameter(model: nn.Module, key: str) -> Tensor:
    """A parameter as the base has it, also while an adapter is merged (within `originals_in_place`)."""
    module_path, _, name = key.rpartition(".")
    module = model.get_submodule(module_path)
    if isinstance(module, AdapterLayer) and name == "weight":
        return module.as_stored(module.base_weight.dense())
    return getattr(module, name)
