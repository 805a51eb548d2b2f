"""Merging on disk where experts are adapted: fused, one by one, turned; held against the formula in float64."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from theodora import AdapterConfig, inject_adapter, save_adapter
from theodora.adapters.quantize import module_fingerprint
from theodora.errors import CheckpointError
from theodora.files.base_model import BaseCheckpoint
from theodora.layers.experts import place_at
from theodora.merging import merge_checkpoint
from theodora.merging.plan import fingerprint_on_disk
from theodora.merging.to_lora import folder_to_lora
from tiny_families import MIXTURE_IDS as IDS
from tiny_families import tiny_mixture


def fused(folder):
    """The same folder with its experts as the loaded model has them."""
    file = folder / "model.safetensors"
    save_file({name: t.contiguous() for name, t in load(folder).state_dict().items()}, file, {"format": "pt"})


def load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype="auto", experts_implementation="eager"
    )
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


QWEN = {"name": "qwen3_moe", "num_experts": 12}  # `experts.11` sorts before `experts.2`
BASES = {"one_by_one": QWEN, "fused": QWEN, "mixtral": {"name": "mixtral"}, "gpt_oss": {"name": "gpt_oss"}}


@pytest.fixture
def make(tmp_path):
    def make(layout="one_by_one", dtype=torch.float64, **options):
        tiny_mixture(**BASES[layout]).to(dtype).save_pretrained(tmp_path / "base")
        if layout == "fused":
            fused(tmp_path / "base")
        model = load(tmp_path / "base")
        config = {"method": "dora", "rank": 4, "experts": True, "adapter_dtype": "base", **options}
        inject_adapter(model, AdapterConfig(**config))
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        save_adapter(model, tmp_path / "adapter")
        return SimpleNamespace(
            model=model, base=tmp_path / "base", adapter=tmp_path / "adapter", output=tmp_path / "merged"
        )

    return make


@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("layout", BASES)
def test_the_merged_model_is_the_adapted_model_in_the_layout_of_its_base(make, layout, method):
    case = make(layout, method=method, rank_pattern={"down_proj": 2})
    report = merge_checkpoint(case.adapter, case.output)
    with torch.no_grad():
        torch.testing.assert_close(load(case.output)(IDS).logits, case.model(IDS).logits)
    before, after = (load_file(folder / "model.safetensors") for folder in (case.base, case.output))
    assert {key: t.shape for key, t in before.items()} == {key: t.shape for key, t in after.items()}
    assert any("experts.3." in key for key in before) is (layout in ("one_by_one", "mixtral"))
    assert report.changed == sum(kind.tensors for kind in report.kinds)
    assert report.changed == sum(not torch.equal(before[key], after[key]) for key in before)
    assert {"gate_up_proj", "down_proj", "q_proj"} <= {kind.kind for kind in report.kinds}
    assert not report.notes


@pytest.mark.parametrize("layout", BASES)
def test_the_fingerprint_on_disk_is_the_models(make, layout):
    case = make(layout)
    for name in ("gate_up_proj", "down_proj"):
        path = f"model.layers.1.mlp.experts.{name}"
        assert fingerprint_on_disk(BaseCheckpoint(case.base), path) == module_fingerprint(place_at(case.model, path))


def test_another_base_is_told_by_its_fingerprint(make):
    case = make(targets=["experts.down_proj"])
    file = case.base / "model.safetensors"
    save_file({key: t + 1 if "down_proj" in key else t for key, t in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="trained on another base model"):
        merge_checkpoint(case.adapter, case.output)


@pytest.mark.parametrize("layout", ["one_by_one", "fused", "gpt_oss"])
def test_another_number_of_experts_is_refused(make, layout):
    case = make(layout)
    config = copy.deepcopy(case.model.config)
    config.num_experts = config.num_local_experts = 3
    type(case.model)(config).double().save_pretrained(case.base)
    if layout == "fused":
        fused(case.base)
    before = "12" if layout != "gpt_oss" else "4"
    with pytest.raises(CheckpointError, match=rf"down_proj: \(experts, out, in\) is \({before}, 32, 24\) in the"):
        merge_checkpoint(case.adapter, case.output)


def test_half_precision_is_rounded_once(make):
    case = make(dtype=torch.bfloat16)
    report = merge_checkpoint(case.adapter, case.output)
    assert 0 < max(kind.rounding_max for kind in report.kinds) < 0.005
    assert json.loads((case.output / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("layout", ["one_by_one", "gpt_oss"])
def test_dora_on_experts_as_lora(make, layout):
    case = make(layout)
    report = folder_to_lora(case.adapter, case.output, None)
    assert report.worst < 1e-12
    merge_checkpoint(case.output, case.output.with_name("both"))
    with torch.no_grad():
        torch.testing.assert_close(load(case.output.with_name("both"))(IDS).logits, case.model(IDS).logits)


@pytest.mark.parametrize("layout", ["one_by_one", "fused"])
def test_a_base_that_was_quantised_while_it_was_trained(make, layout):
    """Experts stay as they are there; the predictions are compared whichever way they are stored."""
    pytest.importorskip("bitsandbytes")
    case = make(layout, dtype=torch.bfloat16)
    report = merge_checkpoint(case.adapter, case.output, quantize="nf4", onto="dequantised")
    assert report.changed == len(report.layers)
    assert max(layer.error for layer in report.layers) < 0.005
    assert report.logits.kl_mean < 1e-4 * report.logits.kl_effect
