"""The size of Arrow rows as Python values, computed without making the values.

In Arrow one stored value can stand for many: in dictionaries, runs, and lists and texts whose views overlap. A size is
computed once for each stored value and looked up by the same indices, so that a row costs eight bytes however large its
values are.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from theodora.data.unfolded_size import VALUE
from theodora.errors import DataError

_MOST_VALUES = 1 << 27
"""Values in one array, at most: lists of nulls, and runs, stand for any number of them in no bytes."""
_ROWS_AT_ONCE = 10_000
"""Rows whose sizes are in memory together."""


def row_sizes(batch: pa.RecordBatch) -> Any:
    """Bytes that each row takes as Python values, nearly (a numpy array)."""
    total = np.zeros(batch.num_rows, dtype=np.int64)
    for column in batch.columns:
        total += _sizes(column)
    return total


def may_repeat(schema: Any) -> bool:
    """Whether some column has a form in which one stored value can stand for many."""
    repeats = (
        pa.types.is_dictionary,
        pa.types.is_run_end_encoded,
        pa.types.is_string_view,
        pa.types.is_binary_view,
        pa.types.is_list_view,
        pa.types.is_large_list_view,
        pa.types.is_null,
        pa.types.is_union,
    )

    def within(kind: Any) -> bool:
        kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
        return any(is_kind(kind) for is_kind in repeats) or any(
            within(kind.field(at).type) for at in range(kind.num_fields)
        )

    return any(within(field.type) for field in schema)


def table_size(table: Any, most: int) -> int:
    """Bytes that all rows of a table take; counting stops above `most`."""
    size = 0
    if (least := table.num_rows * table.num_columns * VALUE) > most:
        return least
    for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE):
        size += int(row_sizes(batch).sum())
        if size > most:
            break
    return size


def file_size(path: Path, most: int) -> int:
    """Bytes that the rows of an Arrow stream take, if that cannot be seen from the file's size (else 0).

    While datasets opens a data set it makes all those values in memory: the size has to be known before.
    """
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        if not may_repeat(stream.schema):
            return 0
        table = stream.read_all()
        if (least := table.num_rows * table.num_columns * VALUE) > most:
            return least
        table.validate(full=True)
        return table_size(table, most)


def _sizes(array: Any) -> Any:
    kind, count = array.type, len(array)
    if count > _MOST_VALUES:
        raise DataError(f"An Arrow array unfolds to {count:,} values at once; expected at most {_MOST_VALUES:,}.")
    if isinstance(kind, pa.BaseExtensionType):
        return _sizes(array.storage)
    if pa.types.is_dictionary(kind):
        return _looked_up(_sizes(array.dictionary), array.indices.fill_null(0).to_numpy(), array)
    if pa.types.is_run_end_encoded(kind):
        ends = array.run_ends.to_numpy()
        return _sizes(array.values)[np.searchsorted(ends, array.offset + np.arange(count), side="right")]
    if pa.types.is_struct(kind):
        return sum((_sizes(array.field(at)) for at in range(kind.num_fields)), _one_value_each(array))
    if _is_list_or_map(kind):
        return _list_sizes(array)
    if pa.types.is_union(kind):
        return _union_sizes(array)
    return _one_value_each(array) + _lengths(array)


def _looked_up(sizes: Any, indices: Any, array: Any) -> Any:
    if not len(sizes):
        return _one_value_each(array)
    return np.where(array.is_valid().to_numpy(zero_copy_only=False), sizes[indices], VALUE)


def _one_value_each(array: Any) -> Any:
    return np.full(len(array), VALUE, dtype=np.int64)


def _lengths(array: Any) -> Any:
    kind = array.type
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):  # no function of Arrow's tells their lengths
        if not len(array):
            return 0
        views = np.frombuffer(array.buffers()[1], dtype=np.int32).reshape(-1, 4)
        return views[array.offset : array.offset + len(array), 0].astype(np.int64)
    if pa.types.is_fixed_size_binary(kind):
        return kind.byte_width
    if any(is_kind(kind) for is_kind in (pa.types.is_binary, pa.types.is_string, pa.types.is_large_binary)) or (
        pa.types.is_large_string(kind)
    ):
        lengths = pc.call_function("binary_length", [array])
        return lengths.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return 0


def _is_list_or_map(kind: Any) -> bool:
    return any(
        is_kind(kind)
        for is_kind in (
            pa.types.is_list,
            pa.types.is_large_list,
            pa.types.is_fixed_size_list,
            pa.types.is_list_view,
            pa.types.is_large_list_view,
            pa.types.is_map,
        )
    )


def _list_sizes(array: Any) -> Any:
    kind, count = array.type, len(array)
    if pa.types.is_fixed_size_list(kind):
        starts = (array.offset + np.arange(count, dtype=np.int64)) * kind.list_size
        ends, values = starts + kind.list_size, array.values
    elif pa.types.is_map(kind):
        offsets = array.offsets.to_numpy()
        starts, ends = offsets[:-1], offsets[1:]
        values = pa.StructArray.from_arrays([array.keys, array.items], names=["key", "value"])
    else:
        offsets, values = array.offsets.to_numpy(), array.values
        is_view = pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)
        starts, ends = (
            (offsets, offsets + array.sizes.to_numpy().astype(np.int64)) if is_view else (offsets[:-1], offsets[1:])
        )
    if not count:
        return _one_value_each(array)
    low, high = int(starts.min()), max(int(ends.max()), int(starts.min()))
    sums = np.concatenate([[0], np.cumsum(_sizes(values.slice(low, high - low)))])
    within = sums[ends.astype(np.int64) - low] - sums[starts.astype(np.int64) - low]
    return _one_value_each(array) + np.where(array.is_valid().to_numpy(zero_copy_only=False), within, 0)


def _union_sizes(array: Any) -> Any:
    parts = [_sizes(array.field(at)) for at in range(array.type.num_fields)]
    if array.type.mode == "sparse":
        return sum(parts, _one_value_each(array))
    codes, places, sizes = array.type_codes.to_numpy(), array.offsets.to_numpy(), _one_value_each(array)
    for code, part in zip(array.type.type_codes, parts, strict=True):
        sizes[codes == code] += part[places[codes == code]]
    return sizes


def is_compressed(path: Path) -> bool:
    """Whether an Arrow stream has compressed buffers, which reading decompresses before their size can be checked.

    Nothing that writes data sets writes such streams. The header of a message is a flatbuffer, in which this is one
    field: https://github.com/apache/arrow/blob/main/format/Message.fbs
    """
    with pa.memory_map(str(path)) as file:
        for message in pa.ipc.MessageReader.open_stream(file):
            if message.type not in ("record batch", "dictionary"):
                continue
            header = message.metadata.to_pybytes()
            root = struct.unpack_from("<I", header)[0]
            batch = _table(header, root, 2)
            if message.type == "dictionary" and batch is not None:
                batch = _table(header, batch, 1)
            if batch is not None and _table(header, batch, 3) is not None:
                return True
    return False


def _table(header: bytes, table: int, field: int) -> int | None:
    """Where a table within a table of a flatbuffer begins."""
    described = table - struct.unpack_from("<i", header, table)[0]
    if 4 + 2 * field >= struct.unpack_from("<H", header, described)[0]:
        return None
    place = struct.unpack_from("<H", header, described + 4 + 2 * field)[0]
    return table + place + struct.unpack_from("<I", header, table + place)[0] if place else None
