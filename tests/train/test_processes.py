"""Two and four processes train what one trains with twice, and four times, the accumulation; and end together."""

import io
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import tiny
from crash.killing import fork_server
from several import Scenario, launch
from theodora.config import TrainConfig
from theodora.train import train
from theodora.train.wholeness import faults
from train import fails_in_one
from train.rewarded import reward, saved

SKIPS = {"max_loss": 5.97, "on_nan": "skip", "held_out": 2, "learning_rate": 1e-3}
SHORT = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "max_steps": 2, "logging_steps": 1}
FIGURES = (
    *("loss", "eval_loss", "grad_norm", "learning_rate", "num_tokens", "entropy", "mean_token_accuracy", "step"),
    *("general_loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "eval_min_reward"),
)
OF_GRPO = (
    *("loss", "eval_loss", "grad_norm", "learning_rate", "num_tokens", "step", "entropy", "kl", "eval_kl", "reward"),
    *("reward_std", "frac_reward_zero_std", "completions/mean_length", "completions/clipped_ratio"),
    *("rewards/low/mean", "eval_reward", "eval_completions/mean_length", "eval_rewards/low/mean"),
)
OF_PIECES = ("loss", "eval_loss", "grad_norm", "learning_rate", "num_tokens", "step")  # the others are means of passes
KINDS = {
    # 33 rows in batches of 3: the last of an epoch's 11 batches is one process' alone
    "plain": {"held_out": 7, "eval_steps": 3, "logging_steps": 2, "save_steps": 7, "max_steps": 8},
    "packed": {"packing": True, "max_length": 64, "held_out": 7, "per_device_train_batch_size": 1, "eval_steps": 3},
    "lengths": {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 2},
    "full": {"method": "full", "targets": None, "learning_rate": 1e-3, "held_out": 7, "eval_steps": 3},
    "stops": {"early_stopping_patience": 1, "eval_steps": 1, "save_steps": 1, "learning_rate": 0.3, "max_steps": 8},
}


def said(options):
    """Without the options that a kind of run takes back (None): those of an adapter are refused where there is none."""
    return {name: value for name, value in options.items() if value is not None}


@pytest.fixture(scope="module")
def base(tiny_model_dir, sums):
    return {
        "model": str(tiny_model_dir()),
        "data": str(sums),
        "max_steps": 5,
        "targets": ["q_proj", "v_proj", "down_proj"],
        "eval_steps": 100,
        "save_steps": 100,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "bf16": False,
        "ddp_timeout": 20,
    }


ENDINGS = ("again", "hung", "killed")
DRAWN = {"dropout": 0.1, "logging_steps": 4, "save_steps": 3, "held_out": 4, "eval_steps": 100}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(6) for b in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def kinds(folder):
    """`KINDS`, and general text among the rows: all of a text is learned, and a few tokens of a row."""
    texts = folder / "general.jsonl"
    texts.write_text("".join(json.dumps({"text": f"Some text number {i}." * (1 + i % 3)}) + "\n" for i in range(20)))
    pairs = [
        {"prompt": f"{a} + {b} =", "chosen": f" {a + b}", "rejected": f" {a * b}!!"} for a in range(5) for b in (2, 3)
    ]
    judged = [
        {"prompt": f"{a} + {b} =", "completion": f" {a + b}" + "!" * wrong, "label": not wrong}
        for a in range(5)
        for b in (2, 3)
        for wrong in (0, 1)
    ]
    preferences = {}
    for objective, rows in {"dpo": pairs, "kto": judged, "reward": pairs}.items():
        path = folder / f"{objective}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        preferences[objective] = {"objective": objective, "data": str(path), "held_out": 2, "max_steps": 4}
        preferences[objective] |= {} if objective == "reward" else {"beta": 0.5}
    asked = folder / "asked.jsonl"
    asked.write_text("".join(json.dumps({"prompt": "say " + "so " * n}) + "\n" for n in range(5)))
    grpo = {"objective": "grpo", "reward": [reward("low")], "num_generations": 4, "max_completion_length": 8}
    grpo |= {
        "model": saved(tiny.tiny_model(), folder / "ends"),
        "data": str(asked),
        "held_out": 0,
        "max_length": 64,
        "max_steps": 5,
        "beta": 0.1,
    }
    preferences |= {
        # the completions of a prompt are spread over both, held-out prompts too
        "grpo": grpo
        | {"data": str(folder / "rows.jsonl"), "held_out": 3, "per_device_train_batch_size": 2}
        | {"num_generations_eval": 3, "per_device_eval_batch_size": 2, "eval_steps": 2, "save_steps": 3},
        # the last step of an epoch has one prompt, which is one process' alone
        "grpo-masked": grpo
        | {"mask_truncated_completions": True, "loss_type": "grpo"}
        | {"per_device_train_batch_size": 4, "max_completion_length": 4},
        "grpo-at-once": grpo | {"per_device_train_batch_size": 4, "generation_batch_size": 16, "num_iterations": 2},
    }
    replay = {"replay": str(texts), "replay_share": 0.4, "held_out": 4, "max_steps": 4}
    # What is forgotten is measured by the first process; of sharded weights by all of them (`sharded`).
    plain = KINDS["plain"] | {"general": str(texts)}
    return KINDS | {"plain": plain, "replay": replay, **preferences}


@pytest.fixture(scope="module")
def ended(base, folder):
    """A process hangs, and one is killed, after the checkpoint of step 3: mostly waiting, and so beside `two`."""
    options = {name: base | DRAWN | {"output": str(folder / name)} for name in ("hung", "killed")}
    scenarios = [
        # The data takes longer than processes wait for one another in steps.
        Scenario("hung", options["hung"] | {"ddp_timeout": 6}, dies=(1, 4, "hang"), slow=7.0),
        Scenario("killed", options["killed"], dies=(1, 4, "kill")),
    ]
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(launch, 2, scenarios, folder)


@pytest.fixture(scope="module")
def two(base, folder, ended, kinds):
    def kind(name, options, **more):
        return Scenario(name, said(base | {"output": str(folder / name)} | options), **more)

    other = folder / "other.jsonl"
    other.write_text((folder / "rows.jsonl").read_text().replace("7", "8"))
    scenarios = [kind(name, options) for name, options in kinds.items()]
    scenarios += [
        kind("as-on-gpu", {"max_length": 32, "per_device_train_batch_size": 4}, as_on_gpu=True),
        kind("whole", DRAWN),
        kind("again", DRAWN, dies=(1, 4, "raise")),  # after the checkpoint of step 3
        kind("grpo again", kinds["grpo"], dies=(1, 4, "raise")),  # after the checkpoint of step 3
        kind("grpo again resumed", kinds["grpo"] | {"output": str(folder / "grpo again"), "resume": "auto"}),
        kind("grpo-fails", kinds["grpo"] | {"reward": [reward("fails")]}),
        kind("grpo-short", kinds["grpo-masked"], memory=(1, 100)),
        kind("configured", {}, of_process={1: {"learning_rate": 0.5}}),
        kind("rows", {"held_out": 0, "data": str(folder / "rows.jsonl")}, of_process={1: {"data": str(other)}}),
        kind("first-fails", {"data": str(folder / "none.jsonl")}),
        kind("skips", SKIPS),
        kind("sharded", kinds["plain"] | {"sharding": "fsdp2", "gradient_checkpointing": True}),
        kind("nf4", {"sharding": "fsdp2", "quantize": "nf4", "max_steps": 2, "held_out": 0}),
        kind("int8", {"sharding": "fsdp2", "quantize": "int8", "data": str(folder / "none.jsonl")}),
        # 40 rows in batches of 6, of which process 1 can take one row at a time; the second step has less for it to do
        kind("short", SHORT | {"held_out": 0}, memory=(1, 45)),
        kind("short-sharded", SHORT | {"held_out": 0, "sharding": "fsdp2"}, memory=(1, 45)),
        kind("too-short", SHORT | {"held_out": 0, "sharding": "fsdp2"}, memory=(1, 20)),
        kind("stopped", {"max_steps": 40, "save_steps": 100, "held_out": 0}, dies=(1, 4, "sigterm")),
    ]
    found = launch(2, scenarios, folder)
    ended.result()
    resumed = [kind(f"{name} resumed", DRAWN | {"output": str(folder / name), "resume": "auto"}) for name in ENDINGS]
    found |= launch(2, resumed, folder)
    print({name: [round(each.get("cpu", 0), 1) for each in both] for name, both in found.items()})
    return found


@pytest.fixture(scope="module")
def four(base, folder):
    options = base | {"output": str(folder / "four"), "per_device_train_batch_size": 2, "eval_steps": 3}
    return launch(4, [Scenario("four", options)], folder)["four"]


@pytest.mark.parametrize("kind", [*KINDS, "replay", "dpo", "kto", "reward"])
def test_two_processes_trace_one_with_twice_the_accumulation(kind, kinds, two, folder, run, base, tmp_path):
    assert [found["error"] for found in two[kind]] == [None, None], two[kind]
    run(**said(base | kinds[kind] | {"gradient_accumulation_steps": 2, "output": str(tmp_path / "one")}))
    trace(folder / kind, tmp_path / "one")


@pytest.mark.parametrize("kind", ["grpo", "grpo-masked", "grpo-at-once"])
def test_two_processes_draw_what_one_does_and_learn_the_same(kind, kinds, two, folder, run, base, tmp_path):
    """Advantages go by groups that are spread over both, and means by the completions of both."""
    assert [found["error"] for found in two[kind]] == [None, None], two[kind]
    run(**base | kinds[kind] | {"gradient_accumulation_steps": 2, "output": str(tmp_path / "one")})
    trace(folder / kind, tmp_path / "one", figures=OF_GRPO)
    if kind == "grpo-at-once":
        assert len(lines_of(folder / kind, "reward")) == 2  # of five steps
        return
    assert max(lines_of(folder / kind, "clip_ratio/region_mean")) == 0
    if kind == "grpo":
        assert max(lines_of(folder / kind, "frac_reward_zero_std")) < 1
    else:
        assert 0 < min(lines_of(folder / kind, "completions/clipped_ratio")) < 1


def test_a_run_of_grpo_whose_process_failed_goes_on_with_the_same_bits(two, folder):
    resumed = two["grpo again resumed"]
    assert [found["error"] for found in resumed] == [None, None], resumed
    assert "going on from step 3" in resumed[0]["printed"]
    same(folder / "grpo again", folder / "grpo", OF_GRPO)


def test_a_reward_that_fails_in_one_process_ends_all(two):
    first, second = two["grpo-fails"]
    assert second["error"] == "DataError"
    assert "no more rewards" in second["text"]
    assert first["error"] == "OtherFailed", first
    assert "no more rewards" in first["text"]


def test_where_one_runs_out_of_memory_rewards_are_the_same(two, folder):
    assert [found["error"] for found in two["grpo-short"]] == [None, None], two["grpo-short"]
    assert "Each batch now takes 2 passes" in (folder / "grpo-short" / "logs" / "process-1.txt").read_text()
    trace(folder / "grpo-short", folder / "grpo-masked", figures=OF_GRPO)


def test_four_processes_trace_one(four, folder, run, base, tmp_path):
    assert [found["error"] for found in four] == [None] * 4, four
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "eval_steps": 3}
    run(**base | options | {"output": str(tmp_path / "one")})
    trace(folder / "four", tmp_path / "one")


