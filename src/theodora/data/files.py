"""Reads rows out of one file, line by line where its kind allows it, and says where each row stands.

Every reader has the same form: it yields `(where, row)` and notes what it cannot read, so that one pass finds every
problem of a file. Nothing here runs code from a file or unpickles anything.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from theodora.data.problems import Problems

Row = dict[str, Any]
LocatedRows = Iterator[tuple[str, Row]]
Reader = Callable[[Path, Problems], LocatedRows]

# csv refuses fields over 131,072 characters by default; one document may well be longer.
_LONGEST_CSV_FIELD = 2**31 - 1


def read_jsonl(path: Path, problems: Problems) -> LocatedRows:
    """One JSON object a line; blank lines are skipped."""
    for number, line in _lines(path, problems):
        line = line.strip()
        if not line:
            continue
        where = f"line {number}"
        try:
            value = _parse(line)
        except (ValueError, RecursionError) as error:
            problems.add(where, f"is not valid JSON ({_reason(error)})")
            continue
        if isinstance(value, dict):
            yield where, value
        else:
            problems.add(where, f'is a JSON {_kind(value)}; expected an object such as {{"prompt": …}}')


def read_json(path: Path, problems: Problems) -> LocatedRows:
    """A JSON list of objects, `{"data": [...]}`, or JSON lines under the name .json.

    The first two have to be held in memory as a whole.
    """
    if _looks_like_lines(path):
        yield from read_jsonl(path, problems)
        return
    text = "".join(line for _, line in _lines(path, problems))
    if not text.strip():
        return
    try:
        value = _parse(text)
    except (ValueError, RecursionError) as error:
        where = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        problems.add(where, f"is not valid JSON ({_reason(error)})")
        return
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        found = f"an object with {', '.join(map(repr, value))}" if isinstance(value, dict) else f"a {_kind(value)}"
        problems.add("", f'holds {found}; expected a list of objects, or {{"data": [...]}}')
        return
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            yield f"item {number}", row
        else:
            problems.add(f"item {number}", f"is a JSON {_kind(row)}; expected an object")


def read_csv(path: Path, problems: Problems) -> LocatedRows:
    """Comma-, semicolon- or tab-separated values under a line of column names."""
    csv.field_size_limit(_LONGEST_CSV_FIELD)
    lines = _lines(path, problems)
    first = next(lines, None)
    if first is None:
        return
    delimiter = max(",;\t", key=first[1].count)
    # strict: an unclosed quote is an error, rather than one cell with the rest of the file.
    reader = csv.reader(_chained(first[1], lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problems.add(f"line {reader.line_num}", f"is not valid CSV ({error})")
            continue
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            for name in sorted({name for name in header if header.count(name) > 1}):
                problems.add("line 1", f"names the column {name!r} twice")
        elif len(cells) != len(header):
            problems.add(f"line {reader.line_num}", f"has {len(cells)} cells; the header has {len(header)} columns")
        else:
            yield f"line {reader.line_num}", dict(zip(header, cells, strict=True))


def read_parquet(path: Path, problems: Problems) -> LocatedRows:
    """A Parquet file, one batch of rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pa.ArrowException, OSError) as error:
        problems.add("", f"is not a whole Parquet file ({error})")


READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
SUFFIXES = ", ".join(READERS)


def reader_for(path: Path) -> Reader | None:
    """The reader for a file name; all but Parquet may be gzipped (`.jsonl.gz`)."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"] and suffixes[-2:-1] != [".parquet"]:
        suffixes.pop()
    return READERS.get(suffixes[-1]) if suffixes else None


def _lines(path: Path, problems: Problems) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file. What is no UTF-8 is noted and replaced, so that line numbers stay true."""
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, 1):
                if number == 1:
                    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                        problems.add("", "is encoded in UTF-16; save it as UTF-8")
                        return
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                try:
                    yield number, raw.decode()
                except UnicodeDecodeError as error:
                    byte = f"byte 0x{raw[error.start]:02x} at position {error.start + 1}"
                    problems.add(f"line {number}", f"is not UTF-8 ({byte}); save the file as UTF-8")
                    yield number, raw.decode(errors="replace")
    except (OSError, EOFError) as error:  # no permission, a damaged gzip file
        problems.add("", f"cannot be read ({error})")


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _chained(first: str, rest: Iterator[tuple[int, str]]) -> Iterator[str]:
    yield first
    for _, line in rest:
        yield line


def _looks_like_lines(path: Path) -> bool:
    """Whether the first line that holds anything is a whole JSON object by itself, other than {"data": [...]}."""
    for _, line in _lines(path, Problems(path.name)):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                return False
            return isinstance(value, dict) and not isinstance(value.get("data"), list)
    return False


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_without_duplicates)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return row


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _kind(value: Any) -> str:
    return {list: "list", dict: "object", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")
