"""The two rich consoles that all commands share."""

from functools import cache

from rich.console import Console


@cache
def stdout() -> Console:
    """The console for results."""
    return Console(highlight=False)


@cache
def stderr() -> Console:
    """The console for errors and warnings."""
    return Console(stderr=True, highlight=False)
