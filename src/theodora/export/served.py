"""The "served" form: an adapter with g = m / ‖W + s·B·A‖ in place of m, so that an engine computes no norm.

    served_adapter.json           form, method, base model, the scale s of each module
    served_adapter.safetensors    <path>.lora_A (R, I), <path>.lora_B (O, R), <path>.dora_scale (O,) float32

g looks like a magnitude and is none: a loader that takes one for the other gets every layer wrong, in silence. So files
and keys have names that are not PEFT's, which no loader of PEFT's files accepts; `load_served` reads them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from theodora.adapters import load_adapter
from theodora.config import AdapterConfig, is_number
from theodora.errors import CheckpointError, UsageError, bullet_list, shown
from theodora.files.adapter import AdapterFile
from theodora.files.base_model import BaseCheckpoint
from theodora.files.distrust import read_object
from theodora.files.folder import OpenFile
from theodora.files.names import CONFIG_NAME, KEY_PREFIX, WEIGHTS_NAME
from theodora.files.peft_config import peft_config
from theodora.files.read_back import save_tensors, write_json
from theodora.files.safetensors import read_safetensors
from theodora.functional import dora_norm, dora_scale
from theodora.layers import base_weight
from theodora.locks import temporary_folder
from theodora.merging.plan import changed_copies_on_disk, weight_on_disk

FORM = "theodora.served.v1"
SERVED_CONFIG, SERVED_WEIGHTS = "served_adapter.json", "served_adapter.safetensors"


def is_served(folder: str | Path) -> bool:
    """Whether a folder holds an adapter in served form."""
    return (Path(folder) / SERVED_CONFIG).is_file()


def check_served(file: AdapterFile, base: BaseCheckpoint) -> None:
    """Check that an adapter has a served form.

    Raises:
        UsageError: it has modules trained in full, or on embeddings, or brings other base weights.
    """
    problems = [f"{key}: trained in full" for key in file.full]
    problems += [f"{path}: rows of single tokens" for path in file.token_rows]
    problems += [f"{key}: a base weight that the adapter changes" for key in changed_copies_on_disk(base, file)]
    problems += [f"{path}: experts" for path, tensors in file.modules.items() if tensors.a.dim() == 3]
    problems += [f"{path}: an embedding" for path, tensors in file.modules.items() if tensors.embedding]
    if problems:
        raise UsageError("The served form holds linear layers only; merge instead:" + bullet_list(problems, 20))


def write_served(file: AdapterFile, base: BaseCheckpoint, folder: Path, base_name: str) -> None:
    """Write an adapter in served form.

    Raises:
        UsageError: it has modules trained in full, or on embeddings, or brings other base weights.
    """
    check_served(file, base)
    tensors: dict[str, Tensor] = {}
    for path, t in file.modules.items():
        tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"] = t.a.contiguous(), t.b.contiguous()
        if t.magnitude is not None:
            w_OI = weight_on_disk(base, path)
            if w_OI is None:
                raise CheckpointError(f"{path}: the base {base.folder} does not store its weight as one tensor")
            norm = dora_norm(w_OI.double(), t.a.double(), t.b.double(), t.scale)
            tensors[f"{path}.dora_scale"] = dora_scale(t.magnitude.double(), norm).float()
    base.close()
    fields = {
        "form": FORM,
        "method": file.config.method,
        "base_model": base_name,
        "scales": {path: t.scale for path, t in file.modules.items()},
        "note": "dora_scale is g = m / norm of (W + s·B·A), not the magnitude m.",
    }
    save_tensors(tensors, folder / SERVED_WEIGHTS, {"format": "pt", "form": FORM})
    write_json(folder / SERVED_CONFIG, fields)


def read_served(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a folder in served form.

    Raises:
        CheckpointError: the files are missing, damaged, or of another form.
    """
    folder = Path(folder)
    try:
        fields = read_object(folder / SERVED_CONFIG)
        with OpenFile.at(folder / SERVED_WEIGHTS) as file:
            tensors, _ = read_safetensors(file)
    except (OSError, ValueError, RuntimeError, CheckpointError) as error:
        raise CheckpointError(f"{folder} holds no whole adapter in served form: {error}") from error
    scales = fields.get("scales")
    if fields.get("form") != FORM or not isinstance(scales, dict):
        raise CheckpointError(f"{folder / SERVED_CONFIG} is not of the form {FORM}")
    if odd := [path for path, scale in scales.items() if not is_number(scale) or scale <= 0]:
        raise CheckpointError(f"{folder / SERVED_CONFIG}: the scale of {odd[0]} is {shown(scales[odd[0]])}")
    if fields.get("method") not in ("lora", "dora") or not scales:
        raise CheckpointError(f"{folder / SERVED_CONFIG} is no LoRA or DoRA with a scale for each module")
    parts = ["lora_A", "lora_B", *(["dora_scale"] if fields.get("method") == "dora" else [])]
    wanted = {f"{path}.{part}" for path in fields["scales"] for part in parts}
    if wanted != set(tensors):
        odd = sorted(wanted ^ set(tensors))[:8]
        raise CheckpointError(f"{folder / SERVED_WEIGHTS} and {SERVED_CONFIG} disagree:" + bullet_list(odd))
    for name, tensor in tensors.items():
        if tensor.ndim != (1 if name.endswith(".dora_scale") else 2) or not tensor.numel():
            raise CheckpointError(f"{folder / SERVED_WEIGHTS}: {name} has shape {tuple(tensor.shape)}")
    return fields, tensors


