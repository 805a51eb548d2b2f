"""Work beside the event loop: its outcome comes back, a few run at a time, and nobody waits for what hangs."""

import asyncio
import threading

import pytest

from theodora.serve.daemon_threads import DaemonThreads


def test_outcomes_come_back():
    async def both():
        aside = DaemonThreads(1)
        assert await aside(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await aside(divmod, 7, 0)

    asyncio.run(both())


def test_a_few_at_a_time():
    running, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(2)

    def work():
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        together.wait(60)  # with the other one that may run
        with lock:
            running -= 1

    async def all_of_them():
        aside = DaemonThreads(2)
        await asyncio.gather(*(aside(work) for _ in range(6)))

    asyncio.run(all_of_them())
    assert most == 2


def test_what_hangs_keeps_its_place_and_holds_up_nobody_else():
    free = threading.Event()

    async def hang():
        aside = DaemonThreads(1)
        for _ in range(2):  # the second has no place
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(aside(free.wait), 0.05)
        free.set()
        assert await aside(lambda: threading.current_thread().daemon)

    asyncio.run(hang())


def test_a_loop_that_has_ended_is_not_told():
    free, over = threading.Event(), threading.Event()

    def work():
        free.wait(60)
        over.set()

    async def leave():
        asyncio.ensure_future(DaemonThreads(1)(work))  # noqa: RUF006
        await asyncio.sleep(0.01)

    asyncio.run(leave())
    free.set()
    assert over.wait(60)
