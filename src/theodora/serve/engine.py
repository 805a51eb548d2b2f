"""The engine: a model and its adapters, which takes requests and has a worker run them in batches.

engine = Engine(model, tokenizer, ServeConfig(model="…"))
engine.start()
request = engine.submit([1, 2, 3], Sampling(max_tokens=8), adapter="law")
output = request.updates.get()
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from theodora.errors import CheckpointError, ConfigError
from theodora.files.folder import Place
from theodora.serve.adapters import (
    Registry,
    ServedAdapter,
    in_host_memory,
    make_room,
    prepare,
    read_served,
    slot_tensors,
)
from theodora.serve.batching import NotRun, Router, route_batches
from theodora.serve.chat_formats import read_format_files
from theodora.serve.config import ServeConfig
from theodora.serve.errors import Busy, Unavailable, UnknownModel
from theodora.serve.requests import Request, Sampling
from theodora.serve.slots import Slots
from theodora.serve.slotted import Routing, SlottedLayer, SlotTensors
from theodora.serve.stamp import FolderStamp
from theodora.serve.tiers import HostTier
from theodora.serve.window import window_of
from theodora.serve.worker import Worker

log = logging.getLogger("theodora.serve")


class Engine:
    """Runs requests in batches. Any thread may call its methods."""

    def __init__(self, model: Any, config: ServeConfig) -> None:
        self.model, self.config = model, config
        self.device = model.device
        self.adapters = Registry()
        self.routing = Routing(config.slots + 1)
        self.slots = Slots(config.slots + 1, self.slotted_layers)
        self.window = window_of(model, config)
        """Tokens that prompt and answer may have together."""
        self.vocabulary: int = model.get_input_embeddings().num_embeddings
        self.created = int(time.time())
        self._requests: dict[str, Request] = {}
        self._lock, self._loading, self._numbers = threading.Lock(), threading.Lock(), itertools.count()
        self.mover = ThreadPoolExecutor(1, "theodora-mover")
        self.host = HostTier(config.host_adapters, self.mover, self._read_again, lambda: self.worker.wake())
        self.worker = Worker(
            model,
            config,
            slots=self.slots,
            host=self.host,
            new_router=lambda: Router(self._requests.get, self._over),
            submit=self.submit,
            lock=self._lock,
        )
        route_batches(model, self.routing)

    # Requests

    def submit(
        self,
        prompt: list[int],
        sampling: Sampling,
        adapter: str | None = None,
        *,
        every_token: bool = True,
        loop: Any = None,
        updates: Any = None,
    ) -> Request:
        """Put a request in the queue.

        Args:
            prompt: token ids.
            sampling: how tokens are picked.
            adapter: name of an adapter; None for the base model.
            every_token: whether each token is an update.
            loop: the event loop on which updates are awaited; None for threads.
            updates: the queue for updates, if it is shared with other requests.

        Raises:
            ConfigError: the prompt is empty or too long.
            UnknownModel: there is no such adapter.
            Busy: the queue is full.
            Unavailable: nothing can be run now.
        """
        self._check(prompt, sampling)
        with self._lock:
            manager = self.worker.manager
            if manager is None or not self.ready():
                raise Unavailable(self.worker.why_not_ready())
            if len(self._requests) >= self.config.max_batch + self.config.max_queue:
                raise Busy(f"{len(self._requests)} requests are under way; try again soon.")
            served = None
            if adapter is not None and (served := self.adapters.use(adapter)) is None:
                raise UnknownModel(f"There is no model {adapter!r}.")
            number = next(self._numbers)
            request = Request(f"r{number}", prompt, served, sampling, every_token, loop, updates)
            self._requests[request.id] = request
        accepted = manager.add_request(
            prompt,
            request_id=request.id,
            max_new_tokens=max(1, sampling.max_tokens),  # a prompt is scored with one token more
            streaming=every_token,
            eos_token_id=list(sampling.stop_ids) or -1,
            request=request,
        )
        if accepted is None or self.worker.manager is not manager:  # it may have failed after it had told all others
            self._over(request)
            raise Unavailable(self.worker.why_not_ready())
        return request

    def cancel(self, request: Request) -> None:
        """End a request that nobody waits for any more. Does nothing to one that is over."""
        manager = self.worker.manager
        if self._over(request) and manager is not None:
            manager.cancel_request(request.id)

    def ready(self) -> bool:
        """Whether a request would be taken."""
        return self.worker.ready()

    def under_way(self) -> int:
        """Requests that run or wait."""
        return len(self._requests)

    def running(self) -> int:
        """Requests in the batch."""
        manager = self.worker.manager
        processor = manager and manager.batch_processor
        return len(processor.scheduler.active_requests) if processor else 0

    def _check(self, prompt: list[int], sampling: Sampling) -> None:
        if not prompt:
            raise ConfigError("The prompt is empty; expected at least one token.")
        if min(prompt) < 0 or max(prompt) >= self.vocabulary:
            raise ConfigError(f"The prompt holds token ids outside 0 to {self.vocabulary - 1}.")
        for name, ids in (
            ("logit_bias", [token for token, _ in sampling.bias]),
            ("allowed_token_ids", sampling.allowed),
        ):
            if ids and not 0 <= min(ids) <= max(ids) < self.vocabulary:
                raise ConfigError(f"{name} holds token ids outside 0 to {self.vocabulary - 1}.")
        self.check_length(len(prompt), sampling.max_tokens)

    def check_length(self, prompt: int, most: int) -> None:
        """Refuse a prompt of so many tokens that leaves no room for an answer of at most so many.

        Raises:
            ConfigError: naming both, and the window.
        """
        if prompt + most > self.window:
            raise ConfigError(
                f"The prompt has {prompt} tokens and max_tokens is {most}; together they may be at most {self.window}."
            )

    def _over(self, request: Request) -> bool:
        """Let go of a request and of its adapter; False if that was done before."""
        with self._lock:
            if self._requests.pop(request.id, None) is None:
                return False
        if (adapter := request.adapter) is not None:
            last = self.adapters.release(adapter)
            if not adapter.users:
                self.host.unneeded(adapter)
            if last:
                self._free(adapter)
        return True

    # Adapters

    def load(self, name: str, path: str | Path | Place, replace: bool = False) -> ServedAdapter:
        """Load an adapter and serve it under `name`.

        Args:
            name: what requests call it.
            path: its folder. A `Place` says how far links in it may lead.
            replace: take the place of the adapter of that name; requests under way are answered by that one.

        Raises:
            ConfigError: the name is taken.
            CheckpointError: the adapter cannot be served.
            Unavailable: the worker has failed, or did not come to it.
        """
        with self._loading:
            if name == self.config.name or (self.adapters.get(name) is not None and not replace):
                raise ConfigError(f"The name {name!r} is taken; unload it, choose another, or set load_inplace.")
            started = time.perf_counter()
            file = read_served(path, self.model, self.config.max_rank)
            stamp = FolderStamp(path if isinstance(path, Place) else Place(file.path), file.stamp)
            format_files = read_format_files(stamp.place)
            if FolderStamp.of(stamp.place) != stamp:
                raise CheckpointError(f"{file.path} changed while it was read; load it again.")
            manager = self.worker.manager

            def change() -> None:
                changed = True  # also if it fails halfway
                try:
                    changed = make_room(self.model, file, self.routing)
                finally:
                    if changed and manager is not None:
                        manager.forget_graphs()

            try:
                manager.run_between_batches(change) if manager is not None else change()
            except NotRun as error:
                raise Unavailable(f"The adapter was not loaded: {error}; try again soon.") from error
            adapter = prepare(name, file, self.model, started)
            adapter.stamp, adapter.format_files = stamp, format_files
            self.host.add(adapter)  # first, because what can be asked for can be unloaded
            before = self.adapters.add(adapter)
            if before is not None and before.users == 0:
                self._free(before)
        if self.device.type == "cuda":  # pinning memory takes longer than all the rest
            self.mover.submit(self.move_to_host, adapter)
        log.info("loaded %s (%s, rank %d) in %.0f ms", name, adapter.method, adapter.rank, adapter.seconds * 1e3)
        return adapter

    def unload(self, name: str) -> bool:
        """Stop serving an adapter. False if there is none.

        Requests that run or wait with it are answered; those that wait for it to be read from disk need its folder.
        """
        adapter = self.adapters.remove(name)
        if adapter is None:
            return False
        if adapter.users == 0:
            self._free(adapter)
        return True

    def _free(self, adapter: ServedAdapter) -> None:
        # The slot's tensors are overwritten when it is taken.
        self.slots.forget(adapter.serial)
        self.host.forget(adapter)

    def move_to_host(self, adapter: ServedAdapter) -> None:
        """Copy what an adapter has on the device to host memory, if there is some."""
        try:
            self.host.move(adapter, in_host_memory)
        except Exception as error:  # there is no more memory to pin, say; it can be served from where it is
            log.warning("%s stays in the memory of %s: %s", adapter.name, self.device, error)

    def _read_again(self, adapter: ServedAdapter) -> dict[str, SlotTensors]:
        """An adapter's tensors, from its folder, in host memory.

        Raises:
            Changed: it is not what it was.
            CheckpointError: it cannot be read.
        """
        stamp = adapter.stamp
        assert stamp is not None
        stamp.check()  # before, because what is wrong with changed files is that they have changed
        try:
            file = read_served(stamp.place, self.model, self.config.max_rank)
        except CheckpointError:
            stamp.check()
            raise
        stamp.compare(file.stamp)
        return in_host_memory(slot_tensors(file, self.model))

    def slotted_layers(self) -> dict[str, SlottedLayer]:
        """Module path -> the layer, of those that adapters have been loaded for."""
        return {path: module for path, module in self.model.named_modules() if isinstance(module, SlottedLayer)}

    # The worker

    def start(self) -> None:
        """Start the worker, and wait until it runs. Does nothing if it does.

        Raises:
            Unavailable: it does not: no memory, say, or a model that cannot be run in batches, or that says something
                else in them than alone.
        """
        try:
            self.worker.start()
        except Unavailable:
            if self.worker.stopping:  # it has been tried out, and is not tried again
                self.stop()
            raise

    def stop(self, timeout: float = 5.0) -> None:
        """End what runs, and the worker."""
        self.mover.shutdown(wait=False, cancel_futures=True)
        self.worker.stop(timeout)
