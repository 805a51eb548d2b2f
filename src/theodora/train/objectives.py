"""The options of objectives other than sft: TRL's own names for them, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from theodora.coerce import coerce
from theodora.config import TrainConfig
from theodora.data.examples import Kind
from theodora.errors import ConfigError, bullet_list, shown
from theodora.files.peft_options import PEFTS_HEADS
from theodora.train import grpo_options
from theodora.train.grpo_loss import PolicySettings
from theodora.train.preference_loss import PAIR_LOSSES, Settings
from theodora.train.reward_loss import ScoreSettings

_KINDS: dict[str, Kind] = {"sft": "answers", "kto": "judged", "reward": "ranked", "grpo": "prompts"}
_REFERENCE = ("precompute_ref_log_probs", "precompute_ref_batch_size")
# Objective -> the fields of its configuration in TRL (DPOConfig, KTOConfig, CPOConfig, ORPOConfig) that are used here.
_OWN: dict[str, tuple[str, ...]] = {
    "dpo": (
        *("beta", "loss_type", "loss_weights", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef"),
        *("discopop_tau", "disable_dropout", *_REFERENCE),
    ),
    "ipo": ("beta", "disable_dropout", *_REFERENCE),
    "kto": ("beta", "loss_type", "desirable_weight", "undesirable_weight", "disable_dropout", *_REFERENCE),
    "orpo": ("beta", "disable_dropout"),
    "simpo": ("beta", "simpo_gamma", "cpo_alpha", "label_smoothing", "disable_dropout"),
    "reward": ("center_rewards_coefficient", "disable_dropout"),
    "grpo": grpo_options.NAMES,
}
_TYPES: dict[str, Any] = {
    "loss_type": list[str],
    "loss_weights": list[float],
    "f_divergence_type": str,
    "disable_dropout": bool,
    "precompute_ref_log_probs": bool,
    "precompute_ref_batch_size": int,
}
# Where the paper's value is not TRL's: SimPO's β weighs means over tokens, and it has no loss of the better answer.
_DEFAULTS: dict[str, dict[str, Any]] = {"simpo": {"beta": 2.0}}
# Fields of TRL's that cannot do here what their name says, and why.
_REFUSED = {
    "ld_alpha": "tokens of an answer count alike here",
    "use_weighting": "pairs count alike here",
    "alpha": "rewards are log-likelihoods here (AlphaPO is not built)",
    "sync_ref_model": "the reference is frozen: it is the model without its adapter, or with the one it started from",
    "ref_model_mixup_alpha": "the reference is frozen",
    "ref_model_sync_steps": "the reference is frozen",
    "max_completion_length": "max_length is of prompt and answer together",
    "generate_during_eval": "the report has samples from before and after",
    "is_encoder_decoder": "models here are causal",
    "padding_value": "the tokenizer has one",
}
# Fields of SFTConfig and transformers that mean nothing for them, or something else than they say.
_OF_SFT = {
    "neftune_noise_alpha": "answers that are compared would be given noise",
    "label_smoothing_factor": "label_smoothing is that of pairs",
    "padding_free": "rows are made one row by themselves where that pays",
    "dft": "it belongs to sft",
    "eval_packing": "each answer is needed by itself",
    "completion_only_loss": "answers alone are learned",
    "assistant_only_loss": "answers alone are learned",
}
_PAIRED = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
"""Losses that are made of the difference of two scores, in which what a divergence adds to both cancels."""
_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def kind_of(objective: str) -> Kind:
    """What the rows of an objective are."""
    return _KINDS.get(objective, "pairs")


def completion_length(config: TrainConfig) -> int:
    """The most tokens of a completion that grpo draws; 0 for other objectives.

    Raises:
        ConfigError: no prompt fits beside it into `max_length`.
    """
    settings = settings_of(config)
    if not isinstance(settings, PolicySettings):
        return 0
    length = settings.max_completion_length
    if length >= config.max_length:
        raise ConfigError(
            f"max_completion_length is {length}, and max_length, of prompt and completion together, is "
            f"{config.max_length}; expected less than max_length"
        )
    return length


def own_names(objective: str) -> frozenset[str]:
    """Options that the objective's configuration has in TRL, used here or refused."""
    if objective == "grpo":
        return grpo_options.own_names() | {"loss_type"}
    return frozenset() if objective == "sft" else frozenset((*_OWN.get(objective, ()), *_REFUSED, "loss_type"))


def own_types(objective: str) -> dict[str, Any]:
    """The options that the objective has beside those of every run, and what each holds."""
    if objective == "grpo":
        return dict(grpo_options.TYPES)
    return {name: _TYPES.get(name, float) for name in _OWN.get(objective, ())}


def refused_names() -> dict[str, str]:
    """Fields of TRL's that have no effect with any objective of ours, and why."""
    return {**_REFUSED, **grpo_options.WHY}


def kept_plain(config: TrainConfig) -> tuple[str, ...]:
    """Modules of a language model that are trained in full: those of the adapter, without a reward model's head."""
    heads = PEFTS_HEADS["SEQ_CLS"] if config.objective == "reward" else ()
    return tuple(path for path in config.adapter.modules_to_save if path.rpartition(".")[2] not in heads)


