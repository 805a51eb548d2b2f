"""Tensors that wait in the host's memory from the first run of a checkpointed block to its second.

A `Lane` copies them on a stream of its own, beside the other work:

- out: the lane's stream waits for the current one, copies into pinned memory and records an event. The tensor is held
  until the stream that made it has waited for that event: when the next tensor is about to leave (`Lane.land`), when
  the first one comes back, or when nobody wants it any more.
- back: memory is taken on the current stream, for which the lane's waits, as earlier kernels may still use it, copies
  and records an event. Whoever takes the tensor has the current stream wait for that.

So no tensor is ever handed to the allocator with `record_stream`, which would keep it until the end of a CUDA graph's
capture, and both kinds of copies can be captured. A capture has lanes of its own (`captured`), whose pinned memory,
which its steps have pinned before, is nobody else's as long as the graph lives; other captures move nothing.

Pinned memory is made once, kept beside a weight, as long as that lives, and used again in each step: as many pieces as
were out at once, each as large as the largest tensor that it has held.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from theodora.kernels.operators import on_gpu
from theodora.main_memory import main_memory

_log = logging.getLogger(__name__)
_LEFT = 2**31  # bytes of main memory that are not taken: Linux ends processes where there are none
_LOCAL = threading.local()  # the lanes of the capture that this thread has begun


class Machine(Protocol):
    """What moves tensors; streams are as torch's."""

    def current(self) -> Any:
        """The current stream."""
        ...

    def side(self) -> Any:
        """A new stream."""
        ...

    def capturing(self) -> bool:
        """Whether a CUDA graph is captured on the current stream."""
        ...

    def pinned(self, size: int) -> Any:
        """Page-locked memory of so many bytes, or a RuntimeError."""
        ...

    def copy(self, stream: Any, tensor: Tensor, memory: Any, *, back: bool) -> None:
        """Into the memory, or back into the tensor, on that stream."""
        ...


class _Cuda:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def current(self) -> Any:
        return torch.cuda.current_stream(self._device)

    def side(self) -> Any:
        return torch.cuda.Stream(self._device)

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def pinned(self, size: int) -> Tensor:
        if (left := main_memory()) < size + _LEFT:
            raise RuntimeError(f"only {left:,} bytes of main memory are left")
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)

    def copy(self, stream: Any, tensor: Tensor, memory: Tensor, *, back: bool) -> None:
        other = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        with torch.cuda.stream(stream):
            if back:
                tensor.copy_(other, non_blocking=True)
            else:
                other.copy_(tensor, non_blocking=True)


class _Paper:
    """For tensors on the meta device: what is held there, and when, without any copy."""

    def current(self) -> _Paper:
        return self

    side = current

    def capturing(self) -> bool:
        return False

    def pinned(self, size: int) -> None:
        return None

    def copy(self, stream: Any, tensor: Tensor, memory: Any, *, back: bool) -> None:
        return None

    def nothing(self, *_: Any) -> None:
        """What its streams do."""

    wait_stream = wait_event = record_event = nothing


class _Buffer(NamedTuple):
    size: int
    memory: Any


class _Flight:
    """A copy under way, and its tensor on the device until the stream that this belongs to has waited for the copy."""

    __slots__ = ("_event", "_lane", "_stream", "tensor")

    def __init__(self, lane: Lane, stream: Any, event: Any, tensor: Tensor) -> None:
        self._lane, self._stream, self._event = lane, stream, event
        self.tensor: Tensor | None = tensor

    def land(self) -> Tensor | None:
        """Wait, and give the tensor, which this holds no longer."""
        tensor, self.tensor = self.tensor, None
        if tensor is not None and not self._lane.closed:
            self._stream.wait_event(self._event)
        return tensor

    def take(self) -> Tensor | None:
        """`land`, for who reads it on the current stream."""
        tensor, current = self.land(), self._lane.machine.current()
        if tensor is not None and current != self._stream:
            current.wait_event(self._event)
        return tensor


