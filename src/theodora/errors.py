"""Every error a user can meet: what was found, what was expected, and how to mend it.

`UsageError`s are the caller's to mend (the command line exits with 2); the other errors are failures (exit code 1).
"""


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


def bullet_list(items: list[str]) -> str:
    """Join several misses into the indented list that errors end with."""
    return "".join(f"\n  - {item}" for item in items)
