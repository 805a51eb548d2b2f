"""Adapters in host memory, and the rest on disk: read again when a request asks for them, and checked again.

Above this tier are the slots (`slots.py`), which lie on the model's device; below it is the adapter's own folder. What
lies in a slot needs no host memory, so the least recently used of those that wait here give way first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress

from theodora.errors import CheckpointError
from theodora.serve.adapters import ServedAdapter
from theodora.serve.slotted import SlotTensors
from theodora.serve.stamp import Changed

Tensors = dict[str, SlotTensors]


class HostTier:
    """Which adapters' tensors are in host memory. Any thread may call its methods.

    Args:
        most: adapters that may be; None for all.
        executor: what reads them.
        read: gives an adapter's tensors, from disk.
        arrived: is called when one has come, or has failed to.
    """

    def __init__(
        self,
        most: int | None,
        executor: Executor,
        read: Callable[[ServedAdapter], Tensors],
        arrived: Callable[[], object],
    ) -> None:
        self.most = most
        self.reads = 0
        """Adapters that were read again."""
        self.read = read
        self._executor, self._arrived = executor, arrived
        self._held: OrderedDict[int, ServedAdapter] = OrderedDict()  # by serial number, oldest use first
        self.wanted: set[int] = set()
        """Serial numbers of adapters that are being read, or held for requests that wait for a slot."""
        self._failed: dict[int, CheckpointError] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def add(self, adapter: ServedAdapter) -> None:
        """Hold a new adapter's tensors."""
        with self._lock:
            self._hold(adapter)

    def move(self, adapter: ServedAdapter, change: Callable[[Tensors], Tensors]) -> None:
        """Replace an adapter's tensors by the same in other memory, if they are still here when it is done."""
        tensors = adapter.modules
        moved = None if tensors is None else change(tensors)
        with self._lock:
            if moved is not None and adapter.modules is tensors:
                adapter.modules = moved

    def forget(self, adapter: ServedAdapter) -> None:
        """Drop the tensors of an adapter that is gone."""
        with self._lock:
            adapter.modules = None
            self._held.pop(adapter.serial, None)
            self._failed.pop(adapter.serial, None)
            self.wanted.discard(adapter.serial)

    def take(self, adapter: ServedAdapter) -> Tensors | None:
        """An adapter's tensors; None if they have to be read first, which begins here if memory allows.

        What was asked for stays in memory until it is `placed`, or nobody asks any more (`unneeded`).

        Raises:
            CheckpointError: they could not be read.
        """
        with self._lock:
            if (problem := self._failed.pop(adapter.serial, None)) is not None:
                raise problem
            full = self.most is not None and len(self.wanted) >= self.most
            if adapter.modules is not None:
                if not full:
                    self.wanted.add(adapter.serial)
                self._held.move_to_end(adapter.serial)
                return adapter.modules
            if full or adapter.serial in self.wanted or _gone(adapter):
                return None
            self.wanted.add(adapter.serial)
        with suppress(RuntimeError):  # the server is stopping
            self._executor.submit(self._fetch, adapter)
        return None

    def placed(self, adapter: ServedAdapter) -> None:
        """An adapter is in a slot: its place here can be another's."""
        with self._lock:
            self.wanted.discard(adapter.serial)

    def unneeded(self, adapter: ServedAdapter) -> None:
        """No request asks for an adapter any more: it may give way, and later requests are not told of a failure."""
        with self._lock:
            self._failed.pop(adapter.serial, None)
            if adapter.serial in self._held:  # one that is being read takes memory nevertheless, until it has come
                self.wanted.discard(adapter.serial)

    def _fetch(self, adapter: ServedAdapter) -> None:
        try:
            tensors, problem = self.read(adapter), None
        except Exception as error:  # whatever is wrong with the file, with memory, with the disk
            # A new error, because a traceback would hold what has been read.
            kind = Changed if isinstance(error, Changed) else CheckpointError
            tensors, problem = None, kind(str(error))
        with self._lock:
            wanted = adapter.serial in self.wanted  # it was not forgotten meanwhile
            if problem is not None or not adapter.users:
                self.wanted.discard(adapter.serial)
            if problem is not None:
                if adapter.users:
                    self._failed[adapter.serial] = problem
            elif wanted and not _gone(adapter):
                adapter.modules, self.reads = tensors, self.reads + 1
                self._hold(adapter)
        self._arrived()

    def _hold(self, adapter: ServedAdapter) -> None:
        self._held[adapter.serial] = adapter
        for serial, other in list(self._held.items()):
            if self.most is None or len(self._held) <= self.most:
                return
            # One that is wanted goes only if those who wanted it have gone; the newest stays in any case.
            if other is not adapter and (serial not in self.wanted or not other.users):
                self.wanted.discard(serial)
                self._held.pop(serial).modules = None


def _gone(adapter: ServedAdapter) -> bool:
    return adapter.leaving and not adapter.users
