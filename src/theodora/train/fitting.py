"""Making a model fit its data, its trainer and its adapter: vocabulary, ends of answers, names, and what is adapted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl.trainer.sft_config import SFTConfig

from theodora.adapters import inject_adapter, remove_adapter
from theodora.adapters.heads import head_paths
from theodora.adapters.scoring import new_heads, set_padding, widen_heads
from theodora.adapters.state import adapter_layers
from theodora.config import AdapterConfig, TrainConfig
from theodora.data.vocabulary import describe_missing, missing_in, model_rows, safe_padding
from theodora.errors import ConfigError
from theodora.files.generation import new_ends, set_ends
from theodora.paths import layer_kinds
from theodora.train.full import train_all
from theodora.train.text_only import without_gradient


def fit_vocabulary(
    config: TrainConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    datasets: Sequence[Dataset | None],
) -> list[str]:
    """Make room for the tokens of the data that the model has no row for, if that is asked for; what there is to say.

    Raises:
        ConfigError: it is not, naming the tokens.
    """
    have = model_rows(model)
    missing = missing_in(filter(None, datasets), have)
    safe_padding(model, tokenizer)
    if not missing:
        unneeded = "resize_embeddings: the model has a row for every token of the data, so nothing was resized"
        return [unneeded] if config.resize_embeddings else []
    told = describe_missing(missing, have, tokenizer, _files_with_missing(config, datasets, have))
    if not config.resize_embeddings:
        raise ConfigError(
            f"{told}\nGive them rows and train these with --resize-embeddings, or take a model (or a tokenizer) that "
            "fits the data."
        )
    tokens = max(len(tokenizer), max(missing) + 1)
    set_seed(config.seed)  # new rows are drawn about the mean of the others
    model.resize_token_embeddings(tokens)
    return [f"the vocabulary grew from {have:,} to {tokens:,} tokens, whose new rows are trained and saved"]


def _files_with_missing(config: TrainConfig, datasets: Sequence[Dataset | None], have: int) -> str:
    """The files whose rows, those to train on and those held out, use tokens without a row."""
    files = ((config.data, config.replay), (config.eval_data or config.data,))
    guilty = [
        names for names, rows in zip(files, datasets, strict=True) if rows is not None and missing_in([rows], have)
    ]
    return " with ".join(dict.fromkeys(name for names in guilty for name in names if name))


def end_as_taught(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Let the model stop where its template ends turns; what there is to say about it."""
    ends = new_ends(model, tokenizer)
    set_ends(model, tokenizer)
    if not ends:
        return []
    return [
        f"the chat template ends turns with {' and '.join(ends)}, the tokenizer's EOS is {tokenizer.eos_token}: "
        "answers end with either, here and in what is made of this adapter (generation_config.json)"
    ]


def put_on(model: PreTrainedModel, adapter: AdapterConfig, arguments: SFTConfig) -> list[str]:
    """Put the adapter on the model, without what text gives no gradient, or let all weights be trained; what there is
    to say of that."""
    if adapter.method == "full":
        return train_all(model)
    random = torch.get_rng_state()
    inject_adapter(model, adapter)
    whole = not (arguments.fsdp or arguments.deepspeed or getattr(model, "hf_device_map", None))
    if arguments.device.type != "cpu" and whole:
        model.to(arguments.device)  # pyright: ignore[reportArgumentType]  (where it is trained, and faster)
    if not (resting := without_gradient(model)):
        return []
    kinds = ", ".join(dict.fromkeys(layer_kinds(resting).values()))
    if adapter.targets != "all-linear":
        raise ConfigError(
            f"The targets select modules that text gives no gradient, so that they would never be trained: {kinds}. "
            "Leave them out with exclude."
        )
    targets = tuple(path for path in adapter_layers(model) if path not in set(resting))
    remove_adapter(model)
    if whole:
        model.to("cpu")  # pyright: ignore[reportArgumentType]  (so that it starts the same on every machine)
    torch.set_rng_state(random)
    inject_adapter(model, replace(adapter, targets=targets, exclude=()))
    return [f"text gives no gradient to {kinds}: frozen, and left out of the targets"]


def with_score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> list[str]:
    """Make ready what a model scores with: its head, new where the folder has none, and the token that pads; what there
    is to say about it."""
    set_seed(config.seed)
    new = new_heads(model)
    if not config.trains_all:
        widen_heads(model)
    heads = ", ".join(head_paths(model))
    told = f"new, drawn by seed {config.seed}" if new else "as the model's folder has it"
    return [f"{heads} gives an answer its score: trained in full ({told})", *set_padding(model, tokenizer)]


def name_backbone(model: Any) -> None:
    """Say where the states before the head come from, for TRL: Llama 4's class names a place that is not there."""
    if model.base_model is not model:
        return
    backbones = [name for name, child in model.named_children() if child is model.get_decoder() or name == "model"]
    if backbones:
        model.base_model_prefix = backbones[0]
