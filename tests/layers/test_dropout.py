"""Dropout is a module inside each adapter: whoever walks over modules finds it, switches it, or replaces it."""

import copy
import pickle

import pytest
import torch
from torch import nn
from trl.trainer.utils import disable_dropout_in_model

from theodora import AdapterConfig, inject_adapter, kernels, load_adapter, save_adapter, set_adapter
from theodora.adapters import merge_check
from theodora.fastpath.groups import parts_that_fit
from tiny import tiny_model

IDS = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.linear = nn.Embedding(11, 6), nn.Linear(6, 7)

    def forward(self, ids):
        return self.linear(self.embed(ids))


def net(**config):
    torch.manual_seed(0)
    model = inject_adapter(Net(), AdapterConfig(rank=2, targets=("embed", "linear"), **{"dropout": 0.5} | config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.train()


TOKENS = torch.arange(8).view(2, 4)


def varies(model):
    return not torch.equal(model(TOKENS), model(TOKENS))


def test_trl_turns_it_off():
    model = inject_adapter(tiny_model(), AdapterConfig(rank=2, dropout=0.5)).train()
    with torch.no_grad():
        for layer in model.modules():
            if hasattr(layer, "lora_B"):
                layer.lora_B.normal_()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    disable_dropout_in_model(model)
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    assert torch.equal(model(IDS).logits, model.eval()(IDS).logits)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("way", ["p", "eval", "replaced", "dropout alone"])
def test_switched_off_as_any_dropout(way, method):
    model = net(method=method)
    assert varies(model)
    with kernels.reference():
        assert varies(model)
    if way == "p":
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    elif way == "eval":
        model.eval()
    elif way == "replaced":
        for layer in (model.embed, model.linear):
            layer.adapters["default"].dropout = nn.Identity()
    else:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
    assert not varies(model)
    with kernels.reference():
        assert not varies(model)


def test_switched_on_afterwards():
    model = net(dropout=0.0)
    assert not varies(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.4
    assert varies(model)
    model.eval()
    assert not varies(model)
    for module in model.modules():  # Monte Carlo dropout
        if isinstance(module, nn.Dropout):
            module.train()
    assert varies(model)


def test_of_another_kind():
    class Doubles(nn.Module):
        def forward(self, x):
            return 2 * x if self.training else x

    model = net()
    for layer in (model.embed, model.linear):
        layer.adapters["default"].dropout = Doubles()
    a = model.linear.adapters["default"]
    x = torch.randn(3, 6)
    found = model.linear(x)
    g = a.magnitude / model.linear.norm(a)
    expected = g * (x @ model.linear.weight.T + a.scale * (2 * x) @ a.lora_A.T @ a.lora_B.T) + model.linear.bias
    torch.testing.assert_close(found, expected)


def test_an_adapter_on_a_model_that_evaluates_does_not_drop():
    model = inject_adapter(tiny_model().eval(), AdapterConfig(rank=2, dropout=0.5))
    assert not any(module.training for module in model.modules())


def test_names_and_files_are_as_before(tmp_path):
    model = net()
    assert not [name for name in model.state_dict() if "dropout" in name]
    assert not [name for name, _ in model.named_parameters() if "dropout" in name]
    save_adapter(model, tmp_path)
    torch.manual_seed(0)
    again = load_adapter(Net(), tmp_path, trainable=True).train()
    dropouts = [module for module in again.modules() if isinstance(module, nn.Dropout)]
    assert [module.p for module in dropouts] == [0.5, 0.5]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_their_own(how):
    model = net()
    twin = how(model)
    disable_dropout_in_model(twin)
    assert varies(model)
    assert not varies(twin)


def test_each_adapter_has_its_own():
    model = net()
    inject_adapter(model, AdapterConfig(rank=2, targets=("embed", "linear"), dropout=0.0), name="second")
    assert not varies(model)
    set_adapter(model, "default")
    assert varies(model)


def test_fast_paths_read_it(monkeypatch):
    monkeypatch.setattr("theodora.fastpath.groups.runs_triton", lambda _: True)
    model, x = net(), torch.randn(5, 6)
    assert model.linear.parts().drops
    assert parts_that_fit(x, [model.linear]) is None
    disable_dropout_in_model(model)
    assert not model.linear.parts().drops
    assert parts_that_fit(x, [model.linear]) is not None


def test_checks_of_a_merge_run_without_it():
    model = net(dropout=0.9)
    states = {module: module.training for module in model.modules()}
    runs = [merge_check._run(model.linear, torch.ones(2, 6)) for _ in range(2)]
    assert torch.equal(*runs)
    assert {module: module.training for module in model.modules()} == states


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled():
    layer, x = net(method="lora").linear, torch.randn(4, 6)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert not torch.equal(compiled(x), compiled(x))
    disable_dropout_in_model(layer)
    torch.testing.assert_close(compiled(x), layer(x))
    assert torch.equal(compiled(x), compiled(x))
