"""Keeps the libraries' own progress bars and chatter out of the run's view."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence transformers, datasets, TRL and accelerate up to errors inside the block, and put all back after it."""
    bars = transformers_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    # These two of ours warn of what the panel says anyway.
    names = ("transformers", "huggingface_hub", "datasets", "trl", "accelerate", "theodora.data", "theodora.kernels")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        if bars[0]:
            transformers_logging.enable_progress_bar()
        if not bars[1]:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
