"""Pushing a folder to the Hugging Face hub: what of it belongs there, and whether it may be sent, known beforehand.

What is sent is a list of names that is written down here, not all that lies in a folder: weights, their configuration,
the tokenizer and the model card; never checkpoints, rows of data, logs, or what somebody else put there. A repository
that is made is private unless it is asked to be public, and one that exists keeps what it is.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theodora.errors import CheckpointError, ConfigError, TheodoraError, UsageError, shown
from theodora.files import run_files
from theodora.files.distrust import read_object
from theodora.files.generation import GENERATION_CONFIG, TOKENIZER_FILES
from theodora.files.names import CONFIG_NAME, MLX_WEIGHTS_NAME, WEIGHTS_NAME

_ADAPTER = (CONFIG_NAME, WEIGHTS_NAME, MLX_WEIGHTS_NAME)
_MODEL = (*run_files.MODEL_FILES, "model-*-of-*.safetensors")
_BESIDE = (GENERATION_CONFIG, *TOKENIZER_FILES, run_files.CARD_FILE, run_files.FIGURE_FILE, run_files.CONFIG_FILE)
_READ_ONLY = "read"
"""The role of a token that may not write."""


@dataclass(frozen=True, kw_only=True)
class HubPlace:
    """A repository that may be written to."""

    name: str
    """With its owner: `owner/name`."""
    exists: bool
    private: bool
    """Whether it is, or will be once it is made."""
    revision: str | None
    """The branch; None for the main one."""

    def __str__(self) -> str:
        branch = f" at {self.revision}" if self.revision else ""
        return f"{self.name}{branch} ({'private' if self.private else 'public'}{'' if self.exists else ', new'})"


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What was sent, and where it is."""

    place: HubPlace
    files: tuple[str, ...]
    url: str
    """Of the commit."""


def files_to_push(folder: Path) -> list[Path]:
    """The files of an adapter's, a model's or a run's folder that belong on the hub, by name.

    Raises:
        UsageError: there is neither an adapter nor a model.
    """
    weights = [name for name in _ADAPTER if (folder / name).is_file()]
    patterns = (*(_ADAPTER if weights else _MODEL), *_BESIDE)
    if not weights and not ((folder / _MODEL[0]).is_file() and any(folder.glob("model*.safetensors"))):
        raise UsageError(
            f"{folder} holds neither an adapter ({CONFIG_NAME}, {WEIGHTS_NAME}) nor a model ({', '.join(_MODEL[:2])}); "
            "expected the output folder of a run, or of merge or export."
        )
    found = {file for pattern in patterns for file in folder.glob(pattern)}
    if not weights and read_object(folder / _MODEL[0]).get("auto_map"):  # code that the model does not load without
        found |= set(folder.glob("*.py"))
    # (A link may lead to anything.)
    return sorted(file for file in found if file.is_file() and not file.is_symlink())


