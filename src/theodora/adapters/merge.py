"""Merging an adapter into the weights of a model in memory, and taking it out again, bit for bit."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from theodora.adapters.merge_check import Unmerged, check_excess
from theodora.adapters.state import Model, activate, active_name, adapter_layers, require_state, set_adapter
from theodora.adapters.token_rows import merge_token_rows, token_layers, unmerge_token_rows
from theodora.errors import CheckpointError, ConfigError, bullet_list
from theodora.files.finite import not_finite
from theodora.kernels.library_weight import LibraryWeight
from theodora.kernels.sharded_weight import is_sharded, reshard, whole
from theodora.layers import AdapterLayer
from theodora.layers.kinds import token_ends
from theodora.layers.swap import cannot_replace_weight


def merge_adapter(model: Model, name: str | None = None) -> Model:
    """Compute the weights that do what base and adapter do together, in float32, and use them, in the model's dtype.

    Each merged layer is held against the unmerged one on random inputs (`merge_check.py`).

    Under FSDP2 (`fully_shard`) every process calls this, and merges its part; weights that are tied there are refused.

    The base weights stay in memory for `unmerge_adapter`. `model.save_pretrained` saves the merged model as a plain
    one. A weight that was tied to a merged one stays as it was, and the two are no longer tied.

    A quantised base is widened: one in float8 (`quantize_base`) to the dtype it had, one of another library's to the
    dtype that its layers compute in. The result is the quantised base with the adapter, at more memory, and the
    quantised weight itself is what `unmerge_adapter` puts back. `merge_checkpoint` merges onto the original weights
    instead.

    Args:
        model: carries the adapter.
        name: which adapter; by default the active one.

    Returns:
        The same model.

    Raises:
        ConfigError: there is no such adapter, one is merged already, or another library has taken the place of a weight
            (by sharding it, say); nothing was changed.
        CheckpointError: a merged weight would not be finite, or would not do what the adapter does; nothing was
            changed.
    """
    state = require_state(model, name)
    if state.merged is not None:
        raise ConfigError(f"Adapter {state.merged!r} is merged already; call unmerge_adapter(model) first.")
    name = active_name(state, name)
    layers = adapter_layers(model, name)
    reshard(model)
    _check_places(model, name)
    if state.active != name:
        set_adapter(model, name)
    excess: dict[str, Tensor] = {}
    try:
        for path, layer in layers.items():
            unmerged = Unmerged(layer)
            layer.merge(name)
            excess[path] = unmerged.excess(layer)
        merge_token_rows(model, name)
        _check_finite(model, name)
        check_excess(excess)
    except BaseException:
        for layer in layers.values():
            layer.unmerge()
        unmerge_token_rows(model)
        raise
    _say_what_was_widened(layers.values())
    state.merged = name
    state.tied_before = _untie(model)
    return model


def _say_what_was_widened(layers: Iterable[AdapterLayer]) -> None:
    """Warn where the merged weights are not as exact as the original ones would make them."""
    bases = [layer.base_weight for layer in layers]
    formats = dict.fromkeys(
        base.format.name if isinstance(base, LibraryWeight) else base.stored for base in bases if base.stored != "plain"
    )
    if formats:
        dtypes = dict.fromkeys(str(base.dtype).removeprefix("torch.") for base in bases)
        warnings.warn(
            f"The adapter was merged into a base in {', '.join(formats)}: the merged weights are the quantised ones, "
            f"widened to {', '.join(dtypes)}. merge_checkpoint, or `theodora merge`, merges it onto the original "
            "weights.",
            stacklevel=3,
        )


def _check_places(model: nn.Module, name: str) -> None:
    """Raise a ConfigError for the modules whose weight a merged one cannot replace."""
    rows = token_layers(model, name)
    modules = {**adapter_layers(model, name), **rows}
    owners = Counter(id(tensor) for _, tensor in model.named_parameters(remove_duplicate=False) if is_sharded(tensor))
    problems = [
        f"{path}: {why}"
        for path, module in modules.items()
        if (why := _cannot_replace(module, path in rows or owners[id(module.weight)] > 1))
    ]
    if any(
        is_sharded(tensor) for layer in adapter_layers(model, name).values() for tensor in layer.adapters.parameters()
    ):
        problems.append("the adapter itself is sharded")
    if problems:
        raise ConfigError(
            "The adapter cannot be merged into this model, and nothing was changed. Save it and merge the files "
            "(merge_checkpoint), or merge it into a model as it is loaded:" + bullet_list(problems, 20)
        )


def _cannot_replace(module: Any, shared: bool) -> str | None:
    if isinstance(module, AdapterLayer):
        return cannot_replace_weight(module.holder, module.parameter_name, shared=shared)
    return cannot_replace_weight(module, shared=shared)


def _check_finite(model: nn.Module, name: str) -> None:
    """Raise a CheckpointError for merged weights that are not finite, which says whose fault it is."""
    merged: dict[str, Any] = {**adapter_layers(model, name), **token_layers(model, name)}
    bad = not_finite((path, whole(layer.weight)) for path, layer in merged.items())
    if not bad:
        return
    dtype = str(merged[bad[0]].weight.dtype).removeprefix("torch.")
    own = not_finite((path, whole(merged[path].base_parameter)) for path in bad)
    if own:
        raise CheckpointError("The base model's own weights hold NaN or infinite values:" + bullet_list(own))
    raise CheckpointError(
        f"Merged weights would hold NaN or infinite values in {dtype}: the adapter overflows, or its sum with the base "
        "is beyond that dtype's range:" + bullet_list(bad)
    )


def unmerge_adapter(model: Model) -> Model:
    """Put the base weights back, bit for bit; the adapter is active beside them again.

    Returns:
        The same model.

    Raises:
        ConfigError: no adapter is merged.
    """
    state = require_state(model)
    if state.merged is None:
        raise ConfigError("No adapter is merged.")
    reshard(model)
    for layer in adapter_layers(model).values():
        layer.unmerge()
    unmerge_token_rows(model)
    for config in state.tied_before:
        config.tie_word_embeddings = True
    state.merged, state.tied_before = None, []
    return model


def _untie(model: nn.Module) -> list[Any]:
    """Let the model's configuration say so where embedding and head no longer share their weight.

    Otherwise loading the saved model would tie them again. Returns the configurations that were changed.
    """
    embedding, head = token_ends(model)
    config: Any = getattr(model, "config", None)
    if embedding is None or head is None or config is None or embedding.weight is getattr(head, "weight", None):
        return []
    changed = []
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
            changed.append(part)
    return changed


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Run the base model alone inside the block, also while an adapter is merged.

    Raises:
        ConfigError: the model carries no adapter.
    """
    state = require_state(model)
    active, merged = state.active, state.merged
    if merged is not None:
        unmerge_adapter(model)
    activate(model, state, None)
    try:
        yield
    finally:
        activate(model, state, active)
        if merged is not None:
            merge_adapter(model, merged)
