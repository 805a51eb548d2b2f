"""How many tokens a request may have, and how many pages of keys and values there are for all of them."""

from __future__ import annotations

from typing import Any

import torch

from theodora.serve.config import ServeConfig

_CPU_TOKENS = 32_768  # whose keys and values a CPU holds, unless told otherwise; a GPU holds what its memory allows
_CPU_PAGE, _GPU_PAGE = 32, 256  # tokens in a page, unless told otherwise


def page_size(config: ServeConfig, device: torch.device) -> int:
    """Tokens in a page of keys and values."""
    return config.page_size or (_CPU_PAGE if device.type == "cpu" else _GPU_PAGE)


def page_count(config: ServeConfig, device: torch.device) -> int | None:
    """Pages of keys and values; None for as many as memory allows."""
    tokens = config.kv_tokens or (_CPU_TOKENS if device.type == "cpu" else None)
    return None if tokens is None else -(-tokens // page_size(config, device))


def window_of(model: Any, config: ServeConfig) -> int:
    """Tokens that prompt and answer may have together."""
    limits = [window_of_model(model), config.max_length]
    if model.device.type == "cpu" or config.kv_tokens:
        limits.append(config.kv_tokens or _CPU_TOKENS)
    return min(limit for limit in limits if limit)


def window_of_model(model: Any) -> int | None:
    """Tokens that the model takes in a batch, whatever else is in it; None for as many as one likes."""
    text = model.config.get_text_config()
    limits = (getattr(text, "max_position_embeddings", None), _within_one_rope(text))
    return min(filter(None, limits), default=None)


def _within_one_rope(config: Any) -> int | None:
    """Tokens up to which LongRoPE has one set of frequencies; None without LongRoPE.

    transformers chooses between the two sets by the longest sequence of a batch, so that a long one would change the
    short ones beside it, and the keys that are cached of them.
    """
    ropes = getattr(config, "rope_parameters", None) or {}
    limits = [
        rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        for rope in (ropes, *ropes.values())  # one for all layers, or one for each type of layer
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope"
    ]
    return min(filter(None, limits), default=None)
