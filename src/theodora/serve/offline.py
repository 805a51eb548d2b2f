"""Many prompts answered together by a live model, through the batches that serve: no server, no thread, no copy.

    tokens = answer_together(model, prompts, GenerationConfig(max_new_tokens=64, eos_token_id=[2], …), settled=judge)

The model runs as it is, with the adapter that is active in it (adapters in slots are for servers, whose requests differ
in them). The caller's thread drives transformers' loop, so that its context (no gradients, autocast, a signal) holds
for every batch, and what fails fails there. A seam to transformers' continuous batching, as `batching.py`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter

from theodora.adapters.conditions import conditions, construction, hash_of_weights
from theodora.errors import TheodoraError
from theodora.kept import kept
from theodora.layers.libraries import why_not_captured
from theodora.layers.norm_cache import looked_at_once
from theodora.serve.capped_attention import cap_scores
from theodora.serve.paged_cache import keep_cache_finite
from theodora.serve.processors import KEY, RoutedProcessors
from theodora.serve.requests import Request, Sampling
from theodora.serve.trial import Trial, heads_differ
from theodora.serve.watch import mask_with_infinity
from theodora.serve.window import window_of_model

log = logging.getLogger("theodora.serve")

DEVICES = {"cuda"}
"""Where answering together is faster than `generate`. On a CPU, which has nothing to launch, attention over the pages
of all rows costs more than the padding that it saves."""

_MOST_ROWS = 256
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
class _Asked:
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


def worth_it(model: Any) -> bool:
    """Whether answering together is faster here than `generate`, if the model can be run so."""
    return model.device.type in DEVICES


def answer_together(
    model: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    *,
    settled: Callable[[int, list[int]], bool] | None = None,
    over: Callable[[], object] = lambda: None,
    rows: int = _MOST_ROWS,
) -> list[list[int]]:
    """The tokens that the model goes on with after each prompt, greedily: those of `generate`.

    The model is tried out first, once as it is built, as a server tries it (`trial.py`). It is left as it was: modes,
    attention and memory, also after an error or Ctrl-C.

    Args:
        model: a causal language model with whatever adapter is active in it; PEFT's, too.
        prompts: token ids of each; all of them must `fits`.
        settings: as `generate` takes them, with `max_new_tokens` and a list of `eos_token_id`. Only those of greedy
            decoding without processors of logits can be run so, what `generate` adds of the model's own included.
        settled: says of a prompt (its index) and the tokens so far whether the answer may end here.
        over: called whenever an answer is over.
        rows: answers under way at a time, at most.

    Raises:
        Unfit: the model or these prompts cannot be run so, or memory does not do; `generate` may.
    """
    answers = _answers(runnable(model), _Asked(prompts, settings, settled, over), rows)
    return [tokens for tokens, _ in answers]


def draw_together(
    model: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    samplings: Sequence[Sampling],
    *,
    over: Callable[[], object] = lambda: None,
    rows: int = _MOST_ROWS,
) -> list[tuple[list[int], list[float]]]:
    """As `answer_together`, with drawn tokens and the log-probability that each was drawn with.

    Args:
        model: as there.
        prompts: as there.
        settings: of which only `max_new_tokens` and `eos_token_id` are minded.
        samplings: how each answer's tokens are drawn: alike, but for the seeds. A token depends on its seed, its
            place and its logits, whoever else is in the batch.
        over: as there.
        rows: as there.

    Returns:
        Of each prompt the tokens, and the logarithm of their softmax at the temperature, before any filter or penalty.

    Raises:
        Unfit: as there.
    """
    return _answers(runnable(model), _Asked(prompts, settings, None, over, logprobs=True, samplings=samplings), rows)


def _answers(base: Any, asked: _Asked, rows: int) -> list[tuple[list[int], list[float]]]:
    _tried(base)
    try:
        if records(base):
            try:
                _run(base, replace(asked, graphs=True), rows)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # something in it waits for the device, say
                log.info("batches are not recorded in CUDA graphs: %s", error)
                _NOT_RECORDED.add(base)
        _run(base, asked, rows)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise NoRoom(f"memory does not do: {error}") from error
    except RuntimeError as error:
        _VERDICTS[base] = _how(base), str(error)
        raise Unfit(f"transformers' batches failed: {error}") from error
    return [asked.answers[index] for index in range(len(asked.prompts))]


_NOT_RECORDED: WeakSet[Any] = WeakSet()
"""Models whose passes cannot be recorded in CUDA graphs."""


def records(model: Any) -> bool:
    """Whether steps are recorded in CUDA graphs."""
    return model.device.type == "cuda" and model not in _NOT_RECORDED and why_not_captured(model) is None


def fits(model: Any, prompt: Sequence[int], max_new_tokens: int) -> bool:
    """Whether prompt and answer are within what the model takes in a batch, whatever else is in it."""
    window = window_of_model(model)
    return len(prompt) > 0 and (window is None or len(prompt) + max_new_tokens <= window)


def runnable(model: Any) -> Any:
    """The model itself, out of PEFT's wrapper.

    Raises:
        Unfit: its `generate` is not transformers' usual one, or the model is spread over several devices.
    """
    base = model
    if not isinstance(base, PreTrainedModel) and hasattr(model, "get_base_model"):
        # A PEFT model's own `generate` does more where prompts are learned, or an adapter waits for certain tokens.
        settings = getattr(model, "active_peft_config", None)
        if getattr(settings, "is_prompt_learning", True) or getattr(settings, "alora_invocation_tokens", None):
            raise Unfit("its adapter changes prompts")
        base = model.get_base_model()
    plain = isinstance(base, PreTrainedModel) and type(base).generate is GenerationMixin.generate  # pyright: ignore
    if not plain or "generate" in vars(model) or "generate" in vars(base):
        raise Unfit("it has a way of its own to generate")
    places = {str(place) for place in (getattr(base, "hf_device_map", None) or {}).values()}
    first = next(base.parameters())
    sharded = getattr(base, "_device_mesh", None) is not None or hasattr(first, "device_mesh") or first.numel() == 0
    if len(places) > 1 or sharded:
        raise Unfit("it is spread over several devices")
    if getattr(base.config, "is_encoder_decoder", False):
        raise Unfit("it has an encoder")
    if not base._can_set_attn_implementation():  # pyright: ignore[reportPrivateUsage]
        raise Unfit("its attention is not one that others can be put in the place of")
    text: Any = base.config.get_text_config()
    if heads_differ(text):
        raise Unfit("its layers have heads of different sizes")
    return base


_VERDICTS: WeakKeyDictionary[Any, tuple[tuple[Any, ...], str | None]] = WeakKeyDictionary()
"""Model -> how it was tried, and why it is unfit."""


def _tried(model: Any) -> None:
    """Try the model out, unless it has been.

    Raises:
        Unfit: it fails, or says something else together than alone.
    """
    how = _how(model)
    known = _VERDICTS.get(model)
    if known is None or known[0] != how:
        known = _VERDICTS[model] = (how, _verdict(model))
    if known[1] is not None:
        raise Unfit(known[1])


def _how(model: Any) -> tuple[Any, ...]:
    kind = model.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return model.dtype, model.device, cast, model.config._attn_implementation, construction(model)


def _verdict(model: Any) -> str | None:
    """`_why_unfit`; that nothing speaks against a model is kept for the next start with the very same one."""
    # What is stored in a byte is no part of its hash.
    plain = all(p.is_floating_point() and p.element_size() > 1 and not p.is_meta for p in model.parameters())
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        known = conditions(model, hash_of_weights(model)) if plain else None
        if known is None:
            return _why_unfit(model)
        return kept("tried-answering-together", known, lambda: _why_unfit(model), lambda why: why is None)


def _why_unfit(model: Any) -> str | None:
    window = window_of_model(model)
    if window is not None and window < 2:
        return "its window is too short to try it out"
    try:
        with _as_when_answering(model):
            trial = Trial.of(model, window or 1 << 30)
        if not trial.finite:
            return "its output is not finite"
        settings = GenerationConfig(do_sample=False, max_new_tokens=trial.count, eos_token_id=[-1])
        asked = _Asked(trial.prompts, settings, logprobs=True)
        _run(model, asked, len(trial.prompts))
        answers = [asked.answers[index] for index in range(len(trial.prompts))]
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise NoRoom(f"memory does not do: {error}") from error
    except Unfit:  # because of its settings, which may change
        raise
    except Exception as error:  # whatever a layer raises that knows no pages
        return f"transformers' batches do not take it ({error})"
    if not (distance := trial.distance(answers)) <= trial.bound:
        return f"log-probabilities are off by {distance:.2g} in transformers' batches"
    return None


def _run(model: Any, asked: _Asked, rows: int) -> None:
    """Answer what is not answered yet."""
    waiting = [index for index in range(len(asked.prompts)) if index not in asked.answers]
    if not waiting:
        return
    with _as_when_answering(model), looked_at_once():
        if asked.graphs:
            # What layers keep is made before, or it would lie in the graphs' memory.
            ids = torch.tensor([[*asked.prompts[waiting[0]][:1]] * 2], device=model.device)
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        with _paged_attention(model):
            manager = _Manager(model, asked, waiting, rows)
            try:
                manager.run()
            finally:
                manager.let_go()


@contextmanager
def _as_when_answering(model: Any) -> Iterator[None]:
    """In evaluation mode, without gradients; afterwards every module is in the mode it was in before."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _paged_attention(model: Any) -> Iterator[None]:
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


