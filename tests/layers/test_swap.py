"""Classes given to modules in place: taken back in any order, and never from under another library's."""

import copy
import pickle

import pytest
import torch
from torch import nn

from theodora import ConfigError
from theodora.layers import AdapterLayer, adapt
from theodora.layers.float8 import Float8Layer, quantize
from theodora.layers.swap import Swapped, check_reachable, swap_back, swap_class


class Plus(Swapped):
    prefix = "Plus"

    def forward(self, x):
        return super().forward(x) + 1


class Twice(Swapped):
    prefix = "Twice"

    def forward(self, x):
        return 2 * super().forward(x)


class OfAnother(nn.Module):
    """Mixed in on the left, as FSDP2's `fully_shard` does."""


def reclassed(module):
    module.__class__ = type("Another" + type(module).__name__, (OfAnother, type(module)), {})
    return module


def plus_identity():
    module = nn.Identity()
    swap_class(module, Plus)
    return module


class Importable(OfAnother, type(plus_identity())):
    """Found by its name, as pickle wants it."""


@pytest.mark.parametrize(("first", "then", "value"), [(Plus, Twice, 6), (Twice, Plus, 4)])
def test_classes_are_taken_back_in_any_order(first, then, value):
    module, x = plus_identity(), torch.tensor(3)
    swap_class(module, Twice)
    assert type(module).__name__ == "TwicePlusIdentity"
    assert module(x) == 8
    swap_back(module, first)
    assert module(x) == value
    swap_back(module, then)
    assert type(module) is nn.Identity


def test_float8_goes_from_under_an_adapter():
    module = nn.Linear(16, 16, bias=False)
    quantize(module)
    layer = adapt(module)
    swap_back(layer, Float8Layer)
    assert type(layer).__name__ == "AdaptedLinear"
    layer.end()
    assert type(module) is nn.Linear


def test_a_class_of_another_library_stays_on_top():
    module = plus_identity()
    top = type(reclassed(module))
    with pytest.raises(ConfigError, match=r"this module: AnotherPlusIdentity"):
        swap_back(module, Plus)
    assert type(module) is top


def test_what_stands_above_it_is_taken_back():
    module = plus_identity()
    top = type(reclassed(module))
    swap_class(module, Twice)
    with pytest.raises(ConfigError, match="TwiceAnotherPlusIdentity"):
        swap_back(module, Plus)
    swap_back(module, Twice)
    assert type(module) is top


def test_all_modules_out_of_reach_are_named():
    modules = [plus_identity() for _ in range(3)]
    for module in modules[1:]:
        reclassed(module)
    named = list(zip("abc", modules, strict=True))
    with pytest.raises(ConfigError, match=r"(?s)b: AnotherPlus.*c: AnotherPlus") as error:
        check_reachable(named, Plus, Twice)
    assert "a:" not in str(error.value)
    check_reachable(named, Twice)


def test_a_layer_that_cannot_end_is_as_it_was():
    layer = reclassed(adapt(nn.Linear(3, 2)))
    x = torch.randn(1, 3)
    before = layer(x)
    with pytest.raises(ConfigError, match="AnotherAdaptedLinear"):
        layer.end()
    assert isinstance(layer, AdapterLayer)
    assert torch.equal(layer(x), before)


def test_a_layer_that_ends_has_nothing_left():
    module = nn.Linear(3, 2)
    before = vars(module).keys() | module._modules.keys()
    adapt(module).end()
    assert vars(module).keys() | module._modules.keys() == before
    assert type(module) is nn.Linear


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_of_what_another_library_has_put_on_top(copied):
    other = copied(Importable())
    assert type(other) is Importable
    assert other(torch.ones(1)) == 2
