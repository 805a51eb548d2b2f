"""Importing the libraries that quantise."""

from __future__ import annotations

import importlib
import logging
import sys

from theodora.errors import ConfigError


def import_library(library: str) -> None:
    """Import a library as transformers is about to, without what it says, and without code from the hub.

    bitsandbytes 0.50 fetches a kernel from the hub and runs it, as soon as it is imported where `kernels` is installed.

    Raises:
        ConfigError: it is broken.
    """
    # It goes on to tell each layer of each pass that inputs are rounded to float16, as LLM.int8() does.
    logging.getLogger(library).setLevel(logging.ERROR)
    if library in sys.modules:
        return
    before = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # pyright: ignore[reportArgumentType] (how Python is told that there is none)
    try:
        importlib.import_module(library)
    except ImportError as error:
        raise ConfigError(f"{library} is installed and cannot be imported: {error}") from error
    finally:
        del sys.modules["kernels"]
        if before is not None:
            sys.modules["kernels"] = before
