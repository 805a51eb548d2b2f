"""What is asked of vLLM, with another engine in its place, and what is refused. tests/vllm_plugin has the real one."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from transformers import Qwen2VLConfig

import tiny
from serving import trained
from theodora import ConfigError, DataError, TheodoraError, TrainConfig, inject_adapter
from theodora.adapters.state import trained_tensors
from theodora.config import AdapterConfig
from theodora.files.adapter import read_adapter
from theodora.train import beforehand, vllm_rollouts
from theodora.train.objectives import settings_of
from theodora.train.rollouts import Drawing, Rollouts
from theodora.train.vllm_rollouts import ByVllm, VllmRollouts, check_vllm, rollouts_of
from tiny import tiny_model
from train.rewarded import reward, saved

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Recorded:
    """An engine that says what it was asked, and draws tokens made of the seeds."""

    made: ClassVar = []
    closed = False

    def __init__(self, model, **settings):
        self.model, self.settings, self.taken, self.asked = model, settings, [], []
        self.logp = -1.0
        Recorded.made.append(self)

    def take(self, folder):
        self.taken.append(read_adapter(folder))
        self.folder = folder

    def draw(self, prompts, seeds, **how):
        self.asked.append((prompts, seeds, how))
        return [([3 + seed % 250] * 2, [self.logp] * 2) for seed in seeds]

    def close(self):
        self.closed = True


@pytest.fixture(autouse=True)
def engines(monkeypatch):
    monkeypatch.setattr(vllm_rollouts, "Engine", Recorded)
    monkeypatch.setattr(vllm_rollouts, "find_spec", lambda name: object())
    monkeypatch.setattr(Recorded, "made", [])
    return Recorded.made


def vllm_rollouts_of(model, drawing=None, ends=(2, 10_000), most=4, longest=9, **how):
    return VllmRollouts(model, drawing or Drawing(), ends, most, rows=7, longest=longest, how=ByVllm(model="m", **how))


def test_what_draws_is_chosen_by_the_options():
    model = trained(tiny_model(), "dora4")
    assert isinstance(rollouts_of(model, Drawing(), [2], 4, 8, 9, None), Rollouts)
    assert isinstance(rollouts_of(model, Drawing(), [2], 4, 8, 9, ByVllm(model="m")), VllmRollouts)


def test_each_drawing_is_by_the_adapter_as_it_is_then(engines):
    model = trained(tiny_model(), "dora4")
    rollouts = vllm_rollouts_of(model)
    for number in range(3):
        rollouts([[5, 6]], number)
        file = engines[0].taken[-1]
        assert not Path(engines[0].folder).exists()
        assert file.config.method == "dora"
        for path, tensors in file.modules.items():
            adapter = model.get_submodule(path).adapters["default"]
            torch.testing.assert_close(tensors.magnitude, adapter.magnitude, rtol=0, atol=0)
            torch.testing.assert_close(tensors.a, adapter.lora_A, rtol=0, atol=0)
            torch.testing.assert_close(tensors.b, adapter.lora_B, rtol=0, atol=0)
        with torch.no_grad():
            for parameter in trained_tensors(model).values():
                parameter.mul_(1.1)
    assert len(engines) == 1


def test_where_there_is_no_room_in_memory_the_folder_lies_elsewhere(engines, monkeypatch):
    model = trained(tiny_model(), "dora4")
    monkeypatch.setattr(vllm_rollouts, "disk_usage", lambda path: SimpleNamespace(free=2**24 + 1000))
    assert vllm_rollouts._place(model) is None
    vllm_rollouts_of(model)
    assert not engines[0].folder.startswith("/dev/shm")


def test_vllm_is_asked_what_the_options_say(engines):
    model = trained(tiny_model(), "dora4")
    drawing = Drawing(temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.2)
    rollouts = vllm_rollouts_of(model, drawing, gpu_memory_utilization=0.2, revision="v1", trust_remote_code=True)
    said = []
    rollouts([[5], [5], [6]], 3, over=lambda: said.append(1))
    (engine,) = engines
    wanted = {"dtype": "float32", "rank": 4, "length": 13, "rows": 7, "temperature": 0.7, "filters": True}
    wanted |= {"eager": True, "share": 0.2, "sleeps": False, "revision": "v1", "trust_remote_code": True}
    assert (engine.model, engine.settings) == ("m", wanted)
    tried, (prompts, seeds, how) = engine.asked
    assert tried[2]["max_tokens"] == 1
    assert prompts == [[5], [5], [6]]
    filters = {"top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
    assert how == {"max_tokens": 4, "ends": [2], **filters}  # a token that there is not never ends anything
    assert len(said) == 3
    assert len({*seeds}) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)
    rollouts([[5], [6]], 3, places=[1, 2])  # random numbers go by the seed and the place
    rollouts([[5], [5], [6]], 4)
    assert engine.asked[2][1] == seeds[1:]
    assert not {*engine.asked[3][1]} & {*seeds}
    vllm_rollouts_of(model)([[5]], 0)
    assert engines[1].settings["filters"] is False
    assert engines[1].asked[1][2] == {"max_tokens": 4, "ends": [2]}


def test_memory_goes_back_until_the_next_call(engines):
    rollouts = vllm_rollouts_of(trained(tiny_model(), "lora8"))
    rollouts.release(for_good=True)
    assert not engines[0].closed  # to load it for each step would take longer than the step
    rollouts.release()
    rollouts.release()
    assert engines[0].closed
    rollouts([[5]], 0)
    assert len(engines) == 2
    assert engines[1].taken


def test_what_cannot_be_drawn_is_refused(engines):
    rollouts = vllm_rollouts_of(trained(tiny_model(), "dora4"))
    with pytest.raises(DataError, match="without tokens"):
        rollouts([[5], []], 0)
    with pytest.raises(DataError, match="10 tokens, and vLLM takes 13, with 4 of"):
        rollouts([[5] * 10], 0)
    engines[0].logp = math.nan
    with pytest.raises(TheodoraError, match="not finite"):
        rollouts([[5]], 0)


def test_what_vllm_says_of_a_model_is_said(engines, monkeypatch):
    def fails(self, *args, **kwargs):
        raise RuntimeError("Unsupported head_dim")

    monkeypatch.setattr(Recorded, "draw", fails)
    with pytest.raises(ConfigError, match=r"(?s)vLLM cannot draw.*Unsupported head_dim.*Leave use_vllm out"):
        vllm_rollouts_of(trained(tiny_model(), "dora4"))
    assert engines[0].closed


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ({"targets": ["embed_tokens", "q_proj"]}, "embed_tokens: adapters on embeddings"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight: trained whole"),
        ({"trainable_token_indices": [5]}, "rows of tokens"),
        ({"rank": 520}, "rank 520, and vLLM takes at most 512"),
    ],
)
def test_an_adapter_that_vllm_would_take_in_part_is_refused(adapter, told, engines):
    model = inject_adapter(tiny_model(), AdapterConfig(**{"rank": 4, **adapter}))
    with pytest.raises(ConfigError, match=f"(?s){told}.*Leave use_vllm out"):
        vllm_rollouts_of(model)
    assert not engines


def check(device=CPU, processes=1, model_config=None, **options):
    given = {"model": "m", "data": "d", "output": "o", "objective": "grpo", "reward": ["length:9"], "use_vllm": True}
    config = TrainConfig.from_options(given | options)
    settings = settings_of(config)
    check_vllm(
        config,
        settings.vllm,
        settings.drawing,
        model_config=model_config,
        device=device,
        processes=processes,
        longest=300,
    )


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"processes": 2}, "2 processes train together; expected one"),
        ({"quantize": "nf4"}, "quantised as it is loaded \\(nf4\\)"),
        ({"base_dtype": "fp8"}, "quantised as it is loaded \\(fp8\\)"),
        ({"modules_to_save": ["lm_head"]}, "lm_head. are whole weights"),
        ({"trainable_token_indices": [1]}, "rows that vLLM does not take"),
        ({"experts": True}, "experts are not scaled"),
        ({"rank_pattern": {"q_proj": 600}}, "rank is 600; vLLM takes at most 512"),
        ({"model_init_kwargs": {"rope_scaling": {}, "attn_implementation": "sdpa"}}, "holds rope_scaling, which vLLM"),
        ({"vllm_max_model_length": 299}, "is 299; expected at least 300"),
        ({"vllm_enable_sleep_mode": True}, "a GPU's memory back, and this runs on cpu"),
        ({"temperature": 0.001}, "temperature is 0.001; expected at least 0.01"),
    ],
)
def test_a_run_that_vllm_cannot_draw_for_is_refused_beforehand(given, told):
    with pytest.raises(ConfigError, match=f"(?s){told}.*Leave use_vllm out"):
        check(**given)


def test_what_a_model_is_stored_as_is_looked_at_beforehand():
    config = tiny_model().config
    check(model_config=config, vllm_max_model_length=300)
    check(device=GPU, vllm_enable_sleep_mode=True)
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    with pytest.raises(ConfigError, match="stored quantised"):
        check(model_config=config)


def test_parts_beside_text_have_other_names():
    with pytest.raises(ConfigError, match="parts beside text"):
        check(model_config=Qwen2VLConfig())


def test_without_vllm_it_says_what_to_type(monkeypatch):
    monkeypatch.setattr(vllm_rollouts, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="vLLM is not installed: pip install theodora vllm"):
        check()


def test_a_step_has_what_vllm_leaves_of_the_memory():
    options = {"model": "m", "data": "d", "output": "o", "objective": "grpo", "reward": ["length:9"], "use_vllm": True}
    config = TrainConfig.from_options(options | {"vllm_gpu_memory_utilization": 0.4})
    assert beforehand._share_of_vllm(config) == 0.4
    assert beforehand._share_of_vllm(TrainConfig.from_options(options | {"use_vllm": False})) == 0
    machine = beforehand.plan.Machine(device="cuda", memory=100, gpus=1)
    assert beforehand._beside_vllm(machine, 0.4).memory == 60


def test_a_run_draws_by_it_and_lets_it_go(run, tmp_path, engines):
    base = saved(tiny.tiny_model(), tmp_path / "base")
    given = {"model": base, "objective": "grpo", "reward": [reward("low")], "num_generations": 4}
    given |= {"per_device_train_batch_size": 8, "max_completion_length": 6, "max_length": 64, "held_out": 2}
    run(**given, use_vllm=True, max_steps=2)
    (engine,) = engines
    assert engine.model == base
    assert engine.settings["rows"] == 8
    # beforehand, in each of two steps, and for held-out prompts before and after
    assert len(engine.taken) == len(engine.asked) >= 5
    assert engine.closed
    first, last = (next(iter(file.modules.values())) for file in (engine.taken[0], engine.taken[-1]))
    assert not torch.equal(first.b, last.b)
    recorded = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("sampling/sampling_logp_difference/mean", 0) > 0.1 for line in recorded)  # it says -1 of all
