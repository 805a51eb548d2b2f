"""Attention in packed rows without a mask: flash attention told where each sequence begins.

For a packed row transformers' sdpa builds a mask of the square of its length, and computes under it what no sequence
may see: for four rows of 2048 tokens made one, 8192² scores instead of at most 4 × 2048² / 2. Its flash attention takes
the bounds of the sequences instead, but is a package of its own; torch holds the same kernel.

Legend: H heads, T tokens in the row, D features of a head, N sequences.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

SEQUENCES = "theodora_sequences"
"""The name of an argument of a model's forward, which hands it on to attention: `Sequences`. transformers' own
`cu_seq_lens_q` would not do: batches may carry it beside a mask, which then counts."""
FOREIGN = ("softcap", "s_aux", "position_bias", "cache")
"""Arguments of attention that would change its result, and that are not computed here."""


def attention_apart(
    query_1HTD: Tensor,
    key_1HTD: Tensor,
    value_1HTD: Tensor,
    bounds_N: Tensor,
    longest: int,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention of each token within its own sequence, (1, T, H, D).

    Args:
        query_1HTD, key_1HTD, value_1HTD: keys and values may have fewer heads, which divide the queries'.
        bounds_N: where each sequence begins, and where the last one ends, int32; a sequence may have no tokens.
        longest: tokens of the longest sequence, at least.
        scale: of the scores; 1/√D where None.
        window: how many tokens back a token sees, itself included.
        dropout: probability of dropping a weight.
    """
    if not query_1HTD.is_cuda:
        return attention_apart_reference(query_1HTD, key_1HTD, value_1HTD, bounds_N, longest, scale, window, dropout)
    longest = max(longest, 2)  # for 1 torch assumes decoding, and takes the number of sequences for that of tokens
    output, *_ = torch.ops.aten._flash_attention_forward(
        *(t.transpose(1, 2)[0] for t in (query_1HTD, key_1HTD, value_1HTD)),
        bounds_N,
        bounds_N,
        longest,
        longest,
        dropout,
        True,
        False,
        scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )
    return output[None]


def attention_apart_reference(
    query_1HTD: Tensor,
    key_1HTD: Tensor,
    value_1HTD: Tensor,
    bounds_N: Tensor,
    longest: int,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`attention_apart` in plain torch, under a mask."""
    at = torch.arange(query_1HTD.shape[2], device=query_1HTD.device)
    sequence = torch.searchsorted(bounds_N.to(at.dtype), at, right=True)
    back = at[:, None] - at[None, :]
    seen_TT = (sequence[:, None] == sequence[None, :]) & (back >= 0)
    if window is not None:
        seen_TT &= back < window
    groups = query_1HTD.shape[1] // key_1HTD.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key_1HTD, value_1HTD))
    y = F.scaled_dot_product_attention(query_1HTD, key, value, attn_mask=seen_TT, dropout_p=dropout, scale=scale)
    return y.transpose(1, 2)


class Sequences(NamedTuple):
    """The sequences of a packed row."""

    bounds_N: Tensor
    """Where each begins, and where the last one ends, int32; a sequence may have no tokens."""
    longest: int
    """Tokens of the longest, at least."""


class Maskless:
    """Whether a forward pass is under way for which no masks are built, and how often attention has gone by bounds."""

    under_way = False
    calls = 0

    @classmethod
    def refuse(cls) -> None:
        """Raise a RuntimeError in such a pass: for attention without bounds."""
        if cls.under_way:
            raise RuntimeError("Attention in a packed row was not told where its sequences begin")


def attend(
    original: Any,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Any:
    """What an attention function of transformers returns: `original`'s, or ours where there are bounds.

    Raises:
        RuntimeError: the sequences cannot be kept apart, and nothing else would.
    """
    sequences: Sequences | None = options.pop(SEQUENCES, None)
    if sequences is None:
        Maskless.refuse()
        return original(module, query, key, value, attention_mask, **options)
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    foreign = [name for name in FOREIGN if options.get(name) is not None]
    if not causal or foreign or query.shape[0] != 1 or attention_mask is not None:
        raise RuntimeError(f"Attention in packed rows knows no {', '.join(foreign) or 'other than causal attention'}")
    Maskless.calls += 1
    output = attention_apart(
        query,
        key,
        value,
        *sequences,
        options.get("scaling"),
        options.get("sliding_window"),
        options.get("dropout", 0.0),
    )
    return output, None
