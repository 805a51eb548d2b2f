"""gpt-oss's format: an answer is several messages, each with a channel and perhaps a recipient."""

from __future__ import annotations

from theodora.serve.calls.source import Reader, Source, compiled
from theodora.serve.calls.styles import Offer

MARKERS = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>")
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>")
_HEADER = compiled(
    r"\s*(?:<\|start\|>)?(?:assistant)?(?:\s*to=([\w.\-]{1,256}))?\s*<\|channel\|>\s*(\w{1,64})"
    r"(?:\s*to=([\w.\-]{1,256}))?\s*(?:<\|constrain\|>)?\s*(?:\w{1,64})?\s*<\|message\|>"
)


def read(source: Source, offer: Offer | None) -> Reader:
    """Read messages: analysis is reasoning, a recipient functions.f is a call, all else is text."""
    said = thought = False
    while (yield from source.peek()):
        start = source.at
        header = yield from source.pattern(_HEADER)
        if header is None:
            source.at = start
            yield from _plain(source)
            continue
        recipient, channel = header[1] or header[3] or "", header[2]
        if recipient.startswith("functions.") and offer is not None:
            source.call(recipient.removeprefix("functions."))
            marker = yield from source.bring_until(_ENDS, source.argue)
            source.trim()
        elif channel == "analysis":
            source.trim()
            source.think("\n\n" if thought else "")
            thought = True
            marker = yield from source.bring_until(_ENDS, source.think)
            source.trim()
        else:
            if said:
                source.say("\n\n")
            said = True
            marker = yield from source.bring_until(_ENDS)
        if marker in ("<|start|>", "<|channel|>"):  # the end was forgotten
            source.at -= len(marker)


def _plain(source: Source) -> Reader:
    """What stands outside of messages, from a model that was taught otherwise: as it is."""
    marker = yield from source.literal(*MARKERS)
    if marker is None:
        marker = yield from source.bring_until(("<|start|>", "<|channel|>"))
        if marker is not None:
            source.at -= len(marker)
