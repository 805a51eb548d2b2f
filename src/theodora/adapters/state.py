"""Which adapters a model carries, and which of them runs.

The record is an attribute of the model itself, so that it travels with copies of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from theodora.adapters.targets import find_modules_to_save
from theodora.adapters.token_rows import own_rows, switch_token_rows, token_layers
from theodora.config import AdapterConfig
from theodora.errors import ConfigError, bullet_list
from theodora.files.trained_on import TrainedOn
from theodora.functional import lora_delta, wide_dtype
from theodora.kernels.sharded_weight import is_sharded
from theodora.layers import AdapterLayer, LowRank, base_weight, start_norm
from theodora.layers.experts import place_path

Model = TypeVar("Model", bound=nn.Module)

STATE = "_theodora"
_ROWS = 1024  # of a weight that are copied to float64 at once
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Origin:
    """The base that an adapter was trained on, which its file is to name as long as nothing trains it anew."""

    base: TrainedOn
    fingerprint: dict[str, list[float]] | None
    hashes: dict[str, int]
    """Of the adapter's tensors as they were loaded."""


@dataclass
class AdapterState:
    """What Theodora put on a model."""

    configs: dict[str, AdapterConfig] = field(default_factory=dict)
    """Adapter name → its configuration, in order of arrival."""
    active: str | None = None
    merged: str | None = None
    full: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)
    """Adapter name → parameter path → its own copy of a parameter trained in full."""
    originals: dict[str, nn.Parameter] = field(default_factory=dict)
    """Parameter path → the base model's parameter, for all paths in `full`."""
    tied_before: list[Any] = field(default_factory=list)
    """Model configurations that said `tie_word_embeddings` before a merge."""
    trainable_before: set[str] = field(default_factory=set)
    """Parameters that asked for gradients before the first adapter came."""
    loaded: dict[str, Any] = field(default_factory=dict)
    """Adapter name → what `load_adapter` read from its folder."""
    origins: dict[str, Origin] = field(default_factory=dict)
    """Adapter name → the base it was trained on, of those that were loaded onto another."""
    fingerprints: dict[str, list[float]] = field(default_factory=dict)
    """Module path → a few values of its base weight as an adapter came, of some modules."""
    resized: bool = False
    """Whether an adapter brought another number of tokens: files have to bring the embeddings from then on."""


def set_adapter(model: Model, name: str | None) -> Model:
    """Make `name` the adapter that the model uses and trains; None uses the base model alone.

    Returns:
        The same model.

    Raises:
        ConfigError: there is no such adapter, or one is merged.
    """
    state = require_state(model, name)
    if state.merged is not None:
        raise ConfigError(f"Adapter {state.merged!r} is merged into the weights; call unmerge_adapter(model) first.")
    activate(model, state, name)
    for layer in adapter_layers(model).values():
        for other, adapter in layer.adapters.items():
            adapter.requires_grad_(other == name)
    for other, parameters in state.full.items():
        for parameter in parameters.values():
            parameter.requires_grad_(other == name)
        for rows in own_rows(model, other).values():
            rows.requires_grad_(other == name)
    return model


@contextmanager
def originals_in_place(model: nn.Module) -> Iterator[None]:
    """Within the block the base's parameters are in the places of those that an adapter trains in full."""
    state = find_state(model)
    if state is None or any(is_sharded(model.get_parameter(path)) for path in state.originals):
        yield  # (sharded copies cannot leave their places)
        return
    active = state.active
    activate(model, state, None)
    try:
        yield
    finally:
        activate(model, state, active)


def find_state(model: nn.Module) -> AdapterState | None:
    """What Theodora put on `model`, if anything."""
    return getattr(model, STATE, None)


def adapter_layers(model: nn.Module, name: str | None = None) -> dict[str, AdapterLayer]:
    """Module path → adapter layer, of all adapters or of one."""
    return {
        place_path(path, module): module
        for path, module in model.named_modules()
        if isinstance(module, AdapterLayer) and (name is None or name in module.adapters)
    }