class Lane:
    """The copies of one device, in their order, and the pinned memory that is free."""

    def __init__(self, machine: Machine, lender: Lane | None = None, *, captured: bool = False) -> None:
        """Make one.

        Args:
            machine: what copies.
            lender: gives its pinned memory to a captured lane, for good.
            captured: whether all its copies are in one CUDA graph. Nothing is pinned there.
        """
        self.machine, self.closed = machine, False
        self._lender, self._captured = lender, captured
        self._side = machine.side()
        self._leaving: list[_Flight] = []
        self._free: WeakKeyDictionary[Any, list[_Buffer]] = WeakKeyDictionary()
        self._held: list[_Buffer] = []  # by the graph, which knows nothing but addresses
        self._pins = not captured
        self._lock = threading.RLock()  # what nobody wants any more comes back when it is collected: at any time

    @property
    def usable(self) -> bool:
        """Whether what left by it can come back now: a graph knows only what was captured with it."""
        return not self.closed and self.machine.capturing() == self._captured

    def send(self, tensor: Tensor, beside: Tensor) -> Away | None:
        """Begin to copy the tensor out; None if there is no pinned memory for it.

        Args:
            tensor: what nobody writes to any more.
            beside: the pinned memory lives as long as the storage of this one.
        """
        if not tensor.is_contiguous():
            return None
        owner = beside.untyped_storage()
        with self._lock:
            self.land()
            buffer = self._buffer(owner, tensor.nbytes)
            if buffer is None:
                return None
            flight = self.fly(tensor, buffer, back=False)
            self._leaving.append(flight)
        return Away(self, owner, buffer, flight)

    def land(self, but: _Flight | None = None) -> None:
        """Wait for what is still leaving, and let its memory on the device go."""
        with self._lock:
            landing, self._leaving = self._leaving, []
            for flight in landing:
                if flight is but:
                    self._leaving.append(flight)
                else:
                    flight.land()

    def fly(self, tensor: Tensor, buffer: _Buffer, *, back: bool) -> _Flight:
        """Begin a copy, behind all that the current stream has to do by now."""
        stream = self.machine.current()
        self._side.wait_stream(stream)
        self.machine.copy(self._side, tensor, buffer.memory, back=back)
        return _Flight(self, stream, self._side.record_event(), tensor)

    def over(self, owner: Any, buffer: _Buffer, flights: list[_Flight]) -> None:
        """Take pinned memory back; who copies next waits for these copies, since a lane is one stream."""
        with self._lock:
            for flight in flights:
                flight.land()
            storage = owner()
            if storage is not None:
                self._free.setdefault(storage, []).append(buffer)

    def close(self) -> None:
        """When the capture is over its events mean nothing any more."""
        with self._lock:
            self.closed, self._leaving = True, []

    def _buffer(self, owner: Any, size: int) -> _Buffer | None:
        found = self._lent(owner, size) or (None if self._lender is None else self._lender._lent(owner, size))
        if self._captured:
            self._held += [] if found is None else [found]
            return found
        if found is None and self._pins:
            free = self._free.get(owner)
            if free:
                free.pop()  # too small, as all others: the number of them is what was out at once
            try:
                found = _Buffer(size, self.machine.pinned(size))
            except RuntimeError as error:
                self._pins = False
                _log.warning(
                    "No page-locked memory (%d bytes) for what checkpointed blocks keep: every second block keeps it "
                    "on the device instead, and the others compute it again. The cause: %s",
                    size,
                    (str(error).splitlines() or [type(error).__name__])[0],
                )
        return found

    def _lent(self, owner: Any, size: int) -> _Buffer | None:
        """Free memory beside a weight that is large enough."""
        with self._lock:
            free = self._free.get(owner, [])
            for at, buffer in enumerate(free):
                if buffer.size >= size:
                    return free.pop(at)
        return None


class Away:
    """A tensor that is in the host's memory, or on its way there or back; it comes back once."""

    def __init__(self, lane: Lane, owner: Any, buffer: _Buffer, out: _Flight) -> None:
        """Of a tensor that `Lane.send` has begun to copy."""
        tensor = out.tensor
        assert tensor is not None
        self._size, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        self._lane, self._buffer, self._flights = lane, buffer, [out]
        self._over = weakref.finalize(self, lane.over, weakref.ref(owner), buffer, self._flights)
        self._over.atexit = False

    def fetch(self) -> None:
        """Begin to copy it back, if it has left. What else is still leaving has left then."""
        if not self._lane.usable:
            return
        out = self._flights[0]
        self._lane.land(but=out)
        if out.tensor is None and len(self._flights) == 1:
            tensor = torch.empty(self._size, dtype=self._dtype, device=self._device)
            self._flights.append(self._lane.fly(tensor, self._buffer, back=True))

    def take(self) -> Tensor | None:
        """The tensor, for which the current stream waits; None where it cannot be had."""
        if not self._lane.usable:
            return None
        self.fetch()
        tensor = self._flights[-1].take()
        self._over()
        return tensor

    def settle(self) -> None:
        """Give up what `fetch` began and nobody took."""
        for flight in self._flights[1:]:
            flight.land()
        del self._flights[1:]


_LANES: dict[torch.device, Lane] = {}


def lane_of(tensor: Tensor) -> Lane | None:
    """The lane of the tensor's device, as things are now; None where nothing moves."""
    machine = machine_of(tensor)
    if machine is None:
        return None
    lender = _LANES.get(tensor.device)
    if not machine.capturing():
        return lender or _LANES.setdefault(tensor.device, Lane(machine))
    lanes: dict[torch.device, Lane] | None = getattr(_LOCAL, "lanes", None)
    if lanes is None:
        return None
    if tensor.device not in lanes:
        lanes[tensor.device] = Lane(machine, lender, captured=True)
    return lanes[tensor.device]


def machine_of(tensor: Tensor) -> Machine | None:
    """What moves tensors of that device to the host's memory; None if nothing does."""
    if not on_gpu(tensor):
        return None
    return _Paper() if tensor.is_meta else _Cuda(tensor.device)


def land() -> None:
    """Wait for all that is leaving, before a capture begins: inside it nobody may wait for what was begun outside."""
    for lane in list(_LANES.values()):
        lane.land()


@contextmanager
def captured() -> Iterator[object]:
    """Around a step, inside the capture of a CUDA graph. Whoever keeps the graph keeps what this gives, too."""
    lanes: dict[torch.device, Lane] = {}
    before, _LOCAL.lanes = getattr(_LOCAL, "lanes", None), lanes
    try:
        yield lanes
        for lane in lanes.values():
            lane.land()
    except BaseException:
        for lane in lanes.values():
            with suppress(RuntimeError):  # (the capture itself may be broken)
                lane.land()
        raise
    finally:
        _LOCAL.lanes = before
        for lane in lanes.values():
            lane.close()
