"""The seams to transformers' continuous batching: with `processors.py` the only file that knows its insides (5.17 to
5.23).

Six things are not in it, and are put in here:

- which slot each sequence of a batch goes to. It travels with the batch's other inputs, in the row of arguments that
  transformers keeps for logits processors, so that it works with graphs and with batches under way;
- adapters that wait for a slot: requests of theirs wait, too (`RoutedScheduler`);
- prefix reuse by adapter: the same tokens under another adapter are other keys and values (`_salted`);
- picking tokens by each request's own temperature, penalties and so on, log-probabilities before all of that, and those
  of prompts;
- requests whose numbers are not finite: they end with an error, and nobody else reads them (`watch.py`);
- a worker that fails tells so.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    OutputRouter,
)
from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

from theodora.errors import CheckpointError, TheodoraError
from theodora.serve.processors import RoutedProcessors, outputs_of, request_of
from theodora.serve.requests import Request
from theodora.serve.slots import Slots
from theodora.serve.slotted import Routing
from theodora.serve.tiers import HostTier
from theodora.serve.watch import NotFinite, Watch, mask_wholly

log = logging.getLogger("theodora.serve")

SCHEDULER = "theodora"
_PATIENCE = 2.0
"""Seconds that a request waits for a slot before requests that came later have to wait for it."""
_GRAPH_TOKENS = 256
"""Batches of more tokens than that (and than there are requests in a batch) are not worth a CUDA graph, of which there
is one for each size: the GPU has enough to do while the host launches."""
# Prefixes are told apart by bits above all token ids, spread over the first tokens of a block, of which there are at
# least four.
_TOKEN_BITS, _SALT_BITS, _SALTED = 20, 11, 4


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
        """As the parent, with waiting requests hidden that have no slot, and the batch sorted by slot."""
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
            elif adapter.modules is not None and time.monotonic() - request.asked > _PATIENCE:
                # Others that keep their adapters' slots in use would never let it run.
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


class Router(OutputRouter):
    """Brings updates to the requests, with one call for each event loop and batch."""

    def __init__(self, find: Callable[[str], Request | None], over: Callable[[Request], object]) -> None:
        super().__init__()
        self._find, self._over = find, over

    def deliver(self, output: Any) -> None:
        """Bring one update."""
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        """Bring a batch's updates."""
        loops: dict[Any, list[tuple[Request, Any]]] = {}
        for output in outputs:
            request = self._find(output.request_id)
            if request is None:
                continue
            if output.is_finished():
                self._over(request)
            loops.setdefault(request.loop, []).append((request, output))
        for loop, updates in loops.items():
            if loop is None:
                _hand_over(updates)
            elif not loop.is_closed():
                try:
                    loop.call_soon_threadsafe(_hand_over, updates)
                except RuntimeError:  # closed in between: nobody is left to be told
                    continue


def _hand_over(updates: list[tuple[Request, Any]]) -> None:
    for request, output in updates:
        (request.updates.put if request.loop is None else request.updates.put_nowait)(output)


class NotRun(TheodoraError):
    """The worker did not come to what it was to do between two batches."""


