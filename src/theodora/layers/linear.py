"""Adapted `nn.Linear`, and GPT-2's `Conv1D`, which is a linear layer whose weight is stored as (I, O)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from theodora import kernels
from theodora.layers.base import AdapterLayer


def is_linear(module: nn.Module) -> bool:
    """Whether the module runs as `nn.Linear` does. (`nn.MultiheadAttention` reads its output layer's weight itself.)"""
    return (
        isinstance(module, nn.Linear)
        and type(module).forward in (nn.Linear.forward, FalconLinear.forward)  # Falcon's is written out, and the same
        and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    )


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module runs as GPT-2's `Conv1D` does."""
    return isinstance(module, Conv1D) and type(module).forward is Conv1D.forward


class LinearAdapterLayer(AdapterLayer):
    """y = x Wᵀ + bias, with LoRA or DoRA. Input and output (…, I) and (…, O), of one dtype, also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """The adapted product; the module's own where no adapter is active."""
        adapter = self.active
        if adapter is None:
            return super().forward(x)
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return self._adapted(x, self.weight_OI, self.bias)
        dtype = torch.get_autocast_dtype(device)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return self._adapted(x.to(dtype), self.weight_OI.to(dtype), bias).to(x.dtype)

    def _adapted(self, x: Tensor, w_OI: Tensor, bias: Tensor | None) -> Tensor:
        adapter = self.active
        assert adapter is not None
        a, b = adapter.factors()
        x_lora = F.dropout(x, adapter.dropout) if adapter.dropout and self.training else None
        if adapter.magnitude is None:
            return kernels.lora_linear(x, w_OI, bias, a, b, adapter.scale, x_lora_TI=x_lora)
        norm = self.norm(adapter)
        return kernels.dora_linear(x, w_OI, bias, a, b, adapter.scale, adapter.magnitude, norm, x_lora_TI=x_lora)


class Conv1DAdapterLayer(LinearAdapterLayer):
    """GPT-2's `Conv1D`: the same product from a transposed weight."""

    stored_transposed = True
