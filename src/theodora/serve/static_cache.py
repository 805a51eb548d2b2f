"""Keys and values of a fixed size that all rows of a batch write to at the same place, and what reads and masks them.

The buffers of `static_batches.py`, which says what they are for. Shapes: N rows, T new tokens, W places of keys and
values, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache
from transformers.cache_utils import DynamicLayer, StaticLayer, get_layer_types_and_kwargs

from theodora.serve.offline_manager import Unfit
from theodora.serve.requests import Sampling
from theodora.synonyms import cache_argument

_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Asked:
    """What steps depend on."""

    sampling: Sampling
    ends: tuple[int, ...]
    most: int
    """New tokens of an answer."""


@dataclass(frozen=True)
class Masks:
    """The masks that a model's layers want."""

    window: int | None
    """Places that a query of a sliding layer sees, its own included; None without such layers."""
    mixed: bool
    """Whether other layers see everything."""

    @classmethod
    def of(cls, model: Any) -> Masks:
        """Those of a model.

        Raises:
            Unfit: it has other layers, or an attention that takes no such masks, or finds positions itself.
        """
        attention = model.config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise Unfit(f"{attention} attention takes no mask for padded keys and values")
        if "position_ids" not in inspect.signature(type(model).forward).parameters:
            raise Unfit("it finds positions itself")
        text = model.config.get_text_config()
        try:
            types = set(get_layer_types_and_kwargs(text)[0])
            window = text.sliding_window if _SLIDING in types else None
        except Exception as error:  # of configurations that differ by layer, say
            raise Unfit(f"what its layers see is not known ({error})") from error
        if others := types - {_FULL, _SLIDING}:
            raise Unfit(f"it has layers of {', '.join(sorted(others))}")
        return cls(window, len(types) > 1)

    def given(self, mask_N11W: Tensor, last: Tensor) -> Any:
        """What the model takes, the query standing at the `last` place; the mask is what is added to scores."""
        if self.window is None:
            return mask_N11W
        near_W = torch.arange(mask_N11W.shape[-1], device=last.device) > last - self.window
        sliding = mask_N11W.masked_fill(~near_W, torch.finfo(mask_N11W.dtype).min)
        return {_FULL: mask_N11W, _SLIDING: sliding} if self.mixed else sliding


@dataclass(frozen=True)
class Run:
    """A model and how it is run."""

    model: Any
    masks: Masks
    asked: Asked
    graphs: bool

    def read(self, prompts: Sequence[Sequence[int]]) -> Read:
        """Read prompts, in one pass."""
        device = self.model.device
        width = max(2, *map(len, prompts))  # a pass over one token would take what layers keep to be up to date
        rows = [torch.tensor([0] * (width - len(prompts[0])) + list(prompts[0])), *map(torch.tensor, prompts[1:])]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ids = pad_sequence(rows, batch_first=True, padding_side="left").to(device)
        seen = (torch.arange(width) >= width - lengths[:, None]).to(device)
        given: dict[str, Any] = {"attention_mask": seen.long(), "position_ids": (seen.cumsum(-1) - 1).clamp_min(0)}
        if "logits_to_keep" in inspect.signature(type(self.model).forward).parameters:
            # (As a slice it would be a view with gaps, which torch multiplies by a frozen weight row by row.)
            given["logits_to_keep"] = torch.tensor([width - 1], device=device)
        given[cache_argument(self.model)] = cache = Cache(layer_class_to_replicate=_AsRead)
        logits = self.model(input_ids=ids, use_cache=True, **given).logits[:, -1].float()
        layers = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
        for each in (tensor for layer in layers for tensor in layer):
            if not isinstance(each, Tensor) or each.dim() != 4 or each.shape[0::2] != ids.shape:
                raise Unfit("its layers keep something else than the keys and values of each token")
        if not layers:
            raise Unfit("its layers keep no keys and values")
        return Read(logits, layers, seen)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Read:
    """What a pass over prompts of up to L tokens, padded on their left, leaves."""

    logits_NV: Tensor
    """After the last token; float32."""
    layers: list[tuple[Tensor, Tensor]]
    """Keys and values of each layer, (N, heads, L, width of a head)."""
    seen_NL: Tensor
    """Whether a place is a token."""


class _AsRead(DynamicLayer):
    """Keys and values of one layer in one pass, in the dtypes that they come in (under autocast those may differ)."""

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class _Layer(StaticLayer):
    """Keys and values of one layer, to which all rows add at the same place."""

    keys: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]
    values: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, keys: Tensor, values: Tensor, at: Tensor) -> None:
        super().__init__(keys.shape[2])
        self.keys, self.values, self._at = keys, values, at
        self.is_initialized = True

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self._at, key_states)
        self.values.index_copy_(2, self._at, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        return self._at


class Batch:
    """As many rows as there are places for: keys and values, what steps read and write, and the graphs of steps."""

    def __init__(self, asked: Asked, like: Read, rows: int, width: int) -> None:
        """Take memory.

        Args:
            asked: what steps depend on.
            like: of any prompt.
            rows: under way at a time, at most.
            width: places of keys and values of each row: those of the longest prompt, and of `asked.most` tokens.
        """
        device, most = like.logits_NV.device, asked.most
        self.rows, self.width, self.wanted = rows, width, rows
        self.begin = width - most
        """Place of the first new token: prompts end before it."""
        make = partial(torch.zeros, device=device)
        self.layers = [
            tuple(make(rows, t.shape[1], width, t.shape[3], dtype=t.dtype) for t in layer) for layer in like.layers
        ]
        self.mask_N11W = make(rows, 1, 1, width, dtype=like.layers[0][1].dtype)
        self.at, self.step = make(1, dtype=torch.long), make(1, dtype=torch.long)
        self.token_N1, self.position_N1 = make(rows, 1, dtype=torch.long), make(rows, 1, dtype=torch.long)
        self.chance_NT = make(rows, most, dtype=torch.int32)
        self.drawn_NT, self.logprob_NT = make(rows, most, dtype=torch.long), make(rows, most)
        self.over_N = make(rows, dtype=torch.bool)
        self.seen_NV: Tensor | None = None
        """Which tokens there were, where that matters."""
        if asked.sampling.repetition_penalty != 1:
            self.seen_NV = make(rows, like.logits_NV.shape[1], dtype=torch.bool)
        self.ends_E = torch.tensor(asked.ends, device=device)
        self.caches: dict[int, Cache] = {}
        self.graphs: dict[int, Any] = {}
        """By rows."""
        self.pool: Any = None

    def of_rows(self) -> Iterator[Tensor]:
        """Everything that has a row for each row."""
        yield from (tensor for layer in self.layers for tensor in layer)
        yield from (self.mask_N11W, self.token_N1, self.position_N1, self.chance_NT)
        yield from (self.drawn_NT, self.logprob_NT, self.over_N)
        if self.seen_NV is not None:
            yield self.seen_NV

    def cache(self, rows: int) -> Cache:
        """Keys and values of the first rows, as a model takes them."""
        if rows not in self.caches:
            layers: Any = [_Layer(keys[:rows], values[:rows], self.at) for keys, values in self.layers]
            self.caches[rows] = Cache(layers=layers)
        return self.caches[rows]

    def let_go(self) -> None:
        """Give memory back, now."""
        if self.at.is_cuda:
            torch.cuda.current_stream(self.at.device).synchronize()
        vars(self).clear()


def added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores so that only these places are seen."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
