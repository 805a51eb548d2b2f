"""Adapter files of experts that are damaged, contradictory or of another kind: one clear message each."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from theodora import AdapterConfig, inject_adapter, load_adapter, save_adapter
from theodora.errors import CheckpointError
from theodora.files.adapter import read_adapter

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
EXPERTS = "base_model.model.model.layers.0.mlp.experts"
GATE, DOWN = f"{EXPERTS}.base_layer", EXPERTS


def model(experts=4):
    sizes = {"moe_intermediate_size": 24, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **sizes, num_experts=experts))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for method in ("dora", "lora"):
        adapted = inject_adapter(model(), AdapterConfig(method=method, rank=4, experts=True))
        save_adapter(adapted, folder / method)
    return folder


@pytest.fixture
def damaged(saved, tmp_path):
    def damaged(method="dora", drop=(), tensors=None, **fields):
        held = load_file(saved / method / "adapter_model.safetensors")
        held = {key: tensor for key, tensor in held.items() if not any(part in key for part in drop)}
        save_file(held | (tensors or {}), tmp_path / "adapter_model.safetensors", {"format": "pt"})
        config = json.loads((saved / method / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | fields))
        return tmp_path

    return damaged


def refused(folder):
    with pytest.raises(CheckpointError) as told:
        read_adapter(folder)
    message = str(told.value)
    assert message.count("\n") == 1, message
    return message


def test_the_tensors_of_one_parameter_are_missing(damaged):
    message = refused(damaged(drop=["experts.base_layer."]))
    assert "model.layers.0.mlp.experts: target_parameters names gate_up_proj, down_proj of it" in message
    assert "the file holds tensors of 1" in message


def test_a_parameter_is_named_that_the_file_does_not_hold(damaged):
    named = ["experts.gate_up_proj", "experts.down_proj", "router.up_proj"]
    assert "names 'router.up_proj', but the file holds nothing" in refused(damaged(target_parameters=named))


@pytest.mark.parametrize("name", ["lm_head.weight", "self_attn.q_proj.weight", "experts.bias"])
def test_other_parameters_than_experts(damaged, name):
    named = ["experts.gate_up_proj", "experts.down_proj", name]
    message = refused(damaged(target_parameters=named))
    assert f"target_parameters names {name!r}; only experts' are read (gate_up_proj," in message
    assert "target_modules" in message


@pytest.mark.parametrize("named", ["experts.down_proj", {"down_proj": 1}, [3], [None]])
def test_target_parameters_that_are_no_list_of_names(damaged, named):
    assert "target_parameters is " in refused(damaged(target_parameters=named))


def test_a_rank_that_does_not_divide(damaged):
    message = refused(damaged("lora", tensors={f"{DOWN}.lora_A.weight": torch.randn(18, 24)}))
    assert "experts.lora_A.weight: (18, 24); expected the rank, 4, once for each expert" in message


def test_a_and_b_of_other_numbers_of_experts(damaged):
    message = refused(damaged("lora", tensors={f"{DOWN}.lora_B.weight": torch.randn(32, 12)}))
    assert "down_proj: lora_A (4, 4, 24) and lora_B (3, 32, 4); expected (experts, rank, in)" in message


def test_magnitudes_missing_or_of_another_shape_or_too_many(damaged):
    gate = f"{GATE}.lora_magnitude_vector"
    assert "gate_up_proj: the magnitudes" in refused(damaged(drop=[gate]))
    assert "magnitudes (48,); expected (4, 48)" in refused(damaged(tensors={gate: torch.ones(48)}))
    assert "use_dora: false" in refused(damaged("lora", tensors={gate: torch.ones(4, 48)}))


def test_values_that_are_no_numbers(damaged):
    with pytest.raises(CheckpointError, match=r"experts\.down_proj.*: holds NaN or infinite values"):
        read_adapter(damaged(tensors={f"{DOWN}.lora_magnitude_vector": torch.full((4, 32), torch.nan)}))


def test_patterns_name_parameters(saved, tmp_path):
    patterns = {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"gate_up_proj": 3.0}}
    adapted = inject_adapter(model(), AdapterConfig(rank=4, alpha=8, experts=True, **patterns))
    save_adapter(adapted, tmp_path / "a")
    modules = read_adapter(tmp_path / "a").modules
    assert modules["model.layers.0.mlp.experts.down_proj"].a.shape == (4, 2, 24)
    assert modules["model.layers.0.mlp.experts.down_proj"].scale == 4
    assert modules["model.layers.0.mlp.experts.gate_up_proj"].scale == 0.75


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_another_number_of_experts_than_the_models(saved, method):
    with pytest.raises(CheckpointError, match=r"made for a weight of \(4, 32, 24\) \(experts, out, in\); here .*\(6,"):
        load_adapter(model(experts=6), saved / method)


def test_files_of_a_peft_that_swapped_in_and_out(damaged):
    tensors = {f"{GATE}.lora_A.weight": torch.randn(16, 48), f"{GATE}.lora_B.weight": torch.randn(32, 16)}
    tensors |= {f"{DOWN}.lora_A.weight": torch.randn(16, 32), f"{DOWN}.lora_B.weight": torch.randn(24, 16)}
    with pytest.raises(CheckpointError, match=r"PEFT before 0\.19\.1 swapped in and out"):
        load_adapter(model(), damaged("lora", tensors=tensors))


def test_a_file_of_experts_on_a_model_without_them(saved):
    dense = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SMALL, num_key_value_heads=2, intermediate_size=24, mlp_only_layers=[0], num_experts=4)
    )
    with pytest.raises(CheckpointError, match=r"mlp\.experts\.gate_up_proj: no such module"):
        load_adapter(dense, saved / "dora")
