"""What a file cannot grant: that code of others runs, or that a run is reported to other machines.

Recipes come from strangers. What they ask for counts only if the user says it as well, on the command line or in
Python. The record of a run is such a file, too: the command that resumes the run repeats the flags.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from theodora.errors import ConfigError, bullet_list, shown
from theodora.safe_text import quoted

# Integrations of transformers that write files on this machine alone.
_LOCAL_REPORTS = ("tensorboard", "none", "", None)
_NOTHING = (None, False, "", "false", "none", "null", "no", "off", "0")

# Option -> what granting it means.
_GRANTS = {
    "trust_remote_code": "runs Python code that comes with the model",
    "report_to": "sends what the run logs to another program or machine",
    "push_to_hub": "sends the trained weights and their card to the hub",
    "trackio_space_id": "says to whose space on the hub the run is reported",
    "trackio_bucket_id": "says to whose bucket on the hub the run is reported",
    "trackio_static_space_id": "says to whose space on the hub the run is reported",
    "reward": "runs Python code in the files that it names",
    "deepspeed": "hands over to DeepSpeed's configuration, which may name modules to import and services to report to",
}


def check_granted(options: Mapping[str, Any], granted: Collection[str] = ()) -> None:
    """Refuse options of a training file that only its user can grant.

    Args:
        options: of the run, side by side, as in a YAML file.
        granted: names of those that the user gave by hand.

    Raises:
        ConfigError: naming each, with the flag that would allow it.
    """
    again = " The run began with it, and needs it again to go on." if _asks(options.get("resume")) else ""
    problems = [
        f"{name} is {shown(value)}, which {_GRANTS[name]}. If that is what you want, pass "
        f"{' '.join(_flag(name, value))} (in Python: granted=[{name!r}]).{again}"
        for name, value in _asked(options)
        if name not in granted
    ]
    if problems:
        raise ConfigError(
            "The file asks for what only you can grant, on the command line or in Python:" + bullet_list(problems)
        )


def check_code_granted(scores: Mapping[str, str], allowed: Collection[str]) -> None:
    """Refuse scores of a comparison's file that run Python which its user did not allow.

    Args:
        scores: data set -> its `path/to/file.py:function`.
        allowed: the files that may run.

    Raises:
        ConfigError: naming each, with the flag that would allow it.
    """
    may_run = {_place(file) for file in allowed}
    problems = [
        f"data.{name}: score is {shown(score)}, which runs {file}. If you trust that file, pass --allow-code "
        f"{quoted(file)} (in Python: allow_code=[{file!r}])."
        for name, score in scores.items()
        if _place(file := score.rpartition(":")[0]) not in may_run
    ]
    if problems:
        raise ConfigError(
            "The file asks for what only you can grant, on the command line or in Python:" + bullet_list(problems)
        )


def rewards_not_allowed(rewards: Any, allowed: Collection[str]) -> list[str]:
    """Those of a comparison's rewards that run Python in a file which its user did not allow by name."""
    may_run = {_place(file) for file in allowed}
    given = rewards if isinstance(rewards, list | tuple) else [rewards]
    files = [name for name in given if isinstance(name, str) and names_a_file(name)]
    return [name for name in files if _place(name.rpartition(":")[0]) not in may_run]


def grant_flags(options: Mapping[str, Any]) -> str:
    """The flags that grant again what a run was granted, for the commands that repeat it; with a blank in front."""
    return "".join(f" {word}" for name, value in _asked(options) for word in _flag(name, value))


def _place(file: str) -> str:
    return os.path.realpath(file)


def _asked(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The options that need a grant, wherever they stand."""
    nested = options.get("trainer")
    for name in _GRANTS:
        for place in (options, nested if isinstance(nested, Mapping) else {}):
            if _asks(value := place.get(name)) and not (name in _HARMLESS and _HARMLESS[name](value)):
                yield name, value


def _asks(value: Any) -> bool:
    return (value.strip().lower() if isinstance(value, str) else value) not in _NOTHING and value not in ([], (), {})


def _is_local(value: Any) -> bool:
    names = [name.strip().lower() if isinstance(name, str) else name for name in _names(value)]
    return all(name in _LOCAL_REPORTS for name in names)


def names_a_file(reward: str) -> bool:
    """Whether a reward is a function in a file, rather than one of those that are built in."""
    kind, colon, _ = reward.partition(":")
    return bool(colon) and kind not in ("format", "length")


def _runs_nothing(value: Any) -> bool:
    given = value if isinstance(value, list | tuple) else [value]
    return not any(isinstance(name, str) and names_a_file(name) for name in given)


_HARMLESS: dict[str, Callable[[Any], bool]] = {"report_to": _is_local, "reward": _runs_nothing}
"""Options that some values of need no grant, and which."""


def _names(value: Any) -> Sequence[Any]:
    if isinstance(value, str):
        return value.split(",") if "," in value else value.split()
    return value if isinstance(value, list | tuple) else [value]


def _flag(name: str, value: Any) -> list[str]:
    """The words of the flag that grants an option."""
    flag = "--" + name.replace("_", "-")
    if name == "trust_remote_code":
        return [flag]
    if name == "report_to":
        return [flag, *(quoted(str(word).strip()) for word in _names(value))]
    if name == "reward" and isinstance(value, list | tuple):
        return [flag, *(quoted(str(word)) for word in value)]
    return [flag, quoted(value if isinstance(value, str) else json.dumps(value, default=str))]
