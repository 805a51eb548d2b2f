"""Exports of adapters on experts: merged models in full; forms that have no place for experts say so."""

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import tiny
from theodora import AdapterConfig, inject_adapter, save_adapter
from theodora.errors import TheodoraError
from theodora.export import export_adapter

SMALL = {"vocab_size": tiny.VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
SMALL |= {"head_dim": 8, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "num_key_value_heads": 2}


@pytest.fixture
def adapter(tmp_path):
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, num_experts=4))
    model.save_pretrained(tmp_path / "base")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "base")
    inject_adapter(model, AdapterConfig(rank=4, experts=True))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_merged_model_predicts_what_the_adapter_does(adapter):
    report = export_adapter(adapter, adapter.with_name("merged"), "hf")
    assert report.verification.difference.kl_mean < 1e-8


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ("mlx", "experts.down_proj: experts, which are not written for MLX; merge instead"),
        ("gguf", "GGUF files of qwen3_moe models are not written here"),
        ("served", "experts.down_proj: experts"),
    ],
)
def test_forms_without_a_place_for_experts_say_so(adapter, form, told):
    with pytest.raises(TheodoraError) as refused:
        export_adapter(adapter, adapter.with_name("out"), form)
    assert told in str(refused.value)
    assert not adapter.with_name("out").exists()


def test_a_lora_that_does_the_same_on_experts(adapter):
    report = export_adapter(adapter, adapter.with_name("plain"), "peft", lora_rank=32)
    assert report.verification.difference.kl_mean < 1e-8
