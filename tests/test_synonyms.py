"""An adapter made on the text-only or the full class of the same weights, or by another program, fits the other."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3ForConditionalGeneration, Qwen3_5ForConditionalGeneration

import tiny
import tiny_families
from theodora import AdapterConfig, inject_adapter, load_adapter, merge_checkpoint, remove_adapter, save_adapter
from theodora.adapters.check import load_weights
from theodora.adapters.models import load_model, load_model_and_tokenizer
from theodora.adapters.renamed import in_names_of
from theodora.adapters.save_mlx import save_mlx
from theodora.adapters.swap_weights import swap_adapter_weights
from theodora.errors import CheckpointError
from theodora.files.adapter import read_adapter
from theodora.files.mlx import to_mlx_name
from theodora.synonyms import Names, bare_name, cache_argument, of_another_part

IDS = (torch.arange(20) * 7 % 250 + 4)[None]
WRITTEN = {  # what comes before layers.0…, by who wrote the file
    "text-only": "model.",
    "full": "model.language_model.",
    "mlx-lm, vLLM and transformers before 4.52": "language_model.model.",
    "without a head": "",
    "full without a head": "language_model.",
    "wrapped by FSDP and torch.compile": "_orig_mod.model._fsdp_wrapped_module.",
}


def full_model(family):
    kinds = {"gemma3": Gemma3ForConditionalGeneration, "qwen3_5": Qwen3_5ForConditionalGeneration}
    return tiny_families.tiny_family(family, kinds[family])


def text_only(full):
    """The language model of a full class, with its very values."""
    model = AutoModelForCausalLM.from_config(full.config.text_config).eval()
    model.model.load_state_dict(full.model.language_model.state_dict())
    model.lm_head.load_state_dict(full.lm_head.state_dict())
    return model


@pytest.fixture(params=["gemma3", "qwen3_5"])
def pair(request):
    """The text-only and the full model, without adapters."""
    full = full_model(request.param)
    return text_only(full), full


def trained(model, **config):
    torch.manual_seed(0)
    inject_adapter(model, AdapterConfig(**{"method": "dora", "rank": 4, **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def renamed_copy(folder, source, name):
    """The adapter in `source` as a program writes it that calls modules otherwise."""
    folder.mkdir()
    tensors = load_file(source / "adapter_model.safetensors")
    tensors = {f"base_model.model.{name(key.removeprefix('base_model.model.'))}": t for key, t in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    config["target_modules"] = [name(target) for target in config["target_modules"]]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("way", ["text to full", "full to text"])
def test_an_adapter_of_one_class_is_the_same_on_the_other(pair, way, tmp_path):
    here, there = pair if way == "text to full" else pair[::-1]
    save_adapter(trained(here, rank_pattern={"up_proj": 2}), tmp_path / "adapter")
    load_adapter(there, tmp_path / "adapter")
    assert torch.equal(logits(there), logits(here))
    save_adapter(there, tmp_path / "again")
    load_adapter(remove_adapter(here), tmp_path / "again")
    assert torch.equal(logits(there), logits(here))


@pytest.mark.parametrize("writer", WRITTEN)
def test_every_program_s_names_fit_both_classes(writer, tmp_path):
    full = full_model("gemma3")
    text = trained(text_only(full))
    save_adapter(text, tmp_path / "adapter")
    folder = renamed_copy(
        tmp_path / "theirs", tmp_path / "adapter", lambda key: key.replace("model.", WRITTEN[writer], 1)
    )
    expected = logits(text)
    for model in (full, remove_adapter(text)):
        load_adapter(model, folder)
        assert torch.equal(logits(model), expected)
        remove_adapter(model)


def test_weights_go_into_an_adapter_of_the_other_class(pair, tmp_path):
    text, full = pair
    save_adapter(trained(text), tmp_path / "adapter")
    inject_adapter(full, AdapterConfig(method="dora", rank=4))
    load_weights(full, tmp_path / "adapter")
    assert torch.equal(logits(full), logits(text))
    inject_adapter(remove_adapter(full), AdapterConfig(method="dora", rank=4))
    swap_adapter_weights(full, "default", tmp_path / "adapter")
    assert torch.equal(logits(full), logits(text))


@pytest.mark.parametrize("stored", ["text", "full"])
@pytest.mark.parametrize("made_on", ["text", "full"])
def test_merging_on_disk_knows_both_names(pair, stored, made_on, tmp_path):
    models = dict(zip(("text", "full"), pair, strict=True))
    models[stored].save_pretrained(tmp_path / "base")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "base")
    save_adapter(trained(models[made_on]), tmp_path / "adapter")
    expected = logits(models[made_on])
    report = merge_checkpoint(tmp_path / "adapter", tmp_path / "merged", base_model=tmp_path / "base")
    assert report.changed == len(read_adapter(tmp_path / "adapter").modules)
    merged = type(models[stored]).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    adapted, _ = load_model_and_tokenizer(tmp_path / "base", adapter=tmp_path / "adapter", device="cpu")
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)


def test_peft_s_adapter_of_the_full_class_with_its_tower_loads_on_both(tmp_path):
    full = full_model("gemma3")
    wrapped = peft.get_peft_model(full, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "theirs")
    full = wrapped.unload()
    text = text_only(full)
    assert torch.allclose(logits(load_adapter(full, tmp_path / "theirs")), expected, atol=1e-5)
    remove_adapter(full)
    with pytest.warns(UserWarning, match=r"2 adapted modules of .* belong to no part of this model .*vision_tower"):
        load_adapter(text, tmp_path / "theirs")
    assert torch.allclose(logits(text), expected, atol=1e-5)
    remove_adapter(text).save_pretrained(tmp_path / "base")
    report = merge_checkpoint(tmp_path / "theirs", tmp_path / "merged", base_model=tmp_path / "base")
    assert "vision_tower" in report.notes[0]


def test_a_loaded_model_is_the_language_model_where_there_is_a_class_for_it(tmp_path):
    full_model("qwen3_5").save_pretrained(tmp_path / "qwen")
    full_model("gemma3").save_pretrained(tmp_path / "gemma")
    assert type(load_model(tmp_path / "qwen")).__name__ == "Qwen3_5ForCausalLM"
    assert type(load_model(tmp_path / "gemma")).__name__ == "Gemma3ForConditionalGeneration"


@pytest.mark.parametrize("made_on", ["text", "full"])
@pytest.mark.parametrize("stored", ["text", "full"])
def test_mlx_names_are_those_of_the_model_s_folder(pair, made_on, stored, tmp_path):
    models = dict(zip(("text", "full"), pair, strict=True))
    models[stored].save_pretrained(tmp_path / "base")
    model = trained(models[made_on], method="lora")
    kept, model.config._name_or_path = model.config._name_or_path, str(tmp_path / "base")
    try:
        save_mlx(model, tmp_path / "mlx")
    finally:
        model.config._name_or_path = kept
    keys = load_file(tmp_path / "mlx" / "adapters.safetensors")
    wraps = stored == "full"
    assert all(key.startswith("language_model.model.layers.") == wraps for key in keys)
    expected = logits(model)
    assert torch.equal(logits(load_adapter(remove_adapter(model), tmp_path / "mlx")), expected)


@pytest.mark.parametrize(
    ("kind", "path", "theirs"),
    [
        ("gemma3", "lm_head", "language_model.lm_head"),
        ("gemma3", "model.language_model.embed_tokens", "language_model.model.embed_tokens"),
        ("qwen3_5", "model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj"),
        ("gemma3n", "model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
        ("gemma3_text", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("gpt2", "transformer.h.0.mlp.c_fc", "model.h.0.mlp.c_fc"),
    ],
)
def test_mlx_names(kind, path, theirs):
    assert to_mlx_name(path, kind) == theirs


def test_one_module_under_two_names_is_refused(tmp_path):
    full = full_model("gemma3")
    save_adapter(trained(full, targets=".*layers.0.mlp.up_proj"), tmp_path / "adapter")
    remove_adapter(full)
    folder = renamed_copy(tmp_path / "theirs", tmp_path / "adapter", lambda key: key)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors |= {key.replace("model.language_model", "language_model.model"): t.clone() for key, t in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="two names"):
        load_adapter(full, folder)


def test_a_part_that_is_lost_is_still_noticed_under_other_names(tmp_path):
    full = full_model("gemma3")
    text = trained(text_only(full), targets=("q_proj",), method="lora")
    save_adapter(text, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: t for key, t in load_file(path).items() if "layers.1" not in key}, path)
    with pytest.raises(CheckpointError, match=r"language_model\.layers\.1\.self_attn\.q_proj: named by the targets"):
        load_adapter(full, tmp_path / "adapter")


def test_ranks_and_scales_follow_the_names(tmp_path):
    full = full_model("gemma3")
    ranks = {"model.layers.0.self_attn.q_proj": 2, "down_proj": 3}
    text = trained(text_only(full), rank_pattern=ranks, alpha_pattern={"model.layers.1.mlp.up_proj": 5.0})
    save_adapter(text, tmp_path / "adapter")
    file = in_names_of(full, read_adapter(tmp_path / "adapter"))
    assert file.modules["model.language_model.layers.0.self_attn.q_proj"].a.shape[0] == 2
    save_adapter(load_adapter(full, tmp_path / "adapter"), tmp_path / "again")
    remove_adapter(full)
    assert read_adapter(tmp_path / "again").modules.keys() == file.modules.keys()
    assert torch.equal(logits(load_adapter(remove_adapter(text), tmp_path / "again")), logits(text))


def test_names_that_only_wrap():
    assert bare_name("base_model.model.model.language_model.layers.0.q_proj") == "layers.0.q_proj"
    assert bare_name("language_model.lm_head.weight") == "lm_head.weight"
    assert bare_name("model") == "model"
    names = Names(["a.model.x", "model.b.y", "language_model.b.y"])
    assert names.find("model.b.y") == "model.b.y"
    assert names.find("b.y") is None, "two have that name"
    assert names.find("c") is None
    assert of_another_part("model.vision_tower.encoder.layers.0")
    assert of_another_part("model.multi_modal_projector.linear_1")
    assert not of_another_part("model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize("way", ["full to text", "text to full"])
def test_rows_of_tokens_follow_the_names(pair, way, tmp_path):
    there, here = reversed(pair) if way == "full to text" else pair
    trained(there, targets=("gate_proj",), trainable_token_indices=[3, 9])
    save_adapter(there, tmp_path)
    load_adapter(here, tmp_path)
    torch.testing.assert_close(logits(here), logits(there), rtol=0, atol=1e-5)
    save_adapter(here, tmp_path / "again")
    remove_adapter(there)
    load_adapter(there, tmp_path / "again")
    torch.testing.assert_close(logits(here), logits(there), rtol=0, atol=1e-5)


class Renamed:
    def forward(self, input_ids, cache=None, **kwargs): ...


class Own:
    def forward(self, input_ids, past_key_values=None): ...


def test_a_cache_goes_by_the_name_that_the_model_has_for_it():
    assert cache_argument(Renamed()) == "cache"
    assert cache_argument(Own()) == "past_key_values"
