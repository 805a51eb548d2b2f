"""New tokens: a model whose embeddings were resized, before it got an adapter or after.

The base on disk has no rows for them. So adapters train and save the rows of new tokens, and their files hold the
embeddings, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from theodora.adapters.embeddings import end_weights
from theodora.adapters.token_rows import add_token_rows, drop_token_rows, own_rows, tied_to
from theodora.config import AdapterConfig
from theodora.errors import ConfigError
from theodora.files.distrust import expanded
from theodora.layers import AdapterLayer
from theodora.layers.token_rows import TokenRows, cannot_have_rows
from theodora.parse import parse_json
from theodora.paths import matches

if TYPE_CHECKING:
    from theodora.adapters.state import AdapterState


def tokens_before(model: Any) -> int | None:
    """How many tokens the model had rows for when it was loaded or built; None where nothing tells, or it has as many.

    Its config.json says so, where it still stands; else the backbone, which `resize_token_embeddings` leaves alone.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    weights = end_weights(model)
    sizes = {len(weight) for weight in weights.values()}
    if sizes != {getattr(model.config.get_text_config(), "vocab_size", None)}:
        return None  # `resize_token_embeddings` keeps the two alike; some models have more rows from the start
    before = _stored_tokens(model)
    if before is None:
        before = getattr(getattr(model, "base_model", None), "vocab_size", None)
    return before if isinstance(before, int) and before not in sizes else None


def new_token_indices(model: Any, config: AdapterConfig, adapted: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Module path -> tokens that were added to the model since it was loaded, and whose rows nothing else trains."""
    before = tokens_before(model)
    if before is None:
        return {}
    indices: dict[str, tuple[int, ...]] = {}
    for key, weight in end_weights(model).items():
        path = key.removesuffix(".weight")
        if path in adapted or matches(config.modules_to_save, path) or len(weight) <= before:
            continue
        module = model.get_submodule(path)
        tied = any(other in indices for other in tied_to(model, path, towards_embedding=True))
        if not tied and cannot_have_rows(module) is None:
            indices[path] = tuple(range(before, len(weight)))
    return indices


class Resizer:
    """Takes the place of `model.resize_token_embeddings` while the model carries adapters, which train the new rows."""

    def __init__(self, model: Any, install: Callable[[nn.Module], None]) -> None:
        self.model, self.install = model, install

    def __call__(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """Resize as transformers does, and give each adapter rows of its own for the tokens that are new.

        Raises:
            ConfigError: an adapter is merged, or is on the embedding or the head itself, whose size it then has.
        """
        from theodora.adapters.state import find_state, set_adapter

        model, state = self.model, find_state(self.model)
        own: Any = type(model).resize_token_embeddings
        if state is None or (new_num_tokens is None and pad_to_multiple_of is None):
            return own(model, new_num_tokens, pad_to_multiple_of, mean_resizing)
        _check_free(model, state)
        active = state.active
        trained = {name: any(p.requires_grad for p in _parameters(model, state, name)) for name in state.configs}
        before = len(model.get_input_embeddings().weight)
        held = {name: own_rows(model, name) for name in state.configs}
        for name in state.configs:
            drop_token_rows(model, name)
        embedding = own(model, new_num_tokens, pad_to_multiple_of, mean_resizing)
        for weight in end_weights(model).values():
            weight.requires_grad_(False)
        for name, rows in held.items():
            resized = _rows_after_resize(model, rows, before, state.configs[name])
            add_token_rows(model, name, resized, state.full[name])
        state.resized |= len(model.get_input_embeddings().weight) != before
        self.install(model)
        set_adapter(model, active)
        for name, asks in trained.items():
            for rows in own_rows(model, name).values():
                rows.requires_grad_(asks and name == active)
        return embedding


def _check_free(model: Any, state: AdapterState) -> None:
    if state.merged is not None:
        raise ConfigError(f"Adapter {state.merged!r} is merged into the weights; call unmerge_adapter(model) first.")
    ends = [key.removesuffix(".weight") for key in end_weights(model)]
    adapted = [path for path in ends if isinstance(model.get_submodule(path), AdapterLayer)]
    adapted += [path for path in ends if f"{path}.weight" in state.originals]
    if adapted:
        raise ConfigError(
            f"An adapter is on {', '.join(adapted)}, whose size it has. Resize the embeddings before inject_adapter."
        )


def _rows_after_resize(
    model: Any, rows: Mapping[str, TokenRows], before: int, config: AdapterConfig
) -> dict[str, TokenRows]:
    """An adapter's rows after a resize: those it had, of tokens that are still there, and one for each new token."""
    after: dict[str, TokenRows] = {}
    for key, weight in end_weights(model).items():
        path = key.removesuffix(".weight")
        new = torch.arange(before, max(before, len(weight)), device=weight.device)
        had = rows.get(path)
        if had is None and any(other in after for other in tied_to(model, path, towards_embedding=True)):
            continue
        dtype = weight.dtype if config.adapter_dtype == "base" else getattr(torch, config.adapter_dtype)
        ids, values = [new], [weight.detach()[new].to(dtype)]
        if had is not None:
            remain = had.ids < len(weight)
            ids, values = [had.ids[remain], new], [had.rows.detach()[remain], values[0].to(had.rows.dtype)]
        if sum(map(len, ids)):
            after[path] = TokenRows(torch.cat(ids), torch.cat(values).clone())
    return after


def _parameters(model: nn.Module, state: AdapterState, name: str) -> list[Tensor]:
    from theodora.adapters.state import trained_tensors

    return list(trained_tensors(model, name).values())


def _stored_tokens(model: Any) -> int | None:
    """The vocabulary's size in the configuration that the model was loaded from, if that is on this machine."""
    name = getattr(model.config, "_name_or_path", None) or getattr(model, "name_or_path", None)
    if not name:
        return None
    try:
        path: Path = expanded(name) / "config.json"
        if path.is_file():
            stored = parse_json(path.read_text(encoding="utf-8"))
            text = stored.get("text_config")
            size = (text if isinstance(text, dict) else stored).get("vocab_size", stored.get("vocab_size"))
            return size if isinstance(size, int) else None
        if str(name).count("/") > 1:
            return None
        config = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        return config.get_text_config().vocab_size
    except (OSError, ValueError, AttributeError, KeyError):
        return None  # it is not there, or needs code of its own
