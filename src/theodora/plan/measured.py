"""Speed that was measured: what `theodora bench --output FILE` has written, for the settings that it is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theodora.errors import ConfigError
from theodora.parse import parse_json
from theodora.plan.estimate import Setting

_NEAR = 4
"""Tokens in a pass that are at most so many times as many, or as few, go at about one speed."""


@dataclass(frozen=True)
class Measured:
    """One row of a bench."""

    model: str
    method: str
    stored: str
    recomputes: bool
    tokens: int
    """In a pass."""
    per_second: float


def read_measured(files: Sequence[str]) -> list[Measured]:
    """All rows of ours in some files.

    Raises:
        ConfigError: a file is missing, or is none of `theodora bench`.
    """
    found: list[Measured] = []
    for file in files:
        try:
            report: Any = parse_json(Path(file).expanduser().read_text(encoding="utf-8"))
            setting = report["setting"]
            tokens = int(setting["batch"]) * int(setting["length"])
            for row in report["rows"]:
                method = str(row["name"]).removesuffix("-fp8")
                if method in ("dora", "lora") and float(row["tokens_per_second"]) > 0:
                    stored = "fp8" if str(row["name"]).endswith("-fp8") else str(setting.get("quantize") or "plain")
                    found.append(
                        Measured(
                            model=Path(str(setting["model"])).name.lower(),
                            method=method,
                            stored="plain" if stored == "none" else stored,
                            recomputes=bool(setting.get("gradient_checkpointing")),
                            tokens=tokens,
                            per_second=float(row["tokens_per_second"]),
                        )
                    )
        except OSError as error:
            raise ConfigError(
                f"{file}: {error.strerror}; expected what `theodora bench MODEL --output FILE` writes"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{file} is no report of `theodora bench MODEL --output FILE` ({error})") from error
    return found


def speed(rows: Sequence[Measured], model: str, method: str, setting: Setting) -> float | None:
    """Tokens a second of one process, as measured for such a setting; None if nothing like it was."""
    name = Path(model).name.lower()
    alike = [
        row
        for row in rows
        if (row.model, row.method, row.stored, row.recomputes) == (name, method, setting.stored, setting.recomputes)
        and setting.tokens / _NEAR <= row.tokens <= setting.tokens * _NEAR
    ]
    nearest = min(alike, key=lambda row: abs(row.tokens - setting.tokens), default=None)
    return None if nearest is None else nearest.per_second
