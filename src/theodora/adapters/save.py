"""Saving an adapter of a model in PEFT's files (`files/adapter.py` has the format)."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from theodora.adapters.biases import bias_key, trained_biases
from theodora.adapters.embeddings import base_parameter, end_weights
from theodora.adapters.fingerprints import layers_fingerprint
from theodora.adapters.heads import task_type
from theodora.adapters.origin import origin_of, stored_quantised
from theodora.adapters.quantized import trained_on
from theodora.adapters.state import (
    AdapterState,
    active_name,
    adapter_layers,
    full_copies,
    originals_in_place,
    require_state,
)
from theodora.adapters.targets import parameter_names, saved_names, target_names
from theodora.adapters.token_rows import own_rows, peft_indices, token_layers
from theodora.config import AdapterConfig
from theodora.errors import CheckpointError, bullet_list
from theodora.files.atomic import atomic_directory, atomic_write
from theodora.files.convolutions import as_filters
from theodora.files.experts import expert_tensors
from theodora.files.finite import not_finite
from theodora.files.names import CONFIG_NAME, FINGERPRINT_KEY, KEY_PREFIX, METADATA_KEY, WEIGHTS_NAME
from theodora.files.ours import HASHES_KEY, hashes_of_adapter
from theodora.files.peft_config import peft_config, starts_from_weight
from theodora.files.read_back import save_tensors, write_text
from theodora.files.token_rows import DELTA
from theodora.files.trained_on import TRAINED_ON_KEY
from theodora.kernels.sharded_weight import is_sharded, whole
from theodora.layers import LowRank
from theodora.layers.base_weights import filter_shape
from theodora.layers.experts import ExpertParameter, module_path
from theodora.layers.linear import Conv1DAdapterLayer

LOG = logging.getLogger(__name__)


def save_adapter(
    model: nn.Module, path: str | Path, name: str | None = None, *, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Save one adapter in PEFT's files, whole or not at all.

    Args:
        model: carries the adapter.
        path: the folder; other files in it are left alone.
        name: which adapter; by default the active one.
        state_dict: the model's tensors, where they were gathered from several processes. Without it every process has
            to call this where the adapter itself is sharded.

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
    write_adapter(Path(path), WEIGHTS_NAME, tensors, metadata, config)


def write_adapter(
    path: Path, weights_name: str, tensors: dict[str, Tensor], metadata: dict[str, str], config: str
) -> None:
    """Write the two files of an adapter: as a new folder, or each whole into one that is there.

    Args:
        path: the folder; other files in it are left alone.
        weights_name: of the file of tensors.
        tensors: finite ones, on the CPU.
        metadata: of that file's header.
        config: the text of adapter_config.json.
    """
    if not path.exists():
        with atomic_directory(path) as folder:
            save_tensors(tensors, folder / weights_name, metadata, checked=True)
            write_text(folder / CONFIG_NAME, config)
        return
    with atomic_write(path / weights_name) as weights, atomic_write(path / CONFIG_NAME) as configuration:
        save_tensors(tensors, weights, metadata, checked=True)
        write_text(configuration, config)


def _tensors(
    model: nn.Module, state: AdapterState, name: str, state_dict: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's keys, on the CPU."""
    tensors: dict[str, Tensor] = {}
    layers, biases = adapter_layers(model, name), trained_biases(state.full[name])
    for path, layer in layers.items():
        adapter: Any = layer.adapters[name]
        if state_dict is not None:
            adapter = _gathered(adapter, state_dict, f"{module_path(path, layer)}.adapters.{name}.")
        elif any(is_sharded(parameter) for parameter in adapter.parameters()):
            adapter = _gathered(adapter, {key: whole(tensor) for key, tensor in adapter.state_dict().items()}, "")
        a, b = adapter.factors()
        if isinstance(layer, ExpertParameter):
            tensors |= expert_tensors(path, layers, a, b, adapter.magnitude)
            continue
        shape = filter_shape(layer)
        pattern = "{}.lora_embedding_{}" if isinstance(layer, nn.Embedding) else "{}.lora_{}.weight"
        tensors[pattern.format(path, "A")] = as_filters(a, "a", shape)
        tensors[pattern.format(path, "B")] = as_filters(b, "b", shape)
        if adapter.magnitude is not None:
            tensors[f"{path}.lora_magnitude_vector"] = as_filters(adapter.magnitude, "magnitude", shape)
    for path, parameter in full_copies(model, state, name).items():
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
    return {
        KEY_PREFIX + key: whole(tensor.detach()).to("cpu", copy=True).contiguous() for key, tensor in tensors.items()
    }


def _gathered(adapter: LowRank, state_dict: dict[str, Tensor], prefix: str) -> LowRank:
    """The same adapter with the tensors of `state_dict`."""
    part = {key: state_dict[prefix + key] for key in adapter.state_dict()}
    start = (part["start_A"], part["start_B"]) if "start_A" in part else None
    return LowRank(part["lora_A"], part["lora_B"], part.get("magnitude"), adapter.scale, start=start)


def _peft_config(model: nn.Module, state: AdapterState, name: str) -> dict[str, Any]:
    layers = adapter_layers(model, name)
    experts = [path for path, layer in layers.items() if isinstance(layer, ExpertParameter)]
    hf_config: Any = getattr(model, "config", None)
    base = getattr(hf_config, "_name_or_path", "") or None
    if (origin := origin_of(model, name)) is not None and stored_quantised(origin.base) != stored_quantised(
        trained_on(model)
    ):
        base = origin.base.model or base
    return peft_config(
        state.configs[name],
        target_modules=target_names(model, [path for path in layers if path not in experts]),
        target_parameters=parameter_names(experts),
        modules_to_save=saved_names(model, state.configs[name].modules_to_save),
        token_indices=peft_indices(model, name),
        base_model=base,
        task_type=task_type(model, list(layers)),
        fan_in_fan_out=any(isinstance(layer, Conv1DAdapterLayer) for layer in layers.values()),
        bias="all" if trained_biases(state.full[name]) else "none",
    )


def _metadata(model: nn.Module, config: AdapterConfig, name: str) -> dict[str, Any]:
    layers, state = adapter_layers(model, name), require_state(model)
    if state.resized:  # the base on disk has embeddings of another size: they recognise nothing
        layers = {path: layer for path, layer in layers.items() if f"{path}.weight" not in end_weights(model)}
    origin = origin_of(model, name)
    with originals_in_place(model):
        return {
            "starts": starts_from_weight(config),
            "init": config.init,
            FINGERPRINT_KEY: layers_fingerprint(model, layers) if origin is None else origin.fingerprint,
            TRAINED_ON_KEY: (trained_on(model) if origin is None else origin.base).to_json(),
        }
