"""Reward models: their loss is TRL's, what is saved scores alike wherever it is loaded, runs resume bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
from trl import RewardConfig, RewardTrainer

from theodora import AdapterConfig, CheckpointError, ConfigError, DataError, inject_adapter, load_adapter
from theodora.adapters.models import load_model, load_model_and_tokenizer
from theodora.adapters.scoring import new_heads, padded, scores, set_padding
from theodora.adapters.state import trained_tensors
from theodora.analysis import inspect_adapter
from theodora.cli.main import main
from theodora.data import load_examples, tokenize_preferences
from theodora.data.sequences import parted
from theodora.merging.checkpoint import merge_checkpoint
from theodora.train import trainer_passes
from theodora.train.scorers import Scorer


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(**more):
    return [
        {
            "prompt": f"{a} + {b} =",
            "chosen": f" {a + b}" + "." * (a % 3),
            "rejected": f" {a * b + 1}" + "!" * (b % 4),
            **{name: value(a, b) for name, value in more.items()},
        }
        for a in range(8)
        for b in range(4)
    ]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    return written(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows_of())


@pytest.fixture(scope="session")
def ranked(tmp_path_factory):
    rows = rows_of(margin=lambda a, b: (a - b) / 4)
    return written(tmp_path_factory.mktemp("data") / "ranked.jsonl", rows)


@pytest.fixture
def learn(run, pairs):
    """A short run that trains a reward model with these options."""
    return lambda **others: run(**{"data": pairs, "objective": "reward", "held_out": 4, **others})


@pytest.fixture
def scorer(whole, pairs):
    """The folder of a DoRA reward adapter, whose magnitudes have moved."""
    return whole(data=pairs, objective="reward", held_out=4)


def lines(folder, name):
    found = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in found if name in line]


def answers(folder, data):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = tokenize_preferences(load_examples(data, kind="pairs"), tokenizer, max_length=64)
    return [sequence["input_ids"] for row in rows.select(range(6)) for sequence in parted(row)]


def test_pairs_are_learned(learn, tmp_path):
    result = learn(max_steps=12, eval_steps=12)
    assert result.eval_loss < 0.5 < result.eval_loss_before
    for name in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
        before, after = result.figures[name]
        assert [before, after] == lines(tmp_path / "run", f"eval_{name}")
    assert result.figures["min_reward"][1] < result.figures["mean_reward"][1] < result.figures["max_reward"][1]
    assert result.figures["accuracy"][1] > 0.7
    assert result.moved["weight"] == (1, 1)  # the head
    assert result.samples[0].before != result.samples[0].after
    assert result.samples[0].after.startswith("better ")


def test_a_head_that_the_base_has_not_has_not_changed_by_anything(scorer):
    (head,) = inspect_adapter(scorer).full
    assert head.path == "score.weight"
    assert head.relative_change is None


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
def test_loss_and_gradients_are_those_of_trls_trainer(family, method, learn, ranked, tiny_model_dir, tmp_path):
    model, common = str(tiny_model_dir(family)), {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1}
    common |= {"learning_rate": 0.5, "per_device_train_batch_size": 32, "center_rewards_coefficient": 0.3}
    ours = learn(model=model, method=method, data=ranked, held_out=0, bf16=False, **common)
    theirs = load_model(model, dtype="float32", scores=True)
    torch.manual_seed(0)
    new_heads(theirs)
    set_padding(theirs, tokenizer := AutoTokenizer.from_pretrained(model))
    torch.manual_seed(0)
    inject_adapter(theirs, AdapterConfig(method=method))
    rows = tokenize_preferences(load_examples(ranked, kind="ranked"), tokenizer, max_length=1024)
    data = [
        {"chosen_ids": one["input_ids"], "rejected_ids": other["input_ids"], "margin": row["margin"]}
        for row in rows
        for one, other in [parted(row)]
    ]
    still = {"bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    still |= {"gradient_checkpointing": False, "dataloader_pin_memory": False}
    arguments = RewardConfig(str(tmp_path / "trl"), **still, **common)
    trainer = RewardTrainer(theirs, arguments, train_dataset=Dataset.from_list(data), processing_class=tokenizer)
    trainer.train()
    log = trainer.state.log_history[0]
    for name in ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
        assert lines(tmp_path / "run", name)[0] == pytest.approx(log[name], rel=1e-4, abs=1e-6), name
    mine, other = trained_tensors(ours.model), trained_tensors(theirs)
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-6, msg=name)


class TestSaved:
    @pytest.fixture
    def wanted(self, scorer, options, pairs):
        """Tokens of answers, and their scores by transformers and PEFT."""
        ids = answers(scorer, pairs)
        base = AutoModelForSequenceClassification.from_pretrained(options["model"], num_labels=1, dtype="float32")
        model = PeftModel.from_pretrained(base, scorer).eval()
        with torch.no_grad():
            return ids, model(**padded(ids, 0, model.device)).logits[:, 0]

    def test_it_is_an_ordinary_folder_of_pefts(self, scorer):
        fields = json.loads((scorer / "adapter_config.json").read_text())
        assert fields["task_type"] == "SEQ_CLS"
        assert fields["modules_to_save"] == ["score"]
        assert fields["use_dora"]

    def test_it_scores_as_in_training(self, scorer, wanted, options, run, pairs, tmp_path):
        ids, logits = wanted
        trained = run(data=pairs, objective="reward", held_out=4).model
        torch.testing.assert_close(scores(trained, ids), logits, rtol=1e-4, atol=1e-5)
        loaded = load_adapter(load_model(options["model"], dtype="float32", scores=True), scorer)
        torch.testing.assert_close(scores(loaded, ids), logits, rtol=1e-4, atol=1e-5)
        assert scores(loaded, ids).std() > 0.05

    def test_merged_it_is_a_model_that_transformers_loads(self, scorer, wanted, tmp_path):
        ids, logits = wanted
        report = merge_checkpoint(scorer, tmp_path / "merged")
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "merged", dtype="float32", output_loading_info=True
        )
        assert report.scores
        assert model.config.num_labels == 1
        assert not loading["missing_keys"]
        assert not loading["unexpected_keys"]
        torch.testing.assert_close(scores(model.eval(), ids), logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(Scorer(str(tmp_path / "merged")).model.score.weight.cpu(), model.score.weight)
        with pytest.raises(CheckpointError, match=r"scores texts.*--reward"):
            load_model_and_tokenizer(tmp_path / "merged")

    def test_who_continues_texts_refuses_it_before_any_work(self, scorer, options, tmp_path, capsys):
        calls = (
            f"chat {scorer}",
            f"evaluate --model {scorer} --data {scorer}/held_out.jsonl --f1",
            f"export {scorer} --to gguf --output {tmp_path}/gguf",
            f"combine {scorer} {scorer} --output {tmp_path}/both",
            f"serve {options['model']} --adapter a={scorer}",
            f"verify {scorer} {options['model']}",
            f"merge {scorer} --output {tmp_path}/q --onto quantised --quantize nf4",
        )
        for call in calls:
            assert main(call.split()) != 0, call
            assert "scores texts" in " ".join(capsys.readouterr().err.split()), call
        for call in (f"info {scorer}", f"inspect {scorer}"):
            assert main(call.split()) == 0, call

    def test_evaluate_scores_pairs_with_it(self, scorer, options, sums, tmp_path, capsys):
        merge_checkpoint(scorer, tmp_path / "merged")
        for which in (f"{scorer}", f"{options['model']} --adapter {scorer}", f"{tmp_path}/merged"):
            assert main(f"evaluate --model {which} --data {scorer}/held_out.jsonl --json --dtype fp32".split()) == 0
            found = json.loads(capsys.readouterr().out)
            assert found["accuracy"] == lines(scorer, "eval_accuracy")[-1]
            assert found["margin"] == pytest.approx(lines(scorer, "eval_margin")[-1], rel=1e-4)
            assert found["highest"] == pytest.approx(lines(scorer, "eval_max_reward")[-1], rel=1e-4)
            assert found["pairs"] == 4
        assert main(f"evaluate --model {scorer} --data {sums}".split()) != 0
        assert "no pair of a better and a worse answer" in capsys.readouterr().err

    def test_bf16_keeps_the_head_in_float32(self, learn, pairs, options, tmp_path):
        result = learn(bf16=True, max_steps=6)
        tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
        head = tensors["base_model.model.score.weight"]
        assert head.dtype == torch.float32
        assert not torch.equal(head, head.bfloat16().float())
        ids = answers(tmp_path / "run", pairs)
        found = {}
        for dtype in ("float32", "bfloat16"):
            base = AutoModelForSequenceClassification.from_pretrained(options["model"], num_labels=1, dtype=dtype)
            found[dtype] = scores(PeftModel.from_pretrained(base, tmp_path / "run"), ids)
        exact, theirs = found.values()
        assert (scores(result.model, ids) - exact).abs().mean() <= 2.5 * (theirs - exact).abs().mean()


class TestRuns:
    def test_as_on_a_gpu_it_is_the_same(self, learn, made, tmp_path):
        learn(output=str(tmp_path / "fast"), max_steps=4)
        assert not made[0].shapes  # rows stay padded
        learn(output=str(tmp_path / "plain"), max_steps=4, kernels="reference")
        for name in ("loss", "eval_loss", "grad_norm", "margin", "num_tokens"):
            one, other = lines(tmp_path / "fast", name), lines(tmp_path / "plain", name)
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("others", [{}, {"logging_steps": 2, "gradient_accumulation_steps": 2}])
    def test_they_resume_with_the_same_bits(self, others, resumes, pairs, losses, tmp_path):
        resumes(data=pairs, objective="reward", held_out=4, **others)
        for name in ("accuracy", "min_reward", "max_reward"):
            assert losses(tmp_path / "parts", name) == losses(tmp_path / "whole", name)

    def test_accumulated_rows_are_a_whole_batch(self, learn, ranked, tmp_path):
        options = {"data": ranked, "max_steps": 3, "center_rewards_coefficient": 0.1}
        learn(output=str(tmp_path / "whole"), per_device_train_batch_size=6, **options)
        parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
        learn(output=str(tmp_path / "parts"), **parts, **options)
        for name in ("loss", "grad_norm", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
            one, other = lines(tmp_path / "parts", name), lines(tmp_path / "whole", name)
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)

    def test_a_batch_that_does_not_fit_is_cut_between_pairs(self, learn, ranked, tmp_path, monkeypatch):
        learn(output=str(tmp_path / "whole"), data=ranked)
        one_pass = trainer_passes.PassOverrides.one_pass

        def small(self, inputs, *args):
            assert inputs["input_ids"].shape[0] % 2 == 0
            if inputs["input_ids"].shape[0] > 4:
                raise torch.OutOfMemoryError("too many rows")
            return one_pass(self, inputs, *args)

        monkeypatch.setattr(trainer_passes.PassOverrides, "one_pass", small)
        learn(output=str(tmp_path / "pieces"), data=ranked)
        for name in ("loss", "eval_loss", "grad_norm", "accuracy", "max_reward"):
            one, other = lines(tmp_path / "pieces", name), lines(tmp_path / "whole", name)
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

    def test_early_stopping_goes_by_the_held_out_loss(self, learn, tmp_path):
        result = learn(max_steps=40, eval_steps=4, save_steps=4, early_stopping_patience=1, learning_rate=0.3)
        assert result.steps < 40
        assert result.eval_loss == min(lines(tmp_path / "run", "eval_loss"))

    def test_full_fine_tuning_saves_the_whole_model(self, learn, pairs, tmp_path):
        result = learn(method="full", max_steps=6, learning_rate=1e-3)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run", dtype="float32").eval()
        ids = answers(tmp_path / "run", pairs)
        torch.testing.assert_close(scores(model, ids), scores(result.model, ids))
        assert Scorer(str(tmp_path / "run"))(["1 + 1 ="], [" 2"], []).isfinite().all()

    def test_a_runs_own_folder_is_gone_on_from(self, learn, scorer, tmp_path):
        learn(from_adapter=str(scorer), max_steps=1)
        for name in ("eval_loss", "eval_margin", "eval_mean_reward"):
            assert lines(tmp_path / "run", name)[0] == pytest.approx(lines(scorer, name)[-1], rel=1e-4)

    def test_the_layers_of_an_sft_adapter_are_a_start(self, learn, whole, tmp_path):
        first = whole(max_steps=3, held_out=0)
        result = learn(from_adapter=str(first), max_steps=1, learning_rate=1e-5)
        one, other = (load_file(f / "adapter_model.safetensors") for f in (first, tmp_path / "run"))
        assert other.keys() - one.keys() == {"base_model.model.score.weight"}
        for key, tensor in one.items():
            torch.testing.assert_close(other[key], tensor, rtol=0, atol=1e-4)
        assert result.moved["weight"] == (1, 1)

    def test_an_adapter_on_the_language_head_is_no_start(self, learn, whole):
        first = whole(max_steps=1, held_out=0, targets=["q_proj", "lm_head"])
        with pytest.raises(CheckpointError, match="lm_head: no such module"):
            learn(from_adapter=str(first))


class TestBadInput:
    def test_pairs_that_are_equal_are_skipped_and_said(self, learn, tmp_path):
        rows = [*rows_of(), {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 2"}]
        data = written(tmp_path / "equal.jsonl", rows)
        assert learn(data=data, max_steps=1, held_out=0).tokens > 0
        with pytest.raises(DataError, match="same answer"):
            learn(data=written(tmp_path / "all.jsonl", rows[-1:] * 3), held_out=0, output=str(tmp_path / "other"))

    def test_longer_pairs_are_left_out_as_trl_does(self, tmp_path, tiny_tokenizer):
        long = {"prompt": "1 + 1 =", "chosen": " 2" * 40, "rejected": " 3"}
        data = written(tmp_path / "long.jsonl", [*rows_of(), long])
        examples = load_examples(data, kind="ranked")
        rows = tokenize_preferences(examples, tiny_tokenizer, max_length=32, use_chat_template=False, cut=False)
        assert len(rows) == 32
        assert "1 pairs dropped: longer than max_length=32" in rows.info.description

    @pytest.mark.parametrize("margin", [None, "far", float("nan"), True])
    def test_margins_that_are_no_numbers(self, margin, learn, tmp_path):
        rows = rows_of(margin=lambda a, b: margin if (a, b) == (1, 2) else 1.5)
        with pytest.raises(DataError, match=r"'margin' is .*; expected a number"):
            learn(data=written(tmp_path / "bad.jsonl", rows))

    def test_rows_without_columns(self, learn, sums):
        with pytest.raises(DataError, match="no pair of a better and a worse answer"):
            learn(data=str(sums))

    def test_a_model_without_such_a_class(self, learn, tiny_model_dir, tmp_path):
        family = next(f for f in ("olmo", "cohere") if f not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
        with pytest.raises(CheckpointError, match="no class for that scores a text"):
            learn(model=str(tiny_model_dir(family)))

    def test_a_classifier_of_several_classes(self, learn, tiny_tokenizer, tiny_model, tmp_path):
        config = tiny_model().config
        config.num_labels = 3
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "three")
        tiny_tokenizer.save_pretrained(tmp_path / "three")
        with pytest.raises(CheckpointError, match="gives 3 numbers"):
            learn(model=str(tmp_path / "three"))

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ({"general": "texts.jsonl"}, "predicts no text"),
            ({"center_rewards_coefficient": -1}, "at least 0"),
            ({"beta": 0.1}, "beta"),
            ({"loss_type": "sigmoid"}, "loss of its own"),
            ({"reference": "base"}, "compares with nothing"),
            ({"packing": True}, "each answer by itself"),
        ],
    )
    def test_options_that_make_no_sense(self, asked, message, learn):
        with pytest.raises(ConfigError, match=message):
            learn(**asked)
