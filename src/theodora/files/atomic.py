"""Files and folders that are whole or absent: written aside, flushed to disk, then renamed.

A process killed at any moment leaves at most a hidden sibling named `.<name>.partial-…` behind, never half of
anything under its final name. The writer holds a lock on such a sibling, which dies with it, so that whoever writes
there next can tell what is left over and deletes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from theodora.errors import CheckpointError, UsageError
from theodora.locks import SECONDS_TO_LOCK, holds, release, try_lock

_LONGEST_NAME = 200  # bytes; around it go ".", ".partial-" and eight random characters, by some libraries a suffix more
_REPLACED = "replaced"  # what stood at a name, while another folder takes it in two steps
# What a rename says where something stands at the name, and what writing says of a full disk or of a place to let be.
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EROFS, errno.EPERM, errno.EFBIG, errno.EIO)


def partial_name(path: Path) -> str:
    """The prefix of the hidden siblings under which `path` is prepared."""
    return f".{_short(path.name)}.partial-"


def _short(name: str) -> str:
    """A name that leaves room for what is put around it: a file's may have 255 bytes, and so may the final one.

    A longer one ends with its hash, so that two of them do not delete each other's leftovers.
    """
    encoded = os.fsencode(name)
    if len(encoded) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:16]
    beginning = encoded[: _LONGEST_NAME - len(digest) - 1].decode("utf-8", errors="ignore")  # half a character is none
    return f"{beginning}~{digest}"


@contextmanager
def atomic_directory(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new folder that takes the name `path` when the block ends well, and vanishes when it does not.

    With `overwrite`, what stood at `path` before stays until the new folder is whole; a link is replaced, and what it
    points to stays.

    Raises:
        UsageError: `path` exists and is not an empty folder, and `overwrite` is off; or it lies below a file.
        CheckpointError: the disk is full or the place cannot be written.
    """
    path = Path(os.path.abspath(path))
    clear_leftovers(path.parent, glob.escape(path.name))
    # A link that points nowhere is there, too.
    if os.path.lexists(path) and not overwrite and not (path.is_dir() and not any(path.iterdir())):
        raise UsageError(f"{path} already exists. Choose another place, or allow it to be overwritten.")
    with _prepared(path, folder=True) as partial:
        yield partial
        partial.chmod(0o777 & ~_umask())
        for written in (*partial.rglob("*"), partial):
            if written.is_file():
                _open_to_others(written)
            if written.is_file() or written.is_dir():
                flush(written)
        _take_place(partial, path, overwrite)


@contextmanager
def atomic_write(path: str | Path, overwrite: bool = True) -> Iterator[Path]:
    """Yield the path of a new file that takes the name `path` when the block ends well.

    Raises:
        UsageError: `path` lies below a file; or it exists when the block ends, and `overwrite` is off.
        CheckpointError: the disk is full or the place cannot be written.
    """
    path = Path(os.path.abspath(path))
    with _prepared(path, folder=False) as partial:
        yield partial
        partial.chmod(0o666 & ~_umask())
        flush(partial)
        _take_name(partial, path, overwrite)
        flush(path.parent)


@contextmanager
def atomic_files(folder: str | Path) -> Iterator[Path]:
    """Yield a new folder whose files, when the block ends well, move into `folder`, each whole; others there stay.

    Raises:
        UsageError: `folder` is a file, or lies below one.
        CheckpointError: the disk is full or the place cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    with explained_io_errors(folder):
        _make_folder(folder)
        partial, lock = _new_partial(folder / "files", folder=True)
    try:
        with explained_io_errors(folder):
            yield partial
            files = sorted(file for file in partial.rglob("*") if file.is_file())
            for file in files:
                _open_to_others(file)
                flush(file)
            for file in files:
                final = folder / file.relative_to(partial)
                final.parent.mkdir(parents=True, exist_ok=True)
                file.replace(final)
            for place in {folder, *((folder / file.relative_to(partial)).parent for file in files)}:
                flush(place)
    finally:
        _end(partial, lock)


@contextmanager
def scratch_directory(path: str | Path) -> Iterator[Path]:
    """Yield a hidden folder beside `path`, for what is needed to make it, that vanishes when the block ends.

    One that a killed process leaves goes when `path` is written next.

    Raises:
        UsageError: `path` lies below a file.
        CheckpointError: the disk is full or the place cannot be written.
    """
    with _prepared(Path(os.path.abspath(path)), folder=True) as partial:
        yield partial


@contextmanager
def _prepared(path: Path, folder: bool) -> Iterator[Path]:
    """Yield the hidden sibling under which `path` is prepared, locked; what is left of it in the end is deleted."""
    with explained_io_errors(path):
        _make_folder(path.parent)
        partial, lock = _new_partial(path, folder=folder)
    try:
        with explained_io_errors(path):
            yield partial
    finally:
        _end(partial, lock)


def check_above(path: Path) -> None:
    """Raise a UsageError if no folder can stand above `path`, because a file, or a link that points nowhere, does."""
    above = next((parent for parent in path.parents if os.path.lexists(parent)), None)
    if above is not None and not os.path.isdir(above):
        what = f"a link to {os.readlink(above)}, where there is nothing" if not os.path.exists(above) else "a file"
        raise UsageError(f"{path} cannot be written: {above} is {what}; expected a folder. Choose another place.")


def _make_folder(path: Path) -> None:
    check_above(path / "file")
    path.mkdir(parents=True, exist_ok=True)


def remove_folder(path: Path) -> None:
    """Delete a folder such that a killed process leaves all or nothing of it under its name."""
    if not path.is_dir():
        return
    with explained_io_errors(path):
        partial, lock = _new_partial(path, folder=True)
    try:
        with explained_io_errors(path):
            path.rename(partial / "old")
    finally:
        _end(partial, lock)


def clear_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete what killed processes left in `folder` while they wrote `name` (or anything); living ones keep theirs.

    What a process had moved away, and did not come to replace, gets its name back.
    """
    partial, begun_names = (
        (".*.partial-*", ".*.begun-*")
        if name is None
        else (f"{glob.escape(prefix)}*" for prefix in (partial_name(Path(name)), _begun_name(Path(name))))
    )
    for leftover in folder.glob(partial):
        with contextlib.suppress(OSError):
            lock = _lock(leftover)
            if lock is not None:
                _put_back(leftover)
                _remove(leftover)
                release(lock)
    for begun in folder.glob(begun_names):
        with contextlib.suppress(OSError):
            if time.time() - begun.stat().st_mtime > SECONDS_TO_LOCK:
                _remove(begun)


