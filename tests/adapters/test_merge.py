"""Merging in memory: the same logits, and back bit for bit."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from theodora import (
    AdapterConfig,
    CheckpointError,
    ConfigError,
    adapter_disabled,
    inject_adapter,
    merge_adapter,
    remove_adapter,
    set_adapter,
    unmerge_adapter,
)
from theodora.adapters.state import trained_tensors
from tiny import FAMILIES, tiny_model

IDS = torch.arange(3, 27).view(2, 12)
INPUT = {"gpt2": "wte", "gpt_neox": "embed_in"}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def adapted(family, tied, dtype, method="dora", **config):
    model = inject_adapter(tiny_model(family, tied=tied, dtype=dtype), AdapterConfig(method=method, rank=4, **config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_merge_and_unmerge(family, method, dtype, tied):
    base = tiny_model(family, tied=tied, dtype=dtype)
    model = adapted(family, tied, dtype, method)
    expected = logits(model)
    assert merge_adapter(model) is model
    # Merging rounds each weight once more; so does the base model's own rounding, which sets the measure.
    rounding = (logits(base) - logits(tiny_model(family, tied=tied))).norm() if dtype != torch.float32 else 0
    assert (logits(model) - expected).norm() <= 2 * rounding + 1e-5 * expected.norm()
    with adapter_disabled(model):
        assert torch.equal(logits(model), logits(base))
    unmerge_adapter(model)
    assert torch.equal(logits(model), expected)
    remove_adapter(model)
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "gpt_neox"])
@pytest.mark.parametrize("what", ["embedding", "head", "full head", "both"])
@pytest.mark.parametrize("tied", [False, True])
def test_tied_weights_and_a_saved_merged_model(family, what, tied, tmp_path):
    embedding = INPUT.get(family, "embed_tokens")
    config = {
        "embedding": {"targets": (embedding,)},
        "head": {"targets": ("lm_head",)},
        "full head": {"modules_to_save": ("lm_head",)},
        "both": {"targets": (embedding, "lm_head")},
    }[what]
    model = adapted(family, tied, torch.float32, **config)
    expected = logits(model)
    merge_adapter(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "m", is_main_process=False)
    assert not list((tmp_path / "m").glob("*"))
    model.save_pretrained(tmp_path / "m")
    assert not any("adapters" in key for key in load_file(tmp_path / "m" / "model.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
    unmerge_adapter(model)
    remove_adapter(model)
    base = tiny_model(family, tied=tied)
    assert torch.equal(logits(model), logits(base))
    assert model.config.tie_word_embeddings == base.config.tie_word_embeddings
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert shared == tied


def test_what_makes_no_sense_is_refused():
    model = adapted("llama", False, torch.float32)
    with pytest.raises(ConfigError, match="No adapter is merged"):
        unmerge_adapter(model)
    merge_adapter(model)
    with pytest.raises(ConfigError, match="merged already"):
        merge_adapter(model)
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        set_adapter(model, None)
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        inject_adapter(model, name="other")
    remove_adapter(model)
    assert torch.equal(logits(model), logits(tiny_model("llama")))


def test_a_merge_that_overflows_changes_nothing():
    model = adapted("llama", False, torch.float16)
    with torch.no_grad():
        next(p for n, p in trained_tensors(model).items() if "magnitude" in n).fill_(1e6)
    base = tiny_model("llama", dtype=torch.float16)
    with pytest.raises(CheckpointError, match="infinite"):
        merge_adapter(model)
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


def test_which_of_several():
    model = adapted("llama", False, torch.float32)
    first = logits(model)
    inject_adapter(model, AdapterConfig(rank=2), name="other")
    merge_adapter(model, "default")
    torch.testing.assert_close(logits(model), first, rtol=0, atol=1e-5)
