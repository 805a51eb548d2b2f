"""What makes an injected transformers model behave in other people's loops. (`trainers.py` teaches trainers.)

- `model.save_pretrained`, and so every Trainer checkpoint, saves the adapter instead of the model. (While an adapter
  is merged it saves the merged model, as a plain one.)
- `model.resize_token_embeddings` gives each adapter rows for the new tokens (`new_tokens.py`).
- TRL's SFTTrainer computes its loss from `lm_head.weight` alone (its fused head, since TRL 1.x). It would leave an
  adapter on the output head out in silence, so that combination is refused.

All this hangs on the model itself: nothing here is replaced for the whole process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from theodora.adapters.dequantized import plain_state, saved_as_plain
from theodora.adapters.new_tokens import Resizer
from theodora.adapters.save import save_adapter
from theodora.adapters.state import active_name, find_state
from theodora.errors import CheckpointError, ConfigError, bullet_list
from theodora.files.finite import not_finite
from theodora.files.read_back import check_model
from theodora.layers import AdapterLayer
from theodora.layers.token_rows import TokenRowsLayer, is_adapted

_GUARD = "_theodora_head_guard"
_PEFT_METHODS = ("add_adapter", "load_adapter")
"""transformers' own, which put PEFT's layers on a model."""


def add_hooks(model: nn.Module) -> None:
    """Hang them on a model that has just received an adapter."""
    if not isinstance(model, PreTrainedModel):
        return
    model.__dict__.setdefault("save_pretrained", AdapterSaver(model))
    for name in _PEFT_METHODS:
        model.__dict__.setdefault(name, refuse_pefts)
    model.__dict__.setdefault("resize_token_embeddings", Resizer(model, add_hooks))
    head = model.get_output_embeddings()
    if is_adapted(head) and _GUARD not in model.__dict__:
        before = model.register_forward_pre_hook(_fused_head, with_kwargs=True)
        setattr(model, _GUARD, (before, model.register_forward_hook(_own_head, always_call=True)))


def remove_hooks(model: nn.Module) -> None:
    """Undo `add_hooks`, on a model that has lost its last adapter."""
    for name in ("save_pretrained", "resize_token_embeddings", *_PEFT_METHODS):
        model.__dict__.pop(name, None)
    guard = model.__dict__.pop(_GUARD, None)
    for hook in guard or ():
        hook.remove()


class AdapterSaver:
    """Stands in for `model.save_pretrained` while the model carries an adapter."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the active adapter into `save_directory`, and the other adapters into folders within it."""
        state = find_state(self.model)
        assert state is not None
        if push_to_hub:
            raise ConfigError("push_to_hub is not supported for adapters: save, then upload the folder.")
        if state.merged is not None:
            full = self.model.state_dict() if state_dict is None else state_dict
            plain = {key: value for key, value in full.items() if ".adapters." not in key and ".token_rows." not in key}
            plain = plain_state(self.model, plain)
            own: Any = type(self.model).save_pretrained
            parameters = dict(self.model.named_parameters(remove_duplicate=False))
            if bad := not_finite((name, tensor) for name, tensor in plain.items() if name in parameters):
                raise CheckpointError(
                    "The merged model holds NaN or infinite values and was not saved:" + bullet_list(bad)
                )
            # (a copy, because transformers empties it)
            with saved_as_plain(self.model):
                own(self.model, save_directory, is_main_process=is_main_process, state_dict=dict(plain), **kwargs)
            if is_main_process:
                check_model(Path(save_directory), plain)
        elif is_main_process:
            main = active_name(state, None)
            for name in state.configs:
                folder = Path(save_directory) if name == main else Path(save_directory) / name
                save_adapter(self.model, folder, name, state_dict=state_dict)


def refuse_pefts(*_args: Any, **_kwargs: Any) -> None:
    """Stands in for transformers' ways to put PEFT's adapters on a model."""
    raise ConfigError(
        "This model carries Theodora's adapter, and PEFT's adapters on top of it are not supported. Use "
        "theodora.inject_adapter, load_adapter and set_adapter, or call theodora.remove_adapter(model) first."
    )


def _fused_head(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Refuse an adapter on a head whose weight alone is read; put trained rows of single tokens into that weight."""
    head: Any = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    if kwargs.get("fused_lm_head") and isinstance(head, TokenRowsLayer) and head.active_token_rows is not None:
        head.__dict__["weight"] = head.active_token_rows.put_into(head.weight)
    if kwargs.get("fused_lm_head") and isinstance(head, AdapterLayer) and head.active is not None:
        raise ConfigError(
            "This trainer computes its loss from the output head's weight alone, so the adapter on the head would "
            "never train. Leave the head out of `targets` (or exclude it), or train with theodora.train."
        )


def _own_head(model: nn.Module, args: Any, output: Any) -> None:
    head: Any = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    head.__dict__.pop("weight", None)
