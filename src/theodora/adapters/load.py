"""Loading an adapter from its folder onto a model."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from theodora.adapters.biases import sums_of_biases
from theodora.adapters.check import check_fit, low_rank_of
from theodora.adapters.embeddings import changed_copies_in_full, resize_embeddings, resized_embeddings
from theodora.adapters.inject import add_adapter
from theodora.adapters.load_report import LoadReport, report_of
from theodora.adapters.new_tokens import tokens_before
from theodora.adapters.origin import remember_origin
from theodora.adapters.renamed import in_names_of, left_out_note
from theodora.adapters.save import LOG
from theodora.adapters.state import (
    AdapterState,
    Model,
    active_name,
    adapter_layers,
    check_name,
    find_state,
    full_parameters,
    originals_in_place,
    require_state,
    set_adapter,
)
from theodora.adapters.targets import target_names
from theodora.adapters.token_rows import loaded_rows
from theodora.config import AdapterConfig, AdapterDtype
from theodora.fastpath.accelerate import check_fast_path
from theodora.files.adapter import AdapterFile, read_adapter
from theodora.layers.libraries import prepare


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
        ConfigError: the name is taken, or another library has put a class of its own on top of one of ours (FSDP2's
            `fully_shard`, say).
    """
    return _load(model, path, name, trainable)


def _load(model: Model, path: str | Path, name: str, trainable: bool, **changes: Any) -> Model:
    """`load_adapter`, with other values of the adapter's configuration."""
    check_name(find_state(model) or AdapterState(), name)
    return load_file(model, read_adapter(path, for_model=True), name, trainable, **changes)


def load_file(model: Model, file: AdapterFile, name: str, trainable: bool = False, **changes: Any) -> Model:
    """The same of a file that was read already, `for_model`."""
    state = find_state(model) or AdapterState()
    check_name(state, name)
    check_fast_path(model)
    prepare(model)
    read = in_names_of(model, file)
    if read.left_out:
        warnings.warn(left_out_note(read), stacklevel=2)
    with originals_in_place(model):
        # Adapters that are on the model have tensors of its present sizes: it is not resized under them.
        resized = {} if state.configs else resized_embeddings(model, read)
        file = changed_copies_in_full(model, read, resized)
        config = replace(original_config(file), **changes)
        distance = check_fit(model, file, resized)
        has_new_tokens = bool(file.token_rows) and tokens_before(model) is not None
        file = replace(file, full={**file.full, **sums_of_biases(model, file)})
        tokens = resize_embeddings(model, resized)
        adapters = {module: low_rank_of(model, module, file, config) for module in file.modules}
        full = _full(model, file, full_parameters(model, config, state), read)
    _warn_of_other_branches(model, read)
    read_or_bias = {key for key in file.full if key in read.full or key.endswith(".bias")}
    modules_in_full = {key.rpartition(".")[0] for key in file.full.keys() - read_or_bias}
    config = replace(config, modules_to_save=(*config.modules_to_save, *sorted(modules_in_full)))
    rows = loaded_rows(model, file.token_rows, config)
    add_adapter(model, name, config, adapters, full, rows)
    require_state(model).resized |= has_new_tokens or tokens is not None
    set_adapter(model, name)
    if not trainable:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    report = replace(report_of(name, file, config, distance), tokens=tokens)
    require_state(model).loaded[name] = report
    remember_origin(model, name, file)
    LOG.log(logging.INFO if tokens is None else logging.WARNING, "Loaded %s", report)
    return model


def _warn_of_other_branches(model: nn.Module, file: AdapterFile) -> None:
    """Say where PEFT trained another function than it merges: its A knows no dilation and pads with zeros."""
    if file.fingerprint is not None or file.trained_on is not None:  # ours
        return
    convolutions: dict[str, Any] = {
        path: model.get_submodule(path) for path, t in file.modules.items() if t.filter_shape
    }
    odd = [
        path
        for path, conv in convolutions.items()
        if any(k > 1 and dilation > 1 for k, dilation in zip(conv.kernel_size, conv.dilation, strict=True))
        or conv.padding_mode != "zeros"
    ]
    if odd:
        warnings.warn(
            f"{file.path}: PEFT runs the low-rank branch of a convolution without its dilation and its padding mode, "
            f"which {', '.join(odd[:3])}{', …' if len(odd) > 3 else ''} have: it was trained as another function than "
            "PEFT merges. Here it does what PEFT's merged weights do.",
            stacklevel=4,
        )


def load_report(model: nn.Module, name: str | None = None) -> LoadReport | None:
    """What `load_adapter` put on the model under that name; None for an adapter that was not loaded.

    Raises:
        ConfigError: there is no such adapter.
    """
    state = require_state(model, name)
    return state.loaded.get(active_name(state, name))


def load_to_train(model: nn.Module, path: str | Path, *, dropout: float, dtype: AdapterDtype) -> AdapterConfig:
    """`load_adapter` for training on, with another dropout and storage of A and B; what the model carries then."""
    _load(model, path, "default", True, dropout=dropout, adapter_dtype=dtype)
    paths = list(adapter_layers(model, "default"))
    return replace(require_state(model).configs["default"], targets=tuple(target_names(model, paths)) or "all-linear")


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


def _full(model: nn.Module, file: AdapterFile, named: Iterable[str], read: AdapterFile) -> dict[str, nn.Parameter]:
    """The parameters trained in full: those that `named` lists, and those that were copies in the file `read`.

    Equal copies of weights that are tied become one parameter, as PEFT trains them.
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
