"""`load_examples`: any source → checked rows in one shape, stored in Arrow files that datasets maps from disk."""

from __future__ import annotations

import errno
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets.arrow_writer import ArrowWriter

from theodora.data.examples import Examples, Kind
from theodora.data.files import LocatedRows, Row
from theodora.data.formats import BESIDE, COLUMNS, MEDIA, PREFERENCES, Layout, NeedsTurns, explain_unknown, recognise
from theodora.data.left_out import LeftOut, sentences
from theodora.data.notes import NOT_USED, Notes, is_empty, not_used, spelling
from theodora.data.preference import (
    explain_no_pairs,
    explain_not_judged,
    recognise_any,
    recognise_judged,
    recognise_pairs,
    recognise_ranked,
)
from theodora.data.problems import Problems, listed
from theodora.data.prompt_layouts import explain_no_prompt, recognise_prompts
from theodora.data.sources import Source, open_source
from theodora.data.tools import NULLS, ORDER
from theodora.data.unfolded_size import UnfoldedSize, size_of
from theodora.errors import DataError
from theodora.locks import process_folder

_MOST_LEFT_OUT = 1000
"""Names of columns and keys to remember; rows of a hostile file may each have their own."""
_FURTHER = ("further columns and keys", NOT_USED)
# Columns that say whether a completion is a good one (TRL's and LLaMA-Factory's, for KTO).
_VERDICTS = ("label", "kto_tag")
_PREFERRED = (*PREFERENCES, *PREFERENCES.values(), "rejected_response", "rejected_messages")
_RECOGNISED: dict[Kind, tuple[Callable[..., Layout | None], Callable[[Row], str]]] = {
    "answers": (recognise, explain_unknown),
    "pairs": (recognise_pairs, explain_no_pairs),
    "ranked": (recognise_ranked, explain_no_pairs),
    "judged": (recognise_judged, explain_not_judged),
    "prompts": (recognise_prompts, explain_no_prompt),
    "any": (recognise_any, explain_unknown),
}
_BATCH_ROWS, _BATCH_BYTES = 100, 64 << 20
"""What is in memory before it is written, at most: rows may be whole books, and a batch's text must stay under 2 GB."""


def load_examples(source: str | Path, *, split: str | None = None, kind: Kind = "answers") -> Examples:
    """Read, recognise and check every row of `source`.

    Example:
        `load_examples("train.jsonl").description`

    Args:
        source: a .jsonl, .json, .csv, .tsv or .parquet file (also gzipped, Parquet apart), a folder of such files, a
            folder written by `datasets.save_to_disk`, or the name of a dataset on the Hub (`owner/name` or
            `owner/name:config`; only this downloads anything).
        split: which split of a folder or dataset that has several. Default: `train`.
        kind: what the rows are to be: answers, pairs (for DPO and its like), ranked ones (for reward
            models: with a margin where rows have one), judged answers (for KTO), prompts (for
            GRPO) with whatever functions are to judge answers by, or any of the first three, as the first row has it.

    Returns:
        The rows, in the order of the source. They live in a temporary folder that is removed when the process ends;
        nothing is written beside the data, and nothing of an earlier call is used again.

    Raises:
        DataError: naming every row that cannot be used (up to ten, and how many more), by file and line.
    """
    opened = open_source(source, split)
    try:
        return _read(opened, kind, as_turns=False)
    except NeedsTurns:
        return _read(opened, kind, as_turns=True)


def _read(opened: Source, kind: Kind, *, as_turns: bool) -> Examples:
    problems = Problems(opened.name)
    recognise, explain = _RECOGNISED[kind]
    reading = _Pass(
        problems,
        UnfoldedSize(opened.name, opened.size),
        partial(recognise, as_turns=as_turns),
        explain,
        is_table=opened.is_table,
    )
    dataset = _store(reading.rows(opened.rows(problems)), reading)
    problems.raise_if_any()
    if dataset is None or reading.layout is None:
        skipped = sentences(reading.left_out())
        if skipped:
            raise DataError(f"{opened.name} holds nothing to learn from: {'; '.join(skipped)}")
        raise DataError(f"{opened.name} is empty; expected at least one row")
    if "tools" in dataset.column_names and not reading.has_tools:
        dataset = dataset.remove_columns("tools")
    left_out = (*problems.left_out, *reading.left_out())
    return Examples(
        dataset,
        reading.layout.format,
        opened.name,
        reading.describe(len(dataset), opened.note, left_out),
        left_out,
        reading.hashed.hexdigest(),
    )


