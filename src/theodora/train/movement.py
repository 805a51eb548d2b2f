"""Did training reach every tensor it should have? Elsewhere "trained as something else" goes unnoticed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import OptimizerNames

from theodora.errors import TheodoraError, bullet_list
from theodora.files.finite import not_finite

_DOUBT = "Is the learning rate far too small, or does the loss bypass these modules?"


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """A hash of the bits of each tensor."""
    hashes = [torch.hash_tensor(tensor.detach()) for tensor in tensors.values()]
    if len({(type(value), value.device) for value in hashes}) == 1 and type(hashes[0]) is Tensor:
        return dict(zip(tensors, torch.stack(hashes).tolist(), strict=True))  # one wait for the device
    return {name: int(value.item()) for name, value in zip(tensors, hashes, strict=True)}


def check_moved(
    tensors: Mapping[str, nn.Parameter],
    before: Mapping[str, int],
    updates: int,
    after: Mapping[str, int] | None = None,
    doubt: str | None = None,
) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Check that training moved the tensors and left them finite.

    A single tensor may rest: an expert that no token was routed to has no gradient. When all tensors of one kind rest
    (all `lm_head.lora_B`, say), the loss does not depend on them, and that is an error.

    Args:
        tensors: name -> trained tensor.
        before: their fingerprints before training.
        updates: optimizer steps at a learning rate above 0.
        after: their fingerprints when training ended, if they have been changed since.
        doubt: why all may rest, if that is known.

    Returns:
        For each part (lora_A, lora_B, magnitude, …) how many tensors moved, of how many; and the names of single
        tensors that rest.

    Raises:
        TheodoraError: naming the tensors that are not finite, or the kinds that rest.
    """
    bad = not_finite(tensors.items())
    if bad:
        raise TheodoraError("Training has diverged; these tensors hold NaN or infinite values:" + bullet_list(bad[:12]))
    # B starts at zero, so A has no gradient until B has moved.
    due = [name for name in tensors if updates >= (2 if name.endswith("lora_A") else 1)]
    after = after or fingerprints(tensors)
    resting = [name for name in due if after[name] == before[name]]
    kinds = _kinds(due)
    frozen = [kind for kind, names in _kinds(resting).items() if len(names) == len(kinds[kind])]
    if frozen:
        raise TheodoraError(
            f"Training left these tensors frozen in all {updates} steps, so the adapter is not what was asked for:"
            + bullet_list(frozen)
            + f"\n{doubt or _DOUBT}"
        )
    moved: dict[str, tuple[int, int]] = {}
    for name in tensors:
        part = name.rpartition(".")[2]
        done, total = moved.get(part, (0, 0))
        moved[part] = (done + (after[name] != before[name]), total + 1)
    return moved, resting


class EarlyGradients(TrainerCallback):
    """Ends a run after a few steps if part of what is to be trained is not: it costs nothing once all have a gradient.

    Args:
        tensors: name -> trained tensor.
        patience: steps in which a kind of tensor may have no gradient while others have one.
    """

    def __init__(self, tensors: Mapping[str, nn.Parameter], patience: int = 5) -> None:
        self.tensors, self.patience = tensors, patience
        self._unseen = dict(tensors)
        self._steps = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check that the optimizer has all of them.

        Raises:
            TheodoraError: naming those that it has not.
        """
        held = {id(p) for group in getattr(optimizer, "param_groups", []) for p in group["params"]}
        if not held or not held & {id(p) for p in self.tensors.values()}:
            self._unseen = {}  # spread over processes, they are others
            return
        missing = [name for name, p in self.tensors.items() if id(p) not in held or not p.requires_grad]
        if missing:
            raise TheodoraError(
                "These tensors are to be trained, but the optimizer does not have them:" + bullet_list(missing[:12])
            )
        if str(OptimizerNames(args.optim).value).endswith(("lomo", "layerwise")):
            self._unseen = {}  # these step in the backward pass and leave no gradients

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Look which kinds have had a gradient.

        Raises:
            TheodoraError: naming the kinds that have had none.
        """
        if not self._unseen:
            return
        grads = {name: p.grad for name, p in self.tensors.items() if p.grad is not None}
        norms = torch.stack(torch._foreach_norm(list(grads.values()))).tolist() if grads else []  # pyright: ignore
        alive = set(_kinds(name for name, norm in zip(grads, norms, strict=True) if norm != 0))
        if not alive:
            return  # a batch with nothing to learn
        self._unseen = {name: p for name, p in self._unseen.items() if not set(_kinds([name])) & alive}
        # B begins at zero, so A has no gradient until a step with a learning rate has moved B.
        self._steps += any(group["lr"] > 0 for group in optimizer.param_groups)
        if self._unseen and self._steps >= self.patience:
            raise TheodoraError(
                f"These tensors have had no gradient in {self._steps} steps, so they would never be trained:"
                + bullet_list(sorted(_kinds(self._unseen)))
                + "\nDoes the loss bypass these modules, or has something frozen them?"
            )


def _kinds(names: Iterable[str]) -> dict[str, list[str]]:
    """`model.layers.3.self_attn.q_proj.lora_B` -> `q_proj.lora_B`."""
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        kinds[".".join(name.split(".")[-2:])].append(name)
    return kinds
