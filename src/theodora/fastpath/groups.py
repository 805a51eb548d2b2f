"""Layers that read one x (q, k and v; gate and up) run as one autograd step, whatever model they stand in.

The first layer of a group computes the outputs of all, and the others hand theirs out when they are called with the
very same tensor. A group whose layers turn out to read different tensors (cross-attention) dissolves itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from theodora import kernels
from theodora.autocast import autocast_dtype
from theodora.kernels import Parts, SharedOutputs, StackedWeight
from theodora.kernels.operators import runs_triton

# Names of siblings that usually read the same tensor. A wrong guess costs one pass: see `Group`.
ATTENTION = ("q_proj", "k_proj", "v_proj")
SIBLINGS = (
    ATTENTION,
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)

_NOTHING: tuple[tuple[Any, ...], dict[int, Tensor]] = (None,), {}


class FastLinear(Protocol):
    """An adapted linear layer, ours or another library's, that can tell what it computes."""

    def parts(self) -> Parts | None:
        """What the layer computes in this pass, or None if a fast path cannot stand in for it."""
        ...


class Group:
    """Several `FastLinear` modules that read the same x."""

    def __init__(self, layers: Sequence[FastLinear], shared: SharedOutputs | None = None) -> None:
        self.layers, self.shared = list(layers), shared
        self.stack = stack_weights(layers)
        # What the outputs were computed from, and those that nobody has asked for yet. One attribute, so that threads
        # that share the model (`nn.DataParallel`) cannot mix up theirs.
        self._ready: tuple[tuple[Any, ...], dict[int, Tensor]] = _NOTHING

    def output(self, layer: FastLinear, x: Tensor) -> Tensor | None:
        """The layer's output for x, or None if the layer is to compute it by itself."""
        layers = self.layers
        if torch.compiler.is_compiling() or not layers:
            return None
        key, outputs = self._ready
        ready = outputs.pop(id(layer), None)
        if ready is not None:
            if key[0] is x and key[1:] == _state(x):
                if not outputs:
                    self._ready = _NOTHING
                return ready
            self._ready = _NOTHING
            self.layers = []
            return None
        if layer is not layers[0]:
            return None
        self._ready = _NOTHING
        found = parts_that_fit(x, layers)
        if found is None:
            return None
        if not lie_still(found):
            self.stack = None  # `fully_shard` came after the fast path: let the whole weights go
        # (hooks of the first layer may write to its output where autograd does not see it)
        shared = None if has_hooks(layers[:1]) else self.shared
        first, *others = kernels.adapted_linears(x, found, stack=self.stack, shared=shared)
        if others:
            self._ready = (x, *_state(x)), {id(other): y for other, y in zip(layers[1:], others, strict=True)}
        return first

    def __getstate__(self) -> dict[str, Any]:
        # A copy's weights are its own again.
        return {"layers": self.layers, "shared": self.shared, "stack": None, "_ready": _NOTHING}

    def dissolve(self) -> None:
        """Let go of the layers; their weights get memory of their own again."""
        if self.stack is not None:
            self.stack.dissolve()
        self.layers, self.stack = [], None


def lie_still(layers: Sequence[Parts]) -> bool:
    """Whether the layers' weights stay where they are: a stack of others would hold what is no longer used."""
    return all(layer.weight.lies_still for layer in layers)


def stack_weights(layers: Sequence[FastLinear], parts: int = 1) -> StackedWeight | None:
    """Put the layers' weights into one buffer, if they are plain, frozen, on a GPU, and tied to no other module.

    One layer that runs as several `parts` has room for its A as many times.

    (A tied weight would take its other owner along, which is harmless but pointless: its gradient is not ours.)
    """
    found = [layer.parts() for layer in layers]
    weights: list[Any] = [None if one is None else one.weight.plain() for one in found]
    ranks = sum(one.a_RI.shape[0] for one in found if one is not None and one.a_RI is not None)
    ranks *= max(1, parts // len(layers))
    if not lie_still([one for one in found if one is not None]):
        return None
    for w in weights:
        plain = isinstance(w, nn.Parameter) and not w.requires_grad and w.is_contiguous() and type(w.data) is Tensor
        if not plain or not runs_triton(w) or w.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return None
    one_kind = len({(w.dtype, w.device, w.shape[1]) for w in weights}) == 1
    return StackedWeight(weights, ranks) if one_kind and len({id(w) for w in weights}) == len(weights) else None


def parts_that_fit(x: Tensor, layers: Sequence[FastLinear]) -> list[Parts] | None:
    """What the layers compute, if the GPU's kernels can do it for this x; else None."""
    if type(x) is not Tensor or not runs_triton(x) or not kernels.fast() or has_hooks(layers[1:]):
        return None
    if not torch.is_grad_enabled() and x.numel() <= kernels.decode.MOST_TOKENS * x.shape[-1]:
        return None  # each layer decodes by itself
    if autocast_dtype(x) not in (None, x.dtype):
        return None  # each layer casts x by itself
    found: list[Parts] = []
    for layer in layers:
        parts = layer.parts()
        if parts is None or parts.drops or not kernels.fits(x, parts):
            return None
        found.append(parts)
    return found


def has_hooks(modules: Sequence[Any]) -> bool:
    """Whether calling the modules would do more than their classes' forward does."""
    return any(
        module._forward_hooks  # pyright: ignore[reportPrivateUsage]
        or module._forward_pre_hooks  # pyright: ignore[reportPrivateUsage]
        or module._backward_hooks  # pyright: ignore[reportPrivateUsage]
        or module._backward_pre_hooks  # pyright: ignore[reportPrivateUsage]
        or "forward" in module.__dict__
        for module in modules
        if isinstance(module, nn.Module)
    )


def _state(x: Tensor) -> tuple[Any, ...]:
    return 0 if x.is_inference() else x._version, torch.is_grad_enabled()
