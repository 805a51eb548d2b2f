"""Giving a module another class in place, and its own back.

So the module stays the user's own object under its own name: its weight, its ties to other modules and its hooks stay
where they were.

Other libraries do the same: FSDP2's `fully_shard`, `torch.nn.utils.parametrize`. What stands below one of our classes
is the module's own, whoever made it. From under a class that another library has put on top, ours cannot be taken away.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from theodora.autocast import autocast_dtype
from theodora.errors import ConfigError, bullet_list
from theodora.kernels.sharded_weight import here, is_sharded, managed
from theodora.layers.libraries import library_weight
from theodora.layers.packed import packed_tensor

CHANGED = "_theodora_autocast"
"""Where a module notes what `autocast_changes` has found."""
_MADE = "_theodora_made"  # on classes that `swap_class` has made


class Swapped(nn.Module):
    """Mixed in before a module's own class, whose methods stay reachable through `super()`."""

    prefix: ClassVar[str]
    """What the made class's name begins with."""

    def __reduce__(self) -> Any:
        # The class was made on the fly: pickle and deepcopy make it again from its parents.
        mixins, own = _taken_apart(type(self))
        # (A class that another library has put on top is its own to find again.)
        made = (_new, (mixins, own)) if mixins else (copyreg.__newobj__, (own,))  # pyright: ignore[reportAttributeAccessIssue]
        return *made, self.__getstate__()


def swap_class(module: nn.Module, mixin: type[Swapped]) -> None:
    """Make `module` an object of a class made of `mixin` and its own."""
    module.__class__ = _made(mixin, type(module))


def swap_back(module: nn.Module, mixin: type[Swapped]) -> None:
    """Undo `swap_class`, also from under further classes of ours.

    Raises:
        ConfigError: another library has put a class of its own on top; nothing was changed.
    """
    check_reachable([("this module", module)], mixin)
    mixins, own = _taken_apart(type(module))
    at = next(index for index, each in enumerate(mixins) if issubclass(each, mixin))
    module.__class__ = _put_together([*mixins[:at], *mixins[at + 1 :]], own)


def check_reachable(modules: Iterable[tuple[str, nn.Module]], *mixins: type[Swapped]) -> None:
    """Raise a ConfigError if a class made of one of `mixins` cannot be taken from one of the modules.

    Whoever takes classes from several modules asks first, so that all are changed or none.

    Args:
        modules: path and module.
        mixins: the classes that are to be taken.
    """
    out_of_reach = [
        f"{path}: {type(module).__name__}"
        for path, module in modules
        if any(isinstance(module, mixin) and not _reachable(type(module), mixin) for mixin in mixins)
    ]
    if out_of_reach:
        raise ConfigError(
            "Since Theodora changed the class of these modules, another library has put a class of its own on top, "
            "from under which Theodora's cannot be taken; nothing was changed. Undo its change first (that of "
            "torch.nn.utils.parametrize by remove_parametrizations). FSDP2's fully_shard cannot be undone: do this "
            "before it, or save the adapter and load it onto a new model:" + bullet_list(out_of_reach, 20)
        )


def cannot_replace_weight(module: nn.Module, name: str = "weight", *, shared: bool = False) -> str | None:
    """Why no other parameter, a merged one, can take the place of the module's weight, or None if it can.

    A sharded weight keeps its place and is written to, so that it must not be `shared` with another module.
    """
    weight = module._parameters.get(name)  # pyright: ignore[reportPrivateUsage]
    if weight is None and packed_tensor(module) is not None:
        return None
    if weight is None:
        return "its weight is made in each pass, of parameters by another name (as torch.nn.utils.parametrize does)"
    if is_sharded(weight) and managed(module) and type(here(weight)) is Tensor:
        if library_weight(module, nn.Parameter(here(weight), requires_grad=False)) is not None:
            return "its weight is quantised and sharded, and the merged one would be whole in every process"
        return "its weight is sharded, and shared with another module or extended by rows" if shared else None
    if type(weight.data) is not Tensor and library_weight(module, weight) is None:
        return f"its weight is sharded or special ({type(weight.data).__name__})"
    return None


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
def _made(mixin: type[Swapped], own: type[nn.Module]) -> type[Swapped]:
    return type(mixin.prefix + own.__name__, (mixin, own), {"__module__": mixin.__module__, _MADE: True})


def _taken_apart(made: type[nn.Module]) -> tuple[list[type[Swapped]], type[nn.Module]]:
    """Our mixins, the last one first, and the class on which they stand."""
    mixins: list[type[Swapped]] = []
    while _MADE in vars(made):
        mixin, made = made.__bases__
        mixins.append(mixin)
    return mixins, made


def _put_together(mixins: list[type[Swapped]], own: type[nn.Module]) -> type[nn.Module]:
    for mixin in reversed(mixins):
        own = _made(mixin, own)
    return own


def _reachable(made: type[nn.Module], mixin: type[Swapped]) -> bool:
    return any(issubclass(each, mixin) for each in _taken_apart(made)[0])


def _new(mixins: list[type[Swapped]], own: type[nn.Module]) -> nn.Module:
    return object.__new__(_put_together(mixins, own))
