"""A merge that does not do what the adapter does is refused, and a good one never is."""

import pytest
import torch
from torch import nn

from theodora import AdapterConfig, CheckpointError, inject_adapter, merge_adapter, merge_checkpoint, save_adapter
from theodora.adapters import merge
from theodora.adapters.merge_check import weight_excess
from theodora.adapters.state import adapter_layers, trained_tensors
from theodora.functional import merged_weight
from theodora.layers import AdapterLayer
from theodora.merging import plan as merge_plan
from tiny import tiny_model

EVERYTHING = r".*(proj|embed_tokens|lm_head)"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def moved(dtype=torch.float32, family="llama", size=0.1, **config):
    model = inject_adapter(
        tiny_model(family, dtype=dtype), AdapterConfig(**{"rank": 4, "targets": EVERYTHING} | config)
    )
    with torch.no_grad():
        for parameter in trained_tensors(model).values():
            parameter += size * torch.randn_like(parameter)
    return model


@pytest.fixture
def excesses(monkeypatch):
    """What the check found, as a share of what it allows."""
    found = []
    check = merge.check_excess
    monkeypatch.setattr(merge, "check_excess", lambda e: (found.extend(map(float, e.values())), check(e)))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.01, 0.3, 3])
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_rounding_is_let_through(dtype, size, method, family, excesses):
    model = moved(dtype, family, size, method=method, dropout=0.5).train()
    merge_adapter(model)
    assert len(excesses) == len(adapter_layers(model))
    assert max(excesses) < 0.6


def zeros_and_cancelling(layer):
    """Rows of zeros, in the base and in the result, and rows that the update nearly erases."""
    with torch.no_grad():
        layer.weight[0] = 0
        adapter = layer.adapters["default"]
        adapter.lora_A.zero_()[:2] = layer.weight[1:3].to(adapter.lora_A)
        adapter.lora_B.zero_()
        adapter.lora_B[1, 0], adapter.lora_B[2, 1] = -1 / adapter.scale, -0.999 / adapter.scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_odd_rows_are_let_through(dtype, method, excesses):
    model = nn.Sequential(nn.Linear(40, 7), nn.Linear(7, 1), nn.Linear(1, 5, bias=False)).to(dtype)
    inject_adapter(model, AdapterConfig(rank=2, method=method, targets=("0", "1", "2")))
    zeros_and_cancelling(model[0])
    merge_adapter(model)
    assert max(excesses) < 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", ["no magnitude", "scale twice", "one row"])
def test_a_wrong_merge_is_refused(dtype, wrong, monkeypatch):
    right = AdapterLayer.merged_weight

    def merged(layer, name):
        weight = right(layer, name)
        adapter = layer.adapters[name]
        if wrong == "no magnitude":
            return layer.base_weight.dense().to(weight) + adapter.scale * (adapter.lora_B @ adapter.lora_A).detach()
        if wrong == "scale twice":
            return weight + adapter.scale * (adapter.lora_B @ adapter.lora_A).detach()
        weight[1] *= 1.1
        return weight

    model = moved(dtype, size=0.3)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    monkeypatch.setattr(AdapterLayer, "merged_weight", merged)
    with pytest.raises(CheckpointError, match="do not do what base and adapter do"):
        merge_adapter(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert not any(layer.merged_adapter for layer in adapter_layers(model).values())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_merge_on_disk_leaves_nothing(family, dtype, tiny_model_dir, tmp_path, monkeypatch):
    base = tiny_model_dir(family)
    model = moved(family=family, size=0.3, targets="all-linear")
    save_adapter(model, tmp_path / "a")
    merge_checkpoint(tmp_path / "a", tmp_path / "right", base_model=base, dtype=dtype)
    right = merge_plan.merged_weight
    monkeypatch.setattr(merge_plan, "merged_weight", lambda w, a, b, s, m: right(w, a, b, s))
    with pytest.raises(CheckpointError, match="does not do what base and adapter do"):
        merge_checkpoint(tmp_path / "a", tmp_path / "wrong", base_model=base, dtype=dtype)
    assert not (tmp_path / "wrong").exists()


def test_products_of_fewer_bits_are_allowed_more(monkeypatch):
    w, a, b = torch.randn(8, 33), torch.randn(2, 33), torch.randn(8, 2)
    wrong = merged_weight(w, a, b, 1.0) * 1.001
    exact = weight_excess(w, a, b, 1.0, None, wrong)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert weight_excess(w, a, b, 1.0, None, wrong) == pytest.approx(exact * 2.0**-11, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_each_row_is_held_by_its_own_size(dtype, method):
    w = torch.randn(4, 33, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 30.0, 300.0], dtype=torch.float64)[:, None]
    w = w.to(dtype)
    a, b = torch.randn(2, 33) / 6, torch.randn(4, 2) * w.float().norm(dim=1)[:, None] / 6
    factors = (a, b, 0.7, w.float().norm(dim=1) * 1.3 if method == "dora" else None)
    exact = merged_weight(w.double(), *(t.double() if isinstance(t, torch.Tensor) else t for t in factors))
    assert weight_excess(w, *factors, exact.to(dtype)) < 0.6
    allowed = {torch.float64: 2.0**-44, torch.float32: 2.0**-20}.get(dtype, torch.finfo(dtype).eps / 2) * 8
    for row in range(4):
        for share in (3, 30):  # of what rounding may do, at least, since the update makes rows longer
            wrong = exact.clone()
            wrong[row] += share * allowed * wrong[row]
            assert 0.4 * share < weight_excess(w, *factors, wrong.to(dtype)) < 1.5 * share
