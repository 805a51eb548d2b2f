"""Options of a run that goes on: each is used from the next step on, or refused before anything is loaded."""

import dataclasses
import io
import json
import re
import shutil

import pytest
import yaml
from rich.console import Console
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.sft_config import SFTConfig

from theodora.config import AdapterConfig, TrainConfig
from theodora.errors import ConfigError
from theodora.train import prepare, resumed, train
from theodora.train import run as run_module
from theodora.train.callbacks import CountUpdates

_BASE = {"lr_scheduler_type": "constant", "save_steps": 2, "held_out": 4, "method": "lora", "rank": 2}


@pytest.fixture(scope="module")
def begun(tiny_model_dir, sums, tmp_path_factory):
    """A run of two steps; treat it as read-only."""
    output = tmp_path_factory.mktemp("begun") / "run"
    options = {
        "model": str(tiny_model_dir()),
        "data": str(sums),
        "output": str(output),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "bf16": False,
    } | _BASE
    train(TrainConfig.from_options(options), console=Console(quiet=True))
    return options


@pytest.fixture
def go_on(begun, tmp_path, monkeypatch):
    """Go on from a copy of it with other options: what is printed, and the optimizer's groups in each step."""
    groups = []

    class Look(CountUpdates):
        def on_pre_optimizer_step(self, *args, optimizer=None, **kwargs):
            super().on_pre_optimizer_step(*args, optimizer=optimizer, **kwargs)
            groups.append([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])

    monkeypatch.setattr(run_module, "CountUpdates", Look)
    shutil.copytree(begun["output"], tmp_path / "run")

    def start(**others):
        console = Console(file=io.StringIO(), width=200)
        options = begun | {"output": str(tmp_path / "run"), "max_steps": 4, "resume": True} | others
        options = {name: value for name, value in options.items() if value != "left out"}
        train(TrainConfig.from_options(options), console=console, show_result=False)
        return console.file.getvalue(), groups

    return start


def _lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_trains_with_the_learning_rate_that_it_shows(go_on, tmp_path):
    text, groups = go_on(learning_rate=5e-2)
    assert [group["lr"] for step in groups for group in step] == [5e-2] * 4
    assert [line["learning_rate"] for line in _lines(tmp_path) if "learning_rate" in line] == [1e-2, 1e-2, 5e-2, 5e-2]
    assert "learning_rate from 0.01 to 0.05" in text
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert yaml.safe_load(config)["learning_rate"] == 5e-2
    assert "# until step 2: learning_rate 0.01" in config
    assert "until step 2: learning_rate 0.01" in (tmp_path / "run" / "README.md").read_text()
    kept = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-4" / "options.json").read_text())
    assert kept["options"]["learning_rate"] == 5e-2
    assert kept["before"] == [{"until": 2, "options": {"learning_rate": 0.01, "max_steps": 2} | _path(kept)}]


def _path(kept):
    return {"output": next(entry["options"]["output"] for entry in kept["before"])}


def test_so_does_one_with_another_schedule_from_its_first_step_on(go_on):
    _text, groups = go_on(lr_scheduler_type="linear", warmup_steps=1, max_steps=5)
    assert [step[0]["lr"] for step in groups] == pytest.approx([7.5e-3, 5e-3, 2.5e-3])


def test_so_does_one_with_another_end(begun, go_on, tmp_path):
    shutil.rmtree(tmp_path / "run")
    train(
        TrainConfig.from_options(begun | {"output": str(tmp_path / "run"), "lr_scheduler_type": "linear"}),
        console=Console(quiet=True),
    )
    _text, groups = go_on(lr_scheduler_type="linear", max_steps=4)
    assert [step[0]["lr"] for step in groups[-2:]] == pytest.approx([5e-3, 2.5e-3])


@pytest.mark.parametrize(
    ("changed", "in_groups"),
    [
        ({"weight_decay": 0.25}, {"weight_decay": 0.25}),
        ({"adam_beta1": 0.5, "adam_beta2": 0.75}, {"betas": (0.5, 0.75)}),
        ({"adam_epsilon": 1e-3}, {"eps": 1e-3}),
    ],
)
def test_the_optimizers_figures_are_those_of_now(changed, in_groups, go_on):
    text, groups = go_on(**changed)
    assert all(step[0][name] == value for step in groups for name, value in in_groups.items())
    assert all(f"{name} from" in text for name in changed)


def test_without_changes_nothing_is_said_and_the_groups_are_the_same(go_on, begun):
    text, groups = go_on()
    assert re.findall(r"changed since the run began: (\w+)", text) == ["output", "max_steps"]
    assert [step[0]["lr"] for step in groups] == [1e-2, 1e-2]


def test_how_often_to_log_evaluate_and_save_are_those_of_now(go_on, tmp_path):
    go_on(logging_steps=2, eval_steps=3, save_steps=1, max_steps=4, save_total_limit=9)
    lines = _lines(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4]
    assert 3 in [line["step"] for line in lines if "eval_loss" in line]
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {
        f"checkpoint-{step}" for step in (2, 3, 4)
    }


def test_dropout_and_storage_are_those_of_now(go_on, tmp_path):
    go_on(dropout=0.25, adapter_dtype="bfloat16")
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["lora_dropout"] == 0.25


