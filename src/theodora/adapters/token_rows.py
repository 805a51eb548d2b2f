"""Rows of single tokens in an adapter (PEFT's trainable tokens): on models and in files.

    base_model.model.<path>.token_adapter.trainable_tokens_delta    (N, O): the rows themselves, not what is added
    adapter_config.json: trainable_token_indices    token ids, or name of the module -> token ids

Where embedding and output head share a weight, the embedding's rows are the head's, too, unless the head has its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from theodora.config import AdapterConfig
from theodora.errors import ConfigError, bullet_list
from theodora.files.token_rows import RowTensors
from theodora.layers.kinds import token_ends
from theodora.layers.token_rows import TokenRows, TokenRowsLayer, add_rows, cannot_have_rows, drop_rows, unmerged_weight
from theodora.paths import matches


def token_layers(model: nn.Module, name: str | None = None) -> dict[str, TokenRowsLayer]:
    """Module path -> layer in which adapters have rows, of all adapters or of one."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, TokenRowsLayer) and (name is None or name in module.token_rows)
    }


def own_rows(model: nn.Module, name: str) -> dict[str, TokenRows]:
    """Module path -> an adapter's rows; those that two modules share once, by the first."""
    own: dict[str, TokenRows] = {}
    for path, layer in token_layers(model, name).items():
        rows: Any = layer.token_rows[name]
        if all(rows is not other for other in own.values()):
            own[path] = rows
    return own


def rows_to_write(
    model: nn.Module, name: str, file_rows: Mapping[str, RowTensors], where: str
) -> tuple[list[tuple[nn.Parameter, Tensor]], list[str]]:
    """An adapter's rows, each with the values that are to take its place; and what does not match.

    Args:
        model: carries the adapter.
        name: the adapter's.
        file_rows: module path -> the rows of a file.
        where: the two places that are compared, for the complaints.

    Returns:
        The pairs, and a complaint about each module with rows of other tokens.
    """
    mine, pairs = own_rows(model, name), list[tuple[nn.Parameter, Tensor]]()
    problems: list[str] = []
    for path in sorted(mine.keys() | file_rows.keys()):
        own, other = mine.get(path), file_rows.get(path)
        if own is None or other is None or tuple(own.ids.tolist()) != other.ids:
            problems.append(f"{path}: other tokens have rows of their own {where}")
        else:
            pairs.append((own.rows, other.rows))
    return pairs, problems


def new_rows(
    model: nn.Module, config: AdapterConfig, added: Mapping[str, Sequence[int]], adapted: Sequence[str]
) -> dict[str, TokenRows]:
    """Rows for the tokens of `config.trainable_token_indices`, as the base has them; the model is not touched.

    Args:
        model: the base model, with its own parameters in place.
        config: names the tokens.
        added: module path -> more of them, which the base was given since it was loaded.
        adapted: paths of the modules that get a low-rank adapter of the same name.

    Raises:
        ConfigError: a module or a token is not there, or cannot have rows of its own.
    """
    new: dict[str, TokenRows] = {}
    wanted, problems = _named_indices(model, config.trainable_token_indices)
    for path, ids in added.items():
        wanted[path] = tuple(dict.fromkeys((*wanted.get(path, ()), *ids)))
    for path, ids in wanted.items():
        module: Any = model.get_submodule(path)
        reason = cannot_have_rows(module)
        if path in adapted:
            reason = "targets name it, too; a weight has an adapter of low rank or rows of its own"
        elif matches(config.modules_to_save, path):
            reason = "modules_to_save names it, too, which trains all of its rows"
        elif reason is None and max(ids) >= len(module.weight):
            reason = (
                f"it has {len(module.weight):,} rows, and token {max(ids)} is beyond them (resize_token_embeddings "
                "makes room)"
            )
        if reason is not None:
            problems.append(f"{path}: {reason}")
        else:
            new[path] = _rows(module, ids, module.weight.detach()[torch.tensor(ids)], config)
    if problems:
        raise ConfigError("trainable_token_indices does not fit this model:" + bullet_list(problems))
    return new


def loaded_rows(model: nn.Module, file_rows: Mapping[str, RowTensors], config: AdapterConfig) -> dict[str, TokenRows]:
    """Module path -> rows as a (checked) file has them."""
    return {path: _rows(model.get_submodule(path), t.ids, t.rows, config) for path, t in file_rows.items()}


def add_token_rows(model: nn.Module, name: str, rows: Mapping[str, TokenRows], full: Collection[str]) -> None:
    """Hang rows on their modules, and on what is tied to an embedding among them.

    Args:
        model: the model.
        name: of the adapter.
        rows: by module path.
        full: paths of the parameters that the adapter trains in full, which no longer follow what they were tied to.
    """
    for path, own in rows.items():
        tied = [other for other in tied_to(model, path) if other not in rows and f"{other}.weight" not in full]
        for target in (path, *tied):
            add_rows(model.get_submodule(target), name, own)


