"""What a chat template does not show of a conversation: counted over the rows, and said with what to do about it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from datasets import Dataset

from theodora.data.left_out import LeftOut

_TEMPLATE = "use a template that shows them (chat_template_path)"
_CLAUSE = re.compile(r"(?P<what>[^:;]+): (?P<why>left out [^;]*) \((?P<rows>[\d,]+) rows?\)")


class Hidden(Enum):
    """What a template may leave out; the value is what a file's reader would call it."""

    TOOLS = "tools on offer"
    CALLS = "tool calls"
    RESULTS = "tool results"
    SYSTEM = "system turns"
    USER = "text of user turns"
    TEXT = "text beside tool calls"
    REASONING = "reasoning"
    EARLIER = "reasoning of earlier turns"
    PART = "part of the text of learned turns"
    NAMES = "names of those who speak"
    UNMARKED = "what stands outside of the chat template's own markers"
    NOTHING = "turns of which nothing is shown"


_MENDS = {
    Hidden.TOOLS: f"{_TEMPLATE}, or describe them in the system turn",
    Hidden.CALLS: f"{_TEMPLATE}, or write them into the text of the turns",
    Hidden.RESULTS: f"{_TEMPLATE}, or write them into the text of the turns",
    Hidden.SYSTEM: "write them into the first system turn or into user turns",
    Hidden.USER: "use a template that shows it (chat_template_path)",
    Hidden.TEXT: "use a template that shows both (chat_template_path)",
    Hidden.REASONING: "use a template that shows it (chat_template_path)",
    Hidden.EARLIER: "as it will when the model is used (to learn it, end a row with each such turn)",
    Hidden.PART: "use a template that shows it (chat_template_path)",
    Hidden.NAMES: "write them into the text if they matter",
    Hidden.UNMARKED: "it is not learned",
    Hidden.NOTHING: "they are not learned",
}


@dataclass
class HiddenCounts:
    """How many rows, and turns in them, hold what a template does not show."""

    rows: Counter[Hidden] = field(default_factory=Counter[Hidden])
    turns: Counter[Hidden] = field(default_factory=Counter[Hidden])

    def add(self, hidden: Mapping[Hidden, int]) -> None:
        """Note one row."""
        self.rows.update(hidden.keys())
        self.turns.update(hidden)

    def left_out(self) -> tuple[LeftOut, ...]:
        """What is left out, in the order of `Hidden`."""
        return tuple(self._one(what) for what in Hidden if self.rows[what])

    def _one(self, what: Hidden) -> LeftOut:
        turns = (
            "" if what is Hidden.TOOLS else f" in {self.turns[what]:,} {'turn' if self.turns[what] == 1 else 'turns'}"
        )
        by = "" if what is Hidden.UNMARKED else " by the chat template"
        return LeftOut(what.value, self.rows[what], f"left out{by}{turns}, {_MENDS[what]}")


def left_out_of(dataset: Dataset) -> tuple[LeftOut, ...]:
    """What the chat template left out of the rows of `tokenize`, as the dataset's description says it."""
    clauses = _CLAUSE.finditer(dataset.info.description or "")
    return tuple(
        LeftOut(clause["what"].strip(), int(clause["rows"].replace(",", "")), clause["why"]) for clause in clauses
    )
