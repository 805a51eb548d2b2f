"""What of a table's columns is decoded: JSON text, at any depth, and nothing beside it."""

from dataclasses import dataclass, field

import pyarrow as pa
import pytest
from datasets import Features, Image, Json, LargeList, List, Value

from theodora.data.stored import json_columns, plain_rows


@dataclass
class Foreign:
    """A kind of column that another package registered; it has no `decode` to switch off."""

    _type: str = field(default="Foreign", init=False)

    def __call__(self) -> pa.DataType:
        return pa.string()

    def decode_example(self, value: str, **_: object) -> str:
        raise AssertionError(f"decodes {value}")


@pytest.mark.parametrize(
    ("feature", "stored", "read"),
    [
        (Json(), '{"a": 1}', {"a": 1}),
        (List(Json()), ['{"a": 1}', "null"], [{"a": 1}, None]),
        (LargeList(Json()), ["2"], [2]),
        ({"j": Json(), "f": Foreign()}, {"j": "[1]", "f": "http://x"}, {"j": [1], "f": "http://x"}),
        ([{"j": Json(), "f": Foreign()}], [{"j": "1", "f": "x"}], [{"j": 1, "f": "x"}]),
        (
            List({"j": Json(), "i": Image()}),
            [{"j": "{}", "i": {"bytes": None, "path": "/x"}}],
            [{"j": {}, "i": {"bytes": None, "path": "/x"}}],
        ),
    ],
    ids=str,
)
def test_json_alone_is_decoded(feature, stored, read):
    table = pa.table({"it": [stored, None], "text": ["1", "2"]})
    features = Features({"it": feature, "text": Value("string")})
    found = json_columns(features)
    assert list(found) == ["it"]
    assert list(plain_rows(table, found)) == [{"it": read, "text": "1"}, {"it": None, "text": "2"}]


@pytest.mark.parametrize("most", [0, 1 << 20])
def test_large_rows_become_values_one_by_one(monkeypatch, most):
    monkeypatch.setattr("theodora.data.stored._AT_ONCE", most)
    rows = [{"n": n, "j": f"[{n}]"} for n in range(5)]
    features = json_columns(Features({"n": Value("int64"), "j": Json()}))
    read = [{"n": n, "j": [n]} for n in range(5)]
    assert list(plain_rows(pa.Table.from_pylist(rows), features)) == read
    assert list(plain_rows(pa.RecordBatch.from_pylist(rows), features)) == read


def test_columns_without_json_are_left_as_they_are():
    assert not json_columns(Features({"i": Image(), "f": Foreign(), "l": List(Image()), "off": Json(decode=False)}))
    assert not json_columns(None)
