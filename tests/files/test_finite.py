"""Nothing that is not finite comes out of an operation on adapters, in the dtype it is kept in."""

import pytest
import torch

import tiny
from theodora import combine_adapters, inject_adapter, merge_adapter, swap_adapter_weights, to_lora
from theodora.adapters.state import trained_tensors
from theodora.config import AdapterConfig
from theodora.errors import CheckpointError
from theodora.files.finite import finite, not_finite

ALL = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", ALL)
def test_what_is_finite_in_each_dtype(dtype):
    assert finite(torch.tensor([0.0, 1.0, -1.0]).to(dtype))
    assert not finite(torch.tensor([0.0, torch.nan]).to(dtype))
    assert finite(torch.empty(0).to(dtype))
    assert not_finite([("a", torch.ones(2)), ("b", torch.tensor([1, 2])), ("c", torch.tensor(torch.inf))]) == ["c"]


def _model(method="lora", factor=1.0, dtype=torch.float32):
    model = inject_adapter(tiny.tiny_model(dtype=dtype), AdapterConfig(method=method, rank=2, targets=("q_proj",)))
    with torch.no_grad():
        for parameter in trained_tensors(model).values():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * factor)
    return model


def test_a_merge_in_memory_beyond_its_dtype_changes_nothing():
    model = _model(factor=1e3, dtype=torch.float16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"infinite values in float16: the adapter.*\n  - model\.layers"):
        merge_adapter(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_merge_in_memory_names_the_bases_own_fault():
    model = _model()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"base model's own weights hold NaN.*\n  - model\.layers\.1\.self_attn"):
        merge_adapter(model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["base", "adapter"])
@pytest.mark.parametrize("rank", [None, 1])
def test_a_combination_or_conversion_of_what_is_not_finite_is_refused(value, where, rank):
    model = _model("dora")
    with torch.no_grad():
        if where == "base":
            model.model.layers[1].self_attn.q_proj.weight[0, 0] = value
        else:
            next(iter(trained_tensors(model).values())).view(-1)[0] = value
    for make in (
        lambda: to_lora(model, "default", rank, into="other"),
        lambda: combine_adapters(model, ["default"], [0.5], "other", "svd" if rank else "linear", rank=rank),
    ):
        with pytest.raises(CheckpointError, match="holds NaN or infinite values"):
            make()


def test_a_result_beyond_float32_is_refused():
    model = _model(factor=1e18)
    with pytest.raises(CheckpointError, match=r"infinite values in float32.*\n  - .*lora_"):
        combine_adapters(model, ["default"], [1e30], into="other")


def test_weights_that_the_adapters_own_dtype_cannot_hold_are_not_swapped_in():
    model = inject_adapter(
        tiny.tiny_model(dtype=torch.float16),
        AdapterConfig(method="lora", rank=2, targets=("q_proj",), adapter_dtype="float16"),
    )
    before = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}
    tensors = {
        f"model.layers.{layer}.self_attn.q_proj.lora_{part}.weight": torch.full(shape, 1e6)
        for layer in range(2)
        for part, shape in (("A", (2, 32)), ("B", (32, 2)))
    }
    with pytest.raises(CheckpointError, match=r"not finite in torch\.float16"):
        swap_adapter_weights(model, "default", tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained_tensors(model).items())
