"""Adapted layers as autograd takes them: lists of tensors, and what the layers are beside their tensors.

An autograd function gets every tensor as an argument of its own, saves them where hooks may move them (offloading,
checkpointing), and answers with a gradient, or None, for each. So nothing else may hold them: its context keeps the
`LayerForm` of each layer, and makes the layers again from the forms and what was saved.

    forms, tensors = flat_layers(layers)
    layers_of(forms, tensors)               # the same layers, of these tensors
    flat_gradients(forms, gradients)        # in the order of the tensors

Shapes: I in features, O out features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from theodora.kernels.base_weight import BaseWeight
from theodora.kernels.parts import Parts


@dataclass(frozen=True, slots=True)
class LayerForm:
    """One layer without its tensors."""

    weight_of: Callable[..., BaseWeight]
    """Makes the base weight of its tensors."""
    weight_tensors: int
    """How many they are."""
    scale: float


@dataclass(slots=True)
class LayerGradients:
    """The gradients of one layer's adapter; None where there is no such tensor, or nothing to learn."""

    a_RI: Tensor | None = None
    b_OR: Tensor | None = None
    magnitude_O: Tensor | None = None


def flat_layers(layers: Sequence[Parts]) -> tuple[list[LayerForm], list[Tensor | None]]:
    """The layers' forms, and the tensors of all of them."""
    forms: list[LayerForm] = []
    tensors: list[Tensor | None] = []
    for layer in layers:
        of_weight = layer.weight.tensors()
        forms.append(LayerForm(layer.weight.maker(), len(of_weight), layer.scale))
        tensors += [*of_weight, layer.bias_O, layer.a_RI, layer.b_OR, layer.magnitude_O, layer.norm_O]
    return forms, tensors


def layers_of(forms: Sequence[LayerForm], tensors: Sequence[Tensor | None]) -> list[Parts]:
    """The inverse of `flat_layers`."""
    layers: list[Parts] = []
    left = list(tensors)
    for form in forms:
        of_weight, left = left[: form.weight_tensors], left[form.weight_tensors :]
        (bias, a, b, magnitude, norm), left = left[:5], left[5:]
        layers.append(Parts(form.weight_of(*of_weight), bias, a, b, form.scale, magnitude, norm))
    return layers


def flat_gradients(forms: Sequence[LayerForm], gradients: Sequence[LayerGradients]) -> list[Tensor | None]:
    """The gradients of the layers' tensors, in the order of `flat_layers`."""
    flat: list[Tensor | None] = []
    for form, found in zip(forms, gradients, strict=True):
        weight_and_bias = [None] * (form.weight_tensors + 1)
        flat += [*weight_and_bias, found.a_RI, found.b_OR, found.magnitude_O, None]
    return flat
