"""llama.cpp's view of a transformers model: its tensor names, the order of its rows, and the sizes in its header.

The names come from the package `gguf`. Families differ in more: llama's q and k have the halves of each head woven
together (another convention of rotary embeddings), Gemma's norms are stored with 1 added, GPT-2's Conv1D weights are
transposed.

Shapes: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from theodora.errors import CheckpointError


@dataclass(frozen=True)
class Family:
    """How models of one transformers family are written."""

    architecture: str
    """llama.cpp's name of it."""
    woven: bool = False
    """Whether q and k rows are permuted."""
    norm_shift: float = 0.0
    """Added to the weights of the norms."""


# transformers' model_type -> family
FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", woven=True),
    "mistral": Family("llama", woven=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", norm_shift=1.0),
    "phi3": Family("phi3"),
    "gpt2": Family("gpt2"),
}


@dataclass(frozen=True)
class Names:
    """Translates parameter names and tensors of one model."""

    family: Family
    heads: int
    kv_heads: int
    _map: Any
    """gguf's TensorNameMap."""

    def of(self, parameter: str) -> str | None:
        """llama.cpp's name of a parameter (`blk.0.attn_q.weight`), or None if it has none."""
        module, _, suffix = parameter.rpartition(".")
        name = self._map.get_name(module)
        return None if name is None else f"{name}.{suffix}"

    def rows(self, name: str, tensor_O: Tensor) -> Tensor:
        """The tensor (O, …) with its rows in llama.cpp's order."""
        heads = self._woven_heads(name)
        return tensor_O if heads is None else _swap(tensor_O, heads, 2, tensor_O.shape[0] // heads // 2)

    def rows_back(self, name: str, tensor_O: Tensor) -> Tensor:
        """The inverse of `rows`."""
        heads = self._woven_heads(name)
        return tensor_O if heads is None else _swap(tensor_O, heads, tensor_O.shape[0] // heads // 2, 2)

    def _woven_heads(self, name: str) -> int | None:
        if not self.family.woven:
            return None
        return self.heads if ".attn_q." in name else self.kv_heads if ".attn_k." in name else None


def _swap(tensor_O: Tensor, heads: int, first: int, second: int) -> Tensor:
    rest = tensor_O.shape[1:]
    return tensor_O.reshape(heads, first, second, *rest).transpose(1, 2).reshape(tensor_O.shape)


def names_of(config: Any) -> Names:
    """The names for a transformers configuration.

    Raises:
        CheckpointError: a family that is not known here.
    """
    import gguf

    family = FAMILIES.get(config.model_type)
    if family is None:
        raise CheckpointError(
            f"GGUF files of {config.model_type} models are not written here; known are {', '.join(FAMILIES)}. Export "
            "--to hf, and convert that with llama.cpp's convert_hf_to_gguf.py, or name its folder with --llama-cpp."
        )
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    heads = config.num_attention_heads
    return Names(
        family,
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        gguf.get_tensor_name_map(architecture, config.num_hidden_layers),
    )


def write_sizes(writer: Any, config: Any) -> None:
    """Put the model's sizes and constants into the header of a `gguf.GGUFWriter`.

    Raises:
        CheckpointError: the model uses what is not written here.
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = dict(getattr(config, "rope_parameters", None) or {})
    rotated = round(head_dim * rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1.0))
    writer.add_rope_dimension_count(rotated)
    writer.add_rope_freq_base(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind not in ("default", "llama3"):
        raise CheckpointError(
            f"This model scales its positions by {kind!r}, which is not written to GGUF here. Export --to hf, and "
            "convert that with llama.cpp's convert_hf_to_gguf.py, or name its folder with --llama-cpp."
        )
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_sliding_window(config.sliding_window or config.max_position_embeddings)


def llama3_factors(config: Any) -> list[float] | None:
    """What each rotary frequency is divided by under Llama 3's scaling, or None without it."""
    import math

    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type") != "llama3":
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    base, factor = rope.get("rope_theta", 10000.0), rope.get("factor", 8.0)
    low, high = rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
    context = rope.get("original_max_position_embeddings", 8192)
    factors = []
    for at in range(0, head_dim, 2):
        wavelength = 2 * math.pi * base ** (at / head_dim)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors
