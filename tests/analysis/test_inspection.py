"""What `inspect_adapter` says of adapters that PEFT made, sound and unsound ones."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from theodora.adapters import inject_adapter, save_adapter
from theodora.analysis import inspect_adapter
from theodora.analysis.figure import draw_movement
from theodora.config import AdapterConfig
from theodora.errors import CheckpointError, ConfigError

PREFIX = "base_model.model."


@pytest.fixture
def make(tmp_path, tiny_model, tiny_model_dir):
    """An adapter folder made by PEFT, trained at random."""

    def make(family: str = "llama", *, train: str = "lora_B magnitude modules_to_save", **lora: Any) -> Path:
        model = tiny_model(family)
        model.name_or_path = str(tiny_model_dir(family))
        options = {"target_modules": "all-linear", "use_dora": True, **lora}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
            adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
            with torch.no_grad():
                for name, parameter in adapted.named_parameters():
                    if parameter.requires_grad and any(part in name for part in train.split()):
                        parameter.add_(0.05 * torch.randn_like(parameter))
            adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


def test_the_facts(make, tiny_model_dir):
    report = inspect_adapter(make(rank_pattern={"q_proj": 2}, modules_to_save=["lm_head"]))
    assert report.method == "dora"
    assert report.ranks == {2: 2, 4: 12}
    assert report.scales == (2.0, 4.0)
    assert report.base_folder == str(tiny_model_dir("llama"))
    assert report.parameters == sum(m.parameters for m in report.modules) + 272 * 32
    assert [(full.path, full.shape) for full in report.full] == [("lm_head.weight", (272, 32))]
    assert report.full[0].relative_change is not None
    assert report.full[0].relative_change > 0.1
    assert [g.name for g in report.by_kind] == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ]
    assert [(g.name, g.modules) for g in report.by_layer] == [("0", 7), ("1", 7)]
    assert report.warnings == report.notes == ()
    assert report.training is None


def test_the_movement_of_a_module(make, tiny_model_dir):
    folder = make()
    report = inspect_adapter(folder)
    module = report.modules[0]
    assert module.path == "model.layers.0.self_attn.q_proj"
    w = load_file(tiny_model_dir("llama") / "model.safetensors")[f"{module.path}.weight"]
    t = load_file(folder / "adapter_model.safetensors")
    a, b = (t[f"{PREFIX}{module.path}.lora_{x}.weight"] for x in "AB")
    change = t[f"{PREFIX}{module.path}.lora_magnitude_vector"] / w.norm(dim=1) - 1
    cosine = torch.cosine_similarity(w.double(), (w + 2 * b @ a).double(), dim=1)
    assert module.magnitude_mean == pytest.approx(float(change.abs().mean()), rel=1e-4)
    assert module.magnitude_max == pytest.approx(float(change.abs().max()), rel=1e-4)
    assert module.angle_mean == pytest.approx(float(cosine.arccos().rad2deg().mean()), rel=1e-3)
    group = report.by_kind[0]
    others = [m for m in report.modules if m.kind == "q_proj"]
    assert group.angle_mean == pytest.approx(sum(m.angle_mean or 0 for m in others) / 2)
    assert group.angle_max == max(m.angle_max or 0 for m in others)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3"])
def test_families_whose_weights_are_stored_otherwise(make, family):
    report = inspect_adapter(make(family))
    assert report.warnings == ()
    assert all(0 < (m.angle_mean or 0) < 45 for m in report.modules)
    if family == "gpt2":  # one name, two kinds of layers
        assert {"attn.c_proj", "mlp.c_proj", "c_attn", "c_fc"} == {g.name for g in report.by_kind}


def test_lora_changes_lengths_too(make):
    report = inspect_adapter(make(use_dora=False))
    assert report.method == "lora"
    assert all((m.magnitude_mean or 0) > 0 and m.magnitude_rests is None for m in report.modules)


def test_without_the_base_it_says_so(make):
    folder = make()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "nobody/nothing"}))
    report = inspect_adapter(folder)
    assert report.base_folder is None
    assert "nobody/nothing" in report.notes[0]
    assert all(m.angle_mean is None and m.update > 0 for m in report.modules)
    with pytest.raises(CheckpointError, match="somebody/else"):
        inspect_adapter(folder, "somebody/else")


def test_a_base_that_does_not_fit(make, tmp_path, tiny_model):
    folder = make()
    tiny_model(hidden_size=48).save_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError, match=r"\(48, 48\) in the base"):
        inspect_adapter(folder, tmp_path / "wide")


def test_an_untrained_adapter_is_called_out(make):
    report = inspect_adapter(make(train="nothing"))
    assert len(report.warnings) == 1
    assert "All modules are untrained" in report.warnings[0]


def test_dora_trained_as_lora_is_called_out(make):
    report = inspect_adapter(make(train="lora_B"))
    assert len(report.warnings) == 1
    assert "trained as plain LoRA" in report.warnings[0]


def test_one_module_left_behind_is_named(make):
    folder = make()
    weights = load_file(folder / "adapter_model.safetensors")
    weights[f"{PREFIX}model.layers.1.mlp.up_proj.lora_B.weight"].zero_()
    save_file(weights, folder / "adapter_model.safetensors")
    (warning,) = inspect_adapter(folder).warnings
    assert "1 of 14 modules (model.layers.1.mlp.up_proj first) is untrained" in warning


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_from_the_weight(tmp_path, tiny_model, tiny_model_dir, init):
    model = inject_adapter(tiny_model(), AdapterConfig(rank=4, init=init))
    save_adapter(model, tmp_path / "start")
    report = inspect_adapter(tmp_path / "start", tiny_model_dir())
    assert report.ranks == {4: 14}
    assert report.alpha == 8
    assert "untrained" in report.warnings[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.endswith("lora_A"):
                parameter.add_(0.05 * torch.randn_like(parameter))
    save_adapter(model, tmp_path / "trained")
    assert inspect_adapter(tmp_path / "trained", tiny_model_dir()).warnings == ()


def test_a_base_with_nan_is_called_out(make, tmp_path, tiny_model):
    folder, model = make(), tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    (warning,) = inspect_adapter(folder, tmp_path / "broken").warnings
    assert "1 modules hold NaN" in warning
    assert "model.layers.1.mlp.up_proj" in warning


def test_the_settings_of_our_own_runs(make):
    folder = make()
    (folder / "config.yaml").write_text("model: m\ndata: rows.jsonl\noutput: o\nlearning_rate: 0.001\n")
    assert (inspect_adapter(folder).training or {})["learning_rate"] == 0.001
    (folder / "config.yaml").write_text("somebody: else's\n")
    assert inspect_adapter(folder).training is None


def test_json_holds_everything(make):
    report = inspect_adapter(make())
    again = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert len(again["modules"]) == 14
    assert again["ranks"] == {"4": 14}
    assert again["by_kind"][0]["angle_mean"] == report.by_kind[0].angle_mean


@pytest.mark.parametrize("base", [True, False], ids=["base", "no base"])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_figure(make, tmp_path, suffix, base):
    folder = make()
    if not base:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    draw_movement(inspect_adapter(folder), tmp_path / f"moved.{suffix}")
    start = (tmp_path / f"moved.{suffix}").read_bytes()[:8]
    assert start == b"\x89PNG\r\n\x1a\n" if suffix == "png" else start.startswith(b"<?xml")


def test_figures_that_cannot_be_drawn(make, tmp_path):
    with pytest.raises(ConfigError, match="\\.png"):
        draw_movement(inspect_adapter(make()), tmp_path / "moved.docx")
    with pytest.raises(ConfigError, match="nothing to draw"):
        draw_movement(inspect_adapter(make(target_modules=["lm_head"])), tmp_path / "moved.png")