def load_served(model: PreTrainedModel, folder: str | Path) -> None:
    """Put an adapter in served form on its base model; m = g · ‖W + s·B·A‖ of the weights at hand.

    Raises:
        CheckpointError: the folder is damaged, or the model another one.
    """
    fields, served = read_served(folder)
    modules = dict(model.named_modules())
    tensors: dict[str, Tensor] = {}
    for path, scale in fields["scales"].items():
        if path not in modules:
            raise CheckpointError(f"{path}: no such module in this model")
        a, b = served[f"{path}.lora_A"], served[f"{path}.lora_B"]
        tensors[f"{KEY_PREFIX}{path}.lora_A.weight"] = a
        tensors[f"{KEY_PREFIX}{path}.lora_B.weight"] = b
        if fields["method"] == "dora":
            w_OI = base_weight(modules[path]).dense()
            if w_OI.shape != (b.shape[0], a.shape[1]):
                raise CheckpointError(f"{path}: made for {(b.shape[0], a.shape[1])}, here it is {tuple(w_OI.shape)}")
            norm = dora_norm(w_OI.double(), a.double(), b.double(), scale)
            magnitude = served[f"{path}.dora_scale"].double() * norm
            tensors[f"{KEY_PREFIX}{path}.lora_magnitude_vector"] = magnitude.float()
    ranks = {path: served[f"{path}.lora_A"].shape[0] for path in fields["scales"]}
    config = AdapterConfig(
        method=fields["method"],
        rank=max(ranks.values()),
        alpha=float(max(ranks.values())),
        targets=tuple(ranks),
        rank_pattern=ranks,
        alpha_pattern={path: scale * ranks[path] for path, scale in fields["scales"].items()},
    )
    load_tensors(model, config, tensors)


def load_tensors(model: PreTrainedModel, config: AdapterConfig, tensors: dict[str, Tensor]) -> None:
    """Load tensors under PEFT's keys through the checks that any adapter folder passes."""
    fields = peft_config(
        config,
        target_modules=list(config.targets),
        modules_to_save=[],
        base_model=None,
        task_type=None,
        fan_in_fan_out=False,
    )
    with temporary_folder("served") as folder:
        write_json(folder / CONFIG_NAME, fields)
        save_tensors({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS_NAME)
        with torch.no_grad():
            load_adapter(model, folder)
