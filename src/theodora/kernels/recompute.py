"""What activation checkpointing need not compute twice.

A checkpointed block runs again in the backward pass, and what a DoRA layer computes there beyond the frozen model is
its norms and, for the last product of an MLP, z: a frozen layer's output is kept by nobody, so without an adapter
that product is never repeated. Inside `checkpoint_contexts` both are kept from the first run, and so is that product's
low-rank half, without which the activation need not be computed again: some bytes for each output row, and one tensor
as large as the block's input. Where that is too much, z is kept in every second block alone.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")
_LOCAL = threading.local()  # a backward pass runs in a thread of its own
_NUMBERS = itertools.count()  # of the checkpointed blocks


class _Run(AbstractContextManager[None]):
    """A run of a checkpointed block: the first, which keeps, or a later one (there are several if a graph is kept)."""

    def __init__(self, kept: list[tuple[Hashable, Any] | None], number: int, *, first: bool) -> None:
        self.kept, self.number, self.first, self.at = kept, number, first, 0
        self._around: _Run | None = None

    def __enter__(self) -> None:
        self.at, self._around, _LOCAL.run = 0, getattr(_LOCAL, "run", None), self

    def __exit__(self, *_: object) -> None:
        _LOCAL.run = self._around

    def once(self, key: Hashable, compute: Callable[[], _T]) -> _T:
        value = None if self.first else self._take(key)
        if value is None:
            value = compute()
            if self.first:
                self.kept.append((key, value))
        self.at += 1
        return value

    def _take(self, key: Hashable) -> Any:
        """What was kept at this point of the first run, which is then let go."""
        found = self.kept[self.at] if self.at < len(self.kept) else None
        if found is None or found[0] != key:
            return None
        self.kept[self.at] = None
        return found[1]


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The `context_fn` of `torch.utils.checkpoint.checkpoint` (with `use_reentrant=False`)."""
    kept: list[tuple[Hashable, Any] | None] = []
    number = next(_NUMBERS)
    return _Run(kept, number, first=True), _Run(kept, number, first=False)


def once_in_a_block(key: Hashable, compute: Callable[[], _T], every: int = 1) -> _T:
    """`compute()`, or in the second run of a checkpointed block what it gave in the first.

    Args:
        key: tells what is computed from what else a block computes; the order within the block tells the rest.
        compute: gives tensors without a gradient, which the caller does not write to before its backward pass.
        every: of so many blocks one keeps it; the others compute it twice.
    """
    run = _run()
    return compute() if run is None or run.number % every else run.once(key, compute)


def in_a_block() -> bool:
    """Whether a checkpointed block runs, for the first time or again."""
    return _run() is not None


def _run() -> _Run | None:
    return None if torch.compiler.is_compiling() else getattr(_LOCAL, "run", None)
