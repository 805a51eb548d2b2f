"""Does the model continue a text? Tried out on a few tokens, before anything is trained."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from theodora.errors import ConfigError

_LENGTH = 6
_ROUNDING = 1e-2  # of the largest logit: half precision, whose sums may depend on the rest of the batch
_LOOKS_AHEAD = 0.05
"""Share of what a token changes for itself that it may change for those before it."""


@torch.no_grad()
def check_continues_text(model: PreTrainedModel) -> None:
    """Refuse a model that does not run on text alone, or in which a token sees those that come after it.

    Raises:
        ConfigError: with the reason.
    """
    vocabulary = model.config.get_text_config().vocab_size
    # From the middle of the vocabulary: special tokens (an image's, say) stand at its ends.
    ids = (torch.arange(_LENGTH) * 7919 % max(1, vocabulary // 2) + vocabulary // 4) % vocabulary
    other = ids.clone()
    other[-1] = (other[-1] + 1) % vocabulary
    kind, training = type(model).__name__, model.training
    model.eval()
    try:
        one, two = (_logits(model, row[None].to(model.device)) for row in (ids, other))
    except Exception as error:  # whatever the model's own code raises for want of an image
        raise ConfigError(
            f"A {kind} does not run on text alone, and text is what is trained on here. It says: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else '-'}"
        ) from error
    finally:
        model.train(training)
    before, itself = (one - two)[:-1].abs().max(), (one - two)[-1].abs().max()
    if before > _LOOKS_AHEAD * itself and before > _ROUNDING * one.abs().max():
        raise ConfigError(
            f"In a {kind} as configured here each token sees those that come after it, as in an encoder: trained to "
            "predict the next token, it would learn to copy it. Choose a decoder (some families have is_decoder: true "
            "in config.json for that)."
        )


def _logits(model: Any, ids_1L: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids_1L, use_cache=False).logits[0].float()
