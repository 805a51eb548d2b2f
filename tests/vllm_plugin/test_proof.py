"""What the plug-in proves when a model is loaded, and what it refuses, in a stand-in for vLLM (`standin.py`)."""

import logging
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from theodora import vllm_plugin
from theodora.functional import dora_norm, dora_scale

CONFIG = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32))
PARTS = {"q": 6, "k": 4, "v": 4}


class Vllm:
    """A vLLM with the plug-in in it, and a model as it has loaded it."""

    def __init__(self, monkeypatch, version="0.32.0", before=lambda there: None):
        self.there = runpy.run_path(str(Path(__file__).with_name("standin.py")))
        modules = self.there["modules"](version)
        for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
            monkeypatch.delitem(sys.modules, name)
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        before(modules)
        vllm_plugin.register()
        vllm_plugin.register()  # as vLLM does; the second does nothing
        self.worker = modules["vllm.lora.worker_manager"].LRUCacheWorkerLoRAManager()

    def load_model(self):
        assert self.worker.create_lora_manager("the model", CONFIG) == "the model"
        self.manager = self.worker._adapter_manager
        return self

    def load(self, id, *, dora, layer=1):
        """An adapter on one layer's modules, in a slot."""
        random = torch.Generator().manual_seed(id)
        tensors, self.given = {}, {}
        for part, rows, inside in [*((f"{p}_proj", n, 8) for p, n in PARTS.items()), ("o_proj", 8, 6)]:
            a, b = torch.randn(2, inside, generator=random), torch.randn(rows, 2, generator=random)
            m = torch.rand(rows, generator=random) + 0.5
            self.given[part] = a, b, m
            for name, tensor in zip(
                ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"), (a, b, m), strict=True
            ):
                if dora or "magnitude" not in name:
                    tensors[f"base_model.model.layers.{layer}.{part}.{name}"] = tensor
        request = SimpleNamespace(lora_int_id=id, rank=2, dora=dora, tensors=tensors, lora_path=f"adapters/{id}")
        lora = self.worker._load_adapter(request)
        self.manager.add_adapter(lora)
        self.manager.activate_adapter(id)

    def output(self, name, x, ids):
        layer = self.manager.modules[name]
        mapping = self.there["LoRAMapping"](tuple(ids), tuple(ids))
        layer.punica_wrapper.update_metadata(mapping, self.manager.lora_index_to_id, 4, 32)
        return layer.apply(x)


