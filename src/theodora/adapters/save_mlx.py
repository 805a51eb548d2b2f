"""Adapters in MLX's files, as mlx-lm writes and reads them: `adapter_config.json` and `adapters.safetensors`.

    <path>.lora_a    (I, R)     Aᵀ
    <path>.lora_b    (R, O)     Bᵀ
    <path>.m         (O,)       DoRA's magnitude

All modules have one rank and one scale. `load_adapter` reads such folders through the same checks as PEFT's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from theodora.adapters.check import is_tied
from theodora.adapters.fingerprints import layers_fingerprint
from theodora.adapters.save import write_adapter
from theodora.adapters.state import active_name, adapter_layers, originals_in_place, require_state
from theodora.adapters.token_rows import own_rows
from theodora.errors import CheckpointError, ConfigError, bullet_list
from theodora.files.finite import not_finite
from theodora.files.mlx import to_mlx_name
from theodora.files.names import CONFIG_NAME, FINGERPRINT_KEY, METADATA_KEY, MLX_WEIGHTS_NAME, WEIGHTS_NAME
from theodora.functional import dora_norm, wide_dtype
from theodora.layers import AdapterLayer
from theodora.layers.experts import ExpertParameter
from theodora.layers.token_rows import unmerged_weight


def save_mlx(model: nn.Module, path: str | Path, name: str | None = None) -> None:
    """Save one adapter in MLX's files, whole or not at all: `mlx_lm.generate --adapter-path` reads them.

    Smaller ranks are filled up with zeros to the largest, and scales that differ go into B; what the adapter does stays
    the same.

    Args:
        model: carries the adapter.
        path: the folder; other files in it are left alone.
        name: which adapter; by default the active one.

    Raises:
        ConfigError: there is no such adapter, or it does what MLX's files cannot say; nothing was written.
        CheckpointError: a tensor holds NaN or infinite values, or the folder cannot be written.
    """
    state = require_state(model, name)
    name = active_name(state, name)
    layers = adapter_layers(model, name)
    path = Path(path)
    if (path / WEIGHTS_NAME).exists():
        raise ConfigError(
            f"{path} holds an adapter in PEFT's files, whose {CONFIG_NAME} would be lost; choose another."
        )
    with torch.no_grad(), originals_in_place(model):
        problems = [f"{key}: trained in full, for which MLX's files have no place" for key in state.full[name]]
        problems += [
            f"{at}: rows of single tokens, for which MLX's files have no place" for at in own_rows(model, name)
        ]
        problems += [f"{at}: {problem}" for at, layer in layers.items() if (problem := _unfit(model, layer, name))]
        if state.resized:
            problems.append("the embeddings were resized for an adapter; for new tokens MLX's files have no place")
        if problems:
            raise ConfigError(f"Adapter {name!r} cannot be saved for MLX:" + bullet_list(problems))
        fingerprint = layers_fingerprint(model, layers)
    adapters: dict[str, Any] = {at: layer.adapters[name] for at, layer in layers.items()}
    rank = max(len(adapter.factors()[0]) for adapter in adapters.values())
    scale = next(iter(adapters.values())).scale
    tensors: dict[str, Tensor] = {}
    kind = _model_type(model)
    for at, adapter in adapters.items():
        tensors |= _tensors(to_mlx_name(at, kind), adapter, rank, scale)
    bad = not_finite(tensors.items())
    if bad:
        raise CheckpointError(f"Adapter {name!r} holds NaN or infinite values and was not saved:" + bullet_list(bad))
    hf_config: Any = getattr(model, "config", None)
    fields = {
        "fine_tune_type": state.configs[name].method,
        "model": getattr(hf_config, "_name_or_path", "") or None,
        "num_layers": -1,  # all; modules that the file leaves out do nothing there
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": state.configs[name].dropout,
            "keys": sorted({mlx_key(to_mlx_name(at, kind)) for at in layers}),
        },
    }
    config = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    metadata = {"format": "mlx", METADATA_KEY: json.dumps({FINGERPRINT_KEY: fingerprint})}
    write_adapter(path, MLX_WEIGHTS_NAME, tensors, metadata, config)


def _model_type(model: nn.Module) -> str:
    """What config.json of the model's folder says: that of the whole model, where only its language model is loaded."""
    config: Any = getattr(model, "config", None)
    own = getattr(config, "model_type", "")
    name = getattr(config, "_name_or_path", "")
    if not name:
        return own
    try:
        stored, _ = PreTrainedConfig.get_config_dict(name, local_files_only=True)
    except (OSError, ValueError):
        return own
    return stored.get("model_type", own)


def _unfit(model: nn.Module, layer: AdapterLayer, name: str) -> str | None:
    """Why MLX's files cannot say what this layer's adapter does, if they cannot."""
    adapter: Any = layer.adapters[name]
    if isinstance(layer, ExpertParameter):
        return "experts, which are not written for MLX; merge instead (export --to hf)"
    head = getattr(model, "get_output_embeddings", lambda: None)()
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if isinstance(layer, nn.Embedding):
        if adapter.magnitude is not None:
            return "MLX gives each token of an embedding a magnitude, DoRA here each output feature (see to_lora)"
        if is_tied(model, layer):
            return "MLX would adapt the output head with it, whose weight it shares"
    elif layer is head and embedding is not None and unmerged_weight(layer) is unmerged_weight(embedding):
        return "its weight is the embedding's, and MLX then has no such layer"
    if adapter.magnitude is not None:
        a, b = adapter.factors()
        if bool((dora_norm(layer.base_weight.dense(), a, b, adapter.scale) == 0).any()):
            return "an adapted row is all zeros, for which MLX divides by zero"
    return None


def _tensors(path: str, adapter: Any, rank: int, scale: float) -> dict[str, Tensor]:
    a, b = (t.detach().cpu() for t in adapter.factors())
    wide = wide_dtype(b.dtype)
    lora_a, lora_b = a.new_zeros(a.shape[1], rank, dtype=wide), b.new_zeros(rank, b.shape[0], dtype=wide)
    lora_a[:, : a.shape[0]].copy_(a.T)
    lora_b[: b.shape[1]].copy_(b.T.to(wide) * (adapter.scale / scale))
    tensors = {f"{path}.lora_a": lora_a, f"{path}.lora_b": lora_b}
    if adapter.magnitude is not None:
        tensors[f"{path}.m"] = adapter.magnitude.detach().to("cpu", copy=True)
    return tensors


def mlx_key(path: str) -> str:
    """The name by which mlx-lm finds a module: within its block, or else from the top."""
    number = re.search(r"\.\d+\.", path)
    return path[number.end() :] if number else path
