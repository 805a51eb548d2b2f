"""Files and folders that are whole or absent: written aside, flushed to disk, then renamed.

A process killed at any moment leaves at most a hidden sibling named `.<name>.partial-…` behind, never half of
anything under its final name.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from theodora.errors import CheckpointError, UsageError


def partial_name(path: Path) -> str:
    """The prefix of the hidden siblings under which `path` is prepared."""
    return f".{path.name}.partial-"


@contextmanager
def atomic_directory(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new folder that takes the name `path` when the block ends well, and vanishes when it does not.

    With `overwrite`, what stood at `path` before stays until the new folder is whole.

    Raises:
        UsageError: `path` exists and is not an empty folder, and `overwrite` is off.
        CheckpointError: the disk is full or the place cannot be written.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and not overwrite and not (path.is_dir() and not any(path.iterdir())):
        raise UsageError(f"{path} already exists. Choose another place, or allow it to be overwritten.")
    with _io_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=partial_name(path), dir=path.parent))
    try:
        with _io_errors(path):
            yield partial
            partial.chmod(0o777 & ~_umask())
            for file in partial.rglob("*"):
                if file.is_file():
                    _sync(file)
            _take_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield the path of a new file that takes the name `path` when the block ends well.

    Raises:
        CheckpointError: the disk is full or the place cannot be written.
    """
    path = Path(os.path.abspath(path))
    with _io_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=partial_name(path), dir=path.parent)
        os.close(handle)
    partial = Path(name)
    try:
        with _io_errors(path):
            yield partial
            partial.chmod(0o666 & ~_umask())
            _sync(partial)
            partial.replace(path)
            _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _take_place(partial: Path, path: Path) -> None:
    """Rename `partial` to `path`; what stood there is moved aside first and deleted last."""
    old = None
    if path.exists():
        old = Path(tempfile.mkdtemp(prefix=partial_name(path), dir=path.parent)) / "old"
        path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        if old is not None:
            old.rename(path)
        raise
    _sync(path.parent)
    if old is not None:
        shutil.rmtree(old.parent, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def _io_errors(path: Path) -> Iterator[None]:
    """Say in our own words what a full disk or a read-only folder means."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CheckpointError(f"No space left on the disk of {path}; nothing was changed there.") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise CheckpointError(f"{path} cannot be written ({error.strerror}); nothing was changed there.") from error
        raise
