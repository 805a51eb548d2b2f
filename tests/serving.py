"""What tests of serving share: adapters, what answers must be, and a server that the official client asks."""

import socket
import threading
import time
from functools import cache

import openai
import torch
import uvicorn

import tiny
from theodora import AdapterConfig, inject_adapter
from theodora.adapters.load import load_adapter
from theodora.serve.run import server_settings

# Name -> method, rank, targets. Two of each kind, several ranks, one with the head and one with embeddings.
ADAPTERS = {
    "dora4": ("dora", 4, "all-linear"),
    "lora8": ("lora", 8, "all-linear"),
    "dora3": ("dora", 3, "all-linear"),
    "lora1": ("lora", 1, r".*(q_proj|down_proj|query_key_value|c_attn|qkv_proj)"),
    "head": ("dora", 5, r".*(lm_head|embed_out|o_proj)"),
    "rows": ("dora", 2, r".*(embed_tokens|wte|embed_in)"),
}


def trained(model, name, seed=0):
    """Put a random adapter on the model, as if it had been trained."""
    method, rank, targets = ADAPTERS[name]
    torch.manual_seed(sum(name.encode()) + seed)
    inject_adapter(model, AdapterConfig(method=method, rank=rank, targets=targets))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@cache
def alone(family, name, folder):
    """The model with that adapter only, as `load_adapter` gives it: what served answers are held against."""
    model = tiny.tiny_model(family)
    return model if folder is None else load_adapter(model, folder, name).eval()


@torch.no_grad()
def expected(model, prompt, count):
    """Greedy tokens and their log-probabilities, by plain forward passes over everything."""
    ids, tokens, logprobs = list(prompt), [], []
    for _ in range(count):
        logits = model(torch.tensor([ids])).logits[0, -1]
        tokens.append(int(logits.argmax()))
        logprobs.append(float(logits.log_softmax(-1)[tokens[-1]]))
        ids.append(tokens[-1])
    return tokens, logprobs


def settled(engine):
    """Nothing runs, waits or is held."""
    deadline = time.monotonic() + 60  # that it settles is what counts
    while time.monotonic() < deadline:
        cache = engine.worker.manager.batch_processor.cache
        managers = getattr(cache, "group_cache_managers", None) or cache.cache_allocators.values()  # 5.17's name first
        tables = [table for manager in managers for table in manager.block_table]
        if engine.under_way() == engine.running() == 0 and not tables:
            return all(adapter.users == 0 for adapter in engine.adapters.adapters())
        time.sleep(0.02)
    return False


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Running:
    """A server in a thread of its own."""

    def __init__(self, settings):
        self.server = uvicorn.Server(settings)
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


class Server(Running):
    """A running server: `.client` (openai), `.url`, `.engine`."""

    def __init__(self, engine, tokenizer):
        self.engine, self.tokenizer = engine, tokenizer
        self.port = free_port()
        super().__init__(server_settings(engine, tokenizer, port=self.port, timeout_graceful_shutdown=5))
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=60)

    def __exit__(self, *_):
        self.client.close()
        super().__exit__()
