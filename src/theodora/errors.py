"""Every error a user can meet: what was found, what was expected, and how to mend it.

`UsageError`s are the caller's to mend (the command line exits with 2); the other errors are failures (exit code 1).
"""

import reprlib


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


def bullet_list(items: list[str]) -> str:
    """Join several misses into the indented list that errors end with."""
    return "".join(f"\n  - {item}" for item in items)


def some(problems: list[str], most: int = 20) -> list[str]:
    """The first of many problems, and how many more there are."""
    return problems if len(problems) <= most else [*problems[:most], f"and {len(problems) - most} more"]
