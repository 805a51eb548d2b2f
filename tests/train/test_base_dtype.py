"""`base_dtype="fp8"`: a run on a float8 base, from the model folder to the merged model, resumed and not."""

import io

import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM

from theodora import TrainConfig, load_adapter, merge_checkpoint, train
from theodora.adapters.models import best_device
from theodora.kernels.float8 import multiplies_float8
from theodora.layers.float8 import Float8Layer


def test_a_run_on_a_float8_base(run, options, tmp_path, losses):
    result = run(base_dtype="fp8", max_steps=12)
    assert any(isinstance(module, Float8Layer) for module in result.model.modules())
    found = losses(tmp_path / "run")
    assert sum(found[-3:]) < sum(found[:3])
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["base_dtype"] == "fp8"
    assert "| base_dtype | fp8 |" in (tmp_path / "run" / "README.md").read_text()
    load_adapter(AutoModelForCausalLM.from_pretrained(options["model"]), tmp_path / "run")
    (note,) = merge_checkpoint(tmp_path / "run", tmp_path / "merged").notes
    assert "trained on weights in float8 by rows. Merged onto the original ones" in note


def test_resumed_equals_uninterrupted(resumes):
    resumes(base_dtype="fp8")


def test_modules_trained_in_full_stay_as_they_are(run):
    result = run(base_dtype="fp8", max_steps=2, targets=["q_proj"], modules_to_save=["down_proj"])
    kinds = {path.rpartition(".")[2] for path, m in result.model.named_modules() if isinstance(m, Float8Layer)}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}


def test_the_panel_says_so(options):
    output = io.StringIO()
    console = Console(file=output, width=120)
    train(TrainConfig.from_options(options | {"base_dtype": "fp8", "max_steps": 1}), console=console)
    device = best_device()
    assert f"in all, the rest float32, on {device.type}" in output.getvalue()
    assert ("has no products of float8" in output.getvalue()) != multiplies_float8(device)
