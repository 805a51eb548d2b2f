"""Keys of saved tensors without the names that wrappers leave in them.

torch.compile, FSDP and activation checkpointing wrap a module in one with a name of their own, DDP and DeepSpeed the
whole model in one called `module`. PEFT's state dict (not its files) holds the adapter's name in each key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from theodora.errors import CheckpointError, bullet_list, shown
from theodora.files.names import KEY_PREFIX

# Names of wrapping modules, which no module of a model has.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_fpw_module")
# lora_A.NAME.weight, lora_embedding_A.NAME, lora_magnitude_vector.NAME.weight
_NAMED = re.compile(
    r"^(?P<before>.*\.(?:lora_[AB]|lora_magnitude_vector|lora_embedding_[AB]))\.(?P<name>[^.]+)(?P<after>|\.weight|\.bias)$"
)


def plain_keys(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """The tensors under the keys that PEFT writes into its files.

    Args:
        tensors: key → tensor, as in a file.
        where: the file; for messages.

    Raises:
        CheckpointError: the file holds several adapters, or a tensor twice.
    """
    keys = {key: _without_wrappers(key) for key in tensors}
    names = {match["name"] for key in keys.values() if (match := _named(key)) is not None}
    if len(names) > 1:
        raise CheckpointError(
            f"{where} holds several adapters ({', '.join(map(shown, sorted(names)))}); expected one. Save each by "
            "itself: PEFT's save_pretrained does, into folders of their own."
        )
    name = next(iter(names), "default")
    keys = {key: _without_name(plain, name) for key, plain in keys.items()}
    plain = list(keys.values())
    if len(set(plain)) < len(plain):
        twice = sorted(key for key, plain_key in keys.items() if plain.count(plain_key) > 1)[:4]
        raise CheckpointError(f"{where} holds a tensor twice, once inside of a wrapper's name:" + bullet_list(twice))
    return {keys[key]: tensor for key, tensor in tensors.items()}


def _without_wrappers(key: str) -> str:
    if not any(wrapper in key for wrapper in _WRAPPERS) and not key.startswith("module."):
        return key
    plain = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    return plain.removeprefix("module.") if plain.startswith(f"module.{KEY_PREFIX}") else plain


def _named(key: str) -> re.Match[str] | None:
    """The parts of a key that holds an adapter's name; `weight` and `bias` are no names."""
    match = _NAMED.match(key)
    return None if match is None or match["name"] in ("weight", "bias") else match


def _without_name(key: str, name: str) -> str:
    key = key.replace(f".modules_to_save.{name}.", ".")
    match = _NAMED.match(key)
    if match is None:
        return key
    before, after = match["before"], match["after"]
    if before.endswith("lora_magnitude_vector"):
        return before
    return key if match["name"] in ("weight", "bias") else before + after
