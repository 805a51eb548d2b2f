"""Which waiting requests come into the next batch: first come, first served, among those whose adapter has a slot.

A seam to transformers' continuous batching, as `batching.py`, which lists them all.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

from theodora.errors import CheckpointError
from theodora.serve.processors import request_of
from theodora.serve.slots import Slots
from theodora.serve.tiers import HostTier

SCHEDULER = "theodora"
PATIENCE = 2.0
"""Seconds that a request waits for a slot before requests that came later have to wait for it."""


class RoutedScheduler(FIFOScheduler):
    """First come, first served, among the requests whose adapter has a slot or can get one."""

    slots: Slots
    """Set when the engine takes the scheduler over, as what follows."""
    host: HostTier
    compute: Callable[[], Any]
    """A context on whose stream slots are filled: after the batches that still read them."""
    fail: Callable[[Any, Exception], object]
    """Ends a request that waits."""

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        """As the parent; but waiting requests without a slot are hidden from it, and the batch is sorted by slot."""
        order = list(self.waiting_requests_order)
        with self.compute():
            self.waiting_requests_order = deque(self._with_slots(order))
        batch, *rest = super().schedule_batch(token_budget, cache_budget)
        self.waiting_requests_order = deque(id for id in order if id in self.waiting_requests)
        if batch:
            # Tokens of one adapter lie together, so that nothing need be sorted.
            batch.sort(key=lambda future: request.slot if (request := request_of(future.state)) else 0)
        return batch, *rest

    def _with_slots(self, waiting: list[str]) -> list[str]:
        requests = [request_of(state) for state in self.active_requests.values()]
        needed = {request.adapter.serial for request in requests if request and request.adapter}
        room = self.max_requests_per_batch - len(self.active_requests)
        fit: list[str] = []
        patient = True
        for id in waiting:
            if len(fit) >= room:
                break
            request = request_of(self.waiting_requests[id])
            if request is None or request.adapter is None:
                fit.append(id)
                continue
            if not patient:
                continue
            adapter = request.adapter
            try:
                slot = self.slots.place(adapter.serial, partial(self.host.take, adapter), needed)
            except CheckpointError as error:
                request.problem = type(error)(f"The adapter {adapter.name!r} cannot be read again: {error}")
                self.fail(self.waiting_requests.pop(id), error)
                continue
            if slot is not None:
                request.slot = slot
                self.host.placed(adapter)
                needed.add(adapter.serial)
                fit.append(id)
            elif adapter.modules is not None and time.monotonic() - request.asked > PATIENCE:
                # Else requests that keep other adapters in their slots would never let it run.
                patient = False
        return fit

    def _infer_request_tokens(self, state: Any, request_ids_to_remove_from_waiting: set[str]) -> list[int]:
        cache: Any = self.cache
        cache.asks = request_of(state)  # for whom a prefix is searched
        return super()._infer_request_tokens(state, request_ids_to_remove_from_waiting)

    def clear_cancelled_requests(self) -> list[Any]:
        """Cancelled ones are over; without that, transformers looks for the cache of one that is in a batch."""
        cancelled: list[Any] = super().clear_cancelled_requests()
        for state in cancelled:
            state._status = RequestStatus.FINISHED
        return cancelled


SCHEDULER_MAPPING[SCHEDULER] = RoutedScheduler
