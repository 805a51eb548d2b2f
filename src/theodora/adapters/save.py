"""Between a model's adapters and PEFT's files (`checkpoint.py` has the format)."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from theodora.adapters.atomic import atomic_directory, atomic_write
from theodora.adapters.base_copies import (
    base_parameter,
    changed_copies,
    changed_copies_in_full,
    end_weights,
    grow_embeddings,
    grown_embeddings,
    missing_in_full,
)
from theodora.adapters.base_probe import check_base, probe_base
from theodora.adapters.biases import bias_key, bias_problems, sums_of_biases, trained_biases
from theodora.adapters.checkpoint import (
    CONFIG_NAME,
    KEY_PREFIX,
    WEIGHTS_NAME,
    AdapterFile,
    AdapterTensors,
    peft_config,
    read_adapter,
    starts_from_weight,
)
from theodora.adapters.finite import finite, not_finite
from theodora.adapters.heads import task_type
from theodora.adapters.inject import (
    AdapterState,
    Model,
    active_name,
    adapter_layers,
    add_adapter,
    check_name,
    find_state,
    full_parameters,
    new_low_rank,
    originals_in_place,
    require_state,
    set_adapter,
)
from theodora.adapters.kinds import layer_index
from theodora.adapters.load_report import LoadReport, report_of
from theodora.adapters.names import of_another_part
from theodora.adapters.new_tokens import tokens_before
from theodora.adapters.quantize import sample_base
from theodora.adapters.read_back import save_tensors, write_text
from theodora.adapters.reading import METADATA_KEY
from theodora.adapters.renamed import in_names_of, left_out_note
from theodora.adapters.targets import matches, nearest, saved_names, target_names
from theodora.adapters.token_rows import (
    DELTA,
    loaded_rows,
    own_rows,
    peft_indices,
    rows_problems,
    rows_to_write,
    token_layers,
)
from theodora.adapters.written import HASHES_KEY, hashes_of_adapter
from theodora.config import AdapterConfig, AdapterDtype
from theodora.errors import CheckpointError, bullet_list
from theodora.layers import AdapterLayer, LowRank, base_weight, cannot_adapt, start_values
from theodora.layers.linear import Conv1DAdapterLayer

_log = logging.getLogger(__name__)


_SHOWN = 12


def save_adapter(
    model: nn.Module, path: str | Path, name: str | None = None, *, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Save one adapter in PEFT's files, whole or not at all.

    Args:
        model: carries the adapter.
        path: the folder; other files in it are left alone.
        name: which adapter; by default the active one.
        state_dict: the model's tensors, where they were gathered from several processes.

    Raises:
        ConfigError: there is no such adapter.
        CheckpointError: a tensor holds NaN or infinite values, or the folder cannot be written.
    """
    state = require_state(model, name)
    name = active_name(state, name)
    tensors = _tensors(model, state, name, state_dict)
    bad = not_finite(tensors.items())
    if bad:
        raise CheckpointError(
            f"Adapter {name!r} holds NaN or infinite values and was not saved; the run has diverged:" + bullet_list(bad)
        )
    config = json.dumps(_peft_config(model, state, name), indent=2, sort_keys=True) + "\n"
    metadata = {
        "format": "pt",
        METADATA_KEY: json.dumps(_metadata(model, state.configs[name], name)),
        HASHES_KEY: hashes_of_adapter(tensors, config),
    }
    path = Path(path)
    if not path.exists():
        with atomic_directory(path) as folder:
            save_tensors(tensors, folder / WEIGHTS_NAME, metadata, checked=True)
            write_text(folder / CONFIG_NAME, config)
        return
    with atomic_write(path / WEIGHTS_NAME) as weights, atomic_write(path / CONFIG_NAME) as configuration:
        save_tensors(tensors, weights, metadata, checked=True)
        write_text(configuration, config)


def load_adapter(model: Model, path: str | Path, name: str = "default", trainable: bool = False) -> Model:
    """Put a saved adapter (ours or PEFT's) on `model`, in place, and make it the active one.

    Where PEFT saved embeddings of the base beside the adapter, they count as PEFT has them. Values other than the
    base's are parameters trained in full. Another number of tokens resizes the model's embeddings, which is logged: new
    tokens get the file's rows, the others keep theirs, and the size stays when the adapter is removed.

    Args:
        model: the base model that the adapter was trained on.
        path: the adapter's folder, or its name on the Hugging Face hub.
        name: by which it is known from now on.
        trainable: whether its tensors ask for gradients, to train on.

    Returns:
        The same model.

    Raises:
        CheckpointError: the files are damaged, or made for another model, or bring what only a merge can put into the
            base: another number of tokens for a model that carries adapters or whose embeddings are quantised, or a
            changed base weight under a low-rank update; nothing was changed.
        ConfigError: the name is taken.
    """
    return _load(model, path, name, trainable)


