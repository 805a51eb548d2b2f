"""Whether a file's adapter fits a model, and putting its tensors into an adapter that is there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from theodora.adapters.biases import bias_problems
from theodora.adapters.embeddings import changed_copies, end_weights
from theodora.adapters.heads import task_type
from theodora.adapters.quantize import module_fingerprint
from theodora.adapters.quantized import quantization_of
from theodora.adapters.renamed import in_names_of
from theodora.adapters.state import active_name, adapter_layers, new_low_rank, originals_in_place, require_state
from theodora.adapters.token_rows import rows_problems, rows_to_write
from theodora.config import AdapterConfig
from theodora.errors import CheckpointError, bullet_list
from theodora.files.adapter import AdapterFile, AdapterTensors, read_adapter
from theodora.files.fingerprint import SAME_BASE, check_fingerprint
from theodora.files.finite import finite
from theodora.files.in_full import missing_in_full
from theodora.files.peft_config import SCORES_TEXTS
from theodora.layers import LowRank, base_weight, cannot_adapt, start_values
from theodora.layers.base_weights import filter_shape
from theodora.layers.experts import ExpertParameter, named_places, place_at
from theodora.paths import layer_index, matches, nearest
from theodora.synonyms import of_another_part

_MISSES_TOLD = 12


def load_weights(model: nn.Module, path: str | Path, name: str | None = None) -> None:
    """Overwrite the tensors of an adapter the model already carries with those of a saved one, in place.

    Raises:
        CheckpointError: the saved adapter has other modules, ranks or shapes; nothing was changed.
    """
    state = require_state(model, name)
    name = active_name(state, name)
    file = in_names_of(model, read_adapter(path))
    with originals_in_place(model):
        check_fit(model, file)
    layers = adapter_layers(model, name)
    problems = [f"{module}: in the model, not in the file" for module in layers if module not in file.modules]
    problems += [f"{module}: in the file, not in the model" for module in file.modules if module not in layers]
    loaded = {module: low_rank_of(model, module, file, state.configs[name]) for module in file.modules}
    pairs: list[tuple[Tensor, Tensor]] = []
    for module in layers.keys() & loaded.keys():
        mine: Any = layers[module].adapters[name]
        theirs = dict(loaded[module].named_parameters()) | dict(loaded[module].named_buffers())
        for part, tensor in (dict(mine.named_parameters()) | dict(mine.named_buffers())).items():
            if part not in theirs or theirs[part].shape != tensor.shape:
                theirs_shape = tuple(theirs[part].shape) if part in theirs else "nothing"
                problems.append(f"{module}.{part}: {theirs_shape} in the file, {tuple(tensor.shape)} in the model")
            else:
                pairs.append((tensor, theirs[part]))
        if mine.scale != loaded[module].scale:
            problems.append(f"{module}: scale {loaded[module].scale:g} in the file, {mine.scale:g} in the model")
    for key, parameter in state.full[name].items():
        if key not in file.full:
            problems.append(f"{key}: trained in full here, not in the file")
        else:
            pairs.append((parameter, file.full[key]))
    row_pairs, row_problems = rows_to_write(model, name, file.token_rows, "here than in the file")
    pairs, problems = pairs + row_pairs, problems + row_problems
    problems += [
        f"a tensor of {tuple(mine.shape)}: values that {mine.dtype} has no finite numbers for"
        for mine, theirs in pairs
        if not finite(theirs.to(mine.dtype))
    ]
    if problems:
        raise CheckpointError(f"{file.path} does not fit adapter {name!r} of this model:" + bullet_list(problems))
    with torch.no_grad():
        for mine, theirs in pairs:
            mine.copy_(theirs)


def low_rank_of(model: nn.Module, module: str, file: AdapterFile, config: AdapterConfig) -> LowRank:
    """A file's low-rank tensors as the adapter that `module` of the model will hold."""
    tensors: AdapterTensors = file.modules[module]
    place = place_at(model, module)
    a, b, start = tensors.a, tensors.b, None
    if file.starts:
        rank = a.shape[-2] // 2
        a, b, start = a[..., :rank, :], b[..., :rank], (a[..., rank:, :], -b[..., rank:])
    if file.starts_from is not None:  # as PEFT does whenever it loads such a file
        weight = base_weight(place)
        start = start_values(file.starts_from, weight, a.shape[-2], tensors.scale, tensors.embedding)[2]
    return new_low_rank(place, a, b, tensors.magnitude, tensors.scale, config, start)


