"""The loss on general text before and after a run, in its own report."""

import json
from importlib import import_module

import pytest

from theodora import ConfigError, DataError, TrainConfig, train
from theodora.adapters.models import load_model_and_tokenizer
from theodora.evaluate import text_loss
from theodora.train import forgetting
from theodora.train.report import result_rows

TEXTS = [f"In the year {n} the town had {n * 7} people and a mill." * (1 + n % 4) for n in range(80)]


@pytest.fixture
def general(tmp_path):
    path = tmp_path / "general.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{a} + 2 =", "chosen": f" {a + 2}", "rejected": f" {a * 3}!"} for a in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def measured(options, **adapter):
    """What `text_loss` says of every so many of the texts."""
    model, tokenizer = load_model_and_tokenizer(options["model"], dtype="fp32", **adapter)
    return text_loss(model, tokenizer, [TEXTS[i * 80 // 64] for i in range(64)], max_length=256).loss


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_it_is_that_of_the_model_before_and_after(objective, run, options, general, pairs, losses, tmp_path):
    data = {"data": pairs, "objective": objective} if objective != "sft" else {}
    result = run(general=general, held_out=4, **data)
    assert result.general_loss_before == pytest.approx(measured(options), abs=1e-5)
    assert result.general_loss == pytest.approx(measured(options, adapter=str(tmp_path / "run")), abs=1e-5)
    assert abs(result.general_loss - result.general_loss_before) > 1e-4
    assert losses(tmp_path / "run", "general_loss") == [result.general_loss_before, result.general_loss]
    before, after = (f"{loss:.4f}" for loss in (result.general_loss_before, result.general_loss))
    assert ("Loss on general text (nats per token)", before, after) in result_rows(result)
    assert f"| Loss on general text (nats per token) | {before} | {after} |" in (tmp_path / "run/README.md").read_text()
    assert result.to_dict()["general_loss"] == result.general_loss


def test_a_run_that_goes_on_has_the_loss_from_before_it_began(resumes, general, losses, tmp_path):
    resumes(general=general, held_out=0)
    whole, parts = (losses(tmp_path / name, "general_loss") for name in ("whole", "parts"))
    assert whole == parts
    assert len(parts) == 2


def test_the_best_adapter_is_the_one_that_is_measured(run, options, general, tmp_path):
    # Of a rate that ruins it the first evaluation is the best.
    result = run(general=general, held_out=8, learning_rate=0.5, early_stopping_patience=1, eval_steps=1, save_steps=1)
    assert result.general_loss == pytest.approx(measured(options, adapter=str(tmp_path / "run")), abs=1e-5)


def test_along_the_way_where_that_is_cheap(run, general, losses, monkeypatch, tmp_path):
    init = forgetting.Forgetting.__init__

    def as_on_a_gpu(self, *args):
        init(self, *args)
        self.along = True

    monkeypatch.setattr(forgetting.Forgetting, "__init__", as_on_a_gpu)
    plain = run(output=str(tmp_path / "plain"), held_out=4, eval_steps=2)
    result = run(general=general, held_out=4, eval_steps=2)
    assert len(losses(tmp_path / "run", "general_loss")) == 3  # steps 0, 2, 4: none of them twice
    assert result.train_loss == plain.train_loss
    assert losses(tmp_path / "run", "entropy") == losses(tmp_path / "plain", "entropy")


def test_a_model_that_training_broke_is_still_reported(run, general, losses, monkeypatch, tmp_path):
    score, calls = forgetting.score, []

    def once(*args, **kwargs):
        if calls:
            raise forgetting.LossNotFinite("NaN")
        calls.append(1)
        return score(*args, **kwargs)

    monkeypatch.setattr(forgetting, "score", once)
    result = run(general=general, held_out=0)
    assert result.general_loss != result.general_loss
    assert result.to_dict()["general_loss"] is None
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_what_is_wrong_is_said_before_the_model_is_loaded(run, sums, general, pairs, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        prepare = import_module("theodora.train.prepare")
        patch.setattr(prepare, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
        with pytest.raises(DataError, match=r"sums\.jsonl is prompt-completion; expected plain text"):
            run(general=str(sums))
        with pytest.raises(DataError, match=r"none\.jsonl"):
            run(general=str(tmp_path / "none.jsonl"))
    run(held_out=0)
    with pytest.raises(ConfigError, match=r"general was None and is .*: the loss before training was measured on it"):
        run(held_out=0, general=general, resume="auto", max_steps=8)


def test_texts_that_are_trained_on_are_said(options, general, capsys):
    others = {"general": general, "replay": general, "held_out": 0, "max_steps": 1}
    train(TrainConfig.from_options(options | others))
    assert "general and replay are the same texts" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("per", "shown"), [("token (nats)", {"held out", "general text"}), ("pair", {"held out"})])
def test_the_figure_has_it_where_losses_are_per_token(per, shown, monkeypatch, tmp_path):
    figure, drawn = import_module("theodora.train.loss_figure"), set()
    monkeypatch.setattr(figure, "_draw_points", lambda axes, points, color, label: drawn.add(label))
    figure.draw_losses([{"step": 0, "eval_loss": 2.0}, {"step": 0, "general_loss": 3.0}], tmp_path / "f.png", "", per)
    assert drawn == shown
