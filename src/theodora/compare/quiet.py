"""Silencing libraries while a comparison runs: a table of a thousand runs has no room for their bars and notes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from theodora.train.quiet import quiet_libraries


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and notes of libraries, and no warning that each scoring of the same rows would repeat."""
    with quiet_libraries(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*reference answers are longer than max_new_tokens")
        yield
