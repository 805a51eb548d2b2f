"""What training changes about a model beside its adapter, put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel


@contextmanager
def restored_afterwards(model: PreTrainedModel) -> Iterator[None]:
    """Give the model its own forward, cache setting and mode back after training; TRL and transformers replace them."""
    forward, use_cache = model.__dict__.get("forward"), getattr(model.config, "use_cache", None)
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)
        if forward is not None:
            model.__dict__["forward"] = forward
        if use_cache is not None:
            model.config.use_cache = use_cache
        model.eval()
