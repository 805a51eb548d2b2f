"""The loss from the hidden states is the model's own and TRL's, and the record of a run is the same with it."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from trl.trainer.sft_trainer import SFTTrainer

import tiny
from theodora import AdapterConfig, inject_adapter
from theodora.train import fused_loss, trainer, trainer_logs, trainer_loss
from theodora.train.fused_loss import Head, SelectLearned, add_fused_loss, fused_head, select_learned

MORE = {
    "gemma2": {**tiny.FAMILIES["gemma"], "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "cohere": {**tiny.FAMILIES["mistral"], "logit_scale": 0.25},
    "granite": {**tiny.FAMILIES["llama"], "logits_scaling": 4.0},
    "mixtral": {**tiny.FAMILIES["llama"], "num_local_experts": 2, "num_experts_per_tok": 1},
}


@pytest.fixture
def model_of(tiny_model, monkeypatch):
    """A tiny model of the families of `tiny.py`, or of these, frozen but for its embeddings."""

    def make(family, **config):
        monkeypatch.setitem(tiny.FAMILIES, family, (tiny.FAMILIES | MORE)[family])
        model = tiny_model(family, **config).requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_()
        return model

    return make


def batch(rows=3, length=12, learned=((4, 7), (6, 9), (6, 6)), lengths=(12, 12, 8)):
    ids = torch.randint(3, 200, (rows, length))
    labels, mask = torch.full_like(ids, -100), torch.ones_like(ids)
    for row, (start, end) in enumerate(learned):
        labels[row, start:end] = ids[row, start:end]
        mask[row, lengths[row] :] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def collated(inputs):
    found = SelectLearned(lambda rows: dict(rows[0]))([inputs])
    return {key: value for key, value in found.items() if key != "labels"}


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *MORE])
def test_it_is_the_models_own_loss_with_the_same_gradient(family, model_of):
    model, inputs = model_of(family), batch()
    head = fused_head(model)
    assert isinstance(head, Head), head
    assert head.maskless
    expected = model(**inputs).logits[:, :-1].float()
    targets = inputs["labels"][:, 1:]
    nats = nn.functional.cross_entropy(expected.transpose(1, 2), targets, reduction="sum")
    nats.backward()
    gradient = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    add_fused_loss(model, head)
    found = model(**collated(inputs))
    found.nats.backward()
    learned = expected[targets != -100].log_softmax(-1)
    assert (found.count, found.correct) == (6, (learned.argmax(-1) == targets[targets != -100]).sum())
    torch.testing.assert_close(found.entropy, -(learned.exp() * learned).sum())
    torch.testing.assert_close(found.nats, nats)
    torch.testing.assert_close(gradient, model.get_input_embeddings().weight.grad, rtol=1e-4, atol=1e-5)
    assert model(**inputs).loss is not None  # without `learned`, its forward is its own


def test_scales_caps_and_biases_are_seen(model_of):
    assert fused_head(model_of("gemma2")).softcap == 2.0
    assert fused_head(model_of("cohere")).scale == 0.25
    assert fused_head(model_of("granite")).scale == 0.25
    assert model_of("phi").lm_head.bias is not None


def test_heads_that_do_not_fit_say_why(model_of):
    adapted = inject_adapter(model_of("llama"), AdapterConfig(targets=("lm_head",)))
    assert "no plain linear layer" in fused_head(adapted)
    trained = model_of("llama")
    trained.lm_head.weight.requires_grad_()
    assert "is trained" in fused_head(trained)
    hooked = model_of("llama")
    hooked.lm_head.register_forward_hook(lambda *_: None)
    assert "hooks" in fused_head(hooked)
    unsaid = model_of("cohere")
    unsaid.config.logit_scale = None  # the model keeps its scale of 0.25, and its configuration does not tell
    assert "in a way of its own" in fused_head(unsaid)


def test_a_model_that_looks_ahead_keeps_its_mask(model_of):
    model = model_of("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    assert fused_head(model) == Head(maskless=False)


def test_looking_at_the_head_changes_nothing(model_of):
    model = model_of("llama").train()
    state = torch.get_rng_state()
    fused_head(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_learned_positions():
    inputs = batch(rows=2, length=300, learned=((4, 7), (0, 2)), lengths=(300, 300))
    targets, positions = select_learned(inputs["labels"])
    assert targets.shape == positions.shape == (128,)
    chosen = targets != -100
    assert positions[chosen].tolist() == [3, 4, 5, 300]  # the first token of a row is never predicted
    assert targets[chosen].tolist() == [*inputs["labels"][0, 4:7].tolist(), inputs["labels"][1, 1].item()]
    assert set(positions[~chosen].tolist()) == {299}


def test_nearly_all_learned_is_taken_as_it_lies():
    labels = torch.randint(3, 200, (2, 64))
    targets, positions = select_learned(labels)
    assert positions is None
    assert torch.equal(targets.view(2, 64)[:, :-1], labels[:, 1:])
    assert (targets.view(2, 64)[:, -1] == -100).all()


@pytest.mark.parametrize("lengths", [(12, 12, 12), (12, 7, 3)])
def test_padding_on_the_right_needs_no_mask(lengths):
    inputs = batch(lengths=lengths)
    found = SelectLearned(lambda rows: dict(rows[0]))([inputs])["learned"]
    assert (found["tokens"], found["maskless"]) == (sum(lengths), True)
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    found = SelectLearned(lambda rows: dict(rows[0]))([inputs])["learned"]
    assert found["maskless"] == (lengths == (12, 12, 12))


@pytest.fixture
def fused_run(run, monkeypatch):
    """A run as on a GPU: with the fused loss, and logs that come later."""

    def start(late=True, **options):
        with monkeypatch.context() as patch:
            patch.setattr(trainer_loss, "fused_loss_pays", lambda device: True)
            made = trainer.AdapterTrainer.__init__

            def init(self, *args, **kwargs):
                made(self, *args, **kwargs)
                assert isinstance(self.head, Head) or options.get("kernels") == "reference"
                self.defers_logs = late

            patch.setattr(trainer.AdapterTrainer, "__init__", init)
            return run(**options)

    return start


NAMES = ("loss", "eval_loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm", "learning_rate", "epoch")


@pytest.mark.parametrize("others", [{}, {"gradient_accumulation_steps": 2}, {"train_on": "all", "logging_steps": 3}])
def test_a_run_has_the_record_of_trls_loss(others, run, fused_run, tmp_path, losses, monkeypatch):
    settings = {"max_steps": 7, "eval_steps": 3, "save_steps": 2, **others}
    fused_run(output=str(tmp_path / "ours"), **settings)
    monkeypatch.setattr(trainer_loss, "fused_loss_pays", lambda device: False)
    monkeypatch.setattr(trainer.AdapterTrainer, "chooses_positions", lambda self, labels: False)
    run(output=str(tmp_path / "trl"), **settings)
    for name in NAMES:
        found, expected = losses(tmp_path / "ours", name), losses(tmp_path / "trl", name)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)
    steps = [
        [
            (line["step"], sorted(line))
            for line in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        ]
        for name in ("ours", "trl")
    ]
    assert steps[0] == steps[1]


def test_what_comes_late_is_complete_and_in_order(fused_run, tmp_path, losses, monkeypatch):
    """Also if nothing has arrived before somebody waits for it."""
    fused_run(late=False, output=str(tmp_path / "at once"), max_steps=9, save_steps=5)
    monkeypatch.setattr(trainer_logs.DeferredMetrics, "ready", lambda self: False)
    fused_run(output=str(tmp_path / "late"), max_steps=9, save_steps=5)
    for name in NAMES:
        assert losses(tmp_path / "late", name) == losses(tmp_path / "at once", name), name
    assert losses(tmp_path / "late", "step") == losses(tmp_path / "at once", "step")


def test_the_reference_is_one_setting_away(fused_run, tmp_path, monkeypatch):
    monkeypatch.setattr(fused_loss.Head, "loss", lambda *_, **__: pytest.fail("the fused loss ran"))
    fused_run(kernels="reference")


def test_a_run_leaves_the_model_as_it_was(fused_run):
    result = fused_run()
    assert "forward" not in result.model.__dict__
    assert "train" not in result.model.__dict__


def test_a_wrapper_does_not_hide_that_the_model_is_in_evaluation_mode(monkeypatch):
    """A wrapper is made in training mode, around a model that an evaluation has left in the other."""
    monkeypatch.setattr(SFTTrainer, "training_step", lambda self, model, *_: model.train())
    made = object.__new__(trainer.AdapterTrainer)
    made.model = nn.Linear(2, 2).eval()
    wrapper = nn.Sequential(made.model)
    made.model.eval()
    assert wrapper.training
    made.why_no_graph, made.guard, made.outcome = "not here", None, None
    made.args, batch = SimpleNamespace(packing=False), {"input_ids": torch.ones(1, 2, dtype=torch.long)}
    made.pieces = lambda inputs, *args: made.one_pass(inputs, *args)
    made.training_step(wrapper, dict(batch))
    assert made.model.training
    calls = []
    made.model.train = calls.append
    made.training_step(wrapper, dict(batch))
    assert not calls  # and afterwards nothing is walked through again
