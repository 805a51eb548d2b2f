"""Out of memory: the step in smaller pieces is the same step."""

import io

import pytest
import torch
from rich.console import Console
from trl.trainer.sft_trainer import SFTTrainer

from theodora.config import TrainConfig
from theodora.data.packing import packed_batch
from theodora.errors import TheodoraError
from theodora.train import train, trainer
from theodora.train.fused_loss import LEARNED, SelectLearned
from theodora.train.out_of_memory import few_of, split

GRADIENTS = ("loss", "grad_norm", "num_tokens", "learning_rate")


@pytest.fixture
def short_of_memory(monkeypatch):
    """A GPU on which no more than so many tokens fit; the pass runs before it fails, and leaves its gradients."""
    plain = trainer.AdapterTrainer.one_pass

    def fits(tokens):
        def one_pass(self, inputs, *args):
            size = inputs["input_ids"].numel()
            loss = plain(self, inputs, *args)
            if size > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
            return loss

        monkeypatch.setattr(trainer.AdapterTrainer, "one_pass", one_pass)

    return fits


@pytest.mark.parametrize(
    ("others", "tokens"),
    [
        ({"per_device_train_batch_size": 4}, 60),
        ({"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2}, 50),
        ({"packing": True, "max_length": 96, "train_on": "all", "per_device_train_batch_size": 1}, 60),
        ({"targets": ["q_proj", "lm_head"], "per_device_train_batch_size": 8}, 100),
    ],
    ids=["", "accumulated", "packed", "adapted head"],
)
def test_a_run_in_pieces_traces_the_whole(others, tokens, run, options, short_of_memory, tmp_path, losses):
    run(output=str(tmp_path / "whole"), **others)
    short_of_memory(tokens)
    console = Console(file=io.StringIO(), width=300)
    train(TrainConfig.from_options(options | others), console=console)
    text = console.file.getvalue()
    assert "Out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.) Each batch now takes 2 passes" in text
    assert "for want of memory each batch took" in text
    for name in GRADIENTS:
        found, expected = losses(tmp_path / "run", name), losses(tmp_path / "whole", name)
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-5)


def test_one_row_cannot_be_split(run, short_of_memory):
    short_of_memory(8)
    with pytest.raises(TheodoraError, match=r"Out of memory: CUDA out of memory.*\nLower per_device"):
        run(per_device_train_batch_size=2)


def test_pieces_hold_the_rows_between_them_and_what_is_learned_of_them():
    documents = [torch.arange(3, 3 + n) for n in (5, 2, 6, 3)]
    batch = packed_batch(documents)
    labels = batch["input_ids"].clone()
    labels[batch["position_ids"] == 0] = -100
    batch = SelectLearned(lambda _: {**batch, "labels": labels})([])
    parts = split(batch, 2)
    assert [part["input_ids"].shape[1] for part in parts] == [7, 9]
    for part, own in zip(parts, (documents[:2], documents[2:]), strict=True):
        expected = packed_batch(own)
        assert all(torch.equal(torch.as_tensor(part[k]), torch.as_tensor(expected[k])) for k in expected)
        assert part[LEARNED]["tokens"] == sum(map(len, own))
    learned = torch.cat([part[LEARNED]["targets"] for part in parts])
    assert sorted(learned[learned >= 0].tolist()) == sorted(labels[labels >= 0].tolist())
    assert len(split(batch, 16)) == 4
    labels[:, 0] = labels[:, 7] = 1  # learned across the bound of documents: not a place to cut
    assert [part["input_ids"].shape[1] for part in split({**batch, "labels": labels}, 2)] in ([5, 11], [13, 3])


@pytest.mark.parametrize("fused", [False, True])
def test_an_evaluation_that_does_not_fit_goes_on_with_half_of_it(run, tmp_path, losses, monkeypatch, request, fused):
    if fused:
        request.getfixturevalue("made")
    settings = {"max_steps": 1, "held_out": 8, "per_device_eval_batch_size": 8}
    run(output=str(tmp_path / "roomy"), **settings)
    predict, sizes = SFTTrainer.prediction_step, []

    def short_of_memory(self, model, inputs, *args, **kwargs):
        sizes.append(int((inputs["labels"] != -100).sum()))
        if inputs["input_ids"].numel() > 70:
            raise torch.OutOfMemoryError("out of memory")
        return predict(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "prediction_step", short_of_memory)
    run(output=str(tmp_path / "tight"), **settings)
    assert len(sizes) > 4  # two evaluations, of more than one batch and its halves
    expected = losses(tmp_path / "roomy", "eval_loss")
    assert losses(tmp_path / "tight", "eval_loss") == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_of_one_row_that_does_not_fit_fails(run, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(SFTTrainer, "prediction_step", full)
    with pytest.raises(TheodoraError, match="Out of memory"):
        run(max_steps=1, held_out=8)


def test_a_few_tokens_of_a_batch_teach_nothing():
    rows = {"input_ids": torch.arange(40).view(2, 20), "attention_mask": torch.ones(2, 20), "labels": torch.ones(2, 20)}
    few = few_of(rows)
    assert {name: tuple(value.shape) for name, value in few.items()} == dict.fromkeys(rows, (1, 8))
    batch = packed_batch([torch.arange(3, 8), torch.arange(3, 14)])
    batch = SelectLearned(lambda _: {**batch, "labels": batch["input_ids"].clone()})([])
    packed = few_of(batch)
    expected = packed_batch([batch["input_ids"][0, :8]])
    assert all(torch.equal(torch.as_tensor(packed[k]), torch.as_tensor(expected[k])) for k in expected)
    assert packed[LEARNED]["tokens"] == 8
    for each in (few, packed):
        assert (each["labels"] == -100).all()
