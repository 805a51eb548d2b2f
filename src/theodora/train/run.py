"""`train`: a configuration in, a folder with an adapter and its record out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from trl.trainer.sft_config import SFTConfig

from theodora.adapters import save_adapter
from theodora.adapters.quantized import count_parameters
from theodora.adapters.state import active_name, adapter_layers, find_state
from theodora.adapters.token_rows import own_rows
from theodora.config import TrainConfig
from theodora.data import Examples, as_answers
from theodora.errors import CheckpointError, ConfigError, TheodoraError, bullet_list
from theodora.files import run_files
from theodora.files.alone import alone_in
from theodora.files.atomic import atomic_files, atomic_write
from theodora.files.finite import not_finite
from theodora.files.generation import save_ends
from theodora.files.read_back import check_lines, save_tokenizer
from theodora.kernels.ahead import begin_with_gpu
from theodora.parse import to_yaml
from theodora.safe_text import plain, quoted
from theodora.terminal import Terminal
from theodora.train import checkpoints
from theodora.train.arguments import finish_arguments, sft_arguments
from theodora.train.build import build_trainer, guard_of, outcome_of
from theodora.train.callbacks import CountUpdates, Diverged, MetricsFile, StopWhenDiverged, read_metrics
from theodora.train.card import summary_line, write_card
from theodora.train.continued import continued
from theodora.train.expert_loads import ExpertLoads, trained_experts
from theodora.train.fast_path import RecomputeLess, fast_path, missing_parts
from theodora.train.forgetting import Forgetting
from theodora.train.full import save_model, tensors_of_run
from theodora.train.inputs import KeepInputs, changes_since, missing_random_state
from theodora.train.launched import notes_of_one
from theodora.train.loss_figure import draw_losses
from theodora.train.movement import EarlyGradients, check_moved, fingerprints
from theodora.train.moving import Moving
from theodora.train.out_of_memory import memory_advice, said_of_pieces
from theodora.train.preference_report import held_out_figures, per_row
from theodora.train.prepare import Prepared, count_tokens, prepare
from theodora.train.processes import Agreement, Processes
from theodora.train.progress import ProgressView, peak_memory
from theodora.train.pushed import place_note, push_result
from theodora.train.quiet import quiet_libraries
from theodora.train.report import Plan, print_plan, print_result, resume_command
from theodora.train.restored import restored_afterwards
from theodora.train.result import TrainResult
from theodora.train.resumed import Past, change_notes, check_options, history, history_lines, past_of, record_of
from theodora.train.samples import answers_of, paired, scores_of
from theodora.train.scorers import is_model_folder
from theodora.train.self_stopping import SelfStopping, count_self_stops
from theodora.train.sharding import bytes_gathered, shard_model
from theodora.train.stop import StepAbandoned, StopOnSignal, TrainingInterrupted
from theodora.train.together import check_seen, logged, together
from theodora.train.trainer import AdapterTrainer
from theodora.train.wholeness import note_divergence, tokens_at
from theodora.trust import grant_flags


def train(config: TrainConfig, *, console: Console | None = None, show_result: bool = True) -> TrainResult:
    """Train an adapter and write it, with its record, into `config.output`.

    The folder then holds the adapter in PEFT's files, the tokenizer, README.md (the model card), metrics.jsonl,
    loss.png, config.yaml (with every choice made) and checkpoints/.

    Example:
        `result = train(TrainConfig(model="gpt2", data="train.jsonl", output="runs/first", max_steps=100))`

    Args:
        config: the run.
        console: where progress and results are shown. Default: standard output; `Console(quiet=True)` shows nothing.
        show_result: whether to end with a table of the results and what can be done next.

    Returns:
        The figures of the run, and the trained model.

    Raises:
        ConfigError: the configuration makes no sense for this model, data or output folder. Nothing was trained.
        DataError: the data cannot be used. Nothing was trained.
        CheckpointError: a model or checkpoint cannot be read, or a file not written.
        TheodoraError: the run diverged, ran out of memory, or left part of the adapter untrained.
        TrainingInterrupted: Ctrl-C or SIGTERM. A checkpoint was saved, and the message says how to resume.
    """
    stop = StopOnSignal(Path(config.output), config.grace_period)
    with stop.listening(), together(config) as processes:
        return _train_in_order(config, console, show_result, stop, processes)


def _train_in_order(
    config: TrainConfig, console: Console | None, show_result: bool, stop: StopOnSignal, processes: Processes
) -> TrainResult:
    config = continued(config)
    output = Path(config.output)
    arguments = sft_arguments(config, output / run_files.CHECKPOINTS)
    begin_with_gpu(arguments.device)
    console = Terminal.over(console or Terminal()) if processes.first else Terminal(quiet=True)
    with ExitStack() as held:
        said, checkpoint, past = processes.first_does(lambda: _look(config, held, processes.count))
        check_seen(processes, output)
        log = held.enter_context(logged(processes, config, anew=checkpoint is None))
        if log is not None:
            console = Terminal(file=log, width=120)
        with quiet_libraries():
            with console.status("Loading the data and the model …"):
                prepared = prepare(config, arguments)
                prepared.notes[:0] = said
                if processes.alone:
                    prepared.notes += notes_of_one(config)
                prepared.given, prepared.past = config, past
                processes = Processes.here()  # which may have chosen how they share the weights
                if processes.sharding is not None:
                    shard_model(prepared.model, processes.sharding, processes, cpu_offload=config.cpu_offload)
                    prepared.bytes_gathered = bytes_gathered(prepared.model)
            with (
                restored_afterwards(prepared.model),
                fast_path(prepared.model, prepared.config, arguments.device) as path,
                _explained_memory_errors(prepared),
            ):
                result, notes = _train(prepared, arguments, checkpoint, console, path, stop)
    if show_result and processes.first:
        print_result(console, result, prepared.config, notes)
    processes.first_does(lambda: push_result(config, console), patient=True)
    return result


def _look(config: TrainConfig, held: ExitStack, processes: int) -> tuple[list[str], Path | None, Past | None]:
    """Take the output folder, and find what the run goes on from: notes, a checkpoint, and what that tells."""
    output = Path(config.output)
    said = held.enter_context(alone_in(output))
    checkpoints.check_output(output, overwrite=config.overwrite, resume=config.resume, trains_all=config.trains_all)
    names = ("model", "from_adapter", "reference", "data", "eval_data", "replay", "general")
    read = {name: getattr(config, name) for name in names}
    read |= {f"reward {name}": name for name in config.reward if is_model_folder(name)}
    checkpoints.check_inputs(output, read, overwrite=config.overwrite)
    said += place_note(config)
    checkpoint = checkpoints.find_checkpoint(config.resume, output) if config.resume is not None else None
    past = None if checkpoint is None else past_of(checkpoint)
    if checkpoint is not None and past is not None:
        check_options(config, processes, checkpoint, past)
    if checkpoint is None:
        held.enter_context(checkpoints.marked(output))
    return said, checkpoint, past


def _train(
    prepared: Prepared,
    arguments: SFTConfig,
    checkpoint: Path | None,
    console: Console,
    path: str | None,
    stop: StopOnSignal,
) -> tuple[TrainResult, list[str]]:
    """The run itself; also what the user should be told beside the result."""
    output, processes = Path(prepared.config.output), Processes.here()
    tensors = tensors_of_run(prepared.model)
    processes.spread(list(tensors.values()))  # other hardware may have drawn, or decomposed, otherwise
    before = fingerprints(tensors)
    checkpoints.check_space(
        output, sum(t.numel() * t.element_size() for t in tensors.values()), arguments.save_total_limit or 2
    )
    view, updates = ProgressView(console), CountUpdates()
    arguments = finish_arguments(
        arguments,
        prepared.config,
        model=prepared.model,
        tokenizer=prepared.tokenizer,
        precision=prepared.precision,
        balances_experts=prepared.balances_experts,
        evaluates=prepared.held_out_rows is not None,
        evaluates_first=checkpoint is None or checkpoints.owes_evaluation(checkpoint),
        writes=processes.first,
    )
    if not processes.alone:
        stop.alone, stop.agree = False, Agreement(processes.group)
    inputs = prepared.inputs(processes.count)
    processes.agree("data and base model", inputs.hashes)
    if checkpoint is not None:
        prepared.notes += changes_since(checkpoint, inputs)
        missing = processes.gather(missing_random_state(checkpoint, processes.index))
        prepared.notes += [note for notes in missing for note in notes]
    say = partial(console.print, style="yellow", soft_wrap=True)
    early, keeps, loads = EarlyGradients(tensors), KeepInputs(inputs), ExpertLoads(prepared.model, say)
    callbacks = [StopWhenDiverged(), RecomputeLess(), stop, early, keeps, updates, loads]
    trainer = build_trainer(prepared, arguments, callbacks)
    trainer.say = say
    trainer.pieces.advice = memory_advice(prepared.config, prepared.model)
    trainer.guard = guard_of(prepared, trainer, output)
    trainer.outcome = outcome_of(trainer, trainer.guard, prepared.model)
    plan, announced = _plan(prepared, trainer, checkpoint, path), trainer.why_no_graph
    trainer.options = record_of(
        prepared.config, prepared.given or prepared.config, processes.count, prepared.past, plan.resume_at or 0
    )
    if checkpoint is not None:
        _check_resume(plan, checkpoint)
        trainer.tokens = tokens_at(checkpoint) if processes.first else 0
        view.count_tokens_from(trainer.tokens)
    print_plan(console, plan)
    if processes.writes:
        _begin_record(prepared, plan, output)
        # First, so that the line of a diverged step is written before the run ends over it; `view` tells it the pace.
        metrics = MetricsFile(output / run_files.METRICS_FILE, resume_at=plan.resume_at, pace=view.pace)
        trainer.callback_handler.callbacks[:0] = [view, metrics]
    else:
        trainer.callback_handler.callbacks.insert(0, view)
    forgetting = None if prepared.general is None else Forgetting(prepared, trainer)
    if forgetting is not None:  # before the clock that counts the time of steps
        trainer.callback_handler.callbacks.insert(0, forgetting)
    if processes.sharding is None and find_state(prepared.model) is not None:
        trainer.callback_handler.callbacks.insert(0, Moving(trainer, output / run_files.METRICS_FILE))
    asks = prepared.config.objective != "sft"
    before_it = processes.first_does(lambda: _answers(prepared), patient=True) if asks else []
    started = time.monotonic()
    with loads.counting():
        _run(trainer, checkpoint, stop, view, prepared.config)
    if (
        trainer.saved_at is None
        and processes.first
        and checkpoint is not None
        and checkpoint == checkpoints.newest_checkpoint(output)
    ):
        # It may have been killed after its last checkpoint, before older ones were deleted.
        limit, best = arguments.save_total_limit, trainer.state.best_model_checkpoint
        checkpoints.rotate(output / run_files.CHECKPOINTS, checkpoints.steps_done(checkpoint), limit, best)
    seconds = time.monotonic() - started
    steps = updates.count + max(0, (plan.resume_at or 0) - 1)  # the first may have had a learning rate of 0
    moved, resting = check_moved(tensors, before, steps, trainer.fingerprints_at_end, trainer.why_at_rest)
    result = replace(_result(prepared, plan, trainer, view, seconds, moved), experts=loads.loads(processes))
    if forgetting is not None:
        before, after = forgetting.before_and_after()
        result = replace(result, general_loss_before=before, general_loss=after)
    # (A sharded model would have to be asked by all processes, which do not know how long the others' answers are.)
    asks = processes.sharding is None and prepared.config.objective != "reward"
    stops = processes.first_does(lambda: _count_stops(prepared), patient=True) if asks else None
    result = replace(result, stops=None if stops is None else (stops.stopped, stops.asked))
    if before_it:
        after_it = processes.first_does(lambda: _answers(prepared), patient=True)
        result = replace(result, samples=paired(before_it, after_it))
    processes.first_does(lambda: _end_record(prepared, plan, result))
    notes = (
        [f"not all steps ran as CUDA graphs: {why}"] if (why := trainer.why_no_graph) not in (None, announced) else []
    )
    if stops is not None and prepared.config.objective == "sft" and (warning := stops.warning(result.train_loss)):
        notes.append(warning)
    if loads.warned:
        notes.append(f"most tokens went to few experts at some time: {', '.join(loads.warned[:9])}")
    if trainer.guard.skipped:
        skipped = f"steps {', '.join(map(str, trainer.guard.skipped[:9]))}"
        notes.append(f"skipped for their loss or gradient: {skipped}; their rows are in {trainer.guard.file}")
    notes += said_of_pieces(processes.gather(trainer.pieces.count))
    if plan.resume_at == plan.steps:
        notes.append("all steps had been taken; raise max_steps or num_train_epochs to go on")
    if resting:
        notes.append(f"{len(resting)} of {len(tensors)} trained tensors had no gradient: {', '.join(resting[:3])} …")
    return result, notes


def _plan(prepared: Prepared, trainer: AdapterTrainer, checkpoint: Path | None, path: str | None) -> Plan:
    arguments, model, output = trainer.args, prepared.model, Path(prepared.config.output)
    rows_at_once = arguments.per_device_train_batch_size * trainer.processes.count
    rows = trainer.rows_of_epoch
    batches = math.ceil(rows / rows_at_once)
    steps_per_epoch = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * steps_per_epoch)
    tokens, learned = count_tokens(prepared.train_rows)
    resume_at = checkpoints.steps_done(checkpoint) if checkpoint is not None else None
    state = find_state(model)
    return Plan(
        config=prepared.config,
        model=model,
        device=arguments.device,
        dtype=prepared.dtype,
        modules=list(adapter_layers(model)),
        processes=None if trainer.processes.alone else trainer.processes.described(),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=count_parameters(model),
        data_format=prepared.training.format,
        rows=len(prepared.train_rows),
        tokens=tokens,
        learned=learned,
        held_out_rows=len(prepared.held_out_rows) if prepared.held_out_rows is not None else 0,
        steps=steps,
        rows_per_step=rows_at_once * arguments.gradient_accumulation_steps,
        epochs=steps / steps_per_epoch,
        warmup_steps=arguments.get_warmup_steps(steps),
        resume_at=resume_at,
        history=history_lines(history(prepared.config, prepared.past, resume_at or 0)),
        path=None if path is None else ", ".join([path, *trainer.fast_notes]),
        notes=[
            *prepared.notes,
            *_device_notes(trainer.processes),
            *_remainder(rows, arguments, trainer.processes),
            *missing_parts(arguments.device),
            *(checkpoints.passed_over(output, checkpoint) if prepared.config.resume else []),
            *(change_notes(prepared.config, prepared.past) if prepared.past is not None else []),
        ],
        left_out=prepared.left_out,
        experts=trained_experts(model),
        token_rows={}
        if state is None
        else {p: len(r.ids) for p, r in own_rows(model, active_name(state, None)).items()},
    )


def _remainder(rows: int, arguments: SFTConfig, processes: Processes) -> list[str]:
    """What happens to the batches of an epoch that the processes cannot share evenly."""
    size = arguments.per_device_train_batch_size
    over = (rows // size if arguments.dataloader_drop_last else math.ceil(rows / size)) % processes.count
    if not over:
        return []
    last, ones = (
        ("batch of an epoch goes", "process") if over == 1 else (f"{over} batches of an epoch go", f"{over} processes")
    )
    return [f"the last {last} to the first {ones}; the others add nothing to that step, whose loss is per token"]


def _device_notes(processes: Processes) -> list[str]:
    count = torch.cuda.device_count()
    if count > processes.count and processes.machines == 1:
        return [
            f"{processes.count} of {count} GPUs at work; torchrun --nproc-per-node {count} -m theodora train … uses all"
        ]
    return []


def _check_resume(plan: Plan, checkpoint: Path) -> None:
    if plan.resume_at is not None and plan.resume_at > plan.steps:
        raise ConfigError(
            f"{checkpoint} holds {plan.resume_at} steps, and this run has {plan.steps}. Raise max_steps or "
            "num_train_epochs to go on."
        )


def _begin_record(prepared: Prepared, plan: Plan, output: Path) -> None:
    """Clear what is to be overwritten, and write down how to run this again and what was held out."""
    config = prepared.config
    if config.overwrite or checkpoints.is_doomed(output):
        checkpoints.clear_run(output)
    checkpoints.clear_partial(output)
    options = config.to_options() | {"overwrite": False, "resume": None}
    command = f"theodora train --config {quoted(output / run_files.CONFIG_FILE)} --overwrite{grant_flags(options)}"
    head = f"{run_files.RECORD_HEAD} To run it again: {command}\n"
    head += "".join(f"# {plain(line)}\n" for line in plan.history)
    checkpoints.write_record(output, head + to_yaml(options))
    if prepared.held_out is not None and config.eval_data is None:
        _write_held_out(prepared.held_out, output / run_files.HELD_OUT_FILE)


def _write_held_out(rows: Examples, path: Path) -> None:
    with atomic_write(path) as file:
        if rows.format == "prompts":  # as they were, with what functions take by name
            file.write_text("".join(f"{line}\n" for line in rows.dataset["columns"]), encoding="utf-8")
        else:
            rows.dataset.to_json(file, lines=True, force_ascii=False)
        check_lines(file, len(rows))


def _end_record(prepared: Prepared, plan: Plan, result: TrainResult) -> None:
    """Write the adapter, and what there is to say about it."""
    output = result.output
    if not prepared.config.trains_all:
        save_adapter(prepared.model, output)
    with atomic_files(output) as folder:
        if prepared.config.trains_all:
            save_model(prepared.model, folder, prepared.base_config)
        save_tokenizer(prepared.tokenizer, folder)
        save_ends(prepared.model, folder)
    draw_losses(
        read_metrics(output / run_files.METRICS_FILE),
        output / run_files.FIGURE_FILE,
        summary_line(plan, result),
        per_row(prepared.config),
    )
    write_card(plan, result)


def _run(
    trainer: AdapterTrainer, checkpoint: Path | None, stop: StopOnSignal, view: ProgressView, config: TrainConfig
) -> None:
    """Train, and turn signals into a checkpoint and a message."""
    output = Path(config.output)
    try:
        with stop.training(), view:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            if trainer.outcome is not None and not trainer.args.load_best_model_at_end:
                trainer.outcome.check()
    except StepAbandoned:
        trainer.save_now()
        raise TrainingInterrupted(_interrupted(config), stop.exit_code) from None
    except KeyboardInterrupt:
        raise TrainingInterrupted(_interrupted(config)) from None
    except Diverged as error:
        _check_base(trainer, error)
        if trainer.processes.writes and error.in_doubt is not None:
            note_divergence(output / run_files.CHECKPOINTS / f"checkpoint-{error.in_doubt}", error.reason)
        raise
    if stop.requested and trainer.state.global_step < trainer.state.max_steps and not trainer.has_stopped_early:
        raise TrainingInterrupted(_interrupted(config), stop.exit_code)


def _check_base(trainer: AdapterTrainer, error: Diverged) -> None:
    """Raise a CheckpointError if it is the base model that cannot be trained on."""
    bad = not_finite((name, p) for name, p in trainer.model.named_parameters() if not p.requires_grad)
    if bad:
        raise CheckpointError(
            f"The base model itself holds NaN or infinite values as it was loaded, in {trainer.model.dtype}, so no "
            f"adapter can be trained on it ({error.reason} at step {error.step}):" + bullet_list(bad[:12])
        ) from error


def _interrupted(config: TrainConfig) -> str:
    newest = checkpoints.newest_checkpoint(Path(config.output))
    if newest is None:
        return "Interrupted before the first checkpoint; nothing was kept to resume from."
    return f"Interrupted. {newest} is whole. Go on with:\n\n  {resume_command(config)}\n"


@contextmanager
def _explained_memory_errors(prepared: Prepared) -> Iterator[None]:
    advice = memory_advice(prepared.config, prepared.model)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TheodoraError(
            f"Out of memory: {str(error).splitlines()[0]}\nLower per_device_train_batch_size (and raise "
            f"gradient_accumulation_steps by as much), or lower max_length. {advice}".rstrip()
        ) from error


def _result(
    prepared: Prepared,
    plan: Plan,
    trainer: AdapterTrainer,
    view: ProgressView,
    seconds: float,
    moved: dict[str, tuple[int, int]],
) -> TrainResult:
    state = trainer.state
    last_tenth = [line for line in state.log_history if line["step"] > state.global_step * 0.9]
    rewarded = [line for line in state.log_history if "reward" in line]
    drawn = [line for line in rewarded if line in last_tenth] or rewarded[-1:]  # for many steps at once, perhaps
    held_out = [(line["step"], line["eval_loss"]) for line in state.log_history if "eval_loss" in line]
    best = state.best_metric if trainer.args.load_best_model_at_end else None
    final = best if best is not None else held_out[-1][1] if held_out else None
    return TrainResult(
        output=Path(prepared.config.output),
        steps=state.global_step,
        train_loss=_mean(last_tenth, "loss"),
        train_reward=_mean(drawn, "reward") if prepared.config.objective == "grpo" else None,
        eval_loss_before=next((loss for step, loss in held_out if step == 0), None),
        eval_loss=final,
        trainable_parameters=plan.trainable,
        total_parameters=plan.total,
        tokens=sum(trainer.processes.gather(trainer.tokens_seen)),
        seconds=seconds,
        tokens_per_second=view.mean_tokens_per_second,
        warm_tokens_per_second=view.warm_tokens_per_second,
        peak_memory=max(trainer.processes.gather(peak_memory())),
        processes=trainer.processes.count,
        bytes_per_step=trainer.bytes_per_step,
        sharding=trainer.processes.sharding,
        gathered_bytes_per_step=prepared.bytes_gathered * trainer.args.gradient_accumulation_steps,
        moved=moved,
        left_out=prepared.left_out,
        objective=prepared.config.objective,
        figures=held_out_figures(prepared.config.objective, state.log_history, best),
        model=prepared.model,
        tokenizer=prepared.tokenizer,
    )


def _answers(prepared: Prepared) -> list[tuple[str, str]]:
    """What the model answers to a few held-out prompts, or prompts of rows trained on; or how it scores theirs."""
    if prepared.config.objective == "reward":
        return scores_of(prepared.model, prepared.tokenizer, prepared.held_out_rows or prepared.train_rows)
    examples = as_answers(prepared.held_out if prepared.held_out is not None else prepared.training)
    return answers_of(prepared.model, prepared.tokenizer, examples, prepared.config.use_chat_template)


def _count_stops(prepared: Prepared) -> SelfStopping | None:
    """Ask a few held-out rows, or rows trained on."""
    examples = prepared.held_out if prepared.held_out is not None else prepared.training
    return count_self_stops(prepared.model, prepared.tokenizer, as_answers(examples), prepared.config.use_chat_template)


def _mean(lines: list[dict[str, Any]], name: str) -> float:
    values = [line[name] for line in lines if name in line]
    return sum(values) / len(values) if values else math.nan
