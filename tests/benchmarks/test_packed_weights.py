"""The benchmark of packed weights finds small errors on a CPU, times what it says, and writes what its tables show."""

import json
import shlex
import sys

import pytest
import torch

import scripts

pytest.importorskip("bitsandbytes")
SCRIPT = "benchmarks/packed_weights.py"
SMALL = "--tiny --device cpu --rank 4 --tokens 1 3 --rounds 2"


@torch.no_grad()
def test_it_runs_and_reports(monkeypatch, capsys, tmp_path):
    script = scripts.load(SCRIPT)
    output = tmp_path / "results" / "packed.json"
    monkeypatch.setattr(sys, "argv", ["packed_weights.py", *shlex.split(SMALL), "--output", str(output)])
    script.main()
    said = capsys.readouterr().out
    assert "a row that cancels" in said
    report = json.loads(output.read_text(encoding="utf-8"))
    assert {"cpu", "versions", "bitsandbytes"} <= report["machine"].keys()
    assert len(report["errors"]) == 2 * len(script.KINDS)
    for row in report["errors"]:
        assert max(row["norm"], row["norm_of_plain"]) < 1e-5, row
        assert row["norm_of_cancelled_row"] < 1e-2, row
        assert all(of["ours"] < 1.5 * of["plain"] + 1e-2 for of in row.get("decoding", {}).values()), row
    assert {row["kind"] for row in report["times"]} == {"nf4, double", "int8"}
    assert all(value > 0 for row in report["times"] for value in row["norm"].values())
    assert all(of["ours"] > 0 < of["base"] for row in report["times"] for of in row["decoding"].values())


def test_what_it_takes(monkeypatch):
    script = scripts.load(SCRIPT)
    monkeypatch.setattr(sys, "argv", ["packed_weights.py", "--sizes", "64x128"])
    assert script.parse_args().sizes == [(64, 128)]
    monkeypatch.setattr(sys, "argv", ["packed_weights.py", "--sweep", "--device", "cpu"])
    with pytest.raises(SystemExit):
        script.parse_args()
