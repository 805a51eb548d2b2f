"""A whole comparison on a tiny model: what it writes, going on after a kill, and what goes wrong in single cells."""

import json
import multiprocessing
import re

import pyarrow.parquet as pq
import pytest
import torch
import yaml

import dying
from crash.killing import fork_server
from dying import died
from theodora.compare import CompareConfig, compare
from theodora.compare.cells import Cell
from theodora.compare.run import ComparisonInterrupted, report_only
from theodora.compare.store import Store
from theodora.compare.worker import Bench
from theodora.errors import ConfigError, DataError, UsageError
from theodora.files.alone import LOCK, alone_in

RATES = {"default": [1e-3, 1e-2], "full": [1e-3], "magnitude": [1e-2]}


def test_every_cell_runs_and_the_folder_says_so(run, options, tmp_path):
    methods = ["full", "lora", {"method": "dora", "replay": 0.25}, "magnitude"]
    data = {**options["data"], "size": {"train": str(tmp_path / "size.jsonl"), "score": "labels"}}
    records = run(methods=methods, data=data, seeds=2, learning_rates=RATES, keep_adapters=True)
    assert {r.status for r in records.values()} == {"ok"}
    assert len(records) == 1 + 2 * (2 * (2 + 2) + 2 * (0 + 2))  # base; data × methods × (rates + seeds)
    finals = [r for r in records.values() if r.phase == "final"]
    assert all(r.score is not None and r.general_loss and r.loss and len(r.curve) == 2 for r in finals)
    assert all(set(r.other_scores) == {"parity", "size"} - {r.data} for r in finals)
    out = tmp_path / "out"
    table = pq.read_table(out / "results.parquet")
    assert table.num_rows == len(records)
    assert {"score", "general_loss", "score_on_size", "loss_on_size", "curve_step"} <= set(table.column_names)
    page = (out / "report.html").read_text()
    assert "not finished" not in page
    assert page.count("<svg") == 8
    # Names of XML's kinds look like addresses; nothing is loaded from anywhere.
    assert not re.search(r'(src|href)="(?!#)|@import|url\((?!#)', page)
    assert len(list((out / "adapters").iterdir())) == 2 * 3 * 2
    # The same command again runs nothing.
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    run(methods=methods, data=data, seeds=2, learning_rates=RATES)
    assert before == {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}


@pytest.fixture
def bench(options):
    return Bench(CompareConfig.from_options(options | {"methods": ["full", "lora", "dora"]}), torch.device("cpu"))


@pytest.mark.parametrize("method", ["full", "lora", "dora"])
def test_a_cell_leaves_the_base_as_it_was_and_gives_the_same_again(method, bench):
    before = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
    key = method if method == "full" else f"{method}-r2"
    cell = Cell(phase="final", data="parity", variant=key, learning_rate=1e-2, seed=0)
    first, second = bench.run(cell), bench.run(cell)
    assert first.status == "ok", first.message
    after = bench.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad for p in bench.model.parameters())
    assert (first.losses, first.score, first.loss, first.curve) == (
        second.losses,
        second.score,
        second.loss,
        second.curve,
    )
    other = bench.run(Cell(phase="final", data="parity", variant=key, learning_rate=1e-2, seed=1))
    assert other.losses != first.losses


def test_partly_trained_methods_move_only_their_part(options):
    config = CompareConfig.from_options(
        options | {"methods": ["magnitude", "direction", "dora", "pissa", "rslora", "lora+"]}
    )
    bench = Bench(config, torch.device("cpu"))
    moved = {}
    for variant in config.variants:
        with bench._trainable(variant):
            moved[variant.name] = {
                name.rpartition(".")[2] for name, p in bench.model.named_parameters() if p.requires_grad
            }
    low_rank = {"lora_A", "lora_B"}
    assert moved["magnitude"] == {"magnitude"}
    assert moved["direction"] == low_rank
    assert moved["dora"] == low_rank | {"magnitude"}
    assert moved["pissa"] == moved["rslora"] == moved["lora+"] == low_rank


