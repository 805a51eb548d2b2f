"""The end of a command's process, without the seconds in which Python takes apart what torch and others imported."""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
from contextlib import suppress


def end_process(code: int) -> None:
    """End the process with this status, once all that has to be done is done; return if Python is to end it itself.

    Python would then free every object one by one, which is what the system does at once. What libraries have asked to
    be done at the end is done all the same: threads are waited for, functions registered with `atexit` run, and
    streams are written out. Python ends by itself what imported no torch, and so is quick; one process of several,
    whose connections have destructors; and what is traced, profiled or looked into afterwards.
    """
    watched = sys.gettrace() is not None or sys.getprofile() is not None
    looked_into = sys.flags.inspect or sys.flags.interactive or sys.flags.dev_mode or "PYTHONINSPECT" in os.environ
    if "torch" not in sys.modules or watched or looked_into or os.environ.get("WORLD_SIZE", "1") != "1":
        return
    # In Python's own order.
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or nobody reads
            stream.flush()
    with suppress(OSError, TypeError, AttributeError):  # what libraries in C have printed
        ctypes.CDLL(None).fflush(None)
    os._exit(code)