class RoutedManager(ContinuousBatchingManager):
    """transformers' manager with our parts in its places."""

    def __init__(
        self,
        model: Any,
        generation_config: Any,
        cb_config: Any,
        *,
        slots: Slots,
        host: HostTier,
        router: Router,
        failing: Callable[[Exception], None],
        failed: Callable[[], None],
    ) -> None:
        super().__init__(model, generation_config, cb_config)
        self.logit_processor = RoutedProcessors()
        self.output_router = router
        self._slots, self._host, self._failing, self._failed = slots, host, failing, failed
        self._tasks: deque[tuple[Callable[[], Any], threading.Event, list[Any]]] = deque()
        self._warned: set[int] = set()

    def run_between_batches(self, task: Callable[[], Any], timeout: float = 60.0) -> Any:
        """Run `task` on the worker, while no batch does; its result, or its exception.

        Raises:
            NotRun: the worker has failed, or did not come to it in time.
        """
        if threading.current_thread() is self._generation_thread or not self.is_running():
            return task()
        done, result = threading.Event(), []
        mine = (task, done, result)
        self._tasks.append(mine)
        self.wake()
        late = time.monotonic() + timeout
        while not done.wait(min(1.0, timeout)):
            if self.is_running() and time.monotonic() < late:
                continue
            try:
                self._tasks.remove(mine)
            except ValueError:  # it has begun
                done.wait()
                break
            raise NotRun("the worker failed" if not self.is_running() else f"the worker was busy for {timeout:g} s")
        if isinstance(result[0], BaseException):
            raise result[0]
        return result[0]

    def wake(self) -> None:
        """End the worker's wait for requests."""
        event = getattr(self, "_wake_up_loop", None) or getattr(self, "_has_new_requests", None)
        if event is not None:
            event.set()

    def forget_graphs(self) -> None:
        """Capture CUDA graphs anew: the layers have changed."""
        for io in _leaves(self.batch_processor):
            io.graphs = type(io.graphs)()

    def _generation_loop_body(self, batch_processor: Any, bootstrapping: bool) -> bool:
        while self._tasks:
            task, done, result = self._tasks.popleft()
            try:
                stream = batch_processor.inputs_and_outputs.compute_stream
                if stream is not None:
                    stream.synchronize()
                try:
                    result.append(task())
                finally:
                    if stream is not None:  # what the task has put under way, on a stream of its own, even if it failed
                        torch.cuda.current_stream().synchronize()
            except Exception as error:
                result.append(error)
            done.set()
        return super()._generation_loop_body(batch_processor, bootstrapping)

    def _create_batch_processor(self) -> Any:
        processor: Any = super()._create_batch_processor()
        processors, cache = self.logit_processor, processor.cache
        processor.scheduler.slots, processor.scheduler.host = self._slots, self._host
        processor.scheduler.fail = lambda state, error: self.output_router.fail_and_deliver(state, error)
        stream = processor.inputs_and_outputs.compute_stream
        processor.scheduler.compute = lambda: torch.cuda.stream(stream)
        _salt(cache)
        processors.watch = _watch(cache)
        runner = processor.model_runner
        runner._sample = processors.sample
        choose = runner._get_forward_fn

        ios = processor.inputs_and_outputs
        pairs = getattr(ios, "io_pairs", None)
        processors.current_io = lambda: ios if pairs is None else pairs[ios.current_pair].host_io
        most = max(_GRAPH_TOKENS, self.continuous_batching_config.max_requests_per_batch or 0)

        def forward(use_block_table: bool) -> tuple[Callable[..., Any], bool]:
            function, graph = choose(use_block_table)
            if stream is not None and pairs is None:
                # transformers writes the inputs on another stream than the one that reads them.
                stream.wait_stream(torch.cuda.current_stream(stream.device))
            if processors.scored:
                return processors.scoring(function), False
            return function, graph and not processors.eager and processors.current_io().num_q_tokens <= most

        runner._get_forward_fn = forward
        for io in _leaves(processor):
            _wrap_update(io, processors, partial(self._without_ruined, processor))
        return processor

    def _without_ruined(self, processor: Any, requests: list[Any], tokens: list[int], logprobs: list[float]) -> Any:
        """A batch's outputs without those of requests that were not finite, which end here, and only they.

        Their pages are freed without having been shared, because transformers shares a page after this.
        """
        places = outputs_of(requests)
        kept: list[Any] = []
        # Of outputs only those of requests with a new token are read, in their order.
        told: list[tuple[int, float]] = []
        for future, place in zip(requests, places, strict=True):
            state, request = future.state, request_of(future.state)
            if (
                request is not None
                and (request.ruined or math.isnan(logprobs[place]))
                and state.status is not RequestStatus.FINISHED  # what is over is skipped by who reads this
            ):
                request.problem = NotFinite.of(request, self.model.dtype)
                self._warn(request)
                self.output_router.fail_and_deliver(state, request.problem)
                # Wherever it is: it may be waiting again, with its pages kept aside.
                processor.scheduler.set_request_cancellation(state.request_id)
                processor.scheduler.block_new_requests = False
                continue
            kept.append(future)
            if future.has_new_token:
                told.append((tokens[place], logprobs[place]))
        return kept, [token for token, _ in told], [logprob for _, logprob in told]

    def _warn(self, request: Request) -> None:
        """Once for each adapter: whoever can make it happen can make it happen often."""
        serial = request.adapter.serial if request.adapter else 0
        if serial not in self._warned:
            self._warned.add(serial)
            log.warning("%s (Said once; its requests are answered with 500.)", request.problem)

    def _handle_critical_error(self, error: Exception, batch_processor: Any) -> None:
        self._failing(error)
        super()._handle_critical_error(error, batch_processor)
        while self._tasks:
            _, done, result = self._tasks.popleft()
            result.append(NotRun(f"the worker failed: {error}"))
            done.set()
        self._failed()