def check_fit(model: nn.Module, file: AdapterFile, resized: Mapping[str, Tensor] | None = None) -> float:
    """Check that a file is for this model; how far the base weights are from those it was trained on, relative.

    Args:
        model: the base model, with its own parameters in place.
        file: the adapter.
        resized: parameter path → the weight that will take its place; see `resized_embeddings`.

    Raises:
        CheckpointError: with every module that is missing in the model or in the file, of another shape, or that
            cannot be adapted.
    """
    modules, resized = named_places(model), resized or {}
    parameters = {**dict(model.named_parameters(remove_duplicate=False)), **resized}
    problems = _module_problems(model, modules, file, resized)
    problems += [
        f"{path}: named by the targets, but the file holds nothing for it" for path in _left_out(modules, file)
    ]
    problems += _parameter_problems(model, parameters, file)
    sizes = {path: len(weight) for path, weight in resized.items()}
    problems += rows_problems(model, file.token_rows, sizes)
    problems += missing_in_full(file, parameters) + bias_problems(model, file)
    if not problems:
        problems += [
            f"{key}: the file carries a changed base weight, for which there is no place beside the base; merge it "
            "(theodora merge), or train it as one of modules_to_save instead"
            for key in changed_copies(model, file, resized)
        ]
    if problems:
        raise CheckpointError(
            f"The adapter in {file.path} was made for another model"
            + (f" ({file.base_model})" if file.base_model else "")
            + (f", for {file.task}" if file.task not in (None, task_type(model, [])) else "")
            + ":"
            + bullet_list(problems, _MISSES_TOLD)
            + (f"\nIt {SCORES_TEXTS}" if file.heads is not None and task_type(model, []) == "CAUSAL_LM" else "")
        )
    distance = check_fingerprint(file, lambda path: module_fingerprint(modules[path]) if path in modules else None)
    if distance > SAME_BASE:
        warnings.warn(
            f"The base weights are {distance:.1%} away from those that the adapter in {file.path} was trained on: "
            f"{_why_apart(model, file)} The adapter may not do what it did.",
            stacklevel=3,
        )
    return distance


def _why_apart(model: nn.Module, file: AdapterFile) -> str:
    found, on = quantization_of(model), file.trained_on
    here, then = None if found is None else found.name, None if on is None else on.quantization
    if on is None or here == then:
        return "quantised, or trained further?"
    return f"those were {f'quantised ({then})' if then else 'not quantised'}, these are {here or 'not'}."


def _module_problems(
    model: nn.Module, modules: Mapping[str, nn.Module], file: AdapterFile, resized: Mapping[str, Tensor]
) -> list[str]:
    """What stands against the file's updates of low rank: the module is missing, another kind, or another size."""
    problems: list[str] = []
    for path, tensors in file.modules.items():
        module = modules.get(path)
        if module is None:
            close = nearest(path, modules) if len(problems) < _MISSES_TOLD else []
            problems.append(f"{path}: no such module" + (f"; nearest: {close[0]}" if close else ""))
        elif (reason := cannot_adapt(module)) is not None:
            problems.append(f"{path}: {reason}")
        elif isinstance(module, nn.Embedding) != tensors.embedding:
            problems.append(f"{path}: the file and the model disagree whether this is an embedding")
        else:
            weight = resized.get(f"{path}.weight")
            stored = base_weight(module) if weight is None else weight.T if tensors.embedding else weight
            expected = (*stored.shape[:-1], *(filter_shape(module) or stored.shape[-1:]))
            made_for = tensors.weight_shape
            if made_for != expected:
                of = "(experts, out, in)" if len(expected) == 3 else "(out, in)"
                swapped = len(expected) == 3 and made_for == (expected[0], expected[2], expected[1])
                why = ". PEFT before 0.19.1 swapped in and out of such weights: train it anew" if swapped else ""
                problems.append(f"{path}: made for a weight of {made_for} {of}; here it is {expected}{why}")
            elif file.mlx and tensors.embedding and is_tied(model, module):
                problems.append(f"{path}: MLX adapts the output head with this embedding, whose weight it shares")
    return problems


def _parameter_problems(model: nn.Module, parameters: Mapping[str, Tensor], file: AdapterFile) -> list[str]:
    """What stands against whole parameters of the file: those trained in full, and copies of the base's."""
    problems: list[str] = []
    for key, tensor in {**file.base_copies, **file.full}.items():
        if key not in parameters:
            problems.append(f"{key}: no such parameter")
        elif parameters[key].shape != tensor.shape:
            problems.append(f"{key}: {tuple(tensor.shape)} in the file, {tuple(parameters[key].shape)} in the model")
            if key in end_weights(model):
                problems[-1] += " (with other numbers of tokens merge it, or load it onto a model without adapters)"
    return problems


def _left_out(modules: dict[str, nn.Module], file: AdapterFile) -> list[str]:
    """Modules that the file's configuration targets and its tensors leave out: part of the adapter is lost."""
    config = file.config
    if config.targets == "all-linear":
        return []
    full = {path.rpartition(".")[0] for path in file.full}
    of_experts = {path.rpartition(".")[2] for path, tensors in file.modules.items() if tensors.a.dim() == 3}
    language_model_alone = not any(map(of_another_part, file.modules))  # q_proj then means no tower's
    return [
        path
        for path, module in modules.items()
        if path not in file.modules
        and not (language_model_alone and of_another_part(path))
        and matches(config.targets, path, config.expressions)
        and not (config.exclude and matches(config.exclude, path, config.expressions))
        and (file.only_layers is None or layer_index(path) in file.only_layers)
        and cannot_adapt(module) is None
        and not (isinstance(module, ExpertParameter) and path.rpartition(".")[2] not in of_experts)
        and not any(path == whole or path.startswith(whole + ".") for whole in full)
    ]


def is_tied(model: nn.Module, embedding: nn.Module) -> bool:
    """Whether the output head shares the embedding's weight."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    return head is not None and head is not embedding and getattr(head, "weight", None) is embedding.weight
