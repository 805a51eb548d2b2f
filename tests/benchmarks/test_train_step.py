"""The GPU's benchmark at a size that a CPU bears: the table, the results file, the figure, the sweeps."""

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from theodora.bench import VARIANTS
from theodora.bench.build import build

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "train_step.py"
SMALL = "--layers 1 --hidden 64 --vocabulary 128 --batch 2 --length 16 --rank 4 --rounds 1 --steps 1"


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module, and its arguments for a sweep."""
    spec = importlib.util.spec_from_file_location("train_step", BENCHMARK)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def points(sweep):
        monkeypatch.setattr(sys, "argv", ["train_step.py", *shlex.split(f"{SMALL} --sweep {sweep}")])
        return dict(module.sweep_points(module.parse_args()))

    return points


def run(output: Path, options: str) -> str:
    command = [sys.executable, BENCHMARK, "--output", output, *shlex.split(f"{SMALL} {options}")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_table_and_sweep_share_a_results_file(tmp_path):
    output, figure = tmp_path / "train_step.json", tmp_path / "train_step.png"
    shown = run(output, f"--variants floor peft-dora dora --figure {shlex.quote(str(figure))}")
    assert "Theodora DoRA" in shown
    assert figure.read_bytes().startswith(b"\x89PNG")
    run(output, "--sweep targets --variants floor dora")
    report = json.loads(output.read_text(encoding="utf-8"))
    table = report["table"]
    assert [row["name"] for row in table["rows"]] == ["floor", "peft-dora", "dora"]
    assert all(row["failure"] is None and row["ratios"]["floor"]["median"] > 0 for row in table["rows"])
    (targets,) = report["targets"]  # one floor serves both
    assert [row["name"] for row in targets["rows"]] == ["floor all linear", "dora all linear", "dora q, v only"]
    assert all(row["failure"] is None for row in targets["rows"])


def test_every_family_builds(benchmark):
    points = benchmark("family")
    assert set(points) == {"qwen2", "mistral", "gemma", "phi3", "gpt2"}
    for workload in points.values():
        _, prepare = build(workload, VARIANTS["dora"])
        assert prepare().loss().isfinite()


@pytest.mark.parametrize(("sweep", "count"), [("rank", 7), ("tokens", 5), ("checkpointing", 2), ("hidden", 3)])
def test_points_of_the_other_sweeps(sweep, count, benchmark):
    assert len({repr(workload) for workload in benchmark(sweep).values()}) == count
