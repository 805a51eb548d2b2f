"""How much main memory there is left."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def main_memory() -> int:
    """Bytes of main memory that a new process can have here, within its container: cached files give way."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**34
    with suppress(OSError, ValueError, StopIteration, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    with suppress(OSError, ValueError):  # ("max" where there is no limit)
        folder = Path("/sys/fs/cgroup")
        limit = int((folder / "memory.max").read_text(encoding="ascii"))
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        cached = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        free = min(free, limit - int((folder / "memory.current").read_text(encoding="ascii")) + cached)
    return max(free, 0)
