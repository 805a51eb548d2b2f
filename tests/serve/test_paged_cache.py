"""What is changed about transformers' cache of pages, apart from what whole engines show."""

from types import SimpleNamespace

import torch

from theodora.serve.paged_cache import keep_cache_finite


class Cache(SimpleNamespace):
    """As transformers 5.24's: the arguments of attention say where the pages are, and are changed in place."""

    def update(self, key_states, value_states, layer_idx, kwargs):
        kwargs["max_length_k"] = kwargs["max_length_k"][f"layer {layer_idx}"]
        return key_states, value_states


def attention_that_hands_on(cache, key, **kwargs):
    cache.update(key, key, 1, kwargs=kwargs)
    return kwargs["max_length_k"]


def attention_that_does_not(cache, key, **kwargs):
    """GPT-NeoX's in 5.24."""
    cache.update(key, key, 1)
    return kwargs["max_length_k"]


def test_an_attention_that_does_not_hand_on_its_arguments_finds_its_pages():
    cache = Cache(max_batch_tokens=4, device="cpu", dtype=torch.float32)
    keep_cache_finite(cache)
    for attention in (attention_that_hands_on, attention_that_does_not):
        assert attention(cache, torch.zeros(1, 2, 3, 4), max_length_k={"layer 1": 7}) == 7
