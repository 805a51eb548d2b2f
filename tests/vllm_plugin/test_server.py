"""The plug-in behind vLLM's OpenAI-compatible server: adapters loaded while it runs, requests of all kinds at once."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cases import PROMPTS, TOKENS, peft_answers, save_adapter, save_model

import tiny

NAMES = ("lora", "dora", "dora2")
_START = 300  # seconds


def ask(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        text = answer.read()
    try:
        return json.loads(text)
    except ValueError:
        return text.decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    save_model(folder / "base", "qwen2")
    for name in NAMES:
        save_adapter(folder / name, folder / "base", "qwen2", name)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    """Its URL; one DoRA adapter is there from the start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "base")]
    command += ["--served-model-name", "base", "--dtype", "float32", "--enable-lora", "--max-loras", "3"]
    command += ["--max-lora-rank", "8", "--max-model-len", "128", "--max-num-seqs", "12", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--lora-modules", f"dora={folder / 'dora'}"]
    log = (folder / "log.txt").open("w")
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    url = f"http://127.0.0.1:{port}"
    end = time.monotonic() + _START
    try:
        while True:
            try:
                ask(f"{url}/health")
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > end:
                    pytest.fail((folder / "log.txt").read_text()[-4000:])
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def complete(url, prompt, name):
    body = {"model": name or "base", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    body |= {"logprobs": 1, "return_tokens_as_token_ids": True}
    tokens = ask(f"{url}/v1/completions", body)["choices"][0]["logprobs"]["tokens"]
    return [int(token.removeprefix("token_id:")) for token in tokens]


def test_adapters_loaded_while_it_runs_answer_as_peft(server, folder):
    for name in ("lora", "dora2"):
        ask(f"{server}/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder / name)})
    assert {m["id"] for m in ask(f"{server}/v1/models")["data"]} == {"base", *NAMES}
    asked = [(prompt, name) for prompt in PROMPTS for name in (None, *NAMES)]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda pair: complete(server, *pair), asked))
    expected = {n: peft_answers(folder / "base", folder / n if n else None) for n in (None, *NAMES)}
    for (prompt, name), tokens in zip(asked, found, strict=True):
        assert tokens == expected[name][PROMPTS.index(prompt)][0], (prompt, name)


def test_a_bad_adapter_is_refused_and_the_rest_goes_on(server, folder):
    broken = folder / "broken"
    broken.mkdir()
    config = json.loads((folder / "dora" / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))
    (broken / "adapter_model.safetensors").write_bytes((folder / "dora" / "adapter_model.safetensors").read_bytes())
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(f"{server}/v1/load_lora_adapter", {"lora_name": "broken", "lora_path": str(broken)})
    assert "use_dora: false" in refused.value.read().decode()
    assert complete(server, PROMPTS[0], "dora") == peft_answers(folder / "base", folder / "dora")[0][0]
    ask(f"{server}/v1/unload_lora_adapter", {"lora_name": "dora"})
    with pytest.raises(urllib.error.HTTPError):
        complete(server, PROMPTS[0], "dora")
    ask(f"{server}/v1/load_lora_adapter", {"lora_name": "dora", "lora_path": str(folder / "dora")})
    assert complete(server, PROMPTS[1], "dora") == peft_answers(folder / "base", folder / "dora")[1][0]


def test_verify_agrees_with_the_server(server, folder):
    from theodora.export import verify

    ids = len(tiny.tiny_tokenizer()(PROMPTS[0])["input_ids"])
    for name in ("dora", "dora2", "lora"):
        config = folder / name / "adapter_config.json"
        config.write_text(
            json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(folder / "base")})
        )
        found = verify(
            str(folder / name), f"{server}/v1#{name}", text=" ".join(PROMPTS), tokens=2 * ids, bound=1e-3, kl_bound=1e-6
        )
        assert found.passed, found
    other = verify(str(folder / "dora"), f"{server}/v1#base", text=" ".join(PROMPTS), tokens=2 * ids)
    assert not other.passed