def trained_tensors(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """Readable name → every tensor that training the adapter moves: A, B, magnitudes, modules trained in full."""
    state = require_state(model, name)
    name = active_name(state, name)
    tensors = {
        f"{path}.{part}": parameter
        for path, layer in adapter_layers(model, name).items()
        for part, parameter in layer.adapters[name].named_parameters()
    }
    rows = {f"{path}.token_rows": own.rows for path, own in own_rows(model, name).items()}
    return {**tensors, **rows, **full_copies(model, state, name)}


def full_copies(model: nn.Module, state: AdapterState, name: str) -> dict[str, nn.Parameter]:
    """Parameter path → the adapter's own copy; of the active one what is in place, perhaps sharded."""
    in_place = state.active == name
    return {path: model.get_parameter(path) if in_place else own for path, own in state.full[name].items()}


def active_name(state: AdapterState, name: str | None) -> str:
    """`name`, or else the active adapter, or else the only one.

    Raises:
        ConfigError: none is active and there are several.
    """
    if name is not None:
        return name
    if state.active is not None:
        return state.active
    if len(state.configs) == 1:
        return next(iter(state.configs))
    raise ConfigError(f"Which adapter? The model carries {', '.join(state.configs)}, and none is active.")


def require_state(model: nn.Module, name: str | None = None) -> AdapterState:
    """`find_state`, or a ConfigError if there is none, or none of that name."""
    state = find_state(model)
    if state is None:
        raise ConfigError("The model carries no adapter; call inject_adapter or load_adapter first.")
    if name is not None and name not in state.configs:
        raise ConfigError(f"There is no adapter {name!r}; the model carries {', '.join(state.configs)}.")
    return state


def activate(model: nn.Module, state: AdapterState, name: str | None) -> None:
    """Let the adapter `name` run (None: the base alone); which parameters ask for gradients stays.

    Raises:
        ConfigError: parameters that an adapter trains in full are sharded; nothing was changed.
    """
    stuck = [path for path in state.originals if is_sharded(model.get_parameter(path))]
    if stuck and name != state.active:
        raise ConfigError(
            "The adapter cannot be switched: what it trains in full is sharded (fully_shard), and the base's own "
            "parameters have no place beside it. Leave these parameters out of the sharding (ignored_params), or save "
            "the adapter and load it onto a new model:" + bullet_list(stuck)
        )
    for layer in adapter_layers(model).values():
        layer.active_adapter = name
    switch_token_rows(model, name)
    chosen = state.full.get(name, {}) if name is not None else {}
    for path, original in state.originals.items():
        _put_parameter(model, path, chosen.get(path, original))
    state.active = name


def _put_parameter(model: nn.Module, path: str, parameter: nn.Parameter) -> None:
    module_path, _, key = path.rpartition(".")
    module = model.get_submodule(module_path)
    present = getattr(module, key)
    # A copy that was not in place may have missed a move of the model to another device or dtype.
    if parameter.device != present.device or parameter.dtype != present.dtype:
        parameter.data = parameter.data.to(present.device, present.dtype)
    setattr(module, key, parameter)


def check_name(state: AdapterState, name: str) -> None:
    """Raise a ConfigError if no new adapter can be called `name`."""
    if not name or "." in name or "/" in name or hasattr(nn.ModuleDict(), name):
        raise ConfigError(
            f"{name!r} cannot name an adapter: it must be non-empty, without dots and slashes, and no name that torch "
            "has for something else."
        )
    if name in state.configs:
        raise ConfigError(f"The model already carries an adapter {name!r}; choose another name, or remove it first.")
    if state.merged is not None:
        raise ConfigError(f"Adapter {state.merged!r} is merged into the weights; call unmerge_adapter(model) first.")


def new_low_rank(
    module: nn.Module,
    a_RI: Tensor,
    b_OR: Tensor,
    magnitude_O: Tensor | None,
    scale: float,
    config: AdapterConfig,
    start: tuple[Tensor, Tensor] | None,
) -> LowRank:
    """An adapter for `module` in its storage dtypes, on the weight's device.

    Without a given magnitude DoRA starts at the norm the layer itself will compute, so that g is exactly 1. The
    magnitude is always wide (float32): in bfloat16 its steps would be larger than what training changes.
    """
    weight = base_weight(module)
    device, wide = weight.device, weight.rows(slice(0)).dtype
    dtype = weight.dtype if config.adapter_dtype == "base" else _DTYPES[config.adapter_dtype]
    a, b = (t.detach().to(device, dtype, copy=True) for t in (a_RI, b_OR))
    if start is not None:
        start = (start[0].detach().to(device, dtype), start[1].detach().to(device, dtype))
    adapter = LowRank(a, b, None, scale, config.dropout, start)
    if config.method == "dora":
        magnitude = _start_magnitude(module, adapter, config) if magnitude_O is None else magnitude_O
        adapter.magnitude = nn.Parameter(magnitude.detach().to(device, wide, copy=True))
    return adapter


def _start_magnitude(module: nn.Module, adapter: LowRank, config: AdapterConfig) -> Tensor:
    if config.init != "orthogonal":
        return start_norm(module, adapter)
    # B·A is zero although B is not. The factored norm would round what cancels, and the magnitude would start wrong.
    w_OI = base_weight(module).dense()
    device = "cpu" if w_OI.device.type == "mps" else None
    a, b = (factor.to(device, torch.float64) for factor in adapter.factors())

    def norms(w_OI: Tensor, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        pieces = zip(w_OI.split(_ROWS), b_OR.split(_ROWS), strict=True)
        return torch.cat([(w.to(a) + lora_delta(a_RI, b, adapter.scale)).norm(dim=1) for w, b in pieces])

    whole = norms(w_OI, a, b) if a.dim() == 2 else torch.stack(list(map(norms, w_OI, a, b)))
    return whole.to(wide_dtype(w_OI.dtype))


def full_parameters(model: nn.Module, config: AdapterConfig, state: AdapterState) -> dict[str, nn.Parameter]:
    """Parameter path → the base model's parameter, for the modules that are trained in full."""
    adapters = {id(p) for layer in adapter_layers(model).values() for p in layer.adapters.parameters()}
    adapters |= {id(p) for layer in token_layers(model).values() for p in layer.token_rows.parameters()}
    return {
        (path := f"{module_path}.{key}"): state.originals.get(path, parameter)
        for module_path in find_modules_to_save(model, config.modules_to_save)
        for key, parameter in model.get_submodule(module_path).named_parameters()
        if id(parameter) not in adapters  # another adapter's, on the same module
    }
