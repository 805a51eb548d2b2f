"""The benchmark of whole jobs: its clock, its processes, its ways, and that a small one runs."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import scripts

SCRIPT = "benchmarks/jobs.py"


@pytest.fixture
def module(monkeypatch):
    """Modules of the benchmark by name, as they import one another."""
    monkeypatch.syspath_prepend(scripts.ROOT / "benchmarks")
    return importlib.import_module


@pytest.fixture
def ground(module, tmp_path):
    """What the ways of a job share, by words of the command line."""

    def of(*words):
        return module("jobs_ways").Ground(tmp_path, module("jobs").parse_args([*map(str, words)]))

    return of


def test_the_clock_notes_every_step():
    clock = scripts.load("benchmarks/jobs_clock.py")

    class Handler:
        def on_step_begin(self, *args):
            return "begun"

        def on_step_end(self, *args):
            return "ended"

    steps = []
    clock._put_clock_into(Handler, steps)
    handler, state = Handler(), SimpleNamespace(global_step=2, max_steps=2)
    for _ in range(2):
        assert handler.on_step_begin(None, state, None) == "begun"
        assert handler.on_step_end(None, state, None) == "ended"
    (begun, ended), (again, last) = steps
    assert begun <= ended <= again <= last


def test_seconds_of_a_run_are_split_at_its_steps(module):
    process = module("jobs_process")
    steps = [(110.0, 114.0), *((114.0 + i, 114.5 + i) for i in range(22))]
    use = [(112.0, 0.1), (124.0, 0.8), (125.0, 1.0), (140.0, 0.0)]
    found = process.figures(100.0, 40.0, steps, use)
    assert found.pop("step") == pytest.approx((135.5 - 123.0) / 13)  # the first ten warm up
    assert found == {"whole": 40.0, "before": 14.0, "stepping": 21.5, "busy": 0.9}


def test_rows_are_counted_with_the_token_that_ends_them(module, tmp_path):
    shapes = module("jobs_shapes")
    job = shapes.job_of("a", tiny=True, rows=7)
    tokens = shapes.write_rows(tmp_path / "rows.jsonl", job, shapes.tokenizer_of(None))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"prompt", "completion"}] * 7
    lengths = [len((row["prompt"] + row["completion"]).split()) for row in rows]
    assert all(32 <= length <= 96 for length in lengths)
    assert tokens == sum(length + 1 for length in lengths) / 7


def test_a_way_keeps_what_it_compiled_to_itself(module, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "relative")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    process = module("jobs_process")
    place = process.Place(tmp_path / "way", (tmp_path / "src",), tmp_path / "bytecode", {"MORE": "1"})
    found = place.variables()
    kept = {name: Path(found[name]) for name in process.KEPT}
    assert {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "THEODORA_CACHE"} <= kept.keys()
    assert all(path.is_relative_to(tmp_path / "way") for path in kept.values())
    assert len(set(kept.values())) == len(kept)
    assert found["PYTHONPATH"].split(os.pathsep) == [str(tmp_path / "src"), str(Path("relative").resolve())]
    assert found["PYTHONPYCACHEPREFIX"] == str(tmp_path / "bytecode")
    assert found["HF_HUB_OFFLINE"] == found["MORE"] == "1"
    assert "PYTHONDONTWRITEBYTECODE" not in found


def test_a_process_that_fails_gives_its_last_line(module, tmp_path, capsys):
    process = module("jobs_process")
    command = ["-c", "import sys; sys.exit('much\\n10%\\r20%\\rno room\\n\\n')"]
    with pytest.raises(process.ProcessFailed, match=r"^exit code 1: no room$"):
        process.run_process(command, process.Place(tmp_path / "way"))
    assert "much" in capsys.readouterr().err


def test_bytecode_lies_elsewhere_where_packages_cannot_be_written(module, tmp_path, monkeypatch):
    process = module("jobs_process")
    package = tmp_path / "packages" / "some"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert process.compile_bytecode(tmp_path, [], [package.parent]) is None
    assert [*package.glob("__pycache__/*.pyc")]
    monkeypatch.setattr(process.os, "access", lambda folder, mode: folder != package.parent)
    assert process.compile_bytecode(tmp_path, [], [package.parent]) == tmp_path / "bytecode"
    assert [*(tmp_path / "bytecode").rglob("*.pyc")]


def test_ways_of_training(module, ground, tmp_path, monkeypatch):
    ways = module("jobs_ways")
    earlier = tmp_path / "earlier"
    (earlier / "src" / "theodora").mkdir(parents=True)
    job = module("jobs_shapes").job_of("a", tiny=True, rows=4)
    commands = {}
    monkeypatch.setattr(
        ways, "clocked", lambda program, place: commands.setdefault(place.folder.name, (program, place))
    )
    found = ways.trainings("a", job, 100.0, ground("--before", earlier, "--steps", 7))
    assert found.keys() == {*ways.WAYS, "before-dora", "before-lora"}
    assert {way for way, how in found.items() if how.skipped} == {"unsloth-dora", "unsloth-lora"}
    for how in found.values():
        how.measure()
    assert commands["before-lora"][1].imports == (earlier / "src",)
    assert commands["lora"][1].imports == (scripts.ROOT / "src",)
    assert len({place.folder for _, place in commands.values()}) == len(found)
    for way, (program, _) in commands.items():
        assert program[program.index("--method") + 1] == way.rpartition("-")[2]
        assert "7" in program
    others = ways.trainings("b", job, 100.0, ground("--before", earlier, "--ways", "lora"))
    assert others.keys() == {"lora", "bare"}


def test_tokenizing_takes_all_rows_once(module, ground, monkeypatch):
    ways = module("jobs_ways")
    asked = []
    monkeypatch.setattr(ways, "tokenized", lambda place, args, rows: asked.append((place.folder.name, rows)) or {})
    found = ways.tokenizings(ground("--chat-rows", 50))
    assert {way: how.once for way, how in found.items()} == {"tokenize": False, "tokenize-all": True}
    for how in found.values():
        how.measure()
    assert asked == [("tokenize", 5), ("tokenize-all", 50)]


def test_a_failure_is_noted_and_stops_nothing(module, ground, tmp_path, monkeypatch):
    jobs, ways = module("jobs"), module("jobs_ways")

    def fails():
        raise module("jobs_process").ProcessFailed("exit code 1: no room")

    here = {
        "works": ways.Way(lambda: {"whole": 2.0}),
        "fails": ways.Way(fails),
        "missing": ways.Way(fails, skipped="not installed"),
        "once": ways.Way(lambda: {"whole": 3.0}, once=True),
    }
    monkeypatch.setattr(jobs, "prepare", lambda name, ground, found: here)
    monkeypatch.setattr(jobs, "run_process", lambda command, place: (1.5, ""))
    output = tmp_path / "results" / "jobs.json"
    output.parent.mkdir()
    output.write_text('{"jobs": {"c": {"left": "alone"}}}')
    jobs.measure("a", ground("--output", output, "--rounds", 2))
    report = json.loads(output.read_text())["jobs"]
    assert report["c"] == {"left": "alone"}
    first = {"first": True, "imports": 1.5}
    assert report["a"]["ways"] == {
        "works": {"runs": [run | {"whole": 2.0} for run in (first, first | {"first": False})]},
        "fails": {"runs": [], "failed": "exit code 1: no room"},
        "missing": {"runs": [], "skipped": "not installed"},
        "once": {"runs": [first | {"whole": 3.0}]},
    }
    monkeypatch.setattr(jobs, "prepare", lambda name, ground, found: {"other": here["works"], "once": here["works"]})
    jobs.measure("a", ground("--output", output, "--rounds", 1, "--add"))
    added = json.loads(output.read_text())["jobs"]["a"]
    assert added["parts"] == 2
    assert added["ways"]["fails"] == report["a"]["ways"]["fails"]
    assert added["ways"]["once"] == added["ways"]["other"] == {"runs": [first | {"whole": 2.0}]}
    with pytest.raises(SystemExit, match="was measured with other steps"):
        jobs.measure("a", ground("--output", output, "--steps", 5, "--add"))


def test_an_earlier_checkout_has_to_be_one(ground, tmp_path, capsys):
    with pytest.raises(SystemExit):
        ground("--before", tmp_path)
    assert "has no src/theodora" in capsys.readouterr().err


def test_an_earlier_checkout_has_to_be_what_is_imported(module, tmp_path):
    process, jobs = module("jobs_process"), module("jobs")
    package = tmp_path / "src" / "theodora"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    jobs.check_imports(process.Place(tmp_path / "way", (tmp_path / "src",)))
    other = process.Place(tmp_path / "way", (tmp_path / "other", tmp_path / "src"))
    with pytest.raises(SystemExit, match="is imported instead of"):
        jobs.check_imports(other)


def test_a_cpu_of_avx2_alone(monkeypatch):
    script = scripts.load("benchmarks/jobs_avx2.py")
    for name in script.ISA:
        monkeypatch.setenv(name, "")
    able = {"avx2": True, "avx512_bf16": True, "amx_bf16": True, "bf16": True, "cpu_name": "some"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    seen = {}

    def command():
        from theodora.autocast import computes_in_bf16

        seen.update(torch.cpu.get_capabilities(), bf16_chosen=computes_in_bf16(torch.device("cpu")))
        return 3

    monkeypatch.setattr("theodora.cli.main.main", command)
    assert script.main() == 3
    assert [name for name, value in seen.items() if value] == ["avx2", "cpu_name"]
    assert os.environ["ATEN_CPU_CAPABILITY"] == "avx2"


@pytest.mark.long
def test_it_runs_and_reports(tmp_path):
    output, figure = tmp_path / "jobs.json", tmp_path / "jobs.png"
    words = [
        "--tiny",
        "--steps",
        "3",
        "--rows",
        "20",
        "--rounds",
        "2",
        "--ways",
        "dora",
        "peft-lora",
        "--kinds",
        "text",
    ]
    words += ["--jobs", "b", "d", "e"]
    command = [sys.executable, scripts.ROOT / SCRIPT, "--output", output, "--figure", figure, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())["jobs"]
    assert {name: [*job["ways"]] for name, job in found.items()} == {
        "b": ["dora", "peft-lora", "bare"],
        "d": ["evaluate"],
        "e": ["tokenize", "tokenize-all"],
    }
    for job in found.values():
        for way, taken in job["ways"].items():
            assert [run["first"] for run in taken["runs"]] == [True, False][: 1 if way == "tokenize-all" else 2]
    assert "| b | TRL + PEFT LoRA |" in done.stdout
    assert figure.read_bytes().startswith(b"\x89PNG")
