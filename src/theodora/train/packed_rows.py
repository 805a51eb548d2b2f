"""Packed rows with the bounds of their sequences instead of a mask: what a batch says, and whether a model takes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from theodora.data.packing import packed_batch, packing_is_safe
from theodora.fastpath.attention import keep_attention
from theodora.fastpath.masks import Unbuilt, causal_of, whole_rows
from theodora.fastpath.packed_attention import SEQUENCES, Maskless, Sequences
from theodora.fastpath.sinks import has_fast_sinks, has_sinks
from theodora.patches import Registered, replaced
from theodora.train.tried import is_true, tried


def bounds_of(positions_1T: Tensor) -> Tensor:
    """Where each sequence of a packed row begins, and where the last one ends, (N + 1,) int32.

    A sequence begins where a position does not follow the one before it. The end is repeated, which makes sequences of
    no token: so that most batches have one shape.
    """
    starts = functional.pad(positions_1T[0].diff() != 1, (1, 0), value=True).nonzero().squeeze(1)
    count = len(starts)
    multiple = max(16, 2 ** (count - 1).bit_length() // 8)
    ends = starts.new_full((-(-count // multiple) * multiple + 1 - count,), positions_1T.shape[1])
    return torch.cat([starts, ends]).to(torch.int32)


@contextmanager
def attention_by_bounds() -> Iterator[None]:
    """Inside the block transformers builds no masks: the attention function is `attend`, and wants `SEQUENCES`.

    So does attention with sinks, which is told of each mask what it would say. Other eager attention meets an error.
    """
    keep_attention()
    masks: dict[str, Any] = {
        "sdpa": lambda *_, **__: None,
        "eager": lambda *_, **asked: Unbuilt.of(causal_of(asked), _no, asked),
    }
    build_again = [Registered(ALL_MASK_ATTENTION_FUNCTIONS, name).put(mask) for name, mask in masks.items()]
    try:
        with whole_rows(), replaced(Maskless, under_way=True):
            yield
    finally:
        for put_back in build_again:
            put_back()


def _no() -> Tensor:
    raise RuntimeError("Eager attention in a packed row has no mask, and does not go by where its sequences begin")


def goes_by_bounds_alone(model: PreTrainedModel) -> bool:
    """Whether nothing but bounds keeps the rows of a packed row apart: in models with sinks, on the fast path.

    gpt-oss builds its masks without looking at positions.
    """
    return _is_eager(model) and has_fast_sinks(model)


def can_go_by_bounds_alone(model: PreTrainedModel) -> bool:
    """Whether `goes_by_bounds_alone` once the model is on the fast path."""
    return _is_eager(model) and has_sinks(model)


def _is_eager(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config()
    return config._attn_implementation == "eager" and not getattr(config, "attention_dropout", 0)  # pyright: ignore[reportPrivateUsage]


def keeps_rows_apart(model: PreTrainedModel) -> bool:
    """`packing_is_safe`, kept for the next start."""
    return tried("packing", model, lambda: packing_is_safe(model), is_true)


def takes_bounds(model: PreTrainedModel, longest: int | None) -> bool:
    """Whether the model computes the same with bounds as with a mask, forwards and backwards: it is tried out.

    With sinks, the same as for each sequence by itself. Not in float32, which torch's flash attention does not take,
    nor where attention does not go by transformers' registry or needs more than the bounds: a window that is narrower
    than a sequence would not show in what is tried. Attention with sinks takes it from what each mask is asked to be.

    Args:
        model: in training or evaluation mode.
        longest: tokens that a sequence has at most; None if there is no bound.
    """
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    narrow = any(window is not None and (longest is None or window < longest) for window in windows)
    plain = config._attn_implementation == "sdpa" and not narrow  # pyright: ignore[reportPrivateUsage]
    if not plain and not goes_by_bounds_alone(model):
        return False
    return tried("takes-bounds", model, lambda: _takes_bounds(model, config.vocab_size), is_true)


def _takes_bounds(model: PreTrainedModel, vocabulary: int) -> bool:
    device: Any = next(model.get_input_embeddings().parameters()).device
    ids = torch.arange(3, 16, device=device) % vocabulary
    batch = packed_batch([ids[:6], ids[6:]])
    given = {name: batch[name] for name in ("input_ids", "position_ids")}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad][:1]
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            whole = [part[None] for part in (ids[:6], ids[6:])] if goes_by_bounds_alone(model) else []
            alone = [model(input_ids=part, use_cache=False).logits for part in whole]
            expected: Tensor = torch.cat(alone, dim=1) if alone else model(**given, use_cache=False).logits
            with attention_by_bounds():
                calls, sequences = Maskless.calls, Sequences(bounds_of(batch["position_ids"]), 7)
                with_bounds: Tensor = model(**given, **{SEQUENCES: sequences}, use_cache=False).logits
            if trained:
                torch.autograd.grad(with_bounds.float().sum(), trained, allow_unused=True)
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError):
        return False
    finally:
        model.train(was_training)
    with_bounds, expected = with_bounds.detach().float(), expected.detach().float()
    rounding = 1e-3 if model.dtype == torch.float32 else 5e-2
    if Maskless.calls == calls or with_bounds.shape != expected.shape:
        return False
    return bool(((with_bounds - expected).norm() <= rounding * expected.norm()).item())
