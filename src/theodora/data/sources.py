"""Finds out what a source is (a file, a folder of files, a saved dataset, a dataset on the Hub) and opens its rows."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from theodora.data.arrow_sizes import file_size, is_compressed, may_repeat, table_size
from theodora.data.files import BATCH_ROWS, SUFFIXES, LocatedRows, read_parquet, reader_for
from theodora.data.hub import load_from_hub
from theodora.data.problems import Problems, listed, nearest
from theodora.data.stored import json_columns, plain_rows
from theodora.data.unfolded_size import UnfoldedSize
from theodora.errors import DataError, shown
from theodora.files.memory import available_memory
from theodora.parse import parse_json

_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")
# The words in file and folder names that `datasets` reads as splits, too.
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
    "testing": "test",
}
# What datasets and LLaMA-Factory write about the files beside them.
_ABOUT = ("dataset_info.json", "dataset_infos.json")


@dataclass(frozen=True)
class Source:
    """Rows that can be read, once opened."""

    name: str
    rows: Callable[[Problems], LocatedRows]
    note: str = ""
    """What was chosen among several splits and files, for people."""
    size: int = 0
    """Bytes on disk."""
    is_table: bool = False
    """The rows share one set of keys, so that nulls and the order of keys are nobody's words."""


def open_source(source: str | Path, split: str | None) -> Source:
    """Find out what `source` is.

    Raises:
        DataError: there is no such file, or no such split, or the kind is unknown.
    """
    name = str(source)
    try:
        path = Path(source).expanduser()
        is_file = path.is_file()
    except (OSError, RuntimeError) as error:  # a name too long, a user (~name) who does not exist
        raise DataError(f"{name} is no file or folder: {error}") from error
    if is_file:
        return _open_file(path, name, split)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _open_saved(path, name, split)
    if path.is_dir():
        return _open_folder(path, name, split)
    hub = _HUB_NAME.fullmatch(name)
    # `runs/data.jsonl` or `data/nothere` (with a folder data) is a slip of the pen and no dataset's name.
    if isinstance(source, str) and hub and reader_for(path) is None and not path.parent.is_dir():
        return _open_hub(hub["name"], hub["config"], split)
    raise DataError(_missing(path))


def _open_file(path: Path, name: str, split: str | None) -> Source:
    reader = reader_for(path)
    if reader is None:
        raise DataError(f"{name} ends in {path.suffix or 'no suffix'}, which cannot be read; expected {SUFFIXES}")
    if split is not None:
        raise DataError(f"{name} is one file, which has no split {split!r}; leave the split out")
    size = path.stat().st_size
    return Source(name, lambda problems: reader(path, problems), size=size, is_table=reader is read_parquet)


def _open_folder(path: Path, name: str, split: str | None) -> Source:
    by_split: dict[str, list[Path]] = {}
    others: list[str] = []
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path)
        if not file.is_file() or any(part.startswith(".") for part in inside.parts):
            continue
        if reader_for(file) and file.name not in _ABOUT:
            by_split.setdefault(_split_of(inside), []).append(file)
        else:
            others.append(str(inside))
    if not by_split:
        raise DataError(f"{name} is a folder without data files; expected some of {SUFFIXES}, or a saved dataset")
    chosen = _choose_split(list(by_split), split, name)

    def rows(problems: Problems) -> LocatedRows:
        for file in by_split[chosen]:
            within = _Within(problems, str(file.relative_to(path)))
            reader = reader_for(file)
            assert reader is not None
            for where, row in reader(file, within):
                yield within.locate(where), row

    tables = all(reader_for(file) is read_parquet for file in by_split[chosen])
    notes = [_note(chosen, list(by_split))]
    if others:
        notes.append(f"files of other kinds are not read: {listed(others)}")
    size = sum(file.stat().st_size for file in by_split[chosen])
    return Source(name, rows, "; ".join(filter(None, notes)), size=size, is_table=tables)


def _open_saved(path: Path, name: str, split: str | None) -> Source:
    try:
        _check_within(path)
        stored = [file for file in path.rglob("*.arrow") if file.is_file()]
        unfolded = UnfoldedSize(name, sum(file.stat().st_size for file in stored))
        for file in stored:
            if is_compressed(file):
                raise DataError(f"{name}: the buffers in {file.name} are compressed; save it anew with `datasets`")
            unfolded.add(file_size(file, unfolded.allowed))
        saved = datasets.load_from_disk(str(path), keep_in_memory=_fits_in_memory(path))
        for part in saved.values() if isinstance(saved, datasets.DatasetDict) else [saved]:
            # Arrow trusts the offsets in a file, and reads anywhere in memory if they are wrong.
            part.data.validate(full=True)
    except DataError:
        raise
    except Exception as error:  # datasets and pyarrow raise what a damaged file leads them to
        raise DataError(f"{name} is a saved dataset that cannot be read: {error}") from error
    return _open_dataset(saved, name, split, path)


