"""Completions to learn from, drawn by a real vLLM: those of the model in training, as it is then."""

import copy
import json
import logging
import sys
import weakref
from pathlib import Path

import pytest
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))

from cases import PROMPTS, SIZES, save_model
from transformers import AutoModelForCausalLM

import tiny
from serving import trained
from theodora import ConfigError, TrainConfig
from theodora.adapters.state import trained_tensors
from theodora.train import train
from theodora.train.rollouts import Drawing, Rollouts
from theodora.train.vllm_rollouts import ByVllm, VllmRollouts
from train.rewarded import forward_logps, reward, saved, tokens_of

MOST, SHARE = 12, 0.1
ENDS = [2, *range(60, 80)]
LIKELIEST = Drawing(top_k=1)


@pytest.fixture(autouse=True)
def _unlogged():
    """Without what is logged, which pytest would keep, and vLLM's model with it."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("drawn") / "base", "qwen2")


def adapted(base, adapter="dora4"):
    return trained(AutoModelForCausalLM.from_pretrained(base), adapter)


@pytest.fixture(scope="module")
def prompts():
    tokenizer = tiny.tiny_tokenizer()
    return [tokenizer(text)["input_ids"] for text in PROMPTS] * 2


@pytest.fixture
def rollouts_of(base):
    made = []

    def make(model, drawing, **options):
        options = {"rows": 8, "longest": 40, "how": ByVllm(model=str(base), gpu_memory_utilization=SHARE)} | options
        made.append(VllmRollouts(model, drawing, ENDS, MOST, **options))
        return made[-1]

    yield make
    for other in made:
        other.release()


def manager(rollouts):
    worker = rollouts._engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return worker.model_runner.lora_manager._adapter_manager


@pytest.mark.parametrize("adapter", ["dora4", "lora8"])
def test_it_draws_what_the_model_in_training_draws_as_it_is_then(adapter, base, prompts, rollouts_of):
    model = adapted(base, adapter).train()
    own = Rollouts(model, LIKELIEST, ENDS, MOST)
    threads, level, before = torch.set_num_threads, logging.getLogger("vllm").level, torch.get_rng_state()
    rollouts = rollouts_of(model, LIKELIEST)
    first = tokens_of(rollouts(prompts, 1))
    assert first == tokens_of(own(prompts, 1))
    assert any(tokens[-1] in ENDS for tokens in first)  # with the one that ends it
    assert any(len(tokens) == MOST and tokens[-1] not in ENDS for tokens in first)
    found = [first]
    trained_ones = trained_tensors(model)
    parts = ("magnitude", "lora_B") if adapter == "dora4" else ("lora_A", "lora_B")
    for part in parts:  # in place, as a step leaves them; the same prompts, which vLLM remembers
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in trained_ones.items():
                if part in name:
                    parameter.mul_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
        found.append(tokens_of(rollouts(prompts, 1)))
        assert found[-1] == tokens_of(own(prompts, 1)), part
    assert len({str(tokens) for tokens in found}) == 3
    assert len(manager(rollouts).list_adapters()) == 1  # the others are forgotten
    # What vLLM does for itself leaves no trace in the process.
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.set_num_threads is threads
    assert logging.getLogger("vllm").level == level
    weights = weakref.ref(manager(rollouts).model)
    rollouts.release()
    assert weights() is None
    assert not torch.distributed.is_initialized()
    assert tokens_of(rollouts(prompts, 1)) == found[-1]


@pytest.mark.parametrize(
    "drawing",
    [
        Drawing(temperature=0.7),
        Drawing(temperature=0.7, top_k=40, top_p=0.9),
        Drawing(repetition_penalty=1.7, min_p=0.05),
    ],
)
def test_log_probabilities_mean_what_ours_mean(drawing, base, prompts, rollouts_of):
    model = adapted(base)
    rollouts = rollouts_of(model, drawing)
    completions = rollouts(prompts, 3)
    exact = copy.deepcopy(model).double().eval()
    for prompt, each in zip(prompts, completions, strict=True):
        expected = forward_logps(exact, prompt, each.tokens, drawing.temperature)
        torch.testing.assert_close(torch.tensor(each.logps).double(), expected, rtol=0, atol=1e-4)
    # A seed and a place give the same tokens, others other ones; completions of one prompt differ.
    again = tokens_of(rollouts(prompts[3:], 3, places=[3, 4, 5]))
    assert again == tokens_of(completions)[3:]
    assert tokens_of(rollouts(prompts, 4)) != tokens_of(completions)
    assert tokens_of(completions)[:3] != tokens_of(completions)[3:]


def test_in_bfloat16_it_is_as_close_to_the_formula_as_training_is(base, prompts, rollouts_of):
    model = trained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), "dora4").eval()
    exact = copy.deepcopy(model).double()
    off, own = [], []
    for prompt, each in zip(prompts, rollouts_of(model, Drawing(temperature=0.7, top_p=0.9))(prompts, 1), strict=True):
        right = forward_logps(exact, prompt, each.tokens, 0.7)
        off.append((torch.tensor(each.logps) - right).abs())
        own.append((forward_logps(model, prompt, each.tokens, 0.7) - right).abs())
    assert float(torch.cat(off).mean()) < 2 * float(torch.cat(own).mean())


def test_tokens_come_as_often_as_the_softmax_says(base, rollouts_of):
    model, prompt = adapted(base), [5, 9, 30]
    with torch.no_grad():
        chances = (model.eval()(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
    kept = chances.topk(5)
    rollouts = rollouts_of(model, Drawing(temperature=0.7, top_k=5), rows=64)
    drawn = torch.tensor([each.tokens[0] for each in rollouts([prompt] * 1000, 0)])
    shares = torch.tensor([float((drawn == token).float().mean()) for token in kept.indices])
    assert float(shares.sum()) == pytest.approx(1)
    torch.testing.assert_close(shares, kept.values / kept.values.sum(), rtol=0, atol=0.06)


def test_dora_without_a_proof_is_refused(base, prompts, rollouts_of):
    rollouts = rollouts_of(adapted(base), LIKELIEST)
    for module in manager(rollouts).modules.values():
        module.dora_unproved = "it was off by a mile"
    with pytest.raises(ConfigError, match="off by a mile"):
        rollouts(prompts, 1)


def test_one_that_was_left_open_makes_room_and_comes_back(base, prompts, rollouts_of):
    first = rollouts_of(adapted(base), LIKELIEST)
    drawn = tokens_of(first(prompts, 1))
    second = rollouts_of(adapted(base, "lora8"), LIKELIEST)
    assert tokens_of(second(prompts, 1)) != drawn
    assert tokens_of(first(prompts, 1)) == drawn


def test_weights_that_vllm_cannot_load_are_said(base, tmp_path):
    how = ByVllm(model=str(tmp_path), gpu_memory_utilization=SHARE)
    with pytest.raises(ConfigError, match=r"(?s)vLLM does not load .*Leave use_vllm out"):
        VllmRollouts(adapted(base), LIKELIEST, ENDS, MOST, rows=8, longest=40, how=how)


def test_a_run_learns_from_them(tmp_path):
    base = saved(tiny.tiny_model("qwen2", **SIZES), tmp_path / "base")
    rows = [json.dumps({"prompt": "say " + "so " * n}) for n in range(12)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    options = {"model": base, "data": str(tmp_path / "data.jsonl"), "output": str(tmp_path / "run"), "bf16": False}
    options |= {"objective": "grpo", "reward": [reward("low")], "num_generations": 8, "held_out": 2, "warmup_steps": 0}
    options |= {"per_device_train_batch_size": 16, "max_completion_length": 6, "max_length": 64, "learning_rate": 2e-2}
    options |= {"max_steps": 6, "eval_steps": 6, "use_vllm": True, "vllm_gpu_memory_utilization": SHARE}
    with (tmp_path / "said").open("w") as said:
        train(TrainConfig.from_options(options, granted=["reward"]), console=Console(file=said, width=300))
    assert "vLLM 0" in (tmp_path / "said").read_text()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["reward"] for line in lines if "reward" in line]
    assert sum(rewards[-2:]) > sum(rewards[:2]) + 0.1
    off = [line[name] for line in lines if (name := "sampling/sampling_logp_difference/mean") in line]
    assert len(off) == 6
    assert max(off) < 1e-4
    assert not torch.distributed.is_initialized()