class _Pass:
    """One pass over a source: reads its rows by the layout that the first one shows, and counts what is left out."""

    def __init__(
        self,
        problems: Problems,
        unfolded: UnfoldedSize,
        recognise: Callable[[Row], Layout | None],
        explain: Callable[[Row], str],
        *,
        is_table: bool,
    ) -> None:
        self.problems, self._recognise, self._explain = problems, recognise, explain
        self._unfolded = unfolded
        self.layout: Layout | None = None
        self.has_tools = False
        self.hashed = hashlib.sha256()
        # A table has nulls and an order of keys by itself: that they change is not worth saying.
        self._unsaid = (NULLS, ORDER) if is_table else ()
        self._first = ""
        self._used: dict[str, None] = {}
        self._left_out: Counter[tuple[str, str]] = Counter()

    def rows(self, located: LocatedRows) -> Iterator[Row]:
        """Rows in our shape. Once there is a problem the rest is still checked, but no longer yielded."""
        for where, row in located:
            self._unfolded.add(size_of(row))
            if self.layout is None:
                self.layout, self._first = self._recognise(row), where
            if self.layout is None:
                self.problems.add(where, self._explain(row))
                return
            read = self._read(where, row, self.layout)
            if read is not None and not self.problems.count:
                self.has_tools |= read.get("tools") is not None
                yield read

    def _read(self, where: str, row: Row, layout: Layout) -> Row | None:
        missing = [name for name in layout.needed if name not in row]
        if missing:
            self.problems.add(
                where,
                f"has no {' and no '.join(map(repr, missing))}, unlike {self._first}; "
                f"it has {listed(row, 40) or 'nothing'}",
            )
            return None
        notes, read = Notes(), None
        try:
            read = layout.read(row, notes)
            unused = [name for name, value in row.items() if name not in notes.used and not is_empty(value)]
        except RecursionError:
            notes.wrong("is nested too deeply")
            unused = []
        for problem in notes.problems:
            self.problems.add(where, problem)
        if read is None and not notes.problems:
            notes.leave_out(layout.skipped, "skipped")
        beside = () if layout.format == "text" else BESIDE
        for name in unused:
            notes.leave_out(f"the column {name!r}", _why_unused(name, row[name], beside))
        self._used.update(notes.used)
        self._count(list(notes.left_out))
        return read

    def _count(self, parts: Sequence[tuple[str, str]]) -> None:
        known = [part for part in parts if part in self._left_out or len(self._left_out) < _MOST_LEFT_OUT]
        self._left_out.update(part for part in known if part not in self._unsaid)
        if len(known) < len(parts):
            self._left_out[_FURTHER] += 1

    def left_out(self) -> tuple[LeftOut, ...]:
        """What rows hold and nothing is learned from."""
        return tuple(LeftOut(what, rows, why) for (what, why), rows in self._left_out.items())

    def describe(self, count: int, note: str, left_out: Sequence[LeftOut]) -> str:
        """One sentence about what was read and what was left."""
        assert self.layout is not None
        parts = [f"{count:,} {'row' if count == 1 else 'rows'} read as {self.layout.sentence(list(self._used))}"]
        parts += sentences(left_out)
        if note:
            parts.append(note)
        return "; ".join(parts) + "."


def _why_unused(name: str, value: Any, beside: tuple[str, ...]) -> str:
    plain = spelling(name)
    if plain in _VERDICTS and (isinstance(value, bool) or spelling(value) in ("true", "false")):
        return "not used; what it calls bad is learned like the rest (--objective kto learns both)"
    if plain in _PREFERRED:
        return "not used; --objective dpo learns preferences"
    if plain in MEDIA:
        return "not used; the text beside it is learned as it stands, placeholders such as <image> included"
    return NOT_USED if plain in COLUMNS else not_used(name, beside)


def _as_text(row: Row) -> str:
    """A row for its hash and its size: as JSON, which every version of Python writes alike, if JSON can say it."""
    try:
        return json.dumps(row, ensure_ascii=False, default=str)
    except (TypeError, ValueError):
        return str(row)


def _store(rows: Iterator[Row], reading: _Pass) -> Dataset | None:
    """Write rows to an Arrow file as they come, so that memory holds one batch of them; None if there are none."""
    first = next(rows, None)
    if first is None or reading.layout is None:
        return None
    unwritten = 0
    try:
        # This process's own folder (in TMPDIR), removed when it ends, or else by the next one.
        folder = Path(tempfile.mkdtemp(dir=process_folder("data")))
        path = folder / "rows.arrow"
        with ArrowWriter(path=str(path), features=reading.layout.features, writer_batch_size=_BATCH_ROWS) as writer:
            for row in chain([first], rows):
                writer.write(row)
                text = _as_text(row)
                reading.hashed.update(text.encode(errors="surrogatepass"))
                unwritten += len(text)
                if unwritten > _BATCH_BYTES:
                    writer.write_examples_on_file()
                    unwritten = 0
            writer.finalize()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            place = tempfile.gettempdir()
            raise DataError(f"No space is left in {place}; set TMPDIR to a folder on a larger disk") from error
        raise
    return Dataset.from_file(str(path))
