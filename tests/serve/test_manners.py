"""An adapter's own chat template and ends, where its folder has them."""

import asyncio
import json
import logging

import pytest

from calling import CALL, SCHEMA, TEMPLATE
from theodora.serve.calls.source import Call
from theodora.serve.chats import chat_text
from theodora.serve.config import ServeConfig
from theodora.serve.forms import Forms
from theodora.serve.manners import manner_of
from theodora.serve.protocol import ChatRequest
from tiny import CHATML, tiny_tokenizer

SETTINGS = {"eos_token_id": 0}


@pytest.fixture
def tokenizer(tiny_tokenizer):
    tiny_tokenizer.eos_token = "<|endoftext|>"
    tiny_tokenizer.chat_template = None
    return tiny_tokenizer


def test_the_base_ends_where_its_template_does(tokenizer):
    assert manner_of(None, tokenizer, SETTINGS).ends == {0}
    tokenizer.chat_template = CHATML
    assert manner_of(None, tokenizer, SETTINGS).ends == {0, 2}


def test_an_adapter_that_says_nothing_is_like_its_base(tokenizer, tmp_path):
    assert manner_of(tmp_path, tokenizer, SETTINGS) == manner_of(None, tokenizer, SETTINGS)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    assert manner_of(tmp_path, tokenizer, SETTINGS) == manner_of(None, tokenizer, SETTINGS)


def test_an_adapter_brings_its_template_and_its_ends(tokenizer, tmp_path):
    own = tiny_tokenizer()
    own.save_pretrained(tmp_path)
    found = manner_of(tmp_path, tokenizer, SETTINGS)
    assert found.template == CHATML
    assert found.ends == {0, 2}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7]}))
    assert manner_of(tmp_path, tokenizer, SETTINGS).ends == {0, 2, 7}
    tokenizer.chat_template = CHATML
    assert manner_of(tmp_path, tokenizer, SETTINGS).template is None


def test_tokens_that_the_server_does_not_cut_are_said(tokenizer, tmp_path, caplog):
    own = tiny_tokenizer()
    own.add_tokens(["<new>"])
    own.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "theodora.serve"):
        manner_of(tmp_path, tokenizer, SETTINGS)
    assert "<new>" in caplog.text


@pytest.mark.parametrize("base", [None, CHATML])
def test_an_answer_is_read_in_the_format_of_the_adapters_own_template(tokenizer, base):
    tokenizer.chat_template = base
    tool = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
    asked = ChatRequest.model_validate(
        {"model": "own", "messages": [{"role": "user", "content": "Hi"}], "tools": [tool]}
    )
    prompt, _ = chat_text(tokenizer, asked, TEMPLATE)
    form = asyncio.run(Forms(tokenizer, ServeConfig(model="base"), None).of_chat(asked, prompt, TEMPLATE))
    calls = [event for event in form.parser().feed(CALL, ended=True) if isinstance(event, Call)]
    assert [call.name for call in calls] == ["look"]
