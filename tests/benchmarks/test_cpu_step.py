"""The benchmark runs, compares like with like, and writes what its table shows."""

import json
import shlex

import scripts


def test_it_runs_and_reports(tiny_model_dir, tmp_path, monkeypatch, capsys):
    output = tmp_path / "results" / "cpu_step.json"
    options = shlex.split("--dtype float32 --rounds 2 --batch 2 --length 16 --rank 4 --variants peft-lora dora")
    scripts.measure_here(monkeypatch)
    scripts.run(monkeypatch, "benchmarks/cpu_step.py", "--model", tiny_model_dir("llama"), "--output", output, *options)
    shown = capsys.readouterr().out
    assert "PEFT LoRA" in shown
    assert "Theodora DoRA" in shown
    report = json.loads(output.read_text(encoding="utf-8"))
    assert {"cpu", "cores", "versions", "command", "commit"} <= report["machine"].keys()
    assert {"rank", "dtype"} <= report["setting"].keys()
    peft, ours = report["rows"]
    assert len(report["seconds"]["dora"]) == 2
    assert ours["peak"] >= ours["model"] > 0
    assert ours["ratios"]["peft-lora"]["min"] <= ours["ratios"]["peft-lora"]["max"]
    # 14 layers, all with magnitudes of their own: 7 in each block, outputs 32+16+16+32+48+48+32
    assert ours["trained_parameters"] - peft["trained_parameters"] == 2 * 224
