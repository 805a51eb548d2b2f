"""After SFT, on a task with labels: DPO from the SFT adapter, GRPO from it and from the base. What is gained, how far
does the model go from where it started, and what does it forget? LoRA and DoRA, three seeds.

    python recipes/study_data.py --output out/study/data --model out/study/SmolLM2-135M-Instruct
    python recipes/preference_pairs.py --data out/study/data
    python recipes/preference_study.py --model out/study/SmolLM2-135M-Instruct --data out/study/data \
        --output out/study/preference --workers 6

Writes study.json (every run), study.md (the table) and study.png into the output folder, and each run as `theodora
train` leaves it, with its measurements in measured.json: the same command goes on with what is missing. `--workers`
processes share the GPUs there are; with 1 everything runs in this one. docs/preference.md has the results.

Measured on the test rows, after each run and of the base model:
- score: share of rows whose right label is the likeliest of all labels; exact match of greedy answers;
- pairs: share of test pairs whose right label is likelier than the wrong one;
- kl: divergence from where the run started (the base, or the SFT adapter), in nats for an answer: one answer of each
  prompt is drawn from the model, and at each of its tokens KL(model ‖ start) is taken over the whole vocabulary;
- general: loss on general text, in nats per token, before and after the run (`--general`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

from theodora.config import GENERAL_LENGTH, GENERAL_ROWS, METHOD_NAMES

OBJECTIVES = ("sft", "dpo", "grpo")
PLANS = (("sft", "base"), ("dpo", "sft"), ("grpo", "base"), ("grpo", "sft"))  # what is learned, from where
TITLES = {"sft": "SFT", "dpo": "DPO", "grpo": "GRPO"}
RATES = {"sft": 1e-3, "dpo": 1e-4, "grpo": 1e-4}
STEPS = {"sft": 200, "dpo": 100, "grpo": 150}
# The base model answers nothing exactly, of which there would be nothing to learn: words in common lead it there.
REWARDS = {"sft": ["exact_match"], "base": ["exact_match", "token_f1"]}
COLOURS = {"base": "#4a4a4a", "sft": "#3b6fb6", "dpo": "#d1603d", "grpo": "#1f7a5c"}
ANSWER = 16  # tokens of an answer at most: the longest label has fewer


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, or the base model as it is (`objective` base)."""

    objective: str
    start: str = ""
    method: str = ""
    seed: int = 0

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.objective}-from-{self.start}-{self.method}-{self.seed}" if self.start else self.objective

    @property
    def after(self) -> str | None:
        """The run whose adapter it goes on from."""
        return (
            None if self.start != "sft" else Run(objective="sft", start="base", method=self.method, seed=self.seed).name
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs share."""

    model: str
    data: str
    output: str
    task: str
    rank: int
    batch_size: int
    steps: dict[str, int]
    rates: dict[str, float]
    reward: list[str] | None
    prompts: int
    rows: int | None
    methods: list[str]
    seeds: int
    plans: list[str]


def main() -> None:
    settings, workers = arguments()
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    failed: dict[str, str] = {}
    for run, error in carried_out(list(planned(settings)), settings, workers):
        if error is not None:
            failed[run.name] = error
        print(f"{time.monotonic() - began:6.0f} s  {run.name}" + ("" if error is None else f": {error}"), flush=True)
    write_report(settings, failed)
    if failed:
        sys.exit(f"{len(failed)} runs failed: {', '.join(failed)}")


def arguments() -> tuple[Settings, int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="the folder of study_data.py and preference_pairs.py")
    parser.add_argument("--output", required=True)
    parser.add_argument("--task", default="medical")
    parser.add_argument("--methods", nargs="+", default=["lora", "dora"])
    parser.add_argument("--seeds", type=int, default=3)
    every = ["-from-".join(plan) for plan in PLANS]
    parser.add_argument("--plans", nargs="+", default=every, choices=every)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16, help="rows or pairs of a step. Default: 16.")
    parser.add_argument("--prompts", type=int, default=16, help="of a step of grpo, with 8 answers each. Default: 16.")
    parser.add_argument("--reward", nargs="+", help="of grpo. Default: exact_match; from the base with token_f1.")
    parser.add_argument("--rows", type=int, help="test rows to measure on. Default: all.")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side. Default: 1.")
    for objective in OBJECTIVES:
        parser.add_argument(f"--{objective}-steps", type=int, default=STEPS[objective])
        parser.add_argument(f"--{objective}-rate", type=float, default=RATES[objective])
    given = vars(parser.parse_args())
    workers = given.pop("workers")
    steps = {objective: given.pop(f"{objective}_steps") for objective in OBJECTIVES}
    rates = {objective: given.pop(f"{objective}_rate") for objective in OBJECTIVES}
    return Settings(**given, steps=steps, rates=rates), workers


def planned(settings: Settings) -> Iterator[Run]:
    """The base model, then all runs, those first that others go on from."""
    yield Run(objective="base")
    for objective, start in PLANS:
        if f"{objective}-from-{start}" in settings.plans:
            for seed in range(settings.seeds):
                for method in settings.methods:
                    yield Run(objective=objective, start=start, method=method, seed=seed)


def carried_out(runs: list[Run], settings: Settings, workers: int) -> Iterator[tuple[Run, str | None]]:
    """Each run as it is done, with what went wrong; none before the one that it goes on from."""
    if workers < 2:
        for run in runs:
            yield run, attempt(run, settings)
        return
    import torch

    spawn = get_context("spawn")  # a fork of a process that has a GPU has none
    given = spawn.Value("i", 0), torch.cuda.device_count()
    with ProcessPoolExecutor(workers, spawn, initializer=take_a_gpu, initargs=given) as pool:
        waiting, under_way = list(runs), dict[Future[str | None], Run]()
        while waiting or under_way:
            held = {run.name for run in (*waiting, *under_way.values())}
            for run in [run for run in waiting if run.after not in held]:
                waiting.remove(run)
                under_way[pool.submit(attempt, run, settings)] = run
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                yield under_way.pop(future), future.result()


def take_a_gpu(taken: Any, count: int) -> None:
    """Processes have the GPUs in turn, each one of them; before torch sees them all."""
    if count > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ:
        with taken.get_lock():
            index, taken.value = taken.value % count, taken.value + 1
        os.environ["CUDA_VISIBLE_DEVICES"] = str(index)


def attempt(run: Run, settings: Settings) -> str | None:
    """Carry out a run that has not been; what went wrong, in one line."""
    from theodora.errors import TheodoraError

    if measurements(run, settings).is_file():
        return None
    try:
        carry_out(run, settings)
    except (TheodoraError, RuntimeError, OSError) as error:  # the others go on
        return " ".join(str(error).split())[:500] or type(error).__name__
    return None


def measurements(run: Run, settings: Settings) -> Path:
    return Path(settings.output) / run.name / "measured.json"


def carry_out(run: Run, settings: Settings) -> None:
    """Train, measure, and write down what came out."""
    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from theodora import TrainConfig, train
    from theodora.adapters.models import best_device, load_model_and_tokenizer
    from theodora.parse import to_json
    from theodora.train.arguments import computes_in_bf16

    found: dict[str, Any] = asdict(run)
    path = measurements(run, settings)
    if run.objective == "base":
        # As runs hold it.
        dtype = "bfloat16" if computes_in_bf16(best_device()) else "float32"
        disable_progress_bar()
        model, tokenizer = load_model_and_tokenizer(settings.model, dtype=dtype)
        path.parent.mkdir(exist_ok=True)
    else:
        options = options_of(run, settings)
        result = train(TrainConfig.from_options(options), console=Console(quiet=True))
        model, tokenizer = result.model, result.tokenizer
        own = ("general_loss_before", "general_loss", "seconds", "steps", "tokens", "peak_memory", "figures")
        told = result.to_dict()
        found |= {name: told[name] for name in own} | {"learning_rate": options["learning_rate"]}
    found |= measured(model, tokenizer, run, settings)
    path.write_text(to_json(found, indent=2) + "\n", encoding="utf-8")


def options_of(run: Run, settings: Settings) -> dict[str, Any]:
    """What `theodora train` is told, by the names of its flags."""
    steps = settings.steps[run.objective]
    data = f"{settings.data}/{settings.task}{'.pairs' if run.objective == 'dpo' else ''}"
    options: dict[str, Any] = {
        "model": settings.model,
        "data": f"{data}.train.jsonl",
        "eval_data": f"{data}.validation.jsonl",
        "output": f"{settings.output}/{run.name}",
        "overwrite": True,  # what was broken off
        "objective": run.objective,
        "general": f"{settings.data}/general.jsonl",
        "max_steps": steps,
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": settings.rates[run.objective],
        "max_length": 256,
        "eval_steps": steps,  # before and after
        "save_steps": steps,
        "seed": run.seed,
    }
    if run.after is None:
        options |= {"method": run.method, "rank": settings.rank}
    else:
        options["from_adapter"] = f"{settings.output}/{run.after}"
    if run.objective == "dpo":
        options["beta"] = 0.1
    if run.objective == "grpo":
        # TRL's names: a batch is of answers, of which those to one prompt are compared.
        options |= {
            "reward": settings.reward or REWARDS[run.start],
            "num_generations": 8,
            "per_device_train_batch_size": 8 * settings.prompts,
            "max_completion_length": ANSWER,
        }
    return options


def measured(model: Any, tokenizer: Any, run: Run, settings: Settings) -> dict[str, Any]:
    from theodora.data import load_examples
    from theodora.data.split import spread_out
    from theodora.evaluate import evaluate, evaluate_preferences, text_loss
    from theodora.evaluate.general import read_general
    from theodora.evaluate.labels import labels_of
    from theodora.train.reference import Reference

    def rows(part: str, kind: Any = "answers", count: int | None = None) -> Any:
        examples = load_examples(f"{settings.data}/{settings.task}.{part}.jsonl", kind=kind)
        return examples.with_dataset(examples.dataset.select(range(min(count or len(examples), len(examples)))))

    test, began = rows("test", count=settings.rows), time.monotonic()
    scores = evaluate(model, tokenizer, test, labels=labels_of(rows("train")), max_new_tokens=ANSWER, batch_size=64)
    pairs = evaluate_preferences(model, tokenizer, rows("pairs.test", "pairs", settings.rows), batch_size=64)
    found: dict[str, Any] = {
        "score": scores.label_accuracy,
        "exact_match": scores.exact_match,
        "loss": scores.loss,
        "pairs": pairs.to_dict(),
        "test_rows": scores.rows,
    }
    if run.objective == "base":
        texts = spread_out(read_general(f"{settings.data}/general.jsonl"), GENERAL_ROWS).dataset["text"]  # as --general
        found["general_loss"] = text_loss(model, tokenizer, texts, max_length=GENERAL_LENGTH).loss
    else:
        start = None if run.after is None else f"{settings.output}/{run.after}"
        found["kl"] = divergence(model, Reference(model, start), tokenizer, test, run.seed)
    return found | {"seconds_measuring": time.monotonic() - began}


def divergence(model: Any, start: Any, tokenizer: Any, examples: Any, seed: int, rows: int = 32) -> float:
    """Mean over the prompts of KL(model ‖ start) for an answer, along one that is drawn from the model, in nats."""
    import torch

    from theodora.data import encode_prompt
    from theodora.ends import length_to_end
    from theodora.evaluate.batches import evaluating, pad
    from theodora.evaluate.decoding import decoding, end_tokens

    ends, total = end_tokens(model, tokenizer), 0.0
    prompts = [encode_prompt(row, tokenizer, None) for row in examples.dataset]
    drawing = decoding(ends, ANSWER, temperature=1.0)
    torch.manual_seed(seed)
    for batch in (prompts[at : at + rows] for at in range(0, len(prompts), rows)):
        with evaluating(model):
            longest = max(map(len, batch))
            drawn = model.generate(
                input_ids=pad(batch, ends[0], left=True).to(model.device),
                attention_mask=pad([[1] * len(prompt) for prompt in batch], 0, left=True).to(model.device),
                generation_config=drawing,
            )[:, longest:].tolist()
            answers = [answer[: length_to_end(answer, ends)] for answer in drawn]
            ids = pad([[*p, *a] for p, a in zip(batch, answers, strict=True)], ends[0]).to(model.device)
            # What each token of an answer is drawn from stands at the token before it.
            places = [
                (i, len(p) - 1 + t) for i, (p, a) in enumerate(zip(batch, answers, strict=True)) for t in range(len(a))
            ]
            where = tuple(torch.tensor(places, device=model.device).T)
            own = model(input_ids=ids).logits[where].float().log_softmax(-1)
            with start.running() as reference:
                other = reference(input_ids=ids).logits[where].float().log_softmax(-1)
            total += float((own.exp() * (own - other)).sum())
    return total / len(prompts)


def write_report(settings: Settings, failed: dict[str, str]) -> None:
    """study.json, study.md and study.png of the runs there are."""
    from theodora.bench.machine import describe_machine
    from theodora.parse import to_json

    output = Path(settings.output)
    files = [measurements(run, settings) for run in planned(settings)]
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    report = {"machine": describe_machine(), "settings": asdict(settings), "failed": failed, "runs": runs}
    (output / "study.json").write_text(to_json(report, indent=2) + "\n", encoding="utf-8")
    (output / "study.md").write_text(table(runs) + "\n", encoding="utf-8")
    draw(runs, output / "study.png")
    print((output / "study.md").read_text(encoding="utf-8"))


def groups(runs: list[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Runs that differ in their seed alone, in the order of `PLANS`."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for run in runs:
        found.setdefault((run["objective"], run["start"], run["method"]), []).append(run)
    return found


def title(objective: str, start: str, method: str) -> str:
    """`DPO from SFT, DoRA`."""
    if objective == "base":
        return "base model"
    return f"{TITLES[objective]} from {TITLES.get(start, start)}, {METHOD_NAMES[method]}"


def table(runs: list[dict[str, Any]]) -> str:
    """Means over the seeds, and from where to where they go, in Markdown."""
    columns: dict[str, tuple[str, Callable[[dict[str, Any]], float | None]]] = {
        "right label likeliest (%)": ("{:.1f}", lambda run: 100 * run["score"]),
        "answered exactly (%)": ("{:.1f}", lambda run: 100 * run["exact_match"]),
        "right label likelier than a wrong one (%)": ("{:.1f}", lambda run: 100 * run["pairs"]["policy"]["accuracy"]),
        "KL to the start (nats an answer)": ("{:.3f}", lambda run: run.get("kl")),
        "loss on general text before": ("{:.3f}", lambda run: run.get("general_loss_before")),
        "after": ("{:.3f}", lambda run: run["general_loss"]),
        "seconds": ("{:.0f}", lambda run: run.get("seconds")),
    }
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for group, own in groups(runs).items():
        cells = [cell(form, [value(run) for run in own]) for form, value in columns.values()]
        lines.append(f"| {title(*group)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(form: str, values: list[float | None]) -> str:
    """`81.2 (80.5 to 82.0)`."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = form.format(min(known)), form.format(max(known))
    return form.format(mean(known)) + (f" ({low} to {high})" if low != high else "")


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """The score over what was forgotten, and over the divergence from the start; a mark for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=160, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for (objective, start, method), own in groups(runs).items():
        look = {
            "color": COLOURS[objective],
            "marker": {"lora": "o", "dora": "s"}.get(method, "D"),
            "facecolors": COLOURS[objective] if start == "sft" or objective in ("sft", "base") else "none",
        }
        for panel, name in zip(axes, ("general_loss", "kl"), strict=True):
            points = [(run[name], 100 * run["score"]) for run in own if run.get(name) is not None]
            if points:
                panel.scatter(*zip(*points, strict=True), s=40, label=title(objective, start, method), **look)
    for panel, words in zip(
        axes, ("loss on general text (nats per token)", "KL to the start (nats an answer)"), strict=True
    ):
        panel.set_xlabel(words)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#e6e6e6", linewidth=0.8)
        panel.set_axisbelow(True)
    axes[1].set_xscale("symlog", linthresh=0.01)  # SFT goes a hundred times as far as what follows it
    axes[0].set_ylabel("right label likeliest (%)")
    axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
