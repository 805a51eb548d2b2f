"""Prompts answered together on a CUDA device: the tokens of `generate`, through CUDA graphs, and memory given back."""

import gc

import pytest
import torch

from serving import trained
from theodora import accelerate
from theodora.evaluate.decoding import decoding
from theodora.serve import offline
from tiny import tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ENDS, MOST = [2, 77, 140], 12


@torch.inference_mode()
def generated(model, prompts):
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device="cuda")
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=decoding(ENDS, MOST)
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("adapter", [None, "dora4", "lora8"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_the_tokens_are_those_of_generate_and_steps_are_recorded(family, adapter, fast, monkeypatch):
    model = tiny_model(family)
    if adapter is not None:
        trained(model, adapter)
    model = model.to("cuda").eval()
    if fast:
        accelerate(model)
    graphs = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: graphs.append(1) or replay(graph))
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 260, (3 + n % 40,), generator=generator).tolist() for n in range(70)]
    expected = generated(model, prompts)
    before = torch.cuda.get_rng_state()
    with torch.inference_mode():
        assert offline.answer_together(model, prompts, decoding(ENDS, MOST)) == expected
    assert model not in offline._NOT_RECORDED
    assert graphs
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_memory_is_given_back():
    model = trained(tiny_model(), "dora4").to("cuda").eval()
    prompts = [[5 + n, 6, 7] for n in range(20)]
    offline.answer_together(model, prompts, decoding(ENDS, MOST))
    gc.collect()
    torch.cuda.empty_cache()
    taken = torch.cuda.memory_allocated()
    for _ in range(3):
        offline.answer_together(model, prompts, decoding(ENDS, MOST))
    gc.collect()
    assert torch.cuda.memory_allocated() <= taken + 2**20
