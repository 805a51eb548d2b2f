"""Reads rows out of one file, line by line where its kind allows it, and says where each row stands.

Every reader has the same form: it yields `(where, row)` and notes what it cannot read, so that one pass finds every
problem of a file. Nothing here runs code from a file or unpickles anything.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from theodora.data.left_out import LeftOut
from theodora.data.notes import NOT_USED, is_empty
from theodora.data.problems import Problems, listed
from theodora.data.stored import json_columns, plain_rows
from theodora.data.unfolded_size import VALUE, UnfoldedSize
from theodora.parse import parse_json

Row = dict[str, Any]
LocatedRows = Iterator[tuple[str, Row]]
Reader = Callable[[Path, Problems], LocatedRows]

LONGEST_LINE = 256 << 20
"""Bytes of the longest line that is read: one row is one example, and what is longer lacks its line ends."""
LARGEST_UNPACKED = 1 << 30
"""Bytes that a gzipped .json file may unfold to, which has to be held in memory whole."""
_MOST_ROWS, _BYTES_AT_ONCE = 10_000, 64 << 20
"""Rows, and bytes, of a table that are in memory together."""
_DELTAS_AT_ONCE = 512 << 20
"""Bytes that a batch may take at worst where values are stored as what differs from the one before."""
BATCH_ROWS = 100
"""Rows of a table that are made into values at once."""
# What a spreadsheet writes for a row of empty cells.
_EMPTY_CELLS = ',;|"\t\r\n \ufeff'
# The line in front of the names by which Excel is told the delimiter.
_DELIMITER_LINE = re.compile(r"sep=([,;|\t])", re.IGNORECASE)


def read_jsonl(path: Path, problems: Problems) -> LocatedRows:
    """One JSON object a line; blank lines are skipped."""
    for number, line in _lines(path, problems):
        line = line.strip()
        if not line:
            continue
        where = f"line {number}"
        try:
            value = parse_json(line)
        except ValueError as error:
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
    text = _whole(path, problems)
    if not text.strip():
        return
    try:
        value = parse_json(text)
    except ValueError as error:
        where = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        problems.add(where, f"is not valid JSON ({_reason(error)})")
        return
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        content = f"an object with {listed(value)}" if isinstance(value, dict) else f"a {_kind(value)}"
        problems.add("", f'holds {content}; expected a list of objects, or {{"data": [...]}}')
        return
    problems.left_out += _beside_rows(value, len(rows)) if isinstance(value, dict) else []
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            yield f"item {number}", row
        else:
            problems.add(f"item {number}", f"is a JSON {_kind(row)}; expected an object")


def _beside_rows(value: dict[str, Any], rows: int) -> list[LeftOut]:
    """What stands beside `data`: other rows, each of which counts, or something about all of them."""
    others = {name: cell for name, cell in value.items() if name != "data" and not is_empty(cell)}
    counts = {name: len(cell) if isinstance(cell, list) else rows for name, cell in others.items()}
    return [LeftOut(f"{name!r} beside 'data'", count, NOT_USED) for name, count in counts.items()]


def read_csv(path: Path, problems: Problems) -> LocatedRows:
    """Comma-, semicolon-, tab- or bar-separated values under a line of column names, as spreadsheets write them.

    Lines that hold nothing are passed by, also in front of the names; so are columns at the right that have no name
    and no values. A column of values without a name is called after its place.
    """
    # csv refuses fields over 131,072 characters by default; one document may well be longer.
    csv.field_size_limit(LONGEST_LINE)
    lines = _lines(path, problems)
    first = next(((number, line) for number, line in lines if line.strip(_EMPTY_CELLS)), None)
    if first is None:
        return
    if delimiter_line := _DELIMITER_LINE.fullmatch(first[1].rstrip("\r\n")):
        delimiter, first = delimiter_line[1], (first[0], "\n")
    else:
        delimiter = _delimiter(first[1], is_tsv=".tsv" in path.name.lower())
    # strict: an unclosed quote is an error, rather than one cell with the rest of the file.
    reader = csv.reader(_chained(first[1], lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    names: list[str] = []
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problems.add(f"line {first[0] - 1 + reader.line_num}", f"is not valid CSV ({error})")
            continue
        where = f"line {first[0] - 1 + reader.line_num}"
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = _header([cell.strip() for cell in cells], where, problems)
            names = [name or f"(column {place})" for place, name in enumerate(header, 1)]
            continue
        while len(cells) > len(header) and not cells[-1].strip():
            cells.pop()
        if len(cells) < len(header) and not any(name for name in header[len(cells) :]):
            cells += [""] * (len(header) - len(cells))
        if len(cells) != len(header):
            problems.add(where, f"has {len(cells)} cells; the header has {_width(header)} columns")
        else:
            # A column without a name is left out of rows that have nothing in it.
            yield where, {n: cell for name, n, cell in zip(header, names, cells, strict=True) if name or cell.strip()}


def read_parquet(path: Path, problems: Problems) -> LocatedRows:
    """A Parquet file, one batch of rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from theodora.data.arrow_sizes import row_sizes

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
        for name in sorted(name for name, times in Counter(schema.names).items() if times > 1):
            problems.add("", f"names the column {name!r} twice")
        unfolded = UnfoldedSize(path.name, path.stat().st_size)
        if (size := _declared_size(metadata)) > unfolded.allowed:
            problems.add("", unfolded.complaint(size))
            return
        values = _json_columns(schema)
        # Texts that stand in a dictionary stay there until their size is known.
        with pq.ParquetFile(path, metadata=metadata, read_dictionary=_in_dictionaries(metadata)) as file:
            for batch in file.iter_batches(batch_size=_rows_at_once(metadata)):
                sizes = row_sizes(batch)
                unfolded.add(int(sizes.sum()))
                for part in _parts(batch, sizes):
                    for row in plain_rows(part, values):
                        number += 1
                        yield f"row {number}", row
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError) as error:  # text that is no UTF-8, dates
        problems.add(f"after row {number}" if number else "", f"is not a whole Parquet file ({error})")


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


