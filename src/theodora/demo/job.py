"""The demo's main job, step by step: data, before, training, after, merging, answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from theodora.adapters import adapter_disabled
from theodora.adapters.models import best_device, load_model_and_tokenizer
from theodora.autocast import computes_in_bf16
from theodora.config import TrainConfig
from theodora.data import encode_prompt, load_examples, reference_answer
from theodora.demo import assets, pace, task
from theodora.demo.model import cached_model, fetch_model
from theodora.demo.pace import DemoSettings
from theodora.demo.results import Answers, Measured, Results, answers_table, draw, result_table
from theodora.errors import UsageError
from theodora.evaluate import evaluate, text_loss
from theodora.evaluate.decoding import decoding, end_tokens
from theodora.files.alone import alone_in, is_empty
from theodora.files.atomic import atomic_write, remove_folder
from theodora.locks import temporary_folder
from theodora.merging import merge_checkpoint
from theodora.safe_text import quoted
from theodora.terminal import Terminal
from theodora.train import train
from theodora.train.quiet import quiet_libraries
from theodora.train.stop import TrainingInterrupted

_README = "README.md"
_MARK = "# A run of `theodora demo`\n"
_CONTENTS = """
- `data/`: the rows trained on, the held-out rows, and the general texts
- `adapter/`: the DoRA adapter (PEFT's files), with its model card, metrics, loss curve and configuration
- `merged/`: base model and adapter as one plain model
- `results.json`, `before_after.png`: what was measured
"""
_FOLDERS = ("data", "adapter", "merged")
_FILES = ("results.json", "before_after.png")
_QUESTIONS = 3
_MINUTES = 5.0  # on a CPU; what a GPU takes needs no fitting
_TRIAL_STEPS = 3  # the first makes ready what the others use, and is not counted


def run_demo(
    output: Path, console: Console, *, quick: bool = False, minutes: float | None = None, overwrite: bool = False
) -> Results:
    """Fetch model and data, and run the job on them.

    Args:
        output: the folder for everything that the demo writes.
        console: where progress and results are shown.
        quick: a few steps and rows only, to see that it works.
        minutes: how long it may take, what is fetched left aside: on a slow machine fewer steps are taken and fewer
            rows scored. Default: 5 on a CPU; else, and for a quick demo, as long as it takes.
        overwrite: replace an earlier demo at `output`; other files in that folder stay.

    Raises:
        UsageError: something else stands at `output`, or an earlier demo that is not to be replaced, or one at work.
        TheodoraError: model or data cannot be fetched.
    """
    start, console = time.monotonic(), Terminal.over(console)
    check_output(output, overwrite)
    with alone_in(output) as notes, quiet_libraries():
        for note in notes:
            console.print(f"Note: {note}", style="yellow", markup=False)
        check_output(output, overwrite)  # once more: it may have been written meanwhile
        fetch_model(console)
        findings = task.read_findings(assets.fetch(assets.FINDINGS, console))
        summaries = assets.fetch(assets.GENERAL_TEXTS, console)
        fetched = time.monotonic()
        model = cached_model(console)
        settings = DemoSettings.quick() if quick else DemoSettings()
        texts = task.read_general_texts(summaries, settings.general_texts)
        if minutes is None and not quick and best_device().type == "cpu":
            minutes = _MINUTES
        given = None if minutes is None else TimeGiven(minutes=minutes, since=fetched)
        return run_job(model, findings, texts, output, settings, console, start=start, given=given)


@dataclass(frozen=True, kw_only=True)
class TimeGiven:
    """In what time a demo should be done."""

    minutes: float
    since: float
    """What the clock said when they began."""

    def left(self, now: float) -> float:
        """Seconds that are left; below 0 where it is over."""
        return self.since + 60 * self.minutes - now


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse a folder that holds anything but an earlier demo that may be replaced.

    Raises:
        UsageError: it does.
    """
    if not output.exists() or is_empty(output):
        return
    readme = output / _README
    if not (readme.is_file() and readme.read_text(encoding="utf-8", errors="replace").startswith(_MARK)):
        raise UsageError(f"{output} exists and is no earlier demo; choose another --output")
    if not overwrite:
        raise UsageError(f"{output} holds an earlier demo; choose another --output, or pass --overwrite to replace it")


def run_job(
    model_path: Path,
    findings: list[task.Finding],
    texts: list[str],
    output: Path,
    settings: DemoSettings,
    console: Console,
    *,
    start: float | None = None,
    given: TimeGiven | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Results:
    """Train on findings and measure; everything is written into `output`, in place of an earlier demo's parts.

    Args:
        model_path: folder of the base model.
        findings: the rows, shuffled and split here.
        texts: general texts, to measure forgetting.
        output: the folder to write.
        settings: how much is done.
        console: where progress and results are shown.
        start: what the clock said when everything began. Default: now.
        given: in what time: less than `settings` say is done, if that takes longer. Default: as long as it takes.
        clock: seconds that only grow.
    """
    start = clock() if start is None else start
    data = prepare_output(output, findings, texts, settings)
    console.print(
        f"The task: name the body system of a medical finding, one of {len({f.system for f in findings})}. "
        f"{settings.held_out_rows} of {len(findings):,} findings are held out.\n"
    )
    dtype = "bfloat16" if computes_in_bf16(best_device()) else "float32"
    whole, step = settings, None
    if given is not None:
        step = _step_seconds(model_path, data, settings, dtype, console)
        settings = pace.with_scores_that_fit(whole, step, given.left(clock()))
        console.print(pace.what_is_scored(whole, settings, step) + "\n", soft_wrap=True)
        texts = texts[: settings.general_texts]
    model, tokenizer = load_model_and_tokenizer(model_path, dtype=dtype)
    began = clock()
    before = _measure(model, tokenizer, data, texts, settings, console, "before")
    del model
    if given is not None and step is not None:
        scoring = clock() - began
        settings = pace.with_steps_that_fit(settings, step, scoring, given.left(clock()))
        total = clock() + pace.seconds_to_come(settings, step, scoring) - given.since
        console.print(pace.what_is_trained(whole, settings, step, given.minutes, total) + "\n", soft_wrap=True)
    trained = train(_train_config(model_path, data.train, output, settings, dtype), console=console, show_result=False)
    console.print()
    after = _measure(trained.model, trained.tokenizer, data, texts, settings, console, "after")
    answers = _answer(trained.model, trained.tokenizer, data, console)
    difference, scale = _merge(output, data, console)
    results = Results(
        model=model_path.name,
        dtype=dtype,
        before=before,
        after=after,
        training_rows=settings.steps * settings.batch_size,
        held_out_rows=settings.scored,
        general_texts=len(texts),
        steps=trained.steps,
        all_steps=whole.steps,
        all_held_out_rows=whole.scored,
        all_general_texts=whole.general_texts,
        measured_step_seconds=step,
        minutes=None if given is None else given.minutes,
        trainable_parameters=trained.trainable_parameters,
        total_parameters=trained.total_parameters,
        training_seconds=trained.seconds,
        tokens_per_second=trained.tokens_per_second,
        total_seconds=clock() - start,
        peak_memory=trained.peak_memory,
        merged_difference=difference,
        merged_scale=scale,
        answers=answers,
    )
    results.save(output / "results.json")
    draw(results, output / "before_after.png")
    _report(results, output, model_path, console)
    return results


@dataclass(frozen=True)
class DataFiles:
    """The files of a demo's rows."""

    train: Path
    held_out: Path


def prepare_output(output: Path, findings: list[task.Finding], texts: list[str], settings: DemoSettings) -> DataFiles:
    """Take away what an earlier demo left in a folder, and write the rows of this one."""
    # The README comes first: after a kill it tells that the folder is a demo's.
    with atomic_write(output / _README) as readme:
        readme.write_text(_MARK + _CONTENTS, encoding="utf-8")
    for name in _FOLDERS:
        remove_folder(output / name)
    for name in _FILES:
        (output / name).unlink(missing_ok=True)
    (output / "data").mkdir()
    training, held_out = task.split_rows(task.make_rows(findings), settings.held_out_rows)
    data = DataFiles(train=output / "data" / "train.jsonl", held_out=output / "data" / "held_out.jsonl")
    task.write_jsonl(data.train, training)
    task.write_jsonl(data.held_out, held_out)
    task.write_jsonl(output / "data" / "general.jsonl", [{"text": text} for text in texts])
    return data


def _step_seconds(model: Path, data: DataFiles, settings: DemoSettings, dtype: str, console: Console) -> float:
    """How long a training step takes here, by a run of a few of which nothing is kept."""
    settings = replace(settings, steps=_TRIAL_STEPS)
    with console.status("Trying out how long a training step takes here ..."), temporary_folder("demo") as folder:
        rows = folder / "train.jsonl"
        with data.train.open(encoding="utf-8") as lines:
            rows.write_text("".join(islice(lines, settings.steps * settings.batch_size)), encoding="utf-8")
        config = replace(_train_config(model, rows, folder, settings, dtype), warmup_steps=0)
        try:
            tried = train(config, console=Terminal(quiet=True), show_result=False)
        except TrainingInterrupted as stop:  # its message names a folder that is gone by then
            raise TrainingInterrupted("Stopped before training began; nothing was trained.", stop.exit_code) from None
    rate = tried.warm_tokens_per_second
    return tried.tokens / tried.steps / rate if rate else 0.0  # 0: too short for this clock


def _train_config(model: Path, data: Path, output: Path, settings: DemoSettings, dtype: str) -> TrainConfig:
    return TrainConfig(
        model=str(model),
        data=str(data),
        output=str(output / "adapter"),
        held_out=0,  # they are in a file of their own, and scored before and after
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        bf16=dtype == "bfloat16",
        save_steps=settings.steps,
        # Rows of one length in a batch: padding costs a fifth of the time otherwise.
        trainer={"train_sampling_strategy": "group_by_length"},
    )


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DataFiles,
    texts: list[str],
    settings: DemoSettings,
    console: Console,
    when: str,
) -> Measured:
    shown = console.is_terminal
    examples = load_examples(data.held_out)
    examples = examples.with_dataset(examples.dataset.select(range(min(settings.scored, len(examples)))))
    scores = evaluate(model, tokenizer, examples, max_new_tokens=16, progress=shown)
    general = text_loss(model, tokenizer, texts, max_length=settings.text_length, progress=shown)
    assert scores.exact_match is not None
    console.print(
        Text.assemble(
            (when.capitalize(), "bold"),
            f"  exact match {scores.exact_match:.1%}, loss {scores.loss:.3f}; general text {general.loss:.3f}  ",
            (f"({scores.seconds + general.seconds:.0f} s)", "dim"),
        )
    )
    return Measured(exact_match=scores.exact_match, loss=scores.loss, general_loss=general.loss)


def _answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DataFiles, console: Console
) -> tuple[Answers, ...]:
    """Questions on different body systems: the first held-out ones, not the best ones."""
    first: dict[str, Any] = {}
    for row in _rows(data):
        first.setdefault(reference_answer(row), row)
    rows = list(first.values())[:_QUESTIONS]
    answers = []
    with console.status("Asking both models ..."):
        for row in rows:
            with adapter_disabled(model):
                base = _say(model, tokenizer, row)
            answers.append(
                Answers(
                    question=row["prompt"][-1]["content"],
                    reference=reference_answer(row),
                    base=base,
                    adapted=_say(model, tokenizer, row),
                )
            )
    return tuple(answers)


