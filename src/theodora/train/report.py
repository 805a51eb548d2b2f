"""What a run says before it begins and when it is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from theodora.config import METHOD_NAMES, TrainConfig
from theodora.data.left_out import LeftOut, sentences
from theodora.files.run_files import CONFIG_FILE, HELD_OUT_FILE
from theodora.plan.estimate import bytes_of_state
from theodora.plan.fits import optimizer_of
from theodora.safe_text import plain, quoted
from theodora.train.continued import described as described_origin
from theodora.train.expert_loads import TrainedExperts, described
from theodora.train.preference_report import described as described_objective
from theodora.train.preference_report import figure_rows
from theodora.train.progress import as_size, as_time, shorten
from theodora.train.result import TrainResult
from theodora.trust import grant_flags

_MOST_LEFT_OUT = 12  # lines of the panel
_PROMPT, _ANSWER = 100, 160  # characters that are shown


@dataclass(frozen=True)
class Plan:
    """What is about to happen, in figures."""

    config: TrainConfig
    model: PreTrainedModel
    device: torch.device
    dtype: str
    modules: Sequence[str]
    """Paths of the adapted modules."""
    trainable: int
    total: int
    data_format: str
    rows: int
    tokens: int
    learned: int
    """Tokens that count in the loss."""
    held_out_rows: int
    steps: int
    rows_per_step: int
    epochs: float
    warmup_steps: int
    resume_at: int | None
    path: str | None
    """What the fast path speeds up; None where there is nothing to say."""
    notes: Sequence[str]
    left_out: Sequence[LeftOut] = ()
    """What rows hold and nothing is learned from."""
    experts: Mapping[str, TrainedExperts] = field(default_factory=dict[str, TrainedExperts])
    """Path of each adapted parameter of experts, and what is trained of it."""
    token_rows: Mapping[str, int] = field(default_factory=dict[str, int])
    """Path of each module in which rows of single tokens are trained, and how many."""
    processes: str | None = None
    """How many there are, and what joins them; None for one."""
    history: Sequence[str] = ()
    """Options that had other values before the run was resumed, and until which step."""


def print_plan(console: Console, plan: Plan) -> None:
    """Print the panel before training."""
    config, adapter = plan.config, plan.config.adapter
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    parameters = plan.total - (0 if config.trains_all else plan.trainable)
    grid.add_row("Model", f"{shorten(config.model)}  {parameters:,} parameters")
    grid.add_row("", f"{plan.dtype} on {device_name(plan.device)}")
    if plan.processes is not None:
        grid.add_row("Processes", plan.processes)
    if plan.path is not None:
        grid.add_row("Fast path", plan.path)
    if config.trains_all:
        grid.add_row("Method", Text("full fine-tuning, weights in float32", style="bold"))
    else:
        on = f" on {describe_modules(plan.modules)}"
        grid.add_row("Adapter", Text.assemble((describe_adapter(config), "bold"), on))
    if (origin := described_origin(config)) is not None:
        grid.add_row("", origin)
    if (objective := described_objective(config)) is not None:
        grid.add_row("Objective", objective)
    if adapter.modules_to_save:
        grid.add_row("", f"and trained in full: {', '.join(adapter.modules_to_save)}")
    if plan.token_rows:
        grid.add_row("", f"and trained by themselves: {describe_token_rows(plan)}")
    grid.add_row("Trained", f"{plan.trainable:,} parameters ({plan.trainable / plan.total:.2%})")
    if plan.experts:
        grid.add_row("", describe_trained_experts(plan))
    grid.add_row("Data", f"{shorten(config.data)}  format {plan.data_format}")
    grid.add_row("", f"{counted(plan.rows, 'row')}, {describe_tokens(plan)}")
    for part in left_out_lines(plan.left_out):
        grid.add_row(Text("Left out", style="yellow"), Text(part))
    held_out = counted(plan.held_out_rows, "row") + (f" of {config.eval_data}" if config.eval_data else "")
    grid.add_row("Held out", held_out if plan.held_out_rows else "none")
    grid.add_row("Steps", f"{plan.steps:,} of {describe_step(plan)}, {epochs_of(plan)}")
    if plan.resume_at is not None:
        grid.add_row("", f"going on from step {plan.resume_at:,}")
    grid.add_row(
        "Learning rate",
        f"{config.learning_rate:g}, {config.lr_scheduler_type}, warm-up {counted(plan.warmup_steps, 'step')}",
    )
    grid.add_row("Output", shorten(config.output))
    for note in plan.notes:
        grid.add_row(Text("Note", style="yellow"), note)
    console.print(
        Panel(
            grid, title=Text("theodora train", style="bold"), title_align="left", border_style="cyan", box=box.ROUNDED
        )
    )


def left_out_lines(parts: Sequence[LeftOut]) -> list[str]:
    """What is left out, one line each; of many the first, and where the others stand."""
    # What the template hides of turns comes before columns that are not used: it must not be among the others.
    lines = sentences(sorted(parts, key=lambda part: not part.why.startswith("left out")))
    more = len(lines) - _MOST_LEFT_OUT
    return lines if more <= 1 else [*lines[:_MOST_LEFT_OUT], f"and {more:,} more, which the model card names"]


def print_result(console: Console, result: TrainResult, config: TrainConfig, notes: Sequence[str]) -> None:
    """Print the table after training, and what can be done next."""
    table = Table(box=box.SIMPLE_HEAD, title="Result", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right", style="bold")
    for name, before, after in result_rows(result):
        table.add_row(name, before, after)
    console.print()
    console.print(table)
    console.print(
        f"{counted(result.steps, 'step')} in {as_time(result.seconds)}, {result.tokens_per_second:,.0f} tokens/s, "
        f"peak memory {as_size(result.peak_memory)}",
    )
    if result.processes > 1:
        console.print(describe_network(result))
    console.print(f"Moved by training: {describe_moved(result)}; all finite")
    for line in described(result.experts):
        console.print(line, markup=False)
    if result.stops is not None:
        console.print("It " + describe_stops(result))
    asked = "Scored" if result.objective == "reward" else "Asked"
    for sample in result.samples:
        console.print(Text.assemble((f"\n{asked}: ", "dim"), plain(_short(sample.prompt, _PROMPT))))
        console.print(Text.assemble(("before ", "dim"), plain(_short(sample.before, _ANSWER))))
        console.print(Text.assemble(("after  ", "dim"), (plain(_short(sample.after, _ANSWER)), "bold")))
    for note in notes:
        console.print(Text.assemble(("Note: ", "yellow"), note))
    what = "model" if config.trains_all else "adapter"
    where = Text.assemble(
        f"\nThe {what} is in ", (str(result.output), "bold"), ", with its model card and loss curve. Next:\n"
    )
    console.print(where, soft_wrap=True)
    for command in next_commands(config):
        console.print(Text("  " + command, style="cyan"), soft_wrap=True)


def _short(text: str, most: int) -> str:
    """The end of a prompt or the beginning of an answer on one line."""
    words = " ".join(text.split())
    if len(words) <= most:
        return words
    return "…" + words[-most:] if most == _PROMPT else words[:most] + "…"


def result_rows(result: TrainResult) -> list[tuple[str, str, str]]:
    """Figure, before, after."""
    rows = []
    if result.eval_loss is not None and result.objective != "grpo":  # whose is the reward again, negative
        before = "" if result.eval_loss_before is None else f"{result.eval_loss_before:.4f}"
        rows.append(("Held-out loss", before, f"{result.eval_loss:.4f}"))
    rows += figure_rows(result.objective, result.figures)
    if result.general_loss is not None:
        before = "" if result.general_loss_before is None else f"{result.general_loss_before:.4f}"
        rows.append(("Loss on general text (nats per token)", before, f"{result.general_loss:.4f}"))
    if result.train_reward is not None:
        return [*rows, ("Reward in training (last tenth)", "", f"{result.train_reward:.4f}")]
    return [*rows, ("Training loss (last tenth)", "", f"{result.train_loss:.4f}")]


def describe_network(result: TrainResult) -> str:
    """`2 processes; each sent 1.2 MB a step, the gradients`, and with them its parts of sharded weights."""
    sent = f"{result.processes} processes; each sent {_as_bytes(result.bytes_per_step)} a step, the gradients"
    if result.sharding is None:
        return sent
    within = " within its machine" if result.sharding == "hsdp" else ""
    return f"{sent}, and{within} {_as_bytes(result.gathered_bytes_per_step)} of frozen weights, gathered in each pass"


def _as_bytes(count: int) -> str:
    return as_size(count) if count >= 1e6 else f"{count / 1e3:.1f} kB"


def describe_moved(result: TrainResult) -> str:
    """`lora_A 14 of 14, lora_B 14 of 14, magnitude 14 of 14`."""
    return ", ".join(f"{part} {moved} of {total}" for part, (moved, total) in result.moved.items())


def describe_stops(result: TrainResult) -> str:
    """`stops by itself in 3 of 4 answers`."""
    stopped, asked = result.stops or (0, 0)
    return f"stops by itself in {stopped} of {asked} answers"


def next_commands(config: TrainConfig) -> list[str]:
    """Commands for someone who has just trained this adapter."""
    output = quoted(config.output)
    held_out = config.eval_data or (f"{config.output.rstrip('/')}/{HELD_OUT_FILE}" if config.held_out else None)
    evaluate = f"theodora evaluate --model {quoted(config.model)} --adapter {output} --data"
    trusts = " --trust-remote-code" if config.trust_remote_code else ""
    if config.objective == "reward":
        learns = (
            f"theodora train --objective grpo --reward {output} --model {quoted(config.model)} --data PROMPTS.jsonl"
        )
        merge = f"theodora merge {output} --output {quoted(config.output.rstrip('/') + '-merged')}{trusts}"
        return [
            *([f"theodora evaluate --model {output} --data {quoted(held_out)}{trusts}"] if held_out else []),
            f"{learns} --output {quoted(config.output.rstrip('/') + '-used')}",
            *([] if config.trains_all else [merge]),
        ]
    if config.trains_all:
        return [
            *([f"theodora evaluate --model {output} --data {quoted(held_out)}{trusts}"] if held_out else []),
            f"theodora chat {output}{trusts}",
            f"theodora inspect {output}",
        ]
    return [
        *([f"{evaluate} {quoted(held_out)}{trusts}"] if held_out else []),
        f"theodora chat {output}{trusts}",
        f"theodora merge {output} --output {quoted(config.output.rstrip('/') + '-merged')}{trusts}",
    ]


def resume_command(config: TrainConfig) -> str:
    """The command that goes on from a run's newest checkpoint, with the flags that its record cannot grant."""
    record = quoted(str(Path(config.output) / CONFIG_FILE))
    return f"theodora train --config {record} --resume{grant_flags(config.to_options())}"


