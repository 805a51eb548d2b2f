"""Causal attention with sinks: a learned score of each head that joins the softmax and has no value.

    p = softmax([q·k₁, …, q·k_T, s]),   o = Σ p_t v_t                  (gpt-oss; "attention sinks", arXiv 2309.17453)

Flash attention knows no sinks. But of its output o and its ℓ = log Σ exp(scores) follow those with one:

    o' = o · σ(ℓ − s),   ℓ' = log(exp ℓ + exp s)

and its own backward pass, given o' and ℓ', is exact: it takes exp(score − ℓ') for the probabilities, and Δ' = dO·o' for
what the softmax takes off. The sink's gradient is ds = −Σ exp(s − ℓ')·Δ'.

Legend: B rows, H heads, T tokens, D features of a head, N sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from theodora.functional import wide_dtype
from theodora.kernels.operators import on_gpu

_flash = torch.ops.aten._flash_attention_forward
_flash_backward = torch.ops.aten._flash_attention_backward


def sink_attention(
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    sinks_H: Tensor,
    scale: float,
    window: int | None = None,
    bounds_N: Tensor | None = None,
    longest: int = 0,
) -> Tensor:
    """Causal attention of each token within its row, or within its own sequence of a packed row, (B, T, H, D).

    On a GPU in float16 or bfloat16 alone, and where D is a multiple of 8, 256 at most (`takes`).

    Args:
        query_BHTD, key_BHTD, value_BHTD: keys and values may have fewer heads, which divide the queries'.
        sinks_H: the sinks' scores, which `scale` does not multiply; of any dtype.
        scale: of the other scores.
        window: how many tokens back a token sees, itself included.
        bounds_N: where each sequence of the one row begins, and where the last one ends, int32; a sequence may have no
            tokens. None where rows are whole.
        longest: tokens of the longest sequence, at least.

    Raises:
        RuntimeError: flash attention does not take the tensors.
    """
    args = query_BHTD, key_BHTD, value_BHTD, sinks_H, scale, window, bounds_N, longest
    return _SinkAttention.apply(*args) if on_gpu(query_BHTD) else sink_attention_reference(*args)  # pyright: ignore[reportReturnType]


def takes(query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor) -> bool:
    """Whether `sink_attention` runs on these by flash attention, which this GPU has, and forwards and backwards."""
    q, k, v = query_BHTD, key_BHTD, value_BHTD
    fits = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    fits = fits and q.dtype == k.dtype == v.dtype and k.shape == v.shape and q.shape[2:] == k.shape[2:]
    # For one token torch assumes decoding, and for none it has nothing to launch.
    if not fits or not on_gpu(q) or q.shape[1] % k.shape[1] or q.shape[0] == 0 or q.shape[2] < 2:
        return False
    cuda = torch.backends.cuda
    return q.is_meta or cuda.can_use_flash_attention(cuda.SDPAParams(q, k, v, None, 0.0, True, True))


def sink_attention_reference(
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    sinks_H: Tensor,
    scale: float,
    window: int | None = None,
    bounds_N: Tensor | None = None,
    longest: int = 0,
) -> Tensor:
    """`sink_attention` in plain torch, under a mask, on any device and in any dtype."""
    at = torch.arange(query_BHTD.shape[2], device=query_BHTD.device)
    back = at[:, None] - at[None, :]
    seen_TT = back >= 0
    if window is not None:
        seen_TT &= back < window
    if bounds_N is not None:
        sequence = torch.searchsorted(bounds_N.to(at.dtype), at, right=True)
        seen_TT &= sequence[:, None] == sequence[None, :]
    wide = wide_dtype(query_BHTD.dtype)
    groups = query_BHTD.shape[1] // key_BHTD.shape[1]
    key, value = (t.to(wide).repeat_interleave(groups, dim=1) for t in (key_BHTD, value_BHTD))
    scores_BHTT = (query_BHTD.to(wide) @ key.mT * scale).masked_fill(~seen_TT, -torch.inf)
    sinks = sinks_H.to(wide)[:, None, None].expand(*scores_BHTT.shape[:3], 1)
    p_BHTT = torch.cat([scores_BHTT, sinks], dim=-1).softmax(-1)[..., :-1]
    return (p_BHTT @ value).to(query_BHTD.dtype).transpose(1, 2)


class _SinkAttention(torch.autograd.Function):
    """By flash attention, which takes rows as (B, T, H, D) and packed ones as (T, H, D).

    q, k and v are kept as they came, so that whoever keeps them otherwise (`fastpath/attention`) knows them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks_H: Tensor,
        scale: float,
        window: int | None,
        bounds_N: Tensor | None,
        longest: int,
    ) -> Tensor:
        # For a longest of 1 torch assumes decoding, and takes the number of sequences for that of tokens.
        ctx.longest = query.shape[2] if bounds_N is None else max(longest, 2)
        ctx.options = {
            "scale": scale,
            "window_size_left": None if window is None else window - 1,
            "window_size_right": None if window is None else 0,
        }
        q, k, v = (_in(t, bounds_N) for t in (query, key, value))
        lengths = bounds_N, bounds_N, ctx.longest, ctx.longest
        y, lse, *random, _ = _flash(q, k, v, *lengths, 0.0, True, False, **ctx.options)
        s = sinks_H.to(lse.dtype)[:, None]
        # Written anew: flash attention's output lies in memory as q does, and both the layer that reads it and the
        # backward pass would copy it to have tokens before heads. In one pass, rounded once.
        o = torch.mul(y, _by_token(torch.sigmoid(lse - s)), out=y.new_empty(y.shape))
        lse = torch.logaddexp(lse, s)
        ctx.save_for_backward(query, key, value, sinks_H, bounds_N, o, lse, *random)
        return o if bounds_N is None else o[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, sinks_H, bounds_N, o, lse, *random = ctx.saved_tensors
        do = do if bounds_N is None else do[0]
        q, k, v = (_in(t, bounds_N) for t in (query, key, value))
        lengths = bounds_N, bounds_N, ctx.longest, ctx.longest
        grads = _flash_backward(do, q, k, v, o, lse, *lengths, 0.0, True, *random, **ctx.options)
        ds_H = None
        if ctx.needs_input_grad[3]:
            delta_TH = (do.to(lse.dtype) * o).sum(-1)
            p_TH = _by_token(torch.exp(sinks_H.to(lse.dtype)[:, None] - lse)).squeeze(-1)
            ds_H = -(p_TH * delta_TH).flatten(0, -2).sum(0).to(sinks_H.dtype)
        dq, dk, dv = (_out(t, bounds_N) for t in grads)
        return dq, dk, dv, ds_H, None, None, None, None


def _in(t_BHTD: Tensor, bounds_N: Tensor | None) -> Tensor:
    t = t_BHTD.transpose(1, 2)
    return t if bounds_N is None else t[0]


def _out(t: Tensor, bounds_N: Tensor | None) -> Tensor:
    return (t if bounds_N is None else t[None]).transpose(1, 2)


def _by_token(t_HT: Tensor) -> Tensor:
    """(…, H, T), as flash attention has its sums, to (…, T, H, 1)."""
    return t_HT.transpose(-1, -2)[..., None]
