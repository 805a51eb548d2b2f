"""What the engine is asked for: one prompt, one adapter, how to pick tokens, and where the answer goes."""

from __future__ import annotations

import asyncio
import hashlib
import queue
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from theodora.errors import CheckpointError
    from theodora.serve.adapters import ServedAdapter


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of one answer are picked."""

    max_tokens: int
    temperature: float = 1.0
    """0 picks the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """Likeliest tokens to pick from; 0 stands for all."""
    seed: int = 0
    top_logprobs: int = 0
    """Likeliest tokens whose log-probabilities are given beside those of the picked ones."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answer."""

    @property
    def filters(self) -> bool:
        """Whether only some of the tokens can be picked."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0)

    def chance(self, position: int) -> int:
        """23 random bits for the token at a position: the same for one seed, whatever else is in the batch."""
        digest = hashlib.blake2b(f"{self.seed}:{position}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little") >> 9


class Mailbox:
    """The latest update of each of a few requests, for one reader on their event loop.

    Updates are whole, so that a reader who is slow, or gone, makes nothing pile up.
    """

    def __init__(self) -> None:
        self._latest: dict[str, Any] = {}
        self._arrived = asyncio.Event()

    def put_nowait(self, update: Any) -> None:
        """Replace the request's update."""
        self._latest[update.request_id] = update
        self._arrived.set()

    async def get(self) -> dict[str, Any]:
        """Request id -> update, of those that have a new one; waits for one."""
        await self._arrived.wait()
        self._arrived.clear()
        latest, self._latest = self._latest, {}
        return latest


@dataclass(eq=False)
class Request:
    """One answer under way. Updates arrive in `updates`: transformers' GenerationOutput, whole each time."""

    id: str
    prompt: list[int]
    adapter: ServedAdapter | None
    sampling: Sampling
    every_token: bool = True
    """Whether each new token is an update, or only the end."""
    loop: asyncio.AbstractEventLoop | None = None
    """The event loop that `updates` belongs to; without one it is a queue between threads."""
    updates: Any = None
    slot: int = 0
    problem: CheckpointError | None = None
    """Why it failed, if that is its own affair rather than the worker's."""
    asked: float = field(default_factory=time.monotonic)
    tops: dict[int, tuple[list[int], list[float]]] = field(default_factory=dict)
    """Index of a generated token -> the likeliest tokens at its place, and their log-probabilities."""

    def __post_init__(self) -> None:
        if self.updates is None:
            self.updates = queue.SimpleQueue() if self.loop is None else Mailbox()

    def __deepcopy__(self, memo: Any) -> Request:
        # transformers copies a request's arguments when it makes room and starts it again.
        return self