def describe_adapter(config: TrainConfig) -> str:
    """`DoRA rank 8, alpha 16`, or `full fine-tuning`."""
    adapter = config.adapter
    method = METHOD_NAMES[adapter.method]
    if config.trains_all:
        return method
    parts = [f"{method} rank {adapter.rank}, alpha {adapter.alpha:g}"]
    parts += ["rsLoRA"] if adapter.rslora else []
    parts += [f"dropout {adapter.dropout:g}"] if adapter.dropout else []
    parts += [f"init {adapter.init}"] if adapter.init != "default" else []
    return ", ".join(parts)


def describe_modules(paths: Sequence[str]) -> str:
    """`210 modules: q_proj, k_proj, …`."""
    kinds = Counter(path.rpartition(".")[2] for path in paths)
    return counted(len(paths), "module") + (f": {', '.join(kinds)}" if len(kinds) <= 8 else "")


def epochs_of(plan: Plan) -> str:
    """`1 epoch`, `0.33 epochs`."""
    number = f"{plan.epochs:.2g}"
    return f"{number} epoch" + ("" if number == "1" else "s")


def describe_tokens(plan: Plan) -> str:
    """`1,200 tokens, 300 of them in the loss`; of prompts nothing is."""
    tokens = f"{plan.tokens:,} tokens"
    return tokens if plan.config.objective in ("grpo", "reward") else f"{tokens}, {plan.learned:,} of them in the loss"


