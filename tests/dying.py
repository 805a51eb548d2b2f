"""Work that ends in its midst, as by `kill -9`, in a process of the fork server (`crash.killing.fork_server`)."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crash.killing import fork_server


def died(work: Callable[..., None], *arguments: Any) -> bool:
    """Whether `work`, a function of this file, was killed."""
    process = fork_server().Process(target=work, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode == -signal.SIGKILL


def command(words: list[str], errors: Path) -> None:
    """`theodora words`, as a process of its own, until somebody stops it."""
    from theodora.cli.main import main

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    sys.argv[1:] = words
    main()


def studio_run(words: list[str], log: Path, folder: str) -> None:
    """What `studio.processes.begin` starts: a command in a session of its own that speaks into a log."""
    from theodora.cli.main import main

    os.setsid()
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.argv[1:] = words
    main()


def compare(options: dict[str, Any]) -> None:
    """Killed before the third record is written."""
    from theodora.compare import CompareConfig
    from theodora.compare import compare as whole
    from theodora.compare.store import Store

    add, count = Store.add, 0

    def add_two(self: Store, record: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            _die()
        add(self, record)

    Store.add = add_two
    whole(CompareConfig.from_options(options))


def merge(adapter: Path, output: Path, keys: int) -> None:
    """Killed after so many tensors."""
    from theodora.merging import merge_checkpoint

    seen: list[str] = []

    def watch(done: int, total: int, key: str) -> None:
        seen.append(key)
        if len(seen) == keys:
            _die()

    merge_checkpoint(adapter, output, max_shard_size=17_500_000, progress=watch)


def export(adapter: Path, output: Path) -> None:
    """Killed between the merged model and the GGUF file."""
    import theodora.export.exporting as module

    module.write_gguf = lambda *_, **__: _die()
    module.export_adapter(adapter, output, "gguf", check=False)


def rewards_that_hang(file: Path, stuck: bool, errors: Path) -> None:
    """The first function never returns, and lets others run; the second does not even that."""
    from theodora.errors import DataError
    from theodora.train import rewards

    rewards._GRACE = 0.2
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    own = rewards.Rewards([f"{file}:{'stuck' if stuck else 'waits'}"], timeout=0.05)
    try:
        own(["Q"], ["A"], {}, [[1]])
    except DataError as error:
        os.write(2, str(error).encode())
        sys.exit(7)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
