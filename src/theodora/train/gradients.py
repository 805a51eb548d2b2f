"""Gradients added up over processes: once for each optimizer step, flattened, those of the adapter alone.

torch's DistributedDataParallel would do it in the backward pass, which then could be no CUDA graph, and sends the whole
frozen model from the first process to the others when it is made. Every process' loss is its share of the loss per
token of the whole step, so that the gradients' sum is that of one process that had all rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from theodora.train.processes import Processes


class GradientSum:
    """Adds up the gradients of parameters, in place.

    Args:
        parameters: those that are trained, in the same order in every process.
        processes: all of which call this at the end of each step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], processes: Processes) -> None:
        self.processes = processes
        self._kinds = by_dtype(parameters)
        self._flat: list[tuple[Tensor, list[Tensor]]] = []

    @property
    def bytes(self) -> int:
        """Of all gradients."""
        return sum(p.numel() * p.element_size() for parameters in self._kinds for p in parameters)

    @property
    def bytes_sent(self) -> int:
        """What a process sends in a step when each sends to its neighbour in a ring: 2 (N - 1) / N of all."""
        return round(2 * (self.processes.count - 1) / self.processes.count * self.bytes)

    @torch.no_grad()
    def __call__(self, loss: Tensor) -> Tensor:
        """Add up, and give the sum of the losses, too.

        Args:
            loss: of this process, a scalar on the device of the gradients.
        """
        self._flat = self._flat or [_buffer(parameters) for parameters in self._kinds]
        # A parameter that no row of this process has reached has no gradient here, and perhaps one elsewhere.
        reached = [p.grad is not None for parameters in self._kinds for p in parameters]
        if all(reached):
            told = torch.ones(len(reached) + 1, device=loss.device)  # made there: the host does not wait
        else:
            told = torch.tensor([1.0, *map(float, reached)], device=loss.device)
        told[0].copy_(loss)
        torch.distributed.all_reduce(told)
        anywhere = reached if all(reached) else [bool(count) for count in told[1:].tolist()]
        for parameters, (flat, views) in zip(self._kinds, self._flat, strict=True):
            own = [p.grad is not None for p in parameters]
            if not all(own):
                flat.zero_()
            _copy([view for view, has in zip(views, own, strict=True) if has], _gradients(parameters))
            torch.distributed.all_reduce(flat)
            for parameter, view, has in zip(parameters, views, anywhere, strict=False):
                if has and parameter.grad is None:
                    parameter.grad = view.clone()
            _copy(_gradients(parameters), [v for v, p in zip(views, parameters, strict=True) if p.grad is not None])
            anywhere = anywhere[len(parameters) :]
        return told[0]


def by_dtype(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters whose gradients can be one message: of a dtype, and on a device."""
    kinds: defaultdict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        kinds[parameter.dtype, parameter.device].append(parameter)
    return list(kinds.values())


def _buffer(parameters: Sequence[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
    first = parameters[0]
    flat = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
    parts = flat.split([p.numel() for p in parameters])
    return flat, [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _copy(to: list[Tensor], of: list[Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, of)  # pyright: ignore
