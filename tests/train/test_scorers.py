"""Reward models that reward completions of grpo: on the policy's own weights, or as models of their own."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from theodora import CheckpointError, ConfigError, DataError, TrainConfig
from theodora.adapters.state import trained_tensors
from theodora.data import load_examples, tokenize_preferences
from theodora.data.answered import encode_answered
from theodora.data.sequences import parted
from theodora.files.names import WEIGHTS_NAME
from theodora.merging.checkpoint import merge_checkpoint
from theodora.train import scorers
from theodora.train.rewards import Rewards
from theodora.train.scorers import Scorer
from tiny import CHATML, tiny_tokenizer

ASKED, ANSWERS = ["1 + 1 =", "2 + 3 =", "4 + 4 ="], [" 2.", " 9!!", ""]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"prompt": f"{a} + {b} =", "chosen": f" {a + b}", "rejected": f" {a * b + 1}!!"}
        for a in range(8)
        for b in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def scorer(whole, pairs):
    """The folder of a DoRA reward adapter."""
    return whole(data=pairs, objective="reward", held_out=4)


@pytest.fixture
def rewarded(run, sums, tmp_path):
    """A short run of grpo with these rewards."""
    drawn = {"num_generations": 4, "max_completion_length": 6, "max_length": 64, "data": str(sums), "held_out": 4}
    return lambda *names, **others: run(
        **{"objective": "grpo", "reward": list(names), "max_steps": 3, **drawn, **others}
    )


@pytest.fixture
def placed(monkeypatch):
    """The rewards of the runs to come."""
    found, place = [], Rewards.place
    monkeypatch.setattr(Rewards, "place", lambda self, policy: found.append(self) or place(self, policy))
    return found


def rewards_in(folder, name="reward"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_on_the_policys_weights_it_scores_as_by_itself_and_does_not_move(scorer, rewarded, placed, options):
    alone = Scorer(str(scorer), torch.device("cpu"), "float32")
    before = alone(ASKED, ANSWERS, [])
    result = rewarded(str(scorer), learning_rate=0.05)
    (shared,) = placed[0].scorers.values()
    assert shared.shares
    torch.testing.assert_close(shared(ASKED, ANSWERS, []), before, rtol=1e-4, atol=1e-5)
    assert before.std() > 0.05
    policy = {p.data_ptr() for p in result.model.parameters()}
    own = [p for p in shared.model.parameters() if p.data_ptr() not in policy]
    low_rank = sum(t.numel() for t in trained_tensors(result.model).values())
    assert sum(p.numel() for p in own) == low_rank + 32  # an adapter of the same size, and the head
    assert not any(p.requires_grad for p in shared.model.parameters())


def test_a_run_learns_from_it_whatever_holds_it(scorer, rewarded, tmp_path):
    merge_checkpoint(scorer, tmp_path / "merged")
    rewarded(str(scorer), output=str(tmp_path / "shared"))
    rewarded(str(tmp_path / "merged"), output=str(tmp_path / "own"))
    one, other = rewards_in(tmp_path / "shared"), rewards_in(tmp_path / "own")
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert "scores on the policy's own frozen weights" in said_by(scorer, tmp_path)
    assert len(set(one)) > 1


def said_by(folder, tmp_path):
    policy = TrainConfig(model=base_of(folder), data="d", output=str(tmp_path), objective="grpo", reward=(str(folder),))
    return Scorer(str(folder), torch.device("cpu"), "float32", policy).note


def base_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_on_other_weights_it_is_a_model_of_its_own(scorer, tiny_model_dir, tmp_path):
    other = TrainConfig(model=str(tiny_model_dir(seed=1)), data="d", output=str(tmp_path))
    note = Scorer(str(scorer), torch.device("cpu"), "float32", other).note
    assert "is a second model in memory (0 MB of weights)" in note
    full = {"model": base_of(scorer), "data": "d", "output": "o", "method": "full"}
    assert not Scorer(str(scorer), torch.device("cpu"), "float32", TrainConfig.from_options(full)).shares


def test_where_backbones_differ_it_has_its_own(scorer, rewarded, placed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(scorers, "scorer_beside", lambda *given: None)
        rewarded(str(scorer), output=str(tmp_path / "own"))
    (own,) = placed[0].scorers.values()
    assert "is a second model" in own.note
    rewarded(str(scorer), output=str(tmp_path / "shared"))
    torch.testing.assert_close(rewards_in(tmp_path / "own"), rewards_in(tmp_path / "shared"), rtol=1e-4, atol=1e-5)


def test_beside_functions_with_weights(scorer, rewarded, tmp_path):
    rewarded(str(scorer), "length:3", reward_weights=[1.0, 0.5], max_steps=1)
    name = f"rewards/{scorer.name}/mean"
    total = rewards_in(tmp_path / "run")[0]
    each = rewards_in(tmp_path / "run", name)[0] + 0.5 * rewards_in(tmp_path / "run", "rewards/length/mean")[0]
    assert total == pytest.approx(each, rel=1e-4)


def test_a_run_resumes_with_the_same_bits(scorer, resumes, sums, losses, tmp_path):
    drawn = {"num_generations": 4, "max_completion_length": 6, "max_length": 64, "beta": 0.1}
    resumes(objective="grpo", reward=[str(scorer)], data=str(sums), held_out=4, max_steps=4, save_steps=2, **drawn)
    assert losses(tmp_path / "parts", "reward") == losses(tmp_path / "whole", "reward")


def test_another_one_in_the_same_folder_is_refused(scorer, rewarded, tmp_path):
    rewarded(str(scorer), max_steps=1, save_steps=1)
    tensors = load_file(scorer / WEIGHTS_NAME)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, scorer / WEIGHTS_NAME, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"weights of the reward model .* have changed"):
        rewarded(str(scorer), max_steps=2, save_steps=1, resume=True)


def test_a_recipe_may_name_it(scorer, options):
    asked = {**options, "objective": "grpo", "reward": [str(scorer)]}
    assert TrainConfig.from_options(asked).reward == (str(scorer),)


def test_other_folders_give_no_score(whole, options, tiny_model_dir, scorer, tmp_path):
    for folder in (whole(max_steps=1, held_out=0), tiny_model_dir()):
        with pytest.raises(ConfigError, match="gives no score"):
            Rewards([str(folder)], device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="the folder of a reward model"):
        Rewards([str(tmp_path / "none")])
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "adapter_config.json").write_text((scorer / "adapter_config.json").read_text())
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        Rewards([str(tmp_path / "damaged")])


def test_what_it_cannot_read_is_said(scorer):
    long = Scorer(str(scorer), torch.device("cpu"), "float32")
    with pytest.raises(DataError, match="reads 512 tokens, and a completion with its prompt has"):
        long(["1 + 1 ="], ["2" * 600], [])


def test_a_run_does_not_delete_what_it_is_rewarded_by(scorer, rewarded):
    with pytest.raises(ConfigError, match=r"reward .*, the run that overwrite would delete"):
        rewarded(str(scorer), output=str(scorer), overwrite=True)


@pytest.mark.parametrize("template", [None, CHATML, CHATML.replace("'<|im_end|>' + '\\n'", "'\\n'")])
@pytest.mark.parametrize("turns", [False, True])
def test_it_reads_what_was_read_in_training(template, turns, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    asked = [[{"role": "user", "content": text}] for text in ASKED[:2]] if turns else ASKED[:2]
    answers = [[{"role": "assistant", "content": text}] for text in ANSWERS[:2]] if turns else ANSWERS[:2]
    both = zip(asked, answers, reversed(answers), strict=True)
    rows = [{"prompt": prompt, "chosen": one, "rejected": other} for prompt, one, other in both]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = tokenize_preferences(load_examples(path, kind="ranked"), tokenizer, max_length=200)
    found = encode_answered(asked, ANSWERS[:2], tokenizer)
    assert [list(parted(row)[0]["input_ids"]) for row in trained] == found


def test_the_tools_of_a_prompt_are_read_as_in_training(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ tools | tojson if tools else 'none' }}\n" + CHATML
    tool = {"name": "add", "description": "a sum", "parameters": {"type": "object", "properties": {}}}
    turns = [{"role": "user", "content": "1 + 1 ="}]
    row = {"prompt": turns, "chosen": "2", "rejected": "3", "tools": [tool]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    examples = load_examples(tmp_path / "rows.jsonl", kind="ranked")
    (trained,) = tokenize_preferences(examples, tokenizer, max_length=500)
    for tools in ([tool], json.dumps([tool])):
        assert encode_answered([turns], ["2"], tokenizer, [tools]) == [list(parted(trained)[0]["input_ids"])]
    assert encode_answered([turns], ["2"], tokenizer, [None]) != encode_answered([turns], ["2"], tokenizer, [[tool]])
    with pytest.raises(DataError, match="tools of a prompt cannot be read"):
        encode_answered([turns], ["2"], tokenizer, ["no tools"])
