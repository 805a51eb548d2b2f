"""From a configuration to rows, a tokenizer and a model with an adapter, ready to train."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl.trainer.sft_config import SFTConfig

from theodora.adapters import quantize_base
from theodora.adapters.conditions import hash_of_weights
from theodora.adapters.heads import head_paths
from theodora.adapters.inject import train_heads
from theodora.adapters.models import load_model
from theodora.adapters.parts import other_parts_note
from theodora.adapters.quantized import count_parameters, experts_left_plain, left_plain, quantization_of
from theodora.adapters.state import adapter_layers
from theodora.adapters.targets import for_text
from theodora.config import GENERAL_LENGTH, GENERAL_ROWS, TrainConfig
from theodora.data import (
    Examples,
    PromptRows,
    fallback_chat_template,
    load_examples,
    near_copies,
    tokenize,
    tokenize_preferences,
    tokenize_prompts,
)
from theodora.data.alike import told
from theodora.data.hidden import left_out_of
from theodora.data.left_out import LeftOut, named, sentences
from theodora.data.replay import mix
from theodora.data.split import default_held_out, parts_of, rows_held_out, spread_out
from theodora.errors import ConfigError
from theodora.evaluate.general import general_questions, read_general
from theodora.evaluate.questions import Questions, context_window
from theodora.files.model_folder import has_tokenizer
from theodora.files.tokenizer import load_tokenizer
from theodora.kernels.cross_entropy import IGNORED
from theodora.kernels.float8 import multiplies_float8
from theodora.plan.fits import LARGE_MODEL
from theodora.train.arguments import Precision, choose_precision
from theodora.train.beforehand import look_ahead, settle
from theodora.train.continued import load_continued
from theodora.train.experts import OF_SCORES, balances, name_experts, why_unbalanced
from theodora.train.fitting import end_as_taught, fit_vocabulary, name_backbone, put_on, with_score
from theodora.train.flattened import lengths_of
from theodora.train.fused_loss import fused_loss_pays
from theodora.train.grpo_batches import steps_at_once
from theodora.train.grpo_loss import PolicySettings
from theodora.train.inputs import Inputs, inputs_of
from theodora.train.objectives import completion_length, kind_of, settings_of
from theodora.train.packed_rows import can_go_by_bounds_alone, keeps_rows_apart
from theodora.train.processes import Processes
from theodora.train.resumed import Past
from theodora.train.rewards import Rewards, rewards_of
from theodora.train.text_only import check_continues_text
from theodora.train.tried import know
from theodora.train.vllm_rollouts import check_vllm

_COUNTED_AT_ONCE = 10_000  # rows


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
    """Of the base model's weights, in words."""
    precision: Precision
    balances_experts: bool
    """Whether the loss that keeps experts balanced can be computed."""
    notes: list[str]
    sources: dict[str, Examples]
    """What was read, by the name of its option."""
    base_hash: str
    """Of the base model's weights as they were loaded."""
    left_out: tuple[LeftOut, ...] = ()
    """What rows hold and nothing is learned from."""
    given: TrainConfig | None = None
    """The run as it was asked for, before choices were made."""
    bytes_gathered: int = 0
    """What a process sends to others in a pass so that they have its parts of sharded weights."""
    rewards: Rewards | None = None
    """What completions are rewarded for, if the objective is grpo."""
    base_config: PreTrainedConfig | None = None
    """The model's configuration as its folder has it."""
    past: Past | None = None
    """What the checkpoint tells that it goes on from."""
    general: Questions | None = None
    """Texts that the loss on general text is measured on."""

    def inputs(self, processes: int) -> Inputs:
        """What the run is made from, in so many processes."""
        judges = {} if self.rewards is None else self.rewards.judges
        return inputs_of(self.config, self.sources, self.train_rows, self.base_hash, processes, judges)


@dataclass(frozen=True)
class Data:
    """What is read and made of the rows, in one process of each machine."""

    config: TrainConfig
    """With what the rows decide."""
    tokenizer: PreTrainedTokenizerBase
    training: Examples
    held_out: Examples | None
    train_rows: Dataset
    held_out_rows: Dataset | None
    notes: list[str]
    sources: dict[str, Examples]
    left_out: list[LeftOut]
    general: Examples | None = None


