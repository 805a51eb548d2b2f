"""The decoding benchmark runs on a tiny model, compares the same work, and writes what its table shows."""

import json
import shlex
import subprocess
import sys

import pytest
import torch

import scripts
from theodora.adapters.quantized import quantization_of

SCRIPT = "benchmarks/decode.py"
SMALL = "--tiny --device cpu --layers 1 --rank 4 --batches 1 2 --prompt 4 --tokens 3 --rounds 2 --modes eager"


@torch.no_grad()
def test_each_variant_does_the_same_work_and_has_a_row(monkeypatch, capsys):
    """What the processes do, one after the other."""
    script = scripts.load(SCRIPT)
    monkeypatch.setattr(sys, "argv", ["decode.py", *shlex.split(SMALL)])
    args = script.parse_args()
    models = {name: script.build(name, args) for name in script.VARIANTS}
    differences = script.check_same_work({name: script.first_logits(model, args) for name, model in models.items()})
    assert len(differences) == 3
    assert differences["difference of merged and dora"] < 0.1
    run = script.key("eager", 2)
    seconds = {run: {name: [script.run_eager(model, 2, args)] for name, model in models.items()}}
    assert all(times[0] > 0 for times in seconds[run].values())
    rows = [script.row(name, seconds) for name in models]
    assert rows[0][run]["ratio"] == 1
    script.show(rows, seconds, args)
    assert "theodora DoRA, merged" in capsys.readouterr().out


@torch.no_grad()
def test_the_same_on_a_base_in_four_bits(monkeypatch, capsys):
    pytest.importorskip("bitsandbytes")
    script = scripts.load(SCRIPT)
    monkeypatch.setattr(sys, "argv", ["decode.py", *shlex.split(f"{SMALL} --quantize nf4")])
    args = script.parse_args()
    assert (args.output.name, "merged" in args.variants) == ("quantised_decode.json", False)
    models = {name: script.build(name, args) for name in args.variants}
    assert all(quantization_of(model).kind == "nf4" for name, model in models.items())
    differences = script.check_same_work({name: script.first_logits(model, args) for name, model in models.items()})
    assert max(differences.values()) < 0.05
    run = script.key("eager", 1)
    rows = [script.row(name, {run: {n: [script.run_eager(m, 1, args)] for n, m in models.items()}}) for name in models]
    script.show(rows, {run: {}}, args)
    assert "base in nf4" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(sys, "argv", ["decode.py", *shlex.split("--quantize nf4 --variants base merged")])
    with pytest.raises(SystemExit):
        script.parse_args()


@pytest.mark.long
def test_it_runs_and_reports(tmp_path):
    output = tmp_path / "results" / "decode.json"
    words = shlex.split(f"{SMALL} --variants base merged dora")
    command = [sys.executable, scripts.ROOT / SCRIPT, "--output", output, *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "theodora DoRA, merged" in result.stdout
    report = json.loads(output.read_text(encoding="utf-8"))
    assert {"cpu", "versions", "commit"} <= report["machine"].keys()
    assert report["difference of merged and dora"] < 0.1
    assert len(report["seconds"]["eager, batch 2"]["dora"]) == 2
    assert report["rows"][0]["eager, batch 1"]["ratio"] == 1
