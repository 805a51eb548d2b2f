"""What a run's processes and the terminal say to each other: an actor of Ray's that both sides call.

Processes post events: text for the terminal, and how they ended. The terminal posts a signal's number. Ray does not
promise the order of calls to such an actor, so that text is numbered.
"""

from __future__ import annotations

import asyncio
import io
import threading
from dataclasses import dataclass, field
from typing import Any

_MOST_UNSENT = 64  # posts under way: a terminal that is slow slows down what writes to it


@dataclass(frozen=True, kw_only=True)
class Said:
    """Text for the terminal, as it is to be written."""

    number: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended."""

    index: int
    machine: str
    result: dict[str, Any] | None = None
    """What the run came to, if it did."""
    message: str = ""
    exit_code: int = 0
    expected: bool = True
    """Whether the message is one of ours. Else there is a traceback."""
    aside: bool = False
    """Whether it only ends because another process does, which says why."""
    interrupted: bool = False
    trace: str = ""


@dataclass(frozen=True, kw_only=True)
class TooEarly:
    """A process was asked to stop, and has nothing to save yet."""


Event = Said | Ended | TooEarly


class Mailbox:
    """The actor. Its methods are coroutines, so that nobody who waits keeps others from posting."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._came = asyncio.Event()
        self._signal = 0
        self._signalled = asyncio.Event()

    async def post(self, event: Event) -> None:
        """Keep an event for the terminal."""
        self._events.append(event)
        self._came.set()

    async def take(self, seconds: float) -> list[Event]:
        """All events there are; if there is none, wait for some so long."""
        if not self._events and seconds:
            try:
                await asyncio.wait_for(self._came.wait(), seconds)
            except TimeoutError:
                return []
        self._came.clear()
        events, self._events = self._events, []
        return events

    async def signal(self, number: int) -> None:
        """Tell the processes of a signal that the terminal's process got."""
        self._signal = number
        self._signalled.set()

    async def signalled(self) -> int:
        """Wait for a signal."""
        await self._signalled.wait()
        return self._signal


class Wire(io.TextIOBase):
    """A process's text stream whose other end is the terminal.

    Args:
        ray: the library.
        mailbox: the handle of the actor.
        encoding: the terminal's.
    """

    def __init__(self, ray: Any, mailbox: Any, encoding: str) -> None:
        self._ray, self._mailbox = ray, mailbox
        self._encoding = encoding
        self._parts: list[str] = []
        self._sent: list[Any] = []
        self._number = 0
        self._lock = threading.Lock()  # a live display writes from a thread of its own

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The terminal's encoding."""
        return self._encoding

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, text: str, /) -> int:
        """Keep text until it is flushed."""
        with self._lock:
            self._parts.append(text)
        return len(text)

    def flush(self) -> None:
        """Send what was written."""
        with self._lock:
            text = "".join(self._parts)
            self._parts = []
            if not text:
                return
            said = Said(number=self._number, text=text)
            self._number += 1
            self._sent.append(self._mailbox.post.remote(said))
            if len(self._sent) > _MOST_UNSENT:
                self._ray.wait([self._sent[0]])
                self._sent = self._sent[1:]

    def finish(self) -> None:
        """Send the rest, and wait until all has arrived."""
        self.flush()
        if self._sent:
            self._ray.wait(self._sent, num_returns=len(self._sent), timeout=10)


@dataclass
class InOrder:
    """Puts numbered text back into its order."""

    next: int = 0
    early: dict[int, str] = field(default_factory=dict[int, str])

    def __call__(self, said: Said) -> str:
        """What can be written now."""
        self.early[said.number] = said.text
        ready: list[str] = []
        while self.next in self.early:
            ready.append(self.early.pop(self.next))
            self.next += 1
        return "".join(ready)
