"""Which modules are linear layers, embeddings and convolutions: known by how they run, not by their names."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from theodora.layers.float8 import Float8Layer
from theodora.layers.libraries import runs_as_linear

# Falcon's is written out, and the same; float8 layers are made of linear ones only.
_FORWARDS = (nn.Linear.forward, FalconLinear.forward, Float8Layer.forward)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_linear(module: nn.Module) -> bool:
    """Whether the module runs as `nn.Linear` does. (`nn.MultiheadAttention` reads its output layer's weight itself.)"""
    if runs_as_linear(module):
        return True
    return (
        isinstance(module, nn.Linear)
        and type(module).forward in _FORWARDS
        and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    )


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module runs as GPT-2's `Conv1D` does."""
    return isinstance(module, Conv1D) and type(module).forward in (Conv1D.forward, Float8Layer.forward)


def is_embedding(module: nn.Module) -> bool:
    """Whether the module is a plain lookup, or one that multiplies its rows by `embed_scale` (Gemma)."""
    return isinstance(module, nn.Embedding) and (
        type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    )


def is_convolution(module: nn.Module) -> bool:
    """Whether the module runs as `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` does."""
    return any(
        isinstance(module, kind)
        and type(module).forward is kind.forward
        and type(module)._conv_forward is kind._conv_forward  # pyright: ignore[reportPrivateUsage]
        for kind in _CONVOLUTIONS
    )


def token_ends(model: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """A transformers model's embedding of tokens and its output head; None for what it has not.

    A vision model calls the convolution of its patches its input embedding, or has no answer at all.
    """
    ends: list[nn.Module | None] = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            end: Any = getattr(model, get, lambda: None)()
        except NotImplementedError:
            end = None
        ends.append(None if getattr(end, "weight", None) is None or is_convolution(end) else end)
    return ends[0], ends[1]
