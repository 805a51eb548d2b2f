"""grpo in the light loop: the steps of `theodora train`, whatever way they take."""

import json
import sys
from collections import Counter

import pytest
import torch
from transformers import set_seed

from theodora.adapters import inject_adapter
from theodora.adapters.models import load_model
from theodora.config import AdapterConfig, TrainConfig
from theodora.data import PromptRows, load_examples, tokenize_prompts
from theodora.files.tokenizer import load_tokenizer
from theodora.train.fused_loss import fused_head
from theodora.train.light import LightSettings
from theodora.train.light_policy import Policy, Prompts, judge, train_policy
from theodora.train.objectives import settings_of
from theodora.train.reference import Reference
from theodora.train.rewards import Rewards
from theodora.train.rollouts import Rollouts
from tiny import tiny_model
from train.rewarded import reward, saved

SHARED = {"num_generations": 4, "max_completion_length": 6, "seed": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved(tiny_model(), tmp_path_factory.mktemp("ends"))


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    path = tmp_path_factory.mktemp("few") / "few.jsonl"
    path.write_text("".join(json.dumps({"prompt": "say " + "so " * n, "answer": n}) + "\n" for n in range(6)))
    return str(path)


def light(base, asked, steps, head=None, rewards=("low",), learning_rate=1e-2, **options):
    """Train a model, two prompts in a step, and give what came out, with the model and what it was asked."""
    model, tokenizer = load_model(base, dtype="float32").requires_grad_(False), load_tokenizer(base)
    head = fused_head(model) if head is None else head
    examples = load_examples(asked, kind="prompts")
    rows = tokenize_prompts(examples, tokenizer, max_prompt=58)
    prompts = Prompts(tokens=rows["input_ids"], rows=rows["row"], told=PromptRows(examples))
    set_seed(SHARED["seed"])
    inject_adapter(model, AdapterConfig())
    given = {"model": base, "data": asked, "output": "o", "objective": "grpo", "reward": ["exact_match"]}
    own = settings_of(TrainConfig.from_options(given | SHARED | options))
    found = Rewards([reward(name) for name in rewards])
    reference = Reference(model, None)
    policy = Policy(settings=own, prompts=prompts, rewards=found, weights=found.weights, reference=reference)
    settings = LightSettings(
        steps=steps, batch_size=2, learning_rate=learning_rate, warmup_steps=0, seed=SHARED["seed"]
    )
    result = train_policy(model, policy, settings, tokenizer=tokenizer, head=head)
    return result, model, prompts, found, tokenizer, head


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"beta": 0.3, "temperature": 0.8, "loss_type": "grpo"},
        {"mask_truncated_completions": True, "scale_rewards": "batch"},
        {"num_iterations": 2, "epsilon": 0.01},
        {"steps_per_generation": 3, "num_iterations": 2, "importance_sampling_level": "sequence"},
    ],
    ids=str,
)
def test_losses_are_those_of_theodora_train(others, base, asked, run, losses, tmp_path):
    result, *_ = light(base, asked, 6, **others)
    run(
        **{"model": base, "data": asked, "objective": "grpo", "reward": [reward("low")], "max_length": 64} | SHARED,
        **{"held_out": 0, "max_steps": 6, "per_device_train_batch_size": 8} | others,
    )
    torch.testing.assert_close(result.losses, losses(tmp_path / "run"), rtol=1e-3, atol=2e-5)
    assert result.drawn > 0
    assert result.tokens > result.drawn / 2


@pytest.mark.parametrize("way", ["graphs", "fused loss", "the model's own logits"])
@pytest.mark.parametrize("others", [{"beta": 0.1}, {"steps_per_generation": 2, "temperature": 0.7}], ids=str)
def test_every_way_to_a_step_gives_the_same_losses(way, others, base, asked, monkeypatch):
    plain, *_ = light(base, asked, 5, **others)
    shapes = set()

    class Eager:
        """A step as a graph that is never captured."""

        def __init__(self, step, parameters):
            self.step, self.replays = step, 0

        def __call__(self, tensors):
            shapes.add(tuple((name, t.shape) for name, t in sorted(tensors.items())))
            self.replays += 1
            return self.step(tensors)

        def release(self, why):
            return False

    if way == "graphs":
        monkeypatch.setattr(sys.modules["theodora.train.light_policy"], "graphs_pay", lambda device: True)
        monkeypatch.setattr(sys.modules["theodora.train.light"], "GraphedStep", Eager)
    elif way == "fused loss":
        monkeypatch.setattr(sys.modules["theodora.train.light"], "fused_loss_pays", lambda device: True)
    other, *_ = light(base, asked, 5, head="not known" if way == "the model's own logits" else None, **others)
    torch.testing.assert_close(other.losses, plain.losses, rtol=1e-3, atol=2e-5)
    assert (plain.graphed, other.graphed) == (0, 5 if way == "graphs" else 0)
    assert len(shapes) == (way == "graphs")


def test_a_prompt_that_is_asked_twice_at_once_answers_otherwise(base, asked, monkeypatch):
    """Of six prompts eight at once."""
    places, call = [], Rollouts.__call__

    def noted(self, prompts, seed, **kwargs):
        places.append(kwargs["places"])
        return call(self, prompts, seed, **kwargs)

    monkeypatch.setattr(Rollouts, "__call__", noted)
    light(base, asked, 6, steps_per_generation=4)
    assert [len(each) for each in places] == [4 * 8, 2 * 8]  # no more than are learned from
    assert all(set(Counter(each).values()) == {1} for each in places)


def test_answers_are_judged_the_same_every_time(base, asked):
    _, model, prompts, rewards, tokenizer, head = light(base, asked, 4, rewards=("low", "alike"), learning_rate=3e-2)
    reference = Reference(model, None)
    modes = [module.training for module in model.modules()]
    one, other = (
        judge(model, prompts, rewards, tokenizer, head=head, most=6, rows=rows, reference=reference) for rows in (8, 4)
    )
    assert one.rewards.keys() == {"low", "alike"}
    assert one.rewards == other.rewards
    assert one.reward == pytest.approx(sum(one.rewards.values()))
    assert one.kl == pytest.approx(other.kl, rel=1e-3)
    assert one.kl > 1e-4
    assert 1 <= one.length <= 6
    assert [module.training for module in model.modules()] == modes
    with reference.running() as start:
        base_itself = judge(start, prompts, rewards, tokenizer, head=head, most=6, rows=8, reference=reference)
    assert base_itself.kl == pytest.approx(0, abs=1e-9)
