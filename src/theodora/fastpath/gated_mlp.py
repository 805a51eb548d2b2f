"""Gated MLPs of any model family, down(act(gate(x)) ⊙ up(x)), recognised by what they compute, run as one step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from theodora.fastpath.groups import FastLinear, has_hooks, lie_still, parts_that_fit, stack_weights
from theodora.kernels import Parts
from theodora.kernels.gated import ACTIVATIONS, activate
from theodora.kernels.gated_mlp import UNSTACKED, Stacks, gated_mlp
from theodora.layers.base_weights import weight_in
from theodora.layers.kinds import is_linear
from theodora.layers.swap import Swapped, swap_back, swap_class

# Names of gate, up and down; where gate and up are one layer (Phi-3, GLM), its upper half is the gate.
_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("gate_up_proj", "down_proj"))


class GatedMLP(Swapped):
    """Mixed in before an MLP's own class; runs the fused step wherever its layers can take it."""

    prefix = "Fused"
    _theodora_gated: tuple[tuple[str, ...], str]
    _theodora_stacks: Stacks

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the module's own forward computes, (…, I), for the same arguments."""
        if kwargs or len(args) != 1:
            return super().forward(*args, **kwargs)
        (x,) = args
        names, activation = self._theodora_gated
        modules = [getattr(self, name) for name in names]
        children = list(self._modules.values())  # the activation's hooks count, too
        if torch.compiler.is_compiling() or has_hooks(children):
            return super().forward(x)
        found = parts_that_fit(x, [_fast(module) for module in modules])
        if found is None:
            return super().forward(x)
        if not lie_still(found):
            self.__dict__["_theodora_stacks"] = UNSTACKED  # as in `Group.output`
        *inner, down = found
        gate, up = inner if len(inner) == 2 else _halves(*inner)
        return gated_mlp(x, gate, up, down, activation, self._theodora_stacks)

    def __getstate__(self) -> dict[str, Any]:
        # A copy's weights are its own again.
        return {**self.__dict__, "_theodora_stacks": UNSTACKED}


def _fast(module: Any) -> FastLinear:
    return module if hasattr(module, "parts") else _Plain(module)


class _Plain:
    """A linear layer without an adapter."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def parts(self) -> Parts | None:
        """Weight and bias."""
        if not is_linear(self.module):
            return None
        return Parts(weight_in(self.module, self.module.weight, transposed=False), self.module.bias)


def _halves(both: Parts) -> tuple[Parts, Parts]:
    """Gate and up, where one layer computes both from one A."""
    features = both.weight.shape[0] // 2

    def split(t: Tensor | None) -> Sequence[Tensor | None]:
        return (None, None) if t is None else t.split(features)

    rows = both.bias_O, both.b_OR, both.magnitude_O, both.norm_O
    first, second = (
        replace(both, weight=weight, bias_O=bias, b_OR=b, magnitude_O=magnitude, norm_O=norm)
        for weight, bias, b, magnitude, norm in zip(both.weight.split(features), *map(split, rows), strict=True)
    )
    return first, second


def fuse_mlp(module: nn.Module) -> bool:
    """Make `module` run as one step, in place, if it is a gated MLP; say whether it is one."""
    if isinstance(module, GatedMLP):
        return True
    with torch.random.fork_rng(devices=[]):
        found = _gated(module)
    if found is None:
        return False
    swap_class(module, GatedMLP)
    *inner, down = (_fast(getattr(module, name)) for name in found[0])
    module.__dict__["_theodora_gated"] = found
    module.__dict__["_theodora_stacks"] = Stacks(stack_weights(inner, parts=2), stack_weights([down]))
    return True


def unfuse_mlp(module: GatedMLP) -> None:
    """Undo `fuse_mlp`."""
    swap_back(module, GatedMLP)
    for stack in module._theodora_stacks:  # pyright: ignore[reportPrivateUsage]
        if stack is not None:
            stack.dissolve()
    del module._theodora_gated, module._theodora_stacks  # pyright: ignore[reportPrivateUsage]


@torch.no_grad()
def _gated(module: nn.Module) -> tuple[tuple[str, ...], str] | None:
    """The names of its layers and its activation, found by running the module's own forward in miniature."""
    for names in _NAMES:
        children = [module._modules.get(name) for name in names]  # pyright: ignore[reportPrivateUsage]
        if "forward" in module.__dict__ or not all(_is_product(child) for child in children):
            continue
        layers = [nn.Linear(4, 12 // (len(names) - 1), bias=False, device="cpu") for _ in names[1:]]
        layers.append(nn.Linear(6, 4, bias=False, device="cpu"))
        generator = torch.Generator().manual_seed(0)
        for layer in layers:
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator, device="cpu", dtype=torch.float32)
        # Large rows show a limit on what the activation gives (as in Step and DeepSeek-V4).
        x = torch.randn(1, 5, 4, generator=generator, device="cpu", dtype=torch.float32)
        x = torch.cat([x, 30 * x, 1000 * x], dim=1)
        others = {**module._modules, **dict(zip(names, layers, strict=True))}  # pyright: ignore[reportPrivateUsage]
        found = [_in_miniature(module, others, x, training) for training in (False, True)]
        gate, up = torch.cat([layer(x) for layer in layers[:-1]], dim=-1).chunk(2, dim=-1)
        for activation in ACTIVATIONS:
            expected = layers[-1](activate(gate, activation) * up)
            if all(y is not None and y.shape == expected.shape and torch.allclose(y, expected) for y in found):
                return names, activation
    return None


def _in_miniature(module: nn.Module, children: dict[str, Any], x: Tensor, training: bool) -> Tensor | None:
    """What the module gives with other children; in training there may be dropout."""
    probe = copy.copy(module)
    probe.__dict__["_modules"] = {name: copy.copy(child) for name, child in children.items()}
    for part in (probe, *probe._modules.values()):  # pyright: ignore[reportPrivateUsage]
        if part is not None:
            part.__dict__["training"] = training
    try:
        found: Any = type(module).forward(probe, x)
    except Exception:  # whatever a stranger's forward raises: it is no gated MLP
        return None
    return found if isinstance(found, Tensor) else None


def _is_product(module: nn.Module | None) -> bool:
    """Whether the module is a linear layer, with an adapter (ours or another library's) or without."""
    return module is not None and (is_linear(module) or hasattr(module, "parts"))


__all__ = ["FastLinear", "GatedMLP", "fuse_mlp", "unfuse_mlp"]
