"""The results folder: settings.yaml, a JSON file for each finished cell, results.parquet.

A cell's file appears whole or not at all, so a process killed at any moment loses the cells at hand and no others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from theodora.compare.cells import Cell, Record
from theodora.compare.config import CompareConfig, is_code
from theodora.errors import UsageError, bullet_list
from theodora.files.alone import is_empty
from theodora.files.atomic import atomic_write
from theodora.files.distrust import expanded
from theodora.files.model_folder import is_adapter_folder
from theodora.files.names import WEIGHTS_NAME
from theodora.parse import to_json
from theodora.train.scorers import is_model_folder
from theodora.trust import names_a_file

SETTINGS, PARQUET, REPORT, CELLS = "settings.yaml", "results.parquet", "report.html", "cells"
# Settings that change how fast results come, and what is saved beside them, but not the results.
_FREE = ("output", "trust_remote_code", "workers_per_gpu", "keep_adapters")
_MOST_DEATHS = 3  # times that a process may die in a cell before the cell is passed over


class Store:
    """Records on disk."""

    def __init__(self, config: CompareConfig) -> None:
        self.folder = Path(config.output)
        self.config = config
        self.records: dict[str, Record] = {}
        self.again: set[str] = set()
        """Keys of cells that were passed over as killed, and are tried once more in this run."""

    def open(self) -> None:
        """Take up what an earlier run of the same comparison left in the folder, if anything; nothing is written.

        Raises:
            UsageError: the folder holds something else; the message shows the difference.
        """
        settings = self.folder / SETTINGS
        cells = sorted((self.folder / CELLS).glob("*.json"))
        if not settings.is_file():
            if self.folder.exists() and not is_empty(self.folder):
                raise UsageError(f"{self.folder} exists and holds no comparison; choose another output")
        elif cells:
            _check_same(self.folder, yaml.safe_load(settings.read_text(encoding="utf-8")), _settings(self.config))
        self.records = {record.key: record for record in map(_read, cells)}

    def create(self) -> None:
        """Make the folder, and write down what is in it."""
        text = yaml.safe_dump(_settings(self.config), sort_keys=False, allow_unicode=True)
        with atomic_write(self.folder / SETTINGS) as file:
            file.write_text(text, encoding="utf-8")
        (self.folder / CELLS).mkdir(exist_ok=True)

    def add(self, record: Record) -> None:
        """Keep the record of a finished cell."""
        with atomic_write(self._path(record.key)) as file:
            file.write_text(to_json(record.to_dict()), encoding="utf-8")
        if record.status != "killed":
            self._deaths(record.key).unlink(missing_ok=True)
        self.records[record.key] = record

    def try_killed_again(self) -> None:
        """Take cells that were passed over for cells that have not run, each once in this run.

        Whether they were killed for want of memory nobody can know; a smaller machine's verdict is none for this one.
        One that killed this very process, when it was tried again the last time, is passed over this time, so that
        the report can be written.
        """
        for key in [key for key, record in self.records.items() if record.status == "killed"]:
            deaths, how = self._ends(key)
            if deaths > _MOST_DEATHS:
                self._note(key, _MOST_DEATHS, how)
            else:
                self.again.add(key)
                del self.records[key]

    def begin(self, cell: Cell) -> Record | None:
        """Note that a cell begins. A record if its process has already died too often."""
        deaths, how = self._ends(cell.key)
        if deaths >= _MOST_DEATHS and cell.key not in self.again:
            self._note(cell.key, _MOST_DEATHS, how)
            record = Record.of(cell, self.config)
            record.status = "killed"
            record.message = (
                f"its process died {deaths} times while this cell ran ({how or 'nothing says how'}), perhaps for want "
                "of memory; the same command tries it again"
            )
            return record
        self.again.discard(cell.key)
        self._note(cell.key, deaths + 1, how)
        return None

    def died(self, cell: Cell, how: str) -> None:
        """Note how the process of a cell ended."""
        self._note(cell.key, self._ends(cell.key)[0], how)

    def not_its_fault(self, cell: Cell) -> None:
        """Take back what `begin` noted: the cell was broken off from outside, or never began."""
        deaths, how = self._ends(cell.key)
        if deaths > 1:
            self._note(cell.key, deaths - 1, how)
        else:
            self._deaths(cell.key).unlink(missing_ok=True)

    def write_parquet(self) -> Path:
        """Write all records as one table, a row for each cell."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [_flat(record) for _, record in sorted(self.records.items())]
        names = list(dict.fromkeys(name for row in rows for name in row))
        table = pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
        with atomic_write(self.folder / PARQUET) as file:
            pq.write_table(table, file)
        return self.folder / PARQUET

    def _path(self, key: str) -> Path:
        return self.folder / CELLS / f"{key}.json"

    def _ends(self, key: str) -> tuple[int, str]:
        """How often the process of a cell has died, and how it did the last time, where that is known."""
        path = self._deaths(key)
        count, _, how = path.read_text(encoding="utf-8").partition(" ") if path.is_file() else ("", "", "")
        return int(count) if count.strip().isdecimal() else 0, how

    def _note(self, key: str, deaths: int, how: str) -> None:
        self._deaths(key).write_text(f"{deaths} {how}", encoding="utf-8")

    def _deaths(self, key: str) -> Path:
        return self.folder / CELLS / f"{key}.begun"


