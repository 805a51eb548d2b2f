"""Answers of a mixed batch against each adapter alone, on a model of its own, by plain forward passes."""

import itertools

import pytest

from serving import ADAPTERS, alone, expected
from theodora.serve.requests import Sampling
from tiny import FAMILIES

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20, 30, 40], [n % 250 + 3 for n in range(80)]]


def greedy(engine, prompt, adapter, count=8, **options):
    return engine.submit(prompt, Sampling(max_tokens=count, temperature=0.0, **options), adapter, every_token=False)


def check(request, model, prompt, count=8):
    output = request.updates.get(timeout=60)
    tokens, logprobs = expected(model, prompt, count)
    assert output.error is None
    assert output.generated_tokens == tokens
    assert output.logprobs == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_answers_as_each_adapter_alone(family, engine_of, adapter_dir):
    engine = engine_of(family, *ADAPTERS, slots=6)
    asked = [(p, name) for p, name in itertools.product(PROMPTS, (None, *ADAPTERS))]
    requests = [greedy(engine, prompt, name) for prompt, name in asked]
    for request, (prompt, name) in zip(requests, asked, strict=True):
        check(request, alone(family, name, name and adapter_dir(name, family)), prompt)
    assert engine.under_way() == 0
