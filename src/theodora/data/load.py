"""`load_examples`: any source → checked rows in one shape, stored in Arrow files that datasets maps from disk."""

from __future__ import annotations

import atexit
import errno
import functools
import shutil
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from datasets import Dataset
from datasets.arrow_writer import ArrowWriter

from theodora.data.examples import Examples
from theodora.data.files import LocatedRows, Row
from theodora.data.formats import Layout, explain_unknown, recognise
from theodora.data.problems import Problems
from theodora.data.sources import open_source
from theodora.errors import DataError, shown

_MOST_UNUSED = 1000
"""Names of columns to remember; rows of a hostile file may each have their own."""
_BATCH_ROWS, _BATCH_BYTES = 100, 64 << 20
"""What is held in memory before it is written: rows may be whole books, and a batch's text must stay under 2 GB."""


def load_examples(source: str | Path, *, split: str | None = None) -> Examples:
    """Read, recognise and check every row of `source`.

    Example:
        `load_examples("train.jsonl").description`

    Args:
        source: a .jsonl, .json, .csv, .tsv or .parquet file (also gzipped, Parquet apart), a folder of such files, a
            folder written by `datasets.save_to_disk`, or the name of a dataset on the Hub (`owner/name` or
            `owner/name:config`; only this downloads anything).
        split: which split of a folder or dataset that has several. Default: `train`.

    Returns:
        The rows, in the order of the source. They live in a temporary folder that is removed when the process ends;
        nothing is written beside the data, and nothing of an earlier call is used again.

    Raises:
        DataError: naming every row that cannot be used (up to ten, and how many more), by file and line.
    """
    opened = open_source(source, split)
    problems = Problems(opened.name)
    reading = _Reading(problems)
    dataset = _store(reading.rows(opened.rows(problems)), reading)
    problems.raise_if_any()
    if dataset is None or reading.layout is None:
        raise DataError(f"{opened.name} is empty; expected at least one row")
    return Examples(dataset, reading.layout.format, opened.name, reading.describe(len(dataset), opened.note))


class _Reading:
    """One pass over a source: the layout that its first row shows, and what was met on the way."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems
        self.layout: Layout | None = None
        self._first = ""
        self._unused: dict[str, None] = {}
        self._skipped = 0

    def rows(self, located: LocatedRows) -> Iterator[Row]:
        """Rows in our shape. Once there is a problem the rest is still checked, but no longer yielded."""
        for where, row in located:
            if self.layout is None:
                self.layout, self._first = recognise(row), where
            if self.layout is None:
                self.problems.add(where, explain_unknown(list(row)))
                return
            found = self._read(where, row, self.layout)
            if found is not None and not self.problems.count:
                yield found

    def _read(self, where: str, row: Row, layout: Layout) -> Row | None:
        missing = [name for name in layout.needed if name not in row]
        if missing:
            self.problems.add(
                where,
                f"has no {' and no '.join(map(repr, missing))}, unlike {self._first}; "
                f"it has {shown(list(row), 40)[1:-1] or 'nothing'}",
            )
            return None
        complaints: list[str] = []
        found = layout.read(row, complaints)
        for complaint in complaints:
            self.problems.add(where, complaint)
        self._skipped += found is None
        if len(self._unused) < _MOST_UNUSED:
            self._unused.update(dict.fromkeys(name for name in row if name not in layout.columns))
        return found

    def describe(self, count: int, note: str) -> str:
        """One sentence about what was read and what was left."""
        assert self.layout is not None
        parts = [f"{count:,} {'row' if count == 1 else 'rows'} read as {self.layout.sentence}"]
        if self._unused:
            parts.append(f"not used: {shown(list(self._unused), 40)[1:-1]}")
        if self._skipped:
            parts.append(f"{self._skipped:,} empty rows skipped")
        if note:
            parts.append(note)
        return "; ".join(parts) + "."


def _store(rows: Iterator[Row], reading: _Reading) -> Dataset | None:
    """Write rows to an Arrow file as they come, so that memory holds one batch of them; None if there are none."""
    first = next(rows, None)
    if first is None or reading.layout is None:
        return None
    folder = Path(tempfile.mkdtemp(dir=_temporary_folder()))
    path = folder / "rows.arrow"
    held = 0
    try:
        with ArrowWriter(path=str(path), features=reading.layout.features, writer_batch_size=_BATCH_ROWS) as writer:
            for row in chain([first], rows):
                writer.write(row)
                held += len(str(row))
                if held > _BATCH_BYTES:
                    writer.write_examples_on_file()
                    held = 0
            writer.finalize()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DataError(f"No space is left in {folder.parent}; set TMPDIR to a folder on a larger disk") from error
        raise
    return Dataset.from_file(str(path))


@functools.cache
def _temporary_folder() -> str:
    """This process's own folder for Arrow files (in TMPDIR), removed when it ends."""
    folder = tempfile.mkdtemp(prefix="theodora-data-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
