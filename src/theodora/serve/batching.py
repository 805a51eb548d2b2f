"""The seams to transformers' continuous batching: what runs a batch, and what is put into its places.

With `scheduler.py`, `paged_cache.py`, `processors.py` and `offline_manager.py` (batches without a server) these are the
only files that know its insides (5.17 to 5.24). Six things are not in it, and are put in here:

- which slot each sequence of a batch goes to. It travels with the batch's other inputs, in the row of arguments that
  transformers keeps for logits processors, so that it works with graphs and with batches under way;
- adapters that wait for a slot: requests of theirs wait, too (`scheduler.py`);
- prefix reuse by adapter: the same tokens under another adapter are other keys and values (`paged_cache.py`);
- picking tokens by each request's own temperature, penalties and so on, log-probabilities before all of that, and those
  of prompts (`processors.py`);
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
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    OutputRouter,
)
from transformers.generation.continuous_batching.requests import RequestStatus

from theodora.errors import TheodoraError
from theodora.serve.paged_cache import keep_cache_finite, separate_prefixes
from theodora.serve.processors import SLOT, RoutedProcessors, outputs_of, request_of
from theodora.serve.requests import Request
from theodora.serve.slots import Slots
from theodora.serve.slotted import Routing
from theodora.serve.tiers import HostTier
from theodora.serve.watch import OutputNotFinite, mask_with_infinity

log = logging.getLogger("theodora.serve")

_GRAPH_TOKENS = 256
"""Batches of more tokens than that (and than there are requests in a batch) are not worth a CUDA graph, of which there
is one for each size: the GPU has enough to do while the host launches."""


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


@dataclass(eq=False)
class _Task:
    """What the worker is to do between two batches."""

    work: Callable[[], Any]
    done: threading.Event = field(default_factory=threading.Event)
    result: Any = None
    error: BaseException | None = None

    def end(self, error: BaseException | None = None) -> None:
        """Let go on who waits for it."""
        self.error = error
        self.done.set()


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
        self.tasks: deque[_Task] = deque()
        """What waits to be done between two batches."""
        self._warned: set[int] = set()

    def run_between_batches(self, work: Callable[[], Any], timeout: float = 60.0) -> Any:
        """Run `work` on the worker, while no batch does; its result, or its exception.

        Raises:
            NotRun: the worker has failed, or did not come to it in time.
        """
        if threading.current_thread() is self._generation_thread or not self.is_running():
            return work()
        task = _Task(work)
        self.tasks.append(task)
        self.wake()
        late = time.monotonic() + timeout
        while not task.done.wait(min(1.0, timeout)):
            if self.is_running() and time.monotonic() < late:
                continue
            try:
                self.tasks.remove(task)
            except ValueError:  # it has begun
                task.done.wait()
                break
            raise NotRun("the worker failed" if not self.is_running() else f"the worker was busy for {timeout:g} s")
        if task.error is not None:
            raise task.error
        return task.result

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
        while self.tasks:
            task, error = self.tasks.popleft(), None
            try:
                stream = batch_processor.inputs_and_outputs.compute_stream
                if stream is not None:
                    stream.synchronize()
                try:
                    task.result = task.work()
                finally:
                    if stream is not None:  # what the work has put under way, on a stream of its own, even if it failed
                        torch.cuda.current_stream().synchronize()
            except Exception as raised:
                error = raised
            task.end(error)
        return super()._generation_loop_body(batch_processor, bootstrapping)

    def _create_batch_processor(self) -> Any:
        processor: Any = super()._create_batch_processor()
        processors, cache = self.logit_processor, processor.cache
        processor.scheduler.slots, processor.scheduler.host = self._slots, self._host
        processor.scheduler.fail = lambda state, error: self.output_router.fail_and_deliver(state, error)
        stream = processor.inputs_and_outputs.compute_stream
        processor.scheduler.compute = lambda: torch.cuda.stream(stream)
        separate_prefixes(cache)
        processors.watch = keep_cache_finite(cache)
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
            _wrap_update(io, processors, partial(self.without_not_finite, processor))
        return processor

    def without_not_finite(
        self, processor: Any, requests: list[Any], tokens: list[int], logprobs: list[float]
    ) -> tuple[list[Any], list[int], list[float]]:
        """A batch's outputs without those of requests that were not finite, which end here, and only they.

        Their pages are freed without having been shared, because transformers shares a page after this.
        """
        places = outputs_of(requests)
        finite: list[Any] = []
        # Of outputs only those of requests with a new token are read, in their order.
        picked: list[tuple[int, float]] = []
        for future, place in zip(requests, places, strict=True):
            state, request = future.state, request_of(future.state)
            if (
                request is not None
                and (request.not_finite or math.isnan(logprobs[place]))
                and state.status is not RequestStatus.FINISHED  # what is over is skipped by who reads this
            ):
                request.problem = OutputNotFinite.of(request, self.model.dtype)
                self._warn(request)
                self.output_router.fail_and_deliver(state, request.problem)
                # Wherever it is: it may be waiting again, with its pages kept aside.
                processor.scheduler.set_request_cancellation(state.request_id)
                processor.scheduler.block_new_requests = False
                continue
            finite.append(future)
            if future.has_new_token:
                picked.append((tokens[place], logprobs[place]))
        return finite, [token for token, _ in picked], [logprob for _, logprob in picked]

    def _warn(self, request: Request) -> None:
        """Once for each adapter: whoever can make it happen can make it happen often."""
        serial = request.adapter.serial if request.adapter else 0
        if serial not in self._warned:
            self._warned.add(serial)
            log.warning("%s (Said once; its requests are answered with 500.)", request.problem)

    def _handle_critical_error(self, error: Exception, batch_processor: Any) -> None:
        self._failing(error)
        super()._handle_critical_error(error, batch_processor)
        while self.tasks:
            self.tasks.popleft().end(NotRun(f"the worker failed: {error}"))
        self._failed()


def route_batches(model: Any, routing: Routing) -> None:
    """Tell the slotted layers, before each batch, which token goes where."""

    def before(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows = kwargs.get("logits_processor_args")
        if rows is None:  # no batch of ours
            return
        starts, tokens = kwargs["cu_seq_lens_q"], kwargs["input_ids"].shape[1]
        kwargs["cache"].watch.begin(starts, tokens)
        mask_with_infinity(kwargs.get("attention_mask"))
        routing.set(token_slots(rows[SLOT], starts, tokens), kwargs.get("logits_to_keep"))

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


def _wrap_update(io: Any, processors: RoutedProcessors, without_not_finite: Callable[..., Any]) -> None:
    """Hand out what a finished batch brings beside its tokens, and end requests whose numbers are not finite."""
    update = io.prepare_batch_update
    io.tops = io.scores = None

    def wrapped() -> Any:
        requests, tokens, logprobs = update()
        processors.hand_out(requests, io)
        return without_not_finite(requests, tokens, logprobs)

    io.prepare_batch_update = wrapped
