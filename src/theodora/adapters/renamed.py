"""An adapter's file with the module names of the model at hand, which may call them otherwise (see `synonyms.py`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from torch import nn

from theodora.config import AdapterConfig
from theodora.errors import CheckpointError, bullet_list
from theodora.files.adapter import AdapterFile
from theodora.layers.experts import named_places
from theodora.paths import PathPattern, matches
from theodora.synonyms import Names, bare_name, of_another_part

T = TypeVar("T")


def left_out_note(file: AdapterFile) -> str:
    """What to say of a file that holds more than the language model that it is put on."""
    return (
        f"{len(file.left_out)} adapted modules of {file.path} belong to no part of this model ({file.left_out[0]}, …): "
        "it is the language model alone. They are left out; text does not reach them."
    )


def in_names_of(model: nn.Module, file: AdapterFile) -> AdapterFile:
    """The same adapter under the names that `model` has for its modules.

    Where the model is a language model alone, what a file holds of a vision or audio tower is left out and named in
    `left_out`: text never reaches it. Other names that the model does not have stay, for `check_fit` to complain of.

    Args:
        model: perhaps with adapters on it.
        file: an adapter that was made on another class of the same weights, perhaps.

    Raises:
        CheckpointError: the file holds one module under two names.
    """
    modules = list(named_places(model))
    parameters = [path for path, _ in model.named_parameters(remove_duplicate=False)]
    return under_names(file, modules, parameters)


def under_names(file: AdapterFile, modules: Iterable[str], parameters: Iterable[str]) -> AdapterFile:
    """`in_names_of` for a model of which only the names are known."""
    modules = list(modules)
    have, tensors = Names(modules), Names(parameters)
    text_only = not any(of_another_part(path) for path in modules)
    left_out = [
        path
        for path in (*file.modules, *file.full)
        if text_only and of_another_part(path) and (have.find(path) or tensors.find(path)) is None
    ]
    lowered = {path: have.find(path) or path for path in file.modules if path not in left_out}
    full = {path: tensors.find(path) or path for path in file.full if path not in left_out}
    copies = {
        path: tensors.find(path) or path for path in file.base_copies if not (text_only and of_another_part(path))
    }
    rows = {path: have.find(path) or path for path in file.token_rows}
    if not lowered and not full and not rows:
        return file
    renamed = {old: new for names in (lowered, full, copies, rows) for old, new in names.items() if old != new}
    if not renamed and not left_out:
        return file
    _check_distinct(file, (lowered, full, copies, rows))
    config = file.config
    ranks = {path: config.rank_of(path) for path in lowered}
    alphas = {path: config.alpha_of(path) for path in lowered}
    saved = {have.find(path) or path for path in config.modules_to_save if not (text_only and of_another_part(path))}
    return replace(
        file,
        modules={lowered[path]: tensors for path, tensors in file.modules.items() if path in lowered},
        full={full[path]: tensor for path, tensor in file.full.items() if path in full},
        base_copies={copies[path]: tensor for path, tensor in file.base_copies.items() if path in copies},
        token_rows={rows[path]: held for path, held in file.token_rows.items()},
        added_biases={lowered[path]: tensor for path, tensor in file.added_biases.items() if path in lowered},
        config=replace(
            config,
            trainable_token_indices={rows[path]: held.ids for path, held in file.token_rows.items()} or (),
            targets=_targets(config, lowered, modules) or config.targets,
            exclude=(),
            rank_pattern=_pattern(config.rank_pattern, ranks, lowered, config.rank),
            alpha_pattern=_pattern(config.alpha_pattern, alphas, lowered, config.alpha or 0.0),
            modules_to_save=tuple(sorted(saved)),
        ),
        full_names=tuple(
            dict.fromkeys(
                have.find(name) or name for name in file.full_names if not (text_only and of_another_part(name))
            )
        ),
        fingerprint=None
        if file.fingerprint is None
        else {lowered.get(path, path): values for path, values in file.fingerprint.items() if path not in left_out},
        left_out=tuple(left_out),
    )


def _targets(config: AdapterConfig, lowered: Mapping[str, str], modules: list[str]) -> tuple[str, ...]:
    """The paths that the targets mean in a model with other names: the file's modules, and what short names select.

    A short name selects in the language model alone, unless the file has modules of other parts: the model that the
    file was made on may have been nothing else.
    """
    wanted = set(lowered.values())
    if isinstance(config.targets, tuple) and not config.exclude:
        short = tuple(name for name in config.targets if name not in lowered and bare_name(name) == name)
        everywhere = any(map(of_another_part, lowered))
        wanted |= {path for path in modules if matches(short, path) and (everywhere or not of_another_part(path))}
    return tuple(sorted(wanted))


def _pattern(pattern: Mapping[str, T], values: Mapping[str, T], names: Mapping[str, str], otherwise: T) -> dict[str, T]:
    """A pattern that gives each module under its new name what the old one gave it under its old name."""
    given = PathPattern(pattern)
    if all(given.get(new, otherwise) == values[old] for old, new in names.items()):
        return dict(pattern)
    return {re.escape(new): values[old] for old, new in names.items() if values[old] != otherwise}


def _check_distinct(file: AdapterFile, renamings: Iterable[Mapping[str, str]]) -> None:
    for names in renamings:
        taken: dict[str, str] = {}
        twice = [f"{old} and {taken[new]}" for old, new in names.items() if taken.setdefault(new, old) != old]
        if twice:
            raise CheckpointError(f"{file.path} holds modules under two names each:" + bullet_list(twice, 12))
