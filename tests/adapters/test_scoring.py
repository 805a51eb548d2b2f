"""Models that score texts: the token that pads, heads that are new, and scores in batches."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from theodora import AdapterConfig, ConfigError, inject_adapter
from theodora.adapters.models import load_model
from theodora.adapters.scoring import new_heads, padded, scores, set_padding, widen_heads
from tiny import EOS_ID, PAD_ID, tiny_model, tiny_tokenizer


@pytest.fixture
def model(tiny_model_dir):
    return load_model(tiny_model_dir(), dtype="float32", scores=True)


def test_padding_is_that_of_config_json(model):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert set_padding(model, tokenizer) == []
    assert tokenizer.pad_token_id == model.config.pad_token_id == PAD_ID


def test_padding_is_the_tokenizers_where_config_json_names_none(model):
    tokenizer, model.config.pad_token_id = tiny_tokenizer(), None
    (note,) = set_padding(model, tokenizer)
    assert f"(pad_token_id={PAD_ID})" in note
    assert model.config.pad_token_id == PAD_ID
    tokenizer.pad_token, model.config.pad_token_id = None, None
    notes = set_padding(model, tokenizer)
    assert tokenizer.pad_token_id == model.config.pad_token_id == EOS_ID
    assert "the score is read at the token before it" in notes[-1]


def test_padding_that_nobody_has(model):
    tokenizer, model.config.pad_token_id = tiny_tokenizer(), None
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no token to pad with"):
        set_padding(model, tokenizer)
    model.config.pad_token_id = 5_000
    with pytest.raises(ConfigError, match="pads with token 5000"):
        set_padding(model, tokenizer)


def test_a_new_head_is_drawn_by_the_seed_alone(tiny_model_dir, tmp_path):
    drawn = []
    for state in (1, 2):
        torch.manual_seed(state)
        model = load_model(tiny_model_dir(), dtype="float32", scores=True)
        torch.manual_seed(7)
        assert new_heads(model) == ["score"]
        drawn.append(model.score.weight.detach().clone())
    assert torch.equal(*drawn)
    assert 0.1 < drawn[0].std() < 0.3  # the model's own initializer_range is 0.2
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path, dtype="float32", scores=True)
    assert new_heads(again) == []
    assert torch.equal(again.score.weight, drawn[0])


def test_scores_do_not_depend_on_the_batch(model, monkeypatch):
    tokenizer = tiny_tokenizer()
    ids = [tokenizer("1 + 2 = 3" + "!" * n)["input_ids"] for n in (5, 0, 40, 17, 1)]
    set_padding(model, tokenizer)
    model.train()
    together = scores(model, ids)
    assert model.training
    monkeypatch.setattr("theodora.adapters.scoring._AT_ONCE", 60)
    torch.testing.assert_close(scores(model, ids), together, rtol=1e-4, atol=1e-5)
    alone = [model(torch.tensor([each])).logits[0, 0].item() for each in ids]
    torch.testing.assert_close(together, torch.tensor(alone), rtol=1e-4, atol=1e-5)
    assert scores(model, []).shape == (0,)


def test_a_wide_head_scores_in_float32(tiny_model_dir):
    model = load_model(tiny_model_dir(), dtype="bfloat16", scores=True)
    ids = [[5, 6, 7], [9, 8]]
    before = scores(model, ids)
    widen_heads(model)
    assert model.score.weight.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    after = model(**padded(ids, PAD_ID, model.device)).logits
    assert after.dtype == torch.float32
    torch.testing.assert_close(after[:, 0], before, rtol=0.02, atol=0.02)


def test_an_adapter_trains_the_head_in_full(model):
    inject_adapter(model, AdapterConfig(method="lora"))
    assert model.score.weight.requires_grad
    assert not any("score" in name for name, _ in model.named_modules() if "lora" in name)


def test_a_model_of_another_shape_is_not_loaded_as_one(tmp_path):
    model = tiny_model()
    model.config.num_labels = 2
    AutoModelForSequenceClassification.from_config(model.config).save_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"gives 2 numbers, one for each class; expected one"):
        load_model(tmp_path, scores=True)
