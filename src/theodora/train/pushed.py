"""The result of a run, sent to the hub once it is whole."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rich.console import Console

from theodora.config import TrainConfig
from theodora.errors import TheodoraError
from theodora.files.hub import check_place, push_folder
from theodora.safe_text import quoted


def place_note(config: TrainConfig) -> list[str]:
    """Where the result will go, once the hub was asked whether it may.

    Raises:
        TheodoraError: it may not, or the hub does not answer; nothing was loaded yet.
    """
    return [] if config.push_to_hub is None else [f"the result will be pushed to {check_place(config.push_to_hub)}"]


def push_result(config: TrainConfig, console: Console) -> None:
    """Push what a run has left in its folder, if that was asked for.

    Raises:
        TheodoraError: the hub refuses it; the message says how to push the folder by itself.
    """
    if config.push_to_hub is None:
        return
    say = partial(console.print, markup=False, soft_wrap=True)
    try:
        say(f"Pushed: {push_folder(Path(config.output), check_place(config.push_to_hub), say).url}")
    except TheodoraError as error:
        again = f"theodora push {quoted(config.output)} {quoted(config.push_to_hub)}"
        raise type(error)(f"{error}\nThe run is whole in {config.output}. To push it: {again}") from error
