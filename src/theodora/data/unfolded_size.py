"""How much a file may unfold to: a kilobyte of Parquet or gzip can stand for more rows than any disk holds.

What people write shrinks a few times, the same system prompt in every row a hundred times. So beside half a gigabyte
that any file may fill, a thousand times its size is allowed, and more if the user says that the data are really so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from theodora.errors import DataError

VARIABLE = "THEODORA_UNFOLDED_GB"
"""The environment variable with which a user allows more."""
ANY_FILE = 512 << 20
"""Bytes that a file of any size may unfold to."""
MOST_COMPRESSED = 1000
"""How many times over a file may unfold, beyond that: several times what compresses best of what people write."""
VALUE = 16
"""Bytes that a number, or an empty text, counts for."""


class UnfoldedSize:
    """Counts what rows of a source unfold to, against what it has on disk.

    Args:
        name: of the source.
        on_disk: its bytes.
    """

    def __init__(self, name: str, on_disk: int) -> None:
        self.allowed = _allowed_by_user() or ANY_FILE + MOST_COMPRESSED * on_disk
        self._name, self._on_disk, self._size = name, on_disk, 0

    def add(self, size: int) -> None:
        """Count some more bytes.

        Raises:
            DataError: they are too many.
        """
        self._size += size
        if self._size > self.allowed:
            raise DataError(self.complaint())

    def complaint(self, size: int | None = None) -> str:
        """What to say of a file that unfolds to `size` bytes; None: to more than is allowed."""
        told = f"{size:,} bytes" if size else f"more than {self.allowed:,} bytes"
        return (
            f"{self._name} has {self._on_disk:,} bytes and unfolds to {told} of rows; expected at most "
            f"{self.allowed:,}. A file may be made to fill a disk. If the data are really so, write them as JSON "
            f"lines, or say how much room they may take: {VARIABLE}={max(8, 2 * (size or self.allowed) >> 30)}"
        )


def size_of(value: Any) -> int:
    """Bytes that a row takes, nearly: of its texts, and a few for each value."""
    size, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        size += VALUE
        if isinstance(item, str | bytes):
            size += len(item)
        elif isinstance(item, dict | Mapping):  # a dict is one, which takes longer to find out
            waiting.extend(item.values())
        elif isinstance(item, list | tuple):
            waiting.extend(item)
    return size


def _allowed_by_user() -> int:
    """Bytes that the environment variable allows; 0 if it is not set."""
    said = os.environ.get(VARIABLE)
    if not said:
        return 0
    try:
        gigabytes = float(said)
    except ValueError:
        gigabytes = 0.0
    if not 0 < gigabytes < 1e9:
        raise DataError(f"{VARIABLE} is {said!r}; expected a number of gigabytes, such as 8")
    return int(gigabytes * (1 << 30))
