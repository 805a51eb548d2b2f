"""Adapter files: what is wrong with one is said, and nothing is changed."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from theodora import AdapterConfig, CheckpointError, inject_adapter, load_adapter, save_adapter, set_adapter
from theodora.adapters.check import load_weights
from theodora.adapters.load import load_report
from theodora.adapters.state import adapter_layers, trained_tensors
from theodora.errors import ConfigError
from theodora.files.adapter import read_adapter
from theodora.merging.checkpoint import merge_checkpoint
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
    return str(caught.value)


def key(part, layer=0, module="q_proj"):
    return f"base_model.model.model.layers.{layer}.self_attn.{module}.{part}"


def test_missing_magnitudes(folder):
    change(folder, lambda t: [t.pop(k) for k in list(t) if "magnitude" in k])
    refused(folder, "magnitudes (lora_magnitude_vector) are missing", "q_proj", "v_proj")


def test_a_file_of_no_tensors(folder):
    change(folder, lambda tensors: tensors.clear())
    refused(folder, "holds no adapter tensors")


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
    refused(
        folder, "lora_A missing", "NaN", "magnitudes (3,)", "expected (16,)", "surprise", "lora_B.bias: unknown key"
    )


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
        ({"bias": "some"}, "bias"),
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
    (folder / "adapter_model.bin").unlink()
    refused(folder, "not saved whole")


def test_fields_that_older_files_lack(folder):
    path = folder / "adapter_config.json"
    kept = ("peft_type", "r", "lora_alpha", "target_modules", "use_dora")
    expected = read_adapter(folder).config
    path.write_text(json.dumps({field: json.loads(path.read_text())[field] for field in kept}))
    assert read_adapter(folder).config == expected


def test_other_shapes_and_names(folder):
    refused(folder, "made for a weight of (32, 32)", model=tiny_model("llama", hidden_size=48, head_dim=12))
    assert "more" not in refused(folder, "no such module", model=tiny_model("gpt2"))


def test_a_target_that_was_trained_in_full_is_not_lost(tmp_path):
    save_adapter(inject_adapter(tiny_model("llama"), replace(CONFIG, modules_to_save=("lm_head",))), tmp_path / "a")
    configure(tmp_path / "a", target_modules=["q_proj", "v_proj", "lm_head"])
    assert load_report(load_adapter(tiny_model("llama"), tmp_path / "a")).full == ("lm_head.weight",)


def test_of_many_misses_the_first_are_shown(tmp_path):
    save_adapter(inject_adapter(tiny_model("llama"), AdapterConfig(rank=2)), tmp_path / "a")
    assert refused(tmp_path / "a", "and 2 more", model=tiny_model("gpt2")).count("no such module") == 12


def test_other_weights_of_the_same_shape(folder):
    configure(folder, base_model_name_or_path="some/base")
    refused(folder, "another base model (some/base)", model=tiny_model("llama", seed=1))


@pytest.mark.parametrize("ending", ["weight", "base_layer.weight"])
def test_base_weights_in_the_file_have_to_be_the_models(folder, ending):
    """As PEFT saves them of an embedding that it adapts."""
    weight = tiny_model("llama").get_parameter("model.layers.0.self_attn.q_proj.weight").detach()
    change(folder, lambda tensors: tensors.update({key(ending): weight.clone()}))
    load_adapter(tiny_model("llama"), folder)
    change(folder, lambda tensors: tensors.update({key(ending): 1.1 * weight}))
    refused(folder, "q_proj.weight: the file carries a changed base weight")


def test_a_base_of_zeros_is_itself(tmp_path):
    bases = [tiny_model("llama"), tiny_model("llama")]
    with torch.no_grad():
        for parameter in (*bases[0].parameters(), *bases[1].parameters()):
            parameter.zero_()
    save_adapter(inject_adapter(bases[0], replace(CONFIG, method="lora")), tmp_path / "a")
    assert load_report(load_adapter(bases[1], tmp_path / "a")).base_distance == 0


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


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["default", "pissa", "olora"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_training_goes_on_from_a_file(init, method, rslora, tmp_path):
    """Saved and loaded trainable, an adapter has the same tensors and takes the same step; so does its file."""
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

    config = AdapterConfig(method=method, rank=4, init=init, rslora=rslora)
    model = inject_adapter(tiny_model("llama"), config)
    step(model)
    save_adapter(model, tmp_path / "a")
    other = load_adapter(tiny_model("llama"), tmp_path / "a", trainable=True)
    save_adapter(other, tmp_path / "b")
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in "ab"]
    assert configs[1] == configs[0] | {"lora_alpha": pytest.approx(configs[0]["lora_alpha"])}
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
    model = inject_adapter(tiny_model("llama"), AdapterConfig(rank=3, alpha=9, targets=("q_proj", "k_proj")))
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, folder)
    for word in ("v_proj: in the file", "k_proj: in the model", "q_proj.lora_A", "q_proj: scale 2 in the file, 3 in"):
        assert word in str(caught.value)
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


def test_gathered_tensors_are_of_the_adapter_that_is_saved(tmp_path):
    """Of one that is not active, what it trained in full stands beside the model's parameters."""
    model = inject_adapter(tiny_model("llama"), replace(CONFIG, modules_to_save=("lm_head",)), "away")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    inject_adapter(model, CONFIG, "here")
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_adapter(model, tmp_path / "a", "away", state_dict=gathered)
    assert torch.equal(read_adapter(tmp_path / "a").full["lm_head.weight"], 2 * model.lm_head.weight)