def _load(model: Model, path: str | Path, name: str, trainable: bool, **changes: Any) -> Model:
    """`load_adapter`, with other values of the adapter's configuration."""
    state = find_state(model) or AdapterState()
    check_name(state, name)
    read = in_names_of(model, read_adapter(path, for_model=True))
    if read.left_out:
        warnings.warn(left_out_note(read), stacklevel=2)
    with originals_in_place(model):
        # (the tensors of adapters that are there have the sizes of now)
        grown = {} if state.configs else grown_embeddings(model, read)
        file = changed_copies_in_full(model, read, grown)
        config = replace(original_config(file), **changes)
        distance = check_fit(model, file, grown)
        resized = bool(file.token_rows) and tokens_before(model) is not None
        file = replace(file, full={**file.full, **sums_of_biases(model, file)})
        tokens = grow_embeddings(model, grown)
        adapters = {module: _low_rank(model, module, file, config) for module in file.modules}
        full = _full(model, file, full_parameters(model, config, state), read)
    read_or_bias = {key for key in file.full if key in read.full or key.endswith(".bias")}
    modules_in_full = {key.rpartition(".")[0] for key in file.full.keys() - read_or_bias}
    config = replace(config, modules_to_save=(*config.modules_to_save, *sorted(modules_in_full)))
    rows = loaded_rows(model, file.token_rows, config)
    add_adapter(model, name, config, adapters, full, rows)
    require_state(model).resized |= resized or tokens is not None
    set_adapter(model, name)
    if not trainable:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    report = replace(report_of(name, file, config, distance), tokens=tokens)
    require_state(model).loaded[name] = report
    _log.log(logging.INFO if tokens is None else logging.WARNING, "Loaded %s", report)
    return model


def load_report(model: nn.Module, name: str | None = None) -> LoadReport | None:
    """What `load_adapter` put on the model under that name; None for an adapter that was not loaded.

    Raises:
        ConfigError: there is no such adapter.
    """
    state = require_state(model, name)
    return state.loaded.get(active_name(state, name))


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
    loaded = {module: _low_rank(model, module, file, state.configs[name]) for module in file.modules}
    pairs: list[tuple[Tensor, Tensor]] = []
    for module in layers.keys() & loaded.keys():
        mine: Any = layers[module].adapters[name]
        theirs = dict(loaded[module].named_parameters()) | dict(loaded[module].named_buffers())
        for part, tensor in (dict(mine.named_parameters()) | dict(mine.named_buffers())).items():
            if part not in theirs or theirs[part].shape != tensor.shape:
                found = tuple(theirs[part].shape) if part in theirs else "nothing"
                problems.append(f"{module}.{part}: {found} in the file, {tuple(tensor.shape)} in the model")
            else:
                pairs.append((tensor, theirs[part]))
        if mine.scale != loaded[module].scale:
            problems.append(f"{module}: scale {loaded[module].scale:g} in the file, {mine.scale:g} in the model")
    for key, parameter in state.full[name].items():
        if key not in file.full:
            problems.append(f"{key}: trained in full here, not in the file")
        else:
            pairs.append((parameter, file.full[key]))
    pairs += rows_to_write(model, name, file.token_rows, problems, "here than in the file")
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


