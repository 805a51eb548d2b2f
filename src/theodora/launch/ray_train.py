"""`theodora train --launcher ray`: the terminal's side. Ray Train starts the processes; what they say appears here."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from theodora.config import TrainConfig
from theodora.errors import ConfigError, TheodoraError
from theodora.launch.cluster import Share, beside, cluster, how_it_died, share_for_training
from theodora.launch.mailbox import Ended, InOrder, Mailbox, Said, TooEarly
from theodora.launch.ray_worker import work
from theodora.safe_text import quoted
from theodora.terminal import Terminal

_PATIENCE = 0.2  # seconds between two looks at signals


class RunFailed(TheodoraError):
    """A process of the run failed; the message is its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; the message says how to go on."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def train_on_ray(
    config: TrainConfig, *, workers: int | None = None, address: str | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Train as `theodora.train.train` does, in several processes that Ray Train starts, one for each GPU.

    Example:
        `train_on_ray(TrainConfig(model="gpt2", data="train.jsonl", output="/shared/first"), workers=4)`

    Args:
        config: the run. Its output folder has to be in the same place on every machine.
        workers: how many processes. Default: one for each GPU of the cluster.
        address: of a cluster that is there; see `cluster`.
        console: where the first process's words are shown. Default: standard output.

    Returns:
        The run's figures, as in `TrainResult.to_dict`.

    Raises:
        ConfigError: Ray is missing, there is no such cluster, or it has no room for so many.
        RunFailed: what a process ended with: its own message and exit code.
        RunInterrupted: Ctrl-C or SIGTERM; the message says how to go on.
    """
    _check_alone()
    terminal = Terminal.over(console or Terminal())
    with ExitStack() as held:
        with terminal.status("Starting Ray …"):
            ray, there = held.enter_context(cluster(address))
        share = share_for_training(there, workers)
        mark = held.enter_context(beside(config.output))
        return _Run(ray, config, share, address, terminal, held.enter_context(_Signals())).run(mark)


def _check_alone() -> None:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: another launcher has started this process. Leave out either it "
            "or --launcher ray."
        )


class _Signals:
    """Notes SIGINT and SIGTERM, so that the processes can be told."""

    def __init__(self) -> None:
        self.came: list[int] = []

    def __enter__(self) -> _Signals:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, lambda number, _: self.came.append(number))
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Run:
    def __init__(
        self,
        ray: Any,
        config: TrainConfig,
        share: Share,
        address: str | None,
        terminal: Terminal,
        signals: _Signals,
    ) -> None:
        self.ray, self.config, self.share, self.address = ray, config, share, address
        self.terminal, self.signals = terminal, signals
        self.ends: list[Ended] = []
        self._in_order = InOrder()
        self._failure: BaseException | None = None
        self._told = 0
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        self._mailbox = ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()

    def run(self, mark: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="theodora-ray-") as folder:
            thread = threading.Thread(target=self._fit, args=(mark, folder), daemon=True, name="theodora-ray")
            with self._waiting() as waiting:
                thread.start()
                pending = None
                while thread.is_alive():
                    pending = pending or self._mailbox.take.remote(1.0)
                    if self.ray.wait([pending], timeout=_PATIENCE)[0]:
                        events, pending = self.ray.get(pending), None
                        if events:
                            waiting()
                        for event in events:
                            self._take(event)
                    self._pass_signals_on()
                for event in [*(self.ray.get(pending) if pending else []), *self.ray.get(self._mailbox.take.remote(0))]:
                    self._take(event)
        return self._outcome()

    @contextmanager
    def _waiting(self) -> Iterator[Any]:
        count = self.share.count
        status = self.terminal.status(f"Starting {count} worker{'' if count == 1 else 's'} on Ray …")
        status.start()
        try:
            yield status.stop
        finally:
            status.stop()

    def _fit(self, mark: str, folder: str) -> None:
        """In a thread of its own: Ray's answer to Ctrl-C would take the place of ours."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2.api.config import LoggingConfig

        share, terminal = self.share, self.terminal
        is_terminal = terminal.is_terminal
        task = {
            "config": self.config,
            "mailbox": self._mailbox,
            "folder": os.getcwd(),
            "mark": mark,
            "threads": share.threads,
            "terminal": {
                "encoding": terminal.encoding,
                "force_terminal": is_terminal,
                "color_system": terminal.color_system,
                "no_color": terminal.no_color,
                "width": terminal.width,
                "height": terminal.height,
                "quiet": terminal.quiet,
                "legacy_windows": False,
            },
        }
        resources = {"CPU": share.cpus, **({"GPU": share.gpus} if share.gpus else {})}
        try:
            TorchTrainer(
                work,
                train_loop_config=task,
                torch_config=TorchConfig(backend="nccl" if share.gpus else "gloo"),
                scaling_config=ScalingConfig(
                    num_workers=share.count, use_gpu=bool(share.gpus), resources_per_worker=resources
                ),
                run_config=RunConfig(
                    name="theodora",
                    storage_path=folder,
                    failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
                    logging_config=LoggingConfig(log_level="ERROR"),
                ),
            ).fit()
        except BaseException as error:
            self._failure = error

    def _take(self, event: Any) -> None:
        if isinstance(event, Said):
            if not self.terminal.quiet:
                self.terminal.file.write(self._in_order(event))
                self.terminal.file.flush()
        elif isinstance(event, Ended):
            self.ends.append(event)
        elif isinstance(event, TooEarly):
            raise RunInterrupted("Stopped before training began; nothing was changed.", self._exit_code())

    def _pass_signals_on(self) -> None:
        came = self.signals.came
        if len(came) == self._told:
            return
        again = self._told > 0 and signal.SIGINT in came[self._told :]
        self._told = len(came)
        if again:
            raise RunInterrupted(self._how_to_go_on(), self._exit_code())
        self.ray.get(self._mailbox.signal.remote(int(came[-1])))

    def _exit_code(self) -> int:
        return 0 if self.signals.came and self.signals.came[-1] == signal.SIGTERM else 130

    def _how_to_go_on(self) -> str:
        from theodora.train.checkpoints import newest_checkpoint
        from theodora.train.report import resume_command

        newest = newest_checkpoint(Path(self.config.output))
        if newest is None:
            return "Interrupted before the first checkpoint; nothing was kept to resume from."
        command = self._started_so(resume_command(self.config))
        return f"Interrupted. {newest} is whole. Go on with:\n\n  {command}\n"

    def _started_so(self, text: str) -> str:
        """A process's words, with our flags in the command that goes on."""
        from theodora.train.report import resume_command

        command = resume_command(self.config)
        address = "" if self.address is None else f" --ray-address {quoted(self.address)}"
        ours = f"{command} --launcher ray --num-workers {self.share.count}{address}"
        return text if ours in text else text.replace(command, ours)

    def _outcome(self) -> dict[str, Any]:
        ends = sorted(self.ends, key=lambda end: end.index)
        failed = [end for end in ends if end.exit_code and not end.interrupted]
        # What we say on purpose explains what others then stumble over; so does a death that only Ray has seen.
        for end in [end for end in failed if end.expected and not end.aside]:
            raise RunFailed(self._of(end), end.exit_code)
        dead = self._dead({end.index for end in ends})
        if dead:
            raise RunFailed(dead, 1)
        for end in [end for end in failed if not end.expected]:
            text = f"{self._of(end)}\nThis is unexpected; --debug shows where it happened."
            raise RunFailed(text, 1) from _Remote(end.trace)
        for end in failed:
            raise RunFailed(self._of(end), end.exit_code)
        for end in [end for end in ends if end.interrupted]:
            raise RunInterrupted(self._started_so(end.message), end.exit_code)
        if self._failure is not None:
            raise RunFailed(f"Ray ended the run: {_last_line(self._failure)}", 1) from self._failure
        return next(end.result for end in ends if end.result is not None)

    def _of(self, end: Ended) -> str:
        message = self._started_so(end.message)
        return message if end.index == 0 else f"Process {end.index} on {end.machine}: {message}"

    def _dead(self, spoke: set[int]) -> str:
        """Processes that ended without a word, as far as Ray knows of them."""
        failures: dict[int, Exception] = getattr(self._failure, "worker_failures", {})
        silent = sorted(index for index in failures if index not in spoke)
        if not silent:
            return ""
        how = f"Process {silent[0]} of {self.share.count} has died: {how_it_died(failures[silent[0]])}."
        return f"{how} {self._how_to_go_on().removeprefix('Interrupted. ')}"


class _Remote(Exception):
    """The traceback of another process, for `--debug`."""

    def __str__(self) -> str:
        return "\n" + self.args[0]


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
