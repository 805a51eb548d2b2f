"""Attention over pages where a model caps its scores (Gemma 2): transformers', without a kernel, leaves the cap out.

A seam to transformers' continuous batching, as `batching.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.eager_paged import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "paged|eager"


def cap_scores() -> None:
    """Let attention over pages cap its scores, for the whole process; where there is no cap, nothing changes."""
    attend = ALL_ATTENTION_FUNCTIONS[_NAME]
    if attend.__module__ != __name__:
        ALL_ATTENTION_FUNCTIONS[_NAME] = _with_cap(attend)


def _with_cap(attend: Callable[..., Any]) -> Callable[..., Any]:
    def attend_capped(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None,
        scaling: float,
        **others: Any,
    ) -> Any:
        cap, cache = others.get("softcap"), others.get("cache")
        if cap is None or hasattr(module, "sinks"):
            return attend(module, query, key, value, attention_mask, scaling, **others)
        if cache is not None:  # from 5.24 on the model has done it
            key, value = _update(cache, key, value, module.layer_idx, others)
        groups = getattr(module, "num_key_value_groups", 1)
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        # In the order of Gemma 2's own attention, whose roundings these are.
        scores = torch.tanh(torch.matmul(query, key.transpose(2, 3)) * scaling / cap) * cap
        mask = _mask_of(module, attention_mask)
        if mask is not None:
            scores = scores + mask
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights

    return attend_capped


def _update(cache: Any, key: Tensor, value: Tensor, layer: int, others: dict[str, Any]) -> tuple[Tensor, Tensor]:
    update = {"key_states": key, "value_states": value, "layer_idx": layer}
    if "read_index" in inspect.signature(type(cache).update).parameters:  # transformers 5.17
        key, value = cache.update(**update, read_index=others["read_index"], write_index=others["write_index"])
        return key.transpose(0, 1)[None], value.transpose(0, 1)[None]
    others.pop("cache")
    return cache.update(**update, kwargs=others)


def _mask_of(module: Any, mask: Tensor | dict[str, Tensor] | None) -> Tensor | None:
    """The layer's own, of those of each kind of layer that transformers 5.17 gives to all."""
    if not isinstance(mask, dict):
        return mask
    slides = getattr(module, "sliding_window", None) not in (None, 1)
    return mask["sliding_attention" if slides else "full_attention"]
