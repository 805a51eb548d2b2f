"""Adapter files: what is wrong with one is said, and nothing is changed."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from theodora import AdapterConfig, CheckpointError, inject_adapter, load_adapter, save_adapter, set_adapter
from theodora.adapters.checkpoint import read_adapter
from theodora.adapters.inject import adapter_layers, trained_tensors
from theodora.adapters.save import load_weights
from tiny import tiny_model

CONFIG = AdapterConfig(rank=2, targets=("q_proj", "v_proj"))


@pytest.fixture
def folder(tmp_path):
    save_adapter(inject_adapter(tiny_model("llama"), CONFIG), tmp_path / "a")
    return tmp_path / "a"


def change(folder, edit):
    """Rewrite the tensors of a saved adapter."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def configure(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(folder, *words, model=None):
    model = model or tiny_model("llama")
    with pytest.raises(CheckpointError) as caught:
        load_adapter(model, folder)
    for word in words:
        assert word in str(caught.value)
    assert not adapter_layers(model)


def key(part, layer=0, module="q_proj"):
    return f"base_model.model.model.layers.{layer}.self_attn.{module}.{part}"


def test_missing_magnitudes(folder):
    change(folder, lambda t: [t.pop(k) for k in list(t) if "magnitude" in k])
    refused(folder, "magnitudes (lora_magnitude_vector) are missing", "q_proj", "v_proj")


def test_magnitudes_in_a_file_that_says_lora(folder):
    configure(folder, use_dora=False)
    refused(folder, "use_dora: false")


def test_several_misses_at_once(folder):
    def edit(tensors):
        tensors.pop(key("lora_A.weight"))
        tensors[key("lora_B.weight", 1)][0, 0] = float("nan")
        tensors[key("lora_magnitude_vector", 1, "v_proj")] = torch.ones(3)
        tensors["surprise"] = torch.ones(1)
        tensors[key("lora_B.bias")] = torch.ones(4)

    change(folder, edit)
    refused(folder, "lora_A missing", "NaN", "magnitudes (3,)", "surprise", "lora_B.bias: unknown key")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_no_finite_numbers(folder, dtype):
    change(folder, lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    change(folder, lambda t: t[key("lora_A.weight")].fill_(torch.finfo(dtype).max))
    load_adapter(tiny_model("llama"), folder)
    for value in (torch.nan, torch.inf, -torch.inf):
        change(folder, lambda t, value=value: t[key("lora_A.weight")][1].fill_(value))
        refused(folder, "q_proj.lora_A.weight: holds NaN or infinite values")


def test_rank_in_the_configuration_differs(folder):
    configure(folder, r=3)
    refused(folder, "rank 2", "says 3")


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed base"),
        ({"r": 10**9}, "rank"),
        ({"r": "many"}, "rank"),
        ({"rank_pattern": ["x"]}, "adapter_config.json"),
        ({"lora_alpha": None}, ""),
    ],
)
def test_configurations_that_mean_something_else(folder, fields, word):
    configure(folder, **fields)
    if fields.get("lora_alpha", 1) is None:
        load_adapter(tiny_model("llama"), folder)
    else:
        refused(folder, word)


@pytest.mark.parametrize("keep", [0, 7, 100, 1000])
def test_truncated_file(folder, keep):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "damaged or incomplete")


def test_broken_json(folder):
    (folder / "adapter_config.json").write_text('{"r": 8,')
    refused(folder, "adapter_config.json cannot be read")


def test_missing_files(tmp_path, folder):
    refused(tmp_path / "nowhere", "does not exist")
    refused(tmp_path, "no adapter folder", "found a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(folder, "pickle")


def test_other_shapes_and_names(folder):
    refused(folder, "made for a weight of (32, 32)", model=tiny_model("llama", hidden_size=48, head_dim=12))
    refused(folder, "no such module", model=tiny_model("gpt2"))


def test_other_weights_of_the_same_shape(folder):
    refused(folder, "another base model", model=tiny_model("llama", seed=1))


def test_another_dtype_is_the_same_base(folder):
    load_adapter(tiny_model("llama", dtype=torch.bfloat16), folder)


def test_slightly_other_weights_warn(folder):
    model = tiny_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
    with pytest.warns(UserWarning, match="base weights are .*% away"):
        load_adapter(model, folder)


def test_nan_is_never_saved(tmp_path):
    model = inject_adapter(tiny_model("llama"), CONFIG)
    save_adapter(model, tmp_path / "a")
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        next(iter(trained_tensors(model).values())).fill_(float("nan"))
    with pytest.raises(CheckpointError, match="NaN"):
        save_adapter(model, tmp_path / "a")
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_read_only_place(tmp_path, monkeypatch):
    import tempfile

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    model = inject_adapter(tiny_model("llama"), CONFIG)
    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_adapter(model, tmp_path / "b")


@pytest.mark.parametrize("init", ["default", "pissa", "olora"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_training_goes_on_from_a_file(init, method, tmp_path):
    """Saved and loaded trainable, an adapter has the same tensors and takes the same step."""
    ids = torch.arange(3, 19).view(2, 8)

    def step(model):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
        return float(loss.detach())

    config = AdapterConfig(method=method, rank=4, init=init)
    model = inject_adapter(tiny_model("llama"), config)
    step(model)
    save_adapter(model, tmp_path / "a")
    other = load_adapter(tiny_model("llama"), tmp_path / "a", trainable=True)
    fresh = inject_adapter(tiny_model("llama"), config)
    load_weights(fresh, tmp_path / "a") if init == "default" else None
    for name, tensor in trained_tensors(model).items():
        assert torch.equal(trained_tensors(other)[name], tensor), name
        assert trained_tensors(other)[name].requires_grad
    losses = [step(model), step(model)]
    assert [step(other), step(other)] == losses
    if init == "default":
        assert [step(fresh), step(fresh)] == losses


def test_load_weights_refuses_another_shape(folder):
    model = inject_adapter(tiny_model("llama"), AdapterConfig(rank=3, targets=("q_proj", "k_proj")))
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, folder)
    for word in ("v_proj: in the file", "k_proj: in the model", "q_proj.lora_A", "scale"):
        assert word in str(caught.value) or word == "scale"
    model = inject_adapter(tiny_model("llama"), replace(CONFIG, modules_to_save=("lm_head",)))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: trained in full here, not in the file"):
        load_weights(model, folder)


def test_save_pretrained_saves_every_adapter(tmp_path):
    model = inject_adapter(tiny_model("llama"), CONFIG, "main")
    inject_adapter(model, replace(CONFIG, method="lora", targets=("k_proj",)), "beside")
    set_adapter(model, "main")
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(str(tmp_path))
    assert read_adapter(tmp_path).modules.keys() == adapter_layers(model, "main").keys()
    assert read_adapter(tmp_path / "beside").modules.keys() == adapter_layers(model, "beside").keys()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["beside"]


def test_read_adapter_needs_no_model(folder):
    file = read_adapter(folder)
    assert file.config.method == "dora"
    assert len(file.modules) == 4
    assert all(t.scale == 2.0 and t.magnitude is not None for t in file.modules.values())


def test_loaded_for_inference_nothing_trains(folder):
    model = load_adapter(tiny_model("llama"), folder)
    assert not any(parameter.requires_grad for parameter in model.parameters())
