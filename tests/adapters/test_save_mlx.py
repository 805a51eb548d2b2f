"""MLX's files: what mlx-lm would compute from them is what the adapter does, and they come back the same."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from steps import displaced
from theodora import AdapterConfig, CheckpointError, ConfigError, inject_adapter, load_adapter, save_adapter, save_mlx
from theodora.adapters.state import adapter_layers, find_state, trained_tensors
from theodora.files.adapter import read_adapter
from theodora.files.mlx import from_mlx_name, to_mlx_name
from theodora.files.peft_config import read_peft_config
from tiny import FAMILIES, tiny_model

IDS = torch.arange(3, 27).view(2, 12)


moved = partial(displaced, rank=4)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def as_mlx(folder, model):
    """Each adapted weight as mlx-lm's layers compute it, in float64, beside ours."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale, keys = config["lora_parameters"]["scale"], config["lora_parameters"]["keys"]
    tensors = {key: t.double() for key, t in load_file(folder / "adapters.safetensors").items()}
    for path, layer in adapter_layers(model).items():
        name = to_mlx_name(path)
        assert any(name == key or name.endswith("." + key) for key in keys)
        a, b = tensors.pop(f"{name}.lora_a"), tensors.pop(f"{name}.lora_b")
        assert a.shape[1] == b.shape[0] == config["lora_parameters"]["rank"]
        adapted = layer.base_weight.dense().double() + (scale * b.T) @ a.T
        if config["fine_tune_type"] == "dora":
            adapted = (tensors.pop(f"{name}.m") / adapted.norm(dim=1))[:, None] * adapted
        yield adapted, layer.merged_weight("default").double()
    assert not tensors


def test_the_base_model_is_named(tmp_path):
    model = moved()
    model.config._name_or_path = "some/base"
    save_mlx(model, tmp_path / "m")
    assert read_peft_config(tmp_path / "m")["base_model_name_or_path"] == "some/base"
    assert read_adapter(tmp_path / "m").base_model == "some/base"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_there_and_back(family, method, tmp_path):
    model = moved(family, method=method)
    save_mlx(model, tmp_path / "m")
    for found, expected in as_mlx(tmp_path / "m", model):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits(load_adapter(tiny_model(family), tmp_path / "m").eval()), logits(model))


@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"rslora": True, "rank_pattern": {"up_proj": 7}},
        {"init": "pissa"},
        {"targets": ("q_proj", "lm_head")},
        {"targets": ("q_proj", "embed_tokens"), "method": "lora"},
    ],
)
def test_ranks_and_scales_become_one(config, tmp_path):
    model = moved(**config)
    save_mlx(model, tmp_path / "m")
    for found, expected in as_mlx(tmp_path / "m", model):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    loaded = load_adapter(tiny_model(), tmp_path / "m").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    save_mlx(loaded, tmp_path / "m")  # over the old one
    again = load_adapter(tiny_model(), tmp_path / "m").eval()
    assert torch.equal(logits(again), logits(loaded))


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"targets": ("embed_tokens",)}, "each token of an embedding"),
        ({"targets": ("embed_tokens",), "method": "lora", "tied": True}, "output head with it"),
        ({"targets": ("lm_head",), "tied": True}, "no such layer"),
        ({"modules_to_save": ("lm_head",)}, "trained in full"),
    ],
)
def test_what_mlx_cannot_say_is_refused(config, word, tmp_path):
    model = moved(**config)
    with pytest.raises(ConfigError, match=word):
        save_mlx(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_row_of_zeros_is_refused(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.q_proj").weight[3] = 0
    inject_adapter(model, AdapterConfig(rank=2))
    with pytest.raises(ConfigError, match="all zeros"):
        save_mlx(model, tmp_path / "m")


def test_pefts_files_are_not_overwritten(tmp_path):
    model = moved()
    save_adapter(model, tmp_path / "a")
    with pytest.raises(ConfigError, match="PEFT's files"):
        save_mlx(model, tmp_path / "a")


def test_nan_is_never_saved(tmp_path):
    model = moved()
    with torch.no_grad():
        next(iter(trained_tensors(model).values())).fill_(float("nan"))
    with pytest.raises(CheckpointError, match="NaN"):
        save_mlx(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.fixture
def folder(tmp_path):
    save_mlx(moved(targets=("q_proj", "v_proj")), tmp_path / "m")
    return tmp_path / "m"


def configure(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(folder, *words):
    model = tiny_model()
    with pytest.raises(CheckpointError) as caught:
        load_adapter(model, folder)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not adapter_layers(model)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"fine_tune_type": "full"}, ["'full'"]),
        ({"fine_tune_type": "lora"}, ["holds magnitudes"]),
        ({"lora_parameters": None}, ["rank is None", "scale is None"]),
        ({"lora_parameters": {"rank": 4, "scale": -1}}, ["scale is -1"]),
        ({"lora_parameters": {"rank": True, "scale": "2"}}, ["rank is True", "scale is '2'"]),
        ({"lora_parameters": {"rank": 3, "scale": 2.0}}, ["rank 4", "says 3"]),
    ],
)
def test_configurations_that_make_no_sense(folder, fields, words):
    configure(folder, **fields)
    refused(folder, *words)


