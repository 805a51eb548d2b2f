"""From a configuration to rows, a tokenizer and a model with an adapter, ready to train."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl.trainer.sft_config import SFTConfig

from theodora.adapters import inject_adapter, quantize_base, remove_adapter
from theodora.adapters.inject import adapter_layers
from theodora.adapters.kinds import layer_kinds
from theodora.adapters.models import load_model, load_tokenizer
from theodora.adapters.parts import other_parts_note
from theodora.adapters.targets import for_text
from theodora.config import AdapterConfig, TrainConfig
from theodora.data import (
    Examples,
    fallback_chat_template,
    load_examples,
    packing_is_safe,
    split_examples,
    tokenize,
)
from theodora.data.replay import mix
from theodora.errors import ConfigError
from theodora.kernels.float8 import multiplies_float8
from theodora.train.arguments import choose_precision
from theodora.train.experts import check_balance, name_experts
from theodora.train.text_only import check_continues_text, without_gradient

_HELD_OUT_SHARE, _HELD_OUT_ROWS = 0.05, 200  # the default split
_LARGE_MODEL = 3_000_000_000  # parameters from which activations are recomputed unless told otherwise


@dataclass
class Prepared:
    """Everything that training needs."""

    config: TrainConfig
    """With every choice made."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    training: Examples
    held_out: Examples | None
    train_rows: Dataset
    held_out_rows: Dataset | None
    dtype: str
    notes: list[str]


def prepare(config: TrainConfig, arguments: SFTConfig) -> Prepared:
    """Load and check everything; what fails fast comes first.

    Raises:
        DataError: a data file cannot be used.
        ConfigError: the configuration does not fit the data or the model.
        CheckpointError: the model cannot be loaded.
    """
    notes: list[str] = []
    examples = load_examples(config.data)
    config, training, held_out = _split(config, examples, notes)
    tokenizer = _load_tokenizer(config, arguments, training)
    train_rows = _tokenize(config, training, tokenizer, notes)
    if config.replay is not None:
        train_rows = _with_replay(config, train_rows, _tokenize(config, load_examples(config.replay), tokenizer, notes))
        notes.append(f"replay: {config.replay_share:.0%} of the rows are texts of {config.replay}")
    held_out_rows = _tokenize(config, held_out, tokenizer, notes) if held_out is not None else None
    dtype, bf16 = choose_precision(config, arguments)
    model = load_model(
        config.model,
        dtype=dtype,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
        model_kwargs=arguments.model_init_kwargs if isinstance(arguments.model_init_kwargs, dict) else None,
    )
    arguments.model_init_kwargs = None
    check_continues_text(model)
    _name_backbone(model)
    name_experts(model.config.get_text_config())
    if (unbalanced := check_balance(model, arguments)) is not None:
        notes.append(unbalanced)
    adapter, targets_note = for_text(model, config.adapter)
    notes += targets_note
    config = replace(config, bf16=bf16, gradient_checkpointing=_recompute(config, model, notes))
    if (config.packing and arguments.packing_strategy != "wrapped") and not packing_is_safe(model):
        raise ConfigError(
            f"packing does not work with this model: a {type(model).__name__} lets the rows in one sequence see each "
            "other. Train without packing."
        )
    if config.base_dtype == "fp8":
        quantize_base(model, exclude=config.adapter.modules_to_save)
        dtype = f"float8, the rest {dtype},"
        if not multiplies_float8(arguments.device):
            notes.append(f"{arguments.device.type} has no products of float8: they run on widened copies, slower")
    # After loading, which may draw random numbers, so that the adapter starts the same on every machine.
    set_seed(config.seed)
    _inject(model, adapter, arguments, notes)
    if (frozen := other_parts_note(model, adapter_layers(model))) is not None:
        notes.append(frozen)
    return Prepared(config, model, tokenizer, training, held_out, train_rows, held_out_rows, dtype, notes)


