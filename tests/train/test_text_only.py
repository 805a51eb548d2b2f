"""What is tried out on a few tokens before a run."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, BlipForConditionalGeneration

import tiny
import tiny_families
from theodora import AdapterConfig, inject_adapter
from theodora.adapters.models import load_model
from theodora.errors import CheckpointError, ConfigError
from theodora.layers.libraries import tokens_by_themselves
from theodora.train.experts import name_experts, why_unbalanced
from theodora.train.text_only import check_continues_text, without_gradient


def family(name):
    return tiny_families.tiny_family(name, tiny_families.families()[name])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_decoders_continue_text(name):
    check_continues_text(tiny.tiny_model(name))
    check_continues_text(tiny.tiny_model(name, dtype=torch.bfloat16))


def test_rounding_that_depends_on_the_batch_is_no_look_ahead(tiny_model_dir):
    pytest.importorskip("bitsandbytes")
    model = load_model(tiny_model_dir(), quantize="int8", device=torch.device("cpu")).eval()
    with torch.no_grad():
        for layer in model.model.layers:  # many values beyond LLM.int8()'s threshold, in columns of some tokens
            layer.input_layernorm.weight *= 5
            layer.post_attention_layernorm.weight *= 5
    ids = torch.tensor([[70, 91, 120, 33, 9, 50], [70, 91, 120, 33, 9, 51]])
    with torch.no_grad():
        one, two = (model(input_ids=row[None]).logits[0, :-1] for row in ids)
    assert not torch.equal(one, two)
    check_continues_text(model)
    with tokens_by_themselves(model), torch.no_grad():
        one, two = (model(input_ids=row[None]).logits[0, :-1] for row in ids)
    assert torch.equal(one, two)
    assert model.model.layers[0].mlp.up_proj.state.threshold == 6.0


def test_an_encoder_is_refused():
    with pytest.raises(ConfigError, match="each token sees those that come after it"):
        check_continues_text(family("bert"))


def test_a_model_that_wants_an_image_is_refused():
    model = tiny_families.tiny_family("blip", BlipForConditionalGeneration)
    with pytest.raises(ConfigError, match=r"BlipForConditionalGeneration does not run on text alone.*pixel_values"):
        check_continues_text(model)


def test_an_encoder_decoder_is_refused(tmp_path):
    family("florence2").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"encoder-decoder model \(florence2\)"):
        load_model(tmp_path)


def test_what_selects_tokens_gets_no_gradient():
    with pytest.warns(UserWarning, match="fused experts"):
        model = inject_adapter(family("deepseek_v32"), AdapterConfig())
    resting = without_gradient(model)
    assert resting
    assert all(".indexer." in path for path in resting)
    assert not any(p.grad is not None for p in model.parameters())
    assert without_gradient(inject_adapter(tiny.tiny_model(), AdapterConfig())) == []


def test_names_of_experts_that_trl_reads():
    config = family("granitemoe").config
    assert not hasattr(config, "num_experts")
    name_experts(config)
    assert config.num_experts == config.num_local_experts


def test_a_balance_that_cannot_be_computed_is_off():
    arguments = SimpleNamespace(router_aux_loss_coef=None)
    assert "is off" in (why_unbalanced(family("doge"), arguments) or "")
    assert why_unbalanced(family("doge"), SimpleNamespace(router_aux_loss_coef=0.1)) is None
    mixtral = AutoModelForCausalLM.from_config(tiny_families.small_config(family("mixtral").config_class))
    name_experts(mixtral.config)
    assert why_unbalanced(mixtral, arguments) is None
    assert why_unbalanced(tiny.tiny_model(), arguments) is None
