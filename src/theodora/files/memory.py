"""How much memory there is for what a file says that it holds."""

from __future__ import annotations

import os


def available_memory() -> int:
    """Bytes that can be had without others giving up theirs, as Linux says; elsewhere all there are."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            told = dict(line.split(":", 1) for line in file)
        return int(told["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
