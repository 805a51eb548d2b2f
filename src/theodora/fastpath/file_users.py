"""Attention modules as users of functions that are replaced in the file they stand in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class FileUser:
    """Held by an attention module on the fast path, which counts as a user of its patches as long as it does.

    A copy of the module counts for itself.
    """

    def __init__(self, make: Callable[[str], FileUser | None], file: str, *uses: object) -> None:
        """Take what makes another one of a file (a module's name), the file, and the uses of patches, to hold."""
        self.make, self.file, self.uses = make, file, uses

    def __reduce__(self) -> Any:
        return self.make, (self.file,)


def is_attention(module: nn.Module) -> bool:
    """Whether it is called so."""
    return "ttention" in type(module).__name__


def use_file(module: nn.Module, name: str, make: Callable[[str], FileUser | None]) -> bool:
    """Let an attention module hold a user of its file under `name`, if `make` gives one; say whether it holds one."""
    if not is_attention(module):
        return False
    user = module.__dict__.get(name) or make(type(module).__module__)
    if user is None:
        return False
    module.__dict__[name] = user
    return True
