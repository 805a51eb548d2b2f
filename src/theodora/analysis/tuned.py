"""A fully tuned model beside the one it was trained from: which weights can be compared."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from theodora.errors import CheckpointError, bullet_list
from theodora.files.base_model import BaseCheckpoint
from theodora.layers.kinds import token_ends

_MISSES_TOLD = 20


def matching_modules(base: BaseCheckpoint, tuned: BaseCheckpoint, notes: list[str]) -> set[str]:
    """The linear layers and embeddings of both. Of tied weights one is named, unless training untied them.

    Raises:
        CheckpointError: the models are not built alike, naming every miss.
    """
    ends = set(map(id, token_ends(base.model)))
    comparable: set[str] = set()
    problems: list[str] = []
    for path, module in base.model.named_modules():
        name = f"{path}.weight"
        if not isinstance(module, nn.Linear | Conv1D | nn.Embedding) or not (name in base.keys or name in tuned.keys):
            continue
        shapes = [_shape(model, name) for model in (base, tuned)]
        if None in shapes:
            problems.append(f"{name}: not stored in {(base, tuned)[shapes.index(None)].folder}")
        elif shapes[0] == shapes[1]:
            comparable.add(path)
        elif id(module) in ends:
            notes.append(f"{path} has shape {shapes[1]}, in the base {shapes[0]} (new tokens?): left out.")
        else:
            problems.append(f"{name}: {shapes[1]}, in the base {shapes[0]}")
    if fused := sorted(base.converted):
        notes.append(f"{len(fused)} weights that are loaded fused are left out ({fused[0]} first).")
    if problems:
        raise CheckpointError(
            f"{tuned.folder} is not built like the base model {base.folder}. Was it trained from another one? Name the "
            "right one with --base-model." + bullet_list(problems, _MISSES_TOLD)
        )
    return comparable


def places_in_order(base: BaseCheckpoint) -> dict[str, int]:
    """Paths of modules, and of parameters of experts → where they come in the model."""
    places: list[str] = []
    for path, module in base.model.named_modules():
        own = [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)]
        places += [path, *(name for name in own if name in base.experts())]
    return {path: index for index, path in enumerate(places)}


def in_order(base: BaseCheckpoint, paths: set[str]) -> list[str]:
    """Modules in the model's order, whatever names an older checkpoint gives them."""
    place = places_in_order(base)
    names = {path: (base.weight_name(path) or "").removesuffix(".weight") for path in paths}
    return sorted(paths, key=lambda path: (place.get(names[path], len(place)), path))


def stored_dtypes(model: BaseCheckpoint) -> str:
    """The dtypes of a model's files, as safetensors names them."""
    return " and ".join(sorted({model.tensors[key].dtype for key in model.keys.values()}))


def _shape(model: BaseCheckpoint, parameter: str) -> tuple[int, ...] | None:
    key = model.key_of(parameter)
    return None if key is None else model.tensors[key].shape
