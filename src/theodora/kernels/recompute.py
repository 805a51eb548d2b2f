"""What activation checkpointing need not compute twice.

A checkpointed block runs again in the backward pass, and what a DoRA layer computes there beyond the frozen model is
its norms and, for the last product of an MLP, z: a frozen layer's output is kept by nobody, so without an adapter
that product is never repeated. Inside `checkpoint_contexts` both are kept from the first run, and so is that product's
low-rank half, without which the activation need not be computed again: some bytes for each output row, and one tensor
as large as the block's input. Where that is too much, z waits in the host's memory; where that cannot be, it is kept in
every second block alone.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from theodora.kernels.offload import Away, lane_of

_T = TypeVar("_T")
_LOCAL = threading.local()  # a backward pass runs in a thread of its own
_NUMBERS = itertools.count()  # of the checkpointed blocks


class ToHost(NamedTuple):
    """Which of several tensors waits in the host's memory, on a GPU."""

    at: int
    """Its place among them."""
    beside: Tensor
    """The memory is kept for the next step as long as this one's storage lives."""


class _Run(AbstractContextManager[None]):
    """A run of a checkpointed block: the first, which keeps, or a later one (there are several if a graph is kept)."""

    def __init__(self, kept: list[tuple[Hashable, Any] | None], number: int, *, first: bool) -> None:
        self.kept, self.number, self.first, self.at = kept, number, first, 0
        self._around: _Run | None = None

    def __enter__(self) -> None:
        for away in self._away():
            away.fetch()
        self.at, self._around, _LOCAL.run = 0, getattr(_LOCAL, "run", None), self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        _LOCAL.run = self._around
        # A run that ended early has an error of its own to tell.
        with nullcontext() if error is None else suppress(RuntimeError):
            for away in self._away():
                away.settle()

    def once(self, key: Hashable, compute: Callable[[], _T], every: int, host: ToHost | None) -> _T:
        if self.first:
            value = self._keep(key, compute, every, host)
        elif (value := self._take(key)) is None:
            value = compute()
        self.at += 1
        return value

    def _keep(self, key: Hashable, compute: Callable[[], _T], every: int, host: ToHost | None) -> _T:
        lane = None if host is None else lane_of(host.beside)
        if lane is None or host is None:
            value = compute()
            self.kept.append(None if self.number % every else (key, value))
            return value
        lane.land()
        value: Any = compute()
        away = lane.send(value[host.at], host.beside)
        if away is not None:
            self.kept.append((key, (*value[: host.at], away, *value[host.at + 1 :])))
        else:
            self.kept.append(None if self.number % every else (key, value))
        return value

    def _take(self, key: Hashable) -> Any:
        """What was kept at this point of the first run, which is then let go."""
        found = self.kept[self.at] if self.at < len(self.kept) else None
        if found is None or found[0] != key:
            return None
        self.kept[self.at] = None
        if not _sent(found):
            return found[1]
        back = [part.take() if isinstance(part, Away) else part for part in found[1]]
        lost = any(isinstance(part, Away) and now is None for part, now in zip(found[1], back, strict=True))
        return None if lost else tuple(back)

    def _away(self) -> list[Away]:
        """What the first run sent to the host, seen from a later one."""
        return [] if self.first else [away for found in self.kept for away in _sent(found)]


def _sent(found: tuple[Hashable, Any] | None) -> list[Away]:
    parts = found[1] if found is not None and isinstance(found[1], tuple) else ()
    return [part for part in parts if isinstance(part, Away)]  # pyright: ignore[reportUnknownVariableType]


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The `context_fn` of `torch.utils.checkpoint.checkpoint` (with `use_reentrant=False`)."""
    kept: list[tuple[Hashable, Any] | None] = []
    number = next(_NUMBERS)
    return _Run(kept, number, first=True), _Run(kept, number, first=False)


def once_in_a_block(key: Hashable, compute: Callable[[], _T], every: int = 1, host: ToHost | None = None) -> _T:
    """`compute()`, or in the second run of a checkpointed block what it gave in the first.

    Args:
        key: tells what is computed from what else a block computes; the order within the block tells the rest.
        compute: gives tensors without a gradient, which the caller does not write to before its backward pass.
        every: of so many blocks one keeps it; the others compute it twice.
        host: of a tuple of tensors, the one that waits in the host's memory. Then all blocks keep them, where that can
            be done (see `offload.py`); else `every` says which.
    """
    run = _run()
    return compute() if run is None else run.once(key, compute, every, host)


def in_a_block() -> bool:
    """Whether a checkpointed block runs, for the first time or again."""
    return _run() is not None


def _run() -> _Run | None:
    return None if torch.compiler.is_compiling() else getattr(_LOCAL, "run", None)
