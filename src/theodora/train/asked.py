"""A few prompts answered by the model in training, greedily and within some seconds, beside a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from theodora.evaluate.batches import evaluating, pad
from theodora.evaluate.decoding import decoding

_SECONDS = 20.0


def answers_to(model: PreTrainedModel, prompts: list[list[int]], ends: list[int], max_new_tokens: int) -> Tensor | None:
    """The tokens of each answer, (prompts, T); None of a model that cannot generate so, which is trained all the same.

    Args:
        model: whose training mode is left as it is.
        prompts: tokens, at least one prompt.
        ends: the tokens that end an answer, of which the first fills up.
        max_new_tokens: T, at most.
    """
    settings = decoding(ends, max_new_tokens)
    settings.max_time = _SECONDS
    try:
        with evaluating(model):
            output: Any = model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=pad(prompts, ends[0], left=True).to(model.device),
                attention_mask=pad([[1] * len(prompt) for prompt in prompts], 0, left=True).to(model.device),
                generation_config=settings,
            )
    except (torch.OutOfMemoryError, RuntimeError, ValueError, TypeError, AttributeError, LookupError):
        return None
    return output[:, max(map(len, prompts)) :]
