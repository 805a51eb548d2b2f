"""Functions of other libraries, replaced for the whole process where there is no hook, and how they are put back.

The list of all that Theodora replaces is in docs/design.md. It is done in one of three ways:

- `Patch` counts its users: each model on the fast path is one. The first puts the replacement in place, the last one
  puts the original back, in whatever order they come and go.
- `replaced` lasts as long as a block.
- `wrap_once` stays for good: the replacement hands on whatever it is not for.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol
from weakref import finalize

_MARK = "__theodora__"
# One for all patches, so that no two threads wait for each other; users may leave while the same thread holds it,
# because Python collects garbage wherever it likes.
_LOCK = threading.RLock()
_NUMBERS = count()


class Place(Protocol):
    """Where another library keeps a function."""

    def get(self) -> Any:
        """What is there."""
        ...

    def put(self, value: Any) -> Callable[[], None]:
        """Put something else there; calling what comes back undoes it."""
        ...


@dataclass(frozen=True)
class Attribute:
    """A function of a module, under a name."""

    owner: Any
    name: str

    def get(self) -> Any:
        """What is there."""
        return getattr(self.owner, self.name)

    def put(self, value: Any) -> Callable[[], None]:
        """Put something else there; calling what comes back undoes it."""
        undo = functools.partial(setattr, self.owner, self.name, self.get())
        setattr(self.owner, self.name, value)
        return undo


@dataclass(frozen=True)
class Registered:
    """An entry of one of transformers' registries (`GeneralInterface`)."""

    registry: Any
    name: str

    def get(self) -> Any:
        """What is there."""
        return self.registry[self.name]

    def put(self, value: Any) -> Callable[[], None]:
        """Put something else there; calling what comes back undoes it."""
        # What is set hides what the library itself has registered, which nothing else may hide afterwards.
        undo = functools.partial(self.registry.__delitem__, self.name)
        if self.name in self.registry._local_mapping:
            undo = functools.partial(self.registry.__setitem__, self.name, self.get())
        self.registry[self.name] = value
        return undo


class Use:
    """One user of a patch. It counts for as long as anybody holds this object."""


@dataclass
class _Layer:
    """A replacement, made for one original."""

    original: Any
    replacement: Any
    undo: Callable[[], None]


class Patch:
    """A function of another library that is replaced while there are users.

    If somebody else has replaced our replacement when the last user leaves, theirs stays in place. Theirs may call
    ours, which therefore asks `on`, and calls the original if there are no users.

    Args:
        place: where the function is.
        replacement: makes ours of the function that is there, and of the patch.
    """

    def __init__(self, place: Place, replacement: Callable[[Any, Patch], Any]) -> None:
        self._place, self._replacement = place, replacement
        self._users: set[int] = set()
        # Kept, so that an original gets the same replacement each time: torch.compile compiles anew for another one.
        self._layers: list[_Layer] = []

    @property
    def on(self) -> bool:
        """Whether there are users."""
        return bool(self._users)

    def original(self) -> Any:
        """What is in place, or under ours if ours is in place."""
        found = self._place.get()
        while (layer := self._layer(found)) is not None:
            found = layer.original
        return found

    def is_reached(self) -> bool:
        """Whether what is in place is ours, or calls ours (as far as `functools.wraps` says so)."""
        found = self._place.get()
        while found is not None:
            if self._layer(found) is not None:
                return True
            found = getattr(found, "__wrapped__", None)
        return False

    def use(self) -> Use:
        """Put the replacement in place, if it is not. The caller counts as long as it holds what comes back."""
        use, number = Use(), next(_NUMBERS)
        self._users.add(number)
        finalize(use, self._leave, number).atexit = False
        with _LOCK:
            if not self.is_reached():
                self._put()
        return use

    def _leave(self, number: int) -> None:
        self._users.discard(number)
        with _LOCK:
            while not self._users and (layer := self._layer(self._place.get())) is not None:
                layer.undo()

    def _put(self) -> None:
        original = self._place.get()
        layer = next((layer for layer in self._layers if layer.original is original), None)
        replacement = self._replacement(original, self) if layer is None else layer.replacement
        undo = self._place.put(replacement)
        if layer is None:
            self._layers.append(_Layer(original, replacement, undo))
        else:
            layer.undo = undo

    def _layer(self, function: Any) -> _Layer | None:
        return next((layer for layer in self._layers if layer.replacement is function), None)


@contextmanager
def replaced(owner: Any, **functions: Any) -> Iterator[None]:
    """Inside the block these attributes of `owner` are others."""
    before = {name: getattr(owner, name) for name in functions}
    for name, function in functions.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(owner, name, function)


def wrap_once(owner: Any, name: str, wrap: Callable[[Any], Callable[..., Any]]) -> None:
    """Replace a function of a class or module for good by `wrap(function)`, unless that was done before."""
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return
    wrapper: Any = functools.wraps(original)(wrap(original))
    setattr(wrapper, _MARK, True)
    setattr(owner, name, wrapper)