def check_place(name: str, *, private: bool | None = None, revision: str | None = None) -> HubPlace:
    """Ask the hub whether a repository may be written to, before there is anything to send.

    Args:
        name: `owner/name`, or a name alone, whose owner is the token's.
        private: whether it has to be. Default: as it is; a new one is private.
        revision: the branch; it is made if it is missing.

    Raises:
        ConfigError: the name makes no sense; there is no token, or it may not write there; the repository is public
            and was to be private.
        TheodoraError: the hub does not answer.
    """
    api, errors = _hub()
    try:
        importlib.import_module("huggingface_hub.utils").validate_repo_id(name)
    except errors.HFValidationError as error:
        raise ConfigError(
            f"{shown(name)} cannot name a repository on the hub: {error}. Expected owner/name."
        ) from error
    with _explained(errors, name):
        try:
            me = api.whoami()
        except (errors.LocalTokenNotFoundError, errors.HfHubHTTPError) as error:
            if getattr(getattr(error, "response", None), "status_code", 401) not in (401, 403):
                raise
            raise ConfigError(
                f"{name} cannot be pushed to: the hub knows no valid token of yours. Set HF_TOKEN, or run hf auth "
                "login, with a token that may write."
            ) from error
        role = str(((me.get("auth") or {}).get("accessToken") or {}).get("role") or "")
        if role == _READ_ONLY:
            raise ConfigError(f"{name} cannot be pushed to: the token may only read. Expected one that may write.")
        name = name if "/" in name else f"{me['name']}/{name}"
        owners = [str(me["name"]), *(str(org.get("name")) for org in me.get("orgs") or [])]
        try:
            found = api.model_info(name)
        except errors.RepositoryNotFoundError:
            if name.partition("/")[0] not in owners:
                raise ConfigError(
                    f"{name} is not there, and cannot be made: the token is of {owners[0]}. Expected an owner among "
                    f"{', '.join(owners)}."
                ) from None
            return HubPlace(name=name, exists=False, private=private is not False, revision=revision)
        if "write" in inspect.signature(api.auth_check).parameters:  # of huggingface_hub 1 it is not
            try:
                api.auth_check(name, write=True)
            except errors.HfHubHTTPError as error:
                if error.response.status_code not in (401, 403, 404):
                    raise
                raise ConfigError(f"{name} is there, and the token of {owners[0]} may not write to it.") from error
    if private and not found.private:
        raise ConfigError(
            f"{name} is there and public, and was to be private. Choose another name, or make it private on its page."
        )
    return HubPlace(name=name, exists=True, private=bool(found.private), revision=revision)


def push_folder(
    folder: Path, place: HubPlace, say: Callable[[str], None] = lambda _line: None, *, message: str | None = None
) -> Pushed:
    """Send what belongs of a folder in one commit; nothing that is there is deleted.

    Args:
        folder: see `files_to_push`.
        place: of `check_place`.
        say: is told what is sent, and where, before anything is.
        message: of the commit.

    Raises:
        UsageError: there is nothing to send.
        TheodoraError: the hub refuses it.
    """
    files = files_to_push(folder)
    names = [file.relative_to(folder).as_posix() for file in files]
    size = sum(file.stat().st_size for file in files)
    say(f"Pushing {len(files)} files ({size / 1e6:,.1f} MB) to {place}: {', '.join(names)}")
    api, errors = _hub()
    with _explained(errors, place.name):
        if not place.exists:
            api.create_repo(place.name, private=place.private, exist_ok=True)
            if place.private and not api.model_info(place.name).private:  # somebody was faster
                raise ConfigError(f"{place.name} is public by now, and was to be private: nothing was pushed.")
        if place.revision is not None:
            api.create_branch(place.name, branch=place.revision, exist_ok=True)
        operation = importlib.import_module("huggingface_hub").CommitOperationAdd
        done = api.create_commit(
            place.name,
            [operation(path_in_repo=name, path_or_fileobj=file) for name, file in zip(names, files, strict=True)],
            commit_message=message or f"Push {folder.resolve().name} with Theodora",
            revision=place.revision,
        )
    return Pushed(place=place, files=tuple(names), url=str(done.commit_url))


def _hub() -> tuple[Any, Any]:
    """The hub's client, and its errors.

    Raises:
        ConfigError: the machine was told to stay off the network.
    """
    hub: Any = importlib.import_module("huggingface_hub")
    if hub.constants.HF_HUB_OFFLINE:
        raise ConfigError("Pushing needs the hub, and HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set: unset it.")
    return hub.HfApi(library_name="theodora"), importlib.import_module("huggingface_hub.errors")


@contextmanager
def _explained(errors: Any, name: str) -> Iterator[None]:
    """Refusals and failures of the hub as our own errors."""
    try:
        yield
    except TheodoraError:
        raise
    except (errors.HfHubHTTPError, errors.HFValidationError, ValueError) as error:
        raise CheckpointError(f"The hub refuses {name}: {_first_line(error)}") from error
    except OSError as error:
        raise CheckpointError(
            f"A file for {name} cannot be read, or the hub be reached: {_first_line(error)}"
        ) from error
    except Exception as error:  # of the library that carries HTTP, whichever the client has
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise
        raise CheckpointError(f"The hub cannot be reached for {name}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
