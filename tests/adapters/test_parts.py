"""Targets and exclusions in models with towers: what text reaches, and what stays as it is."""

import pytest
from transformers import Gemma3ForConditionalGeneration, MllamaForConditionalGeneration

import tiny
import tiny_families
from theodora import AdapterConfig, inject_adapter
from theodora.adapters.parts import other_parts_note, parts_of
from theodora.adapters.state import adapter_layers
from theodora.adapters.targets import find_targets, for_text
from theodora.errors import ConfigError

LANGUAGE = "model.language_model"
TOWERS = ("model.vision_tower", "model.multi_modal_projector")


@pytest.fixture
def gemma3():
    return tiny_families.tiny_family("gemma3", Gemma3ForConditionalGeneration)


def test_parts(gemma3):
    parts = parts_of(gemma3)
    assert (parts.language_model, parts.others) == (LANGUAGE, TOWERS)
    assert parts.of("model.vision_tower.encoder.layers.0.self_attn.q_proj") == TOWERS[0]
    assert parts.reached("lm_head")
    assert parts_of(tiny.tiny_model()).others == ()
    assert other_parts_note(tiny.tiny_model(), []) is None
    assert other_parts_note(gemma3, []) == (
        "text does not reach model.vision_tower, model.multi_modal_projector: frozen, and left out of the targets"
    )


def test_the_default_is_the_language_model(gemma3):
    paths = find_targets(gemma3, AdapterConfig())
    assert len(paths) == 14
    assert all(path.startswith(LANGUAGE) for path in paths)


def test_a_name_excludes_what_lies_within(gemma3):
    config = AdapterConfig(targets=("q_proj", "fc1"), exclude=("vision_tower",))
    assert find_targets(gemma3, config) == [f"{LANGUAGE}.layers.{n}.self_attn.q_proj" for n in range(2)]
    config = AdapterConfig(exclude=("layers.1",))
    assert {path.split(".layers.")[1][0] for path in find_targets(gemma3, config)} == {"0"}
    config = AdapterConfig(exclude=r".*(up|down)_proj")
    assert not any("up_proj" in path or "down_proj" in path for path in find_targets(gemma3, config))


@pytest.mark.parametrize("targets", [("q_proj",), ".*q_proj"])
def test_targets_that_also_select_a_tower_mean_the_language_model_in_training_on_text(gemma3, targets):
    assert len(find_targets(gemma3, AdapterConfig(targets=targets))) == 4, "inject_adapter does as it is told"
    config, notes = for_text(gemma3, AdapterConfig(targets=targets))
    assert config.targets == tuple(f"{LANGUAGE}.layers.{n}.self_attn.q_proj" for n in range(2))
    assert notes == [
        "the targets select 2 modules that text does not reach (model.vision_tower: 2 modules): they stay frozen, and "
        "2 in model.language_model are adapted"
    ]
    excluded = AdapterConfig(targets=targets, exclude=("vision_tower",) if isinstance(targets, tuple) else ".*vision.*")
    assert for_text(gemma3, excluded) == (excluded, [])


def test_targets_within_a_tower_alone_are_refused_in_training_on_text(gemma3):
    with pytest.raises(ConfigError, match=r"only modules that text does not reach[\s\S]*model.vision_tower: 3 modules"):
        for_text(gemma3, AdapterConfig(targets=("fc1",)))


def test_layers_that_attend_to_images_are_another_part():
    model = tiny_families.tiny_family("mllama", MllamaForConditionalGeneration)
    crossing = model.config.text_config.cross_attention_layers
    inject_adapter(model, AdapterConfig())
    adapted = {int(path.split(".layers.")[1].split(".")[0]) for path in adapter_layers(model)}
    assert not adapted & set(crossing)