@pytest.fixture
def told(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level("INFO", "vllm.theodora")
    return caplog


def formula(x, w, given, *, dora):
    a, b, m = (t.double() for t in given)
    y = x.double() @ (w.double() + 4 * b @ a).T
    return y * dora_scale(m, dora_norm(w.double(), a, b, 4.0)) if dora else y


def o_proj_follows_the_formula(vllm, *, dora):
    x = torch.randn(3, 6)
    w = vllm.manager.modules["layers.1.o_proj"].base_layer.weight.detach()
    y = vllm.output("layers.1.o_proj", x, [5, 0, 5]).detach().double()
    right = formula(x, w, vllm.given["o_proj"], dora=dora)
    right[1] = x[1].double() @ w.double().T
    torch.testing.assert_close(y, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("version", ["0.32.0", "0.99.1"])
def test_whatever_the_version_what_is_right_serves(monkeypatch, told, version):
    vllm = Vllm(monkeypatch, version).load_model()
    assert "2 kinds of layers gave what the formula gives in all 3 slots" in told.text
    assert f"in vLLM {version}; its tests ran on vLLM {', '.join(vllm_plugin.TESTED)}" in told.text
    vllm.load(5, dora=True)
    o_proj_follows_the_formula(vllm, dora=True)


def test_nothing_is_left_of_the_proof(monkeypatch):
    vllm = Vllm(monkeypatch).load_model()
    assert vllm.manager.lora_index_to_id == [None] * 3
    assert not vllm.manager._registered_adapters
    for layer in vllm.manager.modules.values():
        assert all(bool((t == 0).all()) for t in (*layer.lora_a_stacked, *layer.lora_b_stacked))
        assert bool((layer.dora_scales == 1).all())


def twice(method):
    """A LoRA layer of another vLLM: B·A counts double."""

    def changed(self, x, output):
        return 2 * method(self, x, output) - output

    return changed


def halves_a_slot(method):
    def changed(self, index, a, b):
        method(self, index, a, [t if t is None or index != 2 else t / 2 for t in b])

    return changed


def by_another_name(method):
    def changed(self, x, output):
        raise AttributeError("'FusedLoRA' object has no attribute '_apply_lora_to_output'")

    return changed


@pytest.mark.parametrize(
    ("attribute", "change", "says"),
    [
        ("_apply_lora_to_output", twice, r"LoRA in slot|DoRA in slot"),
        ("set_lora", halves_a_slot, r"lora_B in slot 2 is off by 0.5 of what the formula gives"),
        ("_apply_lora_to_output", by_another_name, r"AttributeError: 'FusedLoRA' object has no attribute"),
    ],
)
def test_a_vllm_whose_lora_layer_is_another_is_refused(monkeypatch, told, attribute, change, says):
    def before(modules):
        base = modules["vllm.lora.layers"].RowParallelLinearWithLoRA.__mro__[1]
        setattr(base, attribute, change(getattr(base, attribute)))

    vllm = Vllm(monkeypatch, "0.99.1", before).load_model()
    assert told.text.count("could not prove itself here") == 1
    assert "This is Theodora" in told.text
    assert "in vLLM 0.99.1; its tests ran on vLLM" in told.text
    with pytest.raises(ValueError, match=r"(?s)could not prove that it serves DoRA right in this vLLM.*" + says):
        vllm.load(4, dora=True)
    if change is not by_another_name:  # LoRA is vLLM's own affair: taken, and run by its own forward pass
        vllm.load(5, dora=False)
        layer = vllm.manager.modules["layers.1.o_proj"]
        x = torch.randn(2, 6)
        assert torch.equal(vllm.output("layers.1.o_proj", x, [5, 0]), super(type(layer).__mro__[1], layer).apply(x))


def test_only_the_kind_that_is_wrong_is_refused(monkeypatch, told):
    def before(modules):
        row = modules["vllm.lora.layers"].RowParallelLinearWithLoRA
        row._apply_lora_to_output = twice(row._apply_lora_to_output)

    vllm = Vllm(monkeypatch, before=before).load_model()
    with pytest.raises(ValueError, match=r"layers.1.o_proj: the plug-in could not prove") as refused:
        vllm.load(4, dora=True)
    assert "q_proj" not in str(refused.value)


def test_without_a_proof_nothing_serves_dora(monkeypatch):
    """A vLLM that makes its layers elsewhere: whatever was not tried is refused."""
    vllm = Vllm(monkeypatch)
    monkeypatch.setattr("theodora.vllm_plugin.proof.prove", lambda *_: None)
    vllm.load_model()
    with pytest.raises(ValueError, match="it was not tried when the model was loaded"):
        vllm.load(4, dora=True)
    vllm.load(5, dora=False)
    o_proj_follows_the_formula(vllm, dora=False)


def test_where_a_place_is_missing_vllm_stays_as_it_is(monkeypatch, told):
    vllm = Vllm(monkeypatch, "0.99.1", lambda modules: delattr(modules["vllm.lora.utils"], "_all_lora_classes"))
    assert "does not fit this vLLM, which stays as it is and refuses DoRA adapters" in told.text
    assert "_all_lora_classes" in told.text
    helper = vllm.there["PEFTHelper"](r=2, lora_alpha=2, target_modules=[], use_dora=True)
    assert helper._validate_features()
