"""README.md of an adapter: what it was trained on, how, what came out, and how to use it."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path

import yaml
from transformers import AutoModelForSequenceClassification

import theodora
from theodora.config import TrainConfig
from theodora.data.left_out import sentences
from theodora.files.atomic import atomic_write
from theodora.files.classes import auto_name
from theodora.files.read_back import write_text
from theodora.files.run_files import CARD_FILE, FIGURE_FILE
from theodora.safe_text import markdown, markdown_code
from theodora.train.continued import described
from theodora.train.expert_loads import described as described_loads
from theodora.train.preference_report import described as described_objective
from theodora.train.progress import as_size, as_time
from theodora.train.report import (
    Plan,
    counted,
    describe_adapter,
    describe_modules,
    describe_moved,
    describe_step,
    describe_stops,
    describe_token_rows,
    device_name,
    epochs_of,
    next_commands,
    result_rows,
)
from theodora.train.result import TrainResult
from theodora.trust import grant_flags

_LIBRARIES = ("torch", "transformers", "trl", "datasets", "safetensors")


def write_card(plan: Plan, result: TrainResult) -> None:
    """Write the model card into the run's folder."""
    with atomic_write(result.output / CARD_FILE) as file:
        write_text(file, model_card(plan, result))


def model_card(plan: Plan, result: TrainResult) -> str:
    """The card as Markdown, with the metadata that the Hugging Face hub reads."""
    config = plan.config
    name = Path(config.output).resolve().name
    sections = [
        _metadata(config),
        f"# {markdown(name)}\n\n{_what(config)}, trained with Theodora {theodora.__version__}."
        + (f" It {markdown(origin)}." if (origin := described(config)) is not None else "")
        + (f" Objective: {markdown(what)}." if (what := described_objective(config)) is not None else ""),
        _results(result),
        _data(plan),
        _settings(plan),
        _usage(config, *_loaded_as(plan)),
        _versions(),
    ]
    return "\n\n".join(sections) + "\n"


def _what(config: TrainConfig) -> str:
    if config.trains_all:
        return f"{markdown_code(config.model)}, all of whose weights were fine-tuned"
    return f"{describe_adapter(config)}: an adapter for {markdown_code(config.model)}"


def _metadata(config: TrainConfig) -> str:
    method = config.adapter.method
    metadata: dict[str, object] = {
        "library_name": "transformers" if config.trains_all else "peft",
        "pipeline_tag": "text-classification" if config.objective == "reward" else "text-generation",
        "tags": ["full-fine-tuning" if config.trains_all else "lora", "theodora"],
    }
    if method == "dora":
        metadata["tags"] = ["dora", "lora", "theodora"]
    # The hub only accepts names of its own here.
    if not Path(config.model).exists():
        metadata["base_model"] = config.model
    return "---\n" + yaml.safe_dump(metadata, sort_keys=False) + "---"


def _results(result: TrainResult) -> str:
    rows = [f"| {name} | {before} | {after} |" for name, before, after in result_rows(result)]
    table = "\n".join(["| | before | after |", "|---|---:|---:|", *rows])
    notes = f"{_means(result)} Tensors that training moved: {describe_moved(result)}."
    notes += "".join(f" {markdown(line)}." for line in described_loads(result.experts))
    if result.stops is not None:
        notes += f" Asked a few of its own prompts, the model {describe_stops(result)}."
    return f"## Results\n\n{table}\n\n{notes}{_samples(result)}{_experts(result)}\n\n![Loss curve]({FIGURE_FILE})"


def _means(result: TrainResult) -> str:
    if result.objective == "grpo":
        return "Rewards are means over answers; those of held-out prompts were drawn with the same random numbers."
    per = "predicted token, in nats" if result.objective == "sft" else "answer" if result.objective == "kto" else "pair"
    return f"Losses are means per {per}."


def _samples(result: TrainResult) -> str:
    """Answers before and after, in a table."""
    if not result.samples:
        return ""
    rows = [f"| {markdown(s.prompt)} | {markdown(s.before)} | {markdown(s.after)} |" for s in result.samples]
    head = "scored" if result.objective == "reward" else "asked"
    return "\n\n" + "\n".join([f"| {head} | before | after |", "|---|---|---|", *rows])


