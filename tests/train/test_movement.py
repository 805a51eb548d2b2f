"""Every trained tensor must move; in particular an adapted output head, which TRL's loss would pass by."""

import sys

import pytest
import torch
from torch import nn

from theodora.errors import TheodoraError
from theodora.train.movement import check_moved, fingerprints
from theodora.train.trainer import AdapterTrainer


def tensors(*names):
    return {name: nn.Parameter(torch.randn(3, 2)) for name in names}


def test_an_adapted_head_trains(run):
    result = run(targets=["q_proj", "lm_head"])
    head = result.model.lm_head.adapters["default"]
    assert head.lora_B.abs().max() > 0
    assert not torch.equal(head.magnitude, result.model.lm_head.weight.norm(dim=1))


def test_a_head_that_the_loss_passes_by_is_an_error(run, monkeypatch):
    class Careless(AdapterTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.chooses_positions = lambda labels: False
            for hook in list(self.model._forward_pre_hooks):
                del self.model._forward_pre_hooks[hook]

    monkeypatch.setattr(sys.modules["theodora.train.build"], "AdapterTrainer", Careless)
    with pytest.raises(TheodoraError, match=r"left these tensors frozen(.|\n)*lm_head.lora_B"):
        run(targets=["q_proj", "lm_head"])


def test_a_single_resting_tensor_is_told_and_a_whole_kind_is_refused():
    trained = tensors("h.0.mlp.lora_B", "h.1.mlp.lora_B", "h.0.mlp.magnitude")
    before = fingerprints(trained)
    with torch.no_grad():
        trained["h.0.mlp.lora_B"][0, 0] += 1e-6
        trained["h.0.mlp.magnitude"] += 1
    assert check_moved(trained, before, updates=5)[1] == ["h.1.mlp.lora_B"]
    with pytest.raises(TheodoraError, match=r"mlp.magnitude"):
        check_moved(trained, before | fingerprints({"h.0.mlp.magnitude": trained["h.0.mlp.magnitude"]}), updates=5)


def test_a_has_no_gradient_before_b_has_moved():
    trained = tensors("q.lora_A", "q.lora_B")
    before = fingerprints(trained)
    with torch.no_grad():
        trained["q.lora_B"] += 1
    assert check_moved(trained, before, updates=1)[1] == []
    with pytest.raises(TheodoraError, match=r"q.lora_A"):
        check_moved(trained, before, updates=2)


def test_nothing_is_due_without_an_update():
    trained = tensors("q.lora_A", "q.lora_B")
    assert check_moved(trained, fingerprints(trained), updates=0)[1] == []


def test_values_that_are_not_finite_are_an_error():
    trained = tensors("q.lora_B")
    with torch.no_grad():
        trained["q.lora_B"][1, 1] = torch.nan
    with pytest.raises(TheodoraError, match=r"q.lora_B"):
        check_moved(trained, fingerprints(trained), updates=3)


def test_magnitudes_do_not_decay(run):
    still = run(learning_rate=1e-6, weight_decay=1e5, targets=["q_proj"])
    layer = still.model.model.layers[0].self_attn.q_proj
    torch.testing.assert_close(layer.adapters["default"].magnitude, layer.weight.norm(dim=1), rtol=1e-3, atol=0)


def test_fingerprints_tell_of_every_bit():
    tensors = {"a": torch.zeros(3), "b": torch.ones(2, 2, dtype=torch.bfloat16), "c": torch.zeros(3)}
    before = fingerprints(tensors)
    assert before == {name: int(torch.hash_tensor(tensor)) for name, tensor in tensors.items()}
    tensors["c"][1] = -0.0
    assert [name for name, value in fingerprints(tensors).items() if value != before[name]] == ["c"]
    assert fingerprints({}) == {}
