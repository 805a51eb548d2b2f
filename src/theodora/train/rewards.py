"""What GRPO rewards: built-in scores of an answer, and functions of the user's own, with weights.

A reward is named as on the command line: `exact_match`, `token_f1`, `format:REGEX`, `length:TOKENS`, the folder of a
reward model (`scorers.py`), or `path/to/file.py:function`. Such a function is one of two kinds, told apart by the names
of its parameters:

    def f(completions, prompts, **columns) -> list[float]     TRL's: a batch at once; takes what it names
    def f(answer, reference) -> float                         as `evaluate --metric` has it: an answer at a time

Functions run in a thread that is waited for so long and no longer, and that keeps no process from ending.
"""

from __future__ import annotations

import asyncio
import faulthandler
import inspect
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import regex
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from theodora.adapters.models import best_device
from theodora.autocast import computes_in_bf16
from theodora.config import TrainConfig
from theodora.data import PromptRows
from theodora.data.formats import TOOLS
from theodora.data.messages import Message, assistant
from theodora.data.notes import spelling
from theodora.data.prompt_layouts import REFERENCES, reference_text
from theodora.data.prompt_rows import REFERENCE
from theodora.errors import ConfigError, DataError, TheodoraError, bullet_list, shown
from theodora.evaluate.metrics import Metric, load_functions, same_text, score_of, token_f1
from theodora.paths import why_not
from theodora.train.scorers import Scorer, is_model_folder
from theodora.trust import names_a_file

KNOWN = "exact_match, token_f1, format:REGEX, length:TOKENS, the folder of a reward model, or path/to/file.py:function"
_METRICS: dict[str, Metric] = {"exact_match": same_text, "token_f1": token_f1}
_TRIED = 8
"""Rows whose references functions are tried on before anything is loaded."""
_SHOWN = 60
"""Characters of a prompt or completion in a message."""
_GRACE = 10.0
"""Seconds beyond its own after which a function that lets nothing else run (a regular expression that searches for
years holds Python's lock) is ended with its process."""
_OF_BATCH = ("prompts", "completions", "completion_ids", "trainer_state")
"""What functions of TRL's kind may take beside columns."""
_OF_TRAINER = ("log_extra", "log_metric", "environments")
"""What TRL's trainer gives as well, and this one does not."""

Prompt = str | list[Message]


@dataclass(frozen=True)
class _Batch:
    """Completions to reward, C of them, with what belongs to each."""

    prompts: list[Prompt]
    texts: list[str]
    columns: dict[str, list[Any]]
    ids: list[list[int]]
    state: TrainerState | None

    def completions(self) -> list[Any]:
        """Texts, or messages where the prompt is messages, as TRL has it."""
        return [
            text if isinstance(prompt, str) else [assistant(text)]
            for prompt, text in zip(self.prompts, self.texts, strict=True)
        ]

    def at(self, number: int) -> str:
        """A completion for people."""
        prompt = self.prompts[number]
        asked = prompt if isinstance(prompt, str) else str(prompt[-1].get("content") or "")
        return f"(prompt {_cut(asked)}, completion {_cut(self.texts[number])})"


@dataclass(frozen=True)
class _Reward:
    where: str
    """As the user calls it."""
    name: str
    """In figures."""
    call: Callable[[_Batch], Any]
    """All rewards of a batch, which are still to be checked."""
    needs: tuple[str, ...] = ()
    """Columns it cannot do without."""
    compares: bool = False
    """Whether every row has to have a reference."""
    in_file: bool = False
    """Whether it is the user's, who knows how long it takes."""


