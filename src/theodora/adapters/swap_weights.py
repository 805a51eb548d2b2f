"""Another adapter's weights in the memory of one that runs: nothing has to be compiled or recorded anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from theodora.adapters.check import check_fit
from theodora.adapters.load_report import LoadReport, report_of
from theodora.adapters.renamed import in_names_of
from theodora.adapters.state import adapter_layers, originals_in_place, require_state
from theodora.adapters.token_rows import rows_to_write
from theodora.config import AdapterConfig
from theodora.errors import CheckpointError, ConfigError, bullet_list
from theodora.files.adapter import AdapterFile, AdapterTensors, adapter_of, read_adapter
from theodora.files.finite import finite
from theodora.files.names import KEY_PREFIX
from theodora.functional import dora_norm, wide_dtype
from theodora.layers import AdapterLayer

_MISSES_TOLD = 20
_Writes = list[tuple[Tensor, Tensor]]


def swap_adapter_weights(
    model: nn.Module,
    name: str,
    source: str | Path | Mapping[str, Tensor],
    *,
    config: AdapterConfig | None = None,
    fewer_modules: bool = False,
) -> LoadReport:
    """Overwrite the tensors of an adapter that the model carries with another one's, in place, all or nothing.

    Every parameter keeps its memory and the layer its scale, so that code from `torch.compile` and recorded CUDA graphs
    go on and do what the other adapter does; its own scale goes into B. A smaller rank is filled up with zeros. Plain
    LoRA goes into a DoRA adapter, with the magnitudes that leave it as it is; DoRA never goes into plain LoRA. An
    optimizer's state is left as it is.

    Example:
        `swap_adapter_weights(model, "default", "runs/second")`

    Args:
        model: carries the adapter, not merged; it may be what `torch.compile` returned.
        name: which adapter.
        source: a saved adapter's folder (PEFT's or MLX's), or tensors under PEFT's keys.
        config: of tensors: gives their scale. Default: they have the scale of the layers they go into.
        fewer_modules: whether the other adapter may leave out modules of this one, which then do nothing.

    Returns:
        What was written.

    Raises:
        ConfigError: there is no such adapter, or one is merged.
        CheckpointError: the other adapter does not fit, with every miss; nothing was changed.
    """
    model = getattr(model, "_orig_mod", model)
    state = require_state(model, name)
    if state.merged is not None:
        raise ConfigError(f"Adapter {state.merged!r} is merged into the weights; call unmerge_adapter(model) first.")
    own_scale = isinstance(source, Mapping) and config is None
    file = _of_tensors(source, config, state.configs[name]) if isinstance(source, Mapping) else read_adapter(source)
    file = in_names_of(model, file)
    layers = adapter_layers(model, name)
    problems: list[str] = []
    writes: _Writes = []
    with torch.no_grad(), originals_in_place(model):
        distance = check_fit(model, file)
        problems += [f"{path}: in the other adapter, not in this one" for path in file.modules if path not in layers]
        for path, layer in layers.items():
            tensors = file.modules.get(path)
            if tensors is None and not fewer_modules:
                problems.append(
                    f"{path}: in this adapter, not in the other one (fewer_modules=True lets it do nothing)"
                )
                continue
            problem = _write(layer, name, tensors, own_scale, writes)
            if problem is not None:
                problems.append(f"{path}: {problem}")
    problems += [
        f"{key}: trained in full in the other adapter, not in this one" for key in file.full.keys() - state.full[name]
    ]
    for key, parameter in state.full[name].items():
        if key not in file.full and not fewer_modules:
            problems.append(f"{key}: trained in full in this adapter, not in the other one")
        else:
            writes.append((parameter, file.full.get(key, state.originals[key])))
    row_writes, row_problems = rows_to_write(model, name, file.token_rows, "in the other adapter than in this one")
    writes, problems = writes + row_writes, problems + row_problems
    problems += [
        f"a tensor of {tuple(mine.shape)}: values that are not finite in {mine.dtype}"
        for mine, theirs in writes
        if not finite(theirs.to(mine.dtype))
    ]
    if problems:
        raise CheckpointError(
            f"The adapter cannot take the place of {name!r}; nothing was changed:" + bullet_list(problems, _MISSES_TOLD)
        )
    with torch.no_grad():
        for mine, theirs in writes:
            mine.copy_(theirs)
        for layer in layers.values():
            if layer.active_adapter == name:
                layer.renew_inference_tensors()
    report = report_of(name, file, file.config, distance)
    state.loaded[name] = report
    return report


def _of_tensors(tensors: Mapping[str, Tensor], config: AdapterConfig | None, mine: AdapterConfig) -> AdapterFile:
    bare = not any(key.startswith(KEY_PREFIX) for key in tensors)
    keyed = {KEY_PREFIX + key if bare else key: tensor for key, tensor in tensors.items()}
    return adapter_of(
        keyed,
        replace(config or mine, targets="all-linear", exclude=()),
        Path("the given tensors"),
        any_rank=config is None,
    )


def _write(
    layer: AdapterLayer, name: str, tensors: AdapterTensors | None, own_scale: bool, writes: _Writes
) -> str | None:
    """Note what goes where in one layer, or say why it cannot."""
    adapter: Any = layer.adapters[name]
    w_OI = layer.base_weight.dense()
    wide = wide_dtype(w_OI.dtype)
    start: list[Tensor] = [] if adapter.start_A is None else [adapter.start_A]
    *experts, outputs, inputs = w_OI.shape
    room = sum(a.shape[-2] for a in (adapter.lora_A, *start))
    a = w_OI.new_zeros(*experts, room, inputs, dtype=wide)
    b = w_OI.new_zeros(*experts, outputs, room, dtype=wide)
    magnitude = None
    if tensors is not None:
        rank, magnitude = tensors.a.shape[-2], tensors.magnitude
        if rank > room:
            return f"rank {rank}; there is room for {room}. Put an adapter of that rank on the model instead"
        if magnitude is not None and adapter.magnitude is None:
            return "has magnitudes (DoRA), and the adapter here is plain LoRA"
        # The layer's scale is a number that compiled code holds, so the other one's goes into B.
        ratio = 1.0 if own_scale else tensors.scale / adapter.scale
        a[..., :rank, :].copy_(tensors.a)
        b[..., :rank].copy_(tensors.b.to(wide) * ratio)
    a, b = a.to(adapter.lora_A.dtype), b.to(adapter.lora_B.dtype)
    own = adapter.rank
    writes += [(adapter.lora_A, a[..., :own, :]), (adapter.lora_B, b[..., :own])]
    if adapter.start_A is not None:
        writes += [(adapter.start_A, a[..., own:, :]), (adapter.start_B, -b[..., own:])]
    if adapter.magnitude is not None:
        without = dora_norm(w_OI, a, b, adapter.scale) if magnitude is None else magnitude
        writes.append((adapter.magnitude, without))
    return None
