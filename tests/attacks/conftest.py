"""What an attack starts from: a tiny model's folder (`tiny_model_dir`), rows, and random adapters.

Each test is one reproduction through what users and strangers can reach: the command, files, or HTTP. SECURITY.md's
table names the test that holds each promise. Attacks that need a process to die, or minutes, are marked `long`.
"""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

import tiny
from serving import trained
from theodora import save_adapter
from undrawn import leave_losses_blank


@pytest.fixture(autouse=True)
def _undrawn() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # of its own: tests undo theirs
        leave_losses_blank(patch)
        yield


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty sums as prompt and completion."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    sums = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(5) for b in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in sums))
    return path


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a random adapter of `serving.ADAPTERS` for the tiny llama. Treat it as read-only."""

    @cache
    def save(name: str = "lora8") -> Path:
        folder = tmp_path_factory.mktemp(name)
        save_adapter(trained(tiny.tiny_model(), name), folder)
        return folder

    return save
