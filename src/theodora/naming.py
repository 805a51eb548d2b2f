"""Names that a recipe gives, checked alike and before the first run: they become file names, labels and columns."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator

_NAME = re.compile(r"[A-Za-z0-9_+-]+")
_LONGEST = 64  # characters; several stand in one file's name, which may have 255 bytes
_LONGEST_PART = 255  # bytes of one name on nearly all file systems
_LONGEST_PATH = 4095  # bytes, on Linux
_ROOM = 120  # bytes that the names of files within a folder add to its path


def name_problem(name: object) -> str | None:
    """What is wrong with a name that a recipe gives to a part of it, if anything."""
    if not isinstance(name, str):
        return f"{name!r} is no text; expected a name (in quotes, if YAML reads it as something else)"
    if not _NAME.fullmatch(name):
        return f"{name!r} is no name; expected letters, digits, +, - and _"
    if len(name) > _LONGEST:
        return f"{name[:20]!r}… has {len(name)} characters; expected at most {_LONGEST}"
    return None


def alike(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pairs of names that some file systems take for one: they differ in capitals alone, or not at all."""
    seen: dict[str, str] = {}
    for name in names:
        if name.casefold() in seen:
            yield seen[name.casefold()], name
        seen.setdefault(name.casefold(), name)


def path_problem(path: str, *, written: bool = False) -> str | None:
    """Why no file system has such a path, if none has.

    Args:
        path: a file, folder, or name on the hub.
        written: it is a folder for files with names of their own.
    """
    try:
        parts = os.fsencode(path).split(os.sep.encode())
    except UnicodeEncodeError:
        return "it holds half a character (a lone surrogate), which no file name can"
    if b"\0" in b"".join(parts):
        return "it holds a NUL character, which no file name can"
    if longest := max((len(part) for part in parts if len(part) > _LONGEST_PART), default=0):
        return f"it has a name of {longest} bytes; file systems take {_LONGEST_PART} at most"
    size = len(os.fsencode(os.path.abspath(path))) + _ROOM * written
    if size > _LONGEST_PATH:
        counted = " with the names of its files" if written else ""
        return f"it is too long a path: {size:,} bytes{counted}; expected at most {_LONGEST_PATH:,}"
    return None
