"""Locks that die with whoever holds them, and temporary folders that are known by such a lock.

A lock is `flock` on an open file: the kernel lets go of it however the process ends. A forked child would inherit it,
and keep it after its parent's death; here it lets go at once. Temporary folders hold a locked file that says whose they
are, so that the next process that needs one deletes those of dead ones. Where a system has no such locks (Windows, some
network file systems) nothing is taken for dead.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_held: set[int] = set()
_OWNER = ".theodora-owner.json"
_BEGUN = ".theodora-begun-"
_TEMPORARY = re.compile(r"theodora-[a-z]+-[a-z0-9_]{8}")
SECONDS_TO_LOCK = 60
"""A process locks and names what it has begun within this time; what is older and has neither is a dead one's."""


def try_lock(descriptor: int) -> bool | None:
    """Take the lock of an open file for this process, until `release`.

    Returns:
        False if another holds it; None if there are no locks here.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    _held.add(descriptor)
    return True


def holds(descriptor: int) -> bool:
    """Whether this process took the lock: one that was forked since did not."""
    return descriptor in _held


def release(descriptor: int) -> None:
    """Close a file, and give its lock back. In a forked child, which closed it when it began, nothing is done."""
    if descriptor in _held:
        _held.discard(descriptor)
        os.close(descriptor)


def _let_go() -> None:
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)  # closing one of two descriptors leaves the lock with the other, the parent's
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def this_process() -> dict[str, Any]:
    """Who holds a lock, for people and for other machines."""
    now = time.strftime("%Y-%m-%d %H:%M:%S%z")
    return {"pid": os.getpid(), "host": socket.gethostname(), "machine": _machine(), "since": now}


def is_here(owner: dict[str, Any]) -> bool:
    """Whether an owner lives, or lived, on this machine, whose locks can be believed.

    Containers of one machine have a kernel in common; a machine that was started again has kept its name.
    """
    return owner.get("host") == socket.gethostname() or (_machine() is not None and owner.get("machine") == _machine())


def read_owner(descriptor: int) -> dict[str, Any] | None:
    """What `this_process` wrote into an open file; None if it holds nothing like it."""
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        owner = json.loads(os.read(descriptor, 4096))
    except (OSError, ValueError, RecursionError):
        return None
    return owner if isinstance(owner, dict) else None


def write_owner(descriptor: int) -> None:
    """Write down that this process holds an open file."""
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, (json.dumps(this_process()) + "\n").encode())


@functools.cache
def _machine() -> str | None:
    """What tells one run of a kernel from all others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


@contextmanager
def temporary_folder(kind: str) -> Iterator[Path]:
    """Yield an empty folder in TMPDIR that vanishes when the block ends; if the process is killed, with the next one.

    Args:
        kind: what it is for, in small letters; it is called `theodora-KIND-…`.
    """
    folder, lock = _new_folder(kind)
    try:
        yield folder / "files"
    finally:
        _delete(folder, lock)


def process_folder(kind: str) -> Path:
    """This process's own folder in TMPDIR, that vanishes when it ends; if it is killed, with the next process."""
    return _process_folder(kind, os.getpid())


@functools.cache
def _process_folder(kind: str, process: int) -> Path:
    folder, lock = _new_folder(kind)
    atexit.register(lambda: os.getpid() == process and _delete(folder, lock))
    return folder / "files"


def _new_folder(kind: str) -> tuple[Path, int]:
    root = Path(tempfile.gettempdir()).absolute()
    _clear_once(root, os.getpid())
    # It gets its name with the lock, so that nobody takes it for a dead one's.
    begun = Path(tempfile.mkdtemp(prefix=_BEGUN, dir=root))
    try:
        lock = os.open(begun / _OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        if not try_lock(lock):
            os.close(lock)
            lock = -1
        else:
            write_owner(lock)
        (begun / "files").mkdir()
        return begun.rename(root / begun.name.replace(_BEGUN, f"theodora-{kind}-", 1)), lock
    except OSError:
        shutil.rmtree(begun, ignore_errors=True)
        raise


def _delete(folder: Path, lock: int) -> None:
    if lock < 0 or holds(lock):
        _remove(folder)
        release(lock)


def _remove(folder: Path) -> None:
    """Delete a folder such that what a kill leaves of it is taken for one that was only begun."""
    with contextlib.suppress(OSError):
        folder = folder.rename(folder.with_name(_BEGUN + folder.name.rpartition("-")[2]))
    shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _clear_once(root: Path, process: int) -> None:
    clear_dead(root)
    # And at the end, what children leave that were ended by a signal.
    atexit.register(lambda: os.getpid() == process and clear_dead(root))


def clear_dead(root: Path) -> None:
    """Delete the temporary folders that dead processes of this user, on this machine, left in `root`."""
    with contextlib.suppress(OSError), os.scandir(root) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if _is_ours(entry):
                    _clear(Path(entry.path))


def _is_ours(entry: os.DirEntry[str]) -> bool:
    named = entry.name.startswith(_BEGUN) or _TEMPORARY.fullmatch(entry.name)
    if not named or not entry.is_dir(follow_symlinks=False):
        return False
    return not hasattr(os, "geteuid") or entry.stat(follow_symlinks=False).st_uid == os.geteuid()


def _clear(folder: Path) -> None:
    if folder.name.startswith(_BEGUN):
        if time.time() - folder.stat().st_mtime > SECONDS_TO_LOCK:
            shutil.rmtree(folder, ignore_errors=True)
        return
    lock = os.open(folder / _OWNER, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    if not is_here(read_owner(lock) or {}) or not try_lock(lock):
        os.close(lock)
        return
    _remove(folder)
    release(lock)
