"""Every class of fused experts that transformers declares runs as its own code does, once it carries an adapter."""

import copy
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from theodora.functional import dora_norm
from theodora.layers import LowRank, adapt
from theodora.layers.experts import ExpertParameter, expert_parameters, why_experts_unfit

HIDDEN, INNER, EXPERTS, CHOSEN, TOKENS = 8, 12, 5, 2, 9
_DECLARED = re.compile(
    r"^@use_experts_implementation\b([^\n]*)\nclass (\w+)\((.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL
)
_IN_FLOAT32 = (
    "inkling2.Inkling2Experts",
    "inkling2_loop.Inkling2LoopExperts",
    "openai_privacy_filter.OpenAIPrivacyFilterExperts",
)  # whatever the weights are
_REFUSED = {  # with what they are made from
    "jetmoe.JetMoeParallelExperts": (EXPERTS, HIDDEN, INNER),
    "longcat_flash.LongcatFlashExperts": None,
    "step3p7.Step3p7Experts": None,
}


class Sizes(SimpleNamespace):
    """A configuration that answers whatever an experts module asks: by the name of what is asked."""

    _experts_implementation = "eager"

    def __getattr__(self, name):
        answers = {
            "latent": None,
            "intermediate": INNER,
            "hidden_size": HIDDEN,
            "zero_expert": 0,
            "expert": EXPERTS,
            "limit|softcap": 2.0,
            "alpha": 1.7,
            "eps": 1e-6,
            "act": "silu",
        }
        for pattern, value in answers.items():
            if re.search(pattern, name):
                return value
        raise AttributeError(name)


def declared():
    """`family.Class` → whether it differs from most, read from the sources: importing all of them takes a while."""
    models = Path(transformers.__file__).parent / "models"
    return {
        f"{file.parent.name}.{name}": bool(options) or "_apply_gate" in body
        for file in sorted(models.glob("*/modeling_*.py"))
        for options, name, body in _DECLARED.findall(file.read_text("utf-8"))
    }


NAMES = declared()


def experts_of(name):
    family, kind = name.split(".")
    folder = Path(transformers.__file__).parent / "models" / family
    for file in folder.glob("modeling_*.py"):
        if f"class {kind}(" in file.read_text("utf-8"):
            module = importlib.import_module(f"transformers.models.{family}.{file.stem}")
    torch.manual_seed(0)
    experts = getattr(module, kind)(*(_REFUSED.get(name) or (Sizes(),))).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return experts


def adapted(experts):
    """A DoRA adapter on each parameter, which changes nothing."""
    for name in expert_parameters(experts, "experts"):
        place = ExpertParameter(experts, name)
        assert why_experts_unfit(place) is None
        w = place.base_weight.dense()
        a = torch.randn(EXPERTS, 3, w.shape[2], dtype=w.dtype)
        b = w.new_zeros(EXPERTS, w.shape[1], 3)
        adapt(place).add_adapter("own", LowRank(a, b, dora_norm(w, a, b, 1.0), 1.0))
        place.active_adapter = "own"
    return experts


def outcome(experts, *args):
    """The output and the gradients of what comes in."""
    given = [a.clone().requires_grad_() if a.is_floating_point() else a for a in args]
    y = experts(*given)
    return y, *torch.autograd.grad(y.sin().sum(), [a for a in given if a.requires_grad])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if special or "qwen3_moe" in name else pytest.mark.long)
        for name, special in NAMES.items()
    ],
)
def test_a_declared_class(name):
    experts = experts_of(name)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    index = torch.rand(TOKENS, EXPERTS).argsort(1)[:, :CHOSEN]
    index = torch.where(index == 3, 0, index)  # one has no tokens, and some come twice to another
    counted = torch.rand(TOKENS, CHOSEN, dtype=torch.float64)
    own = outcome(copy.deepcopy(experts), x, index, counted)
    for ours, theirs in zip(outcome(adapted(experts), x, index, counted), own, strict=True):
        torch.testing.assert_close(ours, theirs, **({"rtol": 1e-4, "atol": 1e-5} if name in _IN_FLOAT32 else {}))


def test_most_families_are_walked_over():
    assert len(NAMES) >= 60
    assert {"gpt_oss.GptOssExperts", "nemotron_h.NemotronHExperts", "qwen3_moe.Qwen3MoeExperts"} <= NAMES.keys()


def test_llama_4_takes_sorted_rows():
    experts = experts_of("llama4.Llama4TextExperts")
    x = torch.randn(EXPERTS * TOKENS, HIDDEN, dtype=torch.float64)
    own = outcome(copy.deepcopy(experts), x)
    for ours, theirs in zip(outcome(adapted(experts), x), own, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", list(_REFUSED))
def test_what_is_not_declared_is_refused(name):
    experts = experts_of(name)
    for parameter in expert_parameters(experts, "experts"):
        assert "does not declare how its experts run" in why_experts_unfit(ExpertParameter(experts, parameter))
