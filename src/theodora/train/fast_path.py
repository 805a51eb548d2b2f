"""Which code a run takes: the kernels where there is a GPU, or the plain reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from theodora import kernels
from theodora.config import TrainConfig
from theodora.extras import pip_line
from theodora.fastpath.accelerate import recompute_less, restore_model, speed_up_model


@contextmanager
def fast_path(model: PreTrainedModel, config: TrainConfig, device: torch.device) -> Iterator[str | None]:
    """Put the model on the code that the configuration asks for, and take it off again.

    Yields:
        What was found to speed up; None where layers run as they are (on a CPU).
    """
    if config.kernels == "reference":
        with kernels.reference():
            yield "off: every layer runs the plain formulas"
        return
    if device.type != "cuda":
        yield None
        return
    if config.trains_all:  # whose kernels are of frozen weights
        yield "off: all weights are trained, by torch's own kernels"
        return
    found = speed_up_model(model)
    try:
        yield str(found)
    finally:
        restore_model(model)


class RecomputeLess(TrainerCallback):
    """`recompute_less`, once the trainer has turned activation checkpointing on."""

    def on_train_begin(self, args: TrainingArguments, *_: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        """Does nothing to a model that will be compiled: torch.compile knows none but its own contexts."""
        if not args.torch_compile:
            recompute_less(model)


def missing_parts(device: torch.device) -> list[str]:
    """What is not installed and would make a run on this device faster."""
    if device.type != "cuda":
        return []
    slower = {
        "triton": "the kernels of the fast path do not run",
        "liger_kernel": "rotary embeddings take the model's own, slower code",
    }
    return [
        f"{name.replace('_', '-')} is not installed: {what}. {pip_line('gpu')}"
        for name, what in slower.items()
        if find_spec(name) is None
    ]
