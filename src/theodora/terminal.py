"""The only console there is (a law test holds that): strings are text, never markup, and foreign ones can do nothing.

Rich reads `[bold]` and `:smile:` in strings as markup, and passes escape sequences on. Names come from files, so here
strings stand as they are; what is to be styled is a `Text`, or has a `style`. What a terminal would obey is shown as an
escape: before the layout where possible, so that widths are right, and once more when it is written. A stream that
lacks a character gets another one. A pipe that nobody reads any more gets nothing, and does not end the program.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.status import Status
from rich.text import Text

from theodora.safe_text import for_stream

TELLS_STATUS = "THEODORA_STATUS"
"""Set, in the environment: what is being done is told in lines where the output is no terminal."""
_LEAST_WIDTH = 40  # columns; of a table in fewer nothing is left, and a terminal may report 1, or none


class Terminal(Console):
    """A console on which text of strangers is safe."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("highlight", False)
        super().__init__(**options)

    @classmethod
    def over(cls, console: Console) -> Terminal:
        """The user's own console, with our rules: the same stream, width, recording and live display."""
        if isinstance(console, cls):
            return console
        own = cls.__new__(cls)
        own.__dict__ = console.__dict__  # shared, not copied: a live display belongs to both
        return own

    def fit(self, text: str) -> str:
        """`text` as it may be written to this stream."""
        return "".join(for_stream(text, self.encoding))

    @property
    def size(self) -> ConsoleDimensions:
        """Columns and lines; a terminal narrower than any table could be wraps what it gets."""
        actual = super().size
        return ConsoleDimensions(max(actual.width, _LEAST_WIDTH), actual.height)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size

    def render_str(self, text: str, **options: Any) -> Text:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A string as text that stands as it is."""
        options |= {"markup": False, "emoji": False}
        return super().render_str(self.fit(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments of anything; a `Text` is made fit before it is laid out."""
        return super().render(self._fit_text(renderable) if isinstance(renderable, Text) else renderable, options)

    def status(self, status: RenderableType, **options: Any) -> Status:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A spinner with a text, which may be a stranger's."""
        options.setdefault("spinner", "dots" if self.encoding.startswith("utf") else "line")
        return _Status(_as_text(status), console=self, **options)

    def on_broken_pipe(self) -> None:
        """Nobody reads any more (head, less): nothing is written from here on, and the work goes on."""
        self.quiet = True
        with suppress(OSError, ValueError):
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, self.file.fileno())
            os.close(devnull)

    def _fit_text(self, text: Text) -> Text:
        parts = for_stream(text.plain, self.encoding)
        if all(map(str.__eq__, parts, text.plain)):
            return text
        fit = text.blank_copy()
        for at, part in enumerate(parts):
            fit.append(part, text.get_style_at_offset(self, at))
        return fit

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        return super()._render_buffer(
            segment if segment.control else Segment(self.fit(segment.text), segment.style) for segment in buffer
        )


class _Status(Status):
    """A spinner whose text is no markup; where nobody sees it turn, and THEODORA_STATUS asks for it, lines of text."""

    def update(self, status: RenderableType | None = None, **options: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if isinstance(status, str) and not self.console.is_terminal and os.environ.get(TELLS_STATUS):
            self.console.print(status, soft_wrap=True)
        super().update(None if status is None else _as_text(status), **options)


def _as_text(status: RenderableType) -> RenderableType:
    return Text(status) if isinstance(status, str) else status
