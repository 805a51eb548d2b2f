"""Experts, each by itself: measures against the formula, tables, and pictures."""

import math

import pytest
import torch
from PIL import Image
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from theodora import AdapterConfig, inject_adapter, save_adapter
from theodora.adapters.state import adapter_layers
from theodora.analysis import inspect_adapter
from theodora.analysis.experts import barely_moved
from theodora.analysis.figure import draw_movement
from theodora.analysis.run import inspect_run
from theodora.analysis.run_figure import draw_run_figures
from theodora.cli import main
from theodora.functional import merged_weight
from theodora.layers.experts import ExpertParameter

EXPERTS, STILL = 5, 3


@pytest.fixture(scope="module", params=["dora", "lora"])
def made(request, tmp_path_factory):
    """Folders of base and adapter, and the layers; one expert of each weight barely moves."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 8}
    sizes |= {"num_key_value_heads": 2, "moe_intermediate_size": 12, "num_experts": EXPERTS, "num_experts_per_tok": 2}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, mlp_only_layers=[1], intermediate_size=24))
    folder = tmp_path_factory.mktemp("experts")
    model.save_pretrained(folder / "base")
    model = Qwen3MoeForCausalLM.from_pretrained(folder / "base")
    inject_adapter(model, AdapterConfig(method=request.param, rank=3, experts=True))
    for layer in adapter_layers(model).values():
        adapter = layer.adapters["default"]
        torch.nn.init.normal_(adapter.lora_B, std=0.02)
        if isinstance(layer, ExpertParameter):
            adapter.lora_B.data[STILL] *= 1e-4
        if adapter.magnitude is not None:
            adapter.magnitude.data *= 1 + 0.1 * torch.rand_like(adapter.magnitude)
    save_adapter(model, folder / "adapter")
    return folder, {path: layer for path, layer in adapter_layers(model).items() if isinstance(layer, ExpertParameter)}


@torch.no_grad()
def rows_of(layer, expert):
    """Rows before and after, in float64, and the update."""
    adapter, w = layer.adapters["default"], layer.base_weight.dense()[expert].double()
    a, b = adapter.lora_A[expert].double(), adapter.lora_B[expert].double()
    m = None if adapter.magnitude is None else adapter.magnitude[expert].double()
    return w, merged_weight(w, a, b, adapter.scale, m), adapter.scale * b @ a


def test_each_expert_is_measured_by_itself(made):
    folder, layers = made
    report = inspect_adapter(folder / "adapter")
    modules = {module.path: module for module in report.modules}
    assert len(layers) == 4
    for path, layer in layers.items():
        module = modules[path]
        assert module.shape == tuple(layer.base_weight.shape)
        assert module.rank == 3
        for expert, found in enumerate(module.experts):
            before, after, update = rows_of(layer, expert)
            assert found.update == pytest.approx(float(update.norm()), rel=1e-4)
            change = (after.norm(dim=1) / before.norm(dim=1) - 1).abs().mean()
            assert found.magnitude == pytest.approx(float(change), rel=1e-3, abs=1e-6)
            cosine = torch.nn.functional.cosine_similarity(before, before + update)
            assert found.angle == pytest.approx(float(torch.rad2deg(cosine.clamp(max=1).acos()).mean()), abs=1e-3)
        assert module.angle_mean == pytest.approx(sum(found.angle for found in module.experts) / EXPERTS)
        assert module.update == pytest.approx(math.hypot(*(found.update for found in module.experts)))
        base = layer.base_weight.dense().norm()
        assert module.relative_update == pytest.approx(module.update / float(base), rel=1e-4)
    assert any("4 of 20 experts barely moved" in warning for warning in report.warnings)


def test_a_runs_changes_are_those_of_its_experts(made):
    folder, layers = made
    report = inspect_run(folder / "adapter")
    for module in report.last.modules:
        if module.path not in layers:
            assert module.experts == ()
            continue
        changed = before_sq = 0.0
        for expert, found in enumerate(module.experts):
            before, after, _ = rows_of(layers[module.path], expert)
            assert found.size == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3, abs=1e-6)
            changed, before_sq = changed + float((after - before).square().sum()), before_sq + float(before.norm()) ** 2
        assert module.size == pytest.approx(math.sqrt(changed / before_sq), rel=1e-3)


def test_tables_and_pictures(made, tmp_path, capsys):
    folder, _ = made
    assert main.main(["info", str(folder / "adapter"), "--figure", str(tmp_path / "moved.png")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "of each layer's 5 experts" in told
    assert f"({STILL})" in told
    assert main.main(["inspect", str(folder / "adapter"), "--figures", str(tmp_path / "figures")]) == 0
    assert "of each layer's 5 experts" in " ".join(capsys.readouterr().out.split())
    assert main.main(["info", str(folder / "adapter"), "--json"]) == 0
    for picture in ("moved.png", "figures/experts.png", "figures/heat_map.png"):
        with Image.open(tmp_path / picture) as image:
            assert min(image.size) > 200


def test_pictures_of_experts_have_panels_of_their_own(made, tmp_path):
    folder, _ = made
    report = inspect_adapter(folder / "adapter")
    draw_movement(report, tmp_path / "moved.svg")
    text = (tmp_path / "moved.svg").read_text()
    assert text.count("<image") >= 4 + 4  # panels and their colour bars
    drawn = draw_run_figures([inspect_run(folder / "adapter")], tmp_path)
    assert [path.name for path in drawn] == ["scatter.png", "heat_map.png", "experts.png"]


def test_which_barely_moved():
    assert barely_moved([1.0, 2.0, 0.01, 3.0]) == [2]
    assert barely_moved([1.0, 2.0, 3.0]) == []
    assert barely_moved([]) == []
    assert barely_moved([0.0, 0.0, 0.0, 1.0]) == [0, 1, 2]
