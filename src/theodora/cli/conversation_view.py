"""Answers on the terminal: two columns if it is wide, one above the other if it is narrow, plain text in a pipe."""

from __future__ import annotations

from functools import partial

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from theodora.cli.conversation import Answer, Conversation

_WIDE = 100  # characters; below, a column of half of them is tiring to read
_STYLES = {"base": "cyan", "adapted": "green"}


def show_answers(console: Console, conversation: Conversation, question: str) -> None:
    """Ask every speaker, one after the other, and show the answers as they grow."""
    if not console.is_terminal:
        for speaker in conversation.speakers:
            answer = conversation.ask(speaker, question, show=lambda _: None)
            console.print(f"{speaker}: {answer.text.strip()}", markup=False, soft_wrap=True)
        return
    answers = {speaker: Answer() for speaker in conversation.speakers}
    with Live(view(answers, console.width), console=console, refresh_per_second=12) as live:

        def show(speaker: str, answer: Answer) -> None:
            answers[speaker] = answer
            live.update(view(answers, console.width))

        for speaker in conversation.speakers:
            conversation.ask(speaker, question, partial(show, speaker))


def view(answers: dict[str, Answer], width: int) -> RenderableType:
    """What stands on the terminal at one moment."""
    panels = [_panel(speaker, answer) for speaker, answer in answers.items()]
    # The cursor rests on an empty last line: the terminal's echo of Ctrl-C would wrap at the end of a full one.
    cursor_line = Text("")
    if width < _WIDE:
        return Group(*panels, cursor_line)
    columns = Table.grid(expand=True)
    for _ in panels:
        columns.add_column(ratio=1)
    columns.add_row(*panels)
    return Group(columns, cursor_line)


def _panel(speaker: str, answer: Answer) -> Panel:
    cursor = "" if answer.finished else "▌"
    return Panel(
        Text(answer.text.strip() + cursor),
        title=Text(speaker, style=f"bold {_STYLES[speaker]}"),
        title_align="left",
        subtitle=Text(_remarks(answer), style="dim"),
        subtitle_align="right",
        border_style=_STYLES[speaker],
    )


def _remarks(answer: Answer) -> str:
    remarks = [f"{answer.tokens} tokens, {answer.tokens / answer.seconds:.0f} a second"] if answer.tokens else []
    remarks += ["stopped"] * answer.stopped
    remarks += ["the oldest turns were left out"] * answer.forgot
    return " · ".join(remarks)
