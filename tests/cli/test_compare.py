"""The command: a dry run, a run, and its live table."""

import io
import json

import pytest
import yaml
from rich.console import Console

from theodora.cli.main import main
from theodora.compare import CompareConfig
from theodora.compare.cells import Cell, Record
from theodora.compare.store import Store
from theodora.compare.view import View


@pytest.fixture
def study(tmp_path, tiny_model_dir):
    rows = [{"prompt": f"{n}?", "completion": "even" if n % 2 == 0 else "odd"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "model": str(tiny_model_dir()),
        "output": str(tmp_path / "elsewhere"),
        "data": {"parity": {"train": str(tmp_path / "rows.jsonl"), "score": "labels"}},
        "methods": ["lora", "dora"],
        "ranks": [2],
        "learning_rates": ["1e-2"],  # as YAML reads 1e-2
        "seeds": 2,
        "steps": 2,
        "curve-points": 0,
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(options))
    return tmp_path / "study.yaml"


def test_a_dry_run_counts_and_writes_nothing(study, tmp_path, capsys):
    assert main(["compare", str(study), "--dry-run"]) == 0
    assert "1 data sets: 0 runs choose learning rates, 4 are scored, 2 steps each" in capsys.readouterr().out
    assert not (tmp_path / "elsewhere").exists()


def test_it_runs_and_flags_go_before_the_file(study, tmp_path, capsys):
    output = tmp_path / ("long-" * 20)  # longer than a line: a path is printed in one piece
    assert main(["compare", str(study), "--output", str(output)]) == 0
    assert str(output / "report.html") in capsys.readouterr().out
    assert (output / "report.html").is_file()
    assert main(["compare", str(study), "--output", str(output), "--report-only"]) == 0
    assert str(output / "report.html") in capsys.readouterr().out
    assert main(["compare", str(study), "--output", str(tmp_path / "none"), "--report-only"]) == 1
    assert "holds no finished cells" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_an_error(capsys):
    assert main(["compare", "none.yaml"]) == 2
    assert "none.yaml: No such file" in capsys.readouterr().err


def test_the_table_shows_what_is_done_and_what_runs(study, tmp_path):
    options = yaml.safe_load(study.read_text()) | {"learning_rates": [1e-3, 1e-2], "output": str(tmp_path / "table")}
    config = CompareConfig.from_options({name.replace("-", "_"): value for name, value in options.items()})
    store = Store(config)
    store.open()
    store.create()
    console = Console(file=io.StringIO(), width=110, force_terminal=False)

    class Running:
        count = 1

        def running(self):
            return [Cell(phase="tune", data="parity", variant="dora-r2", learning_rate=1e-3, seed=1000)]

    view = View(console, store, Running())
    for phase, seed, rate in (("tune", 1000, 1e-3), ("tune", 1000, 1e-2), ("final", 0, 1e-2)):
        cell = Cell(phase=phase, data="parity", variant="lora-r2", learning_rate=rate, seed=seed)
        record = Record.of(cell, config)
        record.score = record.validation_score = 0.5 + rate
        record.loss = record.validation_loss = 0.25
        record.seconds = 10.0
        store.add(record)
        view.finished(record)
    console.print(view.render())
    text = console.file.getvalue()
    assert "LoRA, rank 2" in text
    assert "0.01" in text
    assert "51.0 %" in text
    assert "choosing 0/2" in text
    assert "now tune.parity.dora-r2.lr0.001.seed1000" in text
    assert "1:00 left" in text  # base, two rates and three seeds of 10 s
