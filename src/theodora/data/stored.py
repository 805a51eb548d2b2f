"""Rows of Arrow tables as plain values: of what datasets would decode, only JSON text is.

A table says of its own columns that they hold pictures, sounds or pages, and datasets then opens whatever path or
address stands in each row, used or not, offline or not. Nothing is learned from those here: they stay as stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, cast

from datasets import Features, Json, LargeList, List, Value

_AT_ONCE = 64 << 20
"""Bytes of rows that become values together."""


def json_columns(features: Features | None) -> Features:
    """The columns that hold JSON text, at any depth, with nothing else in them that datasets would decode."""
    plain = {name: _json_alone(feature) for name, feature in (features or {}).items()}
    return Features({name: feature for name, feature in plain.items() if "Json(" in repr(feature)})


def plain_rows(table: Any, json: Features) -> Iterator[dict[str, Any]]:
    """The rows of a pyarrow table or record batch.

    Args:
        table: a few rows, which become values all at once, or one by one where they hold much (pictures as bytes).
        json: what `json_columns` found in the features of the table.
    """
    parts = [table] if table.nbytes <= _AT_ONCE else (table.slice(at, 1) for at in range(table.num_rows))
    for part in parts:
        for row in part.to_pylist(maps_as_pydicts="strict"):
            yield row | json.decode_example({name: row[name] for name in json})


def plain_columns(table: Any, features: Features) -> dict[str, list[Any]]:
    """The columns of a few rows of a data set of ours: strings, and lists of JSON texts, which are decoded together.

    Args:
        table: the rows, as a pyarrow table.
        features: of the data set.
    """
    return {name: _decoded(table.column(name), features[name]) for name in table.column_names}


def _decoded(column: Any, feature: Any) -> list[Any]:
    if not isinstance(feature, List) or not isinstance(feature.feature, Json):
        return column.to_pylist()
    lists = [part for part in column.chunks if len(part)]
    texts = [text for part in lists for text in part.flatten().storage.to_pylist()]
    counts = [count for part in lists for count in part.value_lengths().to_pylist()]
    # Decoding one by one takes several calls for each turn of each row.
    together = f"[{','.join('null' if text is None else text for text in texts)}]"
    values = iter(cast("list[Any]", feature.feature.decode_example(together)))
    return [None if count is None else list(islice(values, count)) for count in counts]


def _json_alone(feature: Any) -> Any:
    """A feature of the same shape in which only JSON text is left to decode; others' kinds of features included."""
    if isinstance(feature, dict):
        return {name: _json_alone(inner) for name, inner in feature.items()}
    if isinstance(feature, list | tuple):
        return [_json_alone(inner) for inner in feature]
    if isinstance(feature, List | LargeList):
        return List(_json_alone(feature.feature))
    return feature if isinstance(feature, Json) and feature.decode else Value("null")
