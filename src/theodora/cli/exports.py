"""What the files of transformers' models export, which it reads out of all 2,500 of them at each start, twice.

It is kept (`theodora.kept`) until one of these files is another. transformers asks for it while it is being imported,
so the function that finds it out is replaced as soon as the module that has it is there.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from theodora.kept import kept
from theodora.patches import wrap_once

_WHERE, _FUNCTION = "transformers.utils.import_utils", "define_import_structure"
_MOST = 4  # installations of transformers, times two

Structure = dict[frozenset[str], dict[str, set[str]]]
"""What has to be installed -> module -> names that it exports then."""


@contextmanager
def exports_kept() -> Iterator[None]:
    """Around an import of transformers, which it does not bring about."""
    finder = _WhenImported(_WHERE, _keep)
    if _WHERE not in sys.modules:
        sys.meta_path.insert(0, finder)  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)  # pyright: ignore[reportArgumentType]


class _WhenImported:
    """A finder that calls a function with a module as soon as that has been imported, and then is gone."""

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self._name, self._then = name, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The module's spec, found by others."""
        if name != self._name:
            return None
        sys.meta_path.remove(self)  # pyright: ignore[reportArgumentType]
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            if module.__name__ == self._name:  # some loaders load others, too
                self._then(module)

        with suppress(AttributeError):  # of programs made into one file: it is imported, and nothing is kept
            spec.loader.exec_module = exec_module
        return spec


def _keep(module: Any) -> None:
    if hasattr(module, _FUNCTION):  # versions to come may have another
        wrap_once(module, _FUNCTION, lambda find: _keeping(module, find))


def _keeping(module: Any, find: Callable[..., Structure]) -> Callable[..., Structure]:
    models = Path(module.__file__).parents[1] / "models"

    def define_import_structure(module_path: Any, prefix: str | None = None) -> Structure:
        path = Path(module_path)
        if path not in (models, models / "__init__.py"):
            return find(module_path, prefix)
        try:
            conditions = [sys.version, str(path), prefix, _stamp(module.__file__, models)]
        except OSError:  # no files, as of an archive
            return find(module_path, prefix)
        return _structure(
            kept(f"exports-{prefix}", conditions, lambda: _plain(find(module_path, prefix)), _is_plain, most=_MOST)
        )

    return define_import_structure


@functools.cache
def _stamp(code: str, folder: Path) -> str:
    """What changes when a file in the folder, or the one that reads them, does."""
    hashed, folders = hashlib.sha256(repr(_state(os.stat(code))).encode()), [str(folder)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir():
                    folders += [] if entry.name == "__pycache__" else [entry.path]
                else:
                    hashed.update(repr((entry.path, *_state(entry.stat()))).encode())
    return hashed.hexdigest()


def _state(file: os.stat_result) -> tuple[int, int]:
    return file.st_size, file.st_mtime_ns


def _plain(structure: Structure) -> list[Any]:
    """As JSON takes it."""
    return [
        [sorted(needed), {name: sorted(exported) for name, exported in modules.items()}]
        for needed, modules in structure.items()
    ]


def _structure(plain: list[Any]) -> Structure:
    return {frozenset(needed): {name: set(exported) for name, exported in modules.items()} for needed, modules in plain}


def _is_plain(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, list)
        and len(each) == 2
        and _are_names(each[0])
        and isinstance(each[1], dict)  # pyright: ignore[reportUnknownArgumentType]
        and all(_are_names(exported) for exported in each[1].values())  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType, reportUnknownMemberType]
        for each in value  # pyright: ignore[reportUnknownVariableType]
    )


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)  # pyright: ignore[reportUnknownVariableType]
