"""Data files: JSON, JSONL, CSV, Parquet, gzip, saved datasets; text of every kind from file to tokens."""

import csv
import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import example, given
from hypothesis import strategies as st

import tiny
from fuzz.fuzzing import damaged, files_under, fuzz, json_values, numbers, only_our_errors, storable_text, text
from theodora.data import Examples, load_examples, split_examples, tokenize, unfolded_size
from theodora.data import files as data_files
from theodora.data.formats import COMPLETIONS, CONVERSATIONS, PROMPTS
from theodora.errors import DataError, TheodoraError

COLUMNS = st.one_of(
    st.sampled_from([*CONVERSATIONS, *PROMPTS, *COMPLETIONS, "text", "tools", "system", "context", " Text ", "PROMPT"]),
    text,
)
turns = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {},
            optional={
                "role": st.one_of(st.sampled_from(["user", "assistant", "system", "tool", "bot"]), json_values()),
                "from": st.one_of(st.sampled_from(["human", "gpt"]), json_values()),
                "content": st.one_of(
                    text, json_values(), st.lists(st.fixed_dictionaries({"type": text, "text": text}))
                ),
                "value": text,
                "weight": json_values(),
                "tool_calls": json_values(),
                "reasoning_content": json_values(),
                "name": json_values(),
            },
        ),
        json_values(),
    ),
    max_size=4,
)
CELLS = st.one_of(text, turns, turns.map(json.dumps), json_values(leaves=turns))
rows = st.lists(
    st.one_of(
        st.fixed_dictionaries({"prompt": CELLS, "completion": CELLS}, optional={"tools": CELLS, "system": CELLS}),
        st.fixed_dictionaries({"messages": turns}, optional={"tools": CELLS}),
        st.fixed_dictionaries({"text": CELLS}),
        st.dictionaries(COLUMNS, CELLS, max_size=4),
        json_values(COLUMNS),
    ),
    max_size=5,
)


def use(source: Path, maximum: int = 64) -> Examples | TheodoraError:
    """Read, split and tokenise; what comes out keeps its promises."""
    loaded = only_our_errors(lambda: load_examples(source))
    if isinstance(loaded, TheodoraError):
        return loaded
    for row in loaded.dataset:
        json.dumps(row).encode()
    only_our_errors(lambda: split_examples(loaded, 0.5, 0))
    tokenised = only_our_errors(lambda: tokenize(loaded, tiny.tiny_tokenizer(), max_length=maximum))
    if not isinstance(tokenised, TheodoraError):
        for row in tokenised:
            assert 0 < len(row["input_ids"]) == len(row["labels"]) <= maximum + 1
            assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    return loaded


def written(tmp_path: Path, name: str, data: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


@fuzz()
@given(rows, st.sampled_from(["a.jsonl", "a.json"]), st.booleans())
@example(
    [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 10**400}]}],
    "a.jsonl",
    True,
)
def test_json_of_every_kind(tmp_path_factory, rows, name, ascii_only):
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    content = "\n".join(lines) if name == "a.jsonl" else f"[{','.join(lines)}]"
    folder = tmp_path_factory.mktemp("data")
    path = written(folder, name, content.encode("utf-8", "surrogatepass"))
    before = files_under(folder)
    use(path)
    assert files_under(folder) == before, "nothing is written beside the data"


SAMPLE = "\n".join(
    json.dumps({"messages": [{"role": "user", "content": f"q{i} é"}, {"role": "assistant", "content": "\U0001f469"}]})
    for i in range(3)
).encode()


@fuzz(60)
@given(st.data(), st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".json.gz", ".parquet"]))
def test_damaged_files(tmp_path_factory, data, suffix):
    whole = SAMPLE
    if suffix == ".parquet":
        buffer = io.BytesIO()
        rows = [json.loads(line) for line in SAMPLE.splitlines()]
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        whole = buffer.getvalue()
    elif suffix in (".csv", ".tsv"):
        whole = b'prompt,completion\n"a ""b""\nc",d\n\xc3\xa9,"x,y"\n'
    elif suffix.endswith(".gz"):
        whole = gzip.compress(SAMPLE, mtime=0)
    use(written(tmp_path_factory.mktemp("data"), "a" + suffix, data.draw(damaged(whole))))


@fuzz()
@given(st.lists(st.lists(text, max_size=4), max_size=5), st.sampled_from(",;\t"), COLUMNS, COLUMNS)
def test_csv_of_every_kind(tmp_path_factory, cells, delimiter, first, second):
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter).writerows([[first, second], *cells])
    path = tmp_path_factory.mktemp("data") / "a.csv"
    path.write_bytes(buffer.getvalue().encode("utf-8", "surrogatepass"))
    use(path)


@fuzz()
@given(st.lists(st.fixed_dictionaries({"prompt": storable_text, "completion": storable_text}), min_size=1, max_size=4))
def test_what_is_read_is_what_was_written_in_every_format(tmp_path_factory, rows):
    """Text of every kind arrives unchanged, and the same from each kind of file."""
    rows = [row for row in rows if row["completion"].strip()]
    if not rows:
        return
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8", newline="")
    (folder / "b.json").write_text(json.dumps(rows), "utf-8")
    pq.write_table(pa.Table.from_pylist(rows), folder / "c.parquet")
    (folder / "d.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    for path in sorted(folder.iterdir()):
        found = load_examples(path).dataset
        assert [dict(row) for row in found] == rows, path.name


@fuzz(30)
@given(
    st.sampled_from(["text", "prompt", "messages"]),
    st.sampled_from(
        [
            pa.array([b"\xff\xfe", b"a"], pa.binary()),
            pa.array([1, None]),
            pa.array([2**62], pa.timestamp("us")),
            pa.array([[{"role": "user", "content": None}]]),
            pa.array([{"a": 1}]),
            pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int64())),
            pa.array(["a"]).dictionary_encode(),
            pa.array([], pa.string()),
        ]
    ),
)
def test_parquet_columns_of_every_type(tmp_path_factory, name, column):
    path = tmp_path_factory.mktemp("data") / "a.parquet"
    pq.write_table(pa.table({name: column, "completion": ["x"] * len(column)}), path)
    use(path)


