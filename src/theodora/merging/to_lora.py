"""DoRA as plain LoRA, for programs that know nothing else: the best low-rank approximation of its change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from theodora.adapters.biases import bias_key, trained_biases
from theodora.adapters.state import active_name, adapter_layers, check_name, originals_in_place, require_state
from theodora.adapters.targets import parameter_names
from theodora.adapters.token_rows import own_rows
from theodora.config import is_int
from theodora.errors import CheckpointError, ConfigError
from theodora.files.adapter import AdapterFile, read_adapter
from theodora.files.atomic import atomic_directory
from theodora.files.base_model import BaseCheckpoint, find_base
from theodora.files.convolutions import as_filters
from theodora.files.experts import expert_tensors
from theodora.files.names import CONFIG_NAME, FINGERPRINT_KEY, KEY_PREFIX, METADATA_KEY, WEIGHTS_NAME
from theodora.files.peft_config import peft_config
from theodora.files.read_back import save_tensors, write_json
from theodora.merging.combine import add_computed, check_held, report_fit, scale_one_config, storage_dtype, wanted_by
from theodora.merging.fit import FitReport, Held, hold, wanted_of
from theodora.merging.plan import plan_merge, weight_on_disk


def to_lora(model: nn.Module, name: str | None, rank: int | None, into: str) -> FitReport:
    """Make a plain LoRA adapter that does what another one does, and make it the active one; nothing of it trains.

    W' − W of a DoRA adapter has full rank, so a lower rank approximates it: by the singular values of the true change
    of the weight, magnitudes included. Nothing of the same rank comes nearer (Eckart and Young). A LoRA adapter whose
    rank is no larger than `rank` stays as it is.

    Example:
        `to_lora(model, "default", 64, into="plain").worst`

    Args:
        model: carries the adapter, not merged.
        name: which adapter; None for the active one.
        rank: of the result, at most. None for an exact one, of up to min(out, in).
        into: the new adapter's name.

    Returns:
        Ranks and errors, module by module.

    Raises:
        ConfigError: there is no such adapter, the name is taken, or the rank is none; nothing was changed.
    """
    state = require_state(model, name)
    name = active_name(state, name)
    check_name(state, into)
    check_rank(rank)
    _refuse_rows(name, own_rows(model, name))
    held = {}
    with torch.no_grad(), originals_in_place(model):
        for path, layer in adapter_layers(model, name).items():
            w_OI, wanted = layer.base_weight.dense(), wanted_by(layer, name)
            assert wanted is not None
            held[path] = hold(w_OI, wanted, dora=False, rank=rank, dtype=storage_dtype(w_OI))
    full = {path: nn.Parameter(parameter.detach().clone()) for path, parameter in state.full[name].items()}
    return add_computed(model, into, held, full, "lora")


def _refuse_rows(name: str, rows: Mapping[str, Any]) -> None:
    if rows:
        raise ConfigError(
            f"{name} has rows of single tokens ({', '.join(rows)}), which no low rank can stand for; merge it instead"
        )


def check_rank(rank: int | None) -> None:
    """Raise a ConfigError if this is no rank."""
    if rank is not None and (not is_int(rank) or rank < 1):
        raise ConfigError(f"rank is {rank!r}; expected a whole number of at least 1, or None for an exact conversion")


def folder_to_lora(
    adapter: str | Path, output: str | Path, rank: int | None, *, base_model: str | Path | None = None
) -> FitReport:
    """`to_lora` for a saved adapter and its base on disk, layer by layer, into PEFT's files.

    Example:
        `folder_to_lora("runs/first", "runs/first-lora", 64).worst`

    Args:
        adapter: the adapter's folder (PEFT's or MLX's files).
        output: the folder to write, which must not exist; it appears whole or not at all.
        rank: of the result, at most. None for an exact one, of up to min(out, in).
        base_model: folder or hub name of the base. Default: the one that the adapter names.

    Returns:
        Ranks and errors, module by module.

    Raises:
        ConfigError: the rank is none.
        UsageError: the output is taken.
        CheckpointError: adapter and base do not fit, or a file is damaged. Nothing is written.
    """
    check_rank(rank)
    file = read_adapter(adapter)
    _refuse_rows(str(adapter), file.token_rows)
    base = BaseCheckpoint(find_base(str(base_model or file.base_model or ""), download=True), heads=file.heads)
    plan_merge(base, file, None)
    held: dict[str, Held] = {}
    transposed = False
    with atomic_directory(output) as folder, torch.no_grad():
        for path, tensors in file.modules.items():
            w_OI = _start(base, file, path)
            wanted = wanted_of(w_OI, tensors.a, tensors.b, tensors.scale, tensors.magnitude)
            held[path] = hold(w_OI, wanted, dora=False, rank=rank, dtype=storage_dtype(w_OI))
            linear = not tensors.embedding and w_OI.dim() == 2
            transposed |= linear and base.is_transposed(base.model_name(f"{path}.weight") or "")
        base.close()
        check_held(held)
        config = scale_one_config("lora", held, file.full)
        fields = peft_config(
            config,
            target_modules=sorted(path for path, h in held.items() if h.a_RI.dim() == 2),
            target_parameters=parameter_names([path for path, h in held.items() if h.a_RI.dim() == 3]),
            modules_to_save=list(config.modules_to_save),
            base_model=file.base_model,
            task_type="CAUSAL_LM",
            fan_in_fan_out=transposed,
            bias="all" if trained_biases(file.full) else "none",
        )
        metadata = {"format": "pt", METADATA_KEY: json.dumps({FINGERPRINT_KEY: file.fingerprint})}
        save_tensors(_peft_tensors(file, held), folder / WEIGHTS_NAME, metadata)
        write_json(folder / CONFIG_NAME, fields, sort_keys=True)
    return report_fit(str(output), "lora", held)


def _start(base: BaseCheckpoint, file: AdapterFile, path: str) -> Tensor:
    """The weight that the adapter adds to, (O, I): a copy that lies beside the adapter counts before the base's."""
    copy = file.base_copies.get(f"{path}.weight")
    if copy is not None:
        return copy.T if file.modules[path].embedding else copy.flatten(1)
    w_OI = weight_on_disk(base, path)
    if w_OI is None:
        raise CheckpointError(f"{path}: the base {base.folder} does not store its weight as one tensor.")
    return w_OI


def _peft_tensors(file: AdapterFile, held: dict[str, Held]) -> dict[str, Tensor]:
    biases = trained_biases(file.full)
    full = {bias_key(path, held) if path in biases else path: tensor for path, tensor in file.full.items()}
    tensors: dict[str, Tensor] = {**file.base_copies, **full}
    for path, h in held.items():
        if h.a_RI.dim() == 3:
            tensors |= expert_tensors(path, held, h.a_RI, h.b_OR, None)
            continue
        own = file.modules[path]
        pattern = "{}.lora_embedding_{}" if own.embedding else "{}.lora_{}.weight"
        tensors[pattern.format(path, "A")] = as_filters(h.a_RI, "a", own.filter_shape)
        tensors[pattern.format(path, "B")] = as_filters(h.b_OR, "b", own.filter_shape)
    return {KEY_PREFIX + key: tensor.contiguous() for key, tensor in tensors.items()}