def route_batches(model: Any, routing: Routing) -> None:
    """Tell the slotted layers, before each batch, which token goes where."""

    def before(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows = kwargs.get("logits_processor_args")
        if rows is None:  # no batch of ours
            return
        starts, tokens = kwargs["cu_seq_lens_q"], kwargs["input_ids"].shape[1]
        kwargs["cache"].watch.begin(starts, tokens)
        mask_wholly(kwargs.get("attention_mask"))
        routing.set(token_slots(rows[0], starts, tokens), kwargs.get("logits_to_keep"))

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(lambda *_: routing.clear(), always_call=True)


def token_slots(slots_N: Tensor, starts: Tensor, tokens: int) -> Tensor:
    """The slot of each token, (T,), from those of the sequences and where these start (N + 1); padding takes any."""
    at = torch.arange(tokens, device=starts.device, dtype=starts.dtype)
    sequence = torch.searchsorted(starts[1:].contiguous(), at, right=True).clamp_max(slots_N.shape[0] - 1)
    return slots_N[sequence]


def _leaves(processor: Any) -> list[Any]:
    """The objects that hold a batch's inputs, outputs and graphs: one, or two where batches overlap."""
    if processor is None:
        return []
    ios = processor.inputs_and_outputs
    pairs = getattr(ios, "io_pairs", None)
    return [ios] if pairs is None else [io for pair in pairs for io in (pair.host_io, pair.device_io)]


def _wrap_update(io: Any, processors: RoutedProcessors, without_ruined: Callable[..., Any]) -> None:
    update = io.prepare_batch_update
    io.tops = io.scores = None

    def wrapped() -> Any:
        found = update()
        processors.keep(found[0], io)
        return without_ruined(*found)

    io.prepare_batch_update = wrapped


def _watch(cache: Any) -> Watch:
    """Let nothing into the cache that is not finite."""
    cache.watch = watch = Watch(cache.max_batch_tokens, torch.device(cache.device))
    update = cache.update

    def cleaned(key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return update(*watch.keep_finite(key_states, value_states), *args, **kwargs)

    cache.update = cleaned
    for held in (*getattr(cache, "key_cache", ()), *getattr(cache, "value_cache", ())):
        held.zero_()  # 5.17 takes memory as it is
    return watch


def _cleaned_before(attend: Callable[..., Any]) -> Callable[..., Any]:
    """5.17's flash attention for steps of one token each, which writes to the cache past `cache.update`."""

    def cleaned(module: Any, q: Tensor, k: Tensor, v: Tensor, cache: Any, *args: Any, **kwargs: Any) -> Any:
        watch: Watch | None = getattr(cache, "watch", None)
        k, v = (k, v) if watch is None else watch.keep_finite(k, v)
        return attend(module, q, k, v, cache, *args, **kwargs)

    return cleaned


with suppress(ImportError, AttributeError):  # later versions have no such function
    flash_paged: Any = import_module("transformers.integrations.flash_paged")
    flash_paged._paged_decode_forward = _cleaned_before(flash_paged._paged_decode_forward)


def _salt(cache: Any) -> None:
    """Make the cache see each adapter's prefixes as tokens of their own."""
    search = cache.search_prefix_match
    name = next(name for name in ("mark_complete_blocks", "mark_shareable_blocks_as_complete") if hasattr(cache, name))
    mark = getattr(cache, name)
    cache.asks = None

    def searched(request_id: str, prompt: list[int]) -> int:
        asks: Request | None = cache.asks
        if asks is not None and asks.sampling.prompt_logprobs is not None:
            return 0  # every token of a prompt that is scored goes through the model
        return search(request_id, _salted(prompt, asks))

    cache.search_prefix_match = searched
    setattr(cache, name, lambda state, complete: mark(_Salted(state), complete))


class _Salted:
    """transformers' request, with salted tokens."""

    def __init__(self, state: Any) -> None:
        self._state = state
        self.initial_tokens = _salted(state.initial_tokens, request_of(state))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


def _salted(tokens: list[int], request: Request | None) -> list[int]:
    salt = 0 if request is None or request.adapter is None else request.adapter.serial
    if not salt:
        return tokens
    first = [
        token | (salt >> n * _SALT_BITS) % (1 << _SALT_BITS) << _TOKEN_BITS for n, token in enumerate(tokens[:_SALTED])
    ]
    return first + tokens[_SALTED:]
