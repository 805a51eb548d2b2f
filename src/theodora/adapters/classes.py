"""Which class of transformers a model folder is loaded as: one that predicts text from text."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from theodora.errors import CheckpointError


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
    if config.is_encoder_decoder or getattr(config.get_text_config(), "is_encoder_decoder", False):
        raise CheckpointError(
            f"{model} is an encoder-decoder model ({kind}): it reads a text and writes another. Fine-tuning, chat and "
            "serving here are for models that continue one text (decoders)."
        )
    mappings = (
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
    )
    found = [auto for mapping, auto in mappings if type(config) in mapping]
    if found:
        return found
    hint = " If it brings its own code and you trust it, pass --trust-remote-code." if remote else ""
    raise CheckpointError(
        f"{model} is a {kind} model, which transformers has no class for that predicts the next token of a text.{hint}"
    )


def auto_name(config: PreTrainedConfig) -> str:
    """The name of the class that loads a model like one at hand, by its own configuration."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM.__name__  # also for a model's own code
    return AutoModelForImageTextToText.__name__


def _only_image_text(auto_map: dict[str, Any]) -> bool:
    return "AutoModelForImageTextToText" in auto_map and "AutoModelForCausalLM" not in auto_map
