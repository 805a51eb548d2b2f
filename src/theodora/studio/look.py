"""What needs torch, transformers and datasets to be known: a file of data as a model will see it, and what fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from theodora.config import TrainConfig
from theodora.data import (
    Examples,
    encode_prompt,
    fallback_chat_template,
    load_examples,
    near_copies,
    tokenize,
    tokenize_preferences,
)
from theodora.data.left_out import sentences
from theodora.data.sequences import parted
from theodora.data.split import default_held_out, keys_of, parts_of, rows_held_out, spread_out
from theodora.errors import ConfigError, TheodoraError
from theodora.files.model_folder import has_tokenizer
from theodora.files.tokenizer import load_tokenizer
from theodora.kernels.cross_entropy import IGNORED
from theodora.serve.text import Writer
from theodora.train.objectives import kind_of

_SHOWN, _MEASURED = 12, 2000
_MOST_TOKENS, _MOST_TEXT = 1500, 4000
_BINS = 24
_PAIRS = 20  # near copies that are shown


def look_at_data(
    path: str,
    model: str = "",
    *,
    eval_data: str = "",
    objective: str = "sft",
    max_length: int = 1024,
    train_on: str = "completion",
) -> dict[str, Any]:
    """A source of rows: what it is, what is left out, lengths, near copies, and the first rows token by token.

    Args:
        path: a file, a folder or a name on the hub, as `--data` takes it.
        model: whose tokenizer reads the rows, or an adapter's folder that has one; without it rows are shown as text.
        eval_data: rows to evaluate on; without them those that a run would hold out.
        objective: which decides what the rows have to be.
        max_length: tokens after which a row is cut.
        train_on: as in training.

    Raises:
        DataError: naming what is wrong, by line.
        CheckpointError: the model has no tokenizer that loads.
    """
    examples = load_examples(path, kind=kind_of(objective))
    keys = keys_of(examples)
    found: dict[str, Any] = {
        "format": examples.format,
        "rows": len(examples),
        "description": examples.description,
        "left_out": sentences(examples.left_out),
        "copies": len(examples) - len(np.unique(keys)),
        "near": _near(examples, keys, eval_data, objective),
        "shown": [],
        "lengths": None,
        "note": "",
    }
    first = examples.dataset.select(range(min(_SHOWN, len(examples))))
    if not model:
        found["shown"] = [_as_text(row) for row in first]
        return found
    tokenizer = _tokenizer(model)
    if tokenizer.chat_template is None and not isinstance(first[0].get("prompt", first[0].get("text", [])), str):
        tokenizer.chat_template = fallback_chat_template(tokenizer)
    found["shown"] = _rows(examples.with_dataset(first), tokenizer, objective, max_length, train_on)
    if objective != "grpo":
        measured = spread_out(examples, _MEASURED)
        rows = _tokenised(measured, tokenizer, objective, max_length, train_on)
        whole = _tokenised(measured, tokenizer, objective, _longer(max_length), train_on)
        found["lengths"] = _lengths(whole, rows, max_length) | {"of": len(measured)}
        found["note"] = rows.info.description
    return found


def _near(examples: Examples, keys: Any, eval_data: str, objective: str) -> dict[str, Any] | None:
    """Near copies between the rows to train on and those held out, side by side; None where nothing is held out."""
    if eval_data:
        training, held_out, places = examples, load_examples(eval_data, kind=kind_of(objective)), None
    else:
        seed: Any = next(f.default for f in fields(TrainConfig) if f.name == "seed")
        try:
            chosen = rows_held_out(examples, default_held_out(len(examples)), seed, keys)
        except ConfigError:  # the rows are copies of one another
            return None
        training, held_out = parts_of(examples, chosen)
        places = np.flatnonzero(~chosen), np.flatnonzero(chosen)
    if not len(held_out):
        return None
    copies = near_copies(training, held_out, places)
    whole = (examples if places else held_out).dataset, examples.dataset
    return {
        "count": len(copies.found),
        "held_out": copies.held_out,
        "training": copies.training,
        "totals": [len(held_out), len(training)],
        "pairs": [
            {
                "row": each.row + 1,
                "of": each.of + 1,
                "share": each.share,
                "sides": [_as_text(whole[0][each.row])["parts"], _as_text(whole[1][each.of])["parts"]],
            }
            for each in copies.found[:_PAIRS]
        ],
    }


@lru_cache(maxsize=4)
def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(model if not has_tokenizer(model) else str(Path(model).expanduser()))


def _tokenised(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, objective: str, max_length: int, train_on: Any
) -> Dataset:
    if objective != "sft":
        return tokenize_preferences(examples, tokenizer, max_length=max_length, cut=objective != "reward")
    return tokenize(examples, tokenizer, max_length=max_length, train_on=train_on)


def _rows(
    first: Examples, tokenizer: PreTrainedTokenizerBase, objective: str, max_length: int, train_on: str
) -> list[dict[str, Any]]:
    """Each row as its sequences, in pieces of text with what becomes of them."""
    if objective == "grpo":
        return [_prompt(row, tokenizer, max_length) for row in first.dataset]
    # Longer than they will be, so that what is cut off can be shown.
    longer = _longer(max_length)
    try:
        rows = _tokenised(first, tokenizer, objective, longer, train_on)
        if len(rows) == len(first):
            return [_row(row, first.format, tokenizer, objective, max_length) for row in rows]
    except TheodoraError as error:
        if len(first) == 1:
            return [_as_text(first.dataset[0]) | {"problem": str(error)}]
    # A row has come to nothing, or to several: each by itself, so that it is known which.
    alone = (first.with_dataset(first.dataset.select([i])) for i in range(len(first)))
    return [_alone(one, tokenizer, objective, longer, max_length, train_on) for one in alone]


def _longer(max_length: int) -> int:
    """How much of a row is looked at, to tell what is cut off from what is kept."""
    return max(4 * max_length, 64)


def _alone(
    one: Examples,
    tokenizer: PreTrainedTokenizerBase,
    objective: str,
    longer: int,
    max_length: int,
    train_on: str,
) -> dict[str, Any]:
    try:
        row = _tokenised(one, tokenizer, objective, longer, train_on)[0]
    except TheodoraError as error:
        return _as_text(one.dataset[0]) | {"problem": str(error)}
    return _row(row, one.format, tokenizer, objective, max_length)


def _prompt(row: Any, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Any]:
    try:
        ids = encode_prompt(row, tokenizer)
    except TheodoraError as error:
        return _as_text(row) | {"problem": str(error)}
    return {"parts": [_part("prompt", ids, [IGNORED] * len(ids), tokenizer, max_length)], "problem": ""}


def _row(row: Any, format: str, tokenizer: PreTrainedTokenizerBase, objective: str, max_length: int) -> dict[str, Any]:
    names, sequences = _sequences(row, format)
    parts = [
        _part(name, sequence["input_ids"], sequence["labels"], tokenizer, max_length)
        for name, sequence in zip(names, sequences, strict=True)
    ]
    if objective == "reward" and any(part["tokens"] > max_length for part in parts):
        return {"parts": parts, "problem": f"dropped: longer than {max_length:,} tokens"}
    dropped = any(not part["learned"] for part in parts)
    return {"parts": parts, "problem": f"dropped: nothing to learn within {max_length:,} tokens" if dropped else ""}


def _sequences(row: Mapping[str, Any], format: str) -> tuple[Sequence[str], Sequence[Mapping[str, list[int]]]]:
    if "lengths" not in row:
        return [""], [row]
    both = parted(row)
    if format == "unpaired":
        return ["good answer" if row["label"] else "bad answer"], both[:1]
    return ["better answer", "worse answer"], both


def _part(
    name: str, ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Any]:
    kinds = [
        "cut" if at >= max_length else "learned" if label != IGNORED and at else "seen"
        for at, label in enumerate(labels)
    ]
    shown = min(len(ids), _MOST_TOKENS)
    return {
        "name": name,
        "tokens": len(ids),
        "learned": kinds.count("learned"),
        "pieces": list(_pieces(ids[:shown], kinds[:shown], tokenizer)),
        "more": len(ids) - shown,
    }


def _pieces(ids: Sequence[int], kinds: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, str]]:
    """The text of each token; of those that share a character together."""
    writer = Writer(tokenizer, skip_special=False)
    writer.write(ids, finished=True)
    ends = [*writer.offsets[1:], len(writer.text)]
    for begin, end, kind in zip(writer.offsets, ends, kinds, strict=True):
        if end > begin:
            yield {"text": writer.text[begin:end], "kind": kind}


def _as_text(row: Any) -> dict[str, Any]:
    """A row as it was read, where there is no tokenizer: nothing is known of its tokens."""
    parts = []
    for name, value in row.items():
        if value in (None, "", []):
            continue
        turns = value if isinstance(value, list) else [{"role": name, "content": value}]
        parts += [
            {
                "name": str(turn.get("role", name)) if isinstance(value, list) else name,
                "pieces": [{"text": str(turn.get("content") or turn)[:_MOST_TEXT], "kind": "plain"}],
                "tokens": None,
                "learned": None,
                "more": 0,
            }
            for turn in turns
            if isinstance(turn, dict)
        ]
    return {"parts": parts, "problem": ""}


def _lengths(whole: Dataset, rows: Dataset, max_length: int) -> dict[str, Any]:
    """Of rows as they are, as far as they are looked at; what is learned is that of rows as they are cut."""
    lengths = sorted(map(len, whole["input_ids"]))
    bins = [0] * _BINS
    for length in lengths:
        bins[min(_BINS - 1, (length - 1) * _BINS // lengths[-1])] += 1
    return {
        "shortest": lengths[0],
        "median": lengths[len(lengths) // 2],
        "longest": lengths[-1],
        "bins": bins,
        "cut": sum(length > max_length for length in lengths),
        "tokens": sum(map(len, rows["input_ids"])),
        "learned": sum(sum(label != IGNORED for label in row[1:]) for row in rows["labels"]),
    }


def look_at_plan(options: Mapping[str, Any]) -> dict[str, Any]:
    """Whether a run fits this machine, from configurations alone.

    Raises:
        ConfigError: the options make no sense, also to TRL; or the adapter does not fit the model.
        CheckpointError: the model has no configuration that can be read.
    """
    from dataclasses import replace

    from theodora.files.model_folder import base_model_of
    from theodora.plan import fits, machine
    from theodora.plan.fits import read_config, size
    from theodora.train.arguments import sft_arguments

    config = TrainConfig.from_options(options)
    if not config.model and config.from_adapter is not None:
        config = replace(config, model=base_model_of(config.from_adapter))
    sft_arguments(config, Path(config.output) / "checkpoints")
    where = machine()
    model_config = read_config(config)
    verdict = fits(config, where, model_config=model_config)
    return {
        "fits": verdict.fits,
        "splits": verdict.splits,
        "message": verdict.message,
        "taken": None if verdict.estimate is None else size(verdict.estimate.taken),
        "memory": size(where.memory),
        "device": where.device,
        "family": str(getattr(model_config, "model_type", "")),
    }
