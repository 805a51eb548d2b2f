"""Passes over sharded weights when memory ends in the midst of one: all processes go on in step.

In a pass every process gathers the same weights from all, in the same order, and waits for whoever has not come to
them. One whose memory ends therefore runs the rest of the pass all the same, on a few tokens: from the beginning, but
for the gathering that it had done already, whose weights are zeros now. Nothing of such a pass is of use or kept; at
its end all learn of it, and halve their batches together (out_of_memory.py).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

from theodora.adapters.state import adapter_layers

if TYPE_CHECKING:
    from theodora.train.processes import Processes

T = TypeVar("T")
Inputs = dict[str, Any]


class InStep:
    """Runs passes of a model, each to its end in every process.

    Args:
        model: sharded by `shard_model`.
        processes: all of them.
        few: of a batch a few tokens, of which nothing is learned.
        untraced: within which a pass leaves no trace in the metrics.
    """

    def __init__(
        self,
        model: nn.Module,
        processes: Processes,
        few: Callable[[Inputs], Inputs],
        untraced: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.model, self.processes, self.few, self.untraced = model, processes, few, untraced
        self._gathers = _Gathers()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(self._gathers)

    def __call__(
        self, work: Callable[[Inputs], T], inputs: Inputs, *, idle: bool = False
    ) -> tuple[T | None, str | None]:
        """Run a pass; every process calls this.

        Args:
            work: the pass of a batch, which takes it as its own.
            inputs: the batch.
            idle: whether it is run for the others alone.

        Returns:
            What `work` gives; or None, and why memory ended.
        """
        cast(Any, self.model).reshard()  # an evaluation leaves the outermost weights gathered
        self._gathers.begin()
        try:
            with self.untraced() if idle else nullcontext():
                return work(dict(inputs)), None
        except torch.OutOfMemoryError as error:
            message = first_line(error)
        # Outside of the except block, because the error's traceback holds on to the tensors of the pass that failed.
        _begin_anew(self.model)
        let_go()
        self._gathers.begin(without=self._gathers.count)
        try:
            with self.untraced():
                work(self.few(inputs))
        finally:
            self._gathers.begin()
            for layer in adapter_layers(self.model).values():
                layer.norm_cache.invalidate(weight=True)  # perhaps of zeros
        return None, message


class _Gathers(DefaultAllGather):
    """Gathers parts of weights, and counts; or does as if, with the first of them."""

    def __init__(self) -> None:
        self.begin()

    def begin(self, without: int = 0) -> None:
        """Count from 0 on."""
        self.count, self.without = 0, without

    def __call__(self, output_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        if self.count <= self.without:
            output_tensor.zero_()
            return None
        return super().__call__(output_tensor, *args, **kwargs)


def first_line(error: torch.OutOfMemoryError) -> str:
    """What it says, without the figures of the allocator."""
    return (str(error).splitlines() or ["out of memory"])[0]


def let_go() -> None:
    """Give memory back that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _begin_anew(model: nn.Module) -> None:
    """Put a sharded model, which an error has left in the midst of a pass, where it is between passes.

    By what `fully_shard` does at the end of a backward pass (read in torch 2.11 and 2.13); it has no name for others.
    """
    state = cast(Any, model)._get_fsdp_state()
    state._root_post_backward_final_callback()
    state._state_ctx.iter_forward_root = None
    state._comm_ctx.all_gather_state = None
