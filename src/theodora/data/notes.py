"""What there is to say about one row while it is read: what is wrong with it, what of it is used, what is left out."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, field
from typing import Any

from theodora.data.problems import nearest

NOT_USED = "not used"

_GAPS = re.compile(r"[\s-]+")


@dataclass
class Notes:
    """Collected by the readers of one row, and counted over all rows by `load_examples`."""

    problems: list[str] = field(default_factory=list[str])
    used: dict[str, None] = field(default_factory=dict[str, None])
    """Columns that were read, in order."""
    left_out: dict[tuple[str, str], None] = field(default_factory=dict[tuple[str, str], None])
    """What the row holds and nothing is learned from, and why."""

    def wrong(self, what: str) -> None:
        """Note that the row cannot be used."""
        self.problems.append(what)

    def use(self, *columns: str) -> None:
        """Note that columns were read."""
        self.used.update(dict.fromkeys(columns))

    def leave_out(self, what: str, why: str = NOT_USED) -> None:
        """Note something that the row holds and that nothing is learned from."""
        self.left_out[what, why] = None


@functools.lru_cache(maxsize=1024)
def not_used(name: str, known: tuple[str, ...]) -> str:
    """Why a column or a key is left out that means nothing here, and what it may be a slip of the pen for."""
    return NOT_USED + nearest(spelling(name), list(known))


def spelling(name: object) -> str:
    """A name as names are compared here: "System Prompt", "system-prompt" and "system_prompt" are one."""
    return _GAPS.sub("_", str(name).strip().lower())


def is_empty(value: Any) -> bool:
    """Whether a cell or a key holds nothing: null, blank text, no items, or (as Arrow fills structs) nulls alone."""
    if isinstance(value, str):
        return not value or value.isspace()
    if isinstance(value, dict):
        return all(map(is_empty, value.values()))
    if isinstance(value, list):
        return all(map(is_empty, value))
    return value is None or (isinstance(value, float) and math.isnan(value))  # pandas' word for nothing
