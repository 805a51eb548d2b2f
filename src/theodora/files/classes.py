"""Which class of transformers a model folder is loaded as: one that predicts text from text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from theodora.errors import CheckpointError, shown
from theodora.files.model_folder import scoring_name

_CODE_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
# Names of transformers' own code for experts; any other name makes it fetch code from the hub.
_OWN_EXPERTS = ("eager", "batched_mm", "grouped_mm")


def auto_classes(config: PreTrainedConfig, model: object, *, trust_remote_code: bool = False) -> list[Any]:
    """The `AutoModel…` classes for a configuration, the first that finds all its tensors in the folder.

    Where transformers loads the language model of a vision-language checkpoint by itself (Qwen3.5, Llama 4), it is
    that: the same text with less memory. Where it does not (Gemma 3, Mistral 3), it is the whole model.

    Args:
        config: the model's.
        model: its folder or hub name; for messages.
        trust_remote_code: whether code that comes with the model may say the class.

    Raises:
        CheckpointError: the model does not predict the next token of a text, with the reason.
    """
    remote: Any = getattr(config, "auto_map", None) or {}
    if trust_remote_code and remote:
        return [AutoModelForImageTextToText if _only_image_text(remote) else AutoModelForCausalLM]
    kind = config.model_type or type(config).__name__
    if (scoring := _scoring_name(config)) is not None:
        raise CheckpointError(
            f"{model} is a {scoring}: it scores texts, as a reward model does, and continues none. theodora "
            f"evaluate scores pairs with it; theodora train --objective grpo --reward {model} learns from its scores."
        )
    if config.is_encoder_decoder or getattr(config.get_text_config(), "is_encoder_decoder", False):
        raise CheckpointError(
            f"{model} is an encoder-decoder model ({kind}): it reads a text and writes another. Fine-tuning, chat and "
            "serving here are for models that continue one text (decoders)."
        )
    mappings = (
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
    )
    classes = [auto for mapping, auto in mappings if type(config) in mapping]
    if classes:
        return classes
    hint = " If it brings its own code and you trust it, pass --trust-remote-code." if remote else ""
    raise CheckpointError(
        f"{model} is a {kind} model, which transformers has no class for that predicts the next token of a text.{hint}"
    )


def scoring_class(config: PreTrainedConfig, model: object) -> Any:
    """The `AutoModel…` class that gives a text one number, for a configuration.

    Args:
        config: the model's.
        model: its folder or hub name; for messages.

    Raises:
        CheckpointError: transformers has none for it, or the folder's head gives several numbers.
    """
    kind, own = config.model_type or type(config).__name__, _scoring_name(config)
    if not scores_texts(config):
        raise CheckpointError(
            f"{model} is a {kind} model, which transformers has no class for that scores a text (for sequence "
            "classification), as a reward model does. --objective dpo learns from the same pairs without one."
        )
    if own is not None and config.num_labels != 1:
        raise CheckpointError(
            f"{model} is a {own} that gives {config.num_labels} numbers, one for each class; expected one, the reward. "
            "Name the language model that it was made from."
        )
    return AutoModelForSequenceClassification


def scores_texts(config: PreTrainedConfig) -> bool:
    """Whether transformers has a class that scores texts for a configuration."""
    return type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING


def is_scoring(config: PreTrainedConfig) -> bool:
    """Whether a model's configuration says that it has a head that scores texts."""
    return _scoring_name(config) is not None


def _scoring_name(config: PreTrainedConfig) -> str | None:
    return scoring_name(getattr(config, "architectures", None))


def fetched_kernels(options: Any) -> Iterator[str]:
    """Code by which options of a model want it to compute, and which is not on this machine, at any depth.

    Args:
        options: what `from_pretrained` takes, or a part of config.json.
    """
    if isinstance(options, list | tuple):
        for item in options:
            yield from fetched_kernels(item)
    for key, value in options.items() if isinstance(options, Mapping) else ():
        if key in _CODE_KEYS:
            names = list(value.values()) if isinstance(value, Mapping) else [value]
            yield from (f"{key} {shown(name)}" for name in names if _is_fetched(key, name))
        else:
            yield from fetched_kernels(value)


def _is_fetched(key: str, name: object) -> bool:
    if not isinstance(name, str):
        return False
    if "experts" in key:
        return name not in _OWN_EXPERTS
    # With the package `kernels` transformers fetches flash attention that is not installed.
    return "/" in name or ("flash" in name and find_spec("kernels") is not None and find_spec("flash_attn") is None)


def _computed_with(config: PreTrainedConfig) -> list[Any]:
    """What a configuration and those within it say of how to compute."""
    inner = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    own = {key: getattr(config, key, None) for key in ("_attn_implementation", "_experts_implementation")}
    return [own, *(part for config in inner for part in _computed_with(config))]


def check_kernels(config: PreTrainedConfig, model: object, *, trust_remote_code: bool = False) -> None:
    """Refuse a model whose configuration wants code from the hub to compute with, before it is built.

    Args:
        config: the model's.
        model: its folder or hub name; for messages.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        CheckpointError: naming the code.
    """
    if not trust_remote_code and (fetched := next(fetched_kernels(_computed_with(config)), None)):
        raise CheckpointError(
            f"{model}/config.json wants {fetched}, which would be fetched from the hub and run. Take that line out, or "
            "pass --trust-remote-code if you trust it."
        )


def model_alone(model: str | Path) -> dict[str, Any]:
    """What keeps `from_pretrained` to a local folder's own model.

    transformers looks for adapter_config.json in it, and then puts that adapter on, or loads the base that it names.
    (5.17 looks there whatever it is told, and then fails; later versions go on with the model.)
    """
    # adapter_config.json is then looked for in /dev/null, where no file can be.
    return {"adapter_kwargs": {"subfolder": os.devnull}} if Path(model).is_dir() else {}


def capped_attention(config: PreTrainedConfig) -> dict[str, str]:
    """What has `from_pretrained` give a model that caps its attention scores (Gemma 2) an attention that does so.

    Until some version after 5.17 transformers gives it SDPA, which leaves the cap out without a word.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return {"attn_implementation": "eager"} if capped else {}


def auto_name(config: PreTrainedConfig) -> str:
    """The name of the `AutoModel…` class for a model that is loaded, by its own configuration."""
    if is_scoring(config):
        return AutoModelForSequenceClassification.__name__
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM.__name__  # also for a model's own code
    return AutoModelForImageTextToText.__name__


def _only_image_text(auto_map: dict[str, Any]) -> bool:
    return "AutoModelForImageTextToText" in auto_map and "AutoModelForCausalLM" not in auto_map