def _inject(model: PreTrainedModel, adapter: AdapterConfig, arguments: SFTConfig, notes: list[str]) -> None:
    """Put the adapter on the model, without what text gives no gradient."""
    random = torch.get_rng_state()
    inject_adapter(model, adapter)
    whole = not (arguments.fsdp or arguments.deepspeed or getattr(model, "hf_device_map", None))
    if arguments.device.type != "cpu" and whole:
        model.to(arguments.device)  # pyright: ignore[reportArgumentType]  (where it is trained, and faster)
    if not (resting := without_gradient(model)):
        return
    kinds = ", ".join(dict.fromkeys(layer_kinds(resting).values()))
    if adapter.targets != "all-linear":
        raise ConfigError(
            f"The targets select modules that text gives no gradient, so that they would never be trained: {kinds}. "
            "Leave them out with exclude."
        )
    notes.append(f"text gives no gradient to {kinds}: frozen, and left out of the targets")
    kept = tuple(path for path in adapter_layers(model) if path not in set(resting))
    remove_adapter(model)
    if whole:
        model.to("cpu")  # pyright: ignore[reportArgumentType]  (so that it starts the same on every machine)
    torch.set_rng_state(random)
    inject_adapter(model, replace(adapter, targets=kept, exclude=()))


def _name_backbone(model: Any) -> None:
    """Say where the states before the head come from, for TRL: Llama 4's class names a place that is not there."""
    if model.base_model is not model:
        return
    found = [name for name, child in model.named_children() if child is model.get_decoder() or name == "model"]
    if found:
        model.base_model_prefix = found[0]


def _split(config: TrainConfig, examples: Examples, notes: list[str]) -> tuple[TrainConfig, Examples, Examples | None]:
    """Rows to train on, and rows held out; the configuration names the number of rows from then on."""
    if config.eval_data is not None:
        return config, examples, load_examples(config.eval_data)
    wanted = config.held_out
    if wanted is None:
        wanted = min(_HELD_OUT_ROWS, max(1, round(_HELD_OUT_SHARE * len(examples)))) if len(examples) > 1 else 0
    try:
        training, held_out = split_examples(examples, wanted, config.seed)
    except ConfigError:
        if config.held_out is not None:
            raise
        notes.append("no rows are held out: the rows are copies of one another")
        wanted, training, held_out = 0, examples, None
    return replace(config, held_out=wanted), training, held_out if wanted else None


def _load_tokenizer(config: TrainConfig, arguments: SFTConfig, examples: Examples) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code, revision=config.revision)
    if arguments.eos_token is not None:
        if arguments.eos_token not in tokenizer.get_vocab():
            raise ConfigError(
                f"eos_token is {arguments.eos_token!r}, which the tokenizer of {config.model} does not have"
            )
        tokenizer.eos_token = arguments.eos_token
    if arguments.chat_template_path is not None:
        path = Path(arguments.chat_template_path)
        if not path.is_file():
            raise ConfigError(f"chat_template_path is {path}; expected a file with a Jinja template")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        arguments.chat_template_path = None
    conversational = not isinstance(examples.dataset[0].get("prompt", examples.dataset[0].get("text", [])), str)
    if conversational and tokenizer.chat_template is None and config.use_chat_template is None:
        # Saved with the adapter, so that whoever prompts the model does it the same way.
        tokenizer.chat_template = fallback_chat_template(tokenizer)
    return tokenizer


def _tokenize(config: TrainConfig, examples: Examples, tokenizer: PreTrainedTokenizerBase, notes: list[str]) -> Dataset:
    rows = tokenize(
        examples,
        tokenizer,
        max_length=config.max_length,
        use_chat_template=config.use_chat_template,
        train_on=config.train_on,
    )
    # The first part says how many rows and tokens there are, which the panel shows by itself.
    notes += [note.rstrip(".") for note in rows.info.description.split("; ")[1:] if note.rstrip(".") not in notes]
    return rows


def _with_replay(config: TrainConfig, rows: Dataset, texts: Dataset) -> Dataset:
    places = range(len(rows)), range(len(rows), len(rows) + len(texts))
    return concatenate_datasets([rows, texts]).select(mix(*places, config.replay_share, config.seed))


def _recompute(config: TrainConfig, model: PreTrainedModel, notes: list[str]) -> bool:
    if config.gradient_checkpointing is not None:
        return config.gradient_checkpointing
    large = model.num_parameters() >= _LARGE_MODEL
    if large:
        notes.append("activations are recomputed in the backward pass (gradient_checkpointing)")
    return large
