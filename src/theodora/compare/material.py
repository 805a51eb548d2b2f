"""Data sets, split and tokenised once for all cells of a process."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from theodora.compare.config import CompareConfig, DataConfig, is_code
from theodora.compare.methods import Variant
from theodora.config import TrainConfig
from theodora.data import (
    Examples,
    PromptRows,
    as_answers,
    as_prompts,
    load_examples,
    reference_answer,
    split_examples,
    tokenize,
    tokenize_preferences,
    tokenize_prompts,
)
from theodora.data.left_out import named, sentences
from theodora.data.replay import mix
from theodora.data.sequences import parted
from theodora.data.split import spread_out
from theodora.errors import ConfigError, DataError, TheodoraError, bullet_list
from theodora.evaluate.general import general_questions, read_general
from theodora.evaluate.labels import answers_of
from theodora.evaluate.metrics import load_metric
from theodora.evaluate.questions import Questions, context_window, questions
from theodora.files.adapter import read_adapter
from theodora.train.grpo_batches import steps_at_once
from theodora.train.grpo_loss import PolicySettings
from theodora.train.light import Row
from theodora.train.light_policy import Prompts
from theodora.train.objectives import completion_length, settings_of
from theodora.train.rewards import Rewards


@dataclass(frozen=True, kw_only=True)
class Task:
    """One data set, ready."""

    rows: list[Row]
    """To train on."""
    pairs: list[Row]
    """The same as pairs, better, worse, better, …; none where rows are no pairs."""
    validation: Questions
    curve: Questions
    """The first validation rows, for learning curves."""
    test: Questions
    other: Questions | None
    """The first test rows, for models trained on other data sets."""
    asked: Prompts | None
    """To learn from rewards; None where no method does."""
    judged: Prompts | None
    """Test rows as prompts, whose answers are rewarded; None where there are no rewards."""
    commonest: float | None
    """Share of the commonest answer among the test rows: what saying it always would score."""

    @property
    def sizes(self) -> dict[str, float]:
        """Rows of each part, for the record."""
        counts: dict[str, float] = {"train": len(self.rows), "validation": self.validation.rows, "test": self.test.rows}
        return counts if self.commonest is None else {**counts, "commonest": self.commonest}


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The rows of a data set, in three parts."""

    train: Examples
    validation: Examples
    test: Examples


@dataclass(frozen=True, kw_only=True)
class Material:
    """All data of a comparison."""

    tasks: dict[str, Task]
    general: Questions | None
    replay: list[Row]
    """General texts that are not scored, tokenised."""

    def rows(self, data: str, replay: float, seed: int, objective: str = "sft") -> list[Row]:
        """What a cell trains on; of objectives other than sft the sequences of pairs (grpo has prompts of its own)."""
        if objective != "sft":
            return self.tasks[data].pairs
        return mix(self.tasks[data].rows, self.replay, replay, seed)


def read_splits(
    config: CompareConfig, *, with_rewards: bool = True
) -> tuple[dict[str, Splits], tuple[Examples, Examples] | None]:
    """Read and split every data set, and general text into what is scored and what is left for replay.

    Args:
        config: of the comparison.
        with_rewards: whether what is wrong with its rewards is told, too. Reward models are loaded for that.

    Raises:
        TheodoraError: naming every data set that cannot be used.
    """
    splits: dict[str, Splits] = {}
    problems: list[str] = []
    for name, data in config.data.items():
        try:
            splits[name] = _split(config, name, data)
        except TheodoraError as error:
            problems.append(f"data.{name}: {error}")
    general = None
    if config.general is not None:
        try:
            general = _general(config, config.general)
        except TheodoraError as error:
            problems.append(f"general: {error}")
    for variant in config.variants:
        if variant.from_adapter is not None:
            try:
                _check_adapter(variant, variant.from_adapter)
            except TheodoraError as error:
                problems.append(f"methods: {variant.name}: {error}")
    if not problems and with_rewards:
        rewards_of(config, torch.device("cpu"))
    if problems:
        raise DataError("The data cannot be used:" + bullet_list(problems))
    return splits, general


def _check_adapter(variant: Variant, place: str) -> None:
    method = read_adapter(place, for_model=True).config.method
    if method != variant.method:
        raise ConfigError(f"the adapter in {place} is one of {method}; expected one of {variant.method}")


def rewards_of(config: CompareConfig, device: torch.device) -> Rewards | None:
    """What answers are rewarded by, reward models on the device; files are run."""
    return Rewards(config.reward, config.reward_weights, config.reward_timeout, device) if config.reward else None


