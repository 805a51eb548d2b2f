"""Ends of a run that come from outside: Ctrl-C (SIGINT), and preemption (SIGTERM), which is no failure.

Either ends a run after the forward and backward pass at hand, with a checkpoint from which it goes on exactly.
transformers has `enable_jit_checkpoint` for SIGTERM. It is not used here because it waits three seconds first, may save
between a gradient and its step (so that step would be taken twice), leaves a folder that is not whole under its final
name, and lets the run end as if it were complete.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from theodora.train.checkpoints import newest_checkpoint


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during training; the message says how to go on."""

    def __init__(self, message: str = "", exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        """What a command should exit with: 130 after Ctrl-C, 0 after SIGTERM."""


class StepAbandoned(Exception):
    """The optimizer step at hand will not be finished; the state is still that of the step before it."""


_elsewhere: list[StopOnSignal] = []
"""Those of runs that are in no main thread, which no signal reaches."""


def ask_to_stop(number: signal.Signals) -> bool:
    """Tell the runs of this process that are in no main thread of a signal; whether all of them take it."""
    takes = [stop.ask(number) for stop in _elsewhere]
    return bool(takes) and all(takes)


class StopOnSignal(TrainerCallback):
    """Ends the run where it can be resumed exactly. A second Ctrl-C ends it at once.

    Args:
        output: the run's folder.
        grace_period: seconds after SIGTERM at which the process ends in any case, with exit code 143 then.
    """

    def __init__(self, output: Path, grace_period: float) -> None:
        self.output, self.grace_period = output, grace_period
        self.requested: signal.Signals | None = None
        self.in_evaluation = False
        self.agree: Callable[[bool], bool] = lambda stop: stop
        """Whether to stop, given whether this process was told to; several processes have to decide alike."""
        self.alone = True
        """Whether there is one process, which may leave a step in its middle."""
        self._phase = "loading"
        self._stopping = False
        self._process = os.getpid()
        self._watchdog: threading.Timer | None = None

    @property
    def exit_code(self) -> int:
        """What a command should exit with."""
        return 0 if self.requested == signal.SIGTERM else 130

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals inside the block. Only the main thread of a process can."""
        if threading.current_thread() is not threading.main_thread():
            _elsewhere.append(self)
            try:
                yield
            finally:
                _elsewhere.remove(self)
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self._watchdog is not None:
                self._watchdog.cancel()

    def ask(self, number: signal.Signals) -> bool:
        """Tell the run of a signal that another process got; whether it takes it, as it does while it trains."""
        if self._phase == "loading":
            return False
        if self._phase == "training" and self.requested is None:
            self._on_signal(number, None)
        return True

    @contextmanager
    def training(self) -> Iterator[None]:
        """Inside the block a signal is noted, and the run ends where it can be resumed. After it the end is near."""
        self._phase = "training"
        try:
            yield
        finally:
            self._phase = "ending"

    def _on_signal(self, number: int, _: Any) -> None:
        if os.getpid() != self._process:
            # A data loader's worker has inherited this handler. Signals often go to a whole group, and a run needs its
            # workers to get to the end of the step; who really wants to end one asks again.
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
            return
        again, self.requested = self.requested, signal.Signals(number)
        if number == signal.SIGTERM and self._watchdog is None:
            self._watchdog = threading.Timer(self.grace_period, self._give_up)
            self._watchdog.daemon = True
            self._watchdog.start()
        if self._phase == "loading":
            raise TrainingInterrupted("Stopped before training began; nothing was changed.", self.exit_code)
        if number == signal.SIGINT and (again == number or self._phase == "ending"):
            raise KeyboardInterrupt

    def _give_up(self) -> None:
        newest = newest_checkpoint(self.output)
        kept = "no checkpoint was written yet" if newest is None else f"{newest} is whole"
        with contextlib.suppress(OSError):
            if not self.alone:  # it may be the one that the others wait for: where it stands goes into its log
                faulthandler.dump_traceback(2)
            os.write(2, f"SIGTERM: no checkpoint within {self.grace_period:g} s; {kept}.\n".encode())
        os._exit(128 + signal.SIGTERM)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint, and put off an evaluation until the run goes on."""
        if self.agree(self.requested is not None) and state.global_step < state.max_steps:
            self.requested = self.requested or signal.SIGTERM
            self._stopping = control.should_save = True
            control.should_evaluate = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the run. (Not before the checkpoint, which would keep that it has ended.)"""
        if self._stopping or (self.requested and self.alone):
            control.should_training_stop = True

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        """Leave an accumulated step in its middle."""
        if self.requested and self.alone:
            raise StepAbandoned

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Leave the evaluation."""
        if self.requested and self.alone:
            self.in_evaluation = True
            raise StepAbandoned
