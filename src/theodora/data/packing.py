"""Whether documents packed into one row stay apart inside a given model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# The share of a full leak that rounding may explain (a real leak is of full size), and the share of the largest logit.
_NOISE = 0.01
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
_ROUNDING_HALF = 0.05


def packing_is_safe(model: PreTrainedModel) -> bool:
    """Whether this model computes each document of a packed row as if it stood alone.

    TRL hands packed rows over without an attention mask: only `position_ids` that start again at 0 say where a
    document begins. transformers turns them into a block-diagonal mask for most families; those that ignore position
    ids (ALiBi), or carry a state from token to token (Mamba), let documents see each other without a word. So the
    model is asked: two short documents go through it together. Packing is unsafe if another first document changes
    the second's logits, or if these differ from those of the second alone. Five forward passes of at most 16 tokens.

    Args:
        model: a causal language model of transformers, with or without an adapter, in training or evaluation mode.

    Returns:
        False, too, if the model's forward does not take what a packed batch consists of.
    """
    vocabulary = model.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)
    first, other, second = torch.randint(0, vocabulary, (3, 8), generator=draw).to(model.device)

    def logits_of_second(batch: dict[str, Any]) -> Tensor:
        return model(**batch, use_cache=False).logits[0, -len(second) :].float()

    with _evaluating(model), torch.no_grad():
        try:
            packed = logits_of_second(packed_batch([first, second]))
            disturbed = logits_of_second(packed_batch([other, second]))
        except (TypeError, ValueError):  # forward() takes no position_ids
            return False
        alone = logits_of_second({"input_ids": second[None]})
        # How much the first document matters if nothing separates the two: what a leak would look like.
        joined = logits_of_second({"input_ids": torch.cat([first, second])[None]})
        joined_other = logits_of_second({"input_ids": torch.cat([other, second])[None]})
    leak, full_leak = _largest(packed - disturbed), _largest(joined - joined_other)
    rounding = _ROUNDING.get(model.dtype, _ROUNDING_HALF) * _largest(alone)
    return leak <= _NOISE * full_leak and _largest(packed - alone) <= rounding


def packed_batch(documents: list[Tensor]) -> dict[str, Any]:
    """What TRL's collator makes of documents (each of T token ids) that are packed into one row."""
    lengths = torch.tensor([len(document) for document in documents])
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(torch.int32)
    device = documents[0].device
    ends = bounds.to(device)
    return {
        "input_ids": torch.cat(documents)[None],
        "position_ids": torch.cat([torch.arange(len(document), device=device) for document in documents])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
        "seq_idx": torch.repeat_interleave(torch.arange(len(documents), dtype=torch.int32), lengths)[None].to(device),
    }


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; every module is put back into the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
