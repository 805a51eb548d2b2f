"""Packed rows through TRL's own packing and collator give the losses of the rows alone, wherever we say they do."""

from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from theodora.data import load_examples, packing_is_safe, tokenize
from theodora.data.packing import packed_batch
from tiny import FAMILIES

SMALL: dict[str, Any] = {"vocab_size": 272, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
# These ignore position ids in their masks (transformers 5.23), or carry a state from token to token.
UNSAFE: dict[str, dict[str, Any]] = {
    "bloom": {**SMALL, "initializer_range": 0.2},
    "falcon": {**SMALL, "initializer_range": 0.2},
    "opt": {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2, "dropout": 0.1},
    "mamba": {**SMALL, "initializer_range": 0.2},
}
if Version(transformers.__version__) >= Version("5.24.0.dev0"):
    del UNSAFE["falcon"]  # its masks heed position ids


def losses(model, batch):
    """The loss of every learned token, in order."""
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    each = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=-100)
    return each[labels[:, 1:].flatten() != -100]


@pytest.fixture
def tokenised(write, tiny_tokenizer):
    rows = [{"prompt": "Two and " * (i % 3 + 1), "completion": "four. " * (i % 4 + 1)} for i in range(9)]
    return tokenize(load_examples(write(rows)), tiny_tokenizer, max_length=200)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_losses_equal_those_of_rows_alone(family, attention, tokenised, tiny_model):
    model = tiny_model(family, attn_implementation=attention)
    assert packing_is_safe(model)
    packed = pack_dataset(tokenised, 256, "bfd", {"load_from_cache_file": False})
    assert len(packed) < len(tokenised)
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    alone = {tuple(row["input_ids"]): losses(model, collate([row])) for row in tokenised}
    for row in packed:
        documents = torch.tensor(row["input_ids"]).split(row["seq_lengths"])
        expected = torch.cat([alone[tuple(document.tolist())] for document in documents])
        torch.testing.assert_close(losses(model, collate([row])), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", UNSAFE)
def test_models_that_let_documents_see_each_other_are_recognised(family):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **UNSAFE[family]))
    assert not packing_is_safe(model)


def test_models_that_take_no_position_ids_are_recognised(tiny_model, monkeypatch):
    model = tiny_model()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, use_cache: forward(input_ids, use_cache=use_cache))
    assert not packing_is_safe(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype, tiny_model):
    assert packing_is_safe(tiny_model("gpt2", dtype=dtype))


def test_the_question_leaves_no_trace(tiny_model):
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert packing_is_safe(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_the_batch_is_what_trls_collator_makes():
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]
    packed = pack_dataset(Dataset.from_list(rows), 5, "bfd")
    collated = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(list(packed))
    collated.pop("labels")
    ours = packed_batch([torch.tensor(row["input_ids"]) for row in rows])
    assert ours.keys() == collated.keys()
    for name, value in collated.items():
        torch.testing.assert_close(ours[name], value)