def prepare(config: TrainConfig, arguments: SFTConfig) -> Prepared:
    """Load and check everything; what fails fast comes first.

    Raises:
        DataError: a data file cannot be used.
        ConfigError: the configuration does not fit the data or the model.
        CheckpointError: the model cannot be loaded.
    """
    processes = Processes.here()
    if processes.sharding is not None and config.objective != "sft":
        raise ConfigError(
            f"sharding is {processes.sharding}, and the objective {config.objective} compares two passes over whole "
            "weights. Leave sharding out, or set sharding: none."
        )
    settings = settings_of(config)
    if isinstance(settings, PolicySettings):
        size, batches = config.per_device_train_batch_size, config.gradient_accumulation_steps
        steps_at_once(settings, size, batches, processes.count)
    rewards = rewards_of(config, arguments.device)
    model_config = look_ahead(config, processes)
    data = processes.one_here_does(lambda: read_data(config, arguments, rewards, window_of(model_config)))
    config, tokenizer, notes = data.config, data.tokenizer, data.notes
    train_rows, held_out_rows = data.train_rows, data.held_out_rows
    if isinstance(settings, PolicySettings) and settings.vllm is not None:
        longest = max(int(lengths_of(rows)[0].max()) for rows in (train_rows, held_out_rows) if rows is not None)
        check_vllm(
            config,
            settings.vllm,
            settings.drawing,
            model_config=model_config,
            device=arguments.device,
            processes=processes.count,
            longest=longest + settings.max_completion_length,
        )
    precision, scores = choose_precision(config, arguments), config.objective == "reward"
    dtype = precision.dtype
    settled = settle(config, model_config, arguments.device, dtype, train_rows)
    processes = settled.processes
    notes += settled.notes
    load = partial(
        load_model,
        config.model,
        dtype=dtype,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
        model_kwargs=arguments.model_init_kwargs if isinstance(arguments.model_init_kwargs, dict) else None,
        quantize=config.quantize,
        plain_for="base_dtype is fp8" if config.base_dtype == "fp8" else None,
        compute=torch.bfloat16 if precision.bf16 else None,
        device=arguments.device,
        keep=config.adapter.modules_to_save,
        adapted=True,
        sharded=processes.sharding is not None,
        scores=scores,
    )
    model = load() if Path(config.model).exists() else processes.one_here_first(load)  # which downloads it
    if scores:
        notes += with_score(model, tokenizer, config)
    base_hash = hash_of_weights(model)
    if config.from_adapter is None and processes.alone:
        know(model, base_hash)
    if not scores:
        check_continues_text(model)
        name_backbone(model)
    name_experts(model.config.get_text_config())
    unbalanced = OF_SCORES if scores else why_unbalanced(model, arguments)
    notes += [unbalanced] if unbalanced is not None and (not scores or balances(model)) else []
    adapter, targets_note = for_text(model, config.adapter)
    notes += targets_note
    notes += [] if scores else end_as_taught(model, tokenizer)
    recomputes = config.gradient_checkpointing
    if recomputes is None and (recomputes := count_parameters(model) >= LARGE_MODEL):
        notes.append("activations are recomputed in the backward pass (gradient_checkpointing)")
    rows = arguments.per_device_eval_batch_size
    config = replace(config, bf16=precision.bf16, gradient_checkpointing=recomputes, per_device_eval_batch_size=rows)
    if config.packing and arguments.packing_strategy != "wrapped":
        _check_packing(config, model, arguments.device)
    plain = (*config.adapter.modules_to_save, *(head_paths(model) if scores else ()))
    if config.base_dtype == "fp8":
        quantize_base(model, exclude=plain)
        if not multiplies_float8(arguments.device):
            notes.append(f"{arguments.device.type} has no products of float8: they run on widened copies, slower")
        notes += filter(None, [experts_left_plain(model)])
    if (quantization := quantization_of(model)) is not None:
        # (a folder of quantised weights keeps the dtype of its others, whatever was asked for)
        dtype = f"{quantization}, the rest {str(model.dtype).removeprefix('torch.')},"
        notes += filter(None, [left_plain(model, plain), experts_left_plain(model)])
    if config.from_adapter is not None:  # before the vocabulary: it may bring rows, and is to have those of new tokens
        config = load_continued(model, config)
        if scores:
            train_heads(model)
    notes += fit_vocabulary(config, model, tokenizer, [train_rows, held_out_rows])
    # After loading, which may draw random numbers, so that the adapter starts the same on every machine.
    set_seed(config.seed)
    if config.from_adapter is None:
        notes += put_on(model, adapter, arguments)
    notes += filter(None, [None if config.trains_all else other_parts_note(model, adapter_layers(model))])
    return Prepared(
        config=config,
        model=model,
        tokenizer=tokenizer,
        training=data.training,
        held_out=data.held_out,
        train_rows=train_rows,
        held_out_rows=held_out_rows,
        dtype=dtype,
        precision=precision,
        balances_experts=unbalanced is None,
        notes=notes,
        sources=data.sources,
        base_hash=base_hash,
        base_config=model_config,
        left_out=tuple(data.left_out),
        rewards=rewards,
        general=None if data.general is None else _general(data.general, model, tokenizer),
    )