def whose(name: str) -> str | None:
    """What to say of an option that other objectives have."""
    objectives = [objective for objective, names in _OWN.items() if name in names]
    return f"it belongs to --objective {', '.join(objectives)}" if objectives else None


def settings_of(config: TrainConfig) -> Settings | PolicySettings | ScoreSettings | None:
    """What the objective computes; None for sft.

    Raises:
        ConfigError: naming every option that makes no sense for it.
    """
    objective = config.objective
    if objective == "sft":
        return None
    values: dict[str, Any] = dict(_DEFAULTS.get(objective, {}))
    problems: list[str] = []
    for name, value in config.trainer.items():
        if name in _OF_SFT and value:
            problems.append(f"{name} is {shown(value)}, and the objective is {objective}: {_OF_SFT[name]}")
        if name == "router_aux_loss_coef" and value and objective == "reward":
            problems.append(f"router_aux_loss_coef is {shown(value)}: a reward model's loss goes by its scores alone")
        if name == "truncation_mode" and value != "keep_start":
            problems.append(f"truncation_mode is {shown(value)}; expected keep_start: rows are cut at their end")
        if name not in own_names(objective) or objective == "grpo":
            continue
        if name in _OWN[objective]:
            try:
                values[name] = coerce([value] if _is_word(name, value) else value, _TYPES.get(name, float))
            except ValueError as error:
                problems.append(f"{name} is {shown(value)}; expected {error}")
        elif name == "loss_type":
            problems.append(f"loss_type is {shown(value)}, and the objective {objective} is a loss of its own")
        elif value:
            problems.append(f"{name} has no effect here: {_REFUSED[name]}")
    of_policy = None
    if objective == "grpo":
        of_policy, wrong = grpo_options.grpo_settings(config)
        problems += wrong
    elif not problems:
        problems = list(_problems(objective, values))
    if problems:
        raise ConfigError("The options make no sense:" + bullet_list(problems))
    if objective == "reward":
        return ScoreSettings(**{name: value for name, value in values.items() if value is not None})
    return of_policy or _settings(objective, values)


def _is_word(name: str, value: Any) -> bool:
    return name in ("loss_type", "loss_weights") and isinstance(value, str | float | int)


def _problems(objective: str, values: dict[str, Any]) -> Iterator[str]:
    for name, least in {"beta": 0.0, "discopop_tau": 0.0, "desirable_weight": 0.0, "undesirable_weight": 0.0}.items():
        if name in values and not values[name] > least:
            yield f"{name} is {values[name]}; expected more than {least:g}"
    for name in ("cpo_alpha", "simpo_gamma", "center_rewards_coefficient"):
        if name in values and not values[name] >= 0:
            yield f"{name} is {values[name]}; expected at least 0"
    if not 0 <= values.get("label_smoothing", 0.0) < 0.5:
        yield f"label_smoothing is {values['label_smoothing']}; expected at least 0 and below 0.5"
    size = values.get("precompute_ref_batch_size")
    if size is not None and size < 1:
        yield f"precompute_ref_batch_size is {size}; expected at least 1"
    names = values.get("loss_type", [])
    known = ("kto", "apo_zero_unpaired") if objective == "kto" else tuple(PAIR_LOSSES)
    for name in names:
        if name not in known:
            why = " (it sets the pairs of a batch against each other)" if name.startswith("aot") else ""
            yield f"loss_type holds {shown(name)}; expected some of {', '.join(known)}{why}"
    if objective == "kto" and len(names) > 1:
        yield f"loss_type is {', '.join(names)}; expected one"
    weights = values.get("loss_weights")
    if weights is not None and len(weights) != len(names or ["sigmoid"]):
        yield f"loss_weights holds {len(weights)} numbers; expected one for each loss_type"
    if "exo_pair" in names and not values.get("label_smoothing"):
        yield "loss_type exo_pair needs label_smoothing above 0 (its paper takes 0.001)"
    divergence = values.get("f_divergence_type", "reverse_kl")
    if divergence not in _DIVERGENCES:
        yield f"f_divergence_type is {shown(divergence)}; expected one of {', '.join(_DIVERGENCES)}"
    elif divergence != "reverse_kl" and not {*names} <= {*_PAIRED}:
        yield f"f_divergence_type is {divergence}; with it expected loss_type among {', '.join(_PAIRED)}"


def _settings(objective: str, values: dict[str, Any]) -> Settings:
    names = values.pop("loss_type", None)
    weights = values.pop("loss_weights", None)
    if "cpo_alpha" in values:
        values["nll_weight"] = values.pop("cpo_alpha")
    if objective == "kto":
        return Settings(objective=objective, unpaired_loss=(names or ["kto"])[0], **values)
    names = names or ["sigmoid"]
    losses = tuple(zip(names, weights or [1.0] * len(names), strict=True))
    return Settings(objective=objective, losses=losses, **values)
