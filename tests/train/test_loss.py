"""The loss at chosen positions is TRL's and transformers' loss."""

import pytest
import torch

from theodora.train.loss import can_choose_positions, logits_fit, token_losses
from theodora.train.trainer import AdapterTrainer
from tiny import FAMILIES


def batch(rows=3, length=12, learned=((4, 7), (6, 9), (6, 6))):
    ids = torch.randint(3, 200, (rows, length))
    labels = torch.full_like(ids, -100)
    for row, (start, end) in enumerate(learned):
        labels[row, start:end] = ids[row, start:end]
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_models_own_loss_with_the_same_gradient(family, tiny_model):
    model, inputs = tiny_model(family), batch()
    found = token_losses(model, inputs, can_choose_positions(model))
    found.nats.backward()
    gradient = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    expected = model(**inputs).loss * 6
    expected.backward()
    assert found.count == 6
    torch.testing.assert_close(found.nats, expected)
    torch.testing.assert_close(gradient, model.get_input_embeddings().weight.grad)


def test_a_model_that_does_not_take_positions_gives_the_same(tiny_model):
    model, inputs = tiny_model(), batch()
    assert can_choose_positions(model)
    without, with_positions = (token_losses(model, inputs, takes).nats for takes in (False, True))
    torch.testing.assert_close(without, with_positions)


def test_a_batch_without_learned_tokens_has_a_loss_of_zero(tiny_model):
    inputs = batch(learned=((0, 1), (3, 3), (3, 3)))  # the first token is never predicted
    found = token_losses(tiny_model(), inputs, True)
    found.nats.backward()
    assert (found.nats, found.count) == (0, 0)


def test_logits_are_held_at_once_up_to_a_limit():
    labels = batch()["labels"]  # 5 positions are learned in some of the 3 rows
    assert logits_fit(labels, 2**26 // 15)
    assert not logits_fit(labels, 2**26 // 15 + 1)


def test_a_run_traces_trls_own_loss(run, tmp_path, losses, monkeypatch):
    run(output=str(tmp_path / "ours"))
    monkeypatch.setattr(AdapterTrainer, "chooses_positions", lambda self, labels: False)
    run(output=str(tmp_path / "trl"))
    for name in ("loss", "eval_loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm"):
        torch.testing.assert_close(
            losses(tmp_path / "ours", name), losses(tmp_path / "trl", name), rtol=1e-4, atol=1e-5
        )
