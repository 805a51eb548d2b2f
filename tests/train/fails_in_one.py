"""What a launcher starts in test_processes.py: the command `theodora`, of which process 1 fails in its third step.

For real: `torchrun --nproc-per-node 2 tests/train/fails_in_one.py train --config FILE`.
"""

import os
import sys
from typing import Any


def start(words: list[str]) -> None:
    """Run the command, and end the process as it would."""
    from theodora.cli.main import main
    from theodora.train.callbacks import CountUpdates

    if os.environ["RANK"] == "1":
        CountUpdates.on_step_begin = _fail
    sys.exit(main(words))


def _fail(self: Any, args: Any, state: Any, *_: Any, **__: Any) -> None:
    if state.global_step == 2:
        raise OSError("the disk is on fire")


if __name__ == "__main__":
    start(sys.argv[1:])
