"""Tokens that rows use, and the rows that a model has for them.

A tokenizer may have more tokens than its model has rows, for a padding token, say, that nothing ever looks up. Only
what is looked up needs a row.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from datasets import Dataset

from theodora.errors import ConfigError, bullet_list

_SHOWN = 12


def model_rows(model: Any) -> int:
    """How many tokens a transformers model has rows for, in its embedding and its output head."""
    rows = [sys.maxsize]  # some models do not say where their tokens' rows are
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        with suppress(NotImplementedError, AttributeError):
            weight = getattr(get(), "weight", None)
            rows += [] if weight is None else [len(weight)]
    return min(rows)


def missing_rows(rows: Iterable[Sequence[int]], have: int) -> dict[int, int]:
    """Token id -> how many rows use it, of the tokens that the model has no row for."""
    counts: dict[int, int] = {}
    for row in rows:
        if row and max(row) >= have:
            for token in sorted({token for token in row if token >= have}):
                counts[token] = counts.get(token, 0) + 1
    return dict(sorted(counts.items()))


def missing_in(datasets: Iterable[Dataset], have: int) -> dict[int, int]:
    """`missing_rows` of tokenised data sets, which are read in full only where there is something to find."""
    counts: dict[int, int] = {}
    for dataset in datasets:
        chunks: list[Any] = dataset.data.column("input_ids").chunks
        if max((ids.to_numpy().max() for chunk in chunks if len(ids := chunk.flatten())), default=0) >= have:
            for token, count in missing_rows(dataset["input_ids"], have).items():
                counts[token] = counts.get(token, 0) + count
    return dict(sorted(counts.items()))


def safe_padding(model: Any, tokenizer: Any) -> int:
    """An id to pad with: the tokenizer's, or one that the model has a row for. Its settings never name another.

    What is padded is masked, so that any row will do.
    """
    have, pad = model_rows(model), tokenizer.pad_token_id
    safe = pad if pad is not None and pad < have else 0
    every: list[Any] = [model.config, model.config.get_text_config(), getattr(model, "generation_config", None)]
    for settings in filter(None, every):
        if (getattr(settings, "pad_token_id", None) or 0) >= have:
            settings.pad_token_id = safe
    return safe


def check_rows(rows: Iterable[Sequence[int]], model: Any, tokenizer: Any, where: str, mend: str) -> None:
    """Check that a model has a row for every token of some rows, before a lookup fails (on a GPU without a name).

    Args:
        rows: token ids.
        model: a transformers model.
        tokenizer: says what the ids stand for.
        where: the rows come from.
        mend: what to do about it, as a sentence.

    Raises:
        ConfigError: naming every token without a row.
    """
    have = model_rows(model)
    missing = missing_rows(rows, have)
    if missing:
        raise ConfigError(f"{describe_missing(missing, have, tokenizer, where)}\n{mend}")


def describe_missing(missing: dict[int, int], have: int, tokenizer: Any, where: str) -> str:
    """The tokens of `missing_rows` by name."""
    names = [
        f"{tokenizer.convert_ids_to_tokens(token)!r} ({token}) in {count:,} {'row' if count == 1 else 'rows'}"
        for token, count in missing.items()
    ]
    what = "a token" if len(missing) == 1 else f"{len(missing)} tokens"
    return f"{where} uses {what} that the model, whose vocabulary has {have:,} rows, has no row for:" + bullet_list(
        names, _SHOWN
    )
