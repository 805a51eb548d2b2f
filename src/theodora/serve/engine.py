"""The engine: a model, its adapters, and transformers' worker that runs batches; started anew when it fails.

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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from theodora.errors import CheckpointError, ConfigError, TheodoraError
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
from theodora.serve.batching import SCHEDULER, NotRun, RoutedManager, Router, route_batches
from theodora.serve.config import ServeConfig
from theodora.serve.manners import read_told
from theodora.serve.requests import Request, Sampling
from theodora.serve.rows_apart import RowsApart
from theodora.serve.slots import Slots
from theodora.serve.slotted import Routing, SlottedLayer, SlotTensors
from theodora.serve.stamp import Stamp
from theodora.serve.tiers import HostTier
from theodora.serve.trial import Trial

log = logging.getLogger("theodora.serve")

_MOST_RESTARTS = 3  # without an answered request in between


class Busy(TheodoraError):
    """As many requests run and wait as may."""


class UnknownModel(TheodoraError):
    """No such model or adapter."""


class Unavailable(TheodoraError):
    """The worker has failed, or the server is stopping."""


class Engine:
    """Runs requests in batches. Any thread may call its methods."""

    def __init__(self, model: Any, config: ServeConfig) -> None:
        self.model, self.config = model, config
        self.device = model.device
        self.adapters = Registry()
        self.routing = Routing(config.slots + 1)
        self.slots = Slots(config.slots + 1, self._slotted)
        self.window = _window(model, config)
        self.vocabulary: int = model.get_input_embeddings().num_embeddings
        self.created = int(time.time())
        self.restarts = self.answered = 0
        self.failure: str | None = None
        self._requests: dict[str, Request] = {}
        self._lock, self._loading, self._numbers = threading.Lock(), threading.Lock(), itertools.count()
        self._mover = ThreadPoolExecutor(1, "theodora-mover")
        self.host = HostTier(config.host_adapters, self._mover, self._read_again, self._wake)
        self._manager: RoutedManager | None = None
        self._apart: RowsApart | None = None
        self._started = self._stopping = False
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
            manager = self._manager
            if manager is None or self._stopping or self.failure is not None:
                raise Unavailable(self._why_not())
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
        if accepted is None or self._manager is not manager:  # it may have failed after it had told all others
            self._over(request, answered=False)
            raise Unavailable(self._why_not())
        return request

    def cancel(self, request: Request) -> None:
        """End a request that nobody waits for any more. Does nothing to one that is over."""
        manager = self._manager
        if self._over(request, answered=False) and manager is not None:
            manager.cancel_request(request.id)

    def ready(self) -> bool:
        """Whether a request would be taken."""
        return self._manager is not None and self.failure is None and not self._stopping

    def why_failed(self) -> str:
        """What to tell whose request was ended by the worker."""
        if self._stopping:
            return "The server is stopping."
        return "The engine failed while it ran this request, and is starting again; try again soon."

    def under_way(self) -> int:
        """Requests that run or wait."""
        return len(self._requests)

    def running(self) -> int:
        """Requests in the batch."""
        processor = self._manager and self._manager.batch_processor
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

    def _why_not(self) -> str:
        return self.failure or (
            "The server is stopping." if self._stopping else "The engine is starting; try again soon."
        )

    def _over(self, request: Request, answered: bool = True) -> bool:
        with self._lock:
            if self._requests.pop(request.id, None) is None:
                return False
            if answered:
                self.answered += 1
        if (adapter := request.adapter) is not None:
            last = self.adapters.release(adapter)
            if not adapter.users:
                self.host.rest(adapter)
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
            stamp = Stamp(path if isinstance(path, Place) else Place(file.path), file.stamp)
            told = read_told(stamp.place)
            if Stamp.of(stamp.place) != stamp:
                raise CheckpointError(f"{file.path} changed while it was read; load it again.")
            manager = self._manager

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
            adapter.stamp, adapter.told = stamp, told
            self.host.add(adapter)  # first, because what can be asked for can be unloaded
            before = self.adapters.add(adapter)
            if before is not None and before.users == 0:
                self._free(before)
        if self.device.type == "cuda":  # pinning memory takes longer than all the rest
            self._mover.submit(self._to_host, adapter)
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

    def _to_host(self, adapter: ServedAdapter) -> None:
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

    def _wake(self) -> None:
        manager = self._manager
        if manager is not None:
            manager.wake()

    def _slotted(self) -> dict[str, SlottedLayer]:
        return {path: module for path, module in self.model.named_modules() if isinstance(module, SlottedLayer)}

    # The worker

    def start(self) -> None:
        """Start the worker, and wait until it runs. Does nothing if it does.

        Raises:
            Unavailable: it does not: no memory, say, or a model that cannot be run in batches, or that says something
                else in them than alone.
        """
        if self._manager is not None:
            return
        if _heads_differ(self.model.config.get_text_config()):
            raise self._unfit("layers have heads of different sizes, and batches of transformers' own have one")
        self._apart = self._apart or RowsApart(self.model)
        trial = None if self._started or self.window < 2 else Trial.of(self.model, self.window)
        if trial is not None and not trial.finite:
            dtype = str(self.model.dtype).removeprefix("torch.")
            raise Unavailable(
                f"{self.config.model} cannot be served: its output is not finite. Its weights hold NaN or infinite "
                f"values, or what it computes is too large for {dtype}: try another dtype (--dtype)."
            )
        self._manager = manager = self._running_manager()
        if trial is not None:
            try:
                with _unlogged():
                    self._try(manager, trial)
            except Unavailable:
                self.stop()
                raise
        self._started = True

    def _running_manager(self) -> RoutedManager:
        attention = self.model.config._attn_implementation
        try:
            with _unlogged():
                manager = self._new_manager()
                if self.model.config._attn_implementation.endswith("eager") and self.model.dtype == torch.float16:
                    # Its scores are float16: another request's large key makes them infinite, whatever the mask.
                    raise ValueError(
                        "attention without a kernel does not keep requests apart in float16, but does in "
                        "bfloat16 and float32 (--dtype)"
                    )
                manager.start()
                while manager.batch_processor is None:
                    if not manager.is_running():
                        raise manager.background_thread_status.fatal_error or RuntimeError("its worker ended")
                    time.sleep(0.01)
        except Exception as error:
            # Paged attention fails outside batches, and transformers takes it off again only where a manager has run.
            self.model.set_attn_implementation(attention)
            if isinstance(error, RuntimeError | OSError):  # no memory, say
                raise Unavailable(f"The engine does not start: {error}") from error
            raise self._unfit(error) from error  # transformers', for layers it has no cache for
        return manager

    def _try(self, manager: RoutedManager, trial: Trial) -> None:
        sampling = Sampling(max_tokens=trial.count, temperature=0.0)
        try:  # both in one batch
            requests = manager.run_between_batches(
                lambda: [self.submit(prompt, sampling, every_token=False) for prompt in trial.prompts]
            )
        except NotRun as error:
            raise self._unfit(error) from error
        outputs = [request.updates.get() for request in requests]
        self.answered = 0
        if error := next((output.error for output in outputs if output.error is not None), None):
            raise self._unfit(error)
        distance = trial.distance([(output.generated_tokens, output.logprobs) for output in outputs])
        if not distance <= trial.bound:
            raise self._unfit(
                f"beside another request it says something else than alone (log-probabilities are off by "
                f"{distance:.2g} on average, where rounding explains {trial.bound:.2g}); transformers' continuous "
                f"batching does not fit this kind of model"
            )

    def _unfit(self, error: Any) -> Unavailable:
        kind = self.model.config.model_type
        return Unavailable(
            f"{self.config.model} (model type {kind}) cannot be served in batches: {str(error).rstrip('.')}. "
            f"`theodora chat` and `theodora evaluate` run it without them."
        )

    def stop(self, timeout: float = 5.0) -> None:
        """End what runs, and the worker."""
        self._stopping = True
        manager, self._manager = self._manager, None
        self._mover.shutdown(wait=False, cancel_futures=True)
        if manager is not None and manager.is_running():
            manager.stop(block=True, timeout=timeout, hard_stop=True)
        if self._apart is not None:
            self._apart.end()

    def _new_manager(self) -> RoutedManager:
        config = self.config
        generation = GenerationConfig(do_sample=False, max_new_tokens=1, eos_token_id=-1)
        graphs = self.device.type == "cuda" if config.cuda_graphs is None else config.cuda_graphs
        # transformers 5.17 calls pages blocks.
        page = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"
        pages: Any = {page: config.page_size or (32 if self.device.type == "cpu" else 256)}
        batching = ContinuousBatchingConfig(
            **pages,
            num_blocks=_blocks(config, self.device),
            # Left to itself, transformers takes what memory allows, and reserves a mask of the square of that.
            max_batch_tokens=config.max_batch_tokens or (1024 if self.device.type == "cpu" else 2048),
            max_memory_percent=config.kv_memory,
            max_requests_per_batch=config.max_batch,
            use_cuda_graph=graphs,
            # transformers pads keys and values to 16384 tokens by default, which costs more than more graphs do.
            kv_padding_interval_size=4096 if graphs else 0,
            allow_block_sharing=config.prefix_reuse,
            scheduler_type=SCHEDULER,
            return_logprobs=True,
        )
        return RoutedManager(
            self.model,
            generation,
            batching,
            slots=self.slots,
            host=self.host,
            router=Router(self._requests.get, self._over),
            failing=self._failing,
            failed=self._failed,
        )

    def _failing(self, error: Exception) -> None:
        """On the worker's thread, before every request is told: take no more."""
        if self._started:
            log.error("the worker failed: %s", error)
        with self._lock:
            self._manager = None
            self.restarts += 1
            if self.restarts > _MOST_RESTARTS:
                self.failure = f"The worker has failed {self.restarts} times: {error}"

    def _failed(self) -> None:
        """On the worker's thread, after every request has been told: start another worker."""
        if self._started and not self._stopping and self.failure is None:
            threading.Thread(target=self._start_again, daemon=True).start()

    def _start_again(self) -> None:
        try:
            self.start()
        except Unavailable as error:
            self.failure = str(error)


