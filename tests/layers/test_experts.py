"""Adapters on the parameters of fused experts: every operation against the float64 formula, expert by expert."""

import copy
from functools import partial
from types import MethodType

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch.func import functional_call
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import tiny
import tiny_families
from theodora import (
    AdapterConfig,
    adapter_disabled,
    inject_adapter,
    load_adapter,
    merge_adapter,
    remove_adapter,
    save_adapter,
    unmerge_adapter,
)
from theodora.adapters.state import adapter_layers
from theodora.errors import CheckpointError, ConfigError
from theodora.functional import merged_weight
from theodora.kernels.operators import on_paper
from theodora.layers.experts import ExpertParameter

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
EAGER = {"experts_implementation": "eager"}  # torch's grouped product takes no float64


qwen, gpt_oss = (partial(tiny_families.tiny_mixture, name) for name in ("qwen3_moe", "gpt_oss"))


def llama_4():
    """(E, I, O), not declared: rows come sorted, all tokens for each expert."""
    sizes = {"intermediate_size": 24, "intermediate_size_mlp": 24, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = Llama4ForCausalLM(Llama4TextConfig(**SMALL, **sizes, num_key_value_heads=2, interleave_moe_layer_step=1))
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(params=[qwen, gpt_oss], ids=["qwen3_moe", "gpt_oss"])
def model(request):
    return request.param().double()


@pytest.fixture
def ids():
    return tiny_families.MIXTURE_IDS


def adapted(model, method="dora", **options):
    config = {"rank": 4, "experts": True, "adapter_dtype": "base", **options}
    inject_adapter(model, AdapterConfig(method=method, **config))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def written_out(model):
    """The same model with the formula's weights, expert by expert, in place of base and adapter."""
    plain = remove_adapter(copy.deepcopy(model))
    with torch.no_grad():
        for path, layer in adapter_layers(model).items():
            (adapter,) = layer.adapters.values()
            parameter = plain.get_parameter(path if isinstance(layer, ExpertParameter) else f"{path}.weight")
            if not isinstance(layer, ExpertParameter):
                parameter.copy_(merged_weight(parameter, *adapter.factors(), adapter.scale, adapter.magnitude))
                continue
            for e, w in enumerate(parameter):
                a, b = (factor[e] for factor in adapter.factors())
                m = None if adapter.magnitude is None else adapter.magnitude[e]
                own = merged_weight(w.T if layer.stored_transposed else w, a, b, adapter.scale, m)
                w.copy_(own.T if layer.stored_transposed else own)
    return plain


@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("options", [{}, {"init": "pissa"}, {"rslora": True, "rank_pattern": {"down_proj": 2}}])
def test_the_model_computes_the_formula(model, ids, method, options):
    adapted(model, method, **options)
    torch.testing.assert_close(model(ids).logits, written_out(model)(ids).logits)


def test_a_fresh_adapter_changes_nothing(model, ids):
    before = model(ids).logits
    inject_adapter(model, AdapterConfig(experts=True))
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-14)


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_gradients_are_the_formulas(model, method):
    """Of A, B, m, the tokens and what experts count, against autograd through weights that are written out."""
    experts = adapted(model, method).model.layers[0].mlp.experts
    own = [layer for layer in adapter_layers(model).values() if layer.holder is experts]
    plain = remove_adapter(copy.deepcopy(model)).model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, 32, dtype=torch.float64, generator=generator, requires_grad=True)
    counted = torch.rand(7, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    chosen = torch.tensor([[0, 1], [3, 0], [1, 0], [0, 3], [3, 1], [1, 3], [0, 1]])
    inputs = [x, counted, *(p for layer in own for p in layer.adapters.parameters())]

    def weight(layer):
        adapter = layer.adapters["default"]
        w = layer.current_weight.dense() + adapter.scale * adapter.lora_B @ adapter.lora_A
        if adapter.magnitude is not None:
            w = (adapter.magnitude / w.detach().norm(dim=2))[..., None] * w
        return w.mT if layer.stored_transposed else w

    found = torch.autograd.grad(experts(x, chosen, counted).sin().sum(), inputs)
    formula = functional_call(plain, {layer.parameter_name: weight(layer) for layer in own}, (x, chosen, counted))
    for one, other in zip(found, torch.autograd.grad(formula.sin().sum(), inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_an_expert_that_no_token_reaches_has_zero_gradients_and_keeps_its_norm(ids):
    model = adapted(qwen().double())
    layer = adapter_layers(model)["model.layers.0.mlp.experts.down_proj"]
    experts = layer.holder
    adapter = layer.adapters["default"]
    chosen = torch.tensor([[0, 2]] * 5)
    norm = layer.norm(adapter)
    y = experts(torch.randn(5, 32, dtype=torch.float64), chosen, torch.full((5, 2), 0.5, dtype=torch.float64))
    y.sum().backward()
    for parameter in adapter.parameters():
        reached = parameter.grad.flatten(1).abs().amax(1) > 0
        assert reached.tolist() == [True, False, True, False]
    assert torch.equal(layer.norm(adapter), norm)


def test_tokens_of_no_expert_count_for_nothing(ids):
    experts = adapted(qwen().double()).model.layers[0].mlp.experts
    x, half = torch.randn(3, 32, dtype=torch.float64), torch.full((3, 2), 0.5, dtype=torch.float64)
    y = experts(x, torch.tensor([[0, 4], [4, 4], [1, 0]]), half)
    alone = experts(x, torch.tensor([[0], [3], [1]]), half[:, :1])
    torch.testing.assert_close(y[0], alone[0])
    assert not y[1].any()


def test_switching_merging_copying_and_leaving(model, ids, tmp_path):
    base = model(ids).logits
    y = adapted(model)(ids).logits
    assert not torch.allclose(y, base)
    with adapter_disabled(model):
        torch.testing.assert_close(model(ids).logits, base, rtol=0, atol=1e-14)
    assert torch.equal(copy.deepcopy(model)(ids).logits, y)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    merge_adapter(model)
    torch.testing.assert_close(model(ids).logits, y)
    model.save_pretrained(tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged", dtype="auto", **EAGER)
    torch.testing.assert_close(merged(ids).logits, y)
    unmerge_adapter(model)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(model(ids).logits, y)
    save_adapter(model, tmp_path / "adapter")
    remove_adapter(model)
    assert not type(model.model.layers[0].mlp.experts).__module__.startswith("theodora")
    torch.testing.assert_close(load_adapter(model, tmp_path / "adapter")(ids).logits, y, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing_enable:FutureWarning")  # the new name is of 5.2x
def test_checkpointing_and_half_precision(model, ids):
    adapted(model)
    model(ids, labels=ids).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(ids, labels=ids).loss.backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)
    experts, x = model.eval().model.layers[0].mlp.experts, torch.randn(8, 32, dtype=torch.float64)
    chosen, counted = torch.tensor([[0, 1], [2, 3]] * 4), torch.full((8, 2), 0.5, dtype=torch.float64)
    y = experts(x, chosen, counted)
    half = experts.bfloat16()(x.bfloat16(), chosen, counted.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.double() - y).norm() < 0.02 * y.norm()


@pytest.mark.filterwarnings("ignore:all-linear leaves out 2 modules .router")
def test_llama_4(ids, tmp_path):
    torch.manual_seed(0)
    model = llama_4().double().eval()
    base = model(ids).logits
    inject_adapter(model, AdapterConfig(experts=True))
    torch.testing.assert_close(model(ids).logits, base)
    remove_adapter(model)
    y = adapted(model)(ids).logits
    torch.testing.assert_close(y, written_out(model)(ids).logits)
    assert not torch.allclose(y, base)
    y.sum().backward()
    for path, layer in adapter_layers(model).items():
        assert all(p.grad is not None and p.grad.any() for p in layer.adapters.parameters()), path
    save_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(merge_adapter(model)(ids).logits, y)
    unmerge_adapter(model)
    remove_adapter(model)
    torch.testing.assert_close(load_adapter(model, tmp_path / "adapter")(ids).logits, y, rtol=1e-5, atol=1e-6)


def refused(model, **options):
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ConfigError) as found:
        inject_adapter(model, AdapterConfig(**{"experts": True} | options))
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    return str(found.value)


def test_experts_whose_forward_was_replaced():
    model = qwen()
    for layer in model.model.layers:  # as transformers' kernelize and Liger do
        layer.mlp.experts.forward = MethodType(lambda self, *args: args[0], layer.mlp.experts)
    assert "Qwen3MoeExperts's forward was replaced (by a fused kernel" in refused(model)
    assert "experts.down_proj: this Qwen3MoeExperts's" in refused(model, targets=("q_proj", "down_proj"))


def test_experts_that_a_kernel_in_the_place_of_their_block_reads():
    model = gpt_oss()
    for layer in model.model.layers:  # as MegaBlocksMoeMLP's
        layer.mlp.forward = MethodType(lambda self, x: (x, None), layer.mlp)
    assert "the forward of the GptOssMLP around it was replaced" in refused(model)


def test_hooks_of_accelerate_call_the_forward_that_they_wrap():
    model = qwen()
    for layer in model.model.layers:
        add_hook_to_module(layer.mlp, ModelHook())
    assert len(adapter_layers(inject_adapter(model, AdapterConfig(experts=True)))) == 12


def test_quantised_experts_in_a_layout_that_nobody_reads():
    model = qwen()
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            own = getattr(layer.mlp.experts, name)
            packed = torch.nn.Parameter(own.data.to(torch.float8_e4m3fn), requires_grad=False)
            setattr(layer.mlp.experts, name, packed)
    assert "down_proj: its weight is quantised or special (Tensor, torch.float8_e4m3fn)" in refused(model)
    inject_adapter(model, AdapterConfig(targets=("q_proj",), experts=False))
    assert len(adapter_layers(model)) == 2


def test_an_expression_that_reaches_no_expert_and_a_model_without_any():
    assert "matches no module path" in refused(qwen(), targets=r".*\.experts\.up_proj")
    assert "no module is called 'gate_up_prj'" in refused(qwen(), targets=("gate_up_prj",))
    assert "this model has no fused experts" in refused(tiny.tiny_model("llama"))


def test_an_adapter_for_another_number_of_experts(tmp_path):
    save_adapter(adapted(qwen()), tmp_path / "adapter")
    other = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SMALL, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2, num_key_value_heads=2, **EAGER
        )
    )
    with pytest.raises(CheckpointError, match=r"a weight of \(4, 48, 32\) \(experts, out, in\); here it is \(6"):
        load_adapter(other, tmp_path / "adapter")


def test_routers_stay_frozen_unless_named():
    model = tiny_families.tiny_family("afmoe", tiny_families.families()["afmoe"])
    with pytest.warns(UserWarning, match="gate: it chooses experts, and stays frozen unless targets names it"):
        inject_adapter(model, AdapterConfig(experts=True))
    assert not [path for path in adapter_layers(model) if ".router." in path]
    remove_adapter(model)
    inject_adapter(model, AdapterConfig(targets=("gate",)))
    assert [path.rpartition(".")[2] for path in adapter_layers(model)] == ["gate"]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_sizes_alone(device):
    with torch.device("meta"):
        model = qwen().bfloat16().train()
    with on_paper(device):
        inject_adapter(model, AdapterConfig(rank=4, experts=True))
        ids = torch.zeros(2, 9, dtype=torch.long, device="meta")
        model(ids, labels=ids).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.shape == p.shape and p.grad.dtype == p.dtype for p in trained)
