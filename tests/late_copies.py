"""A machine of `theodora.kernels.offload` on the CPU, whose copies come as late as they may: nothing is copied before
somebody waits for it, and what comes back is not a number until then."""

import weakref

import torch

from theodora.kernels import offload


class Stream:
    """The host's own does all at once; a side's does what it was given when the host's waits for it."""

    def __init__(self, name, log):
        self.name, self.log, self.waiting = name, log, []
        self.done = 0

    def __eq__(self, other):
        return self is other

    __hash__ = object.__hash__

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        return self, self.done + len(self.waiting)

    def wait_event(self, event):
        stream, until = event
        self.log.append(f"{self.name} waits for a copy")
        while stream.done < until:
            stream.waiting.pop(0)()
            stream.done += 1


class Machine:
    """Its streams, and all that it was asked for."""

    def __init__(self):
        self.log, self.sides, self.memories = [], [], []
        self.captures = self.fails = False
        self.stream = Stream("main", self.log)

    def current(self):
        return self.stream

    def side(self):
        self.sides.append(Stream("side", self.log))
        return self.sides[-1]

    def capturing(self):
        return self.captures

    def pinned(self, size):
        assert not self.captures
        if self.fails:
            raise RuntimeError("no memory\nat all")
        memory = torch.empty(size, dtype=torch.uint8)
        self.memories.append((size, weakref.ref(memory.untyped_storage())))
        return memory

    def copy(self, stream, tensor, memory, *, back):
        there = weakref.ref(tensor)
        view = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self.log.append("back" if back else "out")
        if back:
            tensor.fill_(float("nan"))

        def late():
            found = there()
            assert found is not None, "let go before the copy was waited for"
            (found if back else view).copy_(view if back else found)

        stream.waiting.append(late)

    @property
    def joined(self):
        return not any(side.waiting for side in self.sides)

    def held(self):
        """Sizes of the pinned memory that somebody keeps."""
        return sorted(size for size, memory in self.memories if memory() is not None)


def install(monkeypatch):
    """Let all tensors move by a machine, which this gives."""
    machine = Machine()
    monkeypatch.setattr(offload, "_LANES", {})
    monkeypatch.setattr(offload, "machine_of", lambda _: machine)
    return machine
