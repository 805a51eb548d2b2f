"""PEFT's files of experts (`target_parameters`) both ways, on logits, and DoRA's, which PEFT refuses."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from theodora import AdapterConfig, inject_adapter, load_adapter, save_adapter
from tiny_families import MIXTURE_IDS as IDS
from tiny_families import MIXTURES, tiny_mixture

ATTENTION = ["q_proj", "o_proj"]
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
OPTIONS = {
    "both": {"target_parameters": BOTH, "target_modules": []},
    "beside": {"target_parameters": ["gate_up_proj", "down_proj"], "target_modules": ATTENTION},
    "one": {"target_parameters": BOTH[1:], "target_modules": ATTENTION},
    "other": {"target_parameters": BOTH[:1], "target_modules": [], "use_rslora": True},
    "patterns": {
        "target_parameters": BOTH,
        "target_modules": ATTENTION,
        "rank_pattern": {"down_proj": 2, "q_proj": 3},
        "alpha_pattern": {r"1\.mlp\.experts\.gate_up_proj": 20},
    },
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")


@pytest.fixture(params=MIXTURES)
def make(request):
    return partial(tiny_mixture, request.param)


def perturbed(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_lora_both_ways(make, options, tmp_path):
    theirs = perturbed(get_peft_model(make(), LoraConfig(r=4, lora_alpha=6, **options)))
    with torch.no_grad():
        y = theirs(IDS).logits
    assert not torch.allclose(y, make()(IDS).logits, atol=1e-3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(make(), tmp_path / "theirs")
    torch.testing.assert_close(ours(IDS).logits, y, rtol=0, atol=1e-5)
    save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(IDS).logits, y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", ("gate_up_proj",), ("experts.down_proj", "v_proj")])
def test_ours_by_its_own_names(make, targets, tmp_path):
    ours = inject_adapter(make(), AdapterConfig(method="lora", rank=4, rslora=True, targets=targets, experts=True))
    y = perturbed(ours)(IDS).logits
    save_adapter(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(IDS).logits, y, rtol=0, atol=1e-5)


def test_peft_refuses_dora_on_experts(make, tmp_path):
    save_adapter(perturbed(inject_adapter(make(), AdapterConfig(experts=True))), tmp_path / "dora")
    with pytest.raises(ValueError, match="does not work with use_dora=True"):
        PeftModel.from_pretrained(make(), tmp_path / "dora")
