"""Tokens without a row in the model."""

import pytest
from datasets import Dataset

from theodora.data.vocabulary import check_rows, missing_in, missing_rows, model_rows, safe_padding
from theodora.errors import ConfigError


def test_tokens_beyond_the_rows_are_counted():
    rows = [[1, 2], [3, 3, 4], [], [4]]
    assert missing_rows(rows, 3) == {3: 1, 4: 2}
    assert missing_rows(rows, 5) == {}
    datasets = [Dataset.from_dict({"input_ids": rows}), Dataset.from_dict({"input_ids": [[9]]})]
    assert missing_in(datasets, 4) == {4: 2, 9: 1}
    assert missing_in([datasets[0].select([0])], 3) == {}  # the rows that were left out do not count


def test_they_are_named(tiny_model, tiny_tokenizer):
    tiny_tokenizer.add_tokens([f"<t{i}>" for i in range(20)])
    model = tiny_model()
    assert model_rows(model) == 272
    with pytest.raises(ConfigError, match=r"(?s)notes uses a token.*272 rows.*'<t13>' \(272\) in 1 row\nMend it"):
        check_rows([[1], [272]], model, tiny_tokenizer, "notes", "Mend it.")
    check_rows([[1], [271]], model, tiny_tokenizer, "notes", "Mend it.")


def test_padding_takes_a_row_that_is_there(tiny_model, tiny_tokenizer):
    model = tiny_model(vocab_size=259)
    assert safe_padding(model, tiny_tokenizer) == 0
    tiny_tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model.config.pad_token_id = model.generation_config.pad_token_id = 259
    assert safe_padding(model, tiny_tokenizer) == 0
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 0
