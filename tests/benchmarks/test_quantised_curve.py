"""Loss curves on NF4, ours beside PEFT's: the same rows in the same order from the same start."""

import json
import subprocess
import sys

import pytest

import scripts

pytest.importorskip("bitsandbytes")
SCRIPT = "benchmarks/quantised_curve.py"
SMALL = ["--seeds", 2, "--held-out", 8, "--rank", 4]


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(8) for b in range(8)]
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_both_libraries_take_the_same_steps(tiny_model_dir, data, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(scripts.ROOT / "benchmarks")
    script = scripts.load(SCRIPT)
    words = ["--model", tiny_model_dir(), "--data", data, "--steps", 4, *SMALL]
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, words)])
    args = script.parse_args()
    script.curves.split_rows(data, args.held_out, tmp_path)
    runs = {way: script.run((args, 0, way, tmp_path)) for way in ("peft-lora", "lora", "dora")}
    other = script.run((args, 1, "lora", tmp_path))
    for way, run in runs.items():
        assert [step for step, _ in run["train"]] == [1, 2, 3, 4], way
        assert run["train"][0][1] == pytest.approx(runs["lora"]["train"][0][1], rel=1e-4), way
    steps = [[loss for _, loss in runs[way]["train"]] for way in ("peft-lora", "lora")]
    assert steps[0] == pytest.approx(steps[1], rel=5e-3)
    assert {run["order"] for run in runs.values()} == {runs["lora"]["order"]}
    assert other["order"] != runs["lora"]["order"]
    script.check_order([{"seed": 0, **run} for run in runs.values()])
    with pytest.raises(SystemExit, match="the runs of seed 0 saw their rows in 2 different orders"):
        script.check_order([{"seed": 0, **run} for run in (runs["lora"], other)])


def test_the_statement(monkeypatch):
    monkeypatch.syspath_prepend(scripts.ROOT / "benchmarks")
    script = scripts.load(SCRIPT)

    def said(lora, dora):
        judged = {way: {"train": {"within_the_spread": within}} for way, within in (("lora", lora), ("dora", dora))}
        return script.statement({"judgement": judged})

    spread = "the seed-to-seed spread of PEFT QLoRA"
    assert said(True, True) == f"On NF4: Theodora LoRA and Theodora DoRA within {spread}"
    assert said(True, False) == f"On NF4: Theodora LoRA within, Theodora DoRA beyond {spread}"


@pytest.mark.long
def test_the_whole_comparison(tiny_model_dir, data, tmp_path):
    output, figure = tmp_path / "curve.json", tmp_path / "curve.png"
    words = ["--model", tiny_model_dir(), "--data", data, "--steps", 12, "--output", output, "--figure", figure, *SMALL]
    command = [str(word) for word in (sys.executable, scripts.ROOT / SCRIPT, *words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert {run["way"] for run in report["runs"]} == {"peft-lora", "lora", "dora"}
    assert all(len(run["train"]) == 12 for run in report["runs"])
    assert report["judgement"].keys() == {"lora", "dora"}
    assert figure.stat().st_size > 10_000
    assert "the seed-to-seed spread of PEFT QLoRA" in done.stdout
    assert str(tmp_path) not in output.read_text()