def test_tensors_that_make_no_sense(folder):
    path = folder / "adapters.safetensors"
    whole = load_file(path)
    at = "model.layers.0.self_attn.q_proj."
    for edit, words in (
        ({at + "m": None}, ["magnitudes"]),
        ({at + "lora_a": None}, ["lora_A missing"]),
        ({at + "weight": torch.zeros(2, 2)}, ["unknown key"]),
        ({at + "lora_a": torch.zeros(2, 4, 32)}, ["experts"]),
        ({at + "lora_b": torch.full((4, 32), torch.inf)}, ["NaN or infinite"]),
        ({"model.layers.9.self_attn.q_proj.m": torch.zeros(32)}, ["lora_A and lora_B missing"]),
    ):
        save_file({key: t for key, t in (whole | edit).items() if t is not None}, path)
        refused(folder, *words)


def test_an_embedding_that_mlx_adapts_with_its_head(tmp_path):
    save_mlx(moved(targets=("embed_tokens",), method="lora"), tmp_path / "m")
    with pytest.raises(CheckpointError, match="output head"):
        load_adapter(tiny_model(tied=True), tmp_path / "m")


@pytest.mark.parametrize(
    "path",
    [
        "transformer.h.11.attn.c_attn",
        "transformer.wte",
        "gpt_neox.layers.3.mlp.dense_h_to_4h",
        "gpt_neox.embed_in",
        "model.layers.0.self_attn.q_proj",
        "lm_head",
    ],
)
def test_names(path):
    assert from_mlx_name(to_mlx_name(path)) == path
    assert to_mlx_name(path).startswith("model.") or path == "lm_head"


def test_keys_are_the_names_that_mlx_looks_for(tmp_path):
    save_mlx(moved("gpt2", targets=("c_attn",)), tmp_path / "gpt2")
    save_mlx(moved(targets=("q_proj", "down_proj", "lm_head")), tmp_path / "llama")
    found = [
        json.loads((tmp_path / n / "adapter_config.json").read_text())["lora_parameters"] for n in ("gpt2", "llama")
    ]
    assert [one["keys"] for one in found] == [["attn.c_attn"], ["lm_head", "mlp.down_proj", "self_attn.q_proj"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_dropout_targets_and_dtype_come_back(dtype, tmp_path):
    model = moved(dtype=dtype, rank=1, dropout=0.25, targets=("q_proj",), adapter_dtype="base")
    save_mlx(model, tmp_path / "m")
    assert {t.dtype for t in load_file(tmp_path / "m" / "adapters.safetensors").values()} == {dtype}
    loaded = load_adapter(tiny_model(dtype=dtype), tmp_path / "m").eval()
    config = find_state(loaded).configs["default"]
    assert (config.method, config.rank, config.dropout) == ("dora", 1, 0.25)
    assert set(config.targets) == set(adapter_layers(model))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)  # loaded as float32