def test_the_patience_of_early_stopping_is_that_of_now(begun, go_on, tmp_path, monkeypatch):
    shutil.rmtree(tmp_path / "run")
    early = {"early_stopping_patience": 1, "eval_steps": 1}
    train(TrainConfig.from_options(begun | early | {"output": str(tmp_path / "run")}), console=Console(quiet=True))
    found = []
    begin = resumed.UseOptions.on_train_begin

    def look(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        found.extend(callback.early_stopping_patience for callback in self._early_stops())

    monkeypatch.setattr(resumed.UseOptions, "on_train_begin", look)
    go_on(**early | {"early_stopping_patience": 7})
    assert found == [7]


def test_the_same_rows_a_step_in_other_batches_go_on(go_on, tmp_path):
    go_on(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    other = _lines(tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    go_on()
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (other, _lines(tmp_path))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"rank": 4}, "rank was 2 and is 4: the checkpoint holds an adapter"),
        ({"method": "dora"}, "method was lora and is dora"),
        ({"alpha": 1}, "alpha was 4.0 and is 1.0"),
        ({"targets": "q_proj"}, "targets was all-linear and is"),
        ({"exclude": "q_proj"}, "exclude was"),
        ({"init": "pissa"}, "init was default and is pissa"),
        ({"rslora": True}, "rslora was False and is True"),
        ({"seed": 1}, "seed was 0 and is 1: the place in the data"),
        ({"data_seed": 1}, "data_seed was None and is 1"),
        ({"max_length": 32}, "max_length was 1024 and is 32"),
        ({"packing": True}, "packing was False and is True"),
        ({"held_out": 3}, "held_out was 4 and is 3"),
        ({"held_out": "left out"}, "held_out was 4 and is None"),
        ({"train_on": "all"}, "train_on was completion and is all"),
        ({"optim": "sgd"}, "optim was adamw_torch_fused and is sgd: the checkpoint holds the state"),
        ({"per_device_train_batch_size": 2}, r"a step was 4 rows .* and is 2"),
        ({"gradient_accumulation_steps": 3}, r"a step was 4 rows .* and is 12"),
        ({"lr_scheduler_type": "greedy", "learning_rate": 1e-3}, "learning_rate was 0.01 and is 0.001: the checkpoint"),
        ({"max_steps": 1}, "holds 2 steps, and this run has 1"),
    ],
)
def test_what_cannot_be_changed_is_refused_before_anything_is_loaded(changed, says, go_on, tmp_path, monkeypatch):
    def loads(*args, **kwargs):
        raise AssertionError("something was loaded")

    monkeypatch.setattr(prepare, "load_examples", loads)
    monkeypatch.setattr(prepare, "load_model", loads)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=says):
        go_on(**changed)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_refusal_names_the_way_on(go_on):
    with pytest.raises(ConfigError, match=r"--from-adapter .*checkpoint-2"):
        go_on(rank=4, seed=3)


def test_the_options_of_a_checkpoint_are_its_own_wherever_it_lies(go_on, begun, tmp_path):
    elsewhere = tmp_path / "kept" / "checkpoint-2"
    shutil.copytree(tmp_path / "run" / "checkpoints" / "checkpoint-2", elsewhere)
    with pytest.raises(ConfigError, match="rank was 2 and is 4"):
        go_on(output=str(tmp_path / "new"), resume=str(elsewhere), rank=4)
    text, _groups = go_on(output=str(tmp_path / "new"), resume=str(elsewhere), learning_rate=5e-2)
    assert "learning_rate from 0.01 to 0.05" in text


def test_an_older_checkpoint_takes_its_options_from_the_run_around_it(tmp_path, begun):
    shutil.copytree(begun["output"], tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    (checkpoint / "options.json").unlink()
    past = resumed.past_of(checkpoint)
    now = TrainConfig.from_options(begun | {"max_steps": 4, "learning_rate": 5e-2})
    assert any("learning_rate from 0.01 to 0.05" in note for note in resumed.change_notes(now, past))
    resumed.check_options(now, 1, checkpoint, past)
    with pytest.raises(ConfigError, match="rank was 2 and is 8"):
        resumed.check_options(dataclasses.replace(now, adapter=AdapterConfig()), 1, checkpoint, past)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ("- 1\n", "holds no options"),
        ("rank: [1\n", "is damaged"),
        ("gradient_accumulation_steps: x\n", "is damaged"),
        (None, "nothing beside"),
    ],
)
def test_what_a_damaged_record_cannot_tell_is_said(record, says, tmp_path):
    config = TrainConfig(model="m", data="d", output=str(tmp_path))
    if record is not None:
        (tmp_path / "config.yaml").write_text(record)
    notes = resumed.change_notes(config, resumed.past_of(tmp_path / "checkpoints" / "checkpoint-1"))
    assert len(notes) == 1
    assert says in notes[0]


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "{}", '{"options": 1, "given": {}, "processes": 1, "before": []}'),
        '{"options": {"per_device_train_batch_size": "x"}, "given": {}, "processes": 1, "before": []}',
        '{"options": {}, "given": {}, "processes": 1e400, "before": []}',
    ],
)
def test_damaged_options_of_a_checkpoint_are_said(text, tmp_path):
    (tmp_path / "options.json").write_text(text)
    assert "is damaged" in (resumed.past_of(tmp_path).note or "")


def test_each_option_that_must_stay_is_one_that_there_is():
    names = {f.name for kind in (AdapterConfig, TrainConfig, SFTConfig, GRPOConfig) for f in dataclasses.fields(kind)}
    groups = resumed.REFUSED | resumed._COURSE | resumed._BEST | set(resumed._BATCH)
    assert groups - names <= {"group_by_length"}  # of earlier versions of transformers
