"""What a model answered when it was tried out, kept for the next start with the same model, code and device.

Whether documents that are packed stay apart, how the logits come from the last states, and the like are found out by
running the model on a few tokens. Together that is a second or more in front of each run. An answer is kept
(`theodora.kept`) if it was a good one, and for a model of the very same weights, configuration, modules, device and
versions; any other model, one with code of its own, and one of which `know` was not told are tried out each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from theodora.adapters.conditions import conditions
from theodora.kept import kept
from theodora.layers.libraries import tokens_by_themselves

_base_hashes: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def know(model: PreTrainedModel, base_hash: str) -> None:
    """Let answers of this model be kept. Not where several processes run it: all have to try, or none.

    Args:
        model: with the weights of its files, and later a fresh adapter, which changes no output.
        base_hash: of all its weights.
    """
    _base_hashes[model] = base_hash


def tried(question: str, model: PreTrainedModel, find: Callable[[], Any], good: Callable[[Any], bool]) -> Any:
    """The answer of the model, kept or found.

    Args:
        question: what is tried out.
        model: that answers.
        find: tries it out, and leaves the model as it was.
        good: whether an answer may be kept: another one may have a cause that goes away.
    """
    # Random numbers go on as if nothing had been tried, because the next time nothing is.
    generators = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(generators), tokens_by_themselves(model):
        base_hash = _base_hashes.get(model)
        known = None if base_hash is None else conditions(model, base_hash)
        return find() if known is None else kept(f"tried-{question}", known, find, good)


def is_true(answer: Any) -> bool:
    """A good answer to a question of yes or no."""
    return answer is True
