"""A run's figure left blank: its text and layout take as long as the rest of a run of four steps."""

from base64 import b64decode
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from theodora.files.atomic import atomic_write

BLANK_PNG = b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg==")


def leave_losses_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `train` write a blank loss.png, as it writes the drawn one."""
    # By import: theodora's own `train` and the package of that name look the same to a path of attributes.
    monkeypatch.setattr(import_module("theodora.train.run"), "draw_losses", _blank)


def _blank(metrics: list[dict[str, Any]], path: Path, title: str, per: str = "") -> None:
    with atomic_write(path) as file:
        file.write_bytes(BLANK_PNG)
