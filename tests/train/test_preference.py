"""Runs that learn from preferences: their losses, their reference, and the same bits however a step is cut."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from theodora import ConfigError, DataError, TrainConfig
from theodora.adapters import load_adapter
from theodora.adapters.models import load_model
from theodora.adapters.state import trained_tensors
from theodora.train import preference, prepare, sequence_trainer, trainer_passes
from theodora.train.reference import Reference


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    rows = [
        {"prompt": f"{a} + {b} =", "chosen": f" {a + b}" + "." * (a % 3), "rejected": f" {a * b + 1}" + "!" * (b % 4)}
        for a in range(8)
        for b in range(4)
    ]
    return written(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def judged(tmp_path_factory):
    rows = [
        {"prompt": f"{a} + {b} =", "completion": f" {a + b}" + (".", "!!")[wrong], "label": not wrong}
        for a in range(8)
        for b in range(2)
        for wrong in (0, 1)
    ]
    return written(tmp_path_factory.mktemp("data") / "judged.jsonl", rows)


@pytest.fixture
def prefer(run, pairs):
    """A short run of dpo with these options."""
    return lambda **others: run(**{"data": pairs, "objective": "dpo", "held_out": 4, **others})


@pytest.fixture
def first(whole):
    """The folder of an adapter to begin with."""
    return str(whole(max_steps=1, held_out=0))


@pytest.fixture
def dpo(whole, pairs):
    """The folder of a short run of dpo."""
    return whole(data=pairs, objective="dpo", held_out=4, beta=0.5)


def lines(folder, name):
    found = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in found if name in line]


@pytest.mark.parametrize(("objective", "beta"), [("dpo", 1.0), ("ipo", 0.1), ("orpo", 1.0), ("simpo", 1.0)])
def test_pairs_are_learned(objective, beta, prefer, tmp_path):
    result = prefer(objective=objective, beta=beta, max_steps=6, eval_steps=6)
    assert result.eval_loss < result.eval_loss_before
    before, after = lines(tmp_path / "run", "eval_rewards/margins")
    assert after > before
    assert lines(tmp_path / "run", "rewards/accuracies")[-1] > 0.7
    assert sum(moved for moved, _ in result.moved.values()) > 0


def test_verdicts_are_learned(run, judged, tmp_path):
    result = run(data=judged, objective="kto", beta=1.0, max_steps=12, held_out=8, eval_steps=12, num_train_epochs=1)
    assert lines(tmp_path / "run", "loss")[0] == pytest.approx(0.5)
    assert lines(tmp_path / "run", "rewards/margins")[-1] > 0
    assert max(lines(tmp_path / "run", "kl")) > 0
    assert result.eval_loss < 0.5


def test_a_fresh_adapter_is_its_reference(prefer, tmp_path):
    prefer(max_steps=1)
    assert lines(tmp_path / "run", "loss") == [pytest.approx(0.6931472, abs=1e-6)]
    assert lines(tmp_path / "run", "rewards/margins") == [0.0]


class TestReference:
    @pytest.mark.parametrize("start", ["base", "adapter", "another"])
    def test_it_does_not_move_by_a_bit(self, start, prefer, first, tmp_path, monkeypatch):
        others = {} if start == "base" else {"from_adapter": first}
        if start == "another":
            others["reference"] = "base"
        seen, made = [], []
        init, of_reference = Reference.__init__, preference.PreferenceTrainer.of_reference
        monkeypatch.setattr(Reference, "__init__", lambda self, *a: init(self, *a) or made.append(self))

        def once(self, given):
            losses = of_reference(self, given)
            seen.append(({k: v.clone() for k, v in given.items()}, -losses.nats, self))
            return losses

        monkeypatch.setattr(preference.PreferenceTrainer, "of_reference", once)
        result = prefer(max_steps=3, beta=0.5, **others)
        (reference,) = made
        given, before, trainer = seen[0]
        assert torch.equal(-of_reference(trainer, given).nats, before)
        assert not torch.equal(-trainer.each(result.model, given).nats, before)  # the policy has moved
        assert (reference.twin is None) == (start != "adapter")
        plain = load_model(result.model.name_or_path, dtype="float32")
        if start != "adapter":  # it is the base's own
            torch.testing.assert_close(-trainer.each(plain, given).nats, before, rtol=0, atol=0)
        else:
            assert not torch.allclose(-trainer.each(plain, given).nats, before, atol=1e-4)
            frozen = {id(p) for p in result.model.parameters()}
            own = [p for p in reference.twin.parameters() if id(p) not in frozen]
            assert sum(p.numel() for p in own) == sum(t.numel() for t in trained_tensors(result.model).values())
        assert lines(tmp_path / "run", "rewards/margins")[0] == pytest.approx(0, abs=1e-5 if start != "another" else 9)

    def test_it_goes_where_the_policy_goes(self, first, options):
        policy = load_model(options["model"], dtype="float32")
        reference = Reference(load_adapter(policy, first), first)
        policy.to("meta")  # stands for a GPU
        reference.place()
        places = {tensor.device.type for tensor in (*reference.twin.parameters(), *reference.twin.buffers())}
        assert places == {"meta"}

    def test_an_adapter_alone_is_gone_on_from(self, prefer, first, tmp_path):
        prefer(max_steps=1, reference=first)
        record = (tmp_path / "run" / "config.yaml").read_text()
        assert f"from_adapter: {first}" in record
        assert f"reference: {first}" in record

    def test_computed_beforehand_it_is_the_same(self, prefer, dpo, tmp_path, monkeypatch):
        passes = []
        logps = preference.PreferenceTrainer.of_reference
        monkeypatch.setattr(
            preference.PreferenceTrainer, "of_reference", lambda self, given: passes.append(1) or logps(self, given)
        )
        prefer(output=str(tmp_path / "before"), beta=0.5, precompute_ref_log_probs=True, precompute_ref_batch_size=16)
        assert len(passes) == 3  # of 28 rows and 4
        for name in ("loss", "eval_loss", "rewards/margins"):
            torch.testing.assert_close(lines(tmp_path / "before", name), lines(dpo, name), rtol=1e-4, atol=1e-5)

    def test_of_judged_answers_too(self, run, judged, tmp_path):
        settings = {"data": judged, "objective": "kto", "held_out": 4, "beta": 0.5}
        run(output=str(tmp_path / "each"), **settings)
        run(output=str(tmp_path / "before"), precompute_ref_log_probs=True, **settings)
        for name in ("loss", "eval_loss", "kl"):
            torch.testing.assert_close(
                lines(tmp_path / "before", name), lines(tmp_path / "each", name), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo"])
def test_accumulated_rows_are_a_whole_batch(objective, prefer, judged, tmp_path):
    others = {"objective": objective, "max_steps": 3, "beta": 0.5} | ({"data": judged} if objective == "kto" else {})
    prefer(output=str(tmp_path / "whole"), per_device_train_batch_size=6, **others)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    prefer(output=str(tmp_path / "parts"), **parts, **others)
    for name in ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "entropy"):
        torch.testing.assert_close(
            lines(tmp_path / "parts", name), lines(tmp_path / "whole", name), rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("others", [{}, {"precompute_ref_log_probs": True, "logging_steps": 2}, {"kto": True}])
def test_it_resumes_with_the_same_bits(others, resumes, pairs, judged, losses, tmp_path):
    kto = others.pop("kto", False)
    rows = {"data": judged, "objective": "kto"} if kto else {"data": pairs, "objective": "dpo"}
    resumes(**rows, beta=0.5, held_out=4, **others)
    assert losses(tmp_path / "parts", "rewards/chosen") == losses(tmp_path / "whole", "rewards/chosen")


def test_a_run_from_an_adapter_resumes_with_the_reference_that_it_began_with(first, resumes, pairs):
    resumes(data=pairs, objective="dpo", beta=0.5, held_out=4, from_adapter=first)


def test_another_objective_or_reference_is_no_way_to_go_on(prefer, first):
    prefer(max_steps=1, from_adapter=first)
    with pytest.raises(ConfigError, match="reference"):
        prefer(max_steps=2, from_adapter=first, reference="base", resume=True)
    with pytest.raises(ConfigError, match="objective"):
        prefer(max_steps=2, from_adapter=first, objective="ipo", resume=True)


@pytest.mark.parametrize("fused", [False, True])
def test_rows_of_a_step_that_is_nan_are_kept_and_it_is_skipped(fused, prefer, tmp_path, monkeypatch, request):
    if fused:
        request.getfixturevalue("made")
    loss = preference.PreferenceTrainer.loss_of

    def once(self, *args):
        total, figures = loss(self, *args)
        return total * (float("nan") if self.state.global_step == 2 else 1.0), figures

    monkeypatch.setattr(preference.PreferenceTrainer, "loss_of", once)
    prefer(max_steps=4, held_out=0, on_nan="skip", per_device_train_batch_size=2, save_steps=100)
    kept = [json.loads(line) for line in (tmp_path / "run" / "bad_batches.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == [3] * 4  # two pairs, both answers of each
    assert [kept[0]["text"].split("assistant")[0], kept[0]["learned_text"]] != [
        kept[2]["text"].split("assistant")[0],
        kept[1]["learned_text"],
    ]
    assert kept[0]["text"].split("assistant")[0] == kept[1]["text"].split("assistant")[0]


@pytest.fixture
def short_of_memory(monkeypatch):
    """Passes of more tokens than these run out of memory."""

    def limit(tokens):
        each = preference.PreferenceTrainer.each

        def refuse(self, model, given, balanced=False):
            if given["input_ids"].numel() > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return each(self, model, given, balanced)

        monkeypatch.setattr(preference.PreferenceTrainer, "each", refuse)

    return limit


@pytest.mark.parametrize("objective", ["dpo", "kto"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_batch_that_does_not_fit_is_halved_between_pairs(
    objective, fused, prefer, judged, short_of_memory, tmp_path, request
):
    if fused:
        request.getfixturevalue("made")
    others = {"objective": objective, "per_device_train_batch_size": 8, "max_steps": 3, "beta": 0.5}
    others |= {"data": judged} if objective == "kto" else {}
    prefer(output=str(tmp_path / "whole"), **others)
    short_of_memory(260 if objective == "kto" else 500)
    prefer(output=str(tmp_path / "pieces"), **others)
    for name in ("loss", "eval_loss", "grad_norm", "rewards/chosen"):
        torch.testing.assert_close(
            lines(tmp_path / "pieces", name), lines(tmp_path / "whole", name), rtol=2e-3, atol=2e-5
        )


@pytest.mark.parametrize("objective", ["dpo", "kto", "simpo"])
@pytest.mark.parametrize("flattened", [False, True])
def test_as_on_a_gpu_it_is_the_same(objective, flattened, prefer, judged, made, tmp_path, monkeypatch):
    others = {"objective": objective, "max_steps": 6, "beta": 0.5, "per_device_train_batch_size": 4}
    others |= {"data": judged} if objective == "kto" else {}
    if not flattened:
        monkeypatch.setattr(trainer_passes, "takes_bounds", lambda *_: False)
    prefer(output=str(tmp_path / "fused"), **others)
    assert bool(made[0].shapes) == flattened
    if flattened:
        assert made[0].graph_replays >= 3, made[0].why_no_graph
    prefer(output=str(tmp_path / "plain"), kernels="reference", **others)
    for name in ("loss", "eval_loss", "grad_norm", "rewards/chosen", "mean_token_accuracy", "num_tokens"):
        torch.testing.assert_close(
            lines(tmp_path / "fused", name), lines(tmp_path / "plain", name), rtol=1e-3, atol=2e-5
        )


def test_logits_that_are_too_many_come_a_few_at_a_time(prefer, dpo, tmp_path, monkeypatch):
    monkeypatch.setattr(sequence_trainer, "logits_fit", lambda labels, vocabulary: False)
    monkeypatch.setattr(sequence_trainer, "row_losses", lambda *_: pytest.fail("all logits were asked for"))
    prefer(output=str(tmp_path / "few"), beta=0.5)
    for name in ("loss", "eval_loss", "grad_norm", "entropy", "mean_token_accuracy"):
        torch.testing.assert_close(lines(tmp_path / "few", name), lines(dpo, name), rtol=1e-3, atol=2e-5)


def test_the_reference_beforehand_takes_fewer_rows_where_memory_ends(prefer, short_of_memory, tmp_path):
    settings = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 16, "per_device_eval_batch_size": 2}
    prefer(output=str(tmp_path / "roomy"), **settings)
    short_of_memory(600)
    prefer(output=str(tmp_path / "tight"), **settings)
    torch.testing.assert_close(
        lines(tmp_path / "tight", "loss"), lines(tmp_path / "roomy", "loss"), rtol=1e-4, atol=1e-5
    )


class TestWhatMakesNoSense:
    @pytest.fixture(autouse=True)
    def _nothing_is_loaded(self, monkeypatch):
        monkeypatch.setattr(prepare, "load_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))

    @pytest.mark.parametrize(
        ("objective", "told"),
        [
            ("dpo", "no pair of a better and a worse answer.*prompt-completion, which --objective sft learns"),
            ("kto", "no answer with a verdict"),
        ],
    )
    def test_rows_of_another_objective(self, objective, told, run):
        with pytest.raises(DataError, match=f"(?s){told}"):
            run(objective=objective)

    def test_pairs_for_sft_and_kto(self, run, pairs):
        with pytest.raises(DataError, match="'chosen' belongs to preferences, which --objective dpo learns"):
            run(data=pairs)
        with pytest.raises(DataError, match="Pairs are what --objective dpo learns"):
            run(data=pairs, objective="kto")

    def test_pairs_of_equal_answers_and_prompts_beyond_the_window(self, run, tmp_path):
        same = written(tmp_path / "same.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 3)
        with pytest.raises(DataError, match="3 pairs have the same answer twice"):
            run(data=same, objective="dpo", held_out=0)
        long = written(tmp_path / "long.jsonl", [{"prompt": "a" * 99, "chosen": "b", "rejected": "c"}] * 2)
        with pytest.raises(DataError, match="in 2 an answer is cut off at max_length=64"):
            run(data=long, objective="dpo", held_out=0, max_length=64)
        empty = written(tmp_path / "empty.jsonl", [{"prompt": "a", "chosen": "b", "rejected": " "}])
        with pytest.raises(DataError, match="pairs with an empty answer: skipped"):
            run(data=empty, objective="dpo", held_out=0)

    @pytest.mark.parametrize(
        ("others", "told"),
        [
            ({"packing": True}, "needs each answer by itself"),
            ({"train_on": "all"}, "is about answers alone"),
            ({"replay": "more.jsonl"}, "learns no plain text"),
            ({"objective": "orpo", "reference": "base"}, "compares with nothing"),
            ({"objective": "sft", "reference": "base"}, "compares with nothing"),
            ({"beta": 0}, "beta is 0.*expected more than 0"),
            ({"beta": "much"}, "beta is 'much'; expected a number"),
            ({"loss_type": "aot"}, "sets the pairs of a batch against each other"),
            ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "one for each loss_type"),
            ({"loss_type": "exo_pair"}, "needs label_smoothing"),
            ({"f_divergence_type": "forward_kl", "loss_type": "apo_zero"}, "expected loss_type among"),
            ({"sync_ref_model": True}, "the reference is frozen"),
            ({"objective": "ipo", "loss_type": "hinge"}, "a loss of its own"),
            ({"objective": "simpo", "simpo_gamma": -1}, "expected at least 0"),
            ({"neftune_noise_alpha": 5}, "noise"),
            ({"truncation_mode": "keep_end"}, "cut at their end"),
            ({"objective": "sft", "beta": 0.1}, "beta; it belongs to --objective dpo"),
        ],
    )
    def test_options(self, others, told, prefer):
        with pytest.raises(ConfigError, match=f"(?s){told}"):
            prefer(**others)


def test_the_default_rate_is_that_of_the_objective(options):
    options = {name: value for name, value in options.items() if name != "learning_rate"}
    assert TrainConfig.from_options(options).learning_rate == 5e-4
    assert TrainConfig.from_options({**options, "objective": "dpo"}).learning_rate == 5e-5


def test_dropout_is_off_unless_it_is_left_on(prefer, tmp_path):
    prefer(max_steps=1, dropout=0.5)
    assert lines(tmp_path / "run", "rewards/margins") == [0.0]


def test_an_adapter_on_the_head_is_in_the_loss(prefer, tmp_path):
    result = prefer(max_steps=3, targets=["lm_head"], beta=0.5)
    assert result.eval_loss < result.eval_loss_before


def test_a_checkpoint_is_an_adapter_alone(prefer, tmp_path):
    prefer(max_steps=2, save_steps=1)
    kept = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors")
    last = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert kept.keys() == last.keys()
    assert all(torch.equal(kept[name], last[name]) for name in kept)
