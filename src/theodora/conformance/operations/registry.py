"""What an operation of the suite is, and the list of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from theodora.conformance.trial import Check, Trial

Run = Callable[[Trial], Iterator[Check]]


@dataclass(frozen=True)
class Operation:
    """One thing that can happen to an adapter, and how it is judged."""

    key: str
    title: str
    group: str
    run: Run
    ours_only: bool = False
    """PEFT has nothing of the kind."""
    sample: tuple[str, ...] = ()
    """The only variants that a slow operation runs on; the others differ from them in numbers alone. It runs on every
    kind and dtype, and with `plan(every_variant=True)` on every variant, too."""
    not_on: tuple[str, ...] = ()
    """Dtypes whose library cannot do it with its own layers, whatever stands beside them."""
    not_kinds: tuple[str, ...] = ()
    """Kinds of layers that it says nothing of."""
    cost: int = 0
    """How long it takes, as a rank: the longest begin first."""


COMPILED = ("lora", "dora", "dora-pissa", "dora-rslora-patterns")
"""Variants whose compiled code differs: with and without magnitudes, with start factors, with ranks and scales of
each layer's own."""
OPERATIONS: dict[str, Operation] = {}


def operation(key: str, title: str, group: str, **options: Any) -> Callable[[Run], Run]:
    """Put the function on the list."""

    def register(run: Run) -> Run:
        OPERATIONS[key] = Operation(key, title, group, run, **options)
        return run

    return register
