"""Adapters of experts combined, converted and swapped: exactly what becomes of each expert's weight by itself."""

import copy

import pytest
import torch

from theodora import (
    AdapterConfig,
    combine_adapters,
    inject_adapter,
    load_adapter,
    save_adapter,
    set_adapter,
    swap_adapter_weights,
    to_lora,
)
from theodora.adapters.check import load_weights
from theodora.adapters.state import adapter_layers
from theodora.errors import CheckpointError
from theodora.functional import merged_weight
from theodora.layers.experts import ExpertParameter
from theodora.merging.ties_dare import combined
from tiny_families import MIXTURE_IDS as IDS
from tiny_families import tiny_mixture


def add(model, name, seed, **options):
    config = {"method": "dora", "rank": 4, "experts": True, "adapter_dtype": "base", **options}
    inject_adapter(model, AdapterConfig(**config), name)
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model, name).values():
        for parameter in layer.adapters[name].parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


@pytest.fixture(params=["qwen3_moe", "gpt_oss"])
def model(request):
    model = tiny_mixture(request.param, num_hidden_layers=1).double()
    add(model, "first", 1)
    add(model, "second", 2, method="lora", rank=3, targets=["q_proj", "experts.gate_up_proj"])
    return model


def weights(layer, name):
    """The weight that each expert has with an adapter, one after the other."""
    w = layer.base_weight.dense()
    if name not in layer.adapters:
        return w
    adapter = layer.adapters[name]
    m = [None] * len(w) if adapter.magnitude is None else adapter.magnitude
    return torch.stack(
        [merged_weight(*parts, adapter.scale, own) for *parts, own in zip(w, *adapter.factors(), m, strict=True)]
    )


def experts_of(model):
    return {path: layer for path, layer in adapter_layers(model).items() if isinstance(layer, ExpertParameter)}


def test_a_weighted_sum_is_that_of_each_experts_weight(model):
    report = combine_adapters(model, ["first", "second"], [0.7, -0.4], into="both")
    assert report.worst < 1e-12
    for layer in experts_of(model).values():
        w = layer.base_weight.dense()
        wanted = w + 0.7 * (weights(layer, "first") - w) - 0.4 * (weights(layer, "second") - w)
        torch.testing.assert_close(weights(layer, "both"), wanted)


def test_ties_is_each_experts_own(model):
    combine_adapters(model, ["first", "second"], [1.0, 1.0], "both", "ties", density=0.5)
    layer = adapter_layers(model)["model.layers.0.mlp.experts.gate_up_proj"]
    for e, w in enumerate(layer.base_weight.dense()):
        changes = [weights(layer, name)[e] - w for name in ("first", "second")]
        torch.testing.assert_close(weights(layer, "both")[e], w + combined("ties", changes, [1, 1], 0.5, 0, ["", ""]))


def test_dora_as_lora_exactly_and_as_well_as_a_rank_allows(model):
    assert to_lora(model, "first", None, into="plain").worst < 1e-12
    y = model(IDS).logits
    set_adapter(model, "first")
    torch.testing.assert_close(model(IDS).logits, y)
    report = to_lora(model, "first", 6, into="small")
    layer = adapter_layers(model)["model.layers.0.mlp.experts.down_proj"]
    w, error, size = layer.base_weight.dense(), 0.0, 0.0
    for e, wanted in enumerate(weights(layer, "first")):
        error += float(torch.linalg.svdvals(wanted - w[e])[6:].square().sum())
        size += float((wanted - w[e]).square().sum())
    assert report.errors["model.layers.0.mlp.experts.down_proj"] == pytest.approx((error / size) ** 0.5)


def test_another_adapters_weights_take_the_place_of_one(model, tmp_path):
    add(model, "third", 3, rank=2, rslora=True)
    set_adapter(model, "third")
    y = model(IDS).logits
    save_adapter(model, tmp_path / "third", "third")
    set_adapter(model, "first")
    kept = dict(model.named_parameters())
    swap_adapter_weights(model, "first", tmp_path / "third")
    torch.testing.assert_close(model(IDS).logits, y)
    assert all(kept[name] is p for name, p in model.named_parameters())
    with pytest.raises(CheckpointError, match=r"gate_up_proj: has magnitudes \(DoRA\), and the adapter here is plain"):
        swap_adapter_weights(model, "second", tmp_path / "third")


def test_a_combination_saves_and_loads(model, tmp_path):
    combine_adapters(model, ["first", "second"], [0.5, 0.5], into="both")
    y = model(IDS).logits
    save_adapter(model, tmp_path / "both", "both")
    fresh = type(model)(model.config).double().eval()
    fresh.load_state_dict({key: t for key, t in model.state_dict().items() if "adapt" not in key}, strict=False)
    torch.testing.assert_close(load_adapter(fresh, tmp_path / "both")(IDS).logits, y)
    trained = copy.deepcopy(fresh)
    for layer in adapter_layers(trained).values():
        for parameter in layer.adapters.parameters():
            parameter.data.zero_()
    load_weights(trained, tmp_path / "both")
    torch.testing.assert_close(trained(IDS).logits, y)
