"""Standard output and error that end no work: a reader that goes away, a full disk, characters they do not have."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_NOBODY_READS = (errno.EPIPE, errno.ECONNRESET)  # head and less have seen enough; a socket's other end is gone
_HUNG_UP = errno.EIO  # of a terminal that was closed


class _Stream(io.FileIO):
    """A standard stream's descriptor. What cannot be written is let go, and why is kept for the end."""

    lost: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write, or act as if."""
        if self.lost is None:
            try:
                return super().write(data)
            except OSError as error:
                self.lost = error
        return memoryview(data).nbytes


class Streams:
    """What has become of standard output."""

    def __init__(self) -> None:
        self._out: _Stream | None = None

    def lost(self) -> OSError | None:
        """Why output was lost, if it was; None also if whoever read it went away."""
        return None if self._error() is None or self.unread() else self._error()

    def unread(self) -> bool:
        """Whether whoever read standard output went away."""
        error = self._error()
        return error is not None and (
            error.errno in _NOBODY_READS or (error.errno == _HUNG_UP and self._out is not None and self._out.isatty())
        )

    def watch(self, stream: _Stream) -> None:
        """Take `stream` for standard output."""
        self._out = stream

    def _error(self) -> OSError | None:
        if sys.stdout is not None:  # pyright: ignore[reportUnnecessaryComparison]  (it is None if it was closed)
            with suppress(ValueError):
                sys.stdout.flush()
        return None if self._out is None else self._out.lost


@contextmanager
def steady_streams() -> Iterator[Streams]:
    """Within the block, `sys.stdout` and `sys.stderr` raise no error that would end a run of hours.

    Streams that something else has put in their place (tests, notebooks) stay as they are.
    """
    _open_all_three()
    before, streams = (sys.stdout, sys.stderr), Streams()
    try:
        for name in ("stdout", "stderr"):
            steady = _steady(getattr(sys, name))
            if steady is not None:
                setattr(sys, name, steady[1])
                if name == "stdout":
                    streams.watch(steady[0])
        yield streams
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream not in before:
                stream.flush()
        sys.stdout, sys.stderr = before


def _steady(stream: Any) -> tuple[_Stream, io.TextIOWrapper] | None:
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # python -u leaves the buffer out
    ours = any(stream is known for known in (sys.__stdout__, sys.__stderr__))
    if not ours or type(raw) is not io.FileIO:  # Windows' consoles have classes of their own
        return None
    stream.flush()
    own = _Stream(raw.fileno(), "w", closefd=False)
    text = io.TextIOWrapper(
        io.BufferedWriter(own) if raw is not buffer else own,  # pyright: ignore[reportArgumentType]  (as python -u does)
        encoding=stream.encoding,
        errors="backslashreplace",  # names of files need not be text, and code pages lack most characters
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    return own, text


def _open_all_three() -> None:
    """Fill closed standard streams: the next file opened would get their number, and what is printed there."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)
