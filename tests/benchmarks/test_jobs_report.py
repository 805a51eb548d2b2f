"""What the benchmark of whole jobs says of what it measured: tables, goals, and the picture."""

import importlib
import json

import pytest

import scripts

MACHINE = {"gpus": ["Some GPU, 80 GB"], "commit": "abc", "date": "2026-11-29T00:00:00", "versions": {"torch": "2.11"}}
CPU = MACHINE | {"gpus": [], "cores": 2, "cpu": "Some CPU"}


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(scripts.ROOT / "benchmarks")
    return importlib.import_module("jobs_report")


def taken(*runs, **more):
    return {"runs": [{"first": number == 0, **run} for number, run in enumerate(runs)], **more}


def trained(whole, before, step, imports=4.0):
    return {"whole": whole, "before": before, "stepping": 99 * step, "step": step, "busy": 0.9, "imports": imports}


def job(ways, machine=MACHINE, **more):
    settings = {"rounds": 3, "steps": 100}
    return {"machine": machine, "settings": settings, "bytecode": "beside", "parts": 1, "ways": ways, **more}


def test_first_starts_stand_beside_later_ones(report):
    ways = {
        "dora": taken(trained(40.0, 30.0, 0.5, imports=7.0), trained(11.0, 8.0, 0.02), trained(13.0, 10.0, 0.04)),
        "peft-dora": taken(trained(60.0, 9.0, 0.45), failed="exit code 1: no room | none"),
        "unsloth-dora": taken(skipped="not installed"),
        "peft-lora": taken(failed="exit code 1: no room | none"),
    }
    text = report.tables({"jobs": {"a": job(ways, tokens=300.0, parts=2)}})
    assert "| a | Theodora DoRA | 5.0 s | 26.0 s | 30.0 ms | 10,000 | 90% | 12.0 s | 40.0 s |" in text
    assert "| a | TRL + PEFT DoRA (1 run, then failed) | 5.0 s | 5.0 s | 450.0 ms |" in text
    assert "| a | Unsloth DoRA | skipped: not installed |" in text
    assert "| a | TRL + PEFT LoRA | failed: exit code 1: no room / none |" in text
    assert "- a: Some GPU; commit abc, 2026-11-29; torch 2.11; bytecode beside." in text
    assert "one round" not in text
    assert "measured in 2 parts" in text


def test_goals_are_held_against_what_was_measured(report):
    def tokenized(rate, most):
        chats = {"rows_a_second_a_core": rate, "own_megabytes_at_most": most}
        return {"whole": 1.0, "rows": 10, "kinds": {"chats": chats}}

    jobs = {
        "a": job({"dora": taken(trained(20.0, 9.0, 0.04)), "peft-dora": taken(trained(50.0, 9.0, 0.4))}),
        "b": job({"dora": taken(trained(9.0, 9.0, 0.10)), "bare": taken({"step": 0.09, "tokens": 270})}, tokens=300.0),
        "d": job({"evaluate": taken({"whole": 5.0}), "before-evaluate": taken({"whole": 61.0})}),
        "e": job({"tokenize": taken(tokenized(100, 500)), "before-tokenize": taken(tokenized(30, 500))}),
        "f": job({"demo": taken({"whole": 360.0, "steps": 80, "dtype": "float32"})}, machine=CPU),
    }
    jobs["e"]["ways"]["tokenize-all"] = taken(tokenized(100, 600))
    found = report.goals({"jobs": jobs})
    for line in (
        "| a: a step of DoRA, against TRL + PEFT DoRA | 10.0 × | 5 ×: met | 12 ×: not met |",
        "| a: before the first step, over imports | 5.0 s | 6 s: met | 3 s: not met |",
        "| a: whole command, 100 steps | 2.5 × | 2 ×: met | 4 ×: not met |",
        "| b: tokens/s, of the bare step's | 1.00 | 0.8: met | 0.92: met |",
        "| c: tokens/s, of the bare step's | not measured | 0.8 | 0.92 |",
        "| d: evaluate, against before | 12.2 × | 6 ×: met | 12 ×: met |",
        "| e: rows a second a core, against before, chats | 3.3 × | 4 ×: not met | 10 ×: not met |",
        "| e: memory for ten times the rows, chats | 1.20 × | 1.1 ×: not met | 1.1 ×: not met |",
        "| f: the demo, as the CPU is | 6.0 min | 8 min: met | 5 min: not met |",
        "| f: the demo, AVX2 and float32 | not measured | 8 min | 5 min |",
    ):
        assert line in found
    jobs["d"]["settings"] |= {"tiny": True}
    assert "| d: evaluate, against before | not measured | 6 × | 12 × |" in report.goals({"jobs": jobs})
    text = report.tables({"jobs": jobs})
    assert "| f | theodora demo | float32 | 80 |" in text
    assert "| e | tokenising, all rows | 10 | chats | 100 | 600 |" in text
    assert "- f: 2 cores of Some CPU;" in text


def test_the_picture_shows_what_is_missing(report, tmp_path):
    figure = importlib.import_module("jobs_figure")
    ways = {"dora": taken(trained(12.0, 8.0, 0.03)), "peft-dora": taken(failed="exit code 1: " + 50 * "no room ")}
    jobs = {"a": job(ways | {"bare": taken({"step": 0.1})}), "d": job({"evaluate": taken({"whole": 5.0})}, rows=400)}
    figure.draw({"jobs": jobs}, tmp_path / "jobs.svg")
    assert "<svg" in (tmp_path / "jobs.svg").read_text()
    assert figure.places(["dora", "peft-dora", "lora"]) == [0.0, 1.0, 2.5]
    with pytest.raises(SystemExit, match="nothing to draw"):
        figure.draw({"jobs": {"e": job({})}}, tmp_path / "none.png")


def test_it_prints_a_results_file(monkeypatch, tmp_path, capsys):
    results = tmp_path / "jobs.json"
    results.write_text(json.dumps({"jobs": {"d": job({"evaluate": taken({"whole": 5.0})})}}))
    scripts.run(monkeypatch, "benchmarks/jobs_report.py", results)
    assert "| d | theodora evaluate |" in capsys.readouterr().out
