"""What Arrow's rows unfold to, against the same rows as Python values."""

import numpy as np
import pyarrow as pa
import pytest

from theodora.data.arrow_sizes import is_compressed, may_repeat, row_sizes, table_size
from theodora.data.unfolded_size import size_of

WORDS = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 0], pa.int32()), pa.array(["a" * 100, "b"]))
REPEATING = {
    "dictionary": WORDS,
    "dictionary in lists": pa.ListArray.from_arrays([0, 2, 2, 3, 4], WORDS),
    "list views": pa.ListViewArray.from_arrays([0, 0, 1, 0], [2, 2, 1, 2], pa.array(["abc", "d"])),
    "text views": pa.array(["abc", "x" * 50, None, ""], pa.string_view()),
    "runs": pa.RunEndEncodedArray.from_arrays(pa.array([3, 4], pa.int32()), pa.array(["x" * 10, "y"])),
    "nulls": pa.nulls(4),
}
PLAIN = {
    "lists": pa.array([["ab", "c"], None, [], ["d"]]),
    "lists of one length": pa.array([[1, 2], [3, 4], None, [5, 6]], pa.list_(pa.int64(), 2)),
    "structs": pa.array([{"a": "xx", "b": 1}, {"a": "z", "b": 2}, {"a": None, "b": None}, {"a": "y", "b": 0}]),
    "maps": pa.array([[("a", "bb")], [], None, [("c", "d"), ("e", "f")]], pa.map_(pa.string(), pa.string())),
    "bytes": pa.array([b"abc", b"", None, b"d"]),
    "numbers": pa.array([1, 2, 3, None]),
}


@pytest.mark.parametrize("name", [*REPEATING, *PLAIN])
def test_sizes_are_those_of_the_values(name):
    column = (REPEATING | PLAIN)[name]
    for part in (column, column.slice(1, 2)):
        batch = pa.record_batch([part], names=["a"])
        # A pair of a map counts for a value more.
        spare = 16 * max((len(value) for value in part.to_pylist() if name == "maps" and value), default=0)
        found = row_sizes(batch) - [size_of(value) for value in part.to_pylist()]
        assert (np.abs(found) <= spare).all()
    assert may_repeat(pa.schema([("a", column.type)])) == (name in REPEATING)


def test_counting_stops():
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([10**12], pa.int64()), pa.array(["x"]))
    assert table_size(pa.table({"a": runs}), 1 << 30) == 16 * 10**12
    assert table_size(pa.table({"a": WORDS}), 1 << 30) == 116 + 17 + 16 + 116


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_compressed_streams_are_known_by_their_header(compression, tmp_path):
    table, options = pa.table({"a": WORDS}), pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(tmp_path / "a"), "wb") as file, pa.ipc.new_stream(file, table.schema, options=options) as writer:
        writer.write_table(table)
    assert is_compressed(tmp_path / "a") == (compression is not None)