class _Manager(ContinuousBatchingManager):
    """transformers' manager, run by whoever made it, until all answers are over."""

    def __init__(self, model: Any, asked: _Asked, waiting: list[int], rows: int) -> None:
        self._asked, self._waiting = asked, waiting
        self._hook: Any = None
        self._made: Any = None
        super().__init__(model, _greedy(model, asked), _batching(model, asked, waiting, rows))
        self.output_router = _Router(self._take)
        self._processors = RoutedProcessors(asked.samplings[0]) if asked.samplings else None
        if self._processors is not None:
            self.logit_processor = self._processors
        helper: Any = self.distributed_helper
        helper.set_tp_seed = lambda *_: None  # it would seed torch's generators, and nothing is drawn here

    def run(self) -> None:
        """Answer everything."""
        self.batch_processor = processor = self._create_batch_processor()
        self.current_batch = 0
        for index in sorted(self._waiting, key=lambda i: -len(self._asked.prompts[i])):
            self.add_request(
                list(self._asked.prompts[index]),
                request_id=str(index),
                max_new_tokens=self._asked.most,
                streaming=self._asked.settled is not None,
                eos_token_id=self._asked.settings.eos_token_id,
                **self._request(index),
            )
        while not self._asked.answers.keys() >= set(self._waiting):
            self._generation_loop_body(processor, False)

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
        self._made = processor = super()._create_batch_processor()
        watch = keep_cache_finite(processor.cache)  # or one row's NaN would be in every row's attention

        cache: Any = processor.cache

        def before(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if kwargs.get("cache") is cache:
                watch.begin(kwargs["cu_seq_lens_q"], kwargs["input_ids"].shape[1])
                mask_with_infinity(kwargs.get("attention_mask"))

        self._hook = self.model.register_forward_pre_hook(before, with_kwargs=True)
        runner: Any = processor.model_runner
        ios: Any = processor.inputs_and_outputs
        if ios.compute_stream is not None:
            ios.compute_stream = _compute_stream(ios.compute_stream.device)
        choose, stream, processors = runner._get_forward_fn, ios.compute_stream, self._processors
        if processors is not None:
            processors.watch, processors.current_io = watch, lambda: ios
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
        """Give back what the batches took, now: pages, graphs, the hook."""
        if self._hook is not None:
            self._hook.remove()
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


def _greedy(model: Any, asked: _Asked) -> GenerationConfig:
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


def _batching(model: Any, asked: _Asked, waiting: list[int], rows: int) -> ContinuousBatchingConfig:
    rows = min(rows, len(waiting))
    page = _FLASH_PAGE if "flash" in model.config._attn_implementation else _PAGE
    named: dict[str, Any] = {}
    known: Any = ContinuousBatchingConfig.__dataclass_fields__
    named["page_size" if "page_size" in known else "block_size"] = page  # transformers 5.17 calls pages blocks
    if "auto_switch_to_flash" in known:
        named["auto_switch_to_flash"] = False
    lengths = [len(asked.prompts[index]) for index in waiting]
    return ContinuousBatchingConfig(
        **named,
        num_blocks=_pages(model, [-(-(length + asked.most) // page) for length in lengths], page, rows),
        max_batch_tokens=max(rows, min(_MOST_TOKENS, sum(lengths))),
        max_requests_per_batch=rows,
        use_cuda_graph=asked.graphs,
        # Fewer, coarser sizes than a server has: each graph runs some ten times here.
        q_padding_interval_size=min(rows, 128) if asked.graphs else 0,
        kv_padding_interval_size=8192 if asked.graphs else 0,
        use_async_batching=False,
        return_logprobs=asked.logprobs,
    )


def _pages(model: Any, needs: list[int], page: int, rows: int) -> int:
    """Pages for as many rows as are under way together, within the bounds of time and memory.

    Raises:
        Unfit: not even the longest row fits into memory.
    """
    longest = max(needs)
    wanted = max(longest, min(sum(sorted(needs)[-rows:]), _MOST_PAGED // page))
    if model.device.type != "cuda":
        return wanted
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize * page
    free = torch.cuda.mem_get_info(model.device)[0]
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    room = int(_MEMORY * free) // size
    if room < longest:
        raise NoRoom(f"the keys and values of one row would take more than {_MEMORY:.0%} of the free memory")
    return min(wanted, room)
