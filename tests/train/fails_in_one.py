"""What torchrun starts in test_processes.py: the command `theodora`, of which process 1 fails in its third step."""

import os
import sys
from typing import Any

from theodora.cli.main import main
from theodora.train.callbacks import CountUpdates


def _fail(self: Any, args: Any, state: Any, *_: Any, **__: Any) -> None:
    if state.global_step == 2:
        raise OSError("the disk is on fire")


if os.environ["RANK"] == "1":
    CountUpdates.on_step_begin = _fail
sys.exit(main(sys.argv[1:]))
