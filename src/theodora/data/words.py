"""The words of a cell or a turn: text, a number, or a list of parts → text, and the reasoning in it."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any, cast

from theodora.data.notes import Notes, is_empty
from theodora.data.tools import describe, whole_number

REASONING = ("reasoning_content", "reasoning", "thinking")
"""What the model's reasoning is called, as a key of turns or as a type of part."""
_PARTS = {
    "text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal",
    "thinking": "thinking", "reasoning": "reasoning",
}  # fmt: skip
# Axolotl's, of a part of a turn.
PARTLY = ("train", "weight", "train_detail")
LEARNED_WHOLE = "not used; a turn is learned whole or not at all"
_NUMBERS = ("numbers in place of text", "read as their text (4, 0.5, true), whole ones without a fraction")


def read_words(value: Any, what: str, notes: Notes) -> str:
    """What is asked or answered: text, or a number, which a CSV file could not tell from its text."""
    if isinstance(value, bool | int | float | Decimal):
        text = format(value, "f") if isinstance(value, Decimal) else json.dumps(whole_number(value))
        if text.strip("-") not in ("NaN", "Infinity", "sNaN"):
            notes.leave_out(*_NUMBERS)
            return text
    return read_text(value, what, notes)


def read_text(value: Any, what: str, notes: Notes) -> str:
    """A cell that holds text (or text parts, as the OpenAI API writes them); what is wrong goes to `notes`."""
    if are_parts(value):
        value, thought = read_parts(value, what, notes)
        if thought:
            notes.wrong(f"{what} has parts of type thinking, which only a turn of the model can have")
    return _storable_text(value, what, notes)


def are_parts(value: Any) -> bool:
    """Whether a content is a list of parts, as the OpenAI API writes them."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, dict) and ("type" in part or "text" in part) for part in value)
    )


def read_parts(value: list[dict[str, Any]], what: str, notes: Notes) -> tuple[str, str]:
    """The text of a list of parts, and the reasoning in it (Mistral's and Anthropic's thinking)."""
    texts: dict[bool, list[str]] = {False: [], True: []}
    for part in value:
        kind = str(part.get("type") or "text")
        key = _PARTS.get(kind)
        if key is None:
            notes.wrong(f"{what} has parts of type {kind}; only text can be trained on here")
            continue
        # Axolotl writes the text under other names as well.
        key = next((name for name in (key, "text", "content", "value") if part.get(name) is not None), key)
        words = part.get(key)
        if are_parts(words):
            words = "".join(read_parts(cast(list[dict[str, Any]], words), what, notes))
        texts[kind in REASONING].append("" if words is None else _storable_text(words, what, notes))
        for other in part:
            if other not in ("type", key) and not is_empty(part[other]):
                notes.leave_out(f"the key {other!r} of parts of turns", *([LEARNED_WHOLE] if other in PARTLY else []))
    return "".join(texts[False]), "".join(texts[True])


def _storable_text(value: Any, what: str, notes: Notes) -> str:
    if not isinstance(value, str):
        notes.wrong(f"{what} is {describe(value)}; expected text")
        return ""
    if not is_storable(value):
        at = next(i for i, character in enumerate(value, 1) if "\ud800" <= character <= "\udfff")
        notes.wrong(f"{what} holds half a character (a lone surrogate) at position {at}")
        return ""
    return value


def is_storable(text: str) -> bool:
    """Whether a text is one that UTF-8 can write."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return False
    return True