def _tensors(
    model: nn.Module, state: AdapterState, name: str, state_dict: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's keys, on the CPU."""
    tensors: dict[str, Tensor] = {}
    layers, biases = adapter_layers(model, name), trained_biases(state.full[name])
    for path, layer in layers.items():
        adapter: Any = layer.adapters[name]
        if state_dict is not None:
            adapter = _gathered(adapter, state_dict, f"{path}.adapters.{name}.")
        a, b = adapter.factors()
        pattern = "{}.lora_embedding_{}" if isinstance(layer, nn.Embedding) else "{}.lora_{}.weight"
        tensors[pattern.format(path, "A")] = a
        tensors[pattern.format(path, "B")] = b
        if adapter.magnitude is not None:
            tensors[f"{path}.lora_magnitude_vector"] = adapter.magnitude
    for path, parameter in state.full[name].items():
        in_place = state.active == name and state_dict is not None
        key = bias_key(path, layers) if path in biases else path
        tensors[key] = state_dict[path] if in_place and state_dict is not None else parameter
    for path, own in own_rows(model, name).items():
        rows = own.rows if state_dict is None else state_dict[f"{path}.token_rows.{name}.rows"]
        tensors[f"{path}.{DELTA}"] = rows
    if state.resized:
        with_rows = token_layers(model, name)
        with originals_in_place(model):
            for path in end_weights(model).keys() - tensors.keys():
                module = path.removesuffix(".weight")
                copy = base_parameter(model, path) if state_dict is None else state_dict[path]
                base = "base_layer.weight" if module in layers else "token_adapter.base_layer.weight"
                tensors[f"{module}.{base}" if module in layers or module in with_rows else path] = copy
    return {KEY_PREFIX + key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}


def _gathered(adapter: LowRank, state_dict: dict[str, Tensor], prefix: str) -> LowRank:
    """The same adapter with the tensors of `state_dict`."""
    part = {key: state_dict[prefix + key] for key in adapter.state_dict()}
    start = (part["start_A"], part["start_B"]) if "start_A" in part else None
    return LowRank(part["lora_A"], part["lora_B"], part.get("magnitude"), adapter.scale, start=start)


def _peft_config(model: nn.Module, state: AdapterState, name: str) -> dict[str, Any]:
    layers = adapter_layers(model, name)
    hf_config: Any = getattr(model, "config", None)
    return peft_config(
        state.configs[name],
        target_modules=target_names(model, list(layers)),
        modules_to_save=saved_names(model, state.configs[name].modules_to_save),
        token_indices=peft_indices(model, name),
        base_model=getattr(hf_config, "_name_or_path", "") or None,
        task_type=task_type(model, list(layers)),
        fan_in_fan_out=any(isinstance(layer, Conv1DAdapterLayer) for layer in layers.values()),
        bias="all" if trained_biases(state.full[name]) else "none",
    )


def _metadata(model: nn.Module, config: AdapterConfig, name: str) -> dict[str, Any]:
    layers, state = adapter_layers(model, name), require_state(model)
    if state.resized:  # the base on disk has other rows of them
        layers = {path: layer for path, layer in layers.items() if f"{path}.weight" not in end_weights(model)}
    with originals_in_place(model):
        return {"starts": starts_from_weight(config), "init": config.init, "probe": probe_of(layers)}


def load_to_train(model: nn.Module, path: str | Path, *, dropout: float, dtype: AdapterDtype) -> AdapterConfig:
    """`load_adapter` for training on, with another dropout and storage of A and B; what the model carries then."""
    _load(model, path, "default", True, dropout=dropout, adapter_dtype=dtype)
    paths = list(adapter_layers(model, "default"))
    return replace(require_state(model).configs["default"], targets=tuple(target_names(model, paths)) or "all-linear")


def probe_of(layers: dict[str, AdapterLayer]) -> dict[str, list[float]]:
    """A few values of the base weights of an adapter's layers, by which another base model is recognised."""
    return probe_base(list(layers), lambda path: sample_base(layers[path]))


def original_config(file: AdapterFile) -> AdapterConfig:
    """The configuration that training began with: a file with start factors says rank 2R."""
    if file.starts_from is not None:
        return replace(file.config, init=file.starts_from)
    if not file.starts:
        return file.config
    c = file.config
    grow = 2**0.5 if c.rslora else 2
    return AdapterConfig(
        method=c.method,
        rank=c.rank // 2,
        alpha=(c.alpha or 0) / grow,
        rslora=c.rslora,
        dropout=c.dropout,
        targets=c.targets,
        rank_pattern={key: value // 2 for key, value in c.rank_pattern.items()},
        alpha_pattern={key: value / grow for key, value in c.alpha_pattern.items()},
        modules_to_save=c.modules_to_save,
        trainable_token_indices=c.trainable_token_indices,
        init="pissa",
    )


def _low_rank(model: nn.Module, module: str, file: AdapterFile, config: AdapterConfig) -> LowRank:
    found: AdapterTensors = file.modules[module]
    a, b, start = found.a, found.b, None
    if file.starts:
        rank = a.shape[0] // 2
        a, b, start = a[:rank], b[:, :rank], (a[rank:], -b[:, rank:])
    if file.starts_from is not None:  # as PEFT does whenever it loads such a file
        w_OI = base_weight(model.get_submodule(module))
        start = start_values(file.starts_from, w_OI, a.shape[0], found.scale, found.embedding)[2]
    return new_low_rank(model.get_submodule(module), a, b, found.magnitude, found.scale, config, start)


def _full(model: nn.Module, file: AdapterFile, named: Iterable[str], read: AdapterFile) -> dict[str, nn.Parameter]:
    """The parameters trained in full: those `named`, and the copies among them that `read` has beside its adapter.

    A copy that says the same of what is tied is the same parameter, which PEFT trains as one.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    full: dict[str, nn.Parameter] = {}
    for key in dict.fromkeys((*named, *file.full)):
        here, tensor = parameters[key], file.full[key]
        twins = [p for other, p in full.items() if parameters[other] is here and torch.equal(file.full[other], tensor)]
        if twins and key not in read.full:
            full[key] = twins[0]
        else:
            full[key] = nn.Parameter(tensor.to(here.device, here.dtype, copy=True))
    return full


def check_fit(model: nn.Module, file: AdapterFile, grown: Mapping[str, Tensor] | None = None) -> float:
    """Check that a file is for this model; how far the base weights are from those it was trained on, relative.

    Args:
        model: the base model, with its own parameters in place.
        file: the adapter.
        grown: parameter path → weight that the model is going to have there instead; see `grown_embeddings`.

    Raises:
        CheckpointError: with every module that is missing in the model or in the file, of another shape, or that
            cannot be adapted.
    """
    modules, grown = dict(model.named_modules()), grown or {}
    problems: list[str] = []
    for path, tensors in file.modules.items():
        module = modules.get(path)
        if module is None:
            close = nearest(path, modules) if len(problems) < _SHOWN else []
            problems.append(f"{path}: no such module" + (f"; nearest: {close[0]}" if close else ""))
        elif (reason := cannot_adapt(module)) is not None:
            problems.append(f"{path}: {reason}")
        elif isinstance(module, nn.Embedding) != tensors.embedding:
            problems.append(f"{path}: the file and the model disagree whether this is an embedding")
        else:
            weight = grown.get(f"{path}.weight")
            w_OI = base_weight(module) if weight is None else weight.T if tensors.embedding else weight
            expected = tuple(w_OI.shape)
            found = (tensors.b.shape[0], tensors.a.shape[1])
            if found != expected:
                problems.append(f"{path}: made for a weight of {found} (out, in); here it is {expected}")
            elif file.mlx and tensors.embedding and is_tied(model, module):
                problems.append(f"{path}: MLX adapts the output head with this embedding, whose weight it shares")
    problems += [
        f"{path}: named by the targets, but the file holds nothing for it" for path in _left_out(modules, file)
    ]
    parameters = {**dict(model.named_parameters(remove_duplicate=False)), **grown}
    for key, tensor in {**file.base_copies, **file.full}.items():
        if key not in parameters:
            problems.append(f"{key}: no such parameter")
        elif parameters[key].shape != tensor.shape:
            problems.append(f"{key}: {tuple(tensor.shape)} in the file, {tuple(parameters[key].shape)} in the model")
            if key in end_weights(model):
                problems[-1] += " (with other numbers of tokens merge it, or load it onto a model without adapters)"
    sizes = {path: len(weight) for path, weight in grown.items()}
    problems += rows_problems(model, file.token_rows, sizes)
    problems += missing_in_full(file, parameters) + bias_problems(model, file)
    if not problems:
        problems += [
            f"{key}: the file carries a changed base weight, for which there is no place beside the base; merge it "
            "(theodora merge), or train it as one of modules_to_save instead"
            for key in changed_copies(model, file, grown)
        ]
    if problems:
        raise CheckpointError(
            f"The adapter in {file.path} was made for another model"
            + (f" ({file.base_model})" if file.base_model else "")
            + (f", for {file.task}" if file.task not in (None, task_type(model, [])) else "")
            + ":"
            + bullet_list(
                problems if len(problems) <= _SHOWN else [*problems[:_SHOWN], f"and {len(problems) - _SHOWN} more"]
            )
        )
    distance = check_base(file, lambda path: sample_base(modules[path]) if path in modules else None)
    if distance > 0.02:
        warnings.warn(
            f"The base weights are {distance:.1%} away from those that the adapter in {file.path} was trained on: "
            "quantised, or trained further? The adapter may not do what it did.",
            stacklevel=3,
        )
    return distance


def _left_out(modules: dict[str, nn.Module], file: AdapterFile) -> list[str]:
    """Modules that the file's configuration targets and that its tensors leave out: a part of it is lost."""
    config = file.config
    if config.targets == "all-linear":
        return []
    full = {path.rpartition(".")[0] for path in file.full}
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
        and not any(path == whole or path.startswith(whole + ".") for whole in full)
    ]


def is_tied(model: nn.Module, embedding: nn.Module) -> bool:
    """Whether the output head shares the embedding's weight."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    return head is not None and head is not embedding and head.weight is embedding.weight
