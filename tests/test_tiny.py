"""The tiny models are what the other tests take them for."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny import FAMILIES


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_again_with_equal_logits(family, tied, tiny_model, tiny_model_dir):
    ids = torch.arange(3, 19)[None]
    expected = tiny_model(family, tied=tied)(ids).logits
    folder = tiny_model_dir(family, tied=tied)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model(ids).logits, expected)
    assert expected.std() > 0.3
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_the_tokenizer_reads_any_text_and_survives_saving(tiny_tokenizer, tiny_model_dir):
    text = "Grüße, 世界! <|im_end|>\n"
    ids = tiny_tokenizer(text)["input_ids"]
    loaded = AutoTokenizer.from_pretrained(tiny_model_dir())
    assert loaded(text)["input_ids"] == ids
    assert loaded.decode(ids) == text
    assert ids.count(loaded.eos_token_id) == 1
    chat = loaded.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False)
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
