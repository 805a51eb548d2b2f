"""Work beside the event loop, in threads that nobody waits for when the server stops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

LONG = 20_000
"""Characters, or entries, from which on work is worth a thread: less of it is done before a thread has started."""


class DaemonThreads:
    """Runs functions in threads of their own, a few at a time; the others wait for their turn.

    An executor's threads are waited for when the process ends, and work that hangs would keep it: these are not. Each
    kind of work has its own, so that what takes long holds up its kind only. Work whose caller has gone keeps its place
    until it ends.

    Example:
        `ids = await DaemonThreads(4)(tokenizer.encode, text)`.
    """

    def __init__(self, most: int) -> None:
        self._free = asyncio.Semaphore(most)
        self.abandoned = 0
        """Functions that still run and whose callers have gone."""

    async def __call__(self, work: Callable[..., T], *args: Any) -> T:
        """What `work(*args)` returns, or raises."""
        await self._free.acquire()
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[T] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            self._free.release()
            if outcome.cancelled():
                self.abandoned -= 1
                return
            if error is None:
                outcome.set_result(result)
            else:
                outcome.set_exception(error)

        def run() -> None:
            result, error = None, None
            try:
                result = work(*args)
            except BaseException as raised:
                error = raised
            with suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(settle, result, error)

        threading.Thread(target=run, name="theodora-daemon", daemon=True).start()
        try:
            return await outcome
        except asyncio.CancelledError:
            self.abandoned += outcome.cancelled()
            raise
