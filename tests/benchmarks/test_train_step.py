"""The GPU's benchmark at a size that a CPU bears: the table, the results file, the figure, the sweeps."""

import json
import shlex
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

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


def test_a_quantised_table_has_the_faster_floor(tmp_path, monkeypatch, capsys):
    pytest.importorskip("bitsandbytes")
    output = tmp_path / "quantised.json"
    scripts.measure_here(monkeypatch)
    words = f"{SMALL} --quantize nf4 --gradient-checkpointing --memory-limit 24 --output {output}"
    script = scripts.run(monkeypatch, SCRIPT, *shlex.split(words))
    report = json.loads(output.read_text(encoding="utf-8"))["nf4_checkpointing_64x1"]
    assert "on a frozen base in nf4, activation checkpointing" in report["title"]
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == [name for name in script["QUANTIZED"] if "unsloth" not in name]
    assert all(row["failure"] is None for row in rows.values())
    assert report["floor"] == min(("floor", "floor-eager"), key=lambda name: rows[name]["step"])
    assert all(set(row["ratios"]) == {"floor", "floor-eager"} for row in rows.values())
    assert "there is no GPU, so nothing is limited" in capsys.readouterr().err
    assert report["workloads"]["dora"]["quantize"] == "nf4"
    assert str(tmp_path) not in output.read_text(encoding="utf-8")


def test_what_fits_into_memory_is_measured_at_once(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    output = tmp_path / "quantised.json"
    scripts.measure_here(monkeypatch)
    scripts.run(monkeypatch, SCRIPT, *shlex.split(f"{SMALL} --sweep memory --output {output}"))
    (report,) = json.loads(output.read_text(encoding="utf-8"))["nf4_memory"]
    names = ["8B, 1 × 16", "8B, 1 × 16, checkpointing", "14B, 1 × 16, checkpointing"]
    assert [row["name"] for row in report["rows"]] == [f"dora {name}" for name in names]
    assert all(row["failure"] is None and row["peak"] for row in report["rows"])
    assert report["title"].startswith("One training step with AdamW's on a frozen base in nf4")


def test_the_shapes_of_large_models(monkeypatch):
    module = scripts.load(SCRIPT)

    def parameters(words):
        monkeypatch.setattr(sys, "argv", ["train_step.py", *shlex.split(words)])
        config = AutoConfig.for_model(**module.base_workload(module.parse_args()).model)
        with torch.device("meta"):
            return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())

    assert parameters("--layers 32") == 8_030_261_248  # Llama-3-8B
    assert parameters("--hidden 5120 --layers 48") == 14_770_033_664  # Qwen2.5-14B
    assert parameters("--hidden 8192 --layers 80") == 70_553_706_496  # Llama-3-70B


def test_a_base_that_is_quantised_already_is_not_put_into_float8(monkeypatch, capsys):
    module = scripts.load(SCRIPT)
    monkeypatch.setattr(sys, "argv", ["train_step.py", *shlex.split("--quantize nf4 --variants floor dora-fp8")])
    with pytest.raises(SystemExit):
        module.parse_args()
    assert "dora-fp8 puts a bf16 base into float8, and --quantize nf4 leaves none" in capsys.readouterr().err


@pytest.mark.parametrize(("sweep", "count"), [("rank", 7), ("tokens", 5), ("checkpointing", 2), ("hidden", 3)])
def test_points_of_the_other_sweeps(sweep, count, points):
    assert len({repr(workload) for workload in points(sweep).values()}) == count


@pytest.mark.filterwarnings("ignore:.* weights of fused experts .* stay frozen:UserWarning")
def test_experts_are_adapted_beside_attention_or_left_alone(tmp_path, monkeypatch):
    output = tmp_path / "train_step.json"
    scripts.measure_here(monkeypatch)
    scripts.run(monkeypatch, SCRIPT, *shlex.split(f"{SMALL} --sweep experts --output {output}"))
    reports = json.loads(output.read_text(encoding="utf-8"))["experts"]
    assert [report["workloads"][report["floor"]]["model"]["model_type"] for report in reports] == [
        "qwen3_moe",
        "gpt_oss",
        "mixtral",
    ]
    for report in reports:
        rows = {row["name"].split()[0]: row for row in report["rows"]}
        assert all(row["failure"] is None for row in rows.values()), rows
        trained = {name: row["trained_parameters"] for name, row in rows.items()}
        assert trained["dora-experts"] > trained["lora-experts"] > 2 * trained["dora"]
        assert trained["peft-lora-experts-bf16"] >= trained["lora-experts"]
        assert report["floor"].startswith("floor")