def _put_back(leftover: Path) -> None:
    replaced, (name, mark, _) = leftover / _REPLACED, leftover.name[1:].rpartition(".partial-")
    if mark and replaced.is_dir() and not os.path.lexists(leftover.with_name(name)):
        replaced.rename(leftover.with_name(name))


def _begun_name(path: Path) -> str:
    return f".{_short(path.name)}.begun-"


def _new_partial(path: Path, *, folder: bool) -> tuple[Path, int | None]:
    """A new hidden sibling of `path`, and the descriptor that holds its lock. Those of dead processes are deleted."""
    clear_leftovers(path.parent, path.name)
    # It takes its name when it is locked: before, others would delete it as a leftover.
    if folder:
        begun = Path(tempfile.mkdtemp(prefix=_begun_name(path), dir=path.parent))
    else:
        handle, name = tempfile.mkstemp(prefix=_begun_name(path), dir=path.parent)
        os.close(handle)
        begun = Path(name)
    lock = _lock(begun)
    return begun.rename(begun.with_name(begun.name.replace(_begun_name(path), partial_name(path), 1))), lock


def _lock(path: Path) -> int | None:
    """Open `path` with a lock of this process alone; None if another holds it, or the file system has no locks."""
    if sys.platform == "win32":
        return None
    descriptor = os.open(path, os.O_RDONLY)
    if try_lock(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _end(partial: Path, lock: int | None) -> None:
    if lock is None or holds(lock):  # not in a child that was forked since
        _remove(partial)
    if lock is not None:
        release(lock)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _take_name(partial: Path, path: Path, overwrite: bool) -> None:
    if not overwrite:
        try:
            os.link(partial, path)
            return
        except FileExistsError:
            raise UsageError(f"{path} was written by another process meanwhile. Choose another place.") from None
        except OSError:  # a file system without further names for a file
            pass
    partial.replace(path)


def _take_place(partial: Path, path: Path, overwrite: bool) -> None:
    """Rename `partial` to `path`. What stood there is left under the name `partial`, or deleted."""
    if not os.path.lexists(path) or not (overwrite or path.is_symlink()):
        try:
            partial.rename(path)  # over an empty folder at the most
        except OSError as error:
            if error.errno not in _TAKEN and not isinstance(error, FileExistsError):
                raise
            if not (overwrite or (path.is_dir() and not any(path.iterdir()))):  # (Windows renames over nothing)
                raise UsageError(f"{path} was written by another process meanwhile. Choose another place.") from None
            _replace(partial, path)
    else:
        _replace(partial, path)
    flush(path.parent)


def _replace(partial: Path, path: Path) -> None:
    if _exchange(partial, path):
        return
    # For a moment nothing has the name. After a kill at that moment `clear_leftovers` puts back what stood there.
    away, lock = _new_partial(path, folder=True)
    old = away / _REPLACED
    try:
        path.rename(old)
        try:
            partial.rename(path)
        except OSError:
            old.rename(path)
            raise
    finally:
        _end(away, lock)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at one moment, where the system can: Linux, on all of its own file systems."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _open_to_others(path: Path) -> None:
    """Let those read a file whom the umask lets: safetensors 0.8 writes for its owner alone."""
    if not path.is_symlink():
        path.chmod(path.stat().st_mode | 0o666 & ~_umask())


def flush(path: Path) -> None:
    """Have the system write a file or folder to the disk, which is when some disks say that they are full."""
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
def explained_io_errors(path: Path) -> Iterator[None]:
    """Say in our own words what a full disk or a read-only folder means.

    Raises:
        CheckpointError: in the place of such an error, also where a library hid it in one of its own.
    """
    try:
        yield
    except Exception as error:
        number = _error_number(error, path)
        if number in _FULL:
            raise CheckpointError(f"No space left on the disk of {path}; nothing was changed there.") from error
        if number in _REFUSED:
            why = os.strerror(number)
            raise CheckpointError(f"{path} cannot be written ({why}); nothing was changed there.") from error
        raise


def _error_number(error: Exception, path: Path) -> int:
    """The system's number of an error; 0 if it is none of the system's."""
    if isinstance(error, OSError):
        return error.errno or 0
    if match := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors
        return int(match[1])
    if re.search(r"PytorchStreamWriter|unexpected pos|file write failed|iostream error", str(error)):
        # torch.save does not say more. What it had written is still there, so a full disk is full.
        return errno.ENOSPC if shutil.disk_usage(path.parent).free < 2**20 else errno.EIO
    return 0