@fuzz(30)
@given(st.data())
def test_damaged_saved_datasets(tmp_path_factory, data):
    """Arrow files hold offsets that are believed unless they are checked: a wrong one reads memory anywhere."""
    folder = tmp_path_factory.mktemp("data") / "saved"
    Dataset.from_list([{"text": "é" * n} for n in range(1, 9)]).save_to_disk(str(folder))
    victim = data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    (folder / victim).write_bytes(data.draw(damaged((folder / victim).read_bytes())))
    use(folder)


def test_a_saved_dataset_whose_offsets_point_elsewhere_is_an_error(tmp_path):
    folder = tmp_path / "saved"
    Dataset.from_list([{"text": "abcdefgh"}] * 4).save_to_disk(str(folder))
    (arrow,) = folder.glob("*.arrow")
    raw = arrow.read_bytes()
    offsets = b"".join(n.to_bytes(4, "little") for n in range(0, 40, 8))
    assert raw.count(offsets) == 1
    wrong = b"".join(n.to_bytes(4, "little") for n in (0, 8, 2**31 - 8, 24, 32))
    arrow.write_bytes(raw.replace(offsets, wrong))
    with pytest.raises(DataError, match="cannot be read"):
        load_examples(folder)


def test_a_parquet_file_that_names_a_column_twice_is_an_error(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="'text' twice"):
        load_examples(tmp_path / "a.parquet")


def test_files_that_unfold_to_far_more_than_they_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(data_files, "LONGEST_LINE", 1 << 16)
    monkeypatch.setattr(data_files, "LARGEST_UNPACKED", 1 << 16)
    monkeypatch.setattr(unfolded_size, "ANY_FILE", 1 << 16)
    bomb = b'{"text": "' + b"a" * (1 << 17) + b'"}'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(bomb))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b"[" + b'{"text": "a"},\n' * 9000 + b"]"))
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "a"}\n' + bomb)
    pq.write_table(
        pa.table({"text": ["a" * (1 << 26)]}), tmp_path / "d.parquet", compression="zstd", use_dictionary=False
    )
    for name, what in (
        ("a.jsonl.gz", "line 1: is longer than 65,536 bytes"),
        ("b.json.gz", "unfolds to more than"),
        ("c.jsonl", "line 2: is longer than"),
        ("d.parquet", "unfolds to 67,"),
    ):
        with pytest.raises(DataError, match=what):
            load_examples(tmp_path / name)
    (tmp_path / "whole.json").write_bytes(b"[" + bomb + b"]")  # no line ends, but not larger than it looks
    assert len(load_examples(tmp_path / "whole.json")) == 1


def test_wide_rows_are_refused_in_no_time(tmp_path):
    """Nothing takes time in the square of what a file names."""
    names = [f"column{i}" for i in range(100_000)]
    (tmp_path / "a.csv").write_text(",".join([*names, *names]) + "\n")
    (tmp_path / "b.jsonl").write_text("{" + ", ".join(f'"{name}": 1' for name in [*names, *names]) + "}")
    (tmp_path / "c.jsonl").write_text(json.dumps({"x" * 200_000: 1} | dict.fromkeys(names, 1)))
    for name in ("a.csv", "b.jsonl", "c.jsonl"):
        assert isinstance(only_our_errors(lambda path=tmp_path / name: load_examples(path)), DataError)


@pytest.mark.parametrize(
    "name", ["~nobody-of-this-name/a.jsonl", "a" * 300 + ".jsonl", "a\0b.jsonl", "\ud800.jsonl", ""]
)
def test_odd_file_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError):
        load_examples(name)


def test_links_and_devices(tmp_path):
    """A link to data is read; what is no file (a device, a pipe, a link to itself) is refused and not waited for."""
    (tmp_path / "real.jsonl").write_bytes(SAMPLE)
    (tmp_path / "link.jsonl").symlink_to("real.jsonl")
    assert len(load_examples(tmp_path / "link.jsonl")) == 3
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("loop.jsonl", "zero.jsonl", "pipe.jsonl"):
        with pytest.raises(DataError):
            load_examples(tmp_path / name)


@fuzz(20)
@given(json_values(COLUMNS, turns), numbers)
def test_chat_templates_are_given_what_they_can_render(tmp_path_factory, extra: Any, number):
    """What messages carry beside role and content reaches a template as it stands, and breaks nothing but its row."""
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}{% for call in m.get('tool_calls') or [] %}{{ call.function.name ~ "
        "(call['arguments'] | tojson) }}{% endfor %}{{ m.reasoning_content + m.content if m.reasoning_content else "
        "m.content }}{{ 1 // (m.weight | default(1)) }}{% endfor %}"
    )
    path = tmp_path_factory.mktemp("data") / "a.jsonl"
    turn = {"role": "assistant", "content": "x", "tool_calls": extra, "reasoning_content": extra, "weight": number}
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "q"}, turn]}))
    loaded = only_our_errors(lambda: load_examples(path))
    if not isinstance(loaded, TheodoraError):
        only_our_errors(lambda: tokenize(loaded, tokenizer, max_length=64))
