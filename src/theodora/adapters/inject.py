"""Putting a new adapter on a model."""

from __future__ import annotations

import math
import os

from torch import nn

from theodora.adapters.fingerprints import note_fingerprint
from theodora.adapters.heads import with_heads
from theodora.adapters.new_tokens import new_token_indices, tokens_before
from theodora.adapters.state import (
    STATE,
    AdapterState,
    Model,
    active_name,
    check_name,
    find_state,
    full_parameters,
    new_low_rank,
    originals_in_place,
    require_state,
    set_adapter,
)
from theodora.adapters.targets import find_targets
from theodora.adapters.token_rows import add_token_rows, new_rows
from theodora.adapters.trainer_hooks import add_hooks
from theodora.adapters.trainers import teach_trainers
from theodora.config import AdapterConfig
from theodora.errors import ConfigError, bullet_list
from theodora.fastpath.accelerate import check_fast_path, off_the_fast_path
from theodora.layers import LowRank, adapt, base_weight, start_values
from theodora.layers.experts import place_at
from theodora.layers.token_rows import TokenRows


def inject_adapter(model: Model, config: AdapterConfig | None = None, name: str = "default") -> Model:
    """Put a new adapter on `model`, in place, freeze everything else, and make the adapter the active one.

    The model's outputs are unchanged until the adapter is trained. The trained tensors are the parameters that ask
    for gradients afterwards. Where the embeddings were resized since the model was loaded, the rows of the new tokens
    are among them, and saved with the adapter. So are the heads of models for a task (`score`, `classifier`,
    `qa_outputs`, …), in full, unless `targets` names them.

    Example:
        `model = inject_adapter(AutoModelForCausalLM.from_pretrained(...), AdapterConfig(rank=16))`

    Args:
        model: any `nn.Module`; a transformers model stays one. `model.save_pretrained` then saves the adapter.
        config: what to adapt and how; by default DoRA of rank 8 on all linear layers.
        name: by which the adapter is known in `set_adapter` and the other functions.

    Returns:
        The same model.

    Raises:
        ConfigError: the name is taken, the configuration does not fit the model, or another library has put a class of
            its own on top of one of ours (FSDP2's `fully_shard`, say); nothing was changed.
    """
    state = find_state(model) or AdapterState()
    check_name(state, name)
    config = with_heads(model, config or AdapterConfig())
    if config.method == "full":
        raise ConfigError(
            "method is full, which is no adapter: theodora.train trains all weights, or a loop of your own."
        )
    paths = find_targets(model, config)
    with originals_in_place(model):
        adapters = _build(model, config, paths)
        added = new_token_indices(model, config, paths)
        rows = new_rows(model, config, added, paths)
    full = {path: nn.Parameter(p.detach().clone()) for path, p in full_parameters(model, config, state).items()}

    add_adapter(model, name, config, adapters, full, rows)
    require_state(model).resized |= tokens_before(model) is not None
    return set_adapter(model, name)


def add_adapter(
    model: nn.Module,
    name: str,
    config: AdapterConfig,
    adapters: dict[str, LowRank],
    full: dict[str, nn.Parameter],
    rows: dict[str, TokenRows] | None = None,
) -> None:
    """Hang finished tensors on the model under `name`, inactive and frozen; nothing in here can fail half-way."""
    check_fast_path(model)
    state = find_state(model)
    if state is None:
        trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        state = AdapterState(trainable_before=trainable)
        setattr(model, STATE, state)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with off_the_fast_path(model):
        for path, adapter in adapters.items():
            adapt(place_at(model, path)).add_adapter(name, adapter)
    add_token_rows(model, name, rows or {}, full)
    for path in full:
        state.originals.setdefault(path, model.get_parameter(path))
    state.full[name] = full
    state.configs[name] = config
    note_fingerprint(model, name)
    add_hooks(model)
    teach_trainers(model)


def train_heads(model: nn.Module) -> None:
    """Let the active adapter train the heads of a model for a task, too, where it was made for a language model."""
    state = require_state(model)
    name = active_name(state, None)
    config, full = with_heads(model, state.configs[name]), state.full[name]
    for path, parameter in full_parameters(model, config, state).items():
        if path not in full:
            full[path] = nn.Parameter(parameter.detach().clone())
            state.originals.setdefault(path, parameter)
    state.configs[name] = config
    set_adapter(model, name)


def _build(model: nn.Module, config: AdapterConfig, paths: list[str]) -> dict[str, LowRank]:
    """New tensors for every target; the model is not touched."""
    _check_memory(model, config, paths)
    adapters: dict[str, LowRank] = {}
    problems: list[str] = []
    for path in paths:
        module = place_at(model, path)
        rank = config.rank_of(path)
        scale = config.scale(rank, config.alpha_of(path))
        try:
            a, b, start = start_values(config.init, base_weight(module), rank, scale, isinstance(module, nn.Embedding))
        except ValueError as error:
            problems.append(f"{path}: {error}")
            continue
        adapters[path] = new_low_rank(module, a, b, None, scale, config, start)
    if problems:
        raise ConfigError("The adapter does not fit this model:" + bullet_list(problems))
    return adapters


def _check_memory(model: nn.Module, config: AdapterConfig, paths: list[str]) -> None:
    """Raise a ConfigError if the tensors of an adapter (a rank of 10⁹?) cannot fit into this machine."""
    shapes: dict[str, tuple[int, ...]] = {path: base_weight(place_at(model, path)).shape for path in paths}
    needed = sum(4 * math.prod(s[:-2]) * config.rank_of(path) * sum(s[-2:]) for path, s in shapes.items())
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        most = max(min(shape[-2:]) for shape in shapes.values())
        largest = max(config.rank_of(path) for path in paths)
        raise ConfigError(
            f"An adapter of rank {largest:,} on {len(paths)} modules takes {needed / 1e9:,.0f} GB; this machine has "
            f"{there / 1e9:,.0f} GB. Ranks above the weights' own ({most:,}) add nothing."
        )
