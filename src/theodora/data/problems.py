"""Collects what is wrong with the rows of a source, so that one error can name all of it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from theodora.data.left_out import LeftOut
from theodora.errors import DataError, bullet_list, shown

SHOWN = 10
"""Problems that an error names; it counts the others."""
_LONGEST_NAME = 100


class Problems:
    """The first `SHOWN` problems in words, and how many there are."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.count = 0
        self._shown: list[str] = []
        self.left_out: list[LeftOut] = []
        """What a file holds beside its rows."""

    def add(self, where: str, what: str) -> None:
        """Note that `what` is wrong at `where` ("line 3", "b.csv, line 3", or "" for the whole source)."""
        self.count += 1
        if len(self._shown) < SHOWN:
            self._shown.append(f"{where}: {what}" if where else what)

    def raise_if_any(self, mend: str = "") -> None:
        """Raise the one error that names them.

        Raises:
            DataError: if anything was added.
        """
        if not self.count:
            return
        more = [f"and {self.count - SHOWN} more"] if self.count > SHOWN else []
        noun = "problem" if self.count == 1 else "problems"
        raise DataError(
            f"{self.source}: {self.count} {noun}:" + bullet_list(self._shown + more) + (mend and f"\n{mend}")
        )


def listed(names: Iterable[object], most: int = 100) -> str:
    """Names in a message: `'a', 'b'`. Cut as `shown` cuts, each at about `most` characters; empty without any."""
    return shown(list(names), most)[1:-1]


def nearest(name: str, known: list[str]) -> str:
    """`"; did you mean 'x'?"` for the most similar known name, or an empty string."""
    if len(name) > _LONGEST_NAME:  # comparing takes time in the square of the length, and no slip is that long
        return ""
    closest = get_close_matches(name, known, n=1)
    return f"; did you mean {closest[0]!r}?" if closest else ""
