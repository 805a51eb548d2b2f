"""What a recipe may say beside the options of `TrainConfig`: fields of TRL's, each with its type and what it means.

`theodora schema` tells editors of them. What is accepted in the end is for `sft_arguments` and `settings_of` to say.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from functools import cache, partial
from typing import Any, get_args, get_type_hints

from trl.trainer.dpo_config import DPOConfig
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.kto_config import KTOConfig
from trl.trainer.sft_config import SFTConfig

from theodora.coerce import coerce
from theodora.config import OPTION_NAMES, SAME_AS, Objective
from theodora.errors import shown
from theodora.train.arguments import ALWAYS, ELSEWHERE
from theodora.train.objectives import own_types, refused_names

# What TRL's configurations of the others would say is behind an import that warns of changes to come.
_HELP_OF: dict[str, Any] = {"dpo": DPOConfig, "kto": KTOConfig, "grpo": GRPOConfig}
# What a run sets otherwise than TRL does, unless told: TRL's default is not ours.
_SET_HERE = (
    *("run_name", "do_eval", "eval_strategy", "eval_on_start", "save_strategy", "logging_nan_inf_filter", "log_level"),
    *("disable_tqdm", "load_best_model_at_end", "metric_for_best_model", "restore_callback_states_from_checkpoint"),
)
_HELP = {
    "beta": "Weight of the reference, or of the preferences: larger stays closer to what the model was.",
    "loss_type": "Loss or losses of the objective.",
    "simpo_gamma": "Margin that the better answer's reward should be ahead by.",
    "cpo_alpha": "Weight of the negative log-likelihood of the better answer.",
    "discopop_tau": "Temperature of the loss discopop.",
}


@dataclass(frozen=True, kw_only=True)
class PassedOption:
    """A field that goes through to TRL, or to what stands for it here."""

    name: str
    hint: Any
    """Its type, as `coerce` understands it."""
    default: Any = None
    description: str = ""
    refused: bool = False
    """It may only be off, and the description says why."""


def passed_options() -> list[PassedOption]:
    """All of them, in TRL's order, the objectives' own at the end. A name stands once."""
    options = {option.name: option for option in _of_trainer()}
    for option in _of_objectives():
        if (other := options.get(option.name)) is not None:  # loss_type, which sft has, too
            hint, text = other.hint | option.hint, f"{other.description} {option.description}"
            option = PassedOption(name=option.name, hint=hint, default=other.default, description=text)
        options[option.name] = option
    return list(options.values())


def checks() -> dict[str, Callable[[Any], str | None]]:
    """Names of these options, and of ours that TRL decides on → what is wrong with a value (None: nothing)."""
    found: dict[str, Callable[[Any], str | None]] = {}
    for option in passed_options():
        found[option.name] = partial(_objection, option)
    schedule = next(field for field in fields(SFTConfig) if field.name == "lr_scheduler_type")
    found[schedule.name] = partial(_objection, PassedOption(name=schedule.name, hint=str))
    return found


def _objection(option: PassedOption, value: Any) -> str | None:
    known = words_of(option.name)
    if option.refused:
        return option.description if value else None
    if known and value not in known:
        close = difflib.get_close_matches(str(value), known, n=3)
        near = f" ({', '.join(close)} are close)" if close else ""
        return f"would set {option.name} to {shown(value)}, which transformers does not have{near}"
    try:
        coerce(value, option.hint)
    except ValueError as error:
        return f"{option.name} cannot be that; expected {error}"
    return None


@cache
def words_of(name: str) -> tuple[str, ...]:
    """The words that a field of TRL's takes that is one of an enumeration there; none for other fields."""
    for choice in get_args(get_type_hints(SFTConfig).get(name)):
        if isinstance(choice, type) and issubclass(choice, Enum):
            return tuple(str(member.value) for member in choice)
    return ()


def _of_trainer() -> Iterator[PassedOption]:
    hints = get_type_hints(SFTConfig)
    for field in fields(SFTConfig):
        if not field.init or field.name in OPTION_NAMES or field.name in SAME_AS:
            continue
        why = ELSEWHERE.get(field.name)
        text = " ".join(str(field.metadata.get("help", "")).split())
        if why is not None:
            text = f"Has no effect here: {why}."
        elif field.name in ALWAYS:
            text += f" Always on here: {ALWAYS[field.name]}."
        yield PassedOption(
            name=field.name,
            hint=hints[field.name],
            default=None if field.default is MISSING or field.name in _SET_HERE else field.default,
            description=text,
            refused=why is not None,
        )


def _of_objectives() -> Iterator[PassedOption]:
    named: dict[str, list[str]] = {}
    types: dict[str, Any] = {}
    for objective in get_args(Objective):
        for name, hint in own_types(objective).items():
            named.setdefault(name, []).append(objective)
            types[name] = types[name] | hint if name in types else hint
    for name, objectives in named.items():
        text = f"{_help(name, objectives)} (Of {', '.join(objectives)}.)".strip()
        yield PassedOption(name=name, hint=types[name], description=text)
    for name, why in refused_names().items():
        if name not in named and name not in OPTION_NAMES:
            yield PassedOption(name=name, hint=Any, description=f"Has no effect here: {why}.", refused=True)


def _help(name: str, objectives: list[str]) -> str:
    """What TRL says of a field, if the objectives that have it agree about it."""
    texts = {
        " ".join(str(field.metadata.get("help", "")).split())
        for objective in objectives
        if objective in _HELP_OF
        for field in fields(_HELP_OF[objective])
        if field.name == name
    } - {""}
    return _HELP.get(name) or (texts.pop() if len(texts) == 1 else "")
