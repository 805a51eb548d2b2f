"""DoRA as plain LoRA: the best of its rank, with the true error, on a model and on disk."""

import json
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

import formula
from steps import displaced
from theodora import (
    AdapterConfig,
    CheckpointError,
    ConfigError,
    TheodoraError,
    inject_adapter,
    load_adapter,
    save_adapter,
    save_mlx,
    to_lora,
)
from theodora.adapters.state import adapter_layers, find_state
from theodora.files.adapter import read_adapter
from theodora.merging.to_lora import folder_to_lora
from tiny import FAMILIES, tiny_model

IDS = torch.arange(3, 27).view(2, 12)
INPUT = {"gpt2": "wte", "gpt_neox": "embed_in"}


moved = partial(displaced, rank=3)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def change(layer, name):
    adapter, w = layer.adapters[name], layer.base_weight.dense().double()
    a, b = (t.detach().double() for t in adapter.factors())
    eye = torch.eye(w.shape[1], dtype=torch.float64)
    if adapter.magnitude is None:
        return formula.lora(eye, w, None, a, b, adapter.scale).T - w
    return formula.dora(eye, w, None, a, b, adapter.scale, adapter.magnitude.detach().double()).T - w


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [1, 8, None])
def test_the_best_of_its_rank(family, rank):
    model = moved(
        family, targets=r".*(proj|c_\w+|dense\w*|fc\d|query_key_value|" + INPUT.get(family, "embed_tokens") + ")"
    )
    expected = logits(model)
    report = to_lora(model, "default", rank, "plain")
    assert find_state(model).active == "plain"
    assert report.method == find_state(model).configs["plain"].method == "lora"
    for path, layer in adapter_layers(model, "plain").items():
        adapter, exact = layer.adapters["plain"], change(layer, "default")
        assert adapter.magnitude is None
        assert adapter.rank == report.ranks[path] == min(rank or 10**6, *exact.shape)
        left = torch.linalg.svdvals(exact)[adapter.rank :].norm() / exact.norm()
        assert report.errors[path] == pytest.approx(float(left), abs=1e-6)
        assert formula.error(change(layer, "plain"), exact) == pytest.approx(float(left), abs=1e-6)
    if rank is None:
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
        assert report.worst < 1e-6


@pytest.mark.parametrize("config", [{}, {"init": "pissa"}, {"rslora": True, "rank_pattern": {"q_proj": 2}}])
def test_lora_that_fits_stays_as_it_is(config):
    model = moved(method="lora", **config)
    expected = logits(model)
    report = to_lora(model, None, 12, "plain")
    assert max(report.ranks.values()) == (6 if "init" in config else 3)
    assert report.worst < 1e-6
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert to_lora(model, "default", 1, "less").worst > 0.01


def test_which_of_several_and_none():
    model = moved()
    inject_adapter(model, AdapterConfig(rank=2, targets=("q_proj",)), "second")
    assert len(to_lora(model, "second", None, into="plain").ranks) == 2
    with pytest.raises(ConfigError, match="There is no adapter 'third'"):
        to_lora(model, "third", None, into="another")


def test_modules_trained_in_full_come_along():
    model = moved(modules_to_save=("lm_head",))
    expected = logits(model)
    to_lora(model, "default", None, "plain")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    full = find_state(model).full
    assert full["plain"]["lm_head.weight"] is not full["default"]["lm_head.weight"]


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "8"])
def test_no_rank(rank, tmp_path):
    with pytest.raises(ConfigError, match="rank is"):
        to_lora(moved(), None, rank, "plain")
    with pytest.raises(ConfigError, match="rank is"):
        folder_to_lora(tmp_path, tmp_path / "x", rank)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("rank", [8, None])
@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_is_converted_as_the_model_is(family, rank, tied, tiny_model_dir, tmp_path):
    model = moved(family, tied, targets=".*(q_proj|c_attn|dense|" + INPUT.get(family, "embed_tokens") + ")")
    save_adapter(model, tmp_path / "a")
    on_disk = folder_to_lora(tmp_path / "a", tmp_path / "out", rank, base_model=tiny_model_dir(family, tied=tied))
    in_memory = to_lora(model, None, rank, "plain")
    assert on_disk.ranks == in_memory.ranks
    assert on_disk.errors == pytest.approx(in_memory.errors, abs=1e-6)
    loaded = load_adapter(tiny_model(family, tied=tied), tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)
    assert read_adapter(tmp_path / "out").fingerprint == read_adapter(tmp_path / "a").fingerprint


def test_a_converted_folder_is_pefts(tiny_model_dir, tmp_path):
    peft = pytest.importorskip("peft")
    model = moved(modules_to_save=("lm_head",))
    save_adapter(model, tmp_path / "a")
    folder_to_lora(tmp_path / "a", tmp_path / "out", None, base_model=tiny_model_dir())
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir())
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-4)


def test_an_mlx_folder(tiny_model_dir, tmp_path):
    model = moved()
    save_mlx(model, tmp_path / "m")
    folder_to_lora(tmp_path / "m", tmp_path / "out", None, base_model=tiny_model_dir())
    loaded = load_adapter(tiny_model(), tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)


def test_what_cannot_be_converted_leaves_nothing(tiny_model_dir, tmp_path):
    save_adapter(moved(), tmp_path / "a")
    with pytest.raises(CheckpointError):
        folder_to_lora(tmp_path / "a", tmp_path / "out", 4, base_model=tiny_model_dir("gpt2"))
    with pytest.raises(CheckpointError, match="another base model"):
        folder_to_lora(tmp_path / "a", tmp_path / "out", 4, base_model=tiny_model_dir(seed=5))
    assert not (tmp_path / "out").exists()
    with pytest.raises(TheodoraError, match="already exists"):
        folder_to_lora(tmp_path / "a", tmp_path / "a", 4, base_model=tiny_model_dir())