@pytest.mark.usefixtures("undrawn")
def test_it_goes_on_where_it_was_broken_off(run, tmp_path):
    some = run(seconds=0.0)  # no cell is begun
    assert some == {}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "not finished: 7 cells" in page
    (tmp_path / "out" / "cells" / "base.begun").write_text("1")  # as a killed process leaves it
    whole = run()
    assert len(whole) == 7
    assert not list((tmp_path / "out" / "cells").glob("*.begun"))
    lost = next(key for key in whole if key.startswith("final.parity.dora"))
    (tmp_path / "out" / "cells" / f"{lost}.json").unlink()
    again = run()
    assert again[lost].losses == whole[lost].losses
    assert again[lost].score == whole[lost].score


@pytest.mark.usefixtures("undrawn")
def test_a_killed_process_loses_nothing_but_the_cell_at_hand(options, tmp_path):
    assert died(dying.compare, options)
    cells = tmp_path / "out" / "cells"
    assert len(list(cells.glob("*.json"))) == 2
    assert len(list(cells.glob("*.begun"))) == 1
    records = compare(CompareConfig.from_options(options))
    assert len(records) == 7


@pytest.mark.usefixtures("undrawn")
def test_ctrl_c_keeps_what_is_done(run, tmp_path, monkeypatch):
    original, calls = Bench.run, []

    def interrupted(self, cell):
        calls.append(cell)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, cell)

    monkeypatch.setattr(Bench, "run", interrupted)
    with pytest.raises(ComparisonInterrupted, match=r"2 cells are kept .* the same command goes on"):
        run()
    assert not list((tmp_path / "out" / "cells").glob("*.begun"))


@pytest.mark.usefixtures("undrawn")
def test_failures_are_recorded_and_the_others_go_on(run, tmp_path, monkeypatch):
    original = Bench._train

    def scarce(self, cell, variant, record, *others):
        if variant.method == "dora":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        original(self, cell, variant, record, *others)

    monkeypatch.setattr(Bench, "_train", scarce)
    rates = {"default": [1e-2], "full": [1e-2, 1e30]}
    records = run(methods=["full", "lora", "dora"], learning_rates=rates, max_grad_norm=0.0, steps=8)
    status = {key: record.status for key, record in records.items()}
    assert {s for key, s in status.items() if ".dora" in key} == {"out of memory"}
    assert {s for key, s in status.items() if "lr1e+30" in key} == {"diverged"}
    assert {s for key, s in status.items() if ".lora" in key} == {"ok"}
    assert {r.learning_rate for r in records.values() if r.method == "full" and r.phase == "final"} == {1e-2}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Runs that failed" in page
    assert "Tried to allocate 2 GiB" in page
    assert "no run finished" in page


@pytest.mark.usefixtures("undrawn")
def test_a_metric_that_gives_nan_fails_its_cells_and_says_where(run, tmp_path, options):
    metric = tmp_path / "metric.py"
    metric.write_text(
        "def half(answer, reference):\n    return 0.5\n\ndef broken(answer, reference):\n    return float('nan')\n"
    )
    data = {
        name: {"train": str(tmp_path / "size.jsonl"), "score": f"{metric}:{name}", "test": 4, "max_new_tokens": 4}
        for name in ("half", "broken")
    }
    records = run(data=data, methods=["lora"], learning_rates=[1e-2], other_rows=0, allow_code=[str(metric)])
    good, bad = (next(r for r in records.values() if r.data == name) for name in ("half", "broken"))
    assert good.score == 0.5
    assert bad.status == "failed"
    assert "broken gave nan at row 1" in bad.message


