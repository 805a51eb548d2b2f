"""`adapter_config.json` as PEFT writes it: what it says of an adapter, in our words and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from theodora.config import AdapterConfig, is_int
from theodora.errors import CheckpointError, ConfigError, bullet_list, shown
from theodora.files.distrust import expanded, read_object
from theodora.files.experts import parameters_problems
from theodora.files.names import CONFIG_NAME
from theodora.files.peft_options import option_problems, task_of

SCORES_TEXTS = (
    "is an adapter that scores texts (task_type SEQ_CLS), as a reward model does, and continues none. theodora "
    "evaluate scores pairs with it; theodora train --objective grpo --reward FOLDER learns from its scores; theodora "
    "merge makes a whole model of it, which transformers' AutoModelForSequenceClassification loads."
)


def peft_config(
    config: AdapterConfig,
    *,
    target_modules: list[str],
    modules_to_save: list[str],
    target_parameters: list[str] | None = None,
    token_indices: Mapping[str, list[int]] | None = None,
    base_model: str | None,
    task_type: str | None,
    fan_in_fan_out: bool,
    inference_mode: bool = True,
    bias: str = "none",
) -> dict[str, Any]:
    """`adapter_config.json` as PEFT reads it.

    After a PiSSA or OLoRA start the file holds rank 2R, and alpha grows with it so that the scale stays.
    """
    ranks, alphas = dict(config.rank_pattern), dict(config.alpha_pattern)
    rank, alpha = config.rank, config.alpha
    if starts_from_weight(config):
        grow = math.sqrt(2) if config.rslora else 2
        rank, ranks = 2 * rank, {key: 2 * value for key, value in ranks.items()}
        alpha, alphas = grow * (alpha or 0), {key: grow * value for key, value in alphas.items()}
    return {
        "alpha_pattern": alphas,
        "base_model_name_or_path": base_model,
        "bias": bias,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": inference_mode,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": modules_to_save or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": ranks,
        "target_modules": target_modules,
        **({"target_parameters": target_parameters} if target_parameters else {}),
        "task_type": task_type,
        "trainable_token_indices": token_indices,
        "use_dora": config.method == "dora",
        "use_rslora": config.rslora,
    }


def starts_from_weight(config: AdapterConfig) -> bool:
    """Whether adapters of this configuration carry start factors."""
    return config.init in ("pissa", "olora")


def read_peft_config(folder: str | Path) -> dict[str, Any]:
    """`adapter_config.json` as it stands; a CheckpointError if it cannot be read or names its base by no text."""
    path = Path(folder) / CONFIG_NAME
    fields = read_object(path)
    if "fine_tune_type" in fields and "peft_type" not in fields:  # MLX's
        fields = {**fields, "base_model_name_or_path": fields.get("model")}
    return checked_base(fields, path)


def scores_texts(adapter: str | Path) -> bool:
    """Whether it is the folder of an adapter whose model scores texts."""
    folder = expanded(adapter)
    return (folder / CONFIG_NAME).is_file() and task_of(read_peft_config(folder)) == "SEQ_CLS"


def check_continues_text(adapter: str | Path) -> None:
    """Refuse an adapter whose model scores texts, where one is to continue them.

    Args:
        adapter: its folder; what is none on this machine is not looked at.

    Raises:
        CheckpointError: saying what takes it, or that its configuration cannot be read.
    """
    if scores_texts(adapter):
        raise CheckpointError(f"{adapter} {SCORES_TEXTS}")


def checked_base(fields: dict[str, Any], path: Path) -> dict[str, Any]:
    """`fields`; a CheckpointError if they name their base by no text."""
    base = fields.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise CheckpointError(f"{path}: base_model_name_or_path is {shown(base)}; expected a folder or hub name")
    return fields


def config_from_peft(peft: Mapping[str, Any], path: Path, for_model: bool) -> AdapterConfig:
    """The configuration in our words; a CheckpointError with all that stands against it. For `for_model` see
    `read_adapter`."""
    problems: list[str] = []
    if peft.get("peft_type") != "LORA":
        problems.append(f"peft_type is {shown(peft.get('peft_type'))}; expected 'LORA' (which DoRA belongs to)")
    for name in ("use_dora", "use_rslora"):
        if not isinstance(peft.get(name), bool | None):
            problems.append(f"{name} is {shown(peft[name])}; expected true or false")
    problems += option_problems(peft, for_model) + parameters_problems(peft)
    if not all(is_int(layer) for layer in layers_named(peft) or ()):
        problems.append(f"layers_to_transform is {shown(peft['layers_to_transform'])}; expected numbers of layers")
    if not problems:
        try:
            return AdapterConfig(
                method="dora" if peft.get("use_dora") else "lora",
                rank=peft.get("r", 8),
                alpha=peft.get("lora_alpha", 8),
                rslora=bool(peft.get("use_rslora")),
                dropout=peft.get("lora_dropout") or 0.0,
                **_targets(peft),
                exclude=_names(peft.get("exclude_modules")),
                rank_pattern=peft.get("rank_pattern") or {},
                alpha_pattern=peft.get("alpha_pattern") or {},
                trainable_token_indices=peft.get("trainable_token_indices") or (),
                modules_to_save=_names(peft.get("modules_to_save")) or (),  # pyright: ignore[reportArgumentType]
            )
        except (ConfigError, TypeError, AttributeError) as error:
            problems.append(str(error))
    raise CheckpointError(f"{path} cannot be used:" + bullet_list(problems))


def _targets(peft: Mapping[str, Any]) -> dict[str, Any]:
    """What is adapted: PEFT names modules and parameters of experts apart."""
    modules, parameters = _names(peft.get("target_modules")), peft.get("target_parameters")
    if not parameters:
        return {"targets": modules or "all-linear", "experts": False}
    if isinstance(modules, str) and modules:
        return {"targets": modules, "experts": True}
    return {"targets": (*modules, *_names(parameters)), "experts": True}


def layers_named(peft: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """The numbers of the layers that PEFT was told to adapt; None for all."""
    layers = peft.get("layers_to_transform")
    return None if layers is None else tuple(layers) if isinstance(layers, list) else (layers,)


def _names(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value or ())
