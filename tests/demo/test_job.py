import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console
from tokenizers import pre_tokenizers

from theodora.cli.main import main
from theodora.demo import job, pace, task
from theodora.demo.model import split_digits
from theodora.errors import UsageError
from theodora.files.alone import alone_in
from theodora.train.stop import TrainingInterrupted

SETTINGS = job.DemoSettings(steps=3, batch_size=2, held_out_rows=4, general_texts=2, text_length=64)


@pytest.fixture(scope="module")
def findings():
    return [
        task.Finding(name=f"Finding {i}", definition=f"Number {i} of its kind.", system="eye" if i % 2 else "ear")
        for i in range(20)
    ]


@pytest.fixture(scope="module")
def demo(findings, tiny_model_dir, tmp_path_factory):
    """The whole job on a tiny model: (its folder, what it returned, what it printed)."""
    output = tmp_path_factory.mktemp("demo") / "out"
    console = Console(file=io.StringIO(), width=120)
    results = job.run_job(tiny_model_dir("llama"), findings, ["A text.", "Another text."], output, SETTINGS, console)
    return output, results, console.file.getvalue()


def test_everything_is_kept(demo):
    output, results, _ = demo
    for name in (
        "README.md",
        "results.json",
        "before_after.png",
        "data/train.jsonl",
        "data/held_out.jsonl",
        "data/general.jsonl",
        "adapter/adapter_model.safetensors",
        "merged/config.json",
    ):
        assert (output / name).is_file(), name
    saved = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert saved["before"]["loss"] == results.before.loss
    assert saved["after"]["exact_match"] == results.after.exact_match
    assert sorted(answer["reference"] for answer in saved["answers"]) == ["ear", "eye"]
    assert (output / "before_after.png").read_bytes().startswith(b"\x89PNG")


def test_training_and_held_out_rows_are_apart(demo):
    output, _, _ = demo
    training, held_out = (
        set((output / "data" / name).read_text(encoding="utf-8").splitlines())
        for name in ("train.jsonl", "held_out.jsonl")
    )
    assert (len(training), len(held_out)) == (16, 4)
    assert not training & held_out


def test_the_adapter_changed_the_model_and_the_merged_model_agrees(demo):
    _, results, _ = demo
    assert results.after.loss < results.before.loss
    assert results.after.general_loss != results.before.general_loss
    assert results.merged_difference < 1e-4 * results.merged_scale


def test_what_was_measured_is_printed(demo):
    _, results, printed = demo
    for expected in (
        "exact match, 4 held-out rows",
        f"{results.after.loss:.3f}",
        "loss on general text, 2 texts",
        f"{results.trainable_parameters:,} (",
        "peak memory",
        "theodora chat ",
    ):
        assert expected in printed


def test_the_printed_commands_work(demo, capsys):
    _, results, printed = demo
    commands = [line.split()[1:] for line in printed.splitlines() if line.startswith("  theodora ")]
    assert {"chat", "info", "evaluate", "train"} <= {command[0] for command in commands}
    evaluate = next(command for command in commands if command[0] == "evaluate")
    assert main([*evaluate, "--json", "--max-new-tokens", "16", "--dtype", results.dtype]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 4
    assert main(next(command for command in commands if command[0] == "info")) == 0


def test_an_earlier_demo_is_replaced_and_nothing_else(demo, tmp_path):
    output, _, _ = demo
    job.check_output(output, overwrite=True)
    with pytest.raises(UsageError, match="pass --overwrite"):
        job.check_output(output, overwrite=False)
    for overwrite in (False, True):
        job.check_output(tmp_path / "new", overwrite)
    (tmp_path / "mine").mkdir()
    job.check_output(tmp_path / "mine", overwrite=False)
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="no earlier demo"):
            job.check_output(tmp_path / "mine", overwrite)


