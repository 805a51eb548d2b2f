"""The fast path of a whole model: what one layer alone cannot do for itself.

Adapted layers run on our kernels by themselves. Here layers that read one x are joined, gated MLPs become one step,
RMSNorms let the layers after them do without their outputs, GELU and rotary embeddings are one pass, frozen experts run
as adapted ones do, attention keeps q and k once, and attention with sinks is flash attention. Everything is recognised
by what it computes, on any model family, and falls back to the model's own code by itself wherever it does not fit (on
a CPU, under torch.compile, with hooks or dropout).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import nn
from torch.utils.checkpoint import checkpoint

from theodora.fastpath.activation import FastGELU, restore_gelu, speed_up_gelu
from theodora.fastpath.attention import restore_rotary, speed_up_rotary
from theodora.fastpath.experts import FastExperts, restore_experts, speed_up_experts
from theodora.fastpath.gated_mlp import GatedMLP, fuse_mlp, unfuse_mlp
from theodora.fastpath.groups import ATTENTION, SIBLINGS, Group
from theodora.fastpath.norm import FastRMSNorm, restore_norm, speed_up_norm
from theodora.fastpath.sinks import restore_sinks, speed_up_sinks
from theodora.kernels import SharedOutputs
from theodora.kernels.recompute import checkpoint_contexts
from theodora.layers.linear import GROUP
from theodora.layers.swap import check_reachable

Model = TypeVar("Model", bound=nn.Module)

SWAPPED = (GatedMLP, FastRMSNorm, FastGELU, FastExperts)
"""The classes that modules of a model on the fast path are given."""


@dataclass(frozen=True)
class FastPath:
    """How many modules of a model were found for each part of the fast path."""

    groups: int = 0
    mlps: int = 0
    norms: int = 0
    activations: int = 0
    experts: int = 0
    rotary: bool = False
    sinks: bool = False

    def __str__(self) -> str:
        counts = {
            "MLPs": self.mlps,
            "groups": self.groups,
            "norms": self.norms,
            "activations": self.activations,
            "blocks of experts": self.experts,
        }
        named = [f"{n} {what}" for what, n in counts.items() if n]
        named += ["rotary embeddings"] * self.rotary + ["attention with sinks"] * self.sinks
        return ", ".join(named) or "nothing"


def accelerate(model: Model) -> Model:
    """Put an adapted model on the fast path, in place. Outputs and gradients stay the same but for rounding.

    Call it after `inject_adapter` (again, after another one). It changes no parameter, buffer or name.

    Returns:
        The same model.
    """
    speed_up_model(model)
    return model


def speed_up_model(model: nn.Module) -> FastPath:
    """Do what `accelerate` does, and say what of the model is on the fast path now.

    Raises:
        ConfigError: see `restore_model`.
    """
    restore_model(model)
    modules = list(model.modules())
    mlps = sum(fuse_mlp(module) for module in modules)
    groups = sum(_group(module) for module in modules if not isinstance(module, GatedMLP))
    fused = {id(child) for module in modules if isinstance(module, GatedMLP) for child in module.children()}
    for (
        module
    ) in modules:  # a layer that nobody shares x with gets a group of its own: its weight needs spare rows, too
        if hasattr(module, "parts") and GROUP not in module.__dict__ and id(module) not in fused:
            module.__dict__[GROUP] = Group([module])  # pyright: ignore[reportArgumentType]
    norms = sum(speed_up_norm(module) for module in modules)
    activations = sum(speed_up_gelu(module) for module in modules)
    experts = sum(speed_up_experts(module) for module in modules)
    rotary = [speed_up_rotary(module) for module in modules]
    sinks = [speed_up_sinks(module) for module in modules]
    return FastPath(groups, mlps, norms, activations, experts, any(rotary), any(sinks))


def restore_model(model: nn.Module) -> None:
    """Undo `accelerate`. Other models stay on the fast path, whichever of them came first.

    Raises:
        ConfigError: another library has put a class on top of one of ours; nothing was changed.
    """
    check_fast_path(model)
    for module in model.modules():
        group = module.__dict__.pop(GROUP, None)
        if group is not None:
            group.dissolve()
        if isinstance(module, GatedMLP):
            unfuse_mlp(module)
        elif isinstance(module, FastRMSNorm):
            restore_norm(module)
        elif isinstance(module, FastGELU):
            restore_gelu(module)
        elif isinstance(module, FastExperts):
            restore_experts(module)
        restore_rotary(module)
        restore_sinks(module)


def checkpoint_activations(model: Any) -> None:
    """Recompute each block of a model of transformers in the backward pass. No dropout: no random state is kept."""
    # transformers 5.18 gave the method another name, and warns of the old one
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "preserve_rng_state": False})


def recompute_less(model: Model) -> Model:
    """Let activation checkpointing, which must be on already, keep what is dear to compute and small, in place.

    These are DoRA's norms and, of each gated MLP whose last layer has a magnitude, the last product: as much memory as
    the block's input, for a third of an MLP's forward pass. On a quantised base on a GPU it waits in the host's memory,
    page-locked (if none can be had, in every second block on the device). In a trainer of transformers,
    `gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": theodora.checkpoint_contexts}` does the same.
    Blocks that are checkpointed otherwise (reentrant, or with a context of their own) stay as they are.

    Returns:
        The same model.
    """
    for module in model.modules():
        function: Any = module.__dict__.get("_gradient_checkpointing_func")
        if not isinstance(function, partial) or function.func is not checkpoint or "context_fn" in function.keywords:
            continue
        if function.keywords.get("use_reentrant") is False:
            module.__dict__["_gradient_checkpointing_func"] = partial(function, context_fn=checkpoint_contexts)
    return model


def check_fast_path(model: nn.Module) -> None:
    """Raise a ConfigError if the model cannot be taken off the fast path, see `restore_model`."""
    check_reachable(model.named_modules(), *SWAPPED)


@contextmanager
def off_the_fast_path(model: nn.Module) -> Iterator[None]:
    """Take the model off the fast path while its layers change, and put it back on if it was there.

    Raises:
        ConfigError: see `restore_model`.
    """
    was_on = any(isinstance(m, SWAPPED) or GROUP in m.__dict__ for m in model.modules())
    if was_on:
        restore_model(model)
    yield
    if was_on and any(hasattr(m, "parts") for m in model.modules()):
        speed_up_model(model)


def _group(parent: nn.Module) -> int:
    """Join the adapted layers among the children of `parent` that read the same tensor; return how many groups."""
    count = 0
    for names in SIBLINGS:
        layers: dict[str, Any] = {n: child for n in names if hasattr(child := parent._modules.get(n), "parts")}  # pyright: ignore[reportPrivateUsage]
        if len(layers) > 1:
            rotary = names == ATTENTION and speed_up_rotary(parent)
            shared = SharedOutputs([name != "v_proj" for name in layers]) if rotary else None
            group = Group(list(layers.values()), shared)
            for layer in layers.values():
                layer.__dict__[GROUP] = group
            count += 1
    return count
