"""An adapter's magnitudes, from its file to its slot; and what is refused on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from theodora.errors import bullet_list
from theodora.vllm_plugin.layers import DoraLayer

# PEFT writes the first; some of its older versions, and converters, the second.
_ENDINGS = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
_MISSES_SHOWN = 8


def is_magnitude(name: str) -> bool:
    """Whether a tensor of an adapter file holds magnitudes."""
    return name.endswith(_ENDINGS)


def as_lora_b(name: str) -> str:
    """The name of the lora_B beside a magnitude; any other name as it is."""
    ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
    return name if ending is None else name.removesuffix(ending) + ".lora_B.weight"


def split(
    tensors: Mapping[str, Tensor],
    parse: Callable[..., tuple[str, bool]],
    peft_helper: Any,
    options: Mapping[str, Any],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Magnitudes by vLLM's module names, in float32, and the other tensors as they are.

    Raises:
        ValueError: magnitudes that are no finite numbers, or that the adapter's configuration does not speak of.
    """
    skipped = tuple(options.get("skip_prefixes") or ())
    magnitudes: dict[str, Tensor] = {}
    problems: list[str] = []
    for name in filter(is_magnitude, tensors):
        if any(f".{prefix}" in name or name.startswith(prefix) for prefix in skipped):
            continue
        module, _ = parse(name, options.get("weights_mapper"))
        magnitudes[module] = tensors[name].detach().float().flatten()
        if not bool(torch.isfinite(magnitudes[module]).all()):
            problems.append(f"{name}: holds NaN or infinite values")
    if magnitudes and not peft_helper.use_dora:
        problems.append("it holds magnitudes, but its adapter_config.json says use_dora: false")
    if problems:
        raise ValueError("This adapter cannot be served:" + bullet_list(problems, _MISSES_SHOWN))
    return magnitudes, {name: tensor for name, tensor in tensors.items() if not is_magnitude(name)}


def keep(lora: Any, magnitudes: dict[str, Tensor], peft_helper: Any) -> None:
    """Attach the magnitudes to vLLM's adapter.

    Raises:
        ValueError: a DoRA adapter without all of them, or of another length than B.
    """
    problems: list[str] = []
    if peft_helper.use_dora:
        problems += [
            f"{name}: no magnitudes; a DoRA adapter is nothing without them"
            for name in lora.loras
            if name not in magnitudes
        ]
        for name, magnitude in magnitudes.items():
            b = getattr(lora.loras.get(name), "lora_b", None)
            if b is None or lora.loras[name].lora_a is None:
                problems.append(f"{name}: magnitudes without lora_A and lora_B")
            elif "embed" not in name and b.shape[0] != magnitude.shape[0]:
                problems.append(f"{name}: {magnitude.shape[0]} magnitudes for {b.shape[0]} output rows")
    if problems:
        raise ValueError("This adapter cannot be served:" + bullet_list(problems, _MISSES_SHOWN))
    lora.theodora_magnitudes = magnitudes
    lora.theodora_scales = {}


def check(lora: Any, manager: Any, lora_config: Any, path: str) -> None:
    """Whether every magnitude has a layer here that scales by it.

    Raises:
        ValueError: listing all that have not, and why.
    """
    magnitudes: dict[str, Tensor] = getattr(lora, "theodora_magnitudes", {})
    if not magnitudes:
        return
    problems: list[str] = []
    if lora_config.fully_sharded_loras:
        problems.append("fully sharded LoRA (--fully-sharded-loras) has no DoRA: start vLLM without it")
    holders = {part: holder for holder, parts in manager.packed_modules.items() for part in parts}
    for name, magnitude in magnitudes.items():
        holder = name if name in manager.modules else holders.get(name)
        if holder is None:
            if not _pipelined():  # another stage holds it
                problems.append(f"{name}: this server adapts no such layer (--lora-target-modules?)")
        else:
            problem = _unfit(manager.modules.get(holder), magnitude, single=holder == name)
            if problem:
                problems.append(f"{name}: {problem}")
    if problems:
        raise ValueError(f"The DoRA adapter {path} cannot be served here:" + bullet_list(problems, _MISSES_SHOWN))


def fill_slot(manager: Any, lora: Any, index: int) -> None:
    """Put an adapter's g into slot `index` of every layer; computed the first time, and kept with the adapter."""
    magnitudes: dict[str, Tensor] = getattr(lora, "theodora_magnitudes", {})
    if not magnitudes:
        return
    for name, module in manager.modules.items():
        if not isinstance(module, DoraLayer):
            continue
        kept = lora.theodora_scales.get(name)
        if kept is None:
            own = magnitudes.get(name)
            parts = [magnitudes.get(part) for part in manager.packed_modules.get(name, ())]
            if own is None and not any(part is not None for part in parts):
                continue
            kept = module.compute_scales(index, own if own is not None else parts, lora.id)
            lora.theodora_scales[name] = [None if g is None else g.cpu() for g in kept]
        module.set_scales(index, kept)


def _unfit(module: Any, magnitude: Tensor, *, single: bool) -> str | None:
    if not isinstance(module, DoraLayer):
        kind = type(getattr(module, "base_layer", module)).__name__
        return f"DoRA on {kind} (embeddings, output heads, experts) is not supported: merge the adapter instead"
    return module.unfit()


def _pipelined() -> bool:
    from vllm.distributed import get_pp_group

    return get_pp_group().world_size > 1
