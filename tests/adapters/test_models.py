"""Loading a model and its tokenizer by what the user names: a model's folder, an adapter's, or neither."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors.torch import load_file, save_file

import tiny
from theodora import AdapterConfig, CheckpointError, ConfigError, inject_adapter, save_adapter
from theodora.adapters.models import load_model, load_model_and_tokenizer
from theodora.adapters.state import adapter_layers, trained_tensors
from theodora.files.model_folder import check_model_folder
from theodora.paths import layer_index, layer_kinds

IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture
def base(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir(), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base, tmp_path):
    """A saved adapter, and the logits of the model with it."""
    model = load_model(base)
    model.name_or_path = str(base)
    inject_adapter(model, AdapterConfig(rank=2)).eval()
    with torch.no_grad():
        for parameter in trained_tensors(model).values():
            parameter += 0.1 * torch.randn_like(parameter)
        save_adapter(model, tmp_path / "adapter")
        return tmp_path / "adapter", model(IDS).logits


def logits(model):
    assert not model.training
    with torch.no_grad():
        return model(IDS).logits


def test_a_model_an_adapter_and_both(base, adapter):
    folder, adapted = adapter
    plain, tokenizer = load_model_and_tokenizer(base, device="cpu")
    assert not adapter_layers(plain)
    assert tokenizer.pad_token is not None
    assert not torch.equal(logits(plain), adapted)
    for model, beside in ((folder, None), (base, folder)):
        model, _ = load_model_and_tokenizer(model, adapter=beside, device="cpu")
        assert torch.equal(logits(model), adapted)
    assert load_model_and_tokenizer(base, device="meta")[0].device.type == "meta"
    with pytest.raises(ConfigError, match=r"is an adapter, and adapter=.* is another"):
        load_model_and_tokenizer(folder, adapter=folder)


def test_an_adapters_own_tokenizer_goes_before_the_models(base, adapter):
    own = tiny.tiny_tokenizer()
    own.add_tokens(["<|new|>"])
    own.save_pretrained(adapter[0])
    assert "<|new|>" in load_model_and_tokenizer(adapter[0])[1].get_vocab()
    assert "<|new|>" in load_model_and_tokenizer(base, adapter=adapter[0])[1].get_vocab()
    assert "<|new|>" not in load_model_and_tokenizer(base)[1].get_vocab()


def test_revisions_in_the_hubs_cache(base, tiny_model_dir):
    cache = Path(HF_HUB_CACHE) / "models--theodora--two"
    for branch, commit, folder in (("main", "a" * 40, base), ("other", "b" * 40, tiny_model_dir(seed=1))):
        shutil.copytree(folder, cache / "snapshots" / commit, dirs_exist_ok=True)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / branch).write_text(commit)
    tiny.tiny_tokenizer().save_pretrained(cache / "snapshots" / ("b" * 40))
    for revision, seed in ((None, 0), ("other", 1)):
        model, _ = load_model_and_tokenizer("theodora/two", revision=revision, device="cpu")
        assert torch.equal(logits(model), logits(tiny.tiny_model(seed=seed)))
    with pytest.raises(CheckpointError, match="No tokenizer loads from theodora/two"):
        load_model_and_tokenizer("theodora/two", revision="third")


def test_a_tokenizer_without_padding_pads_with_its_end(base):
    own = tiny.tiny_tokenizer()
    own.pad_token = None
    own.save_pretrained(base)
    tokenizer = load_model_and_tokenizer(base)[1]
    assert tokenizer.pad_token == tokenizer.eos_token


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("auto", torch.float32), ("bf16", torch.bfloat16), ("float16", torch.float16), ("fp32", torch.float32)],
)
def test_dtypes(base, name, dtype):
    assert load_model(base, dtype=name).dtype == dtype


def test_what_does_not_load_is_said(base, adapter, tmp_path):
    with pytest.raises(ConfigError, match=r"dtype is 'int8'; expected one of auto, .*bf16"):
        load_model(base, dtype="int8")
    for path in (tmp_path / "nowhere", "./nowhere", "a/b/c"):
        with pytest.raises(CheckpointError, match="there is no such folder"):
            check_model_folder(path)
    check_model_folder("owner/name")  # may be on the hub
    with pytest.raises(CheckpointError, match=f"holds an adapter, not a model; its base model is {base}"):
        load_model(adapter[0])
    edited = json.loads((adapter[0] / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (adapter[0] / "adapter_config.json").write_text(json.dumps(edited))
    with pytest.raises(CheckpointError, match="names no base model"):
        load_model_and_tokenizer(adapter[0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        load_model(tmp_path / "empty")


@pytest.mark.parametrize("count", [1, 5, 6])
def test_missing_tensors_are_never_made_up(base, count):
    weights = load_file(base / "model.safetensors")
    lost = sorted(key for key in weights if "layers" in key)[:count]
    save_file({key: t for key, t in weights.items() if key not in lost}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks {count} tensors of a LlamaForCausalLM: {lost[0]}") as caught:
        load_model(base)
    assert str(caught.value).endswith(", …") == (count > 5)


def test_damaged_folders(base, tmp_path):
    config = (base / "config.json").read_text()
    (base / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        load_model(base)
    (base / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="does not load as a causal language model"):
        load_model(base)
    (base / "config.json").write_text(json.dumps(json.loads(config) | {"num_hidden_layers": 10**9}))
    with pytest.raises(CheckpointError, match="1000000000"):
        load_model(base)
    (base / "config.json").write_text(json.dumps(json.loads(config) | {"model_type": "nothing"}))
    with pytest.raises(CheckpointError, match=r"does not load as a causal language model: .*nothing"):
        load_model(base)
    (base / "config.json").write_text(config)
    for file in (*base.glob("tokenizer*"), *base.glob("special*")):
        file.write_text("[")
    with pytest.raises(CheckpointError, match="No tokenizer loads from"):
        load_model_and_tokenizer(base)
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        load_model(base)


def test_kinds_and_blocks():
    paths = ["h.0.attn.c_proj", "h.11.attn.c_proj", "h.0.mlp.c_proj", "layers.0.mlp.up_proj", "wte", "0.q_proj"]
    kinds = ["attn.c_proj", "attn.c_proj", "mlp.c_proj", "up_proj", "wte", "q_proj"]
    assert layer_kinds(paths) == dict(zip(paths, kinds, strict=True))
    assert [layer_index(path) for path in paths] == [0, 11, 0, 0, None, 0]
    assert layer_index("blocks.3") == 3
    assert layer_index("conv2d.w1") is None


@pytest.mark.parametrize("base", ["/another/machine/base", "../elsewhere/base", "runs/base"])
def test_a_base_on_another_machine_is_told_with_its_adapter(base, tmp_path):
    model = inject_adapter(tiny.tiny_model("llama"), AdapterConfig(rank=2))
    model.config._name_or_path = base
    save_adapter(model, tmp_path / "a")
    with pytest.raises(CheckpointError, match=rf"adapter in {tmp_path}/a names {base} as its base(.|\n)*--model BASE"):
        load_model_and_tokenizer(tmp_path / "a")


def test_scores_that_a_model_caps_are_capped(tmp_path):
    capped = tiny.tiny_model("gemma2", attn_logit_softcapping=0.5, attn_implementation="eager")
    capped.save_pretrained(tmp_path / "capped")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "capped")
    assert torch.equal(logits(load_model(tmp_path / "capped").eval()), logits(capped))
    uncapped = tiny.tiny_model("gemma2", attn_logit_softcapping=None)
    assert not torch.allclose(logits(capped), logits(uncapped), atol=1e-2)