def drop_token_rows(model: nn.Module, name: str) -> None:
    """Take an adapter's rows off the model."""
    for layer in token_layers(model, name).values():
        drop_rows(layer, name)


def switch_token_rows(model: nn.Module, name: str | None) -> None:
    """Let the rows of that adapter run."""
    for layer in token_layers(model).values():
        layer.active_rows = name


def merge_token_rows(model: nn.Module, name: str) -> None:
    """Put the rows into weights of their own; modules that share weight and rows share what comes of it."""
    merged: list[tuple[nn.Parameter, TokenRows, nn.Parameter]] = []
    for layer in token_layers(model, name).values():
        rows: Any = layer.token_rows[name]
        known = [new for base, own, new in merged if base is layer.weight and own is rows]
        with torch.no_grad():
            new = known[0] if known else nn.Parameter(rows.put_into(layer.weight), requires_grad=False)
        merged.append((layer.weight, rows, new))
        layer.merge_rows(new)


def unmerge_token_rows(model: nn.Module) -> None:
    """Put the base weights back."""
    for layer in token_layers(model).values():
        layer.unmerge_rows()


def _named_indices(
    model: nn.Module, indices: Mapping[str, Sequence[int]] | Sequence[int]
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Module path -> token ids, of `trainable_token_indices` as PEFT reads it; and what is wrong with them.

    A list is of the input embedding. A head that shares the embedding's weight, with the same tokens, is left out: it
    has the embedding's rows.
    """
    if not indices:
        return {}, []
    if not isinstance(indices, Mapping):
        embedding = token_ends(model)[0]
        path = next((path for path, module in model.named_modules() if module is embedding), None)
        if path is None:
            why = "a list of tokens is of the input embedding, which this model does not name; name a module"
            return {}, [why]
        return {path: tuple(dict.fromkeys(indices))}, []
    named: dict[str, tuple[int, ...]] = {}
    problems: list[str] = []
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, ids in indices.items():
        paths = [path for path, module in modules.items() if matches((name,), path) and hasattr(module, "weight")]
        if not paths:
            problems.append(f"{name}: no such module")
        named |= dict.fromkeys(paths, tuple(dict.fromkeys(ids)))
    for path in list(named):
        if any(named.get(path) == named.get(other) for other in tied_to(model, path, towards_embedding=True)):
            del named[path]
    return named, problems


def tied_to(model: nn.Module, path: str, *, towards_embedding: bool = False) -> list[str]:
    """Paths of the modules that share the weight of the input embedding, if `path` is that embedding.

    With `towards_embedding` the other way round: the path of the embedding, if the module shares its weight.
    """
    embedding = token_ends(model)[0]
    module: Any = model.get_submodule(path)
    if embedding is None or (module is embedding) is towards_embedding:
        return []
    weight = unmerged_weight(module)
    return [
        other
        for other, candidate in model.named_modules()
        if candidate is not module
        and isinstance(candidate, nn.Embedding | nn.Linear)
        and unmerged_weight(candidate) is weight
        and (candidate is embedding or not towards_embedding)
    ]


def peft_indices(model: nn.Module, name: str) -> dict[str, list[int]] | None:
    """`trainable_token_indices` of an adapter as PEFT writes it; None without rows."""
    return {path: row.ids.tolist() for path, row in own_rows(model, name).items()} or None


def rows_problems(model: nn.Module, rows: Mapping[str, RowTensors], sizes: Mapping[str, int]) -> Iterator[str]:
    """What is wrong with a file's rows on this model.

    Args:
        model: the base model.
        rows: of the file.
        sizes: parameter path -> number of rows that it is going to have, where that is another.
    """
    modules = dict(model.named_modules())
    for path, tensors in rows.items():
        module: Any = modules.get(path)
        if module is None:
            yield f"{path}: no such module"
            continue
        if (reason := cannot_have_rows(module)) is not None:
            yield f"{path}: {reason}"
            continue
        have, width = sizes.get(f"{path}.weight", len(module.weight)), module.weight.shape[1]
        if tensors.rows.shape[1] != width:
            yield f"{path}: rows of {tensors.rows.shape[1]} numbers; here they have {width}"
        elif max(tensors.ids) >= have:
            yield (
                f"{path}: brings a row for token {max(tensors.ids)}, and this model has {have:,} rows; call "
                f"model.resize_token_embeddings({max(tensors.ids) + 1}) first, as before training"
            )


def _rows(module: Any, ids: Sequence[int], rows_NO: Tensor, config: AdapterConfig) -> TokenRows:
    weight: Tensor = module.weight
    dtype = weight.dtype if config.adapter_dtype == "base" else getattr(torch, config.adapter_dtype)
    return TokenRows(torch.tensor(ids, device=weight.device), rows_NO.detach().to(weight.device, dtype, copy=True))
