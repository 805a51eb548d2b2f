"""Which modules are linear layers, embeddings and convolutions: known by how they run, not by their names."""

from __future__ import annotations

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
