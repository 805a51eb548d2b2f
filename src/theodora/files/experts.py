"""Adapters of fused experts in PEFT's files, as `target_parameters` makes them.

PEFT wraps the experts module once for each adapted parameter, the first one innermost, and names none of them:

    <module>.lora_A.weight                 (E·R, I)    of the last parameter, as a rule down_proj
    <module>.base_layer.lora_A.weight      (E·R, I)    of the one before it, as a rule gate_up_proj
    <module>.….lora_B.weight               (O, R·E)    r outside, e inside
    <module>.….lora_magnitude_vector       (E, O)      ours, for DoRA, which PEFT refuses by `use_dora`

Here a parameter has a path of its own, and its tensors are A (E, R, I), B (E, O, R), m (E, O).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from theodora.config import AdapterConfig
from theodora.errors import shown
from theodora.files.names import KEY_PREFIX
from theodora.paths import matches

PARAMETERS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
"""Parameters of experts, in the order in which modules have them, and PEFT wraps them."""
_WRAPPED = ".base_layer"
_PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


def expert_tensors(
    path: str, adapted: Iterable[str], a: Tensor, b: Tensor, magnitude: Tensor | None
) -> dict[str, Tensor]:
    """The tensors of one parameter under PEFT's keys, without the prefix.

    Args:
        path: of the parameter.
        adapted: paths of all that is adapted, among them the other parameters of its module.
        a: A, (E, R, I).
        b: B, (E, O, R).
        magnitude: m, (E, O), for DoRA.
    """
    module, _, name = path.rpartition(".")
    beside = [own for parent, _, own in (other.rpartition(".") for other in adapted) if parent == module]
    outside = sum(PARAMETERS.index(other) > PARAMETERS.index(name) for other in beside)
    stem = module + outside * _WRAPPED
    tensors = {f"{stem}.lora_A.weight": a.flatten(0, 1), f"{stem}.lora_B.weight": b.permute(1, 2, 0).flatten(1)}
    return tensors if magnitude is None else {**tensors, f"{stem}.lora_magnitude_vector": magnitude}


@dataclass
class ByPath:
    """Tensors under PEFT's keys, those of experts under the paths of their parameters."""

    tensors: dict[str, Tensor]
    experts: set[str] = field(default_factory=set[str])
    """Paths of the parameters of experts."""
    problems: list[str] = field(default_factory=list[str])
    """What is wrong with single keys, whose tensors are left out."""


def experts_by_path(tensors: Mapping[str, Tensor], config: AdapterConfig, peft: Mapping[str, Any] | None) -> ByPath:
    """Find the tensors of experts among those of a file.

    Args:
        tensors: key → tensor.
        config: ranks by path.
        peft: PEFT's own fields.
    """
    named = [name for name in (peft or {}).get("target_parameters") or () if isinstance(name, str)]
    if not named:
        return ByPath(dict(tensors))
    targets = (peft or {}).get("target_modules") or ()
    modules = targets if isinstance(targets, str) else tuple(targets)
    levels: dict[str, set[int]] = {}
    for key in tensors:
        if (found := _place(key, named, modules, config)) is not None:
            levels.setdefault(found[0], set()).add(found[1])
    result = ByPath({})
    names = {module: _of_module(module, named) for module in levels}
    for module, held in levels.items():
        if held != set(range(len(names[module]))):
            result.problems.append(
                f"{module}: target_parameters names {', '.join(names[module])} of it, but the file holds tensors of "
                f"{len(held)}"
            )
    for name in named:
        _, _, last = name.rpartition(".")
        if not any(last in of and _means(name, f"{module}.{last}") for module, of in names.items()):
            result.problems.append(f"target_parameters names {shown(name)}, but the file holds nothing for it")
    misfits: set[str] = set()
    for key, tensor in tensors.items():
        found = _place(key, named, modules, config)
        if found is None:
            result.tensors[key] = tensor
            continue
        module, level, part = found
        if levels[module] != set(range(len(names[module]))):
            continue
        path = f"{module}.{names[module][len(names[module]) - 1 - level]}"
        unfolded = _unfolded(tensor, part, config.rank_of(path))
        if unfolded is None:
            misfits.add(f"{KEY_PREFIX}{path}.")
            result.problems.append(
                f"{key}: {tuple(tensor.shape)}; expected the rank, {config.rank_of(path)}, once for each expert"
            )
        else:
            result.tensors[f"{KEY_PREFIX}{path}.{part}"] = unfolded
            result.experts.add(path)
    for beginning in misfits:  # or what is left of them would be said to lack the others
        result.tensors = {key: held for key, held in result.tensors.items() if not key.startswith(beginning)}
    return result


def parameters_problems(peft: Mapping[str, Any]) -> list[str]:
    """What stands against the parameters that a configuration names."""
    named = peft.get("target_parameters")
    if named is None:
        return []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        return [f"target_parameters is {shown(named)}; expected a list of names"]
    others = [name for name in named if name.rpartition(".")[2] not in PARAMETERS]
    return [
        f"target_parameters names {shown(name)}; only experts' are read ({', '.join(PARAMETERS)}). The weight of a "
        "linear layer is named by its module, in target_modules, with the same tensors"
        for name in others
    ]


def _place(
    key: str, named: list[str], modules: str | tuple[str, ...], config: AdapterConfig
) -> tuple[str, int, str] | None:
    """The experts module of a key, how deep in PEFT's wrappers it is, and which tensor it means; None for others."""
    name = key.removeprefix(KEY_PREFIX)
    part = next((part for part in _PARTS if name.endswith("." + part)), None)
    if part is None:
        return None
    module, level = name.removesuffix("." + part), 0
    while module.endswith(_WRAPPED):
        module, level = module.removesuffix(_WRAPPED), level + 1
    if modules and matches(modules, module, config.expressions):  # PEFT adapts no parameter of a module that it adapts
        return None
    return (module, level, part) if _of_module(module, named) else None


def _of_module(module: str, named: list[str]) -> list[str]:
    """The parameters of a module that `target_parameters` names, in its order."""
    return [name for name in PARAMETERS if any(_means(each, f"{module}.{name}") for each in named)]


def _means(name: str, path: str) -> bool:
    """Whether a name in `target_parameters` means the parameter at a path."""
    return f".{path}".endswith(f".{name}")


def _unfolded(tensor: Tensor, part: str, rank: int) -> Tensor | None:
    """A (E, R, I) or B (E, O, R) of PEFT's two dimensions; None if the rank does not fit. Magnitudes as they are."""
    if part == "lora_magnitude_vector":
        return tensor
    along = 0 if part == "lora_A.weight" else 1
    if tensor.dim() != 2 or not tensor.numel() or tensor.shape[along] % rank:
        return None
    if along == 0:
        return tensor.unflatten(0, (-1, rank))
    return tensor.unflatten(1, (rank, -1)).permute(2, 0, 1)
