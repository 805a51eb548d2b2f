"""How vLLM is asked: what is called, in which order, in a stand-in for it. test_rollouts.py has what it answers."""

import os
import random
import sys
import types

import pytest
import torch

from theodora.errors import ConfigError
from theodora.vllm_plugin import engine as engine_module
from theodora.vllm_plugin.engine import Engine


class Told:
    """What was called."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, *args, *kwargs.values()))
            return self.taken if name == "add_lora" else None

        return call


@pytest.fixture
def told(monkeypatch):
    told = Told()
    told.taken, told.settings, told.environment = True, [], None

    class LLM:
        def __init__(self, model, **settings):
            told.settings.append(settings)
            told.environment = os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
            random.random(), torch.rand(1)
            self.llm_engine = told
            told.engine_core = types.SimpleNamespace(shutdown=lambda: told.calls.append(("shutdown",)))

        def __getattr__(self, name):
            return getattr(told, name)

        def generate(self, prompts, settings, lora_request, use_tqdm):
            told.calls.append(("generate", lora_request.name))
            step = {7: types.SimpleNamespace(logprob=-0.5)}
            answer = types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=[7], logprobs=[step])])
            return [answer] * len(prompts)

    def request(name, number, folder):
        return types.SimpleNamespace(name=name, lora_int_id=number, folder=folder)

    modules = {
        "vllm": {"LLM": LLM, "SamplingParams": dict},
        "vllm.distributed": {},
        "vllm.distributed.parallel_state": {"cleanup_dist_env_and_memory": lambda: told.calls.append(("cleaned",))},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": request},
    }
    for name, holds in modules.items():
        module = types.ModuleType(name)
        vars(module).update(holds)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(engine_module, "register", lambda: told.calls.append(("register",)))
    return told


def engine_of(**others):
    return Engine("m", **{"dtype": "float32", "rank": 9, "length": 64, "rows": 8} | others)


def drawn_twice(engine):
    for folder in ("one", "two"):
        engine.take(folder)
        assert engine.draw([[5], [6]], [1, 2], max_tokens=1, ends=[2]) == [([7], [-0.5])] * 2


def names_of(calls):
    return [call[0] if call[0] != "generate" else call for call in calls]


def test_an_adapter_takes_the_place_of_the_one_before_under_another_name(told):
    engine = engine_of()
    drawn_twice(engine)
    first, second = ("generate", "policy-1"), ("generate", "policy-2")
    assert names_of(told.calls) == ["register", "add_lora", first, "remove_lora", "add_lora", second]
    assert told.calls[3] == ("remove_lora", 1)
    engine.close()
    engine.close()
    assert names_of(told.calls)[6:] == ["shutdown"]
    assert engine.closed


def test_its_memory_is_given_back_between_drawings(told):
    drawn_twice(engine_of(sleeps=True))
    first, second = ("generate", "policy-1"), ("generate", "policy-2")
    again = ["wake_up", "remove_lora", "add_lora", second, "sleep"]
    assert names_of(told.calls) == ["register", "sleep", "wake_up", "add_lora", first, "sleep", *again]
    assert told.settings[0]["enable_sleep_mode"] is True


@pytest.mark.parametrize(
    ("temperature", "filters", "mode", "divides"),
    [
        (1.0, False, "raw_logprobs", False),
        (1.0, True, "raw_logprobs", False),
        (0.7, False, "processed_logprobs", False),
        (0.7, True, "raw_logprobs", True),
    ],
)
def test_log_probabilities_are_of_what_the_temperature_leaves(temperature, filters, mode, divides, told):
    engine_of(temperature=temperature, filters=filters)
    assert told.settings[0]["logprobs_mode"] == mode
    changes = [call[1] for call in told.calls if call[0] == "apply_model"]
    assert bool(changes) == divides
    if divides:
        model = types.SimpleNamespace(logits_processor=types.SimpleNamespace(scale=1.0))
        changes[0](model)
        assert model.logits_processor.scale == pytest.approx(1 / 0.7)


def test_vllm_leaves_no_trace(told):
    before = random.getstate(), torch.get_rng_state(), dict(os.environ), torch.set_num_threads
    engine_of()
    assert told.environment == "0"
    assert told.settings[0]["max_lora_rank"] == 16
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert dict(os.environ) == before[2]
    assert torch.set_num_threads is before[3]


def test_another_engine_is_closed(told):
    first, second = engine_of(), engine_of()
    assert first.closed
    assert not second.closed


def test_what_is_not_taken_is_said(told):
    told.taken = False
    with pytest.raises(ConfigError, match="did not take the adapter"):
        engine_of().take("one")


def test_what_was_begun_is_cleaned(told, monkeypatch):
    def fails(self, *args, **kwargs):
        raise ValueError("no memory\nat all")

    monkeypatch.setattr(sys.modules["vllm"].LLM, "__init__", fails)
    with pytest.raises(ConfigError, match=r"does not load m in 0.3 of the memory .*: no memory$"):
        engine_of()
    assert ("cleaned",) in told.calls
