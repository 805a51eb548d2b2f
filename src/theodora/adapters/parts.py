"""Parts of a vision-language model: the language model, and the towers and projectors that text does not reach."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from theodora.synonyms import bare_name, of_another_part

# Attention to another model's states, which are there with an image or an encoder only.
_CROSS = ("cross_attn", "encoder_attn", "crossattention", "cross_attention")
_SELF = ("self_attn", "attention", "attn", "self_attention")


@dataclass(frozen=True)
class Parts:
    """Where each module of a model stands."""

    language_model: str
    """Path of the language model; empty where it is the whole model."""
    others: tuple[str, ...]
    """Paths of the parts that text does not reach, outermost first."""

    def of(self, path: str) -> str:
        """The part that a module belongs to: one of `others`, or `language_model`."""
        return next((part for part in self.others if path == part or path.startswith(part + ".")), self.language_model)

    def reached(self, path: str) -> bool:
        """Whether text reaches the module."""
        return self.of(path) == self.language_model


def parts_of(model: nn.Module) -> Parts:
    """What a model consists of. A model without other parts has none in `others`."""
    paths = {path: module for path, module in model.named_modules() if path}
    language = _language_model(model, paths)
    others: list[str] = []
    for path, module in paths.items():
        if any(path.startswith(other + ".") for other in others):
            continue
        if _is_other(model, path, module, language):
            others.append(path)
    return Parts(language, tuple(others))


def other_parts_note(model: nn.Module, adapted: Iterable[str]) -> str | None:
    """What to say of the parts that stay as they are; None where there are none."""
    parts = parts_of(model)
    left = [part for part in parts.others if not any(parts.of(path) == part for path in adapted)]
    left = [part for part in left if any(True for _ in model.get_submodule(part).parameters())]
    if not left:
        return None
    shown = _folded(left)
    return f"text does not reach {', '.join(shown)}: frozen, and left out of the targets"


def _language_model(model: nn.Module, paths: dict[str, nn.Module]) -> str:
    """Path of the model's decoder, where its configuration speaks of other parts."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or not hasattr(model, "get_decoder"):
        return ""
    if getattr(config, "is_encoder_decoder", False):  # what its encoder reads is what it is about
        return ""
    try:
        whole = config.get_text_config(decoder=True) is config
    except ValueError:  # several texts
        return ""
    if whole:
        return ""
    decoder: Any = model.get_decoder()  # pyright: ignore[reportCallIssue]
    return next((path for path, module in paths.items() if module is decoder), "")


def _is_other(model: nn.Module, path: str, module: nn.Module, language: str) -> bool:
    """Whether a module is a part (or the top of one) that text does not reach."""
    inside = not language or path == language or path.startswith(language + ".") or language.startswith(path + ".")
    if not inside:
        head: Any = getattr(model, "get_output_embeddings", lambda: None)()
        return not any(child is head for child in module.modules()) and bare_name(path) != "lm_head"
    name = path.rpartition(".")[2]
    if name in _CROSS and not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return True
    if any(hasattr(module, cross) for cross in _CROSS) and not any(hasattr(module, own) for own in _SELF):
        return True  # a whole layer for images, as in Llama 3.2 Vision
    return path != language and not language.startswith(path + ".") and of_another_part(name)


def _folded(paths: list[str]) -> list[str]:
    """`model.layers.3.cross_attn` and its like in other layers become one: `model.layers.*.cross_attn`."""
    return list(dict.fromkeys(".".join("*" if step.isdigit() else step for step in path.split(".")) for path in paths))
