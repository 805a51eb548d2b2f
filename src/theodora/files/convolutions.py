"""The low-rank tensors of convolutions, which are convolutions in PEFT's files, too, and matrices here.

    <path>.lora_A.weight             (R, C / groups, k, …)
    <path>.lora_B.weight             (O, R, 1, …)
    <path>.lora_magnitude_vector     (1, O, 1, …)

With groups PEFT's own are others: its A (R, C, k, …) reads the channels of all groups, and each group's B (R / groups)
takes a part of what comes out. No weight of the convolution does that (so PEFT cannot merge it), and it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def is_convolution(parts: Mapping[str, Tensor]) -> bool:
    """Whether the tensors of one module, a, b and magnitude, are of a convolution."""
    return "a" in parts and "b" in parts and parts["a"].ndim == parts["b"].ndim and parts["a"].ndim in (3, 4, 5)


def problem_of(parts: Mapping[str, Tensor]) -> str | None:
    """What keeps a convolution's tensors from being matrices, if anything."""
    a, b, magnitude = parts["a"], parts["b"], parts.get("magnitude")
    ones = (1,) * (b.ndim - 2)
    if b.shape[2:] != ones:
        return f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}; expected B of a convolution to read single places"
    if 0 < b.shape[1] < a.shape[0] and a.shape[0] % b.shape[1] == 0:
        return (
            f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} are PEFT's of a convolution of "
            f"{a.shape[0] // b.shape[1]} groups: its A reads the channels of all groups, which no weight of the "
            "convolution does. Train it again here, or without this module"
        )
    if magnitude is not None and magnitude.shape != (1, b.shape[0], *ones):
        return f"magnitudes {tuple(magnitude.shape)}; expected {(1, b.shape[0], *ones)}, one for each output channel"
    return None


def as_matrices(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A (R, I), B (O, R) and magnitudes (O,) of a convolution without a problem."""
    matrices = {"a": parts["a"].flatten(1), "b": parts["b"].flatten(1)}
    return matrices | ({"magnitude": parts["magnitude"].flatten()} if "magnitude" in parts else {})


def as_filters(tensor: Tensor, part: str, filter_shape: tuple[int, ...] | None) -> Tensor:
    """A matrix, or the magnitudes, as the file holds them.

    Args:
        tensor: A (R, I), B (O, R) or the magnitudes (O,).
        part: "a", "b" or "magnitude".
        filter_shape: (C / groups, k, …) of the convolution; of None, no convolution, the tensor itself comes back.
    """
    if filter_shape is None:
        return tensor
    ones = (1,) * (len(filter_shape) - 1)
    if part == "magnitude":
        return tensor.reshape(1, -1, *ones)
    return tensor.reshape(len(tensor), *filter_shape) if part == "a" else tensor.reshape(*tensor.shape, *ones)