def describe_step(plan: Plan) -> str:
    """`16 rows`, or `16 answers of its own`."""
    return (
        counted(plan.rows_per_step, "answer") + " of its own"
        if plan.config.objective == "grpo"
        else counted(plan.rows_per_step, "row")
    )


def describe_trained_experts(plan: Plan) -> str:
    """`12,288 of them in 4 experts each of 2 layers (gate_up_proj, down_proj): 49.2 kB, …`, with what training adds."""
    places = plan.experts.values()
    numbers, size = sum(place.numbers for place in places), sum(place.bytes for place in places)
    states = round(numbers * bytes_of_state(optimizer_of(plan.config)))
    layers = len({path.rpartition(".")[0] for path in plan.experts})
    names = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in plan.experts))
    counts = " or ".join(str(count) for count in sorted({place.shape[0] for place in places}))
    of = "A, B and m" if plan.config.adapter.method == "dora" else "A and B"
    return (
        f"{numbers:,} of them in {counts} experts each of {counted(layers, 'layer')} ({names}): {_as_bytes(size)} of "
        f"{of}, {_as_bytes(size)} of gradients, {_as_bytes(states)} of the optimizer's"
    )


def describe_token_rows(plan: Plan) -> str:
    """`the rows of 2 tokens in model.embed_tokens`."""
    return ", ".join(f"the rows of {counted(n, 'token')} in {path}" for path, n in plan.token_rows.items())


def device_name(device: torch.device) -> str:
    """`cuda (NVIDIA H100)` or `cpu (2 threads)`."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({counted(torch.get_num_threads(), 'thread')})" if device.type == "cpu" else str(device)


def counted(number: int, noun: str) -> str:
    """`1 row`, `1,200 rows`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