def test_read_adapter_needs_no_model(folder):
    file = read_adapter(folder)
    assert file.config.method == "dora"
    assert len(file.modules) == 4
    assert all(t.scale == 2.0 and t.magnitude is not None for t in file.modules.values())


def test_loaded_for_inference_nothing_trains(folder):
    model = load_adapter(tiny_model("llama"), folder)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def tensors_of(folder, edit):
    """Rewrite the tensors and keep the header."""
    from safetensors import safe_open

    path = folder / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    edit(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t, m: t.update({key("lora_A.weight"): torch.ones(2, 32, dtype=torch.int8)}), ("torch.int8", "dtype")),
        (lambda t, m: t.update({key("lora_A.weight"): torch.ones(2, 32, 1)}), ("expected (rank, in) and (out, rank)",)),
        (lambda t, m: t.update({key("lora_embedding_A"): torch.ones(2, 32)}), ("holds this twice",)),
        (lambda t, m: t.clear(), ("holds no adapter tensors",)),
        (lambda t, m: m.update(theodora="[]"), ("metadata is no object",)),
        (lambda t, m: m.update(theodora='{"probe": {"a": ["x"]}}'), ("no probe of a base model",)),
        (lambda t, m: m.update(theodora='{"starts": 3}'), ("whether there are start factors",)),
    ],
    ids=["dtype", "shape", "twice", "nothing", "metadata", "probe", "starts"],
)
def test_what_a_file_of_tensors_must_not_hold(folder, spoil, words):
    tensors_of(folder, spoil)
    refused(folder, *words)


def test_half_of_an_odd_rank_is_no_start(tmp_path):
    config = replace(CONFIG, init="pissa")
    save_adapter(inject_adapter(tiny_model("llama"), config), tmp_path / "a")
    configure(tmp_path / "a", r=5)
    refused(tmp_path / "a", "says an odd rank, but half of it is to be the start")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"base_model_name_or_path": 3}, ("base_model_name_or_path is 3; expected a folder or hub name",)),
        ({"use_dora": "yes"}, ("use_dora is 'yes'; expected true or false",)),
        ({"modules_to_save": ["lm_head"]}, ("modules_to_save names 'lm_head', but the file holds no such tensor",)),
    ],
)
def test_fields_that_say_something_else_than_they_should(folder, fields, words):
    configure(folder, **fields)
    refused(folder, *words)


