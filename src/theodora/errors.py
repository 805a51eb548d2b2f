"""Every error that a user can meet, and how its message is put together.

    TheodoraError                     a failure: the command line exits with 1
    ├── UsageError                    the caller asked for what cannot be done, and can mend it: exits with 2
    │   └── ConfigError               a value, or a combination of values, that makes no sense for this model
    ├── DataError                     a data file that cannot be used
    └── CheckpointError               an adapter or model folder that is missing, damaged, or of another base
        ├── LeadsOut                  files/folder.py: a link leads out of the folder that may be read
        ├── Changed                   serve/stamp.py: the files changed while they were read
        ├── UnreadArchitecture        export/gguf_files.py: a GGUF file that transformers cannot read
        └── VerificationFailed        export/exporting.py: an export does something else than its adapter

Errors that one part raises for itself to catch (a server that is busy, a run that diverged) stand in that part.
A message says what was found, what was expected and how to mend it, and lists every miss at once.
"""

import reprlib
from collections.abc import Sequence


class TheodoraError(Exception):
    """Base of all errors that Theodora raises on purpose."""

    exit_code = 1


class UsageError(TheodoraError):
    """Something asked for cannot be done as asked."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration value, or a combination of them, makes no sense for this model."""


class DataError(TheodoraError):
    """A data file cannot be used; names the file and, where there is one, the line."""


class CheckpointError(TheodoraError):
    """An adapter or model folder is missing, damaged, or made for another base model."""


def shown(value: object, most: int = 100) -> str:
    """A value in an error message: its `repr`, cut to about `most` characters and cheap however large the value is.

    (A few lines of YAML, whose aliases repeat one another, can have a `repr` that no memory holds.)
    """
    brief = reprlib.Repr()
    brief.maxlevel = 3
    brief.maxlist = brief.maxtuple = brief.maxset = brief.maxdict = 8
    brief.maxstring = brief.maxlong = brief.maxother = most
    try:
        text = brief.repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        text = f"a {type(value).__name__} too large to write out"
    return text if len(text) <= 2 * most else text[: 2 * most] + "…"


def bullet_list(items: Sequence[str], most: int | None = None) -> str:
    """Misses as the indented list that errors end with; of more than `most` the first, and how many more there are."""
    return "".join(f"\n  - {item}" for item in (items if most is None else first_of(items, most)))


def first_of(items: Sequence[str], most: int) -> list[str]:
    """All items, or the first `most` of them and one line that says how many more there are."""
    return list(items) if len(items) <= most else [*items[:most], f"and {len(items) - most} more"]


def in_line(items: Sequence[str], most: int) -> str:
    """The items within a sentence: `a, b, c`, or `a, b and 7 more`."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