@contextmanager
def _unlogged() -> Iterator[None]:
    """Without transformers' own report of a worker that fails, which is raised instead."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _blocks(config: ServeConfig, device: torch.device) -> int | None:
    page = config.page_size or (32 if device.type == "cpu" else 256)
    tokens = config.kv_tokens or (32768 if device.type == "cpu" else None)
    return None if tokens is None else -(-tokens // page)


def _window(model: Any, config: ServeConfig) -> int:
    """Tokens that prompt and answer may have together."""
    text = model.config.get_text_config()
    limits = [getattr(text, "max_position_embeddings", None), config.max_length, _one_rope(text)]
    if model.device.type == "cpu" or config.kv_tokens:
        limits.append(config.kv_tokens or 32768)
    return min(limit for limit in limits if limit)


def _one_rope(config: Any) -> int | None:
    """Tokens up to which LongRoPE has one set of frequencies.

    transformers chooses between the two sets by the longest sequence of a batch, so that a long one would change the
    short ones beside it, and the keys that are kept of them.
    """
    ropes = getattr(config, "rope_parameters", None) or {}
    found = [
        rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        for rope in (ropes, *ropes.values())  # one for all layers, or one for each type of layer
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope"
    ]
    return min(filter(None, found), default=None)


def _heads_differ(config: Any) -> bool:
    """Whether layers have heads of different sizes (Gemma 4), which transformers says by refusing to name one."""
    try:
        getattr(config, "head_dim", None)
    except Exception:  # its AmbiguousGlobalPerLayerAttributeError, which older versions have not
        return True
    return False
