"""The hash of Triton's compiler, under which it looks for kernels that it compiled before.

Triton makes it in each process anew, out of half a gigabyte. Here it is kept (`theodora.kept`) until one of these files
is another.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import triton
import triton.runtime.cache

from theodora.kept import kept
from theodora.patches import wrap_once


def keep_compiler_hash() -> None:
    """Let Triton look up what it has found out before. Older versions that have it elsewhere go on as they do."""
    if hasattr(triton.runtime.cache, "triton_key"):
        wrap_once(triton.runtime.cache, "triton_key", _keeping)


def _keeping(find: Any) -> Any:
    @cache
    def triton_key() -> str:
        try:
            conditions = [sys.version, *_files(Path(triton.__file__).parent)]
        except OSError:
            return find()
        return kept("triton-key", conditions, find, lambda key: isinstance(key, str), most=8)

    return triton_key


def _files(root: Path) -> list[list[Any]]:
    """Every file in the folder with what changes when it does: path, bytes, and when it was written."""
    found: list[list[Any]] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(names):
            path = os.path.join(folder, name)
            state = os.stat(path)
            found.append([path, state.st_size, state.st_mtime_ns])
    return found