def _say(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> str:
    prompt = torch.tensor([encode_prompt(row, tokenizer)], device=model.device)
    with torch.inference_mode():
        output = model.generate(  # pyright: ignore[reportCallIssue] (typed as a Tensor, through nn.Module.__getattr__)
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=decoding(end_tokens(model, tokenizer), 24),
        )
    return str(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)).strip()


def _merge(output: Path, data: DataFiles, console: Console) -> tuple[float, float]:
    """Merge on disk, then compare logits in float32: (largest difference, largest logit)."""
    with console.status("Merging the adapter into the base model ..."):
        merge_checkpoint(output / "adapter", output / "merged", dtype="float32")
    with console.status("Comparing merged and adapted model ..."):
        adapted, tokenizer = load_model_and_tokenizer(output / "adapter", dtype="float32")
        prompts = [encode_prompt(row, tokenizer) for row in _rows(data)[:4]]
        expected = _logits(adapted, prompts)
        del adapted
        merged, _ = load_model_and_tokenizer(output / "merged", dtype="float32")
        difference = max(float((a - b).abs().max()) for a, b in zip(expected, _logits(merged, prompts), strict=True))
    scale = max(float(logits.abs().max()) for logits in expected)
    console.print(
        Text.assemble(
            ("Merged", "bold"),
            f"  logits differ from the adapted model's by at most {difference:.1e} of {scale:.0f}\n",
        )
    )
    return difference, scale


