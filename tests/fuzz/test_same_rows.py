"""Conversations with tools of every shape are read alike from every kind of file, and again from what was read."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from fuzz.fuzzing import fuzz
from theodora.data import Examples, load_examples

NAMES = st.sampled_from(["a", "b", "c", "d"])
WORDS = st.sampled_from(["x", "y", ""])


def shuffled(parts: dict[str, st.SearchStrategy[Any]], least: int = 0) -> st.SearchStrategy[dict[str, Any]]:
    """Some of these keys, in any order. Arrow wants one type for each."""
    return st.lists(st.sampled_from(sorted(parts)), min_size=least, unique=True).flatmap(
        lambda keys: st.tuples(*(parts[key] for key in keys)).map(lambda values: dict(zip(keys, values, strict=True)))
    )


inner = shuffled({"a": st.none() | WORDS, "b": st.none() | st.sampled_from([1, 2, 0.5, -3.0])})
arguments = shuffled(
    {"a": WORDS | st.none(), "b": st.sampled_from([1, 0.25, 4.0]), "c": inner, "d": st.lists(inner, max_size=2)}
)
schemas = shuffled(
    {name: shuffled({"type": WORDS, "enum": st.just(["x"]), "description": WORDS}, 1) for name in "abcd"}, 1
)
tools = st.lists(
    st.tuples(st.sampled_from("fg"), schemas, st.none() | st.lists(NAMES, unique=True, max_size=3)).map(
        lambda tool: {
            "type": "function",
            "function": {"name": tool[0], "parameters": {"required": tool[2], "type": "object", "properties": tool[1]}},
        }
    ),
    min_size=1,
    max_size=2,
)
calls = st.lists(
    st.tuples(st.sampled_from("fg"), arguments).map(lambda call: {"function": {"arguments": call[1], "name": call[0]}}),
    min_size=1,
    max_size=2,
)
turns = st.one_of(
    calls.map(lambda made: {"role": "assistant", "content": None, "tool_calls": made}),
    st.sampled_from([0, 1]).map(lambda weight: {"role": "assistant", "content": "A", "weight": weight}),
    st.just({"role": "assistant", "content": "A", "thinking": "Hm.", "mood": "good"}),
    st.just({"role": "tool", "content": "4", "name": "f"}),
)
rows = st.lists(
    st.tuples(st.lists(turns, max_size=3), shuffled({"tools": tools, "system": WORDS, "id": WORDS})).map(
        lambda row: {
            "messages": [{"role": "user", "content": "Q"}, *row[0], {"role": "assistant", "content": "B"}],
            **row[1],
        }
    ),
    min_size=1,
    max_size=4,
)


def written(rows: list[dict[str, Any]], folder: Path) -> dict[str, Path]:
    """The same rows in every kind of file that can hold them."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with (folder / "a.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
    filled = [dict.fromkeys(names) | row for row in rows]
    Dataset.from_list(filled).save_to_disk(str(folder / "saved"))
    try:
        pq.write_table(pa.Table.from_pylist(filled), folder / "a.parquet")
    except pa.ArrowNotImplementedError:  # a struct without fields
        (folder / "a.parquet").unlink(missing_ok=True)
    return {path.name: path for path in sorted(folder.iterdir())}


def held(examples: Examples) -> list[str]:
    """The rows, with the order of all their keys."""
    return [json.dumps(row) for row in examples.dataset]


@fuzz(12)
@given(rows)
def test_the_same_rows_are_read_alike_from_every_kind_of_file(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("data")
    paths = written(rows, folder)
    first = load_examples(paths.pop("a.jsonl"))
    said = [part for part in first.left_out if not part.what.startswith(("null values", "the order of keys"))]
    for name, path in paths.items():
        found = load_examples(path)
        assert held(found) == held(first), name
        expected = first.left_out if name == "a.csv" else said
        assert sorted(map(str, found.left_out)) == sorted(map(str, expected)), name
    first.dataset.to_json(folder / "again.jsonl")
    again = load_examples(folder / "again.jsonl")
    assert held(again) == held(first)
    assert again.left_out == ()
