"""Adapted `nn.Embedding`: a linear map from one-hot tokens, whose weight is stored as (V, O)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from theodora.autocast import without_autocast
from theodora.functional import dora_embedding, lora_embedding
from theodora.kernels import Parts
from theodora.layers.base import AdapterLayer
from theodora.layers.identity import changes_nothing, with_value_of


class EmbeddingAdapterLayer(AdapterLayer):
    """Token ids (…) to rows (…, O), with LoRA or DoRA; the magnitude is one number for each output feature, (O,)."""

    stored_transposed = True

    def forward(self, input: Tensor) -> Tensor:
        """The adapted lookup; the module's own where no adapter is active."""
        rows = super().forward(input)
        adapter = self.active
        if adapter is None:
            return rows
        own: Any = self
        a, b = adapter.factors()
        a_rows = F.embedding(input, a.T, own.padding_idx, scale_grad_by_freq=own.scale_grad_by_freq)
        if adapter.drops:
            a_rows = adapter.dropout(a_rows)
        if hasattr(self, "embed_scale"):  # the rows come scaled, and so must the update
            wide = torch.promote_types(a_rows.dtype, rows.dtype)
            a_rows = a_rows.to(wide) * torch.as_tensor(own.embed_scale).to(rows)
        norm = None
        with without_autocast(input.device):
            if adapter.magnitude is None:
                y = lora_embedding(rows, a_rows, b, adapter.scale)
            else:
                norm = self.norm(adapter, one_token=input.dim() > 0 and input.shape[-1] == 1)
                y = dora_embedding(rows, a_rows, b, adapter.scale, adapter.magnitude, norm)
        parts = Parts(self.current_weight, None, a, b, adapter.scale, adapter.magnitude, norm)
        return with_value_of(rows.detach(), y) if changes_nothing(parts, adapter.start) else y
