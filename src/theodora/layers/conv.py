"""Adapted `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`, in plain torch: of any groups, stride, padding and dilation.

The weight, (O, C / groups, k, …), is seen as a matrix whose rows are all that makes one output, so that A, B, norms and
magnitudes are what they are anywhere: a convolution is a linear layer that runs over patches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from theodora.autocast import autocast_dtype, without_autocast
from theodora.functional import dora_conv, lora_conv
from theodora.kernels import Parts
from theodora.layers.base import AdapterLayer
from theodora.layers.identity import changes_nothing, with_value_of
from theodora.layers.low_rank import LowRank


class ConvAdapterLayer(AdapterLayer):
    """(N, C, L, …) or (C, L, …) to (…, O, L', …), with LoRA or DoRA; one magnitude for each output channel, (O,)."""

    def forward(self, input: Tensor) -> Tensor:
        """The adapted convolution; the module's own where no adapter is active."""
        adapter = self.active
        if adapter is None:
            return super().forward(input)
        dtype = autocast_dtype(input)
        if dtype is None:
            return self._adapted(input, adapter, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(dtype)
        with without_autocast(input.device):
            return self._adapted(input.to(dtype), adapter, self.weight.to(dtype), bias)

    def _adapted(self, x: Tensor, adapter: LowRank, weight: Tensor, bias: Tensor | None) -> Tensor:
        own: Any = self
        (a, b), scale, m = adapter.factors(), adapter.scale, adapter.magnitude
        norm = None if m is None else self.norm(adapter)
        fresh = changes_nothing(Parts(self.current_weight, bias, a, b, scale, m, norm), adapter.start)
        if fresh and not torch.is_grad_enabled():
            return own._conv_forward(x, weight, bias)
        x_lora = adapter.dropout(x) if adapter.drops else None
        conv, groups = own._conv_forward, own.groups
        if m is None or norm is None:
            y = lora_conv(x, weight, bias, a, b, scale, conv, groups, x_lora=x_lora)
        else:
            y = dora_conv(x, weight, bias, a, b, scale, m, norm, conv, groups, x_lora=x_lora)
        if not fresh:
            return y
        with torch.no_grad():
            return with_value_of(own._conv_forward(x, weight, bias), y)

    def as_stored(self, w_OI: Tensor) -> Tensor:
        """A view of a matrix (O, I) as the module's weight, (O, C / groups, k, …)."""
        return w_OI.view(self.base_parameter.shape)

    def input_shape(self) -> tuple[int, ...]:
        """(C, L, …) of the smallest input that fills a window and can be padded."""
        own: Any = self
        reach = (dilation * (k - 1) + 1 for dilation, k in zip(own.dilation, own.kernel_size, strict=True))
        padding = (0,) * len(own.kernel_size) if isinstance(own.padding, str) else own.padding
        return own.in_channels, *(max(window, beside + 1) for window, beside in zip(reach, padding, strict=True))