def _json_columns(schema: Any) -> Any:
    """What datasets' own Parquet files say of columns in which it keeps values of many shapes as JSON text."""
    from datasets import Features

    if b"Json" not in (schema.metadata or {}).get(b"huggingface", b""):
        return Features()
    try:
        features = Features.from_arrow_schema(schema)
    except (TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"what it says of its columns is damaged: {error!r}") from error
    return json_columns(features)


def _declared_size(metadata: Any) -> int:
    """What a Parquet file says of itself: bytes of its pages unfolded, or the least that its values take."""
    columns = _column_chunks(metadata)
    widths = [VALUE + _width_of(metadata, index) for index in range(metadata.num_columns)] * metadata.num_row_groups
    pages = sum(max(column.total_uncompressed_size, 0) for column in columns)
    return max(pages, sum(width * column.num_values for width, column in zip(widths, columns, strict=True)))


def _width_of(metadata: Any, index: int) -> int:
    """Bytes of each value of a column that says how long all are; a dictionary holds such a value once."""
    column = metadata.schema.column(index)
    return column.length if column.physical_type == "FIXED_LEN_BYTE_ARRAY" else 0


def _in_dictionaries(metadata: Any) -> list[str]:
    """The columns of text in which some values stand in a dictionary."""
    texts = [column for column in _column_chunks(metadata) if column.physical_type == "BYTE_ARRAY"]
    return sorted({column.path_in_schema for column in texts if column.has_dictionary_page or _has(column, "DICT")})


def _has(column: Any, encoding: str) -> bool:
    return any(encoding in name for name in column.encodings)


def _column_chunks(metadata: Any) -> list[Any]:
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    return [group.column(index) for group in groups for index in range(metadata.num_columns)]


def _rows_at_once(metadata: Any) -> int:
    """Rows of a batch: as many as memory allows for their pages, since each batch copies its dictionaries."""
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    widths = sum(_width_of(metadata, index) for index in range(metadata.num_columns))
    largest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
    # A value that repeats the beginning of the one before is as long as all that is stored, at most.
    deltas = max(
        (chunk.total_uncompressed_size for chunk in _column_chunks(metadata) if _has(chunk, "DELTA_BYTE")), default=0
    )
    most = min(_BYTES_AT_ONCE // max(largest, widths, 1), _DELTAS_AT_ONCE // max(deltas, 1))
    return max(1, min(_MOST_ROWS, most))


def _parts(batch: Any, sizes: Any) -> Iterator[Any]:
    """A batch a hundred rows at a time, or row by row where these would take much memory at once."""
    for start in range(0, batch.num_rows, BATCH_ROWS):
        part = batch.slice(start, BATCH_ROWS)
        if sizes[start : start + BATCH_ROWS].sum() <= _BYTES_AT_ONCE:
            yield part
        else:
            yield from (part.slice(at, 1) for at in range(part.num_rows))


def _delimiter(line: str, *, is_tsv: bool) -> str:
    """What parts the names of columns: whatever gives the most of them, quotes respected."""
    if is_tsv and "\t" in line:
        return "\t"

    def columns(mark: str) -> int:
        try:
            return len(next(csv.reader([line], delimiter=mark), []))
        except csv.Error:
            return line.count(mark)

    return max("\t,;|" if is_tsv else ",;\t|", key=columns)


def _header(cells: list[str], where: str, problems: Problems) -> list[str]:
    for name in sorted(name for name, times in Counter(cells).items() if times > 1 and name):
        problems.add(where, f"names the column {name!r} twice")
    return cells


def _width(header: list[str]) -> int:
    """How many columns there are, those at the right without a name left out."""
    return max((place for place, name in enumerate(header, 1) if name), default=0)


def _whole(path: Path, problems: Problems) -> str:
    """The text of a file, or as much of a gzipped one as fits into memory."""
    zipped = path.suffix.lower() == ".gz"
    most = LARGEST_UNPACKED if zipped else path.stat().st_size
    lines: list[str] = []
    size = 0
    for _, line in _lines(path, problems, most):
        lines.append(line)
        size += len(line)
        if zipped and size > most:
            problems.add("", f"unfolds to more than {most >> 20:,} MB of JSON; write one row a line, as .jsonl.gz")
            return ""
    return "".join(lines)


def _lines(path: Path, problems: Problems, longest: int | None = None) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file. What is no UTF-8 is noted and replaced, so that line numbers stay true."""
    longest = longest or LONGEST_LINE
    try:
        with _open(path) as file:
            for number, raw in enumerate(iter(partial(file.readline, longest + 1), b""), 1):
                if len(raw) > longest:
                    problems.add(f"line {number}", f"is longer than {longest:,} bytes; one line holds one row")
                    return
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
    except (OSError, EOFError, zlib.error) as error:  # no permission, a damaged gzip file
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


def _reason(error: ValueError) -> str:
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _kind(value: Any) -> str:
    return {list: "list", dict: "object", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")
