"""An adapter's own chat template and ends, where its folder has them."""

import json
import logging
import shutil

import pytest

from calling import CALL, SCHEMA, SILENT, TEMPLATE, written
from serving import Server
from theodora.files.folder import Place
from theodora.serve.chat_formats import chat_format_of, read_format_files, warn_of_unknown_tokens
from theodora.serve.config import ServeConfig
from theodora.serve.engine import Engine
from tiny import CHATML, tiny_model, tiny_tokenizer

SETTINGS = {"eos_token_id": 0}


@pytest.fixture
def tokenizer(tiny_tokenizer):
    tiny_tokenizer.eos_token = "<|endoftext|>"
    tiny_tokenizer.chat_template = None
    return tiny_tokenizer


def chat_format(folder, tokenizer):
    return chat_format_of(read_format_files(Place(folder)), tokenizer, SETTINGS)


def test_the_base_ends_where_its_template_does(tokenizer):
    assert chat_format_of(None, tokenizer, SETTINGS).ends == {0}
    tokenizer.chat_template = CHATML
    assert chat_format_of(None, tokenizer, SETTINGS).ends == {0, 2}


def test_an_adapter_that_says_nothing_is_like_its_base(tokenizer, tmp_path):
    assert chat_format(tmp_path, tokenizer) == chat_format_of(None, tokenizer, SETTINGS)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    assert chat_format(tmp_path, tokenizer) == chat_format_of(None, tokenizer, SETTINGS)


def test_an_adapter_brings_its_template_and_its_ends(tokenizer, tmp_path):
    own = tiny_tokenizer()
    own.save_pretrained(tmp_path)
    found = chat_format(tmp_path, tokenizer)
    assert found.template == CHATML
    assert found.ends == {0, 2}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7]}))
    assert chat_format(tmp_path, tokenizer).ends == {0, 2, 7}
    tokenizer.chat_template = CHATML
    assert chat_format(tmp_path, tokenizer).template is None


def test_an_adapter_may_have_a_template_for_tools(tokenizer, tmp_path):
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    found = chat_format(tmp_path, tokenizer)
    assert (found.template_of(False), found.template_of(True)) == ("a", "b")
    own = tiny_tokenizer()
    own.chat_template = {"default": "c", "tool_use": "d"}
    own.save_pretrained(tmp_path)
    found = chat_format(tmp_path, tokenizer)
    assert (found.template_of(False), found.template_of(True)) == ("c", "d")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"eos_token": [1], "chat_template": 7}),
        ("tokenizer_config.json", {"eos_token": {"content": {}}, "chat_template": [{"name": [1], "template": "a"}, 3]}),
        ("generation_config.json", {"eos_token_id": ["a", None, 1.5, -1, True]}),
        ("generation_config.json", {"eos_token_id": {"a": 1}}),
    ],
)
def test_what_means_nothing_is_passed_by(tokenizer, tmp_path, name, content):
    (tmp_path / name).write_text(json.dumps(content))
    assert chat_format(tmp_path, tokenizer) == chat_format_of(None, tokenizer, SETTINGS)


def test_a_vocabulary_that_means_nothing_is_passed_by(tokenizer, tmp_path, caplog):
    for text in ("[" * 9000, '{"added_tokens": [3, {"content": [1], "id": {}}]}', '{"added_tokens": 3}', "\udcff"):
        (tmp_path / "tokenizer.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        warn_of_unknown_tokens(Place(tmp_path), tokenizer)


def test_tokens_that_the_server_does_not_cut_are_said(tokenizer, tmp_path, caplog):
    own = tiny_tokenizer()
    own.add_tokens(["<new>"])
    own.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "theodora.serve"):
        warn_of_unknown_tokens(Place(tmp_path), tokenizer)
    assert "<new>" in caplog.text


@pytest.fixture(scope="module")
def own(adapter_dir, tmp_path_factory):
    """A server whose adapter `own` has a template of its own, with tools, and ends where the base does not."""
    folder = tmp_path_factory.mktemp("own") / "own"
    shutil.copytree(adapter_dir("dora4"), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7]}))
    config = ServeConfig(model="base", kv_tokens=4096, max_batch_tokens=512, max_batch=8)
    engine = Engine(tiny_model(max_position_embeddings=1024), config)
    engine.load("own", folder)
    with Server(engine, tiny_tokenizer()) as server:
        yield server


HI = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]


def test_chats_are_counted_as_they_are_asked(own):
    asked = {"messages": HI, "tools": TOOLS, **SILENT}
    for model in ("base", "own"):
        tokens = own.client.post("/../tokenize", body={"model": model, **asked}, cast_to=dict)["tokens"]
        reply = own.client.chat.completions.create(
            model=model, messages=HI, tools=TOOLS, max_tokens=1, extra_body=SILENT | {"return_token_ids": True}
        )
        assert reply.prompt_token_ids == tokens
        assert ("<think></think>" in tiny_tokenizer().decode(tokens)) == (model == "own")


def test_calls_are_written_as_the_adapters_template_does(own):
    asked = {"messages": HI, "tools": TOOLS, "max_tokens": 240}
    called = own.client.chat.completions.create(model="own", **asked, extra_body=SILENT | written(CALL)).choices[0]
    assert (called.finish_reason, called.message.tool_calls[0].function.name) == ("tool_calls", "look")
    plain = own.client.chat.completions.create(model="base", **asked, extra_body=written(CALL)).choices[0]
    assert (plain.finish_reason, plain.message.content) == ("stop", CALL)


def test_a_form_ends_where_the_adapter_does(own):
    bias = {"7": 100, "0": -100, "2": -100}
    asked = {"max_tokens": 9, "logit_bias": bias, "extra_body": {"structured_outputs": {"regex": "a*"}}}
    for model, finish in (("own", "stop"), ("base", "length")):
        choice = own.client.completions.create(model=model, prompt="Hi", **asked).choices[0]
        assert (choice.finish_reason, choice.text == "") == (finish, model == "own")
