"""The options of grpo: fields of TRL's GRPOConfig, by its names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from typing import Any

from theodora.coerce import coerce
from theodora.config import TrainConfig
from theodora.errors import ConfigError, shown
from theodora.train.grpo_loss import LOSSES, PolicySettings
from theodora.train.rollouts import Drawing
from theodora.train.vllm_rollouts import ByVllm

_DRAWING = tuple(field.name for field in fields(Drawing))
_VLLM = "vllm_"
_OF_VLLM: dict[str, Any] = {
    "vllm_mode": str,
    "vllm_model_impl": str,
    "vllm_gpu_memory_utilization": float,
    "vllm_max_model_length": int | None,
    "vllm_tensor_parallel_size": int,
    "vllm_enable_sleep_mode": bool,
}
TYPES: dict[str, Any] = {
    "num_generations": int,
    "num_generations_eval": int,
    "max_completion_length": int,
    "num_iterations": int,
    "steps_per_generation": int | None,
    "generation_batch_size": int | None,
    "top_k": int,
    "min_p": float | None,
    "epsilon_high": float | None,
    "delta": float | None,
    "loss_type": str,
    "importance_sampling_level": str,
    "scale_rewards": str,
    "multi_objective_aggregation": str,
    "mask_truncated_completions": bool,
    "use_bias_correction_kl": bool,
    "disable_dropout": bool,
    "use_vllm": bool,
    **_OF_VLLM,
    **dict.fromkeys((*(name for name in _DRAWING if name not in ("top_k", "min_p")), "beta", "epsilon"), float),
}
"""Option -> what it holds."""
NAMES = tuple(TYPES)
_WORDS = {
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}
# Why fields of TRL's have no effect here; of the others nothing is said but that.
WHY = {
    **dict.fromkeys(
        ("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port"),
        "vLLM draws in the same process (vllm_mode: colocate)",
    ),
    "vllm_structured_outputs_regex": "reward format:REGEX asks for a form",
    **dict.fromkeys(
        (f"vllm_importance_sampling_{name}" for name in ("correction", "mode", "clip_max", "clip_min", "cap")),
        "ρ is a ratio of log-probabilities that training computes, and by how much vLLM's differ is recorded "
        "(sampling/sampling_logp_difference/mean)",
    ),
    "use_transformers_continuous_batching": "it is used where it is faster",
    "use_transformers_paged": "it is used where it is faster",
    "sync_ref_model": "the reference is frozen: it is the model without its adapter, or with the one it started from",
    "generation_kwargs": "tokens are drawn by temperature, top_p, top_k, min_p and repetition_penalty",
    "chat_template_kwargs": "prompts are what evaluate and chat make of them",
    "log_completions": "the report has samples from before and after",
    "reward_weights": "it stands beside reward",
}
# Values of SFTConfig's fields that would part the completions of a prompt.
_ORDERS: dict[str, tuple[Any, ...]] = {
    "shuffle_dataset": (True, "true"),
    "train_sampling_strategy": ("group_by_length",),
    "dataloader_drop_last": (True, "true"),
}
# Fields that TRL has on by default: who says so wants them.
_ON = ("vllm_importance_sampling_correction",)
_ORDER = "prompts in another order in each epoch; train_sampling_strategy: sequential takes that of the data"


@cache
def own_names() -> frozenset[str]:
    """Fields that GRPOConfig has and SFTConfig has not."""
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.sft_config import SFTConfig

    ours = {field.name for field in fields(SFTConfig)}
    return frozenset({field.name for field in fields(GRPOConfig)} - ours | {*NAMES})


def grpo_settings(config: TrainConfig) -> tuple[PolicySettings, list[str]]:
    """What grpo computes, and what about its options makes no sense."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in config.trainer.items():
        if name in TYPES:
            try:
                values[name] = coerce(_as_word(name, value), TYPES[name])
            except ValueError as error:
                problems.append(f"{name} is {shown(value)}; expected {error}")
        elif name in _ORDERS and value in _ORDERS[name]:
            problems.append(f"{name} is {shown(value)}: the completions of a prompt stay together ({_ORDER})")
        elif name in own_names() and (value not in (None, False, _default(name)) or (name in _ON and value)):
            problems.append(f"{name} has no effect here" + (f": {WHY[name]}" if name in WHY else ""))
        elif name == "accelerator_config" and isinstance(value, dict) and value.get("dispatch_batches"):
            problems.append("accelerator_config holds dispatch_batches; expected none: each process reads its prompts")
    if not problems:
        problems = list(_problems(values))
    if problems:
        return PolicySettings(), problems
    drawing = {name: values.pop(name) for name in _DRAWING if name in values}
    by_vllm = _by_vllm(config, values)
    try:
        return PolicySettings(drawing=Drawing(**drawing), vllm=by_vllm, **values), []
    except ConfigError as error:
        return PolicySettings(), [str(error)]


