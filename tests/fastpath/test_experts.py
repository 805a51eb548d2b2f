"""Whole models whose experts run as one step of our kernels: against the same models without them."""

from copy import deepcopy

import pytest
import torch

from formula import DEVICE, within_budget
from theodora import AdapterConfig, adapter_disabled, inject_adapter, kernels, merge_adapter, unmerge_adapter
from theodora.adapters.state import adapter_layers
from theodora.fastpath.accelerate import checkpoint_activations, recompute_less, restore_model, speed_up_model
from theodora.kernels import experts as fused
from theodora.kernels.operators import interpreted
from theodora.kernels.parts import Gate
from theodora.layers.experts import ExpertParameter
from theodora.layers.gates import gate_of
from tiny_families import MIXTURE_IDS, MIXTURES, tiny_mixture

pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="there is no Triton for a CPU's tensors"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*activation_checkpointing_enable:FutureWarning"),
]
# In bfloat16 rounding would send a token to another expert now and then, so each goes to all.
SMALL = {"num_hidden_layers": 1, "num_experts_per_tok": 4 if DEVICE == "cuda" else 2}


def adapted(name, method="dora", **options):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    model = tiny_mixture(name, **SMALL).to(DEVICE, dtype).train()
    inject_adapter(model, AdapterConfig(method=method, rank=8, experts=True, **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def step(model):
    model.zero_grad()
    ids = MIXTURE_IDS.to(DEVICE)
    loss = model(ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def close(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= (0.05 if DEVICE == "cuda" else 1e-4) * other.norm() + 1e-9


@pytest.fixture
def runs(monkeypatch):
    """How often the experts have run as one step."""
    calls = []
    run = fused.adapted_experts
    monkeypatch.setattr("theodora.layers.experts.adapted_experts", lambda *args: calls.append(1) or run(*args))
    return calls


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_step_is_what_it_is_without_the_kernels(name, method, runs):
    model = adapted(name, method)
    with kernels.reference():
        plain, exact = step(model), step(deepcopy(model).double())
    assert not runs
    dtype = model.get_input_embeddings().weight.dtype
    for found, *others in zip(step(model), plain, exact, strict=True):
        assert within_budget(found, *others, dtype)
    assert len(runs) == 1


def test_checkpointing_computes_the_norms_once(runs, monkeypatch):
    model = adapted("qwen3_moe")
    expected = step(model)
    checkpoint_activations(model)
    recompute_less(model)
    norms = []
    for layer in adapter_layers(model).values():
        if isinstance(layer, ExpertParameter):
            own = layer.current_weight.__class__.dora_norm
    monkeypatch.setattr(type(layer.current_weight), "dora_norm", lambda *args: norms.append(1) or own(*args))
    close(step(model), expected)
    assert len(runs) == 3
    assert len(norms) == 2


def test_dropout_and_other_dtypes_run_in_plain_torch(runs):
    model = adapted("qwen3_moe", dropout=0.5)
    step(model)
    assert not runs
    model.eval()
    step(model)
    assert len(runs) == 1
    step(model.double())
    assert len(runs) == 1


def test_switching(runs):
    model = adapted("qwen3_moe").eval()
    ids = torch.arange(18, device=DEVICE).view(2, 9)
    y = model(ids).logits
    with adapter_disabled(model):
        assert not torch.allclose(model(ids).logits, y, rtol=1e-3)
    merge_adapter(model)
    merged = model(ids).logits
    unmerge_adapter(model)
    close([merged], [y])
    assert torch.equal(model(ids).logits, y)
    assert len(runs) == 2


def test_gates_are_recognised_by_what_they_compute():
    def experts(name):
        return next(m for m in tiny_mixture(name).modules() if hasattr(m, "gate_up_proj"))

    assert gate_of(experts("qwen3_moe")) == gate_of(experts("mixtral")) == Gate("silu")
    own = experts("gpt_oss")
    assert gate_of(own) == Gate("silu", True, own.alpha, own.limit, True, 1.0)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_frozen_experts_run_on_the_kernels_where_gradients_flow(name, runs):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    model = tiny_mixture(name, **SMALL).to(DEVICE, dtype).train()
    inject_adapter(model, AdapterConfig(rank=8, targets=["q_proj", "o_proj"]))
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    experts = next(m for m in model.modules() if hasattr(m, "gate_up_proj"))
    own = type(experts)
    expected = step(model)
    assert not runs
    found = speed_up_model(model)
    assert found.experts == 1
    close(step(model), expected)
    assert len(runs) == 1
    with torch.no_grad():
        model(torch.arange(6, device=DEVICE)[None])
    assert len(runs) == 1
    restore_model(model)
    assert type(experts) is own
    assert not [name for name in vars(experts) if name.startswith("_theodora")]
