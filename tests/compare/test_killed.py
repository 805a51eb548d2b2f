"""Cells whose processes are killed: told from those that do not fit, passed over, and tried again when resumed."""

import json
from typing import Any

import pytest
from rich.console import Console

from theodora.compare import CompareConfig, compare
from theodora.compare import run as comparing
from theodora.compare.cells import Cell, Record
from theodora.compare.pool import Outcome
from theodora.compare.store import Store
from theodora.errors import TheodoraError


class Fakes:
    """Workers that finish every cell at once but those whose workers `outcomes` says die."""

    count = 1

    def __init__(self, config: CompareConfig, outcomes: dict[str, list[Outcome]]) -> None:
        self.config, self.outcomes, self.begun = config, outcomes, list[str]()
        self.taken: list[Cell] = []

    def free(self) -> int:
        return 1 - len(self.taken)

    def begin(self, cell: Cell) -> None:
        self.begun.append(cell.key)
        self.taken.append(cell)

    def running(self) -> list[Cell]:
        return list(self.taken)

    def done(self) -> Any:
        cell = self.taken[0]
        waiting = self.outcomes.get(cell.key) or []
        outcome = waiting.pop(0) if waiting else Record.of(cell, self.config)
        if isinstance(outcome, BaseException):
            raise outcome
        self.taken.pop(0)
        if isinstance(outcome, Record):
            outcome.validation_loss = outcome.loss = 1.0
        yield cell, outcome

    def close(self) -> None:
        pass


KILLED = "killed by signal 9 (SIGKILL)"


@pytest.fixture
def run(options, monkeypatch):
    monkeypatch.setattr("theodora.compare.run.write_report", lambda store: store.folder)

    def start(outcomes: dict[str, list[Any]] | None = None) -> tuple[dict[str, Record], list[str]]:
        config = CompareConfig.from_options(options)
        workers = Fakes(config, outcomes or {})
        monkeypatch.setattr(comparing, "start_workers", lambda config: workers)
        return compare(config, console=Console(quiet=True)), workers.begun

    return start


def test_three_kills_are_no_verdict(run, tmp_path):
    records, begun = run({"base": [KILLED] * 3})
    assert begun.count("base") == 3
    assert len(records) == 7
    assert records["base"].status == "killed"
    assert "killed by signal 9 (SIGKILL)" in records["base"].message
    assert "perhaps for want of memory; the same command tries it again" in records["base"].message
    records, begun = run()
    assert begun == ["base"]
    assert records["base"].status == "ok"
    assert not list((tmp_path / "out" / "cells").glob("*.begun"))


def test_what_is_killed_again_is_tried_once_each_time_and_after_all_others(run, tmp_path):
    records, _ = run({"base": [KILLED] * 3})
    lost = next(key for key in records if key.startswith("final"))
    for _ in range(3):
        (tmp_path / "out" / "cells" / f"{lost}.json").unlink()
        records, begun = run({"base": [KILLED] * 9})
        assert begun == [lost, "base"]
        assert records["base"].status == "killed"


def test_a_cell_that_kills_the_comparison_itself_does_not_keep_it_from_its_report(run, options, tmp_path):
    run({"base": [KILLED] * 3})
    begun = tmp_path / "out" / "cells" / "base.begun"
    begun.write_text("4 " + KILLED)  # tried again, and this process was killed with it
    records, begun_now = run()
    assert begun_now == []
    assert records["base"].status == "killed"
    records, begun_now = run()  # and the next time it is tried
    assert begun_now == ["base"]
    assert records["base"].status == "ok"


def test_only_what_runs_out_of_memory_by_its_own_word_is_out_of_memory(run, options):
    config = CompareConfig.from_options(options)
    record = Record.of(Cell(phase="base"), config)
    record.status = "out of memory"
    records, _ = run({"base": [record]})
    assert records["base"].status == "out of memory"
    assert run()[1] == []


@pytest.mark.parametrize("end", [TheodoraError("no worker begins"), KeyboardInterrupt(), SystemExit(1)])
def test_a_comparison_that_ends_blames_no_cell(end, run, tmp_path):
    with pytest.raises(type(end)):
        run({"base": [end]})
    assert not list((tmp_path / "out" / "cells").glob("*.begun"))


def test_a_cell_that_never_began_is_not_blamed(run):
    records, begun = run({"base": [None] * 5})
    assert begun.count("base") == 6
    assert records["base"].status == "ok"


def test_notes_of_older_versions_and_damaged_ones_are_read(options):
    store = Store(CompareConfig.from_options(options))
    store.create()
    for text, deaths in (("2", 2), ("", 0), ("junk", 0), ("3 killed by signal 9 (SIGKILL)", 3)):
        (store.folder / "cells" / "base.begun").write_text(text)
        assert store._ends("base")[0] == deaths


def test_a_killed_cell_is_in_the_record_as_such(run, tmp_path):
    run({"base": [KILLED] * 3})
    assert json.loads((tmp_path / "out" / "cells" / "base.json").read_text())["status"] == "killed"