def _experts(result: TrainResult) -> str:
    """The experts of each layer, in a table."""
    if not result.experts:
        return ""
    rows = [
        f"| {markdown(load.path)} | {load.experts} | {load.reached} | {load.effective:.1f} | {load.busiest:.1%} | "
        f"{len(load.unmoved)} |"
        for load in result.experts
    ]
    head = "| experts of | there are | had tokens | as even as | the busiest's share | barely moved |"
    return "\n\n" + "\n".join([head, "|---|---:|---:|---:|---:|---:|", *rows])


def _data(plan: Plan) -> str:
    config = plan.config
    held_out = counted(plan.held_out_rows, "row") + (
        f" from {markdown_code(config.eval_data)}" if config.eval_data else " of the same file, none of them trained on"
    )
    learned = "completions and assistant turns" if config.train_on == "completion" else "all tokens"
    learned = learned if config.objective == "sft" else "answers"
    return (
        f"## Data\n\n- Trained on {markdown_code(config.data)} ({plan.data_format}): {counted(plan.rows, 'row')}, "
        f"{plan.tokens:,} tokens.\n"
        + ("" if config.objective in ("grpo", "reward") else f"- Loss on {learned}: {plan.learned:,} tokens.\n")
        + f"- Held out: {held_out if plan.held_out_rows else 'none'}."
    ) + "".join(f"\n- Left out: {markdown(part)}." for part in sentences(plan.left_out))


def _settings(plan: Plan) -> str:
    config = plan.config
    options = {k: v for k, v in config.to_options().items() if v not in (None, [], {}, False)}
    left_out = ("data", "output", "overwrite", "resume")
    shown = [f"| {markdown(name)} | {_cell(value)} |" for name, value in options.items() if name not in left_out]
    again = f"theodora train --config config.yaml --overwrite{grant_flags(options)}"
    return (
        "## Training\n\n"
        f"- {plan.trainable:,} parameters trained ({plan.trainable / plan.total:.2%})"
        f"{'' if config.trains_all else f', in {markdown(describe_modules(plan.modules))}'}"
        f"{f' and {markdown(describe_token_rows(plan))}' if plan.token_rows else ''}.\n"
        f"- {counted(plan.steps, 'step')} of {describe_step(plan)} ({epochs_of(plan)}), "
        f"{'weights' if config.trains_all else 'base model'} in {plan.dtype} on {device_name(plan.device)}"
        f"{f', {plan.processes}' if plan.processes is not None else ''}.\n"
        + "".join(f"- Resumed with other options; {markdown(line)}.\n" for line in plan.history)
        + "\n"
        f"`config.yaml` holds every setting; `{again}` runs it again.\n\n"
        "| setting | value |\n|---|---|\n" + "\n".join(shown)
    )


def _cell(value: object) -> str:
    if isinstance(value, list):
        return markdown(", ".join(map(str, value)))
    return f"{value:g}" if isinstance(value, float) else markdown(value)


def _loaded_as(plan: Plan) -> tuple[str, str]:
    """The class of transformers that the base is loaded as, and what `from_pretrained` is given beside its name."""
    if plan.config.objective != "reward":
        return auto_name(plan.model.config), ""
    pad = plan.model.config.get_text_config().pad_token_id
    return AutoModelForSequenceClassification.__name__, f", num_labels=1, pad_token_id={pad}"


def _usage(config: TrainConfig, auto: str, given: str) -> str:
    # As Python's words, whatever characters they hold.
    name, model = (json.dumps(text) for text in (Path(config.output).resolve().name, config.model))
    base = f"{auto}.from_pretrained({model}{given})"
    commands = "\n".join(next_commands(config))
    if config.trains_all:
        return f"""## Use

```bash
{commands}
```

```python
from transformers import AutoTokenizer, {auto}

model = {auto}.from_pretrained({name})
tokenizer = AutoTokenizer.from_pretrained({name})
```"""
    return f"""## Use

```bash
{commands}
```

With Theodora:

```python
from transformers import {auto}
from theodora import load_adapter

model = load_adapter({base}, {name})
```

With PEFT:

```python
from peft import PeftModel
from transformers import {auto}

model = PeftModel.from_pretrained({base}, {name})
```"""


def _versions() -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    return f"## Versions\n\ntheodora {theodora.__version__}, {libraries}, Python {platform.python_version()}."


def summary_line(plan: Plan, result: TrainResult) -> str:
    """One line for the title of the loss curve."""
    figures = f"{plan.steps:,} steps · {as_time(result.seconds)} · {as_size(result.peak_memory)}"
    return f"{describe_adapter(plan.config)} · {figures}"
