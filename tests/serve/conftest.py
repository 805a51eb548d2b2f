"""Adapters to serve, engines and servers, which are stopped after the test."""

import contextlib
from functools import cache
from types import SimpleNamespace

import pytest
from transformers.generation.continuous_batching import continuous_api

import tiny
from calling import TEMPLATE
from serving import Server, trained
from theodora import save_adapter
from theodora.serve.config import ServeConfig
from theodora.serve.engine import Engine


@pytest.fixture(scope="session", autouse=True)
def _no_collections():
    """transformers collects garbage twice when it stops: seconds, after tests of many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continuous_api, "gc", SimpleNamespace(collect=lambda: None))
        yield


@pytest.fixture(scope="session")
def adapter_dir(tmp_path_factory):
    """A folder with an adapter of that name for the family's tiny model."""

    @cache
    def save(name, family="llama", seed=0):
        folder = tmp_path_factory.mktemp("adapters") / name
        save_adapter(trained(tiny.tiny_model(family), name, seed), folder)
        return folder

    return save


@pytest.fixture
def engine_of(adapter_dir):
    """`engine_of("llama", "dora4", slots=2)`: a started engine with these adapters; stopped after the test."""
    with contextlib.ExitStack() as stack:

        def make(family="llama", *names, model=None, **config):
            settings = {"model": "base", "kv_tokens": 2048, "max_batch_tokens": 512, "max_batch": 16, **config}
            engine = Engine(model or tiny.tiny_model(family), ServeConfig(**settings))
            for name in names:
                engine.load(name, adapter_dir(name, family))
            engine.start()
            stack.callback(engine.stop)
            return engine

        yield make


@contextlib.contextmanager
def servers(adapter_dir):
    with contextlib.ExitStack() as stack:

        def make(*names, model=None, model_name="base", **config):
            settings = {"model": model_name, "kv_tokens": 2048, "max_batch_tokens": 512, "max_batch": 16, **config}
            engine = Engine(model or tiny.tiny_model(), ServeConfig(**settings))
            for name in names:
                engine.load(name, adapter_dir(name))
            return stack.enter_context(Server(engine, tiny.tiny_tokenizer()))

        yield make


@pytest.fixture
def server_of(adapter_dir):
    """`server_of("dora4", max_queue=1)`: a running server with these adapters."""
    with servers(adapter_dir) as make:
        yield make


@pytest.fixture(scope="session")
def server(adapter_dir):
    """One server for all tests that leave it as it was."""
    with servers(adapter_dir) as make:
        yield make("dora4", "lora8")


@pytest.fixture(scope="session")
def served():
    """A model whose template shows tools, and which thinks if the prompt lets it."""
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    config = ServeConfig(model="base", kv_tokens=4096, max_batch_tokens=512, max_batch=8)
    with Server(Engine(tiny.tiny_model(max_position_embeddings=1024), config), tokenizer) as running:
        yield running