def test_a_demo_that_was_killed_as_it_began_is_replaced_and_one_at_work_is_not(tmp_path, monkeypatch):
    output, console = tmp_path / "demo", Console(quiet=True)
    monkeypatch.setattr(task, "make_rows", lambda findings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        job.prepare_output(output, [], [], SETTINGS)
    job.check_output(output, overwrite=True)
    with alone_in(output), pytest.raises(UsageError, match="in use by process"):
        job.run_demo(output, console, overwrite=True)


def test_what_lies_beside_an_earlier_demo_stays(tmp_path):
    output = tmp_path / "demo"
    findings = [task.Finding(name=f"finding {n}", definition="", system="lungs") for n in range(4)]
    settings = job.DemoSettings(held_out_rows=1)
    job.prepare_output(output, findings, ["text"], settings)
    for name in ("thesis.txt", "results.json", "data/old.jsonl", "merged/config.json"):
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("x")
    job.prepare_output(output, findings, ["text"], settings)
    left = sorted(path.name for path in output.rglob("*"))
    assert left == ["README.md", "data", "general.jsonl", "held_out.jsonl", "thesis.txt", "train.jsonl"]


class Clock:
    """A clock on which scoring takes a minute, and nothing else any time."""

    now = 1000.0

    def __call__(self):
        return self.now


def test_a_slow_machine_does_less_and_says_so(findings, tiny_model_dir, tmp_path, monkeypatch):
    settings = job.DemoSettings(steps=50, batch_size=2, held_out_rows=10, general_texts=4, text_length=64)
    clock, measured = Clock(), job._measure
    monkeypatch.setattr(job, "_step_seconds", lambda *args: 10.0)
    monkeypatch.setattr(job, "_merge", lambda *args: (0.0, 1.0))
    monkeypatch.setattr(job, "draw", lambda *args: None)
    monkeypatch.setattr(pace, "_LEAST_STEPS", 2)
    monkeypatch.setattr(pace, "_LEAST_ROWS", 4)
    monkeypatch.setattr(pace, "_LEAST_TEXTS", 3)

    def measure(*args):
        clock.now += 60
        return measured(*args)

    monkeypatch.setattr(job, "_measure", measure)
    console, texts = Console(file=io.StringIO(), width=120), ["A text.", "Another text.", "A third.", "A fourth."]
    given = job.TimeGiven(minutes=3.6, since=clock() - 4)
    model, output = tiny_model_dir("llama"), tmp_path / "out"
    results = job.run_job(model, findings, texts, output, settings, console, given=given, clock=clock)
    # 216 s, of which 4 are over before it begins; 60 s of scoring, 72 s of scoring once more, 58 s of all else.
    assert (results.steps, results.held_out_rows, results.general_texts) == (2, 8, 3)
    assert (results.all_steps, results.all_held_out_rows, results.all_general_texts) == (50, 10, 4)
    assert (results.measured_step_seconds, results.minutes, results.total_seconds) == (10.0, 3.6, 120.0)
    assert results.training_rows == 4
    printed = console.file.getvalue()
    assert "A training step takes 10.0 s here: 8 of the 10 held-out rows and 3 of 4 general texts are scored" in printed
    assert "At 10.0 s a step: 2 steps instead of 50, to be done in about 4 minutes." in printed
    assert "exact match, 8 of 10 held-out rows" in printed
    assert "2 of 50 steps were taken" in printed
    assert "held_out.jsonl --limit 8" in printed
    assert len((output / "data/held_out.jsonl").read_text(encoding="utf-8").splitlines()) == 10


def test_a_step_is_tried_out_and_leaves_nothing(findings, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    data = job.prepare_output(tmp_path / "demo", findings, [], SETTINGS)
    before = sorted(tmp_path.rglob("*"))
    model = tiny_model_dir("llama")
    assert 0 < job._step_seconds(model, data, SETTINGS, "float32", Console(quiet=True)) < 60
    assert sorted(tmp_path.rglob("*")) == before


def test_who_stops_while_a_step_is_tried_out_is_not_sent_to_a_folder_that_is_gone(findings, tmp_path, monkeypatch):
    def stopped(config, **_):
        raise TrainingInterrupted(f"Resume with: theodora train --resume {config.output}", 143)

    monkeypatch.setattr(job, "train", stopped)
    data = job.prepare_output(tmp_path / "demo", findings, [], SETTINGS)
    with pytest.raises(TrainingInterrupted, match="Stopped before training began; nothing was") as stop:
        job._step_seconds(tmp_path, data, SETTINGS, "float32", Console(quiet=True))
    assert stop.value.exit_code == 143


def test_a_step_too_short_to_be_measured_takes_no_time(findings, tmp_path, monkeypatch):
    tried = SimpleNamespace(tokens=100, steps=3, warm_tokens_per_second=0.0)
    monkeypatch.setattr(job, "train", lambda *_, **__: tried)
    data = job.prepare_output(tmp_path / "demo", findings, [], SETTINGS)
    assert job._step_seconds(tmp_path, data, SETTINGS, "float32", Console(quiet=True)) == 0


def test_each_digit_is_a_token_and_blanks_before_it_stay_together(tiny_tokenizer):
    backend = tiny_tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def words(text):
        return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]

    assert words("a  12") == ["a", "Ġ", "Ġ12"]
    split_digits(tiny_tokenizer)
    assert words("a  12") == ["a", "ĠĠ", "1", "2"]
    split_digits(tiny_tokenizer)  # a second time changes nothing
    assert words("a  12") == ["a", "ĠĠ", "1", "2"]
