"""Encoders whose convolutions are adapted: loaded, merged on disk, inspected, converted; and what refuses them."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from theodora import AdapterConfig, ConfigError, inject_adapter, load_adapter, merge_adapter, save_adapter
from theodora.adapters.check import load_weights
from theodora.adapters.save_mlx import save_mlx
from theodora.adapters.swap_weights import swap_adapter_weights
from theodora.analysis import inspect_adapter
from theodora.errors import CheckpointError, UsageError
from theodora.export.gguf_lora import check_gguf_lora
from theodora.export.served import check_served
from theodora.files.adapter import read_adapter
from theodora.files.base_model import BaseCheckpoint
from theodora.merging import merge_checkpoint
from theodora.merging.combine import combine_adapters
from theodora.merging.to_lora import folder_to_lora, to_lora
from theodora.serve.adapters import read_served
from theodora.serve.slotted import Routing, slot
from tiny import tiny_model

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**TINY, "image_size": 16, "patch_size": 4}
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def whisper():
    sizes = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in _WHISPER.items()}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(
        vocab_size=64, d_model=16, num_mel_bins=8, max_source_positions=20, max_target_positions=20, **sizes, **ends
    )
    x = {"input_features": torch.randn(1, 8, 40), "decoder_input_ids": torch.tensor([[1, 5, 3]])}
    return WhisperForConditionalGeneration(config), ("conv1", "conv2", "q_proj"), x


_WHISPER = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}


def clip():
    text = {**TINY, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
    return (
        CLIPModel(config),
        ("patch_embedding", "q_proj"),
        {"input_ids": torch.tensor([[1, 5, 2]]), "pixel_values": PIXELS},
    )


def clip_vision():
    return CLIPVisionModel(CLIPVisionConfig(**VISION)), ("patch_embedding",), {"pixel_values": PIXELS}


def convnext():
    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, layer_scale_init_value=1.0)
    return ConvNextForImageClassification(config), ("dwconv", "patch_embeddings", "pwconv1"), {"pixel_values": PIXELS}


MODELS = {make.__name__: make for make in (whisper, clip, clip_vision, convnext)}


def run(model, x):
    with torch.no_grad():
        return model.eval()(**x)[0]


def perturb(model, seed=7):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def made(name, folder, **config):
    """A base on disk, an adapter on disk, the model that carries it, and an input."""
    torch.manual_seed(0)
    model, targets, x = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that what convolutions do is seen in the outputs
    model.save_pretrained(folder / "base")
    model = type(model).from_pretrained(folder / "base")
    fresh = run(model, x)
    inject_adapter(model, AdapterConfig(**{"rank": 2, "targets": targets, **config}))
    assert torch.equal(run(model, x), fresh)
    perturb(model)
    assert not torch.allclose(run(model, x), fresh, atol=1e-3)
    save_adapter(model, folder / "a")
    return model, x


@pytest.mark.parametrize("name", MODELS)
def test_encoders_are_adapted_loaded_and_merged_on_disk(name, tmp_path):
    model, x = made(name, tmp_path)
    near = {"rtol": 0, "atol": 1e-5 * float(run(model, x).abs().max())}
    bare = type(model).from_pretrained(tmp_path / "base")
    torch.testing.assert_close(run(load_adapter(bare, tmp_path / "a"), x), run(model, x), **near)
    report = merge_checkpoint(tmp_path / "a", tmp_path / "merged")
    assert report.changed >= len(read_adapter(tmp_path / "a").modules)
    merged = type(model).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(run(merged, x), run(model, x), **near)
    merge_adapter(bare)
    state = bare.state_dict()
    assert all(torch.equal(parameter, state[name]) for name, parameter in merged.named_parameters())
    torch.testing.assert_close(run(bare, x), run(model, x), **near)


def test_inspecting_measures_filters_as_rows(tmp_path):
    model, _ = made("convnext", tmp_path)
    report = inspect_adapter(tmp_path / "a")
    layer = model.get_submodule(path := "convnext.encoder.stages.0.layers.0.dwconv")
    told = next(module for module in report.modules if module.path == path)
    w, adapter = layer.weight.detach().flatten(1).double(), layer.adapters["default"]
    update = (adapter.scale * adapter.lora_B.double() @ adapter.lora_A.double()).detach()
    angle = torch.rad2deg(torch.acos(torch.cosine_similarity(w, w + update)))
    assert told.shape == (8, 49)
    assert told.angle_mean == pytest.approx(float(angle.mean()), abs=1e-3)
    assert told.relative_update == pytest.approx(float(update.norm() / w.norm()), rel=1e-4)
    assert not report.warnings


def test_conversions_combinations_and_new_numbers(tmp_path):
    model, x = made("convnext", tmp_path, method="dora")
    exact = run(model, x)
    near = {"rtol": 0, "atol": 1e-4 * float(exact.abs().max())}
    to_lora(model, "default", None, into="plain")
    torch.testing.assert_close(run(model, x), exact, **near)
    combine_adapters(model, ["default", "plain"], [0.25, 0.75], into="both")
    torch.testing.assert_close(run(model, x), exact, **near)
    folder_to_lora(tmp_path / "a", tmp_path / "lora", None)
    bare = type(model).from_pretrained(tmp_path / "base")
    torch.testing.assert_close(run(load_adapter(bare, tmp_path / "lora"), x), exact, **near)
    again = inject_adapter(
        type(model).from_pretrained(tmp_path / "base"),
        AdapterConfig(rank=2, targets=("dwconv", "patch_embeddings", "pwconv1")),
    )
    load_weights(again, tmp_path / "a")
    assert torch.equal(run(again, x), exact)
    perturb(again)
    swap_adapter_weights(again, "default", tmp_path / "a")
    torch.testing.assert_close(run(again, x), exact, **near)


def test_a_base_of_other_sizes_is_refused(tmp_path):
    made("convnext", tmp_path)
    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2)
    other = ConvNextForImageClassification(config)
    other.save_pretrained(tmp_path / "other")
    said = r"patch_embeddings.*\(8, 3, 4, 4\).*\(8, 3, 2, 2\)"
    with pytest.raises(CheckpointError, match=said):
        merge_checkpoint(tmp_path / "a", tmp_path / "merged", base_model=tmp_path / "other")
    with pytest.raises(CheckpointError, match=said):
        load_adapter(other, tmp_path / "a")


def test_what_has_no_place_for_convolutions_says_so(tmp_path):
    model, _ = made("whisper", tmp_path)
    file, base = read_adapter(tmp_path / "a"), BaseCheckpoint(tmp_path / "base")
    with pytest.raises(UsageError, match=r"merge instead(.|\n)*encoder.conv1: a convolution"):
        check_served(file, base)
    with pytest.raises(ConfigError, match=r"encoder.conv1: MLX has no adapters for convolutions"):
        save_mlx(model, tmp_path / "mlx")
    bare = WhisperForConditionalGeneration.from_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"merge it(.|\n)*encoder.conv1: a convolution"):
        read_served(tmp_path / "a", bare, 8)
    with pytest.raises(TypeError, match="convolutions are not supported"):
        slot(bare.model.encoder.conv1, Routing(2), 2)
    assert type(bare.model.encoder.conv1) is torch.nn.Conv1d


def test_a_lora_in_gguf_has_no_place_for_a_convolution(tmp_path):
    llama = tiny_model("llama")
    llama.save_pretrained(tmp_path / "base")
    save_adapter(inject_adapter(llama, AdapterConfig(method="lora", targets=("q_proj",))), tmp_path / "a")
    file = read_adapter(tmp_path / "a")
    modules = {path: replace(tensors, filter_shape=(8, 4)) for path, tensors in file.modules.items()}
    with pytest.raises(CheckpointError, match="a convolution, for which such a file has no place"):
        check_gguf_lora(replace(file, modules=modules), BaseCheckpoint(tmp_path / "base"))


def test_the_weight_normed_convolution_of_wav2vec2_is_refused():
    config = {**TINY, "conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (3,), "num_feat_extract_layers": 1}
    model = Wav2Vec2Model(Wav2Vec2Config(**config, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2))
    with pytest.raises(
        ConfigError, match=r"pos_conv_embed.conv: its weight is made anew(.|\n)*remove_parametrizations"
    ):
        inject_adapter(model, AdapterConfig(targets=("pos_conv_embed.conv",)))
    torch.nn.utils.parametrize.remove_parametrizations(model.encoder.pos_conv_embed.conv, "weight")
    x = torch.randn(1, 100, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.eval()(x)[0]
        inject_adapter(model, AdapterConfig(targets=("pos_conv_embed.conv", "conv_layers.0.conv")))
        assert torch.equal(model(x)[0], before)
