"""A run whose disk fails it in the middle; imported by the fork server, because limits and mounts stay in a process."""

import ctypes
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

from crash import jobs
from theodora.errors import CheckpointError
from theodora.train import callbacks

_NEW_USER, _NEW_MOUNTS, _READ_ONLY, _REMOUNT, _BIND = 0x10000000, 0x00020000, 1, 32, 4096


def tmpfs(folder: Path) -> str | None:
    """Mount 80 MB of memory at `folder`, for this process alone; why not, if it may not."""
    libc, ids = ctypes.CDLL(None, use_errno=True), (os.getuid(), os.getgid())
    flags = _NEW_MOUNTS if os.getuid() == 0 else _NEW_USER | _NEW_MOUNTS
    if libc.unshare(flags):
        return os.strerror(ctypes.get_errno())
    if flags & _NEW_USER:
        Path("/proc/self/setgroups").write_text("deny")
        for name, number in zip(("uid_map", "gid_map"), ids, strict=True):
            Path(f"/proc/self/{name}").write_text(f"0 {number} 1")
    if libc.mount(b"none", b"/", None, 1 << 18 | 1 << 14, None) or libc.mount(
        b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=80m"
    ):
        return os.strerror(ctypes.get_errno())
    return None


def fail(how: str, inputs: Path, folder: Path) -> None:
    """Train for 4 steps, then on to 8 with a disk that fails after step 5; write down the message, and keep the run."""
    (folder / "disk").mkdir()
    os.dup2(os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    if how != "limit" and (why := tmpfs(folder / "disk")):
        (folder / "message").write_text(f"skipped: {why}")
        return
    jobs.train_kind("plain", inputs, folder / "disk", max_steps=4)

    class Break(callbacks.CountUpdates):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                _break(how, folder / "disk")

    sys.modules["theodora.train.run"].CountUpdates = Break  # pyright: ignore
    try:
        jobs.train_kind("plain", inputs, folder / "disk", max_steps=8)
        message = "it went well"
    except CheckpointError as error:
        message = str(error)
    if how == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (folder / "message").write_text(message)
    shutil.copytree(folder / "disk" / "run", folder / "kept" / "run", symlinks=True)


def _break(how: str, disk: Path) -> None:
    if how == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, resource.RLIM_INFINITY))
    elif how == "read-only":
        # The mount itself has a file that is open for writing, the run's lock; one on top of it has none.
        mount, name = ctypes.CDLL(None).mount, os.fsencode(disk)
        if mount(name, name, None, _BIND, None) or mount(None, name, None, _BIND | _REMOUNT | _READ_ONLY, None):
            raise AssertionError
    else:
        room = {"no room": 0, "room for some": 40_000, "room for the adapter": 60_000}[how]
        (disk / "filler").write_bytes(b"\0" * (shutil.disk_usage(disk).free - room))