def test_a_file_where_a_configuration_should_be(folder):
    (folder / "adapter_config.json").write_text("[1]")
    refused(folder, "holds list; expected an object")


def test_folders_that_hold_no_adapter(tmp_path, folder):
    (tmp_path / "file").touch()
    for path, words in (
        (
            tmp_path / "file",
            "is no adapter folder: expected adapter_config.json and adapter_model.safetensors, found a",
        ),
        (tmp_path / "nowhere", "does not exist; expected a folder with adapter_config.json"),
        ("somebody/some-adapter", "is neither a folder here nor an adapter on the hub"),
        ("~nobody-of-that-name/a", "is no folder"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(words)):
            read_adapter(path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="a pickle file, which can run code when read"):
        read_adapter(folder)


def test_an_adapter_of_another_kind_of_module(tmp_path):
    save_adapter(inject_adapter(tiny_model("llama"), replace(CONFIG, targets=("embed_tokens",))), tmp_path / "rows")
    other = tiny_model("llama")
    other.model.embed_tokens = torch.nn.Linear(32, 272)
    refused(tmp_path / "rows", "the file and the model disagree whether this is an embedding", model=other)
    other.model.embed_tokens = torch.nn.Embedding(272, 32, max_norm=1.0)
    refused(tmp_path / "rows", "rescales its weight while it is used", model=other)


def test_modules_trained_in_full_must_be_there_and_fit(tmp_path):
    config = replace(CONFIG, modules_to_save=("lm_head",))
    save_adapter(inject_adapter(tiny_model("llama"), config), tmp_path / "full")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: \(272, 32\) in the file, \(300, 32\) in the model"):
        load_adapter(tiny_model("llama", vocab_size=300), tmp_path / "full")
    model = tiny_model("llama")
    model.head = model.lm_head
    del model.lm_head
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: no such parameter"):
        load_adapter(model, tmp_path / "full")


def test_weights_of_another_adapter_do_not_fit(folder, tmp_path):
    model = inject_adapter(tiny_model("llama"), replace(CONFIG, alpha=3.0, modules_to_save=("lm_head",)))
    before = {name: t.clone() for name, t in trained_tensors(model).items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, folder)
    assert "q_proj: scale 2 in the file, 1.5 in the model" in str(caught.value)
    assert "lm_head.weight: trained in full here, not in the file" in str(caught.value)
    assert all(torch.equal(t, before[name]) for name, t in trained_tensors(model).items())


def test_which_adapter_must_be_said_where_there_are_several(folder, tmp_path):
    model = load_adapter(load_adapter(tiny_model("llama"), folder, "one"), folder, "two")
    set_adapter(model, None)
    with pytest.raises(ConfigError, match="Which adapter\\? The model carries one, two, and none is active"):
        save_adapter(model, tmp_path / "out")
    with pytest.raises(ConfigError, match="There is no adapter 'three'; the model carries one, two"):
        set_adapter(model, "three")


@pytest.mark.parametrize("lost", ["0.self_attn.k_proj.bias", "1.self_attn.k_proj.weight", "0.self_attn.k_proj"])
def test_a_module_trained_in_full_has_to_be_whole(lost, tmp_path, tiny_model_dir):
    model = tiny_model("qwen2")
    save_adapter(inject_adapter(model, replace(CONFIG, modules_to_save=("k_proj",))), tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    kept = {key: tensor for key, tensor in tensors.items() if lost not in key}
    assert len(kept) < len(tensors)
    save_file(kept, file)
    says = rf"layers\.{lost}\S*: its module was trained in full, but the file holds nothing for it"
    with pytest.raises(CheckpointError, match=says):
        load_adapter(tiny_model("qwen2"), tmp_path / "a")
    with pytest.raises(CheckpointError, match=says):
        merge_checkpoint(tmp_path / "a", tmp_path / "m", base_model=str(tiny_model_dir("qwen2")))
