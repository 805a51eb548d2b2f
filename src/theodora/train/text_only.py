"""Does the model continue a text? Tried out on a few tokens, before anything is trained."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from theodora.adapters.state import adapter_layers
from theodora.errors import ConfigError
from theodora.train.tried import is_true, tried

_LENGTH, _LONG = 6, 48
_ROUNDING = 1e-2  # of the largest logit: half precision, whose sums may depend on the rest of the batch
_LOOKS_AHEAD = 0.05
"""Share of what a token changes for itself that it may change for those before it."""


def check_continues_text(model: PreTrainedModel) -> None:
    """Refuse a model that does not run on text alone, or in which a token sees those that come after it.

    Raises:
        ConfigError: with the reason.
    """
    tried("continues-text", model, lambda: _continues_text(model), is_true)


@torch.no_grad()
def _continues_text(model: PreTrainedModel) -> bool:
    vocabulary, kind = getattr(model.config.get_text_config(), "vocab_size", None), type(model).__name__
    if not isinstance(vocabulary, int):
        raise ConfigError(f"A {kind} has no vocabulary of its own, and text is what is trained on here.")
    ids = _tokens(vocabulary, _LENGTH)
    other = ids.clone()
    other[-1] = (other[-1] + 1) % vocabulary
    training = model.training
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
    return True


def _tokens(vocabulary: int, count: int) -> torch.Tensor:
    """Ids from the middle of the vocabulary: special tokens (an image's, say) stand at its ends."""
    return (torch.arange(count) * 7919 % max(1, vocabulary // 2) + vocabulary // 4) % vocabulary


def _logits(model: Any, ids_1L: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids_1L, use_cache=False).logits[0].float()


def without_gradient(model: PreTrainedModel) -> list[str]:
    """Paths of the adapted modules whose kind gets no gradient from a text: what selects tokens or experts, say.

    One that rests is no sign (an expert to which no token went); a kind of which all rest, `gate` or `wq_b`, is.
    """
    return tried("resting", model, lambda: _without_gradient(model), lambda found: found == [])


def weights_without_gradient(model: PreTrainedModel) -> list[str]:
    """Names of the weights whose kind gets no gradient from a text: of what sees images, say."""
    return tried("resting-weights", model, lambda: _without_gradient(model, weights=True), lambda found: found == [])


def _without_gradient(model: PreTrainedModel, *, weights: bool = False) -> list[str]:
    trained: dict[str, list[Any]]
    if weights:
        trained = {name: [p] for name, p in model.named_parameters() if p.requires_grad}
    else:
        layers = adapter_layers(model).items()
        trained = {path: [p for a in layer.adapters.values() for p in a.parameters()] for path, layer in layers}
    vocabulary = model.config.get_text_config().vocab_size
    ids_1L = _tokens(vocabulary, _LONG)[None]
    training = model.training
    model.eval()
    try:
        logits: Any = model(input_ids=ids_1L.to(model.device), use_cache=False).logits
        if logits.dim() == 2:  # scores
            logits.float().sum().backward()
        else:
            torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids_1L[0, 1:].to(logits.device)).backward()
        kinds: dict[str, list[str]] = {}
        for path in trained:
            kinds.setdefault(_kind(path), []).append(path)
        return [path for paths in kinds.values() if not any(_moves(trained[path]) for path in paths) for path in paths]
    finally:
        model.train(training)
        model.zero_grad(set_to_none=True)


def _kind(path: str) -> str:
    """`model.layers.3.self_attn.indexer.wq_b` → `self_attn.indexer.wq_b`."""
    return ".".join([step for step in path.split(".") if not step.isdigit()][-3:])


def _moves(parameters: list[Any]) -> bool:
    return any(bool(p.grad.any()) for p in parameters if p.grad is not None)
