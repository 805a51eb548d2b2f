"""The losses of preferences are TRL's, to the last digits, on the log-likelihoods of one model."""

import os
import warnings
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from steps import moved
from theodora import AdapterConfig, inject_adapter, reference_model
from theodora.train.loss import can_choose_positions, row_losses
from theodora.train.preference_loss import PAIR_LOSSES, Answers, Settings, judged_losses, pair_losses
from theodora.train.reference import Reference
from tiny import tiny_model, tiny_tokenizer

# TRL says transformers' older names.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
OPTIONS = {"max_steps": 1, "report_to": [], "bf16": False, "use_cpu": True, "per_device_train_batch_size": 4}
ROWS = [{"prompt": f"{n}", "chosen": "a" * (n + 1), "rejected": "bc" * n + "!"} for n in range(4)]


@pytest.fixture(scope="module")
def policy():
    model = inject_adapter(tiny_model(), AdapterConfig(rank=4))
    reference = Reference(model, None)
    moved(model)
    return model, reference


@pytest.fixture(scope="module")
def theirs(policy, tmp_path_factory):
    """TRL's trainer of the perturbed policy, with the base as its reference, and a batch."""
    model, _ = policy
    args = DPOConfig(str(tmp_path_factory.mktemp("dpo")), **OPTIONS)
    rows = Dataset.from_list(ROWS)
    trainer = DPOTrainer(
        model, reference_model(model), args=args, train_dataset=rows, processing_class=tiny_tokenizer()
    )
    return trainer, next(iter(trainer.get_train_dataloader()))


def answers(policy, ids, mask):
    """Ours of all rows of a batch of TRL's."""
    model, reference = policy
    inputs = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100)}
    own = row_losses(model, inputs, can_choose_positions(model))
    with reference.running() as base:
        frozen = row_losses(base, inputs, can_choose_positions(model))
    return Answers(-own.nats, own.count, -frozen.nats)


def halves(of):
    count = len(of.logps) // 2
    return [
        Answers(*(part[half] for part in (of.logps, of.tokens, of.reference)))
        for half in (slice(count), slice(count, None))
    ]


@pytest.mark.parametrize("name", [name for name in PAIR_LOSSES if name != "sft"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
def test_losses_of_pairs_are_trls(name, divergence, policy, theirs):
    if divergence != "reverse_kl" and name in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"):
        return  # TRL refuses them, and so do we
    trainer, batch = theirs
    trainer.loss_types, trainer.loss_weights = [name], [1.0]
    trainer.label_smoothing, trainer.beta, trainer.f_divergence_type = 0.1, 0.3, divergence
    expected = trainer.compute_loss(trainer.model, dict(batch))
    settings = Settings(
        objective="dpo", beta=0.3, losses=((name, 1.0),), label_smoothing=0.1, f_divergence_type=divergence
    )
    better, worse = halves(answers(policy, batch["input_ids"], batch["completion_mask"]))
    torch.testing.assert_close(pair_losses(better, worse, settings).mean(), expected, rtol=1e-4, atol=1e-5)


def test_several_losses_are_weighed(policy, theirs):
    trainer, batch = theirs
    trainer.loss_types, trainer.loss_weights, trainer.f_divergence_type = ["sigmoid", "hinge"], [0.3, 2.0], "reverse_kl"
    trainer.beta = 0.1
    expected = trainer.compute_loss(trainer.model, dict(batch))
    settings = Settings(objective="dpo", losses=(("sigmoid", 0.3), ("hinge", 2.0)))
    better, worse = halves(answers(policy, batch["input_ids"], batch["completion_mask"]))
    torch.testing.assert_close(pair_losses(better, worse, settings).mean(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_ktos_loss_is_trls(name, policy, tmp_path):
    model, _ = policy
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": n % 2 == 0} for n, row in enumerate(ROWS)]
    args = KTOConfig(str(tmp_path), loss_type=name, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5, **OPTIONS)
    trainer = KTOTrainer(
        model,
        reference_model(model),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(trainer.model, dict(batch))
    settings = Settings(objective="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    kl = torch.tensor(0.0)
    if name == "kto":
        others = answers(policy, batch["KL_input_ids"], batch["KL_completion_mask"])
        kl = others.ratios.mean().clamp(min=0).detach()
    own = answers(policy, batch["input_ids"], batch["completion_mask"])
    good = torch.as_tensor(batch["label"], dtype=torch.bool)
    torch.testing.assert_close(judged_losses(own, good, kl, settings).mean(), expected, rtol=1e-4, atol=1e-5)


def without_reference():
    gen = torch.Generator().manual_seed(0)
    tokens = torch.tensor([2.0, 5.0, 9.0])
    return [Answers(-torch.rand(3, generator=gen) * tokens, tokens, None) for _ in range(2)]


def experimental():
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TRL_EXPERIMENTAL_SILENCE", "1")
        warnings.simplefilter("ignore")
        from trl.experimental.cpo import CPOTrainer
        from trl.experimental.orpo import ORPOTrainer
    return CPOTrainer, ORPOTrainer


def test_simpos_loss_is_trls():
    better, worse = without_reference()
    own = SimpleNamespace(alpha=0.0, loss_type="simpo", beta=2.0, simpo_gamma=0.5, label_smoothing=0.1)
    own.accelerator = SimpleNamespace(device="cpu")
    expected, _, _ = experimental()[0].cpo_loss(own, better.means, worse.means)
    settings = Settings(objective="simpo", beta=2.0, simpo_gamma=0.5, label_smoothing=0.1)
    torch.testing.assert_close(pair_losses(better, worse, settings), expected)
    with_nll = pair_losses(better, worse, Settings(objective="simpo", beta=2.0, label_smoothing=0.1, nll_weight=0.5))
    torch.testing.assert_close(with_nll, expected - 0.5 * better.means)


def test_orpos_loss_is_trls_with_the_answers_own_loss():
    better, worse = without_reference()
    own = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    ratio, *_ = experimental()[1].odds_ratio_loss(own, better.means, worse.means)
    settings = Settings(objective="orpo", beta=0.1)
    torch.testing.assert_close(pair_losses(better, worse, settings), -better.means - ratio)


def test_orpo_of_an_answer_that_is_certain_is_finite():
    sure = Answers(torch.zeros(1, requires_grad=True), torch.ones(1), None)
    loss = pair_losses(sure, Answers(torch.tensor([-1.0]), torch.ones(1), None), Settings(objective="orpo"))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert sure.logps.grad.isfinite().all()
