"""Numbers as tables show them: three significant digits."""

from __future__ import annotations


def percent(share: float | None) -> str:
    """0.0123 as `1.23 %`; `-` for what is not known."""
    return "-" if share is None else f"{_three_digits(100 * share)} %"


def degrees(angle: float | None) -> str:
    """An angle in degrees."""
    return "-" if angle is None else f"{_three_digits(angle)}°"


def _three_digits(value: float) -> str:
    return "0" if value == 0 else f"{value:#.3g}".rstrip(".")
