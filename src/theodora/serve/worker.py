"""The worker that runs batches, transformers' own: started, tried out, and started anew when it fails."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from theodora.layers.libraries import why_not_captured
from theodora.serve.batching import NotRun, RoutedManager, Router
from theodora.serve.capped_attention import cap_scores
from theodora.serve.config import ServeConfig
from theodora.serve.errors import Unavailable
from theodora.serve.requests import Request, Sampling
from theodora.serve.row_mixing import NoRowMixing
from theodora.serve.scheduler import SCHEDULER
from theodora.serve.slots import Slots
from theodora.serve.tiers import HostTier
from theodora.serve.trial import Trial, heads_differ
from theodora.serve.window import page_count, page_size, window_of

log = logging.getLogger("theodora.serve")

_MOST_RESTARTS = 3  # in the life of a server; what fails more often is not mended by another worker


class Worker:
    """One manager of transformers' after another, each with its thread. Any thread may call the methods.

    Args:
        model: runs in batches while a manager has it.
        config: the server's.
        slots: where adapters are on the device.
        host: where they are in host memory.
        new_router: makes what brings a manager's updates to the requests.
        submit: puts a request in the queue, for the trial.
        lock: the engine's. While it is held the manager stays, so that a request is taken by the one that runs.
    """

    def __init__(
        self,
        model: Any,
        config: ServeConfig,
        *,
        slots: Slots,
        host: HostTier,
        new_router: Callable[[], Router],
        submit: Callable[..., Request],
        lock: threading.Lock,
    ) -> None:
        self.manager: RoutedManager | None = None
        """None until it has started, and after it has failed."""
        self.restarts = 0
        self.failure: str | None = None
        """Why no worker is started any more."""
        self.stopping = False
        self._model, self._config = model, config
        self._slots, self._host = slots, host
        self._new_router, self._submit, self._lock = new_router, submit, lock
        self._tried = False
        self._no_row_mixing: NoRowMixing | None = None

    def ready(self) -> bool:
        """Whether a request would be taken."""
        return self.manager is not None and self.failure is None and not self.stopping

    def why_not_ready(self) -> str:
        """What to tell whose request is not taken."""
        return self.failure or (
            "The server is stopping." if self.stopping else "The engine is starting; try again soon."
        )

    def why_failed(self) -> str:
        """What to tell whose request was ended by the worker."""
        if self.stopping:
            return "The server is stopping."
        return "The engine failed while it ran this request, and is starting again; try again soon."

    def wake(self) -> None:
        """End the wait for requests: there is something to do."""
        manager = self.manager
        if manager is not None:
            manager.wake()

    def start(self) -> None:
        """Start a manager, and wait until it runs; the first one is tried out. Does nothing if one runs.

        Raises:
            Unavailable: it does not: no memory, say, or a model that cannot be run in batches, or that says something
                else in them than alone (after which the worker is stopped).
        """
        if self.manager is not None:
            return
        model = self._model
        if heads_differ(model.config.get_text_config()):
            raise self._unfit("layers have heads of different sizes, and batches of transformers' own have one")
        self._no_row_mixing = self._no_row_mixing or NoRowMixing(model)
        window = window_of(model, self._config)
        trial = None if self._tried or window < 2 else Trial.of(model, window)
        if trial is not None and not trial.finite:
            dtype = str(model.dtype).removeprefix("torch.")
            raise Unavailable(
                f"{self._config.model} cannot be served: its output is not finite. Its weights hold NaN or infinite "
                f"values, or what it computes is too large for {dtype}: try another dtype (--dtype)."
            )
        self.manager = manager = self._running_manager()
        if trial is not None:
            try:
                with _without_reports():
                    self._try_out(manager, trial)
            except Unavailable:
                self.stop()
                raise
        self._tried = True

    def start_again(self) -> None:
        """Start another manager; what is in its way stands in `failure`."""
        try:
            self.start()
        except Unavailable as error:
            self.failure = str(error)

    def stop(self, timeout: float = 5.0) -> None:
        """End what runs, within `timeout` seconds."""
        self.stopping = True
        manager, self.manager = self.manager, None
        if manager is not None and manager.is_running():
            manager.stop(block=True, timeout=timeout, hard_stop=True)
        if self._no_row_mixing is not None:
            self._no_row_mixing.end()

    def _running_manager(self) -> RoutedManager:
        model = self._model
        attention = model.config._attn_implementation
        cap_scores()
        try:
            with _without_reports():
                manager = self._new_manager()
                if model.config._attn_implementation.endswith("eager") and model.dtype == torch.float16:
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
            model.set_attn_implementation(attention)
            if isinstance(error, RuntimeError | OSError):  # no memory, say
                raise Unavailable(f"The engine does not start: {error}") from error
            raise self._unfit(error) from error  # transformers', for layers it has no cache for
        return manager

    def _new_manager(self) -> RoutedManager:
        config, device = self._config, self._model.device
        is_cpu = device.type == "cpu"
        generation = GenerationConfig(do_sample=False, max_new_tokens=1, eos_token_id=-1)
        graphs = device.type == "cuda" if config.cuda_graphs is None else config.cuda_graphs
        if graphs and (reason := why_not_captured(self._model)) is not None:
            graphs = False
            log.warning("batches are not recorded in CUDA graphs: %s", reason)
        # transformers 5.17 calls pages blocks.
        page = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"
        pages: Any = {page: page_size(config, device)}
        batching = ContinuousBatchingConfig(
            **pages,
            num_blocks=page_count(config, device),
            # Left to itself, transformers takes what memory allows, and reserves a mask of the square of that.
            max_batch_tokens=config.max_batch_tokens or (1024 if is_cpu else 2048),
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
            self._model,
            generation,
            batching,
            slots=self._slots,
            host=self._host,
            router=self._new_router(),
            failing=self._failing,
            failed=self._failed,
        )

    def _try_out(self, manager: RoutedManager, trial: Trial) -> None:
        sampling = Sampling(max_tokens=trial.count, temperature=0.0)
        try:  # both in one batch
            requests = manager.run_between_batches(
                lambda: [self._submit(prompt, sampling, every_token=False) for prompt in trial.prompts]
            )
        except NotRun as error:
            raise self._unfit(error) from error
        outputs = [request.updates.get() for request in requests]
        if error := next((output.error for output in outputs if output.error is not None), None):
            raise self._unfit(error)
        distance = trial.distance([(output.generated_tokens, output.logprobs) for output in outputs])
        if not distance <= trial.bound:
            raise self._unfit(
                f"beside another request it says something else than alone (log-probabilities are off by "
                f"{distance:.2g} on average, where rounding explains {trial.bound:.2g}); transformers' continuous "
                f"batching does not fit this kind of model"
            )

    def _unfit(self, reason: object) -> Unavailable:
        kind = self._model.config.model_type
        return Unavailable(
            f"{self._config.model} (model type {kind}) cannot be served in batches: {str(reason).rstrip('.')}. "
            f"`theodora chat` and `theodora evaluate` run it without them."
        )

    def _failing(self, error: Exception) -> None:
        """On the manager's thread, before every request is told: take no more."""
        if self._tried:
            log.error("the worker failed: %s", error)
        with self._lock:
            self.manager = None
            self.restarts += 1
            if self.restarts > _MOST_RESTARTS:
                self.failure = f"The worker has failed {self.restarts} times: {error}"

    def _failed(self) -> None:
        """On the manager's thread, after every request has been told: start another one."""
        if self._tried and not self.stopping and self.failure is None:
            threading.Thread(target=self.start_again, daemon=True).start()


@contextmanager
def _without_reports() -> Iterator[None]:
    """Without transformers' own report of a worker that fails, which is raised instead."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
