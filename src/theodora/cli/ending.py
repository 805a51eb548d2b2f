"""The end of a command's process, without the seconds in which Python takes apart what torch and others imported."""

from __future__ import annotations

import atexit
import ctypes
import gc
import io
import os
import sys
import threading
from contextlib import suppress
from typing import Any

_USERS_CODE = ("theodora_metric_", "transformers_modules")
"""How the names begin under which files of users' metrics and of models that bring code are imported."""
_BUFFERED = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)


def end_process(code: int) -> None:
    """End the process with this status, once all that has to be done is done; return if Python is to end it itself.

    Python would then free every object one by one, which is what the system does at once. What libraries have asked to
    be done at the end is done all the same: threads are waited for, functions registered with `atexit` run, and
    open files are written out. Python ends by itself what imported no torch, and so is quick; what ran code of users',
    and one process of several, whose objects may do something when they are freed; and what is traced, profiled or
    looked into afterwards.
    """
    looked_into = sys.flags.inspect or sys.flags.interactive or sys.flags.dev_mode or "PYTHONINSPECT" in os.environ
    freed = os.environ.get("WORLD_SIZE", "1") != "1" or any(name.startswith(_USERS_CODE) for name in [*sys.modules])
    if "torch" not in sys.modules or _watched() or looked_into or freed:
        return
    # In Python's own order.
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]
    for stream in (sys.stdout, sys.stderr, *_open_files()):
        with suppress(OSError, ValueError, AttributeError):  # closed, or nobody reads
            stream.flush()
    with suppress(OSError, TypeError, AttributeError):  # what libraries in C have printed
        ctypes.CDLL(None).fflush(None)
    os._exit(code)


def _watched() -> bool:
    """Whether a debugger or profiler is at work; since Python 3.12 they have a place of their own."""
    tools: Any = getattr(sys, "monitoring", None)
    monitored = tools is not None and any(tools.get_tool(number) is not None for number in range(6))
    return monitored or sys.gettrace() is not None or sys.getprofile() is not None


def _open_files() -> list[Any]:
    """Those that may hold something that is not written yet, as of loggers that leave closing to Python; text first."""
    there = gc.get_objects()
    kinds = {kind for kind in set(map(type, there)) if issubclass(kind, _BUFFERED)}  # half a million objects
    files: list[Any] = [each for each in there if type(each) in kinds]
    return sorted(files, key=lambda each: not isinstance(each, io.TextIOWrapper))