class Rewards:
    """Functions that give numbers to completions.

    Example:
        `Rewards(["exact_match", "rewards.py:brief"], weights=[1.0, 0.2])`

    Args:
        rewards: what they are called (`KNOWN`). Files are run.
        weights: of each in their sum. Default: 1 each.
        timeout: seconds that each function may take for a batch.
        device: where reward models are put. Default: the accelerator.
        dtype: of their weights.
        policy: the run, whose frozen weights reward models share where they can.

    Raises:
        ConfigError: naming every one that is no reward.
    """

    def __init__(
        self,
        rewards: Sequence[str],
        weights: Sequence[float] = (),
        timeout: float = 60.0,
        device: torch.device | None = None,
        dtype: str = "auto",
        policy: TrainConfig | None = None,
    ) -> None:
        if weights and len(weights) != len(rewards):
            raise ConfigError(f"reward_weights holds {len(weights)} numbers for {len(rewards)} rewards")
        self.timeout = timeout
        self.weights = torch.tensor(list(weights) or [1.0] * len(rewards), dtype=torch.float64)
        """(functions,), float64."""
        self.scorers = {
            name: Scorer(name, device, dtype, policy) for name in dict.fromkeys(rewards) if is_model_folder(name)
        }
        """Reward models, by the folders that name them."""
        self._rewards = _read(rewards, timeout, self.scorers)
        self.names = _unique([reward.name for reward in self._rewards])
        """Of the functions, no two alike: rewards/NAME in figures."""

    @property
    def judges(self) -> dict[str, str]:
        """The hashes of reward models, by the folders that name them."""
        return {name: scorer.sha256 for name, scorer in self.scorers.items()}

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        columns: dict[str, list[Any]],
        completion_ids: Sequence[Sequence[int]],
        trainer_state: TrainerState | None = None,
    ) -> Tensor:
        """The rewards of completions, (completions, functions), float32, on the CPU.

        Args:
            prompts: of each completion, as `PromptRows` gives them.
            completions: their texts. Functions get them as messages where the prompt is messages.
            columns: name -> a value for each completion, as `PromptRows` gives them.
            completion_ids: tokens of each completion.
            trainer_state: for functions that take it.

        Raises:
            DataError: a function raises, takes too long, or gives something else than a finite number for each.
        """
        ids = [list(tokens) for tokens in completion_ids]
        batch = _Batch(list(prompts), list(completions), columns, ids, trainer_state)
        return torch.stack([self._numbers(reward, batch) for reward in self._rewards], dim=1)

    def place(self, policy: PreTrainedModel) -> list[str]:
        """Let reward models score on the policy's frozen weights, which have to be where they stay; what there is to
        say of each."""
        for scorer in self.scorers.values():
            scorer.place(policy)
        return [scorer.note for scorer in self.scorers.values()]

    def check(self, rows: PromptRows, tokenizer: PreTrainedTokenizerBase) -> None:
        """Try the functions on the first rows, with the rows' own references as completions (or empty ones).

        Args:
            rows: that completions will be drawn for.
            tokenizer: gives the references' tokens.

        Raises:
            DataError: rows lack what a function needs, or it fails on them.
        """
        problems = list(self._misses(rows))
        if problems:
            raise DataError(f"{rows.source} does not fit the rewards:" + bullet_list(problems))
        tried = range(min(_TRIED, len(rows)))
        if not tried:
            return
        prompts, columns = rows(tried)
        texts = rows.references(tried)
        end = tokenizer.eos_token_id or 0  # no completion is without a token
        ids: Any = [[*own, end] for own in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
        try:
            self(prompts, texts, columns, ids, TrainerState())
        except DataError as error:
            raise DataError(
                f"{error}\nThis was a try before training, on the first rows of {rows.source} with their own "
                "references as completions (empty where there is none)."
            ) from error

    def _misses(self, rows: PromptRows) -> Iterator[str]:
        taken = [name for name in rows.names if name in _OF_BATCH]
        if taken and any(reward.in_file and not reward.compares for reward in self._rewards):
            yield f"there is a column {taken[0]!r}, which is what functions call something of the model's; rename it"
        for reward in self._rewards:
            missing = [name for name in reward.needs if name not in rows.names]
            if missing:
                there = ", ".join(rows.names)
                yield f"{reward.where} needs {' and '.join(map(repr, missing))}; the rows have {there}"
            if reward.compares and rows.unanswered:
                lacking = f"{len(rows.unanswered):,} of {len(rows):,} rows"
                yield (
                    f"{reward.where} compares answers with a reference, which {lacking} do not have (the first: row "
                    f"{rows.unanswered[0] + 1}). Looked for: {', '.join(REFERENCES)}, or a last turn of the model's"
                )

    def _numbers(self, reward: _Reward, batch: _Batch) -> Tensor:
        """What a function gives, checked, (completions,)."""
        count, said = len(batch.texts), f"The reward {reward.where}"
        work = partial(reward.call, batch)
        given = _within(self.timeout, work, reward.where, count) if reward.in_file else work()
        values = given.tolist() if hasattr(given, "tolist") else given
        if not isinstance(values, list | tuple):
            raise DataError(f"{said} gave {shown(given)} for {count} completions; expected a list of as many numbers")
        if len(values) != count:
            raise DataError(f"{said} gave {len(values)} values for {count} completions; expected one for each")
        numbers = torch.tensor([_number(value) for value in values], dtype=torch.float64).float()
        wrong = (~numbers.isfinite()).nonzero().flatten().tolist()
        if wrong:
            value, more = values[wrong[0]], f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            none = ". Where it does not apply it gives 0, which is what None adds in TRL" if value is None else ""
            raise DataError(
                f"{said} gave {shown(value)} for completion {wrong[0] + 1} of {count}{more} {batch.at(wrong[0])}; "
                f"expected a finite number{none}"
            )
        return numbers


def rewards_of(config: TrainConfig, device: torch.device | None = None) -> Rewards | None:
    """The rewards of a run; None where its objective has none. Reward models are put on `device`, by default the
    accelerator."""
    if config.objective != "grpo":
        return None
    bf16 = computes_in_bf16(device or best_device()) if config.bf16 is None else config.bf16
    dtype = "bfloat16" if bf16 else "float32"
    return Rewards(config.reward, config.reward_weights, config.reward_timeout, device, dtype, config)


# What a name stands for


def _read(names: Sequence[str], timeout: float, scorers: Mapping[str, Scorer]) -> list[_Reward]:
    files = [name for name in names if names_a_file(name) and name not in scorers]
    functions = dict(zip(files, load_functions(files, f"reward ({KNOWN})"), strict=True))
    problems: list[str] = []
    found: list[_Reward] = []
    for name in names:
        try:
            if name in scorers:
                found.append(_Reward(name, Path(name).resolve().name, partial(_scored, scorers[name])))
            else:
                found.append(_own(name, functions[name]) if name in functions else _built_in(name, timeout))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("The rewards make no sense:" + bullet_list(problems))
    return found


def _built_in(name: str, timeout: float) -> _Reward:
    kind, _, rest = name.partition(":")
    if name in _METRICS:
        return _Reward(name, name, partial(_each, _METRICS[name], name), compares=True)
    if kind == "format" and rest:
        return _Reward(name, kind, partial(_format, _expression(rest), timeout))
    if kind == "length" and rest.isdecimal() and int(rest) > 0:
        return _Reward(name, kind, partial(_length, int(rest)))
    if kind == "length":
        raise ConfigError(f"{shown(name)}: expected length:TOKENS, a whole number of at least 1")
    raise ConfigError(f"{shown(name)} is no reward; expected {KNOWN}")


def _own(where: str, function: Callable[..., Any]) -> _Reward:
    """A function of the user's, by the names of its parameters."""
    name = where.rpartition(":")[2]
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} does not say which parameters it takes ({error})") from error
    named = {key: p for key, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    needed = [key for key, p in named.items() if p.default is p.empty]
    if needed == ["answer", "reference"]:
        if inspect.iscoroutinefunction(function):
            raise ConfigError(f"{where} is async; expected a plain function of an answer and its reference")
        return _Reward(where, name, partial(_each, function, where), compares=True, in_file=True)
    takes = f"{where} takes ({', '.join(map(str, parameters.values()))})"
    if not takes_all and not {"prompts", "completions", "completion_ids"} & named.keys():
        raise ConfigError(
            f"{takes}; expected completions (and prompts, completion_ids, columns of the rows, as TRL's functions), or "
            "answer, reference (as evaluate's metrics)"
        )
    positional = [key for key, p in named.items() if p.kind is p.POSITIONAL_ONLY]
    if positional:
        raise ConfigError(f"{takes}; expected no / in it: what it is given is given by name")
    absent = [key for key in needed if key in _OF_TRAINER]
    if absent:
        raise ConfigError(f"{takes}; there is no {absent[0]} here: give it a default of None")
    needs = tuple(key for key in needed if key not in _OF_BATCH)
    return _Reward(where, name, partial(_batch_at_once, function, frozenset(named), takes_all), needs, in_file=True)


def _expression(pattern: str) -> Any:
    if problem := why_not(pattern):
        raise ConfigError(f"format:{shown(pattern)} {problem}")
    try:
        return regex.compile(pattern, regex.VERSION0 | regex.DOTALL)
    except (regex.error, OverflowError, RecursionError, MemoryError) as error:
        raise ConfigError(f"format:{shown(pattern)} is no regular expression ({error})") from error


def _unique(names: list[str]) -> list[str]:
    """The names, with a number behind those that are there already."""
    found: list[str] = []
    for name in names:
        numbered = (name if n == 1 else f"{name}_{n}" for n in range(1, len(names) + 2))
        found.append(next(each for each in numbered if each not in found))
    return found


# How each is computed


def _scored(scorer: Scorer, batch: _Batch) -> list[float]:
    """The scores of a reward model, which reads prompt and completion."""
    tools = next((values for name, values in batch.columns.items() if spelling(name) in TOOLS), ())
    return scorer(batch.prompts, batch.texts, tools).tolist()


def _format(expression: Any, timeout: float, batch: _Batch) -> list[float]:
    """1 for completions that the expression matches as a whole, blanks around them apart, else 0."""
    ends = time.monotonic() + timeout
    found: list[float] = []
    for number, text in enumerate(batch.texts):
        try:
            left = max(ends - time.monotonic(), 1e-3)
            found.append(float(expression.fullmatch(text.strip(), timeout=left) is not None))
        except TimeoutError as error:
            raise DataError(
                f"The reward format:{shown(expression.pattern)} takes more than {timeout:g} s (reward_timeout), at "
                f"completion {number + 1} {batch.at(number)}; expected an expression without nested repetitions"
            ) from error
    return found


def _length(most: int, batch: _Batch) -> list[float]:
    """1 up to `most` tokens, the one that ends a completion included; from there down to 0 at twice as many."""
    return [min(1.0, max(0.0, 2 - len(ids) / most)) for ids in batch.ids]


def _each(metric: Metric, name: str, batch: _Batch) -> list[float]:
    """A metric of each completion and its row's reference."""
    found: list[float] = []
    for number, (text, value) in enumerate(zip(batch.texts, batch.columns[REFERENCE], strict=True), start=1):
        reference = reference_text(value)
        if reference is None:
            raise DataError(f"The reward {name} has nothing to compare completion {number} with {batch.at(number - 1)}")
        found.append(score_of(metric, name, number, text, reference))
    return found


def _batch_at_once(function: Callable[..., Any], named: frozenset[str], takes_all: bool, batch: _Batch) -> Any:
    """What a function of TRL's kind gives, which is given what it names, or everything."""
    given: dict[str, Any] = {
        # (lists of its own: what it does to them is nothing to the next)
        **{name: list(values) for name, values in batch.columns.items()},
        "prompts": list(batch.prompts),
        "completions": batch.completions(),
        "completion_ids": [list(ids) for ids in batch.ids],
        "trainer_state": batch.state,
    }
    result = function(**(given if takes_all else {name: value for name, value in given.items() if name in named}))
    return asyncio.run(_awaited(result)) if inspect.iscoroutine(result) else result


async def _awaited(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return await coroutine


def _number(value: Any) -> float:
    """A number, or NaN for what is none: text is not, although Python would read it."""
    if value is None or isinstance(value, str | bytes):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


# Waiting


def _within(seconds: float, work: Callable[[], Any], where: str, count: int) -> Any:
    """What a reward's `work` returns, for so many completions.

    Raises:
        DataError: it raises, or has not returned in time; its thread goes on, and ends with the process.
    """
    outcome: list[tuple[Any, BaseException | None]] = []
    device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None

    def run() -> None:
        try:
            if device is not None:  # each thread has its own, at first the first
                torch.accelerator.set_device_index(device)
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, name="theodora-reward", daemon=True)
    with _ended_if_stuck(seconds + _GRACE):
        thread.start()
        thread.join(seconds)
    if not outcome:
        frame = sys._current_frames().get(thread.ident or 0)  # pyright: ignore[reportPrivateUsage] (it is documented)
        place = "" if frame is None else _line_in(where, traceback.extract_stack(frame))
        raise DataError(
            f"The reward {where} has not returned after {seconds:g} s, for {count} completions{place}. Raise "
            "reward_timeout if it needs more, and give whatever it waits for a limit of its own."
        )
    result, error = outcome[0]
    if isinstance(error, TheodoraError):
        raise error
    if error is not None:
        place = _line_in(where, traceback.extract_tb(error.__traceback__))
        raise DataError(
            f"The reward {where} fails for {count} completions: {type(error).__name__}: {error}{place}"
        ) from error
    return result


@contextmanager
def _ended_if_stuck(seconds: float) -> Iterator[None]:
    """After so long the process ends and writes where it was, unless the block has: without Python's lock, which the
    thread that is waited for may hold, nothing else can be done."""
    watched = False
    with suppress(AttributeError, OSError, RuntimeError, ValueError):  # no standard error that is a file
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)
        watched = True
    try:
        yield
    finally:
        if watched:
            faulthandler.cancel_dump_traceback_later()


def _line_in(where: str, stack: traceback.StackSummary) -> str:
    """The innermost line of the user's file that was at work."""
    file = Path(where.rpartition(":")[0]).resolve()
    lines = [f" (line {frame.lineno}: {frame.line})" for frame in stack if Path(frame.filename).resolve() == file]
    return lines[-1] if lines else ""


def _cut(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")
