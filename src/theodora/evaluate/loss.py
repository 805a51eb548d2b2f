"""Loss per predicted token. Legend: B rows, T tokens, K positions, N predicted tokens, V vocabulary."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from theodora.evaluate.batches import pad
from theodora.kernels.cross_entropy import IGNORED

# Logits are brought to fp32 this many tokens at a time: at a vocabulary of 128,256 that is 131 MB, not gigabytes.
_CHUNK = 256


def row_losses(
    model: PreTrainedModel, input_ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> list[tuple[float, int]]:
    """For each row the sum of the negative log-likelihoods of its labels, in nats, and how many there are.

    Args:
        model: any causal language model, in evaluation mode.
        input_ids: token ids of each row.
        labels: the same ids, or `IGNORED` where nothing is predicted, each at the place of its token (not shifted).
    """
    # Rows are padded on the right: in a causal model no token sees what comes after it, so neither an attention mask
    # nor position ids are needed, and attention keeps its fastest path.
    ids_BT = pad(input_ids, 0).to(model.device)
    targets_BT = pad(labels, IGNORED)[:, 1:]  # the token at t is predicted from the state at t-1
    predicted_at = (targets_BT != IGNORED).any(dim=0).nonzero().squeeze(1)
    if predicted_at.numel() == 0:
        return [(0.0, 0)] * len(input_ids)
    last = int(predicted_at[-1]) + 1  # what follows the last predicted token of all rows changes nothing
    logits = logits_at(model, ids_BT[:, :last], predicted_at.to(model.device))
    targets = targets_BT[:, predicted_at].to(logits.device)
    predicted = targets != IGNORED
    logits_NV, targets_N = logits[predicted], targets[predicted]
    losses_N = torch.cat(
        [
            F.cross_entropy(chunk_NV.float(), chunk_N, reduction="none")
            for chunk_NV, chunk_N in zip(logits_NV.split(_CHUNK), targets_N.split(_CHUNK), strict=True)
        ]
    )
    losses_BK = torch.zeros(targets.shape, dtype=torch.float64)
    losses_BK[predicted.cpu()] = losses_N.double().cpu()
    return list(zip(losses_BK.sum(1).tolist(), predicted.sum(1).tolist(), strict=True))


def logits_at(model: PreTrainedModel, ids_BT: Tensor, positions: Tensor | None, **arguments: Any) -> Tensor:
    """Logits at some positions, (B, K, V), or at all: the output head is a quarter of a small model's work.

    Args:
        model: any causal language model.
        ids_BT: token ids, on the model's device.
        positions: where, (K,); None: everywhere.
        **arguments: more for the model's forward. Default: no cache.
    """
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in parameters:
        arguments = {"use_cache": False, **arguments}
    if "position_ids" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        arguments.pop("position_ids", None)  # positions come from the mask then
    if positions is None:
        return model(input_ids=ids_BT, **arguments).logits
    if "logits_to_keep" in parameters:
        return model(input_ids=ids_BT, logits_to_keep=positions, **arguments).logits
    return torch.index_select(model(input_ids=ids_BT, **arguments).logits, 1, positions)
