"""The demo's main job, step by step: data, before, training, after, merging, answers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from theodora.adapters import adapter_disabled
from theodora.adapters.models import best_device, load_model_and_tokenizer
from theodora.config import TrainConfig
from theodora.data import encode_prompt, load_examples, reference_answer
from theodora.demo import assets, task
from theodora.demo.model import cached_model
from theodora.demo.results import Answers, Measured, Results, answers_table, draw, result_table
from theodora.errors import UsageError
from theodora.evaluate import evaluate, text_loss
from theodora.evaluate.decoding import decoding, end_tokens
from theodora.files.alone import alone_in, is_empty
from theodora.files.atomic import atomic_write, remove_folder
from theodora.merging import merge_checkpoint
from theodora.safe_text import quoted
from theodora.terminal import Terminal
from theodora.train import train
from theodora.train.arguments import computes_in_bf16
from theodora.train.quiet import quiet_libraries

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


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """How much is done. The defaults take a few minutes on two cores."""

    steps: int = 100
    batch_size: int = 8
    learning_rate: float = 2e-3
    held_out_rows: int = 200
    general_texts: int = 64
    text_length: int = 256
    """Tokens of a general text that are scored."""

    @staticmethod
    def chosen(*, quick: bool, bf16: bool) -> DemoSettings:
        """Settings for this machine: where bf16 is emulated, a step takes about twice as long, so fewer are taken."""
        if quick:
            return DemoSettings(steps=5, batch_size=4, held_out_rows=16, general_texts=4, text_length=128)
        return DemoSettings() if bf16 else DemoSettings(steps=60)


def run_demo(output: Path, console: Console, *, quick: bool = False, overwrite: bool = False) -> Results:
    """Fetch model and data, and run the job on them.

    Args:
        output: the folder for everything that the demo writes.
        console: where progress and results are shown.
        quick: a few steps and rows only, to see that it works.
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
        model = cached_model(console)
        findings = task.read_findings(assets.fetch(assets.FINDINGS, console))
        summaries = assets.fetch(assets.GENERAL_TEXTS, console)
        settings = DemoSettings.chosen(quick=quick, bf16=computes_in_bf16(best_device()))
        texts = task.read_general_texts(summaries, settings.general_texts)
        return run_job(model, findings, texts, output, settings, console, start=start)


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
) -> Results:
    """Train on findings and measure; everything is written into `output`, in place of an earlier demo's parts.

    Args:
        model_path: folder of the base model.
        findings: the rows, shuffled and split here.
        texts: general texts, to measure forgetting.
        output: the folder to write.
        settings: how much is done.
        console: where progress and results are shown.
        start: `time.monotonic()` at which the time of everything began. Default: now.
    """
    start = time.monotonic() if start is None else start
    data = prepare_output(output, findings, texts, settings)
    console.print(
        f"The task: name the body system of a medical finding, one of {len({f.system for f in findings})}. "
        f"{settings.held_out_rows} of {len(findings):,} findings are held out.\n"
    )
    dtype = "bfloat16" if computes_in_bf16(best_device()) else "float32"
    model, tokenizer = load_model_and_tokenizer(model_path, dtype=dtype)
    before = _measure(model, tokenizer, data, texts, settings, console, "before")
    del model
    trained = train(_train_config(model_path, data, output, settings, dtype), console=console, show_result=False)
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
        held_out_rows=settings.held_out_rows,
        general_texts=len(texts),
        steps=trained.steps,
        trainable_parameters=trained.trainable_parameters,
        total_parameters=trained.total_parameters,
        training_seconds=trained.seconds,
        tokens_per_second=trained.tokens_per_second,
        total_seconds=time.monotonic() - start,
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


def _train_config(model: Path, data: DataFiles, output: Path, settings: DemoSettings, dtype: str) -> TrainConfig:
    return TrainConfig(
        model=str(model),
        data=str(data.train),
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
    scores = evaluate(model, tokenizer, load_examples(data.held_out), max_new_tokens=16, progress=shown)
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
    console.print(
        Text.assemble("Everything is in ", (str(output), "bold"), " (picture: before_after.png). Next:\n"),
        soft_wrap=True,
    )
    for command in (
        f"theodora chat {quoted(output / 'adapter')}",
        f"theodora info {quoted(output / 'adapter')}",
        f"theodora evaluate --model {quoted(output / 'merged')} --data {quoted(output / 'data/held_out.jsonl')}",
        f"theodora train --model {quoted(model)} --data {quoted(output / 'data/train.jsonl')} --output runs/longer "
        "--num-train-epochs 1",
    ):
        console.print(Text("  " + command, style="cyan"), soft_wrap=True)