def _general(texts: Examples, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Questions:
    length = min(GENERAL_LENGTH, context_window(model, tokenizer))
    return general_questions(spread_out(texts, GENERAL_ROWS), tokenizer, length)


def _check_packing(config: TrainConfig, model: PreTrainedModel, device: torch.device) -> None:
    """Refuse packed rows that the model would not keep apart.

    Attention with sinks does so on the fast path, which the model is not on yet: the trainer asks again.
    """
    if keeps_rows_apart(model):
        return
    by_bounds = can_go_by_bounds_alone(model)
    if by_bounds and config.kernels != "reference" and fused_loss_pays(device):
        return
    where = "" if not by_bounds else f"; on a GPU with kernels: auto it does not ({device.type}, {config.kernels} here)"
    raise ConfigError(
        f"packing does not work with this model: a {type(model).__name__} lets the rows in one sequence see each "
        f"other{where}. Train without packing (--no-packing)"
        + (": where packing would work, the rows of a batch are one without padding anyway." if by_bounds else ".")
    )


def window_of(model_config: PreTrainedConfig | None) -> int | None:
    """The most tokens that a model takes, as far as its configuration says."""
    return None if model_config is None else getattr(model_config.get_text_config(), "max_position_embeddings", None)


def read_data(
    config: TrainConfig, arguments: SFTConfig, rewards: Rewards | None = None, window: int | None = None
) -> Data:
    """Read and tokenise what a run trains on, and holds out.

    Args:
        config: the run.
        arguments: TRL's, of the same run.
        rewards: of completions, which are tried on the rows.
        window: `window_of` the model.
    """
    examples = load_examples(config.data, kind=kind_of(config.objective))
    config, training, held_out, notes = _split(config, examples)
    sources = {"data": examples}
    if config.eval_data is not None and held_out is not None:
        sources["eval_data"] = held_out
    tokenizer = _load_tokenizer(config, arguments, training)
    if rewards is not None:
        for part in filter(None, (training, held_out)):
            rewards.check(PromptRows(part), tokenizer)
    train_rows = _tokenize(config, training, tokenizer, window)
    notes += _new_notes(train_rows, notes)
    left_out = [*examples.left_out, *left_out_of(train_rows)]
    if config.replay is not None:
        replayed = sources["replay"] = load_examples(config.replay)
        texts = _tokenize(config, replayed, tokenizer, window)
        notes += _new_notes(texts, notes)
        left_out += named([*replayed.left_out, *left_out_of(texts)], config.replay)
        train_rows = _with_replay(config, train_rows, texts)
        notes.append(f"replay: {config.replay_share:.0%} of the rows are texts of {config.replay}")
    held_out_rows = None
    if held_out is not None:
        held_out_rows = _tokenize(config, held_out, tokenizer, window)
        notes += _new_notes(held_out_rows, notes)
        left_out += _of_held_out(config, held_out, held_out_rows, {part.what for part in left_out})
    general = None
    if config.general is not None:
        general = sources["general"] = read_general(config.general)
        left_out += named(general.left_out, config.general)
        if config.replay is not None and sources["replay"].sha256 == general.sha256:
            notes.append("general and replay are the same texts: those that are measured are trained on, too")
    return Data(config, tokenizer, training, held_out, train_rows, held_out_rows, notes, sources, left_out, general)


def count_tokens(rows: Dataset) -> tuple[int, int]:
    """Tokens in rows with `labels`, and how many of them are learned."""
    # By columns: of a million rows Python would look at each token, for seconds before the first step.
    tokens = learned = 0
    table: Any
    for table in rows.select_columns("labels").with_format("arrow").iter(_COUNTED_AT_ONCE):
        labels = table["labels"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        tokens += len(labels)
        learned += int((labels != IGNORED).sum())
    return tokens, learned


def _split(config: TrainConfig, examples: Examples) -> tuple[TrainConfig, Examples, Examples | None, list[str]]:
    """Rows to train on, and rows held out, whose number the configuration names from then on; what there is to say."""
    if config.eval_data is not None:
        held_out = load_examples(config.eval_data, kind=kind_of(config.objective))
        names = f" of {config.eval_data}", f" of {config.data}"
        return config, examples, held_out, _near_copies(examples, held_out, names)
    wanted = default_held_out(len(examples)) if config.held_out is None else config.held_out
    try:
        chosen = rows_held_out(examples, wanted, config.seed)
    except ConfigError:
        if config.held_out is not None:
            raise
        copies = "no rows are held out: the rows are copies of one another"
        return replace(config, held_out=0), examples, None, [copies]
    training, held_out = parts_of(examples, chosen)
    notes = _near_copies(training, held_out, ("", ""), (np.flatnonzero(~chosen), np.flatnonzero(chosen)))
    return replace(config, held_out=wanted), training, held_out if wanted else None, notes


def _near_copies(training: Examples, held_out: Examples, names: tuple[str, str], places: Any = None) -> list[str]:
    if Processes.here().index:
        return []  # the first one says so, and looking costs seconds
    found = near_copies(training, held_out, places)
    return list(filter(None, [told(found, names, (len(held_out), len(training)))]))


def _load_tokenizer(config: TrainConfig, arguments: SFTConfig, examples: Examples) -> PreTrainedTokenizerBase:
    place, revision = config.model, config.revision
    if config.from_adapter is not None and has_tokenizer(config.from_adapter):  # with the template it was trained with
        place, revision = config.from_adapter, None
    tokenizer = load_tokenizer(place, trust_remote_code=config.trust_remote_code, revision=revision)
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
    conversational = not isinstance(examples.dataset[0].get("prompt", examples.dataset[0].get("text", [])), str)
    if conversational and tokenizer.chat_template is None and config.use_chat_template is None:
        # Saved with the adapter, so that whoever prompts the model does it the same way.
        tokenizer.chat_template = fallback_chat_template(tokenizer)
    if config.objective == "reward" and config.use_chat_template is False:  # what it rewards is read as here
        tokenizer.chat_template = fallback_chat_template(tokenizer) if conversational else None
    return tokenizer


def _tokenize(
    config: TrainConfig, examples: Examples, tokenizer: PreTrainedTokenizerBase, window: int | None
) -> Dataset:
    if config.objective == "grpo":
        most = min(config.max_length, window or config.max_length, tokenizer.model_max_length)
        room = most - completion_length(config)
        if room < 1:
            raise ConfigError(
                f"max_completion_length is {completion_length(config)}, and the model takes {most} tokens, prompt and "
                "completion together; lower max_completion_length"
            )
        return tokenize_prompts(examples, tokenizer, max_prompt=room, use_chat_template=config.use_chat_template)
    if config.objective != "sft":
        return tokenize_preferences(
            examples,
            tokenizer,
            max_length=config.max_length,
            use_chat_template=config.use_chat_template,
            cut=config.objective != "reward",
        )
    return tokenize(
        examples,
        tokenizer,
        max_length=config.max_length,
        use_chat_template=config.use_chat_template,
        train_on=config.train_on,
    )


def _new_notes(rows: Dataset, notes: list[str]) -> list[str]:
    """What tokenised rows say of themselves, without what was said already."""
    # The first part says how many rows and tokens there are, which the panel shows by itself, as what is left out.
    said = {*notes, *sentences(left_out_of(rows))}
    return [note for part in rows.info.description.split("; ")[1:] if (note := part.rstrip(".")) not in said]


def _of_held_out(config: TrainConfig, examples: Examples, rows: Dataset, known: set[str]) -> tuple[LeftOut, ...]:
    """What is left out of the rows to evaluate on; of those of the same file only what no other row has."""
    if config.eval_data is not None:
        return named([*examples.left_out, *left_out_of(rows)], config.eval_data)
    return named([part for part in left_out_of(rows) if part.what not in known], "the held-out rows")


def _with_replay(config: TrainConfig, rows: Dataset, texts: Dataset) -> Dataset:
    places = range(len(rows)), range(len(rows), len(rows) + len(texts))
    return concatenate_datasets([rows, texts]).select(mix(*places, config.replay_share, config.seed))
