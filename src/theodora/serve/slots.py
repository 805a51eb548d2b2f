"""Which adapter is in which slot: the least recently used one gives way, unless a request that runs needs it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection

from theodora.serve.slotted import SlottedLayer, SlotTensors


class Slots:
    """Adapters in slots 1 to S - 1 of a model's slotted layers. Placed by the worker; forgotten by any thread."""

    def __init__(self, count: int, layers: Callable[[], dict[str, SlottedLayer]]) -> None:
        self.count = count
        self._layers = layers
        self._slot_of: OrderedDict[int, int] = OrderedDict()  # adapter's serial number -> slot, oldest use first
        self._filled: dict[int, set[str]] = {}  # slot -> modules that hold something
        self._lock = threading.Lock()
        self.swaps = 0

    def __len__(self) -> int:
        return len(self._slot_of)

    def place(
        self, serial: int, tensors: Callable[[], dict[str, SlotTensors] | None], needed: Collection[int]
    ) -> int | None:
        """The slot of an adapter, which is filled if it was in none.

        Args:
            serial: the adapter's number.
            tensors: gives module path -> its tensors; None while they are not at hand.
            needed: numbers of adapters that must stay where they are.

        Returns:
            None while every slot is needed, or the tensors are not at hand.
        """
        with self._lock:
            if serial in self._slot_of:
                self._slot_of.move_to_end(serial)
                return self._slot_of[serial]
        modules = tensors()  # also if there is no room: they will be at hand when there is
        with self._lock:
            slot = None if modules is None else self._free(needed)
            if slot is not None and modules is not None:
                self._fill(slot, modules)
                self._slot_of[serial] = slot
                self.swaps += 1
            return slot

    def forget(self, serial: int) -> None:
        """Let the slot of an adapter that is gone be taken."""
        with self._lock:
            self._slot_of.pop(serial, None)

    def _free(self, needed: Collection[int]) -> int | None:
        taken = set(self._slot_of.values())
        free = next((slot for slot in range(1, self.count) if slot not in taken), None)
        if free is not None:
            return free
        victim = next((serial for serial in self._slot_of if serial not in needed), None)
        return None if victim is None else self._slot_of.pop(victim)

    def _fill(self, slot: int, modules: dict[str, SlotTensors]) -> None:
        layers, filled = self._layers(), self._filled.get(slot, set())
        self._filled[slot] = filled | modules.keys()  # if this fails halfway, any of them may hold something
        for path in filled - modules.keys():
            layers[path].fill(slot, None)
        for path, tensors in modules.items():
            layers[path].fill(slot, tensors)
        self._filled[slot] = set(modules)