def check_rewards(rewards: Rewards, splits: dict[str, Splits], tokenizer: PreTrainedTokenizerBase) -> None:
    """Try the functions on a few rows of each data set.

    Raises:
        DataError: rows lack what a function needs, or it fails on them.
    """
    for name, parts in splits.items():
        try:
            for examples in (parts.train, parts.test):
                rewards.check(PromptRows(as_prompts(examples)), tokenizer)
        except DataError as error:
            raise DataError(f"data.{name}: {error}") from error


def left_out(splits: dict[str, Splits], general: tuple[Examples, Examples] | None) -> list[str]:
    """What the rows hold and nothing is learned from, one line each."""
    parts = [part for split in splits.values() for part in (split.train, split.validation, split.test)]
    return sentences(line for part in (*parts, *(general or ())) for line in named(part.left_out, part.source))


def prepare(
    config: CompareConfig,
    splits: dict[str, Splits],
    general: tuple[Examples, Examples] | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Material:
    """Tokenise everything."""
    window = context_window(model, tokenizer)
    tasks = {name: _task(config, config.data[name], split, tokenizer, window) for name, split in splits.items()}
    if general is None:
        return Material(tasks=tasks, general=None, replay=[])
    scored, left = general
    length = min(config.general_length, window)
    replayed = any(variant.replay for variant in config.variants)
    return Material(
        tasks=tasks,
        general=general_questions(scored, tokenizer, length),
        replay=_rows(left, tokenizer, min(length, config.max_length), None) if replayed else [],
    )


def labels_for(data: DataConfig, splits: Splits) -> list[str] | None:
    """The closed set of labels of a data set; None where there is none."""
    if data.score != "labels":
        return None
    if data.labels != "auto":
        return list(data.labels)
    parts = as_answers(splits.train), splits.validation, splits.test
    return sorted(set().union(*map(answers_of, parts)))


def _split(config: CompareConfig, name: str, data: DataConfig) -> Splits:
    if is_code(data.score):
        load_metric(data.score)  # what is wrong with it is said before anything runs
    kind = "pairs" if config.learns_pairs else "answers"
    train = load_examples(data.train, kind=kind)
    parts: dict[str, Examples] = {}
    for part in ("test", "validation"):
        wanted = getattr(data, part)
        if isinstance(wanted, str):
            parts[part] = load_examples(wanted, kind=kind)
        else:
            train, parts[part] = split_examples(train, wanted, config.split_seed)
    splits = Splits(
        train=train,
        validation=as_answers(spread_out(parts["validation"], config.validation_rows)),
        test=as_answers(spread_out(parts["test"], config.test_rows)),
    )
    if data.score != "loss":
        texts = sorted({part.source for part in vars(splits).values() if part.format == "text"})
        if texts:
            raise DataError(
                f"{', '.join(texts)} is plain text, which has no answers: score={data.score!r} cannot be had. Expected "
                "prompts with completions, or score: loss"
            )
    if data.score == "labels":
        _check_labels(name, data, splits)
    if config.reward:
        as_prompts(splits.test)  # which says why, if it cannot be asked
    for variant in config.variants:
        if variant.objective == "grpo":
            completion_length(policy_config(config, data, variant))  # and what is wrong with its options
    return splits


def policy_config(config: CompareConfig, data: DataConfig, variant: Variant) -> TrainConfig:
    """A run of `theodora train` that learns as a variant of objective grpo does.

    Raises:
        ConfigError: naming every option that makes no sense.
    """
    own: dict[str, Any] = {"max_completion_length": data.max_new_tokens, **variant.policy}
    own |= {} if variant.beta is None else {"beta": variant.beta}
    rows = config.batch_size * own.get("num_generations", PolicySettings.num_generations)
    options = {"model": "m", "data": "d", "output": "o", "objective": "grpo", "reward": list(config.reward)}
    options |= {"max_length": config.max_length, "per_device_train_batch_size": rows, "gradient_accumulation_steps": 1}
    try:
        made = TrainConfig.from_options(options | own, granted=["reward"])
        settings = settings_of(made)
        assert isinstance(settings, PolicySettings)
        steps_at_once(settings, rows, 1, 1)
    except ConfigError as error:
        raise ConfigError(f"methods: {variant.name}: {error}") from error
    return made


def _check_labels(name: str, data: DataConfig, splits: Splits) -> None:
    labels = labels_for(data, splits) or []
    rows = len(splits.train) + len(splits.validation) + len(splits.test)
    if len(labels) < 2:
        raise DataError(f"all {rows:,} rows have the same answer; a choice needs at least two labels")
    if data.labels == "auto" and len(labels) > max(50, rows // 10):
        raise DataError(
            f"{rows:,} rows have {len(labels):,} different answers: that is no closed set of labels. Name the labels, "
            "or choose another score"
        )
    for part in (splits.validation, splits.test):
        strange = answers_of(part) - {label.strip() for label in labels}
        if strange:
            raise DataError(f"{part.source}: answers that are none of the labels: {', '.join(sorted(strange)[:5])}")


def _general(config: CompareConfig, source: str) -> tuple[Examples, Examples]:
    texts = read_general(source)
    if any(variant.replay for variant in config.variants):
        if len(texts) <= config.general_rows:
            raise ConfigError(
                f"{source} has {len(texts)} texts, and general_rows takes {config.general_rows}: none is left for "
                "replay"
            )
        left, scored = split_examples(texts, config.general_rows, config.split_seed)
        return scored, left
    return spread_out(texts, config.general_rows), texts


def _task(
    config: CompareConfig, data: DataConfig, splits: Splits, tokenizer: PreTrainedTokenizerBase, window: int
) -> Task:
    labels = labels_for(data, splits)
    answered = data.score not in ("labels", "loss")

    def asked(examples: Examples, *, scored: bool = True) -> Questions:
        return questions(
            examples,
            tokenizer,
            max_length=window,
            use_chat_template=config.use_chat_template,
            answered=answered and scored,
            labels=labels if scored else None,
        )

    return Task(
        rows=_rows(as_answers(splits.train), tokenizer, min(config.max_length, window), config.use_chat_template),
        pairs=_pairs(splits.train, tokenizer, min(config.max_length, window), config.use_chat_template),
        validation=asked(splits.validation),
        curve=asked(spread_out(splits.validation, config.curve_rows), scored=False),
        test=asked(splits.test),
        other=asked(spread_out(splits.test, config.other_rows)) if config.other_rows else None,
        asked=_asked(config, data, splits.train, tokenizer, window),
        judged=_judged(config, data, splits.test, tokenizer, window),
        commonest=_commonest(splits.test) if data.score in ("labels", "exact-match") else None,
    )


def _asked(
    config: CompareConfig, data: DataConfig, examples: Examples, tokenizer: PreTrainedTokenizerBase, window: int
) -> Prompts | None:
    learning = [variant for variant in config.variants if variant.objective == "grpo"]
    if not learning:
        return None
    longest = max(completion_length(policy_config(config, data, variant)) for variant in learning)
    return _prompts(config, examples, tokenizer, min(config.max_length, window) - longest)


def _judged(
    config: CompareConfig, data: DataConfig, examples: Examples, tokenizer: PreTrainedTokenizerBase, window: int
) -> Prompts | None:
    return _prompts(config, examples, tokenizer, window - data.max_new_tokens) if config.reward else None


def _prompts(config: CompareConfig, examples: Examples, tokenizer: PreTrainedTokenizerBase, room: int) -> Prompts:
    if room < 1:
        raise ConfigError(
            "the model's window has no room for a prompt beside the longest completion; lower max_completion_length or "
            "max_new_tokens"
        )
    asked = as_prompts(examples)
    rows = tokenize_prompts(asked, tokenizer, max_prompt=room, use_chat_template=config.use_chat_template)
    return Prompts(tokens=list(rows["input_ids"]), rows=list(rows["row"]), told=PromptRows(asked))


def _commonest(examples: Examples) -> float:
    counts = Counter(reference_answer(row).strip() for row in examples.dataset)  # pyright: ignore[reportArgumentType]
    return max(counts.values()) / len(examples)


def _pairs(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int, use_chat_template: bool | None
) -> list[Row]:
    if examples.format != "preference":
        return []
    tokens = tokenize_preferences(examples, tokenizer, max_length=max_length, use_chat_template=use_chat_template)
    return [Row(**sequence) for row in tokens for sequence in parted(row)]


def _rows(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int, use_chat_template: bool | None
) -> list[Row]:
    tokens = tokenize(examples, tokenizer, max_length=max_length, use_chat_template=use_chat_template)
    return [
        Row(input_ids=ids, labels=labels) for ids, labels in zip(tokens["input_ids"], tokens["labels"], strict=True)
    ]