def _by_vllm(config: TrainConfig, values: dict[str, Any]) -> ByVllm | None:
    """How vLLM draws, if it does; its options are taken out of the others."""
    given = {name.removeprefix(_VLLM): values.pop(name) for name in _OF_VLLM if name in values}
    if not values.pop("use_vllm", False):
        return None
    settings = {name: value for name, value in given.items() if name in {field.name for field in fields(ByVllm)}}
    return ByVllm(model=config.model, revision=config.revision, trust_remote_code=config.trust_remote_code, **settings)


def _problems_of_vllm(values: dict[str, Any]) -> Iterator[str]:
    given = {name: values[name] for name in _OF_VLLM if name in values}
    if not values.get("use_vllm"):
        for name, value in given.items():
            if value != _default(name):
                yield f"{name} is {shown(value)}, and vLLM does not draw here; expected use_vllm: true beside it"
        return
    if given.get("vllm_mode", "colocate") != "colocate":
        yield (
            f"vllm_mode is {shown(given['vllm_mode'])}; expected colocate: a server is another process, which would "
            "need whole weights in each step"
        )
    if (parts := given.get("vllm_tensor_parallel_size", 1)) != 1:
        yield f"vllm_tensor_parallel_size is {parts}; expected 1: one process trains and draws"
    if given.get("vllm_model_impl", "vllm") != "vllm":
        yield f"vllm_model_impl is {shown(given['vllm_model_impl'])}; expected vllm, whose layers the plug-in knows"
    if not 0 < (share := given.get("vllm_gpu_memory_utilization", 0.3)) < 1:
        yield f"vllm_gpu_memory_utilization is {share}; expected more than 0, less than 1"
    length, most = given.get("vllm_max_model_length"), values.get("max_completion_length", 256)
    if length is not None and length <= most:
        yield f"vllm_max_model_length is {length}; expected more than max_completion_length ({most})"


def _default(name: str) -> Any:
    from trl.trainer.grpo_config import GRPOConfig

    return next(field.default for field in fields(GRPOConfig) if field.name == name)


def _as_word(name: str, value: Any) -> Any:
    """TRL's other values for two fields: a list of one loss, and true or false for how rewards are scaled."""
    if name == "scale_rewards" and isinstance(value, bool):
        return "group" if value else "none"
    return value[0] if name == "loss_type" and isinstance(value, list) and len(value) == 1 else value


def _problems(values: dict[str, Any]) -> Iterator[str]:
    if values.get("num_generations", 8) < 2:
        yield f"num_generations is {values['num_generations']}; expected at least 2: completions are compared"
    least_of = {"num_generations_eval": 1, "max_completion_length": 1, "num_iterations": 1, "beta": 0, "epsilon": 0}
    of_drawing = ("steps_per_generation", "generation_batch_size")
    for name, least in {**least_of, **dict.fromkeys(of_drawing, 1)}.items():
        if values.get(name) is not None and not values[name] >= least:
            yield f"{name} is {values[name]}; expected at least {least}"
    if all(values.get(name) is not None for name in of_drawing):
        given = " and ".join(str(values[name]) for name in of_drawing)
        yield f"{' and '.join(of_drawing)} are {given}; expected one of the two"
    for name, words in _WORDS.items():
        if name in values and values[name] not in words:
            yield f"{name} is {shown(values[name])}; expected one of {', '.join(words)}"
    loss, high, delta = values.get("loss_type", "dapo"), values.get("epsilon_high"), values.get("delta")
    if loss == "bnpo":
        yield "loss_type is bnpo, whose mean is over a batch; expected dapo, the same over a step"
    elif loss not in LOSSES:
        yield f"loss_type is {shown(loss)}; expected one of {', '.join(LOSSES)}"
    if loss == "cispo" and high is None:
        yield "loss_type cispo needs epsilon_high, the most that a ratio counts (ScaleRL, 2510.13786, takes 5)"
    if high is not None and not high > 0:
        yield f"epsilon_high is {high}; expected more than 0"
    if delta is not None and not delta > 1:
        yield f"delta is {delta}; expected more than 1"
    yield from _problems_of_vllm(values)
