"""mlx-lm's adapters, read as PEFT's: the other names, the transposed factors, and which names are embeddings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from theodora.config import is_int, is_number
from theodora.errors import CheckpointError, bullet_list, shown
from theodora.files.names import KEY_PREFIX
from theodora.synonyms import bare_name

# Where paths in transformers' model and in mlx-lm's differ: (transformers', mlx-lm's). The first match counts, and
# each pair is read both ways.
_NAMES = (
    (r"transformer\.(h\.\d+\.(?:attn|mlp)\.c_\w+|wte|wpe)", r"model\.(h\.\d+\.(?:attn|mlp)\.c_\w+|wte|wpe)"),
    (r"gpt_neox\.layers\.(\d+\.(?:attention|mlp)\.\w+)", r"model\.h\.(\d+\.(?:attention|mlp)\.\w+)"),
    (r"gpt_neox\.(embed_in)", r"model\.(embed_in)"),
)
# Types of models (config.json's) whose language model mlx-lm keeps within another, and what then stands before
# the names of its modules. (On reading it is of no account: see synonyms.py.)
_WRAPPED = """gemma3 gemma4 gemma4_unified kimi_k25 kimi_vl lfm2-vl lfm2_vl llama4 llava minimax_m3_vl mistral3
    muse_spark pixtral qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe"""
_WITHIN = {**dict.fromkeys(_WRAPPED.split(), "language_model.model"), "gemma3n": "model.language_model"}
_EMBEDDINGS = ("embed_tokens", "wte", "wpe", "embed_in", "word_embeddings", "tok_embeddings")
_PARTS = ("lora_a", "lora_b", "m")
_MISSES_TOLD = 20


def peft_from_mlx(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same adapter as PEFT would have written it: fields of its configuration, and tensors under its keys.

    Raises:
        CheckpointError: with everything in the files that MLX would not have written, or that means another thing here.
    """
    problems: list[str] = []
    kind, values = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind not in ("lora", "dora"):
        problems.append(f"fine_tune_type is {shown(kind)}; expected 'lora' or 'dora'")
    values = values if isinstance(values, dict) else {}
    rank, scale = values.get("rank"), values.get("scale")
    if not isinstance(rank, int) or not is_int(rank) or rank < 1:
        problems.append(f"lora_parameters: rank is {shown(rank)}; expected a whole number of at least 1")
    if not is_number(scale) or scale <= 0:
        problems.append(f"lora_parameters: scale is {shown(scale)}; expected a positive number")
    translated: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, _, part = key.rpartition(".")
        if part not in _PARTS:
            problems.append(f"{key}: unknown key; expected it to end with {', '.join(_PARTS)}")
        elif tensor.ndim != (1 if part == "m" else 2):
            problems.append(f"{key}: shape {tuple(tensor.shape)}, as of experts, which are not supported")
        elif part == "m" and _is_embedding(module):
            problems.append(f"{key}: MLX gives each token of an embedding a magnitude, DoRA here each output feature")
        else:
            name = "lora_magnitude_vector" if part == "m" else _peft_part(module, part)
            peft_key = f"{KEY_PREFIX}{from_mlx_name(module)}.{name}"
            if peft_key in translated:
                problems.append(f"{key}: the file holds this module under two names")
            translated[peft_key] = tensor if part == "m" else tensor.T.contiguous()
    if problems:
        raise CheckpointError(f"The MLX adapter in {folder} cannot be used:" + bullet_list(problems, _MISSES_TOLD))
    assert isinstance(rank, int)
    assert isinstance(scale, int | float)
    paths = sorted({from_mlx_name(key.rpartition(".")[0]) for key in tensors})
    model = config.get("model")
    fields = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": values.get("dropout", 0.0),
        "target_modules": paths,
        "use_dora": kind == "dora",
        "base_model_name_or_path": model if isinstance(model, str) else None,
    }
    return fields, translated


def to_mlx_name(path: str, model_type: str = "") -> str:
    """A module's path in mlx-lm's model.

    Args:
        path: in transformers' model, of the text-only or the full class.
        model_type: of the model's folder (config.json); mlx-lm wraps the language model of some.
    """
    if within := _WITHIN.get(model_type):
        bare = bare_name(path)
        # The head is a child of what wraps, not of the layers' model.
        return f"{within.removesuffix('.model')}.{bare}" if bare == "lm_head" else f"{within}.{bare}"
    for ours, theirs in _NAMES:
        if match := re.fullmatch(ours, path):
            return theirs[: theirs.index("(")].replace("\\", "") + match[1]
    return path


def from_mlx_name(path: str) -> str:
    """A module's path in transformers' model."""
    for ours, theirs in _NAMES:
        if match := re.fullmatch(theirs, path):
            return ours[: ours.index("(")].replace("\\", "") + match[1]
    return path


def _is_embedding(path: str) -> bool:
    return path.rpartition(".")[2] in _EMBEDDINGS


def _peft_part(path: str, part: str) -> str:
    letter = part[-1].upper()
    return f"lora_embedding_{letter}" if _is_embedding(path) else f"lora_{letter}.weight"