def _check_within(path: Path) -> None:
    """Raise a ValueError if a saved data set names files or splits that are not in its folder."""
    about = path / "dataset_dict.json"
    splits = parse_json(about.read_text(encoding="utf-8"))["splits"] if about.is_file() else []
    folders = [path / str(split) for split in splits] or [path]
    states = [folder / "state.json" for folder in folders]
    files = [
        file["filename"]
        for state in states
        if state.is_file()
        for file in parse_json(state.read_text(encoding="utf-8"))["_data_files"]
    ]
    outside = [name for name in (*splits, *files) if Path(name).name != name]
    if outside:
        raise ValueError(f"it names {shown(outside[0])}, which is outside of its folder")


def _fits_in_memory(path: Path) -> bool:
    """Whether a saved dataset is small enough to be copied: one that is mapped, and written anew in place by somebody
    while it is read, ends the process (SIGBUS)."""
    return 4 * sum(file.stat().st_size for file in path.rglob("*.arrow") if file.is_file()) < available_memory()


def _open_hub(name: str, config: str | None, split: str | None) -> Source:
    try:
        loaded = load_from_hub(name, config)
    except Exception as error:  # the network, the Hub and each builder raise kinds of their own
        raise DataError(
            f"There is no file or folder {name} here, and no dataset of that name could be loaded from the Hub: {error}"
        ) from error
    return _open_dataset(loaded, name, split)


def _open_dataset(loaded: Any, name: str, split: str | None, folder: Path | None = None) -> Source:
    """`folder`: where it is saved; datasets tells only of the Hub's which files it has mapped."""
    note = ""
    if isinstance(loaded, datasets.DatasetDict):
        chosen = _choose_split([str(key) for key in loaded], split, name)
        loaded, note = loaded[chosen], _note(chosen, [str(key) for key in loaded])
        folder = folder / chosen if folder is not None else None
    elif split not in (None, str(loaded.split)):
        raise DataError(f"{name} is one dataset, which has no split {split!r}; leave the split out")

    files = [Path(file["filename"]) for file in loaded.cache_files] if folder is None else folder.glob("*.arrow")
    size = sum(file.stat().st_size for file in files)
    unfolded = UnfoldedSize(name, size)
    if may_repeat(loaded.data.schema) and (rows_size := table_size(loaded.data, unfolded.allowed)) > unfolded.allowed:
        raise DataError(unfolded.complaint(rows_size))

    # It may have been saved in another form (arrays, tensors) or with some of its columns hidden. As Arrow, nothing in
    # it is decoded: pictures and sounds would be opened wherever a row says that they are.
    tables, json = loaded.with_format("arrow"), json_columns(loaded.features)

    def rows(problems: Problems) -> LocatedRows:
        number = 0
        try:
            for table in tables.iter(batch_size=BATCH_ROWS):
                for row in plain_rows(table, json):
                    number += 1
                    yield f"row {number}", row
        except (pa.ArrowException, ValueError, KeyError, TypeError, OSError, OverflowError) as error:  # damaged JSON
            problems.add(f"row {number + 1}", f"cannot be read ({error})")

    return Source(name, rows, note, size=size, is_table=not json)


class _Within(Problems):
    """The problems of one file of a folder, told to the folder's."""

    def __init__(self, parent: Problems, file: str) -> None:
        super().__init__(parent.source)
        self._parent, self._file = parent, file
        self.left_out = parent.left_out

    def add(self, where: str, what: str) -> None:
        self._parent.add(self.locate(where), what)

    def locate(self, where: str) -> str:
        return f"{self._file}, {where}" if where else self._file


def _split_of(inside: Path) -> str:
    """The split that a file's name or folder speaks of; files that speak of none are for training."""
    for part in reversed(inside.with_suffix("").parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return "train"


def _choose_split(splits: list[str], wanted: str | None, name: str) -> str:
    if wanted in splits:
        return str(wanted)
    if wanted is not None:
        raise DataError(f"{name} has no split {wanted!r}; it has {', '.join(splits)}{nearest(wanted, splits)}")
    if "train" in splits or len(splits) == 1:
        return "train" if "train" in splits else splits[0]
    raise DataError(f"{name} has the splits {', '.join(splits)} and none called train; say which one to read")


def _note(chosen: str, splits: list[str]) -> str:
    return f"split {chosen} of {', '.join(splits)}" if len(splits) > 1 else ""


def _missing(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"There is no folder {folder}, so no file {path} either"
    close = get_close_matches(path.name, os.listdir(folder), n=3)
    return f"There is no file or folder {path}" + (f"; near it are {', '.join(close)}" if close else "")
