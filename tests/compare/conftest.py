"""A comparison of a few steps on a tiny model: 7 cells, drawn without figures unless a test wants them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from theodora.compare import CompareConfig, compare


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def options(tiny_model_dir, tmp_path) -> dict[str, Any]:
    parity = [{"prompt": f"{n}?", "completion": "even" if n % 2 == 0 else "odd"} for n in range(60)]
    size = [{"prompt": f"is {n} large", "completion": "yes" if n > 20 else "no"} for n in range(40)]
    write(tmp_path / "size.jsonl", size)
    texts = [{"text": f"Text number {n} says little, and says it {n} times."} for n in range(12)]
    return {
        "model": str(tiny_model_dir()),
        "output": str(tmp_path / "out"),
        "data": {
            "parity": {
                "train": str(write(tmp_path / "parity.jsonl", parity)),
                "validation": 8,
                "test": 16,
                "score": "labels",
            },
        },
        "general": str(write(tmp_path / "general.jsonl", texts)),
        "general_rows": 4,
        "methods": ["lora", "dora"],
        "ranks": [2],
        "learning_rates": [1e-3, 1e-2],
        "seeds": 1,
        "steps": 3,
        "batch_size": 4,
        "bf16": False,
        "curve_points": 2,
    }


@pytest.fixture
def undrawn(monkeypatch):
    """Leave out the figures, which take longer than the runs."""
    monkeypatch.setattr("theodora.compare.figures._finish", lambda figure, axes: None)


@pytest.fixture
def run(options) -> Callable[..., Any]:
    """Compare with these options and others, in silence."""

    def start(seconds=None, allow_code=(), **others: Any):
        config = CompareConfig.from_options(options | others, allow_code=allow_code)
        return compare(config, console=Console(quiet=True), seconds=seconds)

    return start
