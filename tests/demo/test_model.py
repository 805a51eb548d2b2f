"""The demo's model, from a GGUF file to a folder, once."""

import io
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from exports import adapter_folder
from theodora.demo.model import cached_model, convert
from theodora.errors import CheckpointError, UsageError
from theodora.export import export_adapter
from tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def gguf(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    adapter = adapter_folder(folder / "adapter", tiny_model_dir())
    export_adapter(adapter, folder / "m.gguf", "gguf", dtype="fp32", check=False)
    export_adapter(adapter, folder / "merged", "hf", check=False)
    return folder


@pytest.fixture
def read_tokenizer(monkeypatch):
    """transformers reads the tokenizers of GGUF files that have merges or scores, which the tiny one has not."""
    reader = SimpleNamespace(from_pretrained=lambda folder, gguf_file, trust_remote_code: tiny_tokenizer())
    monkeypatch.setattr(sys.modules["theodora.demo.model"], "AutoTokenizer", reader)


def test_a_converted_model_is_the_files(gguf, tmp_path, read_tokenizer):
    convert(gguf / "m.gguf", tmp_path / "model")
    ids = torch.arange(3, 40)[None]
    found, expected = (AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "model", gguf / "merged"))
    torch.testing.assert_close(found(ids).logits, expected(ids).logits, atol=1e-4, rtol=0)
    assert not hasattr(found.config, "quantization_config")
    digits = AutoTokenizer.from_pretrained(tmp_path / "model").backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 12")
    assert [piece for piece, _ in digits][-2:] == ["1", "2"]
    assert "Apache-2.0" in (tmp_path / "model" / "README.md").read_text()


def test_a_damaged_file_leaves_nothing(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(CheckpointError, match=r"m\.gguf cannot be read as a GGUF model"):
        convert(tmp_path / "m.gguf", tmp_path / "model")
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_the_model_is_fetched_and_converted_once(gguf, tmp_path, monkeypatch, read_tokenizer):
    module = sys.modules["theodora.demo.model"]
    monkeypatch.setenv("THEODORA_CACHE", str(tmp_path))
    fetched = []
    monkeypatch.setattr(module, "fetch", lambda asset, console: fetched.append(asset) or gguf / "m.gguf")
    console = Console(file=io.StringIO(), width=200)
    with monkeypatch.context() as patch:
        patch.setattr(module.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UsageError, match=r"pip install 'theodora\[demo\]'"):
            cached_model(console)
    first = cached_model(console)
    assert cached_model(console) == first
    assert fetched == [module.MODEL]
    assert (first / "config.json").is_file()
