"""Parts of rows from which nothing is learned, and how many rows hold them: for start panel, result and model card."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LeftOut:
    """Something that rows hold and that nothing is learned from, or that nobody sees."""

    what: str
    """As the file names it: "the column 'id'", "the key 'thought' of turns"."""
    rows: int
    """How many rows hold it."""
    why: str
    """What became of it and, where there is a mend, the mend: "not used", "the chat template does not show it; …"."""

    def __str__(self) -> str:
        return f"{self.what}: {self.why} ({self.rows:,} {'row' if self.rows == 1 else 'rows'})"


def named(parts: Iterable[LeftOut], source: str) -> tuple[LeftOut, ...]:
    """The same of rows that are not the main ones: "the column 'id' of more.jsonl"."""
    return tuple(replace(part, what=f"{part.what} of {source}") for part in parts)


def sentences(parts: Iterable[LeftOut]) -> list[str]:
    """One line each, in order, without repetitions."""
    return list(dict.fromkeys(map(str, parts)))
