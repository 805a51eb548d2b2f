"""What is changed about transformers' cache of keys and values: each adapter has prefixes of its own, all is finite.

A seam to transformers' continuous batching, as `batching.py`, which lists them all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from theodora.serve.processors import request_of
from theodora.serve.requests import Request
from theodora.serve.watch import Watch

# Prefixes of different adapters are made different by bits above all token ids: bits of the adapter's serial number,
# spread over the first four tokens (a page has at least that many).
_TOKEN_BITS, _SALT_BITS, _SALTED = 20, 11, 4


def keep_cache_finite(cache: Any) -> Watch:
    """Let nothing into the cache that is not finite; what says of which tokens something was not."""
    cache.watch = watch = Watch(cache.max_batch_tokens, torch.device(cache.device))
    update = cache.update
    wants_arguments = "kwargs" in inspect.signature(update).parameters

    def update_finite(key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if wants_arguments and len(args) < 2:
            # transformers 5.24 gives models the cache of pages as their own (`cache`, which was `past_key_values`), and
            # GPT-NeoX's attention does not hand on its arguments, in which the places of the pages are. They are
            # changed in place, so that it has to be the very dict.
            kwargs.setdefault("kwargs", _arguments_of(inspect.currentframe()))
            if "max_length_k" not in (kwargs["kwargs"] or {}):
                raise TypeError("its attention is not told where the pages of a paged attention cache are")
        # Under autocast they are of its dtype, or one of them is.
        key_states, value_states = key_states.to(cache.dtype), value_states.to(cache.dtype)
        return update(*watch.keep_finite(key_states, value_states), *args, **kwargs)

    cache.update = update_finite
    for pages in (*getattr(cache, "key_cache", ()), *getattr(cache, "value_cache", ())):
        pages.zero_()  # 5.17 takes memory as it is
    return watch


def _arguments_of(frame: FrameType | None) -> Any:
    """`kwargs` of a function's caller, if it has some."""
    caller = None if frame is None else frame.f_back
    return None if caller is None else caller.f_locals.get("kwargs")


def with_finite_keys(attend: Callable[..., Any]) -> Callable[..., Any]:
    """The same for 5.17's flash attention in steps of one token each, which writes to the cache past `cache.update`."""

    def attend_finite(module: Any, q: Tensor, k: Tensor, v: Tensor, cache: Any, *args: Any, **kwargs: Any) -> Any:
        watch: Watch | None = getattr(cache, "watch", None)
        k, v = (k, v) if watch is None else watch.keep_finite(k, v)
        return attend(module, q, k, v, cache, *args, **kwargs)

    return attend_finite


with suppress(ImportError, AttributeError):  # later versions have no such function
    flash_paged: Any = import_module("transformers.integrations.flash_paged")
    flash_paged._paged_decode_forward = with_finite_keys(flash_paged._paged_decode_forward)


def separate_prefixes(cache: Any) -> None:
    """Make the cache see each adapter's prefixes as tokens of their own; `cache.asks` is the request that looks."""
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