def test_one_process_speaks_and_writes(two, folder):
    first, second = two["plain"]
    assert "2 processes on 1 machine, DDP, gloo" in first["printed"]
    assert "the last batch of an epoch goes to the first process" in first["printed"]
    assert "each sent " in first["printed"]
    assert first["bytes_per_step"] == 4 * first["trainable_parameters"]
    assert first["processes"] == 2
    assert second["printed"] == ""
    for name in ("tokens", "eval_loss", "train_loss", "steps"):
        assert first[name] == second[name]
    assert "2 processes on 1 machine" in (folder / "plain" / "README.md").read_text()


def test_graphs_are_captured_in_each_process(two, folder, run, base, tmp_path):
    assert [found["error"] for found in two["as-on-gpu"]] == [None, None], two["as-on-gpu"]
    assert all(found["replays"] > 0 for found in two["as-on-gpu"])
    options = {"max_length": 32, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    run(**base | options | {"output": str(tmp_path / "one")})
    trace(folder / "as-on-gpu", tmp_path / "one")


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_run_whose_process_failed_goes_on_with_the_same_bits(two, folder, ending):
    resumed = two[f"{ending} resumed"]
    assert [found["error"] for found in resumed] == [None, None], resumed
    assert "going on from step 3" in resumed[0]["printed"]
    same(folder / ending, folder / "whole")


def test_the_process_that_failed_is_named(two, folder):
    first, second = two["again"]
    assert second["error"] == "OSError"
    assert "on fire" in second["text"]
    assert first["error"] == "OtherFailed", first
    assert "Process 1 failed: the disk is on fire" in first["text"]
    assert "process-1.txt" in first["text"]
    assert "--resume auto" in first["text"]
    assert "on fire" in (folder / "again" / "logs" / "process-1.txt").read_text()


def test_one_process_goes_on_where_two_stopped(two, folder, run, base, tmp_path):
    assert two["whole"][0]["error"] is None
    shutil.copytree(folder / "plain", tmp_path / "fewer")
    shutil.rmtree(tmp_path / "fewer" / "checkpoints" / "checkpoint-8")
    printed = io.StringIO()
    options = base | KINDS["plain"] | {"gradient_accumulation_steps": 2, "resume": "auto"}
    options |= {"general": str(folder / "general.jsonl")}
    train(TrainConfig.from_options(options | {"output": str(tmp_path / "fewer")}), console=Console(file=printed))
    assert "processes from 2 to 1" in printed.getvalue()
    trace(tmp_path / "fewer", folder / "plain")


def test_processes_that_disagree_say_so(two):
    first, second = two["configured"]
    assert first["error"] == "ConfigError"
    assert "learning_rate: 0.01 in process 0, 0.5 in process 1" in first["text"]
    assert second["error"] == "SaidByFirst"
    assert two["rows"][0]["error"] == "ConfigError"
    assert "data" in two["rows"][0]["text"]


def test_what_the_first_process_fails_at_ends_the_others_at_once(two):
    first, second = two["first-fails"]
    assert first["error"] == "DataError"
    assert "none.jsonl" in first["text"]
    assert second["error"] == "SaidByFirst"
    assert "none.jsonl" in second["text"]


def test_all_skip_the_same_steps(two, folder, run, base, tmp_path):
    assert [found["error"] for found in two["skips"]] == [None, None], two["skips"]
    run(**base | SKIPS | {"gradient_accumulation_steps": 2, "output": str(tmp_path / "one")})
    trace(folder / "skips", tmp_path / "one")
    files = [folder / "skips" / "bad_batches.jsonl", folder / "skips" / "bad_batches-1.jsonl"]
    steps = [{json.loads(line)["step"] for line in file.read_text().splitlines()} for file in files]
    assert 0 < len(steps[0]) < 5
    assert steps[0] == steps[1]


def test_sharded_weights_trace_one_process_too(two, folder):
    assert [found["error"] for found in two["sharded"]] == [None, None], two["sharded"]
    assert "FSDP2, gloo" in two["sharded"][0]["printed"]
    trace(folder / "sharded", folder / "plain")


def test_what_sharded_weights_send_is_told(two):
    first, plain = two["sharded"][0], two["plain"][0]
    assert first["bytes_per_step"] == plain["bytes_per_step"]
    assert plain["gathered_bytes_per_step"] == 0 < first["gathered_bytes_per_step"]
    printed = " ".join(first["printed"].split())
    assert f"and {first['gathered_bytes_per_step'] / 1e3:.1f} kB of frozen weights, gathered in each pass" in printed


def test_where_one_runs_out_of_memory_the_steps_are_the_same(two, folder, run, base, tmp_path):
    run(**base | SHORT | {"gradient_accumulation_steps": 4, "held_out": 0, "output": str(tmp_path / "one")})
    for name in ("short", "short-sharded"):
        assert [found["error"] for found in two[name]] == [None, None], two[name]
        trace(folder / name, tmp_path / "one", figures=OF_PIECES)
        assert "Each batch now takes 8 passes" in (folder / name / "logs" / "process-1.txt").read_text()
        where = " in process 1" if name == "short" else ""
        assert f"each batch took 8 passes{where}" in " ".join(two[name][0]["printed"].split())
    # sharded weights are gathered by all together, and so all halve
    assert "Out of memory (in another process) Each batch now takes 8 passes" in two["short-sharded"][0]["printed"]
    assert "Out of memory" not in two["short"][0]["printed"]


def test_where_one_cannot_halve_all_end_with_its_error(two):
    first, second = two["too-short"]
    assert second["error"] == "TheodoraError"
    assert "Lower per_device_train_batch_size" in second["text"]
    assert first["error"] == "OtherFailed", first
    assert "Process 1 failed: Out of memory: CUDA out of memory" in first["text"]


def test_nf4_is_loaded_so_that_it_is_cut(two):
    assert [found["error"] for found in two["nf4"]] == [None, None], two["nf4"]
    assert "FSDP2, gloo" in two["nf4"][0]["printed"]


def test_what_cannot_be_cut_is_refused_before_anything_is_read(two):
    assert two["int8"][0]["error"] == "ConfigError"
    assert "LLM.int8()) cannot be sharded" in two["int8"][0]["text"]


def test_all_stop_when_one_is_told_to(two, folder):
    assert [found["error"] for found in two["stopped"]] == ["TrainingInterrupted", "SaidByFirst"], two["stopped"]
    (checkpoint,) = (folder / "stopped" / "checkpoints").iterdir()
    assert not faults(checkpoint)
    assert checkpoint.name in ("checkpoint-5", "checkpoint-6")


@pytest.mark.parametrize(("ending", "of_it", "seconds"), [("hung", "OSError", 6), ("killed", "no word", 20)])
def test_a_process_without_a_word_ends_the_run(ended, folder, ending, of_it, seconds):
    first, second = ended.result()[ending]
    assert second["error"] == of_it
    assert first["error"] == "OtherFailed", first
    assert f"No answer from process 1: it was killed, or hung for {seconds} s (ddp_timeout" in first["text"]
    assert f"The last words of process 1 are in {folder / ending / 'logs' / 'process-1.txt'}" in first["text"]
    assert "--resume auto" in first["text"]


def test_torchrun_shows_the_error_of_the_process_that_fails(base, folder):
    """Its agent for real, which ends the other process, too; what it starts is forked with everything imported."""
    options = base | {"output": str(folder / "launched"), "held_out": 0}
    (folder / "launched.yaml").write_text(json.dumps(options))
    config = LaunchConfig(
        1,
        1,
        2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="launched",
        max_restarts=0,
        start_method=fork_server().get_start_method(),
        logs_specs=DefaultLogsSpecs(log_dir=str(folder), redirects=Std.ALL),
    )
    with pytest.raises(ChildFailedError):
        elastic_launch(config, fails_in_one.start)(["train", "--config", str(folder / "launched.yaml")])
    (said,) = folder.glob("launched_*/attempt_0/1/stderr.log")
    assert "OSError: the disk is on fire" in said.read_text()
    assert "on fire" in (folder / "launched" / "logs" / "process-1.txt").read_text()


def lines_of(folder: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def same(one: Path, other: Path, figures=FIGURES):
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, other)]
    # Of sharded weights it is not noted.
    lines = [[line for line in each if "moved_direction" not in line] for each in lines]
    for name in figures:
        assert [line[name] for line in lines[0] if name in line] == [line[name] for line in lines[1] if name in line]
    first, second = (load_file(f / "adapter_model.safetensors") for f in (one, other))
    assert all(torch.equal(first[key], second[key]) for key in first)


def trace(one: Path, other: Path, rtol=2e-4, figures=FIGURES):
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, other)]
    # Of sharded weights it is not noted.
    lines = [[line for line in each if "moved_direction" not in line] for each in lines]
    assert [sorted(line) for line in lines[0]] == [sorted(line) for line in lines[1]]
    for name in figures:
        values = [torch.tensor([line[name] for line in each if name in line]).double() for each in lines]
        torch.testing.assert_close(*values, rtol=rtol, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    adapts = (one / "adapter_model.safetensors").is_file()
    name = "adapter_model.safetensors" if adapts else "model.safetensors"
    first, second = (load_file(f / name) for f in (one, other))
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=1e-3)
