"""A base model whose EOS is not what its chat template ends turns with: trained, scored, merged and exported."""

import json
import re

import pytest
import torch
from gguf import GGUFReader
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from theodora import evaluate, merge_checkpoint
from theodora.adapters.models import load_model_and_tokenizer
from theodora.config import TrainConfig
from theodora.data import load_examples
from theodora.errors import ConfigError
from theodora.export.gguf_model import write_gguf
from theodora.train import train
from tiny import tiny_model, tiny_tokenizer

PAIRS = [("red?", "stop"), ("green?", "go"), ("amber?", "wait")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base whose tokenizer and settings end with <|endoftext|>, beside ChatML's template; and its data."""
    folder = tmp_path_factory.mktemp("ends")
    model = tiny_model(hidden_size=64, intermediate_size=128, eos_token_id=0, bos_token_id=None)
    model.generation_config.eos_token_id = 0
    model.save_pretrained(folder / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder / "base")
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in PAIRS]
    rows = [json.dumps({"messages": messages}) + "\n" for messages in turns]
    (folder / "test.jsonl").write_text("".join(rows))
    (folder / "train.jsonl").write_text("".join(rows * 8))
    return folder


@pytest.fixture(scope="module")
def result(folder):
    config = TrainConfig.from_options(
        {
            "model": str(folder / "base"),
            "data": str(folder / "train.jsonl"),
            "output": str(folder / "run"),
            "held_out": 0,
            "max_steps": 60,
            "rank": 32,
            "method": "lora",
            "learning_rate": 1e-2,
            "bf16": False,
        }
    )
    return train(config, console=Console(quiet=True))


def test_the_run_says_so_and_stops(folder, result):
    assert result.train_loss < 0.1
    assert result.stops == (4, 4)
    card = (folder / "run" / "README.md").read_text()
    assert "stops by itself in 4 of 4 answers" in card
    assert set(GenerationConfig.from_pretrained(folder / "run").eos_token_id) == {0, 2}


def test_it_is_scored_right(folder, result):
    model, tokenizer = load_model_and_tokenizer(folder / "run")
    assert evaluate(model, tokenizer, load_examples(folder / "test.jsonl")).exact_match == 1
    assert set(model.generation_config.eos_token_id) == {0, 2}


def test_what_is_made_of_it_ends_there(folder, result):
    report = merge_checkpoint(folder / "run", folder / "merged", dtype="float32")
    assert any("<|im_end|>" in note for note in report.notes)
    model = AutoModelForCausalLM.from_pretrained(folder / "merged")
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
    asked = [{"role": "user", "content": "red?"}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(output[0][inputs["input_ids"].shape[1] :]) == "stop<|im_end|>"
    write_gguf(folder / "merged", folder / "merged.gguf", "merged", None)
    header = GGUFReader(folder / "merged.gguf").fields
    ids = [header[f"tokenizer.ggml.{kind}_token_id"].contents() for kind in ("eos", "eot")]
    assert ids == [0, 2]


@pytest.fixture(scope="module")
def beyond(tmp_path_factory):
    """A model without rows for the last tokens of its tokenizer, and rows that use one of them."""
    folder = tmp_path_factory.mktemp("beyond")
    tiny_model().save_pretrained(folder / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<x{i}>" for i in range(14)]})
    tokenizer.save_pretrained(folder / "base")
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "<x13>A"}]
    (folder / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    return folder


def options(folder, output, **others):
    base = {"model": str(folder / "base"), "data": str(folder / "rows.jsonl"), "output": str(output), "held_out": 0}
    return TrainConfig.from_options({**base, "max_steps": 2, "bf16": False, "learning_rate": 1e-2, **others})


def test_tokens_without_a_row_are_named_before_training(beyond, tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)'<x13>' \(272\) in 4 rows.*--resize-embeddings"):
        train(options(beyond, tmp_path / "run"), console=Console(quiet=True))
    model, tokenizer = load_model_and_tokenizer(beyond / "base")
    with pytest.raises(ConfigError, match=r"'<x13>' \(272\)"):
        evaluate(model, tokenizer, load_examples(beyond / "rows.jsonl"))


def test_the_file_that_uses_them_is_named(beyond, tmp_path):
    clean = tmp_path / "clean.jsonl"
    clean.write_text((beyond / "rows.jsonl").read_text().replace("<x13>", ""))
    held_out = {"data": str(clean), "eval_data": str(beyond / "rows.jsonl"), "held_out": None}
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(beyond / 'rows.jsonl'))} uses a token"):
        train(options(beyond, tmp_path / "run", **held_out), console=Console(quiet=True))
    replayed = {"data": str(clean), "replay": str(beyond / "rows.jsonl"), "replay_share": 0.5}
    with pytest.raises(ConfigError, match=r"clean\.jsonl with .*rows\.jsonl uses a token"):
        train(options(beyond, tmp_path / "run", **replayed), console=Console(quiet=True))


def test_they_get_rows_that_are_trained_and_saved(beyond, tmp_path):
    result = train(options(beyond, tmp_path / "run", resize_embeddings=True), console=Console(quiet=True))
    assert result.moved["token_rows"] == (2, 2)
    expected = evaluate(result.model, result.tokenizer, load_examples(beyond / "rows.jsonl"), exact_match=False)
    model, tokenizer = load_model_and_tokenizer(tmp_path / "run")
    found = evaluate(model, tokenizer, load_examples(beyond / "rows.jsonl"), exact_match=False)
    assert found.loss == pytest.approx(expected.loss, abs=1e-6)
    again = train(
        options(beyond, tmp_path / "run", resize_embeddings=True, max_steps=3, resume=True), console=Console(quiet=True)
    )
    assert again.steps == 3


def test_going_on_keeps_rows_that_the_adapter_brings_and_trains_those_of_newer_tokens(beyond, tmp_path):
    quiet = Console(quiet=True)
    train(options(beyond, tmp_path / "first", resize_embeddings=True), console=quiet)
    second = train(options(beyond, tmp_path / "second", from_adapter=str(tmp_path / "first")), console=quiet)
    assert second.moved["token_rows"] == (2, 2)
    plain = tmp_path / "plain.jsonl"
    plain.write_text((beyond / "rows.jsonl").read_text().replace("<x13>", "x"))
    train(options(beyond, tmp_path / "plain", data=str(plain)), console=quiet)
    grown = options(beyond, tmp_path / "third", from_adapter=str(tmp_path / "plain"), resize_embeddings=True)
    third = train(grown, console=quiet)
    assert third.moved["token_rows"] == (2, 2)
    for result, folder in ((second, "second"), (third, "third")):
        expected = evaluate(result.model, result.tokenizer, load_examples(beyond / "rows.jsonl"), exact_match=False)
        model, tokenizer = load_model_and_tokenizer(tmp_path / folder)
        found = evaluate(model, tokenizer, load_examples(beyond / "rows.jsonl"), exact_match=False)
        assert found.loss == pytest.approx(expected.loss, abs=1e-6)


def test_a_padding_token_needs_no_row(tmp_path):
    tiny_model(vocab_size=259, pad_token_id=None).save_pretrained(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": "Q" * (i + 1), "completion": "A"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = train(options(tmp_path, tmp_path / "run"), console=Console(quiet=True))
    assert result.steps == 2
    assert result.tokenizer.pad_token == "[PAD]"
    scores = evaluate(result.model, result.tokenizer, load_examples(tmp_path / "rows.jsonl"), max_new_tokens=3)
    assert scores.rows == 8
