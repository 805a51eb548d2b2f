"""What is loaded is told, what is lost is refused, and copies of a model stay right whatever was done to it before."""

import copy
import io
import json
import logging
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from theodora import (
    AdapterConfig,
    CheckpointError,
    accelerate,
    adapter_disabled,
    combine_adapters,
    inject_adapter,
    load_adapter,
    merge_adapter,
    remove_adapter,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)
from theodora.adapters.load import load_report
from theodora.adapters.state import adapter_layers, find_state, trained_tensors
from tiny import tiny_model

IDS = torch.arange(3, 27).view(2, 12)


def moved(model=None, name="default", seed=1, **config):
    model = inject_adapter(model or tiny_model(), AdapterConfig(**{"rank": 2} | config), name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained_tensors(model, name).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model.eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def test_loading_says_what_was_loaded(tmp_path, caplog):
    save_adapter(moved(modules_to_save=("lm_head",), rank_pattern={"q_proj": 4}), tmp_path / "a")
    with caplog.at_level(logging.INFO, "theodora"):
        model = load_adapter(tiny_model(), tmp_path / "a", name="first")
    report = load_report(model, "first")
    assert (report.method, report.ranks, report.modules, report.magnitudes) == ("dora", (2, 4), 14, 14)
    assert report.full == ("lm_head.weight",)
    assert report.base_distance == 0
    assert report.parameters == sum(t.numel() for t in trained_tensors(model, "first").values())
    for text in (str(report), caplog.text):
        assert "DoRA of rank 2 and 4 on 14 modules, magnitudes on 14, 1 parameters trained in full" in text
    assert load_report(copy.deepcopy(model), "first") == report
    inject_adapter(model, AdapterConfig(), "second")
    assert load_report(model, "second") is None
    remove_adapter(model, "first")
    assert "first" not in find_state(model).loaded


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "up_proj"), r".*\.(q|k)_proj"])
def test_a_layer_that_the_file_lost_is_an_error(targets, tmp_path):
    save_adapter(moved(targets=targets), tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key: t for key, t in tensors.items() if "layers.1.self_attn.q_proj" not in key}, path)
    model = tiny_model()
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj: named by the targets"):
        load_adapter(model, tmp_path / "a")
    assert not adapter_layers(model)


@pytest.mark.parametrize(
    "fields", [{"layers_to_transform": [0]}, {"layers_to_transform": 0}, {"exclude_modules": r".*layers\.1\..*"}]
)
def test_layers_that_were_never_adapted_are_not_lost(fields, tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny_model()
    theirs = peft.get_peft_model(base, peft.LoraConfig(use_dora=True, target_modules=["q_proj", "v_proj"], **fields))
    theirs.save_pretrained(tmp_path / "a")
    assert load_report(load_adapter(tiny_model(), tmp_path / "a")).modules == 2


@pytest.mark.parametrize("layers", ["x", [0.5], {"a": 1}])
def test_layers_that_are_no_numbers(layers, tmp_path):
    save_adapter(moved(), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers_to_transform": layers}))
    with pytest.raises(CheckpointError, match="layers_to_transform"):
        load_adapter(tiny_model(), tmp_path / "a")


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("before", ["plain", "merged", "disabled", "kept", "fast", "combined"])
@pytest.mark.parametrize("tied", [False, True])
def test_copies_of_models_with_several_adapters(way, before, tied):
    model = moved(tiny_model(tied=tied), modules_to_save=("lm_head",))
    moved(model, "other", seed=2, method="lora", targets=("embed_tokens", "q_proj"), init="pissa")
    set_adapter(model, "default")
    if before == "kept":
        logits(model), logits(model, IDS[:, :1])
    elif before == "fast":
        accelerate(model)
    elif before == "merged":
        merge_adapter(model)
    elif before == "combined":
        combine_adapters(model, ["default", "other"], [0.5, 0.5], "both")
    elif before == "disabled":
        with adapter_disabled(model):
            logits(model)
    expected = logits(model)
    other = way(model)
    assert torch.equal(logits(other), expected)
    theirs = {id(t) for t in (*model.parameters(), *find_state(model).originals.values())}
    assert not theirs & {id(t) for t in (*other.parameters(), *find_state(other).originals.values())}
    if before == "merged":
        unmerge_adapter(other)
        unmerge_adapter(model)
    for name in find_state(model).configs:
        set_adapter(other, name), set_adapter(model, name)
        assert torch.equal(logits(other), logits(model))
        with torch.no_grad():  # what the copy keeps follows the copy's own tensors, and the model's stay
            for parameter in trained_tensors(other, name).values():
                parameter += 0.1
        changed = logits(other)
        assert not torch.allclose(changed, logits(model), atol=1e-2)
        fresh = copy.deepcopy(other)
        assert torch.equal(logits(fresh), changed)
    remove_adapter(other)
    base = tiny_model(tied=tied)
    assert torch.equal(logits(other), logits(base))
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied
    other.save_pretrained  # noqa: B018
    assert "save_pretrained" not in other.__dict__


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_state_dict_brings_everything_and_leaves_nothing_stale(assign, method):
    model = moved(method=method)
    moved(model, "other", seed=2)
    set_adapter(model, "default")
    expected = logits(model), logits(model, IDS[:, :1])
    state = {key: t.clone() for key, t in model.state_dict().items()}
    other = inject_adapter(tiny_model(seed=3), AdapterConfig(rank=2, method=method)).eval()
    inject_adapter(other, AdapterConfig(rank=2), "other")
    set_adapter(other, "default")
    logits(other), logits(other, IDS[:, :1])  # fills what is kept
    assert other.load_state_dict(state, assign=assign) == ([], [])
    assert torch.equal(logits(other, IDS[:, :1]), expected[1])
    assert torch.equal(logits(other), expected[0])
    with adapter_disabled(other):
        assert torch.equal(logits(other), logits(tiny_model()))
    set_adapter(other, "other"), set_adapter(model, "other")
    assert torch.equal(logits(other), logits(model))


def test_a_state_dict_without_magnitudes_is_noticed():
    model = moved()
    state = {key: t for key, t in model.state_dict().items() if "magnitude" not in key}
    with pytest.raises(RuntimeError, match="magnitude"):
        moved(seed=2).load_state_dict(state)
