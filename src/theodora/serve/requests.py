"""What the engine is asked for: one prompt, one adapter, how to pick tokens, and where the answer goes."""

from __future__ import annotations

import asyncio
import hashlib
import queue
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from theodora.errors import TheodoraError
    from theodora.serve.adapters import ServedAdapter
    from theodora.serve.shaping import Shaper


class GrammarState(Protocol):
    """How far one answer has come in its grammar. Used on the worker's thread only."""

    def mask(self, logits_V: Tensor) -> None:
        """Put -inf, in place, where a token cannot come next. The logits are one row of a batch, on its device."""
        ...

    def accept(self, token: int) -> None:
        """Go on with the token that was picked, which may be one that ends the answer."""
        ...


class Grammar(Protocol):
    """The form that an answer must have; shared by the answers of a request (n, several prompts)."""

    def start(self) -> GrammarState:
        """The state of an answer without any token. Called again where transformers runs a request anew."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of one answer are picked."""

    max_tokens: int
    temperature: float = 1.0
    """0 picks the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """Likeliest tokens to pick from; 0 stands for all."""
    min_p: float = 0.0
    """Least chance of a token that can be picked, as a share of the likeliest one's."""
    seed: int = 0
    top_logprobs: int = 0
    """Likeliest tokens whose log-probabilities are given beside those of the picked ones."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answer."""
    min_tokens: int = 0
    """Tokens before one of `stop_ids` can be picked."""
    prompt_logprobs: int | None = None
    """Likeliest tokens at each place of the prompt whose log-probabilities are given beside the prompt's own."""

    presence_penalty: float = 0.0
    """Taken off the logit of each token that was generated."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token for each time that it was generated."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that were generated or stand in the prompt, and multiplies the others."""
    bias: tuple[tuple[int, float], ...] = ()
    """Tokens and what is added to their logits."""
    allowed: tuple[int, ...] | None = None
    """The only tokens that can be picked."""
    banned: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that are not generated."""
    grammar: Grammar | None = None

    @property
    def filters(self) -> bool:
        """Whether only some of the tokens can be picked."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)

    @property
    def penalises(self) -> bool:
        """Whether it matters which tokens there were."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def shapes(self) -> bool:
        """Whether logits are changed before a token is picked."""
        others = self.bias or self.banned or self.allowed is not None or self.grammar is not None
        return bool(others) or self.penalises or (self.min_tokens > 0 and bool(self.stop_ids))

    def chance(self, position: int) -> int:
        """23 random bits for the token at a position: the same for one seed, whatever else is in the batch."""
        digest = hashlib.blake2b(f"{self.seed}:{position}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little") >> 9


@dataclass(frozen=True)
class Score:
    """How likely one token of a prompt is."""

    logprob: float
    rank: int
    """1 for the likeliest."""
    tops: tuple[list[int], list[float]]
    """The likeliest tokens at its place, and their log-probabilities."""


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
    shaper: Shaper | None = None
    """What changes its logits; made by the worker."""
    problem: TheodoraError | None = None
    """Why it failed, if that is its own affair rather than the worker's."""
    not_finite: bool = False
    """Whether a log-probability of its prompt is no number."""
    asked: float = field(default_factory=time.monotonic)
    tops: dict[int, tuple[list[int], list[float]]] = field(default_factory=dict)
    """Index of a generated token -> the likeliest tokens at its place, and their log-probabilities."""
    scores: list[Score | None] = field(default_factory=list)
    """Of the prompt's tokens, if they are asked for; none for the first, which follows nothing."""

    def __post_init__(self) -> None:
        if self.updates is None:
            self.updates = queue.SimpleQueue() if self.loop is None else Mailbox()

    def __deepcopy__(self, memo: Any) -> Request:
        # transformers copies a request's arguments when it makes room and starts it again.
        return self
