"""One run of transformers' continuous batching that nobody serves from: what it is asked for, its sizes, its loop.

`offline.py` is what to call. A seam to transformers' continuous batching, as `batching.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from functools import cache
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter

from theodora.errors import TheodoraError
from theodora.kernels.attention_backends import repeatable_attention
from theodora.serve.capped_attention import cap_scores
from theodora.serve.paged_cache import keep_cache_finite
from theodora.serve.processors import KEY, RoutedProcessors
from theodora.serve.requests import Request, Sampling
from theodora.serve.watch import mask_with_infinity

MOST_ROWS = 256
_MOST_PAGED = (
    32 * 1024
)  # tokens of keys and values; each row's query is held against all of them, so it bounds time, too
_MOST_TOKENS = 2048  # in a forward pass
_PAGE, _FLASH_PAGE = 32, 256  # tokens; flash attention's own kernels know no smaller page
_MEMORY = 0.5  # of what is free on the device, at most
_GRAPH_TOKENS = 256  # batches of more are not worth a CUDA graph


class Unfit(TheodoraError):
    """A model that is not answered for in batches of transformers' own, and why."""


class NoRoom(Unfit):
    """Memory does not do, for so many rows at least."""


@dataclass(frozen=True)
class Asked:
    """What one run is asked for."""

    prompts: Sequence[Sequence[int]]
    settings: GenerationConfig
    settled: Callable[[int, list[int]], bool] | None = None
    over: Callable[[], object] = lambda: None
    logprobs: bool = False
    samplings: Sequence[Sampling] | None = None
    """How the tokens of each answer are drawn, all alike but for the seeds; greedily if not given."""
    graphs: bool = False
    answers: dict[int, tuple[list[int], list[float]]] = field(default_factory=dict[int, tuple[list[int], list[float]]])
    """By index, what is over: tokens, and their log-probabilities if they are asked for."""

    @property
    def most(self) -> int:
        """New tokens of an answer, at most."""
        assert self.settings.max_new_tokens is not None
        return self.settings.max_new_tokens


@contextmanager
def as_when_answering(model: Any) -> Iterator[None]:
    """In evaluation mode, without gradients; afterwards every module is in the mode it was in before.

    Autocast keeps no weight that it casts: one from before a step may be there, and a CUDA graph would go on reading
    it.
    """
    training, cached = [module for module in model.modules() if module.training], torch.is_autocast_cache_enabled()
    if training:
        model.eval()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad(), repeatable_attention():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        for module in training:
            module.training = True


@contextmanager
def paged_attention(model: Any) -> Iterator[None]:
    """The model's attention by pages, of the kind that it has: another kernel would round otherwise."""
    before = model.config._attn_implementation
    cap_scores()
    if before == "eager" and model.dtype == torch.float16:
        # Its scores are float16: another row's large key makes them infinite, whatever the mask.
        raise Unfit("attention without a kernel does not keep rows apart in float16")
    # From 5.23 at the latest the kernels take pages under their own names, but for `eager`.
    by_name = not hasattr(ContinuousBatchingConfig, "auto_switch_to_flash") or before == "eager"
    try:
        if by_name:
            try:
                model.set_attn_implementation(f"paged|{before}")
            except (ValueError, ImportError) as error:
                raise Unfit(str(error)) from error
        yield
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)


class _Router(OutputRouter):
    """Brings each update to the manager, at once."""

    def __init__(self, take: Callable[[Any], None]) -> None:
        super().__init__()
        self._take = take

    def deliver(self, output: Any) -> None:
        self._take(output)

    def deliver_batch(self, outputs: list[Any]) -> None:
        for output in outputs:
            self._take(output)


