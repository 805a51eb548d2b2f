"""Heads of models for a task: classes, spans, scores.

When such a model is made from a language model its head is new: drawn at random, and on no disk. An adapter would be
useless without it, so it is trained in full. transformers marks the parameters that came from a checkpoint, which tells
what is new. PEFT trains `classifier`, `score` and `qa_outputs` in full for its task types, wherever they came from.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from theodora.adapters.targets import find_modules_to_save
from theodora.config import AdapterConfig
from theodora.errors import ConfigError, bullet_list
from theodora.files.peft_options import PEFTS_HEADS
from theodora.paths import matches

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def task_type(model: nn.Module, adapted: list[str]) -> str | None:
    """PEFT's name for what a model is for; None where it has none, or would wrap what has a low-rank update here.

    Args:
        model: any.
        adapted: paths of the modules that have low-rank updates.
    """
    task = _head_task(model)
    if task is not None:
        wrapped = PEFTS_HEADS[task]
        return None if any(part in wrapped for path in adapted for part in path.split(".")) else task
    if not hasattr(model, "prepare_inputs_for_generation"):
        return None
    config: Any = getattr(model, "config", None)
    return "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else "CAUSAL_LM"


def with_heads(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """The same configuration, which trains a model's heads in full.

    Raises:
        ConfigError: new modules are named as targets of low rank, or left out by name: their base would be lost.
    """
    heads, new = head_paths(model), _new_modules(model)
    wanted = list(dict.fromkeys([*heads, *new]))
    covered = set(find_modules_to_save(model, config.modules_to_save))
    wanted = [path for path in wanted if not any(_within(path, above) for above in covered)]
    by_name = [path for path in wanted if config.targets != "all-linear" and _reaches(model, config, path)]
    left_out = [path for path in wanted if config.exclude and matches(config.exclude, path, config.expressions)]
    if lost := [path for path in (*by_name, *left_out) if path in new]:
        raise ConfigError(
            "These modules are new, drawn at random when the model was made for its task, and on no disk, so that an "
            "adapter would be lost without them. Leave them out of targets and exclude: they are trained in full then."
            + bullet_list(lost)
        )
    added = [path for path in wanted if path not in (*by_name, *left_out)]
    return replace(config, modules_to_save=(*config.modules_to_save, *added)) if added else config


def _head_task(model: nn.Module) -> str | None:
    names = [parent.__name__ for parent in type(model).__mro__]
    return next((task for end, task in _TASKS.items() if any(name.endswith(end) for name in names)), None)


def head_paths(model: nn.Module) -> list[str]:
    """Paths of the modules around the backbone of a model for a task of PEFT's."""
    return [] if _head_task(model) is None else _around_backbone(model)


def _around_backbone(model: nn.Module) -> list[str]:
    """Paths of a model's children with parameters of their own, but for its backbone and its embeddings' ends."""
    backbone: Any = getattr(model, "base_model", model)
    if backbone is model:
        return []
    theirs = {id(parameter) for parameter in backbone.parameters()}
    head: Any = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [
        name
        for name, child in model.named_children()
        if child is not backbone
        and child is not head
        and not any(child is inner for inner in backbone.modules())
        and any(id(parameter) not in theirs for parameter in child.parameters())
    ]


def _new_modules(model: nn.Module) -> list[str]:
    """Paths of modules whose weights came from no checkpoint, although most of the model's did.

    Around the backbone any new module is a head. Within it only linear layers of a model for a task count (BERT's
    pooler), not embeddings, which have new rows after a change of the tokenizer.
    """
    marked = {name: getattr(parameter, "_is_hf_initialized", False) for name, parameter in model.named_parameters()}
    if not isinstance(model, PreTrainedModel) or 2 * sum(marked.values()) < len(marked):
        return []
    around = _around_backbone(model)
    new = [name.rpartition(".")[0] for name, known in marked.items() if not known]
    heads = [path for path in around if any(_within(module, path) for module in new)]
    if _head_task(model) is None:
        return heads
    inner = [path for path in new if isinstance(model.get_submodule(path), nn.Linear)]
    return heads + [path for path in dict.fromkeys(inner) if not any(_within(path, head) for head in around)]


def _within(path: str, above: str) -> bool:
    return path == above or path.startswith(above + ".")


def _reaches(model: nn.Module, config: AdapterConfig, path: str) -> bool:
    """Whether the targets, names or an expression, match a module or what stands within it."""
    inside = (f"{path}.{name}" if name else path for name, _ in model.get_submodule(path).named_modules())
    return any(matches(config.targets, inner, config.expressions) for inner in inside)
