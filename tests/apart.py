"""How much memory something takes, measured in a process of its own, forked with everything imported."""

import re
import resource
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from crash.killing import fork_server


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work`, a function of this file, gives in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=fork_server()) as pool:
        return pool.submit(work, *arguments).result(timeout=3000)


def merging_grows(small: tuple[Path, Path], large: tuple[Path, Path], max_shard_size: int) -> int:
    """By how many bytes the peak of memory rises from merging one adapter into its folder to merging the other."""
    from theodora.merging import merge_checkpoint

    merge_checkpoint(*small)  # whatever is imported or allocated once
    before = _peak()
    merge_checkpoint(*large, max_shard_size=max_shard_size)
    return _peak() - before


def reading_grows(path: Path, tokenise: bool) -> int:
    """By how many MB the process's own memory (not the files mapped into it) grows as a file is read and split."""
    import tiny
    from theodora.data import load_examples, split_examples, tokenize

    tokenizer = tiny.tiny_tokenizer()
    tokenizer("warm")
    peak = before = _own()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, _own())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        examples = load_examples(str(path))
        training, held_out = split_examples(examples, 0.05, 0)
        if tokenise:
            tokenize(held_out, tokenizer, max_length=512)
        assert len(training) + len(held_out) == len(examples)
    finally:
        done.set()
        watcher.join()
    return round(peak - before)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _own() -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024  # pyright: ignore[reportOptionalSubscript]
