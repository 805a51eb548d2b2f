"""The two consoles that all commands share, and JSON on standard output."""

from functools import cache
from typing import Any

from theodora.parse import to_json
from theodora.terminal import Terminal


@cache
def stdout() -> Terminal:
    """The console for results."""
    return Terminal()


@cache
def stderr() -> Terminal:
    """The console for errors and warnings."""
    return Terminal(stderr=True)


def print_json(value: Any) -> None:
    """Print a result as JSON: valid, and with escapes for all that is not ASCII, which any stream and terminal take."""
    print(to_json(value, indent=2))


def say_base(model: Any) -> None:
    """Say on the console for errors what the base of a model is quantised to, and whether its adapter knows it so."""
    from theodora.adapters.models import base_note

    if (note := base_note(model)) is not None:
        stderr().print(note, style="dim", markup=False, soft_wrap=True)
