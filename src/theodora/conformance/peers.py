"""PEFT as the suite's operations see it: by its public functions, with its defaults."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from theodora.conformance.cases import (
    ALPHA,
    ALPHA_PATTERN,
    KINDS,
    RANK,
    RANK_PATTERN,
    Specimen,
    Variant,
    stored_weight,
    weight_of,
)
from theodora.conformance.mixture import PARAMETER, blocked, shaped
from theodora.conformance.trial import NotOfferedError, OneKindError


@contextmanager
def _recorded_draws() -> Iterator[list[Tensor]]:
    """What torch.bernoulli draws inside the block: DARE's choices."""
    draw, drawn = torch.bernoulli, list[Tensor]()

    def recording(*args: Any, **kwargs: Any) -> Tensor:
        drawn.append(draw(*args, **kwargs))
        return drawn[-1]

    torch.bernoulli = recording
    try:
        yield drawn
    finally:
        torch.bernoulli = draw


class Peft:
    """A specimen in a `PeftModel`; see `Library`."""

    drops_lookups = False
    drops_scaled_base = True
    draws: list[Any]

    def __init__(self, model: Specimen, variant: Variant, kinds: tuple[str, ...]) -> None:
        if any(weight_of(model.get_submodule(kind)).stored == "float8" for kind in KINDS):
            raise NotOfferedError("PEFT takes no float8 weights")
        self.model: nn.Module = model
        self.variant, self.kinds = variant, kinds

    def config(self) -> LoraConfig:
        """The variant as a configuration."""
        v = self.variant
        inits: dict[str, Any] = {"default": True}
        return LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,  # pyright: ignore[reportArgumentType]  (PEFT takes any number)
            target_modules=[kind for kind in self.kinds if kind != "experts"],
            target_parameters=[PARAMETER] if "experts" in self.kinds else None,
            use_dora=v.method == "dora",
            use_rslora=v.rslora,
            rank_pattern={k: r for k, r in RANK_PATTERN.items() if k in self.kinds} if v.patterns else {},
            alpha_pattern={k: a for k, a in ALPHA_PATTERN.items() if k in self.kinds} if v.patterns else {},  # pyright: ignore
            init_lora_weights=inits.get(v.init, v.init),
        )

    @property
    def peft(self) -> Any:
        """The wrapper, once there is one."""
        return self.model

    def inject(self, name: str) -> None:
        if isinstance(self.model, PeftModel):
            self.peft.add_adapter(name, self.config())
            self.activate(name)
        else:
            self.model = get_peft_model(self.model, self.config(), name)  # pyright: ignore[reportArgumentType]
        self.model.eval()

    def layer(self, kind: str) -> Any:
        model = self.peft.base_model.model if isinstance(self.model, PeftModel) else self.model
        return model.get_submodule(kind)

    def holder(self, kind: str) -> nn.Module:
        layer = self.layer(kind)
        return getattr(layer, "base_layer", layer)

    def parameters(self, kind: str, name: str) -> dict[str, nn.Parameter]:
        layer = self.layer(kind).fused if kind == "experts" else self.layer(kind)
        if kind == "embed_tokens":
            tensors = {"A": layer.lora_embedding_A[name], "B": layer.lora_embedding_B[name]}
        else:
            tensors = {"A": layer.lora_A[name].weight, "B": layer.lora_B[name].weight}
        if name in layer.lora_magnitude_vector:
            tensors["m"] = layer.lora_magnitude_vector[name].weight
        return tensors

    def start(self, kind: str, name: str) -> tuple[Tensor, Tensor] | None:
        if self.variant.init not in ("pissa", "olora") or kind == "embed_tokens":
            return None
        tensors = self.parameters(kind, name)
        if kind == "experts":
            a, b = (shaped(part, tensors[part].detach().to("cpu", torch.float64, copy=True)) for part in "AB")
            return blocked(a), blocked(b)
        return tuple(tensors[part].detach().to("cpu", torch.float64, copy=True) for part in "AB")  # pyright: ignore

    def weight(self, kind: str) -> Tensor:
        return stored_weight(self.holder(kind))

    def set_dropout(self, p: float) -> None:
        if "experts" in self.kinds:
            raise NotImplementedError("PEFT has no dropout on parameters")
        for kind in self.kinds:
            dropouts = self.layer(kind).lora_dropout
            for name in dropouts:
                dropouts[name] = nn.Dropout(p)

    def activate(self, name: str) -> None:
        self.peft.set_adapter(name)

    def disabled(self) -> AbstractContextManager[None]:
        return self.peft.disable_adapter()

    def remove(self) -> nn.Module:
        return self.peft.unload()

    def merge(self, name: str) -> None:
        self.peft.merge_adapter([name])

    def unmerge(self) -> None:
        self.peft.unmerge_adapter()

    def save(self, folder: Path, name: str) -> None:
        self.peft.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
        for file in (folder / name).iterdir():
            file.rename(folder / file.name)

    def load(self, folder: Path, name: str, trainable: bool = False) -> None:
        if isinstance(self.model, PeftModel):
            self.peft.load_adapter(folder, name, is_trainable=trainable)
            self.activate(name)
        else:
            model: Any = self.model
            self.model = PeftModel.from_pretrained(model, folder, adapter_name=name, is_trainable=trainable)
        self.model.eval()

    def load_by_transformers(self, model: nn.Module, folder: Path) -> None:
        specimen: Any = model
        specimen.load_adapter(str(folder))

    def swap(self, folder: Path, name: str) -> None:
        from peft.utils.hotswap import hotswap_adapter

        device = str(next(self.model.parameters()).device)
        hotswap_adapter(self.model, str(folder), adapter_name=name, torch_device=device)

    def mixed(self, names: Sequence[str | None], x: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.inference_mode():
            return self.model(*x, adapter_names=[name or "__base__" for name in names])

    def combine(self, names: Sequence[str], weights: Sequence[float], into: str, method: str, **options: Any) -> None:
        kind = {"ties": "ties_svd", "dare": "dare_linear_svd"}.get(method, method)
        rank = options.pop("rank", None) or (self._full_rank() if kind.endswith("_svd") else None)
        with _recorded_draws() as self.draws:
            self.peft.add_weighted_adapter(
                list(names), list(weights), into, combination_type=kind, svd_rank=rank, **options
            )
        self.draws = [(kind, name, drawn) for (kind, name), drawn in zip(self._turns(names), self.draws, strict=False)]
        self.activate(into)

    def drawn(self, kind: str, name: str, shape: Sequence[int], density: float) -> Tensor:
        mask = next(mask for k, n, mask in self.draws if (k, n) == (kind, name))
        return mask.T if kind in ("conv1d", "embed_tokens") else mask

    def trimmed(self, elements: int, density: float) -> int:
        return int(density * elements)

    def _turns(self, names: Sequence[str]) -> list[tuple[str, str]]:
        """Layers and adapters in the order in which PEFT combines them."""
        return [(kind, name) for kind in KINDS if kind in self.kinds for name in names]

    def to_lora(self, name: str, into: str) -> None:
        from peft.tuners.lora.conversion import convert_to_lora

        config, tensors = convert_to_lora(self.model, self._full_rank(), adapter_name=name)
        self.peft.add_adapter(into, config)
        set_peft_model_state_dict(self.model, tensors, adapter_name=into)
        self.activate(into)

    def _full_rank(self) -> int:
        """Of the one layer there is: PEFT takes one rank for all, which is full for each only if they are one."""
        kind, *others = self.kinds
        if others:
            raise OneKindError
        return min(stored_weight(self.holder(kind)).shape)
