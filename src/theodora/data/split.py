"""A deterministic held-out split that never has the same row on both sides."""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theodora.config import is_int
from theodora.data.examples import Examples
from theodora.errors import ConfigError

_HELD_OUT_SHARE, _HELD_OUT_ROWS = 0.05, 200  # the default split


def split_examples(examples: Examples, held_out: float | int, seed: int) -> tuple[Examples, Examples]:
    """Split into rows for training and rows held out, each in the order of the source.

    Rows that differ in case and white space only count as identical and stay together.

    Args:
        examples: what to split.
        held_out: a share of the rows (a float in [0, 1)) or a number of rows (an int). Copies of one row that would go
            beyond it are left in training. A positive share holds out one row at least.
        seed: the same seed and rows give the same split.

    Raises:
        ConfigError: nothing would be left to train on, or `held_out` makes no sense.
    """
    return parts_of(examples, rows_held_out(examples, held_out, seed))


def parts_of(examples: Examples, held_out: NDArray[np.bool_]) -> tuple[Examples, Examples]:
    """The rows for training, and the rows held out, from which rows these are, (rows,)."""
    if not held_out.any():
        return examples, examples.with_dataset(examples.dataset.select([]))
    training, other = (examples.dataset.select(np.flatnonzero(part)) for part in (~held_out, held_out))
    return examples.with_dataset(training), examples.with_dataset(other)


def default_held_out(rows: int) -> int:
    """How many of so many rows are held out where nobody says how many."""
    return min(_HELD_OUT_ROWS, max(1, round(_HELD_OUT_SHARE * rows))) if rows > 1 else 0


def rows_held_out(
    examples: Examples, held_out: float | int, seed: int, keys: NDArray[np.uint64] | None = None
) -> NDArray[np.bool_]:
    """Which rows `split_examples` holds out, (rows,).

    Args:
        examples: as there, like what follows.
        held_out: rows, or a share of them.
        seed: of the draw.
        keys: `keys_of` the rows, if they are known.

    Raises:
        ConfigError: as there.
    """
    rows = len(examples)
    wanted = _wanted(held_out, rows)
    if wanted == 0:
        return np.zeros(rows, bool)
    keys = keys_of(examples) if keys is None else keys
    _, first, group_of = np.unique(keys, return_index=True, return_inverse=True)
    sizes = np.bincount(group_of)
    order = np.argsort(first, kind="stable")  # the groups as they appear
    random.Random(seed).shuffle(order)  # pyright: ignore[reportArgumentType]  (any sequence whose items can be set)
    left, taken = wanted, np.zeros(len(sizes), bool)
    for group in order:
        if sizes[group] <= left:
            taken[group] = True
            left -= int(sizes[group])
        if not left:
            break
    chosen = taken[group_of]
    if not chosen.any():
        raise ConfigError(
            f"Cannot hold out {wanted} of {rows} rows: identical rows have to stay together, and no row of "
            f"{examples.source} has that few copies; remove the copies or give evaluation data of its own"
        )
    return chosen


def keys_of(examples: Examples) -> NDArray[np.uint64]:
    """A number for each row, (rows,): the same for rows that differ in case and white space alone."""
    # Arrays of numbers: dictionaries and lists would take ten times the memory, for millions of rows gigabytes.
    return np.fromiter((_key(row) for row in examples.dataset), np.uint64, len(examples))


def spread_out(examples: Examples, count: int | None) -> Examples:
    """`count` rows of a source, which may be sorted: picked at even distances. None, or more than there are: all."""
    total = len(examples)
    if count is None or count >= total:
        return examples
    return examples.with_dataset(examples.dataset.select([i * total // count for i in range(count)]))


def _wanted(held_out: float | int, rows: int) -> int:
    if is_int(held_out) and 0 <= held_out < rows:
        return int(held_out)
    if isinstance(held_out, float) and 0 <= held_out < 1 and (not held_out or rows > 1):
        return min(max(round(held_out * rows), int(held_out > 0)), rows - 1)
    raise ConfigError(
        f"held_out is {held_out!r}; expected a share of at least 0 and less than 1 (a float), or a number of rows "
        f"(an int) less than the {rows:,} there are"
    )


def _key(row: Any) -> int:
    """Eight bytes that stand for a row. Two rows that share them by chance would only stay together.

    A prompt is the same whatever stands beside it.
    """
    row = row["prompt"] if "columns" in row else row
    text = json.dumps(row, sort_keys=True, ensure_ascii=False)
    for escaped in (r"\n", r"\r", r"\t"):
        text = text.replace(escaped, "")
    return int.from_bytes(hashlib.blake2b("".join(text.split()).casefold().encode(), digest_size=8).digest(), "little")
