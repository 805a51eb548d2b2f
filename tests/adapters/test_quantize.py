"""`quantize_base`: what goes into float8, and that an adapter trained on it belongs to the original base."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import formula
from theodora import (
    AdapterConfig,
    ConfigError,
    inject_adapter,
    load_adapter,
    merge_adapter,
    merge_checkpoint,
    quantize_base,
    remove_adapter,
    save_adapter,
    unmerge_adapter,
)
from theodora.adapters.state import adapter_layers
from theodora.fastpath.accelerate import accelerate
from theodora.kernels.float8 import FLOAT8
from theodora.layers.float8 import Float8Layer, plain_weight
from tiny import FAMILIES, VOCAB_SIZE, tiny_model

IDS = torch.arange(3, 35).view(2, 16)


def float8_layers(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, Float8Layer)}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def train(model, steps=1, lr=1e-2):
    labels = IDS.roll(3, 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, dtype):
    plain, model = tiny_model(family, dtype=dtype), quantize_base(tiny_model(family, dtype=dtype))
    found = float8_layers(model)
    head = model.get_output_embeddings()
    linear = [m for m in plain.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    assert len(found) == len(linear) - 1
    assert head not in found.values()
    assert model.dtype == dtype
    assert model.num_parameters() == plain.num_parameters()
    assert formula.error(logits(model), logits(plain).double()) < 0.3
    # The original with the weights' rounding alone: what is left is that of the activations.
    plain.load_state_dict(model.state_dict())
    assert formula.error(logits(model), logits(plain).double()) < 0.2


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "qwen2"])
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_an_adapter_starts_at_the_base_and_learns(family, method):
    model = quantize_base(tiny_model(family))
    before = logits(model)
    inject_adapter(model, AdapterConfig(method=method, rank=4))
    assert formula.error(logits(model), before.double()) < 1e-5
    losses = train(model, steps=25)
    assert losses[-1] < 0.7 * losses[0]
    assert all(module.weight.dtype == FLOAT8 for module in float8_layers(model).values())
    remove_adapter(model)
    assert torch.equal(logits(model), before)


def test_training_traces_the_plain_base():
    runs = []
    for quantise in (False, True):
        torch.manual_seed(0)
        model = tiny_model()
        runs.append(train(inject_adapter(quantize_base(model) if quantise else model), steps=20))
    plain, quantised = map(torch.tensor, runs)
    assert (plain - quantised).abs().max() < 0.15 * plain[0]


def test_recomputing_activations_changes_nothing():
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = inject_adapter(quantize_base(tiny_model())).train()
        if recompute:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # the method has another name from transformers 5.2x on
                model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_fast_path_changes_nothing(family):
    found = []
    for fast in (False, True):
        torch.manual_seed(0)
        model = inject_adapter(quantize_base(tiny_model(family)), AdapterConfig(rank=4))
        with torch.no_grad():
            for layer in adapter_layers(model).values():
                layer.adapters["default"].lora_B.normal_(std=0.1)
        if fast:
            accelerate(model)
        loss = model.train()(IDS, labels=IDS).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(formula.error(fast, plain.double()) < 1e-5 for plain, fast in zip(*found, strict=True))


def test_merging_in_memory_says_onto_what_and_can_be_undone(tmp_path):
    model = inject_adapter(
        quantize_base(tiny_model(dtype=torch.bfloat16)), AdapterConfig(targets=("q_proj", "up_proj"))
    )
    train(model, steps=5)
    before = logits(model)
    bits = {path: layer.weight.clone() for path, layer in float8_layers(model).items()}
    with pytest.warns(UserWarning, match="onto the original weights"):
        merge_adapter(model)
    for layer in adapter_layers(model).values():
        assert layer.weight.dtype == torch.bfloat16
    assert formula.error(logits(model), before.double()) < 0.2
    merged = logits(model)
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in saved.parameters()} == {torch.bfloat16}
    assert formula.error(logits(saved), merged.double()) < 0.2
    unmerge_adapter(model)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(layer.weight.float(), bits[path].float()) for path, layer in float8_layers(model).items())


def test_merged_weights_are_the_formula_on_the_quantised_values():
    model = inject_adapter(quantize_base(tiny_model()))
    train(model, steps=3)
    for layer in adapter_layers(model).values():
        adapter = layer.adapters["default"]
        tensors = (plain_weight(layer, torch.float64), adapter.lora_A, adapter.lora_B, adapter.magnitude)
        w, a, b, m = (tensor.detach().double() for tensor in tensors)
        adapted = w + adapter.scale * b @ a
        assert formula.error(layer.merged_weight("default"), m[:, None] * adapted / adapted.norm(dim=1)[:, None]) < 1e-5


def test_the_adapter_belongs_to_the_original_base(tiny_model_dir, tmp_path):
    base = tiny_model_dir()
    model = inject_adapter(quantize_base(AutoModelForCausalLM.from_pretrained(base)))
    train(model, steps=5)
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter")
    # Warnings are errors: the base is recognised, quantised or not.
    onto_plain = load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    onto_float8 = load_adapter(quantize_base(AutoModelForCausalLM.from_pretrained(base)), tmp_path / "adapter")
    assert torch.equal(logits(onto_float8), expected)
    assert formula.error(logits(onto_plain), expected.double()) < 0.3
    report = merge_checkpoint(tmp_path / "adapter", tmp_path / "merged", base_model=base)
    assert ["trained on weights in float8" in note for note in report.notes] == [True]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert formula.error(logits(merged), logits(onto_plain).double()) < 1e-4


def test_another_base_is_still_noticed(tmp_path):
    save_adapter(inject_adapter(quantize_base(tiny_model())), tmp_path)
    with pytest.raises(Exception, match="another base model"):
        load_adapter(quantize_base(tiny_model(seed=1)), tmp_path)


def test_saving_without_an_adapter_saves_a_plain_model(tmp_path):
    model = quantize_base(tiny_model(tied=True))
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    for path, layer in float8_layers(model).items():
        assert torch.equal(saved.get_submodule(path).weight, plain_weight(layer, torch.float32))
    again = quantize_base(saved)
    assert formula.error(logits(again), logits(model).double()) < 1e-5


def test_the_same_weights_give_the_same_bits():
    one, other = (float8_layers(quantize_base(tiny_model())) for _ in range(2))
    for path in one:
        assert torch.equal(one[path].weight.float(), other[path].weight.float())
        assert torch.equal(one[path].weight_scale, other[path].weight_scale)


def test_what_is_left_alone():
    model = tiny_model(intermediate_size=40)  # no multiple of 16
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    found = set(float8_layers(quantize_base(model, exclude=("layers.1.self_attn.k_proj",))))
    assert found == {
        *(f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in ("v", "o")),
        "model.layers.0.self_attn.k_proj",
    }
    quantize_base(model)
    assert "model.layers.1.self_attn.k_proj" in float8_layers(model)


def test_an_adapter_on_the_head_and_in_full():
    model = quantize_base(tiny_model(), exclude=("down_proj",))
    inject_adapter(model, AdapterConfig(targets=("q_proj", "lm_head"), modules_to_save=("down_proj",)))
    losses = train(model, steps=10)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("adapter_dtype", ["float32", "base"])
def test_starts_from_the_weight_itself(init, adapter_dtype):
    model = quantize_base(tiny_model(dtype=torch.bfloat16))
    before = logits(model)
    inject_adapter(model, AdapterConfig(init=init, rank=4, adapter_dtype=adapter_dtype))
    assert formula.error(logits(model), before.double()) < 0.05
    dtype = torch.bfloat16 if adapter_dtype == "base" else torch.float32
    assert all(layer.adapters["default"].lora_A.dtype == dtype for layer in adapter_layers(model).values())


def test_refusals():
    with pytest.raises(ConfigError, match="expected fp8"):
        quantize_base(tiny_model(), "int8")
    with pytest.raises(ConfigError, match="quantise it first"):
        quantize_base(inject_adapter(tiny_model()))
    with pytest.raises(ConfigError, match="quantise it first"):
        quantize_base(get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])))
    with pytest.raises(ConfigError, match="no linear layer"):
        quantize_base(nn.Sequential(nn.Linear(15, 16), nn.Embedding(VOCAB_SIZE, 16)))
