"""The same rows give the same tokens and the same labels, whatever kind of file holds them."""

import csv
import json
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import trl
from datasets import Dataset

from theodora.data import load_examples, tokenize


def tool(name, parameters, **more):
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters} | more}


def call(name, arguments, **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}} | more


def asked(*turns):
    return [{"role": "user", "content": "Q"}, *turns]


def said(content, **more):
    return {"role": "assistant", "content": content} | more


def spoken(*turns):
    return [{"from": speaker, "value": value} for speaker, value in turns]


UNIT = {"type": "string", "enum": ["C", "F"]}
WEATHER = tool(
    "weather", {"type": "object", "properties": {"city": {"type": "string"}, "unit": UNIT}, "required": ["city"]}
)
# Another order of the same keys, a key that no other tool has, a default that is no whole number.
CLOCK = tool(
    "clock",
    {
        "properties": {"unit": {"enum": ["h"], "description": "which", "type": "string"}, "city": {"type": "string"}},
        "type": "object",
        "required": ["unit", "city"],
    },
    strict=True,
)
STEPS = tool("steps", {"type": "object", "properties": {"size": {"type": "number", "default": 0.5}}})
COUNT = tool("count", {"type": "object", "properties": {"size": {"type": "number", "default": 1}}})

LAYOUTS = {
    "pairs": [{"prompt": "a ->", "completion": " b"}, {"prompt": "c ->", "completion": " d", "id": "7"}],
    "pairs, a system prompt in a later row": [
        {"prompt": "a", "completion": "b"},
        {"prompt": "c", "completion": "d", "system": "Be brief."},
    ],
    "Alpaca": [
        {"instruction": "Name it.", "output": "Rome"},
        {"instruction": "Add.", "input": "2, 2", "output": "4", "system": "Count."},
        {"instruction": "And of Italy?", "output": "Rome", "history": [["Of France?", "Paris"], ["Spain?", "Madrid"]]},
    ],
    "Alpaca, an instruction in a later row": [
        {"input": "2, 2", "output": "4"},
        {"instruction": "Add.", "input": "2, 3", "output": "5"},
        {"instruction": "Name it.", "output": "Rome"},
    ],
    "numbers": [
        {"question": "2+2", "answer": 4, "input": 0.5},
        {"question": "2+3", "answer": 5, "input": 0.25},
    ],
    "Anthropic": [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Q"}]},
                said([{"type": "text", "text": "I."}, {"type": "tool_use", "id": "t", "name": "f", "input": {"x": 1}}]),
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "4"}]},
                said([{"type": "text", "text": "4."}]),
            ]
        },
    ],
    "parameters as text": [
        {"messages": asked(said("a")), "tools": [tool("f", '{"type": "object", "properties": {"x": {"type": "a"}}}')]},
        {"messages": asked(said("b")), "tools": [tool("g", '{"properties": {"y": {"type": "b"}}}')]},
    ],
    "ms-swift": [
        {"query": "a", "response": "b", "history": [["c", "d"]], "system": "S"},
        {"query": "e", "response": "f"},
    ],
    "ms-swift's messages": [
        {"messages": asked(said("a", loss=False), *asked(said("b", loss=True)))},
        {
            "messages": asked(
                {"role": "tool_call", "content": '{"name": "weather", "arguments": {"unit": null, "city": "x"}}'},
                {"role": "tool_call", "content": '{"name": "clock", "arguments": {"size": 1.0}}'},
                {"role": "tool_response", "content": "4"},
                said("4."),
            ),
            "tools": [WEATHER],
        },
    ],
    "ShareGPT of LLaMA-Factory": [
        {"conversations": spoken(("human", "Q"), ("gpt", "A"))},
        {
            "conversations": spoken(
                ("human", "Q"),
                ("gpt", "I look."),
                ("function_call", '{"name": "weather", "arguments": {"unit": "C", "city": "x"}}'),
                ("observation", "4"),
                ("gpt", "4."),
            ),
            "system": "S",
            "tools": json.dumps([WEATHER["function"]]),
        },
    ],
    "OpenAI, arguments as text": [
        {"messages": asked(said("a", weight=0), *asked(said("b", weight=1)))},
        {
            "messages": asked(
                said(None, tool_calls=[call("weather", '{"unit": null, "city": "x", "n": 1.0}', id="call_1")]),
                {"role": "tool", "content": "4", "tool_call_id": "call_1", "name": "weather"},
                said("It is 4."),
            ),
            "tools": [WEATHER],
        },
    ],
    "OpenAI, content in parts": [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Q"}]},
                said([{"type": "text", "text": "It is "}, {"type": "text", "text": "4."}]),
            ]
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "R"}]},
                said([{"type": "text", "text": "5"}]),
            ]
        },
    ],
    "tools of many shapes": [
        {
            "messages": asked(
                said("", tool_calls=[call("weather", {"city": "x"})]), {"role": "tool", "content": "4"}, said("4.")
            ),
            "tools": [WEATHER, STEPS],
        },
        {
            "messages": asked(
                said("Both.", tool_calls=[call("clock", {"city": "x", "unit": "h"}), call("steps", {"size": 2.0})]),
                {"role": "tool", "content": "4"},
                {"role": "tool", "content": "5"},
                said("4 and 5."),
            ),
            "tools": [COUNT, CLOCK],
        },
        {"messages": asked(said("", tool_calls=[call("count", {"size": 0.25})]))},
        {"messages": asked(said("", tool_calls=[call("unknown", {"b": 1, "a": {"d": None, "c": [1, 2]}})]))},
    ],
    "reasoning": [
        {"messages": asked(said("a"))},
        {"messages": asked(said("b", thinking="Hm."))},
        {"messages": asked(said("c", reasoning_content="So."))},
    ],
    "a turn of the old kind": [
        {
            "messages": asked(
                said(None, function_call={"name": "f", "arguments": '{"x": 1}'}),
                {"role": "function", "name": "f", "content": "2"},
                said("2"),
            )
        },
        {
            "messages": asked(said("b")),
            "functions": [{"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}],
        },
    ],
    "text": [{"text": "One document."}, {"text": ""}, {"text": "Another.", "label": "x"}],
}


def _json_lines(rows, folder):
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _json(rows, folder):
    path = folder / "a.json"
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def _csv(rows, folder):
    path = folder / "a.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), delimiter=";")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
    return path


def _csv_of_pandas(rows, folder):
    """Lists and objects in Python's spelling, a column of numbers in front."""
    pd.DataFrame(rows).to_csv(folder / "p.csv")
    return folder / "p.csv"


def _parquet(rows, folder):
    filled = [dict.fromkeys(name for row in rows for name in row) | row for row in rows]
    pq.write_table(pa.Table.from_pylist(filled), folder / "a.parquet")
    return folder / "a.parquet"


def _saved(rows, folder):
    Dataset.from_list([dict.fromkeys(name for row in rows for name in row) | row for row in rows]).save_to_disk(
        str(folder / "saved")
    )
    return folder / "saved"


def _through_datasets(rows, folder):
    """As datasets reads JSON lines: in its JSON columns where rows differ."""
    read = datasets.load_dataset("json", data_files=str(_json_lines(rows, folder)), cache_dir=str(folder / "cache"))
    read["train"].to_parquet(folder / "b.parquet")
    return folder / "b.parquet"


CONTAINERS = {
    "JSON": _json,
    "CSV": _csv,
    "CSV of pandas": _csv_of_pandas,
    "Parquet": _parquet,
    "a saved dataset": _saved,
    "Parquet of datasets": _through_datasets,
}


@pytest.fixture
def tokenizer(make_tokenizer):
    """One whose template shows tools, calls and reasoning."""
    tokenizer = make_tokenizer()
    folder = Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = (folder / "qwen3.jinja").read_text(encoding="utf-8")
    return tokenizer


@pytest.fixture
def read(tokenizer):
    """Rows as they are read (every key in its order), and their tokens and labels."""

    def read(path):
        examples = load_examples(path)
        tokens = tokenize(examples, tokenizer, max_length=4096)
        return [json.dumps(row) for row in examples.dataset], list(tokens["input_ids"]), list(tokens["labels"])

    return read


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_rows_give_the_same_tokens(layout, container, tmp_path, read):
    rows = LAYOUTS[layout]
    assert read(CONTAINERS[container](rows, tmp_path)) == read(_json_lines(rows, tmp_path))


def test_a_saved_dataset_in_another_form_is_read_as_it_is(tmp_path, read):
    rows = LAYOUTS["ms-swift"]
    dataset = Dataset.from_list([{"history": None} | row for row in rows])
    dataset.with_format("numpy", columns=["query"]).save_to_disk(str(tmp_path / "numpy"))
    assert read(tmp_path / "numpy") == read(_json_lines(rows, tmp_path))


def test_a_conversation_of_columns(tmp_path, read):
    """What datasets' Sequence of a dict gives: a dict of lists."""
    rows = [{"messages": asked(said("a"))}, {"messages": asked(said("b"), *asked(said("c")))}]
    columns = [
        {"messages": {key: [turn[key] for turn in row["messages"]] for key in ("role", "content")}} for row in rows
    ]
    Dataset.from_list(columns).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved") == read(_json_lines(rows, tmp_path))
