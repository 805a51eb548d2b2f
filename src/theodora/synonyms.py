"""One module, many names: what the text-only and the full class of the same weights, PEFT, Unsloth and mlx-lm call it.

    model.layers.0.mlp.up_proj                         the text-only class
    model.language_model.layers.0.mlp.up_proj          the vision-language class
    language_model.model.layers.0.mlp.up_proj          the same in transformers before 4.52, in vLLM, and in mlx-lm
    layers.0.mlp.up_proj                               the model without its head
    base_model.model.model.layers.0.mlp.up_proj        PEFT's wrapper around any of them

They differ in what stands before the name, in words that only wrap. Two names are one module's if they are equal
without these words, and no other module of the model has that name.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable
from typing import Any

# What stands around a language model and says nothing of the module. The last are wrappers of FSDP and torch.compile.
_WRAPPERS = frozenset(
    [
        "base_model",
        "model",
        "language_model",
        "text_model",
        "llm",
        "thinker",
        "transformer",
        "module",
        "_orig_mod",
        "_fsdp_wrapped_module",
    ]
)
_OTHER_PART = re.compile(
    r"(^|[._])(vision|visual|image|img|video|audio|speech|vit|vq\w*|mm|multi_?modal|projector|aligner|connector|"
    r"embed_vision|embed_audio|patch_merger|resampler|qformer|merger)([._]|$)"
)


def bare_name(path: str) -> str:
    """A module's or parameter's name without the words before it that only wrap: `layers.0.mlp.up_proj.weight`."""
    parts = path.split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts = parts[1:]
    return ".".join(parts)


def cache_argument(model: Any) -> str:
    """What a model's forward pass calls its keys and values: `cache` from transformers 5.24 on, which warns of the old
    name until 5.40; `past_key_values` before it, and in code that comes with a model.
    """
    return _cache_argument_of(type(model))


@functools.cache
def _cache_argument_of(kind: type) -> str:
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def of_another_part(path: str) -> bool:
    """Whether a name is that of something beside the language model: a vision or audio tower, a projector."""
    return _OTHER_PART.search(path) is not None


class Names:
    """The names of one model, found by whatever another program calls them.

    Args:
        names: of all modules, or all parameters, of the model.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = dict.fromkeys(names)
        self._bare: dict[str, list[str]] = {}
        for name in self._names:
            self._bare.setdefault(bare_name(name), []).append(name)

    def find(self, name: str) -> str | None:
        """The model's own name of what another program calls `name`; None if there is none, or more than one."""
        if name in self._names:
            return name
        candidates = self._bare.get(bare_name(name), [])
        return candidates[0] if len(candidates) == 1 else None
