"""Telling transformers what the host knows about a batch, so that it need not ask the GPU, nor build what nobody reads.

Legend: B rows, T tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel, masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from theodora.patches import Patch, Registered, replaced


class Causal(NamedTuple):
    """What a mask says: a token sees itself and those before it."""

    window: int | None
    """How many tokens, itself included; None for all."""


# What wrappers of layers, which shard or recompute them, ask of any tensor. (A property's getter is new each time.)
_PROPERTIES: tuple[Any, ...] = (Tensor.shape, Tensor.dtype, Tensor.device, Tensor.requires_grad, Tensor.is_meta)
_FUNCTIONS: tuple[Any, ...] = (torch.is_floating_point, Tensor.is_floating_point, Tensor.dim, Tensor.size)
_KNOWN_UNBUILT = {*_FUNCTIONS, *(each.__get__ for each in _PROPERTIES)}


class Unbuilt(Tensor):
    """A mask for eager attention, (B, 1, T, T), that is built when somebody uses it as the tensor that it stands for.

    Attention that goes by `says` never does. Everything else, be it a function of torch's or an attribute, meets the
    mask itself: so no layer can be left without one, whatever a model hands it on to. It is a tensor without memory,
    because models ask whether their mask is one.
    """

    says: Causal | None
    """What the mask says, if that is known."""
    _build: Callable[[], Tensor]
    _mask: Tensor | None

    @staticmethod
    def of(says: Causal | None, build: Callable[[], Tensor], asked: Mapping[str, Any]) -> Unbuilt:
        """Take what the mask says, what builds it, and what transformers asks one of its mask functions for."""
        shape = [asked["batch_size"], 1, asked["q_length"], asked["kv_length"]]
        kind = {"dtype": asked.get("dtype", torch.float32), "device": asked.get("device", "cpu")}
        mask: Any = Tensor._make_wrapper_subclass(Unbuilt, shape, **kind)  # pyright: ignore[reportAttributeAccessIssue]
        mask.says, mask._build, mask._mask = says, build, None
        return mask

    def built(self) -> Tensor:
        """The mask."""
        if self._mask is None:
            self._mask = self._build()
        return self._mask

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _KNOWN_UNBUILT:
            with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
                return function(*args, **(kwargs or {}))
        args, kwargs = tree_map(lambda x: x.built() if isinstance(x, cls) else x, (args, kwargs or {}))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls.__torch_function__(function, types, args, kwargs)  # (torch wants one of a tensor without memory)


class _Rows:
    """Whether a forward pass is under way in which every row is one sequence."""

    whole = False


def causal_of(asked: Mapping[str, Any]) -> Causal | None:
    """What the mask says for which transformers asks one of its mask functions; None if it is another kind."""
    function, window = asked.get("mask_function"), asked.get("local_size")
    if asked.get("attention_mask") is not None or not asked.get("allow_is_causal_skip"):
        return None  # padding, or a mask put on top of the causal one
    offsets = asked.get("q_offset", 0), asked.get("kv_offset", 0)
    if any(not isinstance(at, int) or at != 0 for at in offsets) or asked.get("q_length") != asked.get("kv_length"):
        return None  # a cache
    fits = function is causal_mask_function if window is None else _is_window(function, window)
    return Causal(window) if fits else None


def _is_window(function: Any, window: int) -> bool:
    """Whether token `window` sees 1 (which is in another chunk, if these are chunks), but neither 0 nor the next."""
    query, key = (torch.tensor(at, device="cpu") for at in ([window] * 4, [0, 1, window, window + 1]))
    try:
        return function(0, 0, query, key).tolist() == [False, True, True, False]
    except (RuntimeError, TypeError, IndexError):
        return False


def _leaving_unbuilt(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
    @functools.wraps(original)
    def mask(*args: Any, **asked: Any) -> Any:
        known = patch.on and _Rows.whole and not args and not torch.compiler.is_compiling()
        says = causal_of(asked) if known else None
        if says is None:
            return original(*args, **asked)
        return Unbuilt.of(says, functools.partial(original, **asked), asked)

    return mask


EAGER_MASKS = Patch(Registered(ALL_MASK_ATTENTION_FUNCTIONS, "eager"), _leaving_unbuilt)
"""Its users' attention goes by what a mask says. Inside `whole_rows` masks for eager attention are `Unbuilt`."""


@contextmanager
def whole_rows() -> Iterator[None]:
    """Inside the block every row of a batch is one sequence, from its first token to its last, and has no mask.

    Without an attention mask, transformers 5 looks in each forward pass whether the positions start anew within a row
    (packing), for which the host waits for the GPU. While a CUDA graph is captured, where it cannot look, it assumes
    so and builds a full mask, with which attention takes twice as long. Nothing public says "no".
    """
    no_search = {"find_packed_sequence_indices": lambda position_ids: None, "is_tracing": lambda tensor=None: False}
    with replaced(masking_utils, **no_search), replaced(_Rows, whole=True), _no_look_for_padding():
        yield


@contextmanager
def packed_rows() -> Iterator[None]:
    """Inside the block positions start anew within a row, where another sequence begins, and there is no mask.

    transformers builds the same mask as always, and does not ask the GPU whether it is needed.
    """
    search = masking_utils.find_packed_sequence_indices

    def search_unasked(position_ids: Tensor) -> Tensor | None:
        with replaced(masking_utils, is_tracing=lambda tensor=None: True):
            return search(position_ids)

    with replaced(masking_utils, find_packed_sequence_indices=search_unasked), _no_look_for_padding():
        yield


def _no_look_for_padding() -> AbstractContextManager[None]:
    """Inside the block GPT-2 does not read its first and last tokens, for a warning of padding without a mask."""
    return replaced(PreTrainedModel, warn_if_padding_and_no_attention_mask=lambda *_: None)
