"""Runs that learn from rewards of what the model itself says: what they learn, and the same bits however they go."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from trl.trainer.utils import RepeatSampler

import tiny
import tiny_families
from theodora import ConfigError, DataError, TheodoraError, TrainConfig
from theodora.adapters.models import load_model
from theodora.adapters.state import trained_tensors
from theodora.train import grpo, prepare, sequence_trainer, train, trainer_passes
from theodora.train.reference import Reference
from theodora.train.rollouts import Rollouts
from theodora.train.stop import TrainingInterrupted
from train.rewarded import ENDS, reward, saved

DRAWN = ("reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "completions/clipped_ratio")
ALL = ("loss", "eval_loss", "grad_norm", "num_tokens", "entropy", "kl", "eval_kl", "eval_reward", *DRAWN)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return saved(tiny.tiny_model(), tmp_path_factory.mktemp("ends"))


@pytest.fixture(scope="session")
def mixture(tmp_path_factory):
    model = tiny_families.tiny_family("qwen3_moe", tiny_families.families()["qwen3_moe"])
    return saved(model, tmp_path_factory.mktemp("mixture"))


@pytest.fixture
def options(options, base):
    """Two prompts in each step, and four completions of each."""
    return options | {
        "model": base,
        "objective": "grpo",
        "reward": [reward("low")],
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 6,
        "max_length": 64,
        "held_out": 2,
    }


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """Five prompts: the last step of an epoch has one alone."""
    path = tmp_path_factory.mktemp("few") / "few.jsonl"
    path.write_text("".join(json.dumps({"prompt": "say " + "so " * n, "answer": n}) + "\n" for n in range(5)))
    return {"data": str(path), "held_out": 0}


@pytest.fixture
def first(whole):
    """The folder of an adapter to begin with."""
    return str(whole(max_steps=2, learning_rate=3e-2, held_out=0))


def lines(folder, name):
    found = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in found if name in line]


def close(one, other, names=ALL, rtol=1e-3, atol=2e-5):
    for name in names:
        torch.testing.assert_close(
            lines(one, name), lines(other, name), rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def same(one, other, names=ALL):
    for name in names:
        assert lines(one, name) == lines(other, name), name
    first, second = (load_file(Path(folder) / "adapter_model.safetensors") for folder in (one, other))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_rewards_rise(method, run, tmp_path):
    others = {"num_generations": 16, "per_device_train_batch_size": 64, "held_out": 8, "num_generations_eval": 4}
    others |= {"max_completion_length": 4, "lr_scheduler_type": "constant"}
    result = run(method=method, max_steps=8, learning_rate=2e-2, eval_steps=8, **others)
    before, after = lines(tmp_path / "run", "eval_reward")
    assert after > before + 0.1
    rewards = lines(tmp_path / "run", "reward")
    assert sum(rewards[-2:]) > sum(rewards[:2])
    assert result.eval_loss == pytest.approx(-after)
    assert result.eval_loss_before == pytest.approx(-before)
    start, end = lines(tmp_path / "run", "eval_kl")
    assert start == 0
    assert end > 0.01
    assert sum(moved for moved, _ in result.moved.values()) > 0
    # What was drawn was drawn by the policy that learns from it.
    assert max(lines(tmp_path / "run", "sampling/sampling_logp_difference/mean")) < 1e-5
    assert 0 < lines(tmp_path / "run", "completions/clipped_ratio")[0] < 1
    assert max(lines(tmp_path / "run", "completions/mean_length")) < 4


class TestReference:
    @pytest.mark.parametrize("start", ["base", "adapter", "another"])
    def test_it_does_not_move_by_a_bit(self, start, run, first, tmp_path, monkeypatch):
        others = {} if start == "base" else {"from_adapter": first}
        if start == "another":
            others["reference"] = "base"
        seen, made = [], []
        init, of_reference = Reference.__init__, grpo.GRPOTrainer.of_reference
        monkeypatch.setattr(Reference, "__init__", lambda self, *a: init(self, *a) or made.append(self))

        def once(self, given):
            losses = of_reference(self, given)
            seen.append(({k: v.clone() for k, v in given.items()}, -losses.tokens.nats, self))
            return losses

        monkeypatch.setattr(grpo.GRPOTrainer, "of_reference", once)
        result = run(max_steps=3, beta=0.5, **others)
        (reference,) = made
        given, before, trainer = seen[0]
        assert torch.equal(-of_reference(trainer, given).tokens.nats, before)
        assert not torch.equal(-trainer.each(result.model, given).tokens.nats, before)  # the policy has moved
        assert (reference.twin is None) == (start != "adapter")
        plain = load_model(result.model.name_or_path, dtype="float32")
        if start != "adapter":  # it is the base's own
            torch.testing.assert_close(-trainer.each(plain, given).tokens.nats, before, rtol=0, atol=0)
        else:
            assert not torch.allclose(-trainer.each(plain, given).tokens.nats, before, atol=1e-4)
        for name in ("kl", "eval_kl"):
            start_of_it = lines(tmp_path / "run", name)[0]
            assert start_of_it > 1e-4 if start == "another" else start_of_it == pytest.approx(0, abs=1e-9)

    def test_it_holds_the_policy(self, run, tmp_path):
        for beta in (0.0, 5.0):
            run(beta=beta, max_steps=4, eval_steps=4, learning_rate=3e-2, output=str(tmp_path / f"{beta}"))
        free, held = (lines(tmp_path / f"{beta}", "eval_kl")[-1] for beta in (0.0, 5.0))
        assert held < free / 2
        assert lines(tmp_path / "0.0", "kl") == []  # no pass for it in training
        assert len(lines(tmp_path / "5.0", "kl")) == 4


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"loss_type": "grpo", "beta": 0.2},
        {"loss_type": "dr_grpo"},
        {"num_iterations": 2},
        {"generation_batch_size": 24, "learning_rate": 3e-2},
    ],
)
@pytest.mark.parametrize("size", [4, 3])
def test_accumulated_batches_are_a_whole_step(others, size, whole, run, few, tmp_path):
    """Also where a batch holds a part of a group, and where the last step of an epoch has fewer."""
    others = {**few, **others, "num_generations": 6, "max_steps": 3}
    parts = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 12 // size}
    run(output=str(tmp_path / "parts"), **parts, **others)
    close(tmp_path / "parts", whole(per_device_train_batch_size=12, **others))


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"beta": 0.3, "logging_steps": 2},
        {"mask_truncated_completions": True},
        {"num_iterations": 3},
        {"steps_per_generation": 6},
        {"steps_per_generation": 4, "num_iterations": 2, "save_steps": 3},
    ],
)
def test_it_resumes_with_the_same_bits(others, resumes, few, tmp_path):
    few = few | {"held_out": 1} if "beta" in others else few
    others = {"save_steps": 4, **others}
    resumes(**few, max_steps=6, gradient_accumulation_steps=2, per_device_train_batch_size=4, **others)
    same(tmp_path / "parts", tmp_path / "whole")


def test_a_run_from_an_adapter_resumes_with_the_reference_that_it_began_with(first, resumes, tmp_path):
    resumes(beta=0.5, from_adapter=first, max_steps=4, save_steps=2)
    same(tmp_path / "parts", tmp_path / "whole")


def test_what_prompts_are_counted_by_stays_as_it_was(run, few, tmp_path):
    run(**few, max_steps=1, max_completion_length=2)
    for name, value in {"num_generations": 8, "max_completion_length": 4}.items():
        with pytest.raises(ConfigError, match=rf"{name} was \d and is {value}"):
            run(**few, **{"max_steps": 2, "max_completion_length": 2, name: value}, resume=True)
    run(**few, max_steps=2, max_completion_length=2, temperature=0.7, num_generations=4, resume=True)
    assert len(lines(tmp_path / "run", "loss")) == 2


def test_sigterm_while_rewards_are_computed(run, tmp_path, monkeypatch):
    settings = {"reward": [reward("stops")], "save_steps": 100, "resume": "auto", "max_steps": 4}
    run(output=str(tmp_path / "whole"), **settings)
    monkeypatch.setenv("THEODORA_TEST_STOP", str(tmp_path / "stop"))
    (tmp_path / "stop").touch()
    with pytest.raises(TrainingInterrupted, match="--resume"):
        run(output=str(tmp_path / "parts"), **settings)
    (checkpoint,) = (tmp_path / "parts" / "checkpoints").iterdir()
    assert checkpoint.name == "checkpoint-2"  # nothing is learned from what was being rewarded
    run(output=str(tmp_path / "parts"), **settings)
    same(tmp_path / "parts", tmp_path / "whole")


def test_held_out_prompts_are_answered_alike_in_whatever_batches(run, tmp_path):
    settings = {"max_steps": 2, "held_out": 6, "num_generations_eval": 3}
    run(output=str(tmp_path / "one"), per_device_eval_batch_size=16, **settings)
    run(output=str(tmp_path / "other"), per_device_eval_batch_size=5, **settings)
    close(tmp_path / "one", tmp_path / "other")


def test_another_seed_draws_others_and_two_steps_do_not_draw_alike(run, tmp_path, monkeypatch):
    seeds, call = [], Rollouts.__call__

    def noted(self, prompts, seed, *args, **kwargs):
        seeds.append((seed, tuple(kwargs["places"])))
        return call(self, prompts, seed, *args, **kwargs)

    monkeypatch.setattr(Rollouts, "__call__", noted)
    for seed in (0, 1, 2):
        run(output=str(tmp_path / f"{seed}"), seed=seed, max_steps=3, eval_steps=100)
    assert len({(seed, place) for seed, places in seeds for place in places}) == 3 * (3 * 8 + 2)


@pytest.mark.parametrize("fused", [False, True])
def test_rows_of_a_step_that_is_nan_are_kept_and_it_is_skipped(fused, run, tmp_path, monkeypatch, request):
    if fused:
        request.getfixturevalue("made")
    loss = grpo.GRPOTrainer.loss_of

    def once(self, *args):
        total, figures = loss(self, *args)
        return total * (float("nan") if self.state.global_step == 2 else 1.0), figures

    monkeypatch.setattr(grpo.GRPOTrainer, "loss_of", once)
    run(max_steps=4, held_out=0, on_nan="skip", per_device_train_batch_size=4, save_steps=100)
    kept = [json.loads(line) for line in (tmp_path / "run" / "bad_batches.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == [3] * 4
    assert all(line["text"].endswith(line["learned_text"]) for line in kept)
    assert len({line["text"].split("assistant")[0] for line in kept}) == 1  # one prompt, four completions
    assert len({line["learned_text"] for line in kept}) > 1
    assert len(lines(tmp_path / "run", "reward")) == 3  # nor do its figures stand among the others'


@pytest.fixture
def short_of_memory(monkeypatch):
    """Passes of more tokens than these run out of memory."""

    def limit(tokens):
        each = grpo.GRPOTrainer.each

        def refuse(self, model, given, balanced=False):
            if given["input_ids"].numel() > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return each(self, model, given, balanced)

        monkeypatch.setattr(grpo.GRPOTrainer, "each", refuse)

    return limit


@pytest.mark.parametrize("others", [{"beta": 0.2}, {"loss_type": "grpo", "mask_truncated_completions": True}])
@pytest.mark.parametrize("fused", [False, True])
def test_a_batch_that_does_not_fit_is_halved(others, fused, run, short_of_memory, tmp_path, request):
    if fused:
        request.getfixturevalue("made")
    others = {**others, "max_steps": 2, "held_out": 6, "gradient_accumulation_steps": 2}
    run(output=str(tmp_path / "whole"), **others)
    short_of_memory(160)
    run(output=str(tmp_path / "pieces"), **others)
    close(tmp_path / "pieces", tmp_path / "whole", rtol=2e-3)


def test_graphs_make_room_for_a_held_out_row(run, monkeypatch, tmp_path):
    full, figures, release = [True], grpo.GRPOTrainer._figures_of, grpo.GRPOTrainer.release_graphs

    def short_of_memory(self, batch):
        if full[0]:
            raise torch.OutOfMemoryError("no room")
        return figures(self, batch)

    def make_room(self, why):
        release(self, why)
        return full[0] and not full.__setitem__(0, False)

    monkeypatch.setattr(grpo.GRPOTrainer, "_figures_of", short_of_memory)
    monkeypatch.setattr(grpo.GRPOTrainer, "release_graphs", make_room)
    run(max_steps=1, per_device_eval_batch_size=1)
    assert len(lines(tmp_path / "run", "eval_kl")) == 2


@pytest.mark.parametrize(
    ("others", "flattened"),
    [
        ({"beta": 0.2}, True),
        ({"beta": 0.2}, False),
        ({"temperature": 0.7, "mask_truncated_completions": True}, True),
        ({"experts": True, "router_aux_loss_coef": 0.5, "held_out": 0}, True),
    ],
)
def test_as_on_a_gpu_it_is_the_same(others, flattened, run, mixture, made, tmp_path, monkeypatch):
    others = {**others, **({"model": mixture} if "experts" in others else {})}
    others = {**others, "max_steps": 5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    if not flattened:
        monkeypatch.setattr(trainer_passes, "takes_bounds", lambda *_: False)
    run(output=str(tmp_path / "fused"), **others)
    assert bool(made[0].shapes) == flattened
    if flattened:
        assert made[0].graph_replays >= 3, made[0].why_no_graph
    run(output=str(tmp_path / "plain"), kernels="reference", **others)
    close(tmp_path / "fused", tmp_path / "plain", (*ALL, "aux_loss"))
    assert max(lines(tmp_path / "fused", "sampling/sampling_logp_difference/mean")) < 1e-5


def test_logits_that_are_too_many_come_a_few_at_a_time(run, tmp_path, monkeypatch):
    run(output=str(tmp_path / "all"), temperature=0.8)
    monkeypatch.setattr(sequence_trainer, "logits_fit", lambda labels, vocabulary: False)
    monkeypatch.setattr(sequence_trainer, "row_losses", lambda *_: pytest.fail("all logits were asked for"))
    run(output=str(tmp_path / "few"), temperature=0.8)
    close(tmp_path / "few", tmp_path / "all")


KINDS = {
    "head": {"targets": ["lm_head", "q_proj"]},
    "modules": {"modules_to_save": ["lm_head"], "targets": ["q_proj", "v_proj"]},
    "checkpointing": {"gradient_checkpointing": True},
    "nf4": {"quantize": "nf4"},
    "dropout": {"dropout": 0.3},
    "penalty": {"repetition_penalty": 1.3, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
    "sequence": {"importance_sampling_level": "sequence", "epsilon_high": 0.3, "delta": 2.0},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "several rewards": {
        "reward": ["token_f1", "length:4", "format:.*[a-z].*"],
        "reward_weights": [1.0, 0.5, 0.2],
        "multi_objective_aggregation": "normalize_then_sum",
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_trained_the_policy_draws_and_the_reference_stands(kind, run, tmp_path):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    result = run(max_steps=3, beta=0.1, eval_steps=3, held_out=4, **KINDS[kind])
    for name in ("kl", "eval_kl"):
        assert lines(tmp_path / "run", name)[0] == pytest.approx(0, abs=1e-6)
        assert lines(tmp_path / "run", name)[-1] > 0
    # (What is drawn is decoded a token at a time, by other products than those of a whole pass.)
    of_kind = 1e-2 if kind == "nf4" else 1e-5
    assert max(lines(tmp_path / "run", "sampling/sampling_logp_difference/mean")) < of_kind
    assert all(torch.isfinite(tensor).all() for tensor in trained_tensors(result.model).values())
    assert min(lines(tmp_path / "run", "grad_norm")) > 0


def test_experts_learn_with_the_loss_that_keeps_them_balanced(run, mixture, few, tmp_path):
    others = few | {"model": mixture, "experts": True, "max_steps": 3}
    run(output=str(tmp_path / "balanced"), router_aux_loss_coef=0.5, **others)
    run(output=str(tmp_path / "plain"), router_aux_loss_coef=0.0, **others)
    balance = lines(tmp_path / "balanced", "aux_loss")[0]
    assert balance > 0
    assert lines(tmp_path / "plain", "aux_loss") == []
    one, other = (lines(tmp_path / name, "loss")[0] for name in ("balanced", "plain"))
    assert one == pytest.approx(other + 0.5 * balance, rel=1e-4)
    assert max(lines(tmp_path / "plain", "sampling/sampling_logp_difference/mean")) < 1e-5


class TestTruncated:
    def test_of_what_was_cut_off_nothing_is_learned(self, run, few, tmp_path, monkeypatch):
        batches, pass_of = [], grpo.GRPOTrainer.one_pass
        monkeypatch.setattr(
            grpo.GRPOTrainer, "one_pass", lambda self, inputs, *a: batches.append(inputs) or pass_of(self, inputs, *a)
        )
        run(**few, mask_truncated_completions=True, max_steps=4, max_completion_length=4)
        ratios = lines(tmp_path / "run", "completions/clipped_ratio")
        assert 0.2 < min(ratios) <= max(ratios) < 1
        ends = torch.tensor(ENDS)
        for inputs in batches:
            for labels, mask, ids in zip(inputs["labels"], inputs["attention_mask"], inputs["input_ids"], strict=True):
                ended = bool(torch.isin(ids[mask.bool()][-1], ends))
                assert bool((labels != -100).any()) == ended

    def test_a_step_of_nothing_else_moves_nothing(self, run, few, tmp_path):
        """Nor does its loss become NaN, which is a sum over no token."""
        with pytest.raises(TheodoraError, match="frozen"):
            run(**few, mask_truncated_completions=True, max_completion_length=1, max_steps=2, reward=["length:1"])
        assert lines(tmp_path / "run", "loss") == [0.0, 0.0]


def test_a_function_gets_what_belongs_together(run, tmp_path):
    rows = {
        kind: [{"question": f"number {n}?", "answer": f"it is {n}", "n": n, "kind": kind} for n in numbers]
        for kind, numbers in {"train": range(6), "held out": range(6, 8)}.items()
    }
    for kind, own_rows in rows.items():
        (tmp_path / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own_rows))
    files = {"data": str(tmp_path / "train.jsonl"), "eval_data": str(tmp_path / "held out.jsonl"), "held_out": None}
    run(**files, reward=[reward("of_rows")], max_steps=4, eval_steps=2, max_length=256)
    # each gives the number of tokens
    for name in ("", "eval_"):
        assert lines(tmp_path / "run", f"{name}reward") == pytest.approx(
            lines(tmp_path / "run", f"{name}completions/mean_length")
        )


def test_rows_keep_their_columns_where_others_are_left_out(run, tmp_path):
    rows = [
        {"prompt": f"number{n} " + "is long " * 20 * (n % 3 == 1), "answer": f"it is {n}", "n": n} for n in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(data=str(tmp_path / "rows.jsonl"), held_out=3, max_steps=3, eval_steps=3, reward=[reward("belongs")])
    assert len(lines(tmp_path / "run", "reward")) == 3
    assert len(lines(tmp_path / "run", "eval_reward")) == 2


def test_rewards_that_are_all_alike_are_said(run, few, options, capsys):
    with pytest.raises(Exception, match="all completions of each prompt had the same reward") as caught:
        run(**few, reward=[reward("alike")], max_steps=3)
    assert "--from-adapter" in str(caught.value)


def epochs(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["epoch"] for line in found if "loss" in line]


def test_epochs_are_of_completions(run, few, tmp_path, monkeypatch):
    """Of five prompts, four completions of each, eight in a step; each prompt once, in another order."""
    asked, call = [], Rollouts.__call__
    monkeypatch.setattr(
        Rollouts, "__call__", lambda self, p, *a, **k: asked.append([*map(len, p)]) or call(self, p, *a, **k)
    )
    result = run(**few, max_steps=None, num_train_epochs=2)
    assert result.steps == 6
    assert [len(lengths) for lengths in asked] == [8, 8, 4, 8, 8, 4]
    one, other = ([length for lengths in asked[n : n + 3] for length in lengths] for n in (0, 3))
    assert sorted(one) == sorted(other)
    assert len(set(one)) == 5
    assert one != other
    assert [round(epoch, 2) for epoch in epochs(tmp_path / "run")[:6]] == [0.33, 0.67, 1.0, 1.33, 1.67, 2.0]


def test_steps_learn_from_the_same_completions(run, few, tmp_path, monkeypatch):
    """Of five prompts two in a step, of which three steps each learn: an epoch takes one of the first again."""
    drawn, call = [], Rollouts.__call__

    def once(self, prompts, *args, **kwargs):
        drawn.append((self._model.training, [*map(len, prompts)]))
        return call(self, prompts, *args, **kwargs)

    monkeypatch.setattr(Rollouts, "__call__", once)
    result = run(**few, max_steps=None, num_train_epochs=1, num_iterations=3, learning_rate=3e-2)
    assert result.steps == 9
    assert [len(lengths) for _, lengths in drawn] == [8, 8, 8]
    asked = [length for _, lengths in drawn for length in lengths[::4]]
    assert len(set(asked)) == 5
    assert asked[5] == asked[0]
    assert epochs(tmp_path / "run")[:9] == pytest.approx([n / 9 for n in range(1, 10)])
    assert len(lines(tmp_path / "run", "reward")) == 3  # what is drawn is told once
    cut = lines(tmp_path / "run", "clip_ratio/region_mean")
    assert cut[::3] == [0, 0, 0]  # by the policy that learns
    assert min(cut[2::3]) > 0
    run(**few, max_steps=1, learning_rate=3e-2, output=str(tmp_path / "once"))
    assert lines(tmp_path / "once", "loss")[0] == pytest.approx(lines(tmp_path / "run", "loss")[0], abs=1e-6)


class TestDrawnAtOnce:
    """Completions of several steps, two prompts in each."""

    @pytest.fixture
    def drawn(self, monkeypatch):
        """The lengths of the prompts of each drawing, and at which step it was."""
        found, call = [], Rollouts.__call__

        def noted(self, prompts, seed, *args, **kwargs):
            found.append((seed & 0xFFFF, [len(prompt) for prompt in prompts], kwargs["places"]))
            return call(self, prompts, seed, *args, **kwargs)

        monkeypatch.setattr(Rollouts, "__call__", noted)
        return found

    def test_steps_learn_from_their_parts_as_in_trl(self, run, few, drawn, tmp_path, monkeypatch):
        """Of five prompts four at once, twice: A B, A B, C D, C D. An epoch takes three of the first again."""
        steps, pass_of = [], grpo.GRPOTrainer.one_pass

        def noted(self, inputs, *args):
            ids, mask = inputs["input_ids"], inputs["labels"] == -100
            steps.append([int(n) for n in (mask & (inputs["attention_mask"] == 1)).sum(1)])  # of prompts
            assert len(ids) == 8
            return pass_of(self, inputs, *args)

        monkeypatch.setattr(grpo.GRPOTrainer, "one_pass", noted)
        result = run(
            **few, max_steps=None, num_train_epochs=1, num_iterations=2, steps_per_generation=2, learning_rate=3e-2
        )
        assert result.steps == 8
        assert [step for step, _, _ in drawn] == [1, 5]
        asked = [lengths for _, lengths, _ in drawn]
        assert [len(lengths) for lengths in asked] == [16, 16]
        of_steps = [part for lengths in asked for _ in range(2) for part in (lengths[:8], lengths[8:])]
        assert steps == of_steps
        # TRL's sampler gives as many batches of the same prompts, in this order.
        order = [lengths[n] for lengths in asked for n in range(0, 16, 4)]
        theirs = RepeatSampler(order, mini_repeat_count=4, batch_size=4, repeat_count=2 * 2, shuffle=False)
        of_batches = torch.tensor([order[n] for n in theirs]).view(2, 2, 2, 16)
        slices = [of_batches[block, 0, 0].view(2, 8)[n] for block in range(2) for _ in range(2) for n in range(2)]
        assert torch.stack(slices).tolist() == steps
        assert len(lines(tmp_path / "run", "reward")) == 2  # what is drawn is told once
        assert result.train_reward == lines(tmp_path / "run", "reward")[-1]  # of the last tenth nothing was drawn
        cut = lines(tmp_path / "run", "clip_ratio/region_mean")
        assert cut[::4] == [0, 0]  # by the policy that learns
        assert min(cut[3::4]) > 0

    @pytest.mark.parametrize("fused", [False, True])
    def test_a_step_learns_by_the_policy_that_drew(self, fused, run, few, tmp_path, request):
        """A learning rate of 0 leaves it as it is: all steps are those that are drawn for one by one."""
        if fused:
            request.getfixturevalue("made")
        many = few | {"max_steps": 4, "learning_rate": 1e-6, "beta": 0.1}
        run(**many, steps_per_generation=2)
        assert lines(tmp_path / "run", "clip_ratio/region_mean") == [0] * 4
        assert len(lines(tmp_path / "run", "reward")) == 2
        norms = lines(tmp_path / "run", "grad_norm")
        assert min(norms) > 0

    def test_one_step_is_as_without(self, run, whole, few, tmp_path):
        run(**few, max_steps=4, steps_per_generation=2, gradient_accumulation_steps=2, per_device_train_batch_size=4)
        same(tmp_path / "run", whole(**few, max_steps=4, gradient_accumulation_steps=2, per_device_train_batch_size=4))

    @pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
    def test_steps_without_learning_are_one_long_step(self, loss_type, run, few, tmp_path):
        """Two halves of what was drawn at once, if nothing is learned between them, have together its mean loss."""
        others = few | {
            "max_steps": 2,
            "learning_rate": 1e-6,
            "beta": 3.0,
            "from_adapter": None,
            "loss_type": loss_type,
        }
        run(**others, steps_per_generation=2, output=str(tmp_path / "two"))
        run(**others, per_device_train_batch_size=16, output=str(tmp_path / "one"))
        two, one = (lines(tmp_path / name, "loss") for name in ("two", "one"))
        assert sum(two) / 2 == pytest.approx(one[0], abs=2e-5)

    def test_a_group_may_be_in_two_steps(self, run, few, drawn, tmp_path):
        """What its completions are worth is among all of them."""
        run(**few, max_steps=4, num_generations=16, steps_per_generation=2)
        assert [len(set(lengths)) for _, lengths, _ in drawn] == [1, 1]
        assert min(lines(tmp_path / "run", "reward_std")) > 0
        assert min(lines(tmp_path / "run", "grad_norm")) > 0

    def test_more_prompts_than_there_are(self, run, few, drawn, tmp_path):
        """Each time that one is asked has random numbers of its own."""
        result = run(**few, max_steps=None, num_train_epochs=2, per_device_train_batch_size=16, steps_per_generation=2)
        assert result.steps == 4
        for _, lengths, places in drawn:
            assert len(set(places)) == len(places) == 32
            assert len(set(lengths)) == 5

    def test_another_number_of_processes_draws_the_rest_anew(self, run, few, drawn, tmp_path, monkeypatch):
        carried_on = []
        settings = {"max_steps": 6, "steps_per_generation": 3, "num_iterations": 2, "save_steps": 2, **few}
        run(**settings | {"max_steps": 2})
        drawn.clear()
        # as if there had been others
        monkeypatch.setattr(grpo.GRPOTrainer, "carry_on", lambda self, carried: carried_on.append(carried))
        run(**settings, resume=True)
        assert [part for part, _ in carried_on[0]["lessons"]] == [0, 1, 2]
        assert [(step, len(lengths)) for step, lengths, _ in drawn] == [(3, 8), (4, 16)]
        assert len(lines(tmp_path / "run", "loss")) == 6

    def test_what_was_drawn_for_other_settings_is_drawn_anew(self, run, few, drawn):
        settings = {"steps_per_generation": 3, "save_steps": 1, **few}
        run(**settings, max_steps=1)
        drawn.clear()
        run(**settings, max_steps=3, temperature=0.7, resume=True)
        assert [(step, len(lengths)) for step, lengths, _ in drawn] == [(2, 16)]

    def test_graphs_make_room_for_what_the_policy_that_drew_says(self, run, few, monkeypatch, tmp_path):
        full, parts = [True], grpo.in_parts

        def short_of_memory(found, batch):
            if full[0]:
                raise torch.OutOfMemoryError("no room")
            return parts(found, batch)

        monkeypatch.setattr(grpo, "in_parts", short_of_memory)
        monkeypatch.setattr(grpo.GRPOTrainer, "release_graphs", lambda self, why: full.pop() and not full.append(False))
        run(**few, max_steps=2, steps_per_generation=2)
        assert len(lines(tmp_path / "run", "loss")) == 2

    def test_many_steps_without_a_difference(self, run, few, tmp_path, monkeypatch):
        said = []
        monkeypatch.setattr(
            Console, "print", lambda self, *objects, **_: said.append(str(objects[0]) if objects else "")
        )
        with pytest.raises(TheodoraError, match="frozen"):
            run(**few, reward=[reward("alike")], max_steps=12, steps_per_generation=4)
        assert any("12 steps, and all completions" in text for text in said)

    def test_as_many_steps_at_once_in_a_resumed_run(self, run, few):
        settings = few | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
        run(**settings, max_steps=1, steps_per_generation=4)
        for others in ({"steps_per_generation": 2}, {"generation_batch_size": 24}):
            with pytest.raises(ConfigError, match=r"for 2 steps at once and are for [13] "):
                run(**settings, max_steps=2, **others, resume=True)
        with pytest.raises(ConfigError, match="num_iterations was 1 and is 2"):
            run(**settings, max_steps=2, steps_per_generation=4, num_iterations=2, resume=True)
        larger = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 8, "steps_per_generation": 2}
        run(**settings | larger, max_steps=2, resume=True)


def test_the_record_runs_again(run, tmp_path):
    run(max_steps=2, beta=0.1, top_k=50, epsilon_high=0.28, scale_rewards="none", num_generations_eval=2)
    record = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert record["objective"] == "grpo"
    record["output"] = str(tmp_path / "again")
    train(TrainConfig.from_options(record, granted=["reward"]), console=Console(quiet=True))
    same(tmp_path / "again", tmp_path / "run")


def test_rows_in_the_order_of_the_data(run, few, tmp_path, monkeypatch):
    asked, call = [], Rollouts.__call__
    monkeypatch.setattr(
        Rollouts, "__call__", lambda self, p, *a, **k: asked.append([*map(len, p)]) or call(self, p, *a, **k)
    )
    run(**few, max_steps=3, train_sampling_strategy="sequential")
    of_steps = [lengths[::4] for lengths in asked]
    assert of_steps[0] + of_steps[1] + of_steps[2] == sorted(of_steps[0] + of_steps[1] + of_steps[2])


class TestWhatMakesNoSense:
    @pytest.fixture(autouse=True)
    def _nothing_is_loaded(self, monkeypatch):
        monkeypatch.setattr(prepare, "load_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))

    @pytest.mark.parametrize(
        ("others", "told"),
        [
            ({"reward": []}, "reward is missing.*exact_match"),
            ({"reward_weights": [1.0, 2.0]}, "holds 2 numbers for 1 rewards"),
            ({"num_generations": 1}, "num_generations is 1; expected at least 2"),
            ({"num_generations": 3}, "has 8 completions .*num_generations is 3"),
            ({"dataloader_drop_last": True}, "dataloader_drop_last is True: the completions of a prompt stay together"),
            ({"num_iterations": 0}, "num_iterations is 0; expected at least 1"),
            ({"num_generations_eval": 0}, "num_generations_eval is 0; expected at least 1"),
            ({"max_completion_length": 0}, "max_completion_length is 0; expected at least 1"),
            ({"max_completion_length": 64}, "max_completion_length is 64, and max_length.*is 64"),
            ({"beta": -1}, "beta is -1.*at least 0"),
            ({"beta": "much"}, "beta is 'much'; expected a number"),
            ({"epsilon": -0.1}, "epsilon is -0.1; expected at least 0"),
            ({"epsilon_high": 0}, "epsilon_high is 0.*more than 0"),
            ({"delta": 1}, "delta is 1.*more than 1"),
            ({"loss_type": "bnpo"}, "expected dapo"),
            ({"loss_type": "sapo"}, "loss_type is 'sapo'; expected one of dapo"),
            ({"loss_type": ["grpo", "dapo"]}, "loss_type"),
            ({"loss_type": "cispo"}, "cispo needs epsilon_high"),
            ({"importance_sampling_level": "word"}, "expected one of token, sequence"),
            ({"scale_rewards": "all"}, "expected one of group, batch, none"),
            ({"multi_objective_aggregation": "sum"}, "expected one of sum_then_normalize"),
            ({"temperature": 0}, "temperature is 0.*above 0"),
            ({"top_p": 0}, "top_p is 0.*above 0"),
            ({"min_p": 2}, "min_p is 2.*between 0 and 1"),
            ({"steps_per_generation": 0}, "steps_per_generation is 0; expected at least 1"),
            ({"steps_per_generation": 2, "generation_batch_size": 8}, "are 2 and 8; expected one of the two"),
            (
                {"steps_per_generation": 3, "gradient_accumulation_steps": 2},
                "multiple of it.*2 for each step, 4 for two",
            ),
            ({"generation_batch_size": 12}, "a step has 8 completions .*8 for each step, 16 for two"),
            ({"num_generations": 3, "steps_per_generation": 2}, "16 are drawn at once, for 2 steps of 8 .*is 3"),
            (
                {"use_transformers_paged": True},
                "use_transformers_paged has no effect here: it is used where it is faster",
            ),
            ({"vllm_max_model_length": 64}, "vLLM does not draw here; expected use_vllm: true"),
            ({"use_vllm": True, "vllm_mode": "server"}, "expected colocate: a server is another process"),
            ({"use_vllm": True, "vllm_tensor_parallel_size": 2}, "expected 1: one process"),
            ({"use_vllm": True, "vllm_model_impl": "transformers"}, "expected vllm, whose layers"),
            ({"use_vllm": True, "vllm_gpu_memory_utilization": 1.0}, "more than 0, less than 1"),
            ({"use_vllm": True, "vllm_max_model_length": 6}, r"more than max_completion_length \(6\)"),
            ({"use_vllm": True, "vllm_server_port": 1}, "vllm_server_port has no effect here: vLLM draws in the same"),
            ({"use_vllm": True, "vllm_importance_sampling_correction": True}, "by how much vLLM's differ is recorded"),
            ({"sync_ref_model": True}, "the reference is frozen"),
            ({"log_completions": True}, "samples from before and after"),
            ({"top_entropy_quantile": 0.2}, "top_entropy_quantile has no effect here"),
            ({"chat_template_kwargs": {"a": 1}}, "prompts are what evaluate and chat make of them"),
            ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
            ({"shuffle_dataset": True}, "shuffle_dataset"),
            ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
            ({"packing": True}, "needs each answer by itself"),
            ({"eval_packing": True}, "eval_packing"),
            ({"train_on": "all"}, "is about answers alone"),
            ({"replay": "more.jsonl"}, "learns no plain text"),
            ({"neftune_noise_alpha": 5}, "noise"),
            ({"objective": "dpo"}, "only grpo has rewards"),
            ({"objective": "sft", "reward": [], "num_generations": 4}, "belongs to --objective grpo"),
        ],
    )
    def test_options(self, others, told, run):
        with pytest.raises(ConfigError, match=f"(?s){told}"):
            run(**others)

    def test_prompts_beyond_the_window(self, run, tmp_path):
        (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a" * 99, "answer": "b"}) + "\n")
        with pytest.raises(DataError, match="max_completion_length"):
            run(data=str(tmp_path / "long.jsonl"), held_out=0)

    def test_columns_that_a_function_needs(self, run):
        with pytest.raises(DataError, match="needs 'n' and 'kind'"):
            run(reward=[reward("of_rows")])


def test_many_steps_without_a_difference_are_said_once(run, few, tmp_path, monkeypatch):
    """However often a step is begun anew."""
    said, each = [], grpo.GRPOTrainer.each
    monkeypatch.setattr(grpo, "_STEPS_WITHOUT", 3)
    monkeypatch.setattr(Console, "print", lambda self, *objects, **_: said.append(str(objects[0]) if objects else ""))

    def refuse(self, model, given, balanced=False):
        if given["input_ids"].numel() > 160 and self.state.global_step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return each(self, model, given, balanced)

    monkeypatch.setattr(grpo.GRPOTrainer, "each", refuse)
    with pytest.raises(TheodoraError, match="frozen"):
        run(**few, reward=[reward("alike")], max_steps=2)
    assert any("Each batch now takes 2 passes" in text for text in said)
    assert not any("3 steps, and all completions" in text for text in said)


def test_a_default_batch_has_a_group(options):
    """As many completions of a prompt as a step has by default, or it says what to choose."""
    options = {name: value for name, value in options.items() if name not in ("per_device_train_batch_size",)}
    config = TrainConfig.from_options(options | {"num_generations": 8}, granted=["reward"])
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps % 8 == 0
