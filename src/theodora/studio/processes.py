"""Processes that go on when the studio ends: started in a session of their own, and known again by pid and start."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from theodora.locks import is_here, read_owner
from theodora.terminal import TELLS_STATUS

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_OURS: dict[int, subprocess.Popen[bytes]] = {}
"""Children of this process, which have to be asked for their end, or they stay as zombies."""


def begin(words: Sequence[str], log: Path, folder: str) -> tuple[int, str]:
    """Start `python -m theodora words`; what it says goes to the end of a log.

    Args:
        words: of its command line.
        log: a file, which is made if it is not there.
        folder: that it works in.

    Returns:
        its pid, and when it started.
    """
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "theodora", *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "110", TELLS_STATUS: "1"},
            start_new_session=True,  # Ctrl-C at the studio's terminal, and its end, are none of the run's business
        )
    _OURS[process.pid] = process
    return process.pid, started_at(process.pid) or ""


def started_at(pid: int) -> str | None:
    """When a process started, in the system's own words; None if there is none, or it has ended."""
    if (child := _OURS.get(pid)) is not None and child.poll() is not None:
        del _OURS[pid]
        return None
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()  # the name before it may hold anything
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        if os.path.exists("/proc/self/stat"):
            return None
    words = ["ps", "-o", "lstart=", "-p", str(pid)]  # macOS
    with suppress(OSError):
        said = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
        return said or None
    return None


def is_alive(pid: int, started: str) -> bool:
    """Whether the process is still the one that started then, and not another one of the same number."""
    return bool(started) and started_at(pid) == started


def ask_to_end(pid: int, started: str) -> bool:
    """Send SIGTERM, after which a run saves a checkpoint; whether there was somebody to get it."""
    if not is_alive(pid, started):
        return False
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGTERM)
        return True
    return False


def end(pid: int, started: str, patience: float) -> None:
    """Have a process end, and wait for it; one that has not ended after so many seconds is killed."""
    if not ask_to_end(pid, started):
        return
    late = time.monotonic() + patience
    while is_alive(pid, started):
        if time.monotonic() > late:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.05)


def holder_of(lock: Path) -> tuple[int, str] | None:
    """Pid and start of the process of this machine that holds the lock of an output folder; None if none does.

    The file names it, but anybody can write a file: whoever is named has to hold the lock, or "Stop" in a folder from
    elsewhere would end any process of the user's.
    """
    flags = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"))
    try:
        descriptor = os.open(lock, flags)
    except OSError:
        return None
    try:
        owner = read_owner(descriptor) or {}
        pid = owner.get("pid")
        if type(pid) is not int or pid <= 1 or not is_here(owner) or not _holds(pid, descriptor):
            return None
    finally:
        os.close(descriptor)
    started = started_at(pid)
    return None if started is None else (pid, started)


def _holds(pid: int, descriptor: int) -> bool:
    with suppress(OSError):  # (Asking for the lock would keep a run that begins at this moment from having it.)
        text = Path("/proc/locks").read_text(encoding="ascii")
        return re.search(rf"FLOCK +ADVISORY +WRITE +{pid} \S+:{os.fstat(descriptor).st_ino} ", text) is not None
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False