def _rows(data: DataFiles) -> list[Any]:
    return list(load_examples(data.held_out).dataset)


@torch.inference_mode()
def _logits(model: PreTrainedModel, prompts: list[list[int]]) -> list[torch.Tensor]:
    return [model(input_ids=torch.tensor([prompt], device=model.device)).logits.cpu() for prompt in prompts]


def _report(results: Results, output: Path, model: Path, console: Console) -> None:
    console.print(answers_table(results))
    console.print(f"Trained on {results.training_rows:,} findings for {results.training_seconds:.0f} s:", style="bold")
    console.print(result_table(results))
    if results.steps < results.all_steps:
        console.print(
            f"{results.steps} of {results.all_steps} steps were taken, to be done in time: with more of them the model "
            "learns more.\n"
        )
    console.print(
        Text.assemble("Everything is in ", (str(output), "bold"), " (picture: before_after.png). Next:\n"),
        soft_wrap=True,
    )
    for command in (
        f"theodora chat {quoted(output / 'adapter')}",
        f"theodora info {quoted(output / 'adapter')}",
        f"theodora evaluate --model {quoted(output / 'merged')} --data {quoted(output / 'data/held_out.jsonl')}"
        + (f" --limit {results.held_out_rows}" if results.held_out_rows < results.all_held_out_rows else ""),
        f"theodora train --model {quoted(model)} --data {quoted(output / 'data/train.jsonl')} --output runs/longer "
        "--num-train-epochs 1",
    ):
        console.print(Text("  " + command, style="cyan"), soft_wrap=True)
