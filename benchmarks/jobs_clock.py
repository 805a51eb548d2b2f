"""Run a Python program and note when its training steps begin and end: the same clock for our command and its peers.

    python benchmarks/jobs_clock.py times.json -m theodora train --model ... --data ...
    python benchmarks/jobs_clock.py times.json benchmarks/jobs_peer.py --method dora ...

The file has wall-clock seconds: `steps`, a pair for each optimizer step as the host sees it; the first and the last end
after waiting for the GPU.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    output, *program = sys.argv[1:]
    steps: list[list[float]] = []
    atexit.register(lambda: Path(output).write_text(json.dumps({"steps": steps}), encoding="utf-8"))
    sys.meta_path.insert(0, _WhenImported(steps))  # pyright: ignore[reportArgumentType]
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        sys.path.insert(0, str(Path(program[0]).parent))
        runpy.run_path(program[0], run_name="__main__")


class _WhenImported:
    """Puts the clock into transformers' callbacks once the program imports them: importing them here would change what
    is measured."""

    def __init__(self, steps: list[list[float]]) -> None:
        self._steps = steps

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "transformers.trainer_callback":
            return None
        sys.meta_path.remove(self)  # pyright: ignore[reportArgumentType]
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            _put_clock_into(module.CallbackHandler, self._steps)

        spec.loader.exec_module = exec_module  # pyright: ignore[reportAttributeAccessIssue]
        return spec


def _put_clock_into(handler: Any, steps: list[list[float]]) -> None:
    begin, end = handler.on_step_begin, handler.on_step_end

    def on_step_begin(self: Any, *args: Any) -> Any:
        steps.append([time.time(), 0.0])
        return begin(self, *args)

    def on_step_end(self: Any, args: Any, state: Any, control: Any) -> Any:
        if len(steps) == 1 or state.global_step >= state.max_steps:
            _wait_for_the_gpu()
        steps[-1][1] = time.time()
        return end(self, args, state, control)

    handler.on_step_begin, handler.on_step_end = on_step_begin, on_step_end


def _wait_for_the_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
