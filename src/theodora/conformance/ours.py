"""Theodora as the suite's operations see it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from theodora.adapters import (
    adapter_disabled,
    inject_adapter,
    load_adapter,
    merge_adapter,
    remove_adapter,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)
from theodora.adapters.swap_weights import swap_adapter_weights
from theodora.config import AdapterConfig
from theodora.conformance.cases import ALPHA, ALPHA_PATTERN, RANK, RANK_PATTERN, Specimen, Variant
from theodora.conformance.mixture import EXPERTS, IN, OUT, PARAMETER, blocked
from theodora.layers.experts import place_at
from theodora.merging.combine import combine_adapters
from theodora.merging.ties_dare import dare_mask
from theodora.merging.to_lora import to_lora


class Ours:
    """A specimen with adapters of ours; see `Library`."""

    drops_lookups = True
    drops_scaled_base = False

    def __init__(self, model: Specimen, variant: Variant, kinds: tuple[str, ...]) -> None:
        self.model: nn.Module = model
        self.variant, self.kinds = variant, kinds

    def config(self) -> AdapterConfig:
        """The variant as a configuration."""
        v = self.variant
        return AdapterConfig(
            method=v.method,
            rank=RANK,
            alpha=ALPHA,
            rslora=v.rslora,
            targets=tuple(map(_path, self.kinds)),
            rank_pattern=_only(RANK_PATTERN, self.kinds) if v.patterns else {},
            alpha_pattern=_only(ALPHA_PATTERN, self.kinds) if v.patterns else {},
            init=v.init,
        )

    def inject(self, name: str) -> None:
        inject_adapter(self.model, self.config(), name)

    def parameters(self, kind: str, name: str) -> dict[str, nn.Parameter]:
        adapter: Any = self.adapter(kind, name)
        tensors = {"A": adapter.lora_A, "B": adapter.lora_B, "m": adapter.magnitude}
        return {part: p for part, p in tensors.items() if p is not None}

    def start(self, kind: str, name: str) -> tuple[Tensor, Tensor] | None:
        adapter: Any = self.adapter(kind, name)
        if adapter.start_A is None:
            return None
        a, b = (start.to("cpu", torch.float64) for start in (adapter.start_A, adapter.start_B))
        return (blocked(a), blocked(b)) if kind == "experts" else (a, b)

    def layer(self, kind: str) -> nn.Module:
        return self.model.get_submodule(kind)

    def set_dropout(self, p: float) -> None:
        for kind in self.kinds:
            layer: Any = self._place(kind)
            for adapter in layer.adapters.values():
                adapter.dropout.p = p

    def adapter(self, kind: str, name: str) -> Any:
        return self._place(kind).adapters[name]

    def _place(self, kind: str) -> Any:
        return place_at(self.model, _path(kind))

    def weight(self, kind: str) -> Tensor:
        weight: Any = self._place(kind).weight
        if kind == "experts":
            return blocked(weight.detach())
        return weight.T if kind in ("conv1d", "embed_tokens") else weight

    def holder(self, kind: str) -> nn.Module:
        return self.model.get_submodule(kind)

    def activate(self, name: str) -> None:
        set_adapter(self.model, name)

    def disabled(self) -> AbstractContextManager[None]:
        return adapter_disabled(self.model)

    def remove(self) -> nn.Module:
        return remove_adapter(self.model)

    def merge(self, name: str) -> None:
        merge_adapter(self.model, name)

    def unmerge(self) -> None:
        unmerge_adapter(self.model)

    def save(self, folder: Path, name: str) -> None:
        save_adapter(self.model, folder, name)

    def load(self, folder: Path, name: str, trainable: bool = False) -> None:
        load_adapter(self.model, folder, name, trainable)

    def load_by_transformers(self, model: nn.Module, folder: Path) -> None:
        load_adapter(model, folder)

    def swap(self, folder: Path, name: str) -> None:
        swap_adapter_weights(self.model, name, folder)

    def mixed(self, names: Sequence[str | None], x: Sequence[Tensor]) -> Sequence[Tensor]:
        from theodora.serve.slotted import Routing, prepare_slots, slot

        adapters = sorted({name for name in names if name is not None})
        routing = Routing(1 + len(adapters))
        held = {(kind, name): copy.deepcopy(self.adapter(kind, name)) for kind in self.kinds for name in adapters}
        model = self.remove()
        for kind in self.kinds:
            factors = {name: held[kind, name].factors() for name in adapters}
            layer = slot(model.get_submodule(kind), routing, max(len(a) for a, _ in factors.values()))
            for i, (name, (a, b)) in enumerate(factors.items(), 1):
                adapter = held[kind, name]
                magnitudes = None if adapter.magnitude is None else [adapter.magnitude]
                (tensors,) = prepare_slots([layer], [a], [b], magnitudes, adapter.scale)
                layer.fill(i, tensors)
        slots = torch.tensor([0 if name is None else 1 + adapters.index(name) for name in names])
        tokens = x[0].shape[1]
        with torch.inference_mode():
            routing.set(slots.repeat_interleave(tokens).to(x[0].device))
            return model(*x)

    def combine(self, names: Sequence[str], weights: Sequence[float], into: str, method: str, **options: Any) -> None:
        kind: Any = {"dare": "dare_linear"}.get(method, method)
        combine_adapters(self.model, names, weights, into, kind, **options)

    def drawn(self, kind: str, name: str, shape: Sequence[int], density: float) -> Tensor:
        if kind != "experts":
            return dare_mask(shape, density, 0, f"{name}/{kind}")
        drawn = [dare_mask((OUT, IN), density, 0, f"{name}/{PARAMETER}.{e}") for e in range(EXPERTS)]
        return blocked(torch.stack(drawn).to(torch.float64))

    def trimmed(self, elements: int, density: float) -> int:
        return round(density * elements)

    def to_lora(self, name: str, into: str) -> None:
        to_lora(self.model, name, None, into)


def _path(kind: str) -> str:
    return PARAMETER if kind == "experts" else kind


def _only(pattern: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, Any]:
    return {kind: value for kind, value in pattern.items() if kind in kinds}