class Manager(ContinuousBatchingManager):
    """transformers' manager, run by whoever made it, until all answers are over; again and again if it is kept."""

    def __init__(self, model: Any, asked: Asked, sizes: Sizes) -> None:
        self._asked: Asked = asked
        self._made: Any = None
        batching = _batching(model, asked, sizes)
        super().__init__(model, _settings(model, asked), batching)
        self.sizes = replace(sizes, longest=batching.num_blocks)
        self.output_router = _Router(self._take)
        self._processors = RoutedProcessors(asked.samplings[0]) if asked.samplings else None
        if self._processors is not None:
            self.logit_processor = self._processors
        helper: Any = self.distributed_helper
        helper.set_tp_seed = lambda *_: None  # it would seed torch's generators, and nothing is drawn from them here

    def run(self, asked: Asked, waiting: Sequence[int]) -> None:
        """Answer what is waiting. A manager that has been run has to be let go after an error."""
        self._asked = asked
        self.batch_processor = processor = self._create_batch_processor()
        cache, watch, self.current_batch = processor.cache, self._watch, 0

        def before(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if kwargs.get("cache") is cache:
                watch.begin(kwargs["cu_seq_lens_q"], kwargs["input_ids"].shape[1])
                mask_with_infinity(kwargs.get("attention_mask"))

        hook = self.model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            for index in sorted(waiting, key=lambda i: -len(asked.prompts[i])):
                self.add_request(
                    list(asked.prompts[index]),
                    request_id=str(index),
                    max_new_tokens=asked.most,
                    streaming=asked.settled is not None,
                    eos_token_id=asked.settings.eos_token_id,
                    **self._request(index),
                )
            while not asked.answers.keys() >= set(waiting):
                self._generation_loop_body(processor, False)
        finally:
            hook.remove()

    def _request(self, index: int) -> dict[str, Any]:
        samplings = self._asked.samplings
        if samplings is None:
            return {}
        prompt = list(self._asked.prompts[index])
        return {KEY: Request(id=str(index), prompt=prompt, adapter=None, sampling=samplings[index])}

    def _take(self, output: Any) -> None:
        if output.error is not None:
            raise Unfit(str(output.error))
        index, tokens = int(output.request_id), list(output.generated_tokens)
        settled = self._asked.settled
        if not output.is_finished():
            if settled is None or not settled(index, tokens):
                return
            self.batch_processor.scheduler.set_request_cancellation(output.request_id)  # pyright: ignore
        self._asked.answers[index] = tokens, list(output.logprobs or [])
        self._asked.over()

    def _create_batch_processor(self) -> Any:
        processor: Any = super()._create_batch_processor()  # or the one that was made, reset
        if processor is self._made:
            if hasattr(processor.cache, "reset"):  # also of prefixes, which are other weights' (5.23)
                processor.cache.reset()
            return processor
        self._made, self._watch = processor, keep_cache_finite(processor.cache)  # or one row's NaN would be in all rows
        runner: Any = processor.model_runner
        ios: Any = processor.inputs_and_outputs
        if ios.compute_stream is not None:
            ios.compute_stream = _compute_stream(ios.compute_stream.device)
        choose, stream, processors = runner._get_forward_fn, ios.compute_stream, self._processors
        if processors is not None:
            processors.watch, processors.current_io = self._watch, lambda: ios
            runner._sample = processors.sample

        def forward(use_block_table: bool) -> tuple[Any, bool]:
            function, graph = choose(use_block_table)
            if stream is not None:  # transformers writes the inputs on another stream than the one that reads them
                stream.wait_stream(torch.cuda.current_stream(stream.device))
            eager = processors is not None and processors.eager
            return function, graph and not eager and ios.num_q_tokens <= _GRAPH_TOKENS

        runner._get_forward_fn = forward
        return processor

    def let_go(self) -> None:
        """Give back what the batches took, now: pages and graphs."""
        processor, self.batch_processor = self._made, None
        self._made = None
        if processor is not None:
            if (stream := processor.inputs_and_outputs.compute_stream) is not None:
                stream.synchronize()
            # What was put in its place holds what it was put into; without that, memory would wait for the collector.
            for name in ("_get_forward_fn", "_sample"):
                vars(processor.model_runner).pop(name, None)
            vars(processor.cache).pop("update", None)
        self.destroy()


@cache
def _compute_stream(device: torch.device) -> Any:
    """One for all runs: cuBLAS keeps a workspace (32 MiB on an H200) for every stream that it has run on."""
    return torch.cuda.Stream(device)


def _settings(model: Any, asked: Asked) -> GenerationConfig:
    """The settings, with what `generate` adds of the model's own.

    Raises:
        Unfit: with them tokens are picked otherwise than greedily from the logits.
    """
    settings = asked.settings
    if asked.logprobs:  # a trial, or tokens are drawn by our own processors
        return settings
    prepared: Any = model._prepare_generation_config(settings)
    settings = prepared[0] if isinstance(prepared, tuple) else prepared
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of processors that are not used here
        try:
            processors = len(model._get_logits_processor(settings))
        except AttributeError:  # some need what only `generate` adds
            processors = 1
    if processors or settings.do_sample or settings.stop_strings or settings.num_beams not in (None, 1):
        raise Unfit("its generation settings change how tokens are picked")
    return settings


@dataclass(frozen=True)
class Sizes:
    """What a manager is made for."""

    rows: int
    """Under way at a time."""
    tokens: int
    """In a forward pass."""
    pages: int
    """Of keys and values, together; memory may leave fewer."""
    longest: int
    """Pages of a row: of the longest one, or of what a manager has room for."""

    @classmethod
    def of(cls, model: Any, asked: Asked, waiting: Sequence[int], rows: int) -> Sizes:
        """Of one run, within the bounds of time."""
        rows, page = min(rows, len(waiting)), _page(model)
        lengths = [len(asked.prompts[index]) for index in waiting]
        needs = sorted(-(-(length + asked.most) // page) for length in lengths)
        pages = max(needs[-1], min(sum(needs[-rows:]), _MOST_PAGED // page))
        return cls(rows, max(rows, min(_MOST_TOKENS, sum(lengths))), pages, needs[-1])

    def with_room(self, before: Sizes | None) -> Sizes:
        """Of many runs: powers of two, so that another run seldom needs more, and no less than `before`."""
        tokens, pages = (1 << (count - 1).bit_length() for count in (self.tokens, self.pages))
        if before is None:
            return Sizes(self.rows, tokens, pages, self.longest)
        return Sizes(max(self.rows, before.rows), max(tokens, before.tokens), max(pages, before.pages), self.longest)

    def do_for(self, other: Sizes) -> bool:
        """Whether they are enough for a run of other sizes."""
        return all(own >= others for own, others in zip(astuple(self), astuple(other), strict=True))


def _page(model: Any) -> int:
    return _FLASH_PAGE if "flash" in model.config._attn_implementation else _PAGE


def _batching(model: Any, asked: Asked, sizes: Sizes) -> ContinuousBatchingConfig:
    rows, page = sizes.rows, _page(model)
    named: dict[str, Any] = {}
    known: Any = ContinuousBatchingConfig.__dataclass_fields__
    named["page_size" if "page_size" in known else "block_size"] = page  # transformers 5.17 calls pages blocks
    if "auto_switch_to_flash" in known:
        named["auto_switch_to_flash"] = False
    return ContinuousBatchingConfig(
        **named,
        num_blocks=_pages(model, sizes, page),
        max_batch_tokens=sizes.tokens,
        max_requests_per_batch=rows,
        use_cuda_graph=asked.graphs,
        # Fewer, coarser sizes than a server has: each graph runs some ten times here.
        q_padding_interval_size=min(rows, 128) if asked.graphs else 0,
        kv_padding_interval_size=8192 if asked.graphs else 0,
        # Where weights change between runs, pages of an earlier one must not be found by later ones.
        allow_block_sharing=not asked.samplings or hasattr(PagedAttentionCache, "reset"),
        use_async_batching=False,
        return_logprobs=asked.logprobs,
    )


def _pages(model: Any, sizes: Sizes, page: int) -> int:
    """Pages for as many rows as are under way together, within the bounds of memory.

    Raises:
        NoRoom: not even the longest row fits.
    """
    if model.device.type != "cuda":
        return sizes.pages
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize * page
    room = room_for_keys(model.device) // size
    if room < sizes.longest:
        raise NoRoom(f"the keys and values of one row would take more than {_MEMORY:.0%} of the free memory")
    return min(sizes.pages, room)


def room_for_keys(device: torch.device) -> int:
    """Bytes of a GPU that keys and values may take: half of what is free."""
    free = torch.cuda.mem_get_info(device)[0]
    return int(_MEMORY * (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)))
