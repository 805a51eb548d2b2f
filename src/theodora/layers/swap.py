"""Giving a module another class in place, and its own back.

So the module stays the user's own object under its own name: its weight, its ties to other modules and its hooks stay
where they were.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from theodora.autocast import autocast_dtype

CHANGED = "_theodora_autocast"
"""Where a module notes what `autocast_changes` has found."""


class Swapped(nn.Module):
    """Mixed in before a module's own class, whose methods stay reachable through `super()`."""

    prefix: ClassVar[str]
    """What the made class's name begins with."""

    def __reduce__(self) -> Any:
        # The class was made on the fly: pickle and deepcopy make it again from its parents.
        mixins: list[type[Swapped]] = []
        own: Any = type(self)
        while issubclass(own, Swapped):
            mixin, own = own.__bases__
            mixins.append(mixin)
        return _new, (mixins, own), self.__getstate__()


def swap_class(module: nn.Module, mixin: type[Swapped]) -> None:
    """Make `module` an object of a class made of `mixin` and its own."""
    module.__class__ = _mixed(mixin, type(module))


def swap_back(module: Swapped) -> None:
    """Undo `swap_class`."""
    module.__class__ = type(module).__bases__[1]


def autocast_changes(module: Swapped, forward: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether autocast makes `forward`, the module's own, give another dtype than x's.

    On some devices it has norms and powers computed in float32, which a kernel in their place must not undo.
    """
    dtype = autocast_dtype(x)
    if dtype is None or x.dtype == torch.float32:
        return False
    found = module.__dict__.setdefault(CHANGED, {})
    key = x.dtype, dtype
    if key not in found:
        with torch.no_grad():
            found[key] = forward(x[:0]).dtype != x.dtype
    return found[key]


@cache
def _mixed(mixin: type[Swapped], own: type[nn.Module]) -> type[Swapped]:
    return type(mixin.prefix + own.__name__, (mixin, own), {"__module__": mixin.__module__})


def _new(mixins: list[type[Swapped]], own: type[nn.Module]) -> nn.Module:
    for mixin in reversed(mixins):
        own = _mixed(mixin, own)
    return own.__new__(own)
