"""One process at a time in an output folder: a lock that the kernel lets go of however its holder ends.

The lock is on a hidden file that names its holder to others, and that is deleted when the work ends. After a kill the
file stays, and its lock is free. Whoever gets the lock looks whether the name still leads to the file that it locked:
the holder before may have deleted that file between opening and locking.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from theodora.errors import UsageError, shown
from theodora.files.atomic import check_above, explained_io_errors
from theodora.locks import is_here, read_owner, release, try_lock, write_owner

LOCK = ".theodora.lock"
_DEBRIS = re.compile(r"\..+\.(partial|begun)-.+|" + re.escape(LOCK), re.DOTALL)


@contextmanager
def alone_in(folder: Path) -> Iterator[list[str]]:
    """Keep other processes of Theodora from writing into a folder until the block ends.

    The folder is made, with those above it; they go again if nothing was written into them.

    Yields:
        what the user should know of the lock.

    Raises:
        UsageError: another process is at work there; the message says which. Or the folder lies below a file.
        CheckpointError: the place cannot be written.
    """
    path, process = folder / LOCK, os.getpid()
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    with explained_io_errors(folder):
        descriptor, notes = _take(folder, path)
    try:
        yield notes
    finally:
        if os.getpid() == process:  # not in a child that was forked since
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            release(descriptor)
            with contextlib.suppress(OSError):
                for place in made:
                    place.rmdir()  # if it has come to nothing


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but what a killed process leaves half-written."""
    return folder.is_dir() and all(_DEBRIS.fullmatch(entry.name) for entry in folder.iterdir())


def _take(folder: Path, path: Path) -> tuple[int, list[str]]:
    while True:
        check_above(folder)
        if os.path.lexists(folder) and not folder.is_dir():
            raise UsageError(f"{folder} is no folder, and nothing can be written into it. Choose another place.")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = _open(path)
        except FileNotFoundError:  # the folder went with another process, whose work came to nothing
            continue
        taken, before = try_lock(descriptor), read_owner(descriptor)
        if taken is False:
            os.close(descriptor)
            raise UsageError(_busy(folder, before))
        if not taken or _is_still_there(descriptor, path):
            break
        release(descriptor)
    try:
        write_owner(descriptor)
    except OSError:
        if taken:
            release(descriptor)
        raise
    finally:
        if not taken:
            os.close(descriptor)
    if not taken:
        more = f"; {_told(before)} was the last to begin, and may be alive" if before else ""
        return -1, [f"the file system of {folder} has no locks, so that nothing keeps a second run out of it{more}"]
    if before is None or is_here(before):
        return descriptor, []
    return descriptor, [
        f"{folder} was last written by {_told(before)}, which did not end in order. The file system says that it is "
        "gone; if it still runs there, end one of the two"
    ]


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    if path.is_symlink() or path.is_dir():
        raise UsageError(f"{path} is {'a link' if path.is_symlink() else 'a folder'}; expected the file of a lock.")
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UsageError(f"{path} is no plain file; expected the file of a lock.")
    return descriptor


def _is_still_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _busy(folder: Path, holder: dict[str, Any] | None) -> str:
    return (
        f"{folder} is in use by {_told(holder)}, which is alive. Nothing was changed there. Wait until it ends, end "
        "it, or choose another output folder."
    )


def _told(holder: dict[str, Any] | None) -> str:
    """Who it is, for people; the file may hold anything."""
    values = [(holder or {}).get(name) for name in ("pid", "host", "since")]
    if None in values:
        return "another process"
    pid, host, since = (value if type(value) is int else shown(value, 60).strip("'\"") for value in values)
    return f"process {pid} on {host}, begun {since}"
