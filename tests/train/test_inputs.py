"""What a run is made from: what stays the same, what is refused and what is said."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from torch import nn

from theodora.adapters.conditions import hash_of_weights
from theodora.config import TrainConfig
from theodora.data import load_examples
from theodora.errors import ConfigError
from theodora.train.inputs import (
    INPUTS_FILE,
    Inputs,
    KeepInputs,
    changes_since,
    hash_of_tokens,
    inputs_of,
    missing_random_state,
    write_inputs,
)


class Trainer:
    """As far as a checkpoint's writer looks at one."""

    def __init__(self, inputs: Inputs) -> None:
        self.callback_handler = type("Handler", (), {"callbacks": [object(), KeepInputs(inputs)]})()


@pytest.fixture
def before(sums, tmp_path) -> Inputs:
    """What a checkpoint in `tmp_path` was made from."""
    config = TrainConfig(model="m", data=str(sums), output="o", replay=str(sums))
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3]], "labels": [[-100, 2], [3]]})
    sources = {"data": load_examples(sums), "replay": load_examples(sums)}
    found = inputs_of(config, sources, rows, "base", 2)
    write_inputs(Trainer(found), tmp_path)
    return found


def test_the_same_is_the_same(before, tmp_path):
    assert changes_since(tmp_path, before) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sources": {"data": 1}}, "data: the rows of .*sums.jsonl have changed"),
        ({"sources": {"replay": 1}}, "replay: the rows of .*sums.jsonl have changed"),
        ({"tokens": "others"}, "the tokens of its rows have changed, so the tokenizer or its chat template"),
        ({"base": "another"}, "the weights of the base model m have changed"),
    ],
)
def test_what_was_changed_in_place_is_refused(changes, says, before, tmp_path):
    if "sources" in changes:
        place = before.sources["data"][0]
        changes = {"sources": {**before.sources, **dict.fromkeys(changes["sources"], (place, "others"))}}
    with pytest.raises(ConfigError, match=says) as refusal:
        changes_since(tmp_path, replace(before, **changes))
    assert "--from-adapter" in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        ({"sources": {"data": ("other.jsonl", "others")}, "tokens": "others"}, {}, ["the rows of data"]),
        ({"tokens": "others"}, {"max_length": 7}, ["the tokens of its rows, as max_length did"]),
        ({"tokens": "others"}, {"trainer": {"eos_token": "x"}}, ["the tokens of its rows, as eos_token did"]),
        ({"base": "another"}, {"bf16": True}, ["the weights of the base model m, as bf16 did"]),
        ({"base": "another"}, {"trainer": {"fp16": True}}, ["the weights of the base model m, as fp16 did"]),
        ({"processes": 1}, {}, ["processes from 2 to 1"]),
    ],
)
def test_what_was_asked_for_goes_on_with_a_word(changes, options, says, before, tmp_path):
    now = replace(before, **changes, options={**before.options, **options})
    found = changes_since(tmp_path, now)
    assert len(found) == len(says)
    assert all(word in note for word, note in zip(says, found, strict=True))


@pytest.mark.parametrize("changes", [{"tokens": "others"}, {"base": "another"}])
def test_an_option_that_explains_nothing_excuses_nothing(changes, before, tmp_path):
    now = replace(before, **changes, options={**before.options, "trainer": {"adam_beta2": 0.99}})
    with pytest.raises(ConfigError, match="have changed"):
        changes_since(tmp_path, now)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_link_that_leads_to_other_rows_is_data_changed_in_place(earlier, sums, tmp_path):
    link, rows = tmp_path / "current.jsonl", Dataset.from_dict({"input_ids": [[1]], "labels": [[1]]})
    config = TrainConfig(model="m", data=str(link), output="o")
    (tmp_path / "other.jsonl").write_text("".join(sums.read_text().splitlines(keepends=True)[1:]))
    link.symlink_to(sums)
    before = inputs_of(config, {"data": load_examples(link)}, rows, "base", 1)
    if not earlier:
        link.unlink()
        link.symlink_to("other.jsonl")
    now = inputs_of(config, {"data": load_examples(link)}, rows, "base", 1)
    if earlier:  # a version that wrote down where the link led, to a file that was changed since
        before = replace(before, sources={"data": (str(sums.resolve()), "others")})
    write_inputs(Trainer(before), tmp_path)
    with pytest.raises(ConfigError, match=r"data: the rows of .*current.jsonl have changed"):
        changes_since(tmp_path, now)


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"sources": {"data": 1}}', "[" * 100_000])
def test_a_checkpoint_that_does_not_say_what_it_was_made_from(text, before, tmp_path):
    (tmp_path / INPUTS_FILE).unlink() if text is None else (tmp_path / INPUTS_FILE).write_text(text)
    (note,) = changes_since(tmp_path, before)
    assert "whether the data have changed could not be checked" in note


def test_a_missing_random_state_is_said(tmp_path):
    (tmp_path / "rng_state_2.pth").write_text("")
    assert missing_random_state(tmp_path, 2) == []
    assert "has no rng_state.pth" in missing_random_state(tmp_path, 0)[0]
    assert "has no rng_state_1.pth" in missing_random_state(tmp_path, 1)[0]


def test_rows_have_one_hash_wherever_they_lie_and_in_whatever_file(sums, tmp_path):
    data = load_examples(sums)
    (tmp_path / "spaced.jsonl").write_text(sums.read_text().replace('": "', '":   "') + "\n\n")
    assert load_examples(tmp_path / "spaced.jsonl").sha256 == data.sha256
    lines = sums.read_text().splitlines(keepends=True)
    (tmp_path / "turned.jsonl").write_text("".join(reversed(lines)))
    (tmp_path / "fewer.jsonl").write_text("".join(lines[1:]))
    others = {load_examples(tmp_path / name).sha256 for name in ("turned.jsonl", "fewer.jsonl")}
    assert len({data.sha256, *others}) == 3


def test_tokens_are_hashed_as_they_are_chosen_and_parted():
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3], []], "labels": [[1, 2], [3], []]})
    assert hash_of_tokens(rows) == hash_of_tokens(rows.select([2, 0, 1]).select([1, 2, 0]))
    assert hash_of_tokens(rows) != hash_of_tokens(rows.select([1, 0, 2]))
    parted = Dataset.from_dict({"input_ids": [[1], [2, 3], []], "labels": [[1], [2, 3], []]})
    assert hash_of_tokens(rows) != hash_of_tokens(parted)


@pytest.mark.parametrize("size", [8, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_value_of_a_model_changes_its_hash(size, dtype):
    model = nn.Linear(size, size).to(dtype)
    before = hash_of_weights(model)
    assert before == hash_of_weights(model)
    with torch.no_grad():
        model.weight[-1, -1] += 1
    assert hash_of_weights(model) != before
