"""The GPU's benchmark at a size that a CPU bears: the table, the results file, the figure, the sweeps."""

import json
import shlex
import sys

import pytest

import scripts
from theodora.bench import VARIANTS
from theodora.bench.build import build

SCRIPT = "benchmarks/train_step.py"
SMALL = "--layers 1 --hidden 64 --vocabulary 128 --batch 2 --length 16 --rank 4 --rounds 1 --steps 1"


@pytest.fixture
def points(monkeypatch):
    """The workloads of a sweep."""
    module = scripts.load(SCRIPT)

    def of(sweep):
        monkeypatch.setattr(sys, "argv", ["train_step.py", *shlex.split(f"{SMALL} --sweep {sweep}")])
        return dict(module.sweep_points(module.parse_args()))

    return of


def test_table_and_sweep_share_a_results_file(tmp_path, monkeypatch, capsys):
    output, figure = tmp_path / "train_step.json", tmp_path / "train_step.png"
    scripts.measure_here(monkeypatch)

    def run(options, *more):
        scripts.run(monkeypatch, SCRIPT, *shlex.split(f"{SMALL} {options}"), "--output", output, *more)

    run("--variants floor peft-dora dora", "--figure", figure)
    assert "Theodora DoRA" in capsys.readouterr().out
    assert figure.read_bytes().startswith(b"\x89PNG")
    run("--sweep targets --variants floor dora")
    report = json.loads(output.read_text(encoding="utf-8"))
    table = report["table"]
    assert [row["name"] for row in table["rows"]] == ["floor", "peft-dora", "dora"]
    assert all(row["failure"] is None and row["ratios"]["floor"]["median"] > 0 for row in table["rows"])
    (targets,) = report["targets"]  # one floor serves both
    assert [row["name"] for row in targets["rows"]] == ["floor all linear", "dora all linear", "dora q, v only"]
    assert all(row["failure"] is None for row in targets["rows"])


def test_every_family_builds(points):
    families = points("family")
    assert set(families) == {"qwen2", "mistral", "gemma", "phi3", "gpt2"}
    for workload in families.values():
        _, prepare = build(workload, VARIANTS["dora"])
        assert prepare().loss().isfinite()


@pytest.mark.parametrize(("sweep", "count"), [("rank", 7), ("tokens", 5), ("checkpointing", 2), ("hidden", 3)])
def test_points_of_the_other_sweeps(sweep, count, points):
    assert len({repr(workload) for workload in points(sweep).values()}) == count
