"""Adapters in host memory, and the rest on disk: read again when a request asks for them, and checked again.

Above this tier are the slots (`slots.py`), which lie on the model's device; below it is the adapter's own folder. What
lies in a slot needs no host memory, so the least recently used of those that wait here give way first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor

from theodora.adapters.checkpoint import CONFIG_NAME, AdapterFile
from theodora.errors import CheckpointError
from theodora.layers.slotted import SlotTensors
from theodora.serve.adapters import ServedAdapter

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
        self._executor, self._read, self._arrived = executor, read, arrived
        self._held: OrderedDict[int, ServedAdapter] = OrderedDict()  # by serial number, oldest use first
        self._wanted: set[int] = set()  # being read, or read and not taken yet
        self._failed: dict[int, str] = {}
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
            self._wanted.discard(adapter.serial)

    def take(self, adapter: ServedAdapter) -> Tensors | None:
        """An adapter's tensors; None if they have to be read first, which begins here if memory allows.

        Raises:
            CheckpointError: they could not be read.
        """
        with self._lock:
            if (problem := self._failed.pop(adapter.serial, None)) is not None:
                raise CheckpointError(problem)
            if adapter.modules is not None:
                self._wanted.discard(adapter.serial)
                if adapter.serial in self._held:
                    self._held.move_to_end(adapter.serial)
                return adapter.modules
            full = self.most is not None and len(self._wanted) >= self.most  # what is read needs room until it is taken
            if full or adapter.serial in self._wanted or _gone(adapter):
                return None
            self._wanted.add(adapter.serial)
        self._executor.submit(self._fetch, adapter)
        return None

    def _fetch(self, adapter: ServedAdapter) -> None:
        try:
            tensors, problem = self._read(adapter), None
        except Exception as error:  # whatever is wrong with the file, with memory, with the disk
            tensors, problem = None, str(error)
        with self._lock:
            if problem is not None:
                self._wanted.discard(adapter.serial)
                if adapter.users:
                    self._failed[adapter.serial] = problem
            elif adapter.serial in self._wanted and not _gone(adapter):
                adapter.modules, self.reads = tensors, self.reads + 1
                self._hold(adapter)
        self._arrived()

    def _hold(self, adapter: ServedAdapter) -> None:
        self._held[adapter.serial] = adapter
        for serial, other in list(self._held.items()):
            if self.most is None or len(self._held) <= self.most:
                return
            # One that is wanted goes only if those who wanted it have gone; the newest stays in any case.
            if other is not adapter and (serial not in self._wanted or not other.users):
                self._wanted.discard(serial)
                self._held.pop(serial).modules = None


def _gone(adapter: ServedAdapter) -> bool:
    return adapter.leaving and not adapter.users


class Stamp:
    """What tells an adapter's files from changed ones: sizes and times."""

    def __init__(self, file: AdapterFile) -> None:
        self._files = (file.path / CONFIG_NAME, file.weights)
        self._found = self._look()

    def check(self) -> None:
        """Raise a CheckpointError if the files have changed."""
        if self._look() != self._found:
            raise CheckpointError(
                f"{self._files[0].parent} has changed since it was loaded; unload the adapter, and load it again."
            )

    def _look(self) -> list[tuple[int, int, int]]:
        try:
            stats = [file.stat() for file in self._files]
        except OSError as error:
            raise CheckpointError(f"{self._files[0].parent} cannot be read: {error}") from error
        return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]
