"""Many prompts answered together by a live model, through the batches that serve: no server, no thread, no copy.

    tokens = answer_together(model, prompts, GenerationConfig(max_new_tokens=64, eos_token_id=[2], …), settled=judge)

The model runs as it is, with the adapter that is active in it (adapters in slots are for servers, whose requests differ
in them). The caller's thread drives transformers' loop, so that its context (no gradients, autocast, a signal) holds
for every batch, and what fails fails there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from theodora import kernels
from theodora.adapters.conditions import structure
from theodora.layers.libraries import why_not_captured
from theodora.layers.norm_cache import Held, looked_at_once
from theodora.serve.offline_manager import (
    MOST_ROWS,
    Asked,
    Manager,
    NoRoom,
    Sizes,
    Unfit,
    as_when_answering,
    paged_attention,
)
from theodora.serve.requests import Sampling
from theodora.serve.trial import Trial, heads_differ
from theodora.serve.tried import Way, how
from theodora.serve.window import window_of_model

log = logging.getLogger("theodora.serve")

DEVICES = {"cuda"}
"""Where answering together is faster than `generate`. On a CPU, which has nothing to launch, attention over the pages
of all rows costs more than the padding that it saves."""


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
    rows: int = MOST_ROWS,
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
    answers = _answers(runnable(model), Asked(prompts, settings, settled, over), rows)
    return [tokens for tokens, _ in answers]


def draw_together(
    model: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    samplings: Sequence[Sampling],
    *,
    over: Callable[[], object] = lambda: None,
    rows: int = MOST_ROWS,
    kept: Kept | None = None,
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
        kept: what earlier calls have left, and this one leaves for later ones. Nothing is left if not given.

    Returns:
        Of each prompt the tokens, and the logarithm of their softmax at the temperature, before any filter or penalty.

    Raises:
        Unfit: as there.
    """
    asked = Asked(prompts, settings, None, over, logprobs=True, samplings=samplings)
    return _answers(runnable(model), asked, rows, kept)


def _answers(base: Any, asked: Asked, rows: int, kept: Kept | None = None) -> list[tuple[list[int], list[float]]]:
    _WAY.try_out(base)
    try:
        if records(base):
            try:
                _run(base, replace(asked, graphs=True), rows, kept)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # something in it waits for the device, say
                log.info("batches are not recorded in CUDA graphs: %s", error)
                _NOT_RECORDED.add(base)
        _run(base, asked, rows, kept)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise NoRoom(f"memory does not do: {error}") from error
    except RuntimeError as error:
        raise _WAY.failed(base, error) from error
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


def _answer_trial(model: Any, trial: Trial) -> list[tuple[list[int], list[float]]]:
    settings = GenerationConfig(do_sample=False, max_new_tokens=trial.count, eos_token_id=[-1])
    asked = Asked(trial.prompts, settings, logprobs=True)
    _run(model, asked, len(trial.prompts))
    return [asked.answers[index] for index in range(len(trial.prompts))]


_WAY = Way("tried-answering-together", "transformers' batches", _answer_trial)


def _run(model: Any, asked: Asked, rows: int, kept: Kept | None = None) -> None:
    """Answer what is not answered yet."""
    waiting = [index for index in range(len(asked.prompts)) if index not in asked.answers]
    if not waiting:
        return
    try:
        with as_when_answering(model), looked_at_once(_begun(kept, model, asked)):
            if asked.graphs:
                # What layers keep is made before, or it would lie in the graphs' memory; and made anew where graphs
                # read it already.
                ids = torch.tensor([[*asked.prompts[waiting[0]][:1]] * 2], device=model.device)
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            with paged_attention(model):
                sizes = Sizes.of(model, asked, waiting, rows)
                if kept is not None:
                    _kept_manager(kept, model, asked, sizes).run(asked, waiting)
                    return
                manager = Manager(model, asked, sizes)
                try:
                    manager.run(asked, waiting)
                finally:
                    manager.let_go()
    except BaseException:
        if kept is not None:
            kept.let_go()
        raise


def _begun(kept: Kept | None, model: Any, asked: Asked) -> Held | None:
    return None if kept is None else kept.begin(model, asked.graphs, asked.logprobs, seedless(asked.samplings))


def _kept_manager(kept: Kept, model: Any, asked: Asked, sizes: Sizes) -> Manager:
    """One that does for a run of these sizes: the one that is kept, or another."""
    before: Manager | None = kept.made
    if before is not None and before.sizes.do_for(sizes):
        return before
    larger = sizes.with_room(None if before is None else before.sizes)
    return kept.replace(lambda: Manager(model, asked, larger))


class Kept:
    """What a run leaves for the next one with the same model: keys and values, and CUDA graphs with what they read.

    Weights may be written to in between, in place. Whatever else a graph depends on is looked at, and where it is
    another one everything is made anew.
    """

    def __init__(self) -> None:
        self.made: Any = None
        """What is kept, if anything is; has `let_go()`."""
        self._held = Held()
        self._depends: object = None

    def begin(self, model: Any, *asked: object) -> Held:
        """What the graphs read that go with this model and what it is asked for; others are let go of."""
        depends = asked, _recorded(model)
        if depends != self._depends:
            self.let_go()
            self._depends = depends
        return self._held

    def replace(self, make: Callable[[], Any]) -> Any:
        """Keep what `make` gives instead of what is kept, which goes first: there may be no memory for both."""
        before, self.made = self.made, None
        if before is not None:
            before.let_go()
        self.made = make()
        return self.made

    def let_go(self) -> None:
        """Give everything back, now."""
        made, self.made, self._depends, self._held = self.made, None, None, Held()
        if made is not None:
            made.let_go()


def seedless(samplings: Sequence[Sampling] | None) -> Sampling | None:
    """What answers that are alike but for their seeds are drawn by."""
    return None if samplings is None else replace(samplings[0], seed=0)


def _recorded(model: Any) -> tuple[Any, ...]:
    """What a recorded pass depends on beside the values of its weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return how(model), kernels.fast(), structure(model), [(id(t), _address(t)) for t in tensors]


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a tensor of tensors
        return 0
