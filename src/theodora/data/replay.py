"""Replay: general text among the rows to train on, against forgetting."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from theodora.errors import ConfigError

T = TypeVar("T")


def mix(rows: Sequence[T], others: Sequence[T], share: float, seed: int) -> list[T]:
    """Add as many of `others` as make up `share` of all rows; all rows stay, and the order is left to the sampler.

    The share is one of rows. A text of which every token is learned weighs more than a prompt with a short answer.

    Args:
        rows: what is to be learned.
        others: what is not to be forgotten. Taken several times over if there are too few.
        share: of the result, at least 0 and below 1.
        seed: which ones are taken.

    Raises:
        ConfigError: there is nothing to take from.
    """
    wanted = round(len(rows) * share / (1 - share))
    if not wanted:
        return list(rows)
    if not others:
        raise ConfigError(f"replay is {share:g}, and there is no general text to take it from")
    draw = random.Random(seed)
    whole, rest = divmod(wanted, len(others))
    return [*rows, *(list(others) * whole), *draw.sample(list(others), rest)]
