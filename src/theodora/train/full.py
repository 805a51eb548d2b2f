"""Full fine-tuning as a run: what is trained where there is no adapter, and the plain model folder that it leaves.

Weights are trained as float32, also where products run in bfloat16 (under autocast): a step of 2e-5 on a weight of 0.1
is a tenth of what bfloat16 tells apart there, so pure bfloat16 would lose most steps. Checkpoints hold these weights;
the result is rounded once, to the dtype that the base is stored in, as every engine expects it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from theodora.adapters.quantized import quantization_of
from theodora.adapters.state import find_state, trained_tensors
from theodora.errors import CheckpointError, ConfigError, bullet_list, in_line
from theodora.files.finite import not_finite
from theodora.files.read_back import check_model
from theodora.patches import replaced
from theodora.paths import layer_kinds
from theodora.train.text_only import weights_without_gradient


def tensors_of_run(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> every tensor that a run trains: the adapter's, or, where there is none, the weights themselves."""
    if find_state(model) is not None:
        return trained_tensors(model)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def train_all(model: PreTrainedModel) -> list[str]:
    """Let all weights be trained, but those that text gives no gradient (a vision tower); what there is to say.

    Raises:
        ConfigError: the weights are of few bits, or not as wide as training wants them.
    """
    if (stored := quantization_of(model)) is not None:
        raise ConfigError(
            f"The model is quantised ({stored.name}), and method full trains the weights themselves, which in few bits "
            "cannot take small steps. Name the model of plain weights, or train an adapter (method dora or lora)."
        )
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    resting = weights_without_gradient(model)
    for name in resting:
        model.get_parameter(name).requires_grad_(False)
    return [f"text gives no gradient to {_kinds(resting)}: frozen"] if resting else []


def _kinds(names: list[str]) -> str:
    return in_line(list(dict.fromkeys(layer_kinds(names).values())), 8)


def stored_dtype(config: PreTrainedConfig | None) -> torch.dtype | None:
    """What a model's configuration says that its weights are stored in; None where it says nothing."""
    said: Any = None if config is None else getattr(config, "dtype", None) or config.get_text_config().dtype
    found = getattr(torch, said, None) if isinstance(said, str) else said
    return found if isinstance(found, torch.dtype) else None


def save_model(model: PreTrainedModel, folder: Path, base: PreTrainedConfig | None) -> None:
    """Write the model as a plain folder, its trained weights rounded to the base's dtype, and read it back.

    Args:
        model: whose weights are trained.
        folder: which is there, and is only the writer's.
        base: configuration of the model as training found it; without it the weights are written as they are.

    Raises:
        CheckpointError: a weight is not finite, also once it is rounded; or a file does not hold what was written.
    """
    # (Trainers turn the cache off, which is none of the model's own settings.)
    cached = {} if base is None or not hasattr(base, "use_cache") else {"use_cache": base.use_cache}
    with rounded(model, stored_dtype(base)), replaced(model.config, **cached):
        if bad := not_finite(model.named_parameters()):
            raise CheckpointError(
                f"The model holds NaN or infinite values in {model.dtype} and was not saved:" + bullet_list(bad[:12])
            )
        model.save_pretrained(folder)
        check_model(folder, model.state_dict())


@contextmanager
def rounded(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Within the block the weights that are trained are as they will be saved; afterwards as they were."""
    wide = {p: p.data for p in model.parameters() if dtype is not None and p.requires_grad and p.dtype != dtype}
    try:
        for parameter, data in wide.items():
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in wide.items():
            parameter.data = data