def _read(path: Path) -> Record:
    values = json.loads(path.read_text(encoding="utf-8"))
    for name in ("losses", "curve"):
        values[name] = [tuple(point) for point in values[name]]
    return Record(**values)


def _flat(record: Record) -> dict[str, Any]:
    """Scores on other data sets as columns of their own, curves as lists of steps and of losses."""
    values = record.to_dict()
    del values["sizes"]
    judged: Mapping[str, Mapping[str, float]] = values.pop("judged")
    for data, found in judged.items():
        where = "" if data == record.data else f"_on_{data}"
        values |= {f"{name.replace('rewards/', 'reward_')}{where}": value for name, value in found.items()}
    for what in ("scores", "losses"):
        elsewhere: Mapping[str, float] = values.pop(f"other_{what}")
        values |= {f"{what[:-1] if what == 'scores' else 'loss'}_on_{name}": value for name, value in elsewhere.items()}
    for name in ("losses", "curve"):
        points = values.pop(name)
        values[f"{name}_step"], values[f"{name}_loss"] = [p[0] for p in points], [p[1] for p in points]
    return values


def _settings(config: CompareConfig) -> dict[str, Any]:
    """The settings that results depend on, and what the files hold: another file under the same name is another."""
    unasked = () if config.reward else ("reward", "reward_weights", "reward_timeout")  # as in folders of older versions
    options = {name: value for name, value in config.to_options().items() if name not in (*_FREE, *unasked)}
    sources = {config.model, *([config.general] if config.general else [])}
    for data in config.data.values():
        sources |= {value for value in (data.train, data.validation, data.test) if isinstance(value, str)}
        if is_code(data.score):
            sources.add(data.score.rpartition(":")[0])
    for name in config.reward:
        if is_model_folder(name):
            sources.add(f"{name}/{WEIGHTS_NAME}" if is_adapter_folder(expanded(name)) else name)
        elif names_a_file(name):
            sources.add(name.rpartition(":")[0])
    sources |= {f"{v.from_adapter}/{WEIGHTS_NAME}" for v in config.variants if v.from_adapter is not None}
    return {**options, "contents": {source: _content(Path(source)) for source in sorted(sources)}}


def _content(path: Path) -> str:
    """A short hash of a file, or of the names and sizes in a folder (of a model's weights nothing more is read)."""
    path = path.expanduser()
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    if path.is_dir():
        listing = sorted((str(f.relative_to(path)), f.stat().st_size) for f in path.rglob("*") if f.is_file())
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]
    return "by name"


def _check_same(folder: Path, before: Any, now: dict[str, Any]) -> None:
    there, here = dict(_leaves(before)), dict(_leaves(now))
    different = [
        f"{name}: {_shown(there, name)} there, {_shown(here, name)} now"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if different:
        raise UsageError(
            f"{folder} holds a comparison with other settings:{bullet_list(different)}\n"
            "Choose another output, or use the same settings."
        )


def _leaves(value: Any, name: str = ""):
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _shown(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "nothing"
