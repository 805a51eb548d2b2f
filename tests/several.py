"""Several processes that train together, without a launcher: forked with everything imported, told their places.

All scenarios of a test file run in one launch, one after the other, each joined anew; what each process makes of them
is read afterwards.
"""

import contextlib
import io
import itertools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from crash.killing import fork_server

_SECONDS = 600  # in which any launch ends


@dataclass(frozen=True)
class Scenario:
    """A run, and what is special about it."""

    name: str
    options: Mapping[str, Any]
    of_process: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """What a process has otherwise."""
    environment: Mapping[str, str] = field(default_factory=dict)
    as_on_gpu: bool = False
    dies: tuple[int, int, str] | None = None
    """Process, step, and how: `kill`, `sigterm`, `raise`, or `hang`, which lasts until the others have ended."""
    slow: float = 0.0
    """Seconds that the first process takes to read the data."""
    memory: tuple[int, int] | None = None
    """Process, and how many tokens fit into a pass of it: it fails within the forward pass, the next time within the
    backward pass, and so on."""


def launch(count: int, scenarios: Sequence[Scenario], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Run them, and give what each process made of each: `error`, `text`, `printed`."""
    context, ports = fork_server(), [_free_port() for _ in scenarios]
    found: dict[str, list[dict[str, Any]]] = {}
    processes = [context.Process(target=_act, args=(n, count, scenarios, ports, folder)) for n in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_SECONDS)
        if process.is_alive():
            process.kill()
    for scenario in scenarios:
        files = [folder / f"{scenario.name}-{n}.json" for n in range(count)]
        found[scenario.name] = [json.loads(f.read_text()) if f.exists() else {"error": "no word"} for f in files]
    return found


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _act(index: int, count: int, scenarios: Sequence[Scenario], ports: Sequence[int], folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    for scenario, port in zip(scenarios, ports, strict=True):
        place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()} | dict(scenario.environment))
        with pytest.MonkeyPatch.context() as patch:
            before = time.process_time()
            found = _run(scenario, index, patch, folder)
            found["cpu"] = time.process_time() - before
        for name in scenario.environment:
            del os.environ[name]
        (folder / f"{scenario.name}-{index}.json").write_text(json.dumps(found))


def _run(scenario: Scenario, index: int, patch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    import recorder
    from theodora.config import TrainConfig
    from theodora.train import callbacks, prepare, train, trainer, trainer_loss, trainer_passes
    from undrawn import leave_losses_blank

    leave_losses_blank(patch)
    if scenario.as_on_gpu:
        recorder.install(patch)
        patch.setattr(trainer_loss, "fused_loss_pays", lambda device: True)
        patch.setattr(trainer_passes, "graphs_pay", lambda device: True)
    if scenario.dies is not None and scenario.dies[0] == index:
        patch.setattr(
            sys.modules["theodora.train.run"], "CountUpdates", _dying(callbacks.CountUpdates, scenario, folder)
        )
    if scenario.memory is not None and scenario.memory[0] == index:
        patch.setattr(trainer.AdapterTrainer, "one_pass", _short(trainer.AdapterTrainer.one_pass, scenario.memory[1]))
    if scenario.slow and index == 0:
        patch.setattr(prepare, "read_data", _slow(prepare.read_data, scenario.slow))
    if scenario.name != "plain":
        patch.setattr(sys.modules["theodora.train.run"], "_count_stops", lambda prepared: None)
    made, init = [], trainer.AdapterTrainer.__init__

    def remember(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.append(self)

    patch.setattr(trainer.AdapterTrainer, "__init__", remember)
    options = dict(scenario.options) | dict(scenario.of_process.get(index, {}))
    printed = io.StringIO()
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            config = TrainConfig.from_options(options, granted=["reward"])
            result = train(config, console=Console(file=printed, width=120))
    except BaseException as error:
        return {"error": type(error).__name__, "text": str(error), "printed": printed.getvalue()}
    return {"error": None, "replays": made[0].graph_replays, "printed": printed.getvalue(), **result.to_dict()}


def _slow(plain: Any, seconds: float) -> Any:
    def read(*args: Any) -> Any:
        time.sleep(seconds)
        return plain(*args)

    return read


def _dying(base: Any, scenario: Scenario, folder: Path) -> Any:
    how = scenario.dies
    assert how is not None

    class Dying(base):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == how[1]:
                if how[2] == "raise":
                    raise OSError("the disk is on fire")
                while how[2] == "hang":
                    time.sleep(0.05)
                    if (folder / f"{scenario.name}-0.json").exists():
                        raise OSError("awake again")
                os.kill(os.getpid(), signal.SIGKILL if how[2] == "kill" else signal.SIGTERM)

    return Dying


def _short(plain: Any, tokens: int) -> Any:
    import torch

    times = itertools.count()

    def one_pass(self: Any, inputs: Any, *args: Any) -> Any:
        if inputs["input_ids"].numel() <= tokens:
            return plain(self, inputs, *args)

        def full(*_: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

        layer = self.model.model.layers[-1].self_attn
        hook = (layer.register_forward_hook, layer.register_full_backward_hook)[next(times) % 2](full)
        try:
            return plain(self, inputs, *args)
        finally:
            hook.remove()

    return one_pass
