"""The imports that a command begins with: torch, transformers and TRL, some four thousand files.

They are made shorter in three ways, of which none changes what is imported. Python's collector of garbage goes through
all objects again and again while their number grows, although everything that is imported stays: it rests meanwhile,
and leaves them alone afterwards. And transformers and TRL each read which distribution every installed file belongs to:
that is kept, until something is installed, as is what the files of transformers' models export (exports.py).
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import importlib.metadata
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from theodora.cli.exports import exports_kept
from theodora.kept import kept
from theodora.patches import replaced

_INSTALLED = (".dist-info", ".egg-info", ".egg")
_find = importlib.metadata.packages_distributions


@contextmanager
def imports(*, gpu: bool = False) -> Iterator[None]:
    """Around the imports of a command.

    Args:
        gpu: whether the command computes on a GPU where there is one, whose driver then wakes meanwhile.
    """
    if gpu:
        threading.Thread(target=_wake_driver, name="theodora-driver").start()
    # Where it is turned off, somebody else looks after garbage. And a process that has torch by now goes on after the
    # command: what it holds, models of earlier commands, say, becomes garbage, which nobody would collect.
    rests = gc.isenabled() and "torch" not in sys.modules
    if rests:
        gc.collect()
        gc.disable()
    try:
        with replaced(importlib.metadata, packages_distributions=_packages_distributions), exports_kept():
            yield
    finally:
        if rests:
            gc.freeze()
            atexit.register(gc.unfreeze)  # or libraries would call it a leak
            gc.enable()


def _wake_driver() -> None:
    """What torch does when it is asked for GPUs, in some tenths of a second; done twice, it costs nothing."""
    with suppress(OSError, AttributeError):  # no driver
        ctypes.CDLL("libcuda.so.1").cuInit(0)  # which leaves Python to others


@functools.cache
def _once(paths: tuple[str, ...]) -> dict[str, list[str]]:
    conditions = _installed(paths)
    if conditions is None:
        return dict(_find())
    return kept("packages", conditions, lambda: dict(_find()), _is_mapping)


def _packages_distributions() -> dict[str, list[str]]:
    """What `importlib.metadata.packages_distributions` gives: importable name → distributions that bring it."""
    return {name: list(distributions) for name, distributions in _once(tuple(sys.path)).items()}


def _installed(paths: tuple[str, ...]) -> list[Any] | None:
    """Which distributions each folder of `sys.path` holds, and since when; None where others may be found, too."""
    if any(hasattr(finder, "find_distributions") and finder is not PathFinder for finder in sys.meta_path):
        return None
    found: list[Any] = [sys.version]
    for path in map(Path, paths):  # "" is the folder that the process works in
        try:
            names = [each for each in path.iterdir() if each.suffix in _INSTALLED] if path.is_dir() else [path]
            found.append([str(path), sorted((each.name, each.stat().st_mtime_ns) for each in names)])
        except OSError:  # python311.zip, which seldom is there
            found.append([str(path), None])
    return found


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in value.values()
    )
