"""Adapted `nn.Linear`, and GPT-2's `Conv1D`, which is a linear layer whose weight is stored as (I, O)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theodora import kernels
from theodora.autocast import autocast_dtype, without_autocast
from theodora.functional import dora_scale, wide_dtype
from theodora.kernels import Parts
from theodora.layers import packed
from theodora.layers.base import AdapterLayer
from theodora.layers.identity import base_output, changes_nothing, with_value_of
from theodora.layers.libraries import reads_packed
from theodora.layers.low_rank import LowRank
from theodora.layers.norm_cache import DecodeTensors, one_token_each

GROUP = "_theodora_group"


class LinearAdapterLayer(AdapterLayer):
    """y = x Wᵀ + bias, with LoRA or DoRA, (…, I) to (…, O): of one dtype, or under autocast of autocast's, as ever."""

    def forward(self, x: Tensor) -> Tensor:
        """The adapted product; the module's own where no adapter is active."""
        one_token = one_token_each(x)
        if not torch.is_grad_enabled() and (y := self._decoded(x, one_token)) is not None:
            return y
        group = self.__dict__.get(GROUP)
        if group is not None and (y := group.output(self, x)) is not None:
            return y
        if self.active is None:
            return self._bare(x)
        dtype = autocast_dtype(x)
        if dtype is None:
            return _adapted(x, self.parts(one_token), self.active)
        with without_autocast(x.device):
            return _adapted(x.to(dtype), in_dtype(self.parts(one_token), dtype), self.active)

    def _bare(self, x: Tensor) -> Tensor:
        """The product where no adapter is active: the module's own, if its class can read the weight."""
        if self.merged_adapter is not None and reads_packed(self):
            return self._merged(x)
        if not packed.runs_aside(self):
            return super().forward(x)
        weight, dtype = self.current_weight, autocast_dtype(x)
        with without_autocast(x.device):
            own = in_dtype(Parts(weight, self.bias), dtype or x.dtype)
            return kernels.adapted_linears(x.to(dtype or x.dtype), [own])[0]

    def _merged(self, x: Tensor) -> Tensor:
        """The product with a merged weight, in that one's dtype, which the module's own class could not read."""
        dtype = self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.weight, bias).to(autocast_dtype(x) or x.dtype)

    def parts(self, one_token: bool = False) -> Parts:
        """What the layer computes in this pass, which runs over `one_token` of each sequence or over several."""
        adapter = self.active
        if adapter is None:
            return Parts(self.current_weight, self.bias)
        a, b = adapter.factors()
        weight, norm = self.current_weight, None
        if adapter.magnitude is not None:
            norm = self.norm(adapter, one_token)
        elif not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and kernels.decode.runs(weight):
            self.inference_tensors(adapter, one_token)  # for the steps to come
        return Parts(weight, self.bias, a, b, adapter.scale, adapter.magnitude, norm, adapter.drops)

    def _decoded(self, x: Tensor, one_token: bool) -> Tensor | None:
        """The output for a few tokens, without gradients, if the kernel for that can take them."""
        adapter = self.active
        if adapter is None or not kernels.decode.fits(x) or adapter.drops:
            return None
        weight = self.current_weight
        if x.dtype != weight.dtype or not kernels.decode.knows(weight):
            return None
        if autocast_dtype(x) is not None or not kernels.fast():
            return None
        ready = self.inference_tensors(adapter, one_token)
        if ready is None or ready.decode is None:
            return None
        a, b, g = ready.decode.a_RI, ready.decode.b_OR, ready.decode.g_O
        y = kernels.decode.decode(x.reshape(-1, x.shape[-1]), weight, a, b, g, self.bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _decode_tensors(self, adapter: LowRank, norm_O: Tensor | None) -> DecodeTensors | None:
        weight = self.current_weight
        if not kernels.decode.runs(weight):
            return None
        kernels.decode.prepare(weight.device)
        dtype, (a, b) = weight.dtype, adapter.factors()
        g = None
        if adapter.magnitude is not None and norm_O is not None:
            g = dora_scale(adapter.magnitude.detach(), norm_O)
        # s goes in before rounding, so that it costs no precision.
        b = (adapter.scale * b.detach().to(wide_dtype(dtype))).to(dtype)
        return DecodeTensors(a.detach().to(dtype), b, g)


class PackedAdapterLayer(LinearAdapterLayer):
    """A library's linear layer whose packed numbers go by another name than `weight`, which is the merged weight's."""

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The merged weight while an adapter is merged, else the packed numbers."""
        merged = self._parameters.get("weight")
        return self.base_parameter if merged is None else merged

    @property
    def base_parameter(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The packed numbers, which stay where they are."""
        held = packed.packed_tensor(self)
        assert held is not None
        return held

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, and the adapters, which HQQ's leaves out."""
        state: Any = super().state_dict(*args, **kwargs)
        destination, prefix = kwargs.get("destination", state), kwargs.get("prefix", "") + "adapters."
        if not any(key.startswith(prefix) for key in destination):
            keep = kwargs.get("keep_vars", False)
            self.adapters.state_dict(destination=destination, prefix=prefix, keep_vars=keep)
        return state

    def merge(self, name: str) -> None:
        """Put the merged weight beside the packed numbers."""
        merged = self.merged_weight(name).to(self.base_weight.dtype)
        self.norm_cache.invalidate()
        self._parameters["weight"] = nn.Parameter(merged, requires_grad=False)
        self.merged_adapter = name

    def unmerge(self) -> None:
        """Take it away."""
        self._parameters.pop("weight", None)
        self.norm_cache.invalidate()
        self.merged_adapter = None


class Conv1DAdapterLayer(LinearAdapterLayer):
    """GPT-2's `Conv1D`: the same product from a transposed weight."""

    stored_transposed = True


def _adapted(x: Tensor, parts: Parts, adapter: LowRank) -> Tensor:
    fresh = changes_nothing(parts, adapter.start)
    if fresh and not torch.is_grad_enabled():
        return base_output(x, parts)
    y = kernels.adapted_linears(x, [parts], adapter.dropout(x) if parts.drops else None)[0]
    return with_value_of(base_output(x, parts), y) if fresh else y


def in_dtype(parts: Parts, dtype: torch.dtype) -> Parts:
    """The layer as it runs under autocast; adapter, magnitude and norm keep their own dtypes."""
    bias = None if parts.bias_O is None else parts.bias_O.to(dtype)
    return replace(parts, weight=parts.weight.to(dtype), bias_O=bias)
