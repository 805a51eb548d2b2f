"""Options of PEFT's that change what an adapter's tensors mean: which are read, and what to do about the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from theodora.errors import shown

PEFTS_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Task type → the names that PEFT adds to `modules_to_save`, whether a model has them or not."""
BIASES = ("none", "all", "lora_only")
StartFromWeight = Literal["pissa", "olora"]
STARTS_FROM_WEIGHT: tuple[StartFromWeight, ...] = ("pissa", "olora")
"""Starts that PEFT computes anew from the plain base whenever it loads such a file, with the same result."""

# Starts (`init_lora_weights`) after which PEFT leaves the base weight as it is.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")
# Options that nothing here computes → what to do about them.
_FOREIGN = {
    "alora_invocation_tokens": "",
    "arrow_config": "",
    "kasa_config": "",
    "layer_replication": ": it repeats layers of the base whenever PEFT loads it, so that only PEFT runs it",
    "monteclora_config": "",
    "use_bdlora": "",
    "use_qalora": "",
    "velora_config": "",
}
_BY_THE_MODEL = "only a model tells what it means. Load it with theodora.load_adapter, and save_adapter makes it plain"


def option_problems(peft: Mapping[str, Any], for_model: bool) -> list[str]:
    """What stands against reading an adapter with these options.

    Args:
        peft: the fields of `adapter_config.json`.
        for_model: whether the base model is at hand, so that what depends on its weights can be computed.
    """
    problems: list[str] = []
    if peft.get("bias", "none") not in BIASES:
        problems.append(f"bias is {shown(peft['bias'])}; expected one of {', '.join(BIASES)}")
    start = peft.get("init_lora_weights", True)
    if start in STARTS_FROM_WEIGHT:
        if not for_model:
            problems.append(
                f"init_lora_weights is {shown(start)}, a start from the base's own weights: {_BY_THE_MODEL}"
            )
    elif start not in _PLAIN_STARTS:
        problems.append(
            f"init_lora_weights is {shown(start)}: such a file needs the changed base it was trained on. Save it with "
            "PEFT's path_initial_model_for_weight_conversion, which makes it a plain adapter"
        )
    if peft.get("lora_bias") and not for_model:
        problems.append(f"lora_bias is set, which adds to biases of the base: {_BY_THE_MODEL}")
    problems += [f"{name} is set, which is not supported{what}" for name, what in _FOREIGN.items() if peft.get(name)]
    return problems


def start_of(peft: Mapping[str, Any]) -> StartFromWeight | None:
    """The start that A and B of a file are relative to, if it is computed from the base's weights."""
    start = peft.get("init_lora_weights")
    return next((known for known in STARTS_FROM_WEIGHT if known == start), None)


def task_of(peft: Mapping[str, Any]) -> str | None:
    """What the model is for."""
    task = peft.get("task_type")
    return task if isinstance(task, str) and task.isprintable() and len(task) < 50 else None


def biases_trained(peft: Mapping[str, Any] | None) -> bool:
    """Whether a file holds biases of the base that were trained in full."""
    return (peft or {}).get("bias", "none") != "none"


def added_by_peft(peft: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The names of modules to save that PEFT wrote by itself, for the task."""
    task = (peft or {}).get("task_type")
    return PEFTS_HEADS.get(task, ()) if isinstance(task, str) else ()