@pytest.mark.usefixtures("undrawn")
def test_a_folder_of_another_comparison_is_refused(run, tmp_path, options):
    run()
    with pytest.raises(
        UsageError, match=r"(?s)other settings:.*data.parity.test: 16 there, 12 now.*steps: 3 there, 4 now"
    ):
        run(steps=4, data={**options["data"], "parity": {**options["data"]["parity"], "test": 12}})
    (tmp_path / "parity.jsonl").write_text('{"prompt": "1", "completion": "yes"}\n' * 3)
    with pytest.raises(UsageError, match=r"contents.*parity.jsonl"):
        run()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    with pytest.raises(UsageError, match="holds no comparison"):
        run(output=str(tmp_path / "other"))


@pytest.mark.usefixtures("undrawn")
def test_data_without_answers_is_refused_before_anything_runs(run, tmp_path, options):
    bad = {"a": {"train": options["general"], "score": "labels"}, "b": {"train": str(tmp_path / "none.jsonl")}}
    with pytest.raises(DataError, match=r"(?s)data.a: .*plain text, which has no answers.*data.b: .*none.jsonl"):
        run(data=bad)
    rows = [{"prompt": str(n), "completion": f"answer {n}"} for n in range(200)]
    (tmp_path / "open.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"200 different answers: that is no closed set"):
        run(data={"a": {"train": str(tmp_path / "open.jsonl"), "score": "labels"}})


def test_everything_wrong_with_a_file_is_said_at_once(options):
    wrong = {
        "methods": ["lora", "dorra", {"method": "full", "alpha": 3}, {"method": "dora", "init": "best"}],
        "steps": 0,
        "stepps": 3,
    }
    with pytest.raises(ConfigError, match="no option stepps"):
        CompareConfig.from_options(options | wrong)
    del wrong["stepps"]
    with pytest.raises(ConfigError) as caught:
        CompareConfig.from_options(options | wrong)
    for part in (
        "'dorra' is no method",
        "full fine-tuning has no adapter, and so no alpha",
        "init is 'best'",
        "steps is 0",
    ):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="replay, and general is missing"):
        CompareConfig.from_options({**options, "general": None, "methods": [{"method": "lora", "replay": 0.1}]})


def test_settings_come_back_from_yaml(options):
    config = CompareConfig.from_options(options)
    again = CompareConfig.from_options(yaml.safe_load(yaml.safe_dump(config.to_options())))
    assert again.to_options() == config.to_options()


@pytest.mark.usefixtures("undrawn")
def test_several_processes_give_the_same(run, options, tmp_path, monkeypatch):
    monkeypatch.setattr("theodora.compare.pool.places", lambda config: ["cpu"])
    alone = run(methods=["lora"], learning_rates=[1e-2])
    server = fork_server()  # spawned ones would import everything anew
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: server)
    monkeypatch.setattr("theodora.compare.pool.places", lambda config: ["cpu", "cpu"])
    together = run(methods=["lora"], learning_rates=[1e-2], output=str(tmp_path / "two"))
    assert alone.keys() == together.keys()
    assert all(together[key].losses == alone[key].losses for key in alone)
    assert all(together[key].score == alone[key].score for key in alone)


def test_a_report_can_be_written_anew(run, options, tmp_path):
    run(methods=["lora"], learning_rates=[1e-2])
    (tmp_path / "out" / "report.html").unlink()
    config = CompareConfig.from_options(options | {"methods": ["lora"], "learning_rates": [1e-2]})
    assert report_only(config).is_file()
    assert (tmp_path / "out" / "report.html").stat().st_size > 1000


def test_a_folder_that_a_killed_process_had_begun_is_taken_and_one_in_use_is_not(run, options, tmp_path):
    output = tmp_path / "out"
    (output / ".settings.yaml.partial-abcdefgh").mkdir(parents=True)
    (output / LOCK).write_text("{}")
    Store(CompareConfig.from_options(options)).open()
    with alone_in(output), pytest.raises(UsageError, match="in use by process"):
        run()
    (output / "mine.txt").write_text("")
    with pytest.raises(UsageError, match="holds no comparison"):
        run()
    assert sorted(path.name for path in output.iterdir()) == [".settings.yaml.partial-abcdefgh", "mine.txt"]
