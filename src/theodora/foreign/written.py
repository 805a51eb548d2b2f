"""A translation as our YAML: each option with the field that said so, and above them what has no counterpart."""

from __future__ import annotations

import textwrap
from pathlib import Path

from theodora.errors import shown
from theodora.foreign import Translation
from theodora.foreign.reading import Kind, Note
from theodora.parse import to_yaml
from theodora.safe_text import plain

HEADINGS: dict[Kind, str] = {
    "missing": "Without counterpart",
    "flag": "Said by a flag alone",
    "differs": "Taken over, and otherwise here",
    "default": "Written because its default is another",
    "held": "So by itself",
    "unset": "Not set there",
    "translated": "Translated",
}
"""What became of a field → heading, in the order of urgency."""
_IN_FILE: tuple[Kind, ...] = ("missing", "flag", "differs")
_WIDTH = 118


def said(note: Note) -> str:
    """A note in a line: the field as it stood there, and what became of it."""
    if note.kind == "default":
        return note.text
    value = "" if note.value in (None, "") else f": {shown(note.value, 60)}"
    return f"{note.field}{value} → {note.text}"


def as_yaml(translation: Translation, source: str) -> str:
    """The recipe.

    Args:
        translation: of the file.
        source: its name, for the head.
    """
    lines = [f"# {plain(Path(source).name)}, of {translation.tool}, by theodora import."]
    for kind in _IN_FILE:
        notes = [note for note in translation.notes if note.kind == kind]
        lines += ["#", f"# {HEADINGS[kind]}:"] if notes else []
        for note in notes:
            lines += textwrap.wrap(
                plain(said(note)), _WIDTH, initial_indent="#   ", subsequent_indent="#     ", break_long_words=False
            )
    lines.append("")
    for name, value in translation.options.items():
        text = to_yaml({name: value}).rstrip("\n")
        origin = plain(translation.origins.get(name, ""))
        first, *rest = text.splitlines()
        lines += [f"{first}  # {origin}" if origin and not rest and origin != name else first, *rest]
    return "\n".join(lines) + "\n"
