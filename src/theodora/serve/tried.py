"""Whether a model can be run in one of the ways to answer together: found out once as it is built, and kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from theodora.adapters.conditions import conditions, construction, hash_of_weights
from theodora.kept import kept as kept_on_disk
from theodora.serve.offline_manager import NoRoom, Unfit, as_when_answering
from theodora.serve.trial import Trial
from theodora.serve.window import window_of_model


@dataclass(frozen=True)
class Way:
    """One of the ways, and what is known of the models that were tried in it."""

    name: str
    """Of what is kept on disk."""
    title: str
    """What it is called where a model does not fit it."""
    answer: Callable[[Any, Trial], list[tuple[list[int], list[float]]]]
    """Greedy answers to the prompts of a trial, and their log-probabilities."""
    verdicts: WeakKeyDictionary[Any, tuple[tuple[Any, ...], str | None]] = field(
        default_factory=WeakKeyDictionary[Any, tuple[tuple[Any, ...], "str | None"]]
    )
    """Model -> how it was tried, and why it is unfit."""

    def try_out(self, model: Any) -> None:
        """Try the model out, unless it has been.

        Raises:
            Unfit: it fails, or says something else together than alone.
        """
        now = how(model)
        known = self.verdicts.get(model)
        if known is None or known[0] != now:
            known = self.verdicts[model] = (now, _verdict(model, self))
        if known[1] is not None:
            raise Unfit(known[1])

    def failed(self, model: Any, error: RuntimeError) -> Unfit:
        """What to raise where a model that was fit has failed; it is not tried again as it is."""
        self.verdicts[model] = how(model), str(error)
        return Unfit(f"{self.title} failed: {error}")


def how(model: Any) -> tuple[Any, ...]:
    """How a model is built and run, as far as it matters whether it fits."""
    kind = model.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return model.dtype, model.device, cast, model.config._attn_implementation, construction(model)


def _verdict(model: Any, way: Way) -> str | None:
    """`_why_unfit`; that nothing speaks against a model is kept for the next start with the very same one."""
    # What is stored in a byte is no part of its hash.
    plain = all(p.is_floating_point() and p.element_size() > 1 and not p.is_meta for p in model.parameters())
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        known = conditions(model, hash_of_weights(model)) if plain else None
        if known is None:
            return _why_unfit(model, way)
        return kept_on_disk(way.name, known, lambda: _why_unfit(model, way), lambda why: why is None)


def _why_unfit(model: Any, way: Way) -> str | None:
    window = window_of_model(model)
    if window is not None and window < 2:
        return "its window is too short to try it out"
    try:
        with as_when_answering(model):
            trial = Trial.of(model, window or 1 << 30)
        if not trial.finite:
            return "its output is not finite"
        answers = way.answer(model, trial)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise NoRoom(f"memory does not do: {error}") from error
    except Unfit:  # because of its settings, which may change
        raise
    except Exception as error:  # whatever a layer raises that takes no such keys and values
        return f"{way.title} do not take it ({error})"
    if not (distance := trial.distance(answers)) <= trial.bound:
        return f"log-probabilities are off by {distance:.2g} in {way.title}"
    return None
