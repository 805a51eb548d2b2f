"""A deterministic held-out split that never has the same row on both sides."""

from __future__ import annotations

import hashlib
import json
import random

from theodora.config import is_int
from theodora.data.examples import Examples
from theodora.errors import ConfigError


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
    rows = len(examples)
    wanted = _wanted(held_out, rows)
    if wanted == 0:
        return examples, examples.with_dataset(examples.dataset.select([]))
    groups: dict[bytes, list[int]] = {}
    for index, row in enumerate(examples.dataset):
        groups.setdefault(_key(row), []).append(index)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    chosen: set[int] = set()
    for group in shuffled:
        if len(chosen) + len(group) <= wanted:
            chosen.update(group)
    if not chosen:
        raise ConfigError(
            f"Cannot hold out {wanted} of {rows} rows: identical rows have to stay together, and no row of "
            f"{examples.source} has that few copies; remove the copies or give evaluation data of its own"
        )
    training = examples.dataset.select([index for index in range(rows) if index not in chosen])
    return examples.with_dataset(training), examples.with_dataset(examples.dataset.select(sorted(chosen)))


def _wanted(held_out: float | int, rows: int) -> int:
    if is_int(held_out) and 0 <= held_out < rows:
        return int(held_out)
    if isinstance(held_out, float) and 0 <= held_out < 1 and (not held_out or rows > 1):
        return min(max(round(held_out * rows), int(held_out > 0)), rows - 1)
    raise ConfigError(
        f"held_out is {held_out!r}; expected a share of at least 0 and less than 1 (a float), or a number of rows "
        f"(an int) less than the {rows:,} there are"
    )


def _key(row: object) -> bytes:
    text = json.dumps(row, sort_keys=True, ensure_ascii=False)
    for escaped in (r"\n", r"\r", r"\t"):
        text = text.replace(escaped, "")
    return hashlib.blake2b("".join(text.split()).casefold().encode(), digest_size=16).digest()
