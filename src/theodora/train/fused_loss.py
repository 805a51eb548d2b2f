"""The loss straight from the hidden states, on a GPU, by `theodora.kernels.cross_entropy`: nothing waits for the host.

TRL's own fused loss asks the GPU which tokens are learned, and transformers asks it whether a mask masks anything; at
each such question the GPU runs dry. The collator knows both while the batch is still on the host, so the answers travel
with the batch (`SelectLearned`).

Whether a model computes its logits as assumed here (head, scale, soft cap) is found out by comparing (`fused_head`).
Legend: B rows, T tokens, N learned tokens, H hidden size.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from theodora.fastpath.masks import packed_rows, whole_rows
from theodora.fastpath.packed_attention import SEQUENCES, Sequences
from theodora.kernels.cross_entropy import IGNORED, LossSums, linear_cross_entropy, linear_cross_entropy_of_tokens
from theodora.kernels.operators import runs_triton
from theodora.train.experts import Balancing
from theodora.train.packed_rows import attention_by_bounds, bounds_of
from theodora.train.sequence_losses import SequenceLosses, summed
from theodora.train.tried import tried

LEARNED = "learned"
"""The key in a batch of what `SelectLearned` tells."""

# Numbers of learned tokens are rounded up to multiples of this one and of this share of all tokens, so that memory is
# reused from batch to batch, and batches of one shape have few numbers.
_MULTIPLE, _SHARE = 128, 1 / 16
_FILL = 0.05  # share by which a batch may grow to be like others: about what a CUDA graph saves
_MOST = 0.9  # share of learned tokens from which all positions are taken as they lie, without a copy
# ‖difference‖ / ‖expected‖ that rounding alone explains, in the comparisons below.
_SAME_LOGITS, _SAME_STATES = 1e-2, 5e-2


class Learned(TypedDict):
    """What the host knows of a batch."""

    targets: Tensor
    """The token to predict at each chosen position, (N,); IGNORED where it is none."""
    positions: Tensor | None
    """The chosen positions in the flattened batch, (N,); None for all of them, (B·T,)."""
    tokens: int
    """Tokens in the batch, padding not."""
    maskless: bool
    """Whether padding stands on the right alone, where no causal model sees it."""
    packed: bool
    """Whether positions start anew within a row."""
    bounds: Tensor | None
    """Where the sequences of a packed row begin, if attention is to go by that instead of a mask (`bounds_of`)."""
    longest: int
    """Tokens of the longest of them, at least."""
    real: Tensor | None
    """Which tokens are no padding, nor fill a row up, (B, T) bool, where a mixture's experts are counted."""
    sequences: NotRequired[int]
    """How many sequences the batch has, if the loss of each is wanted by itself."""
    unbalanced: NotRequired[bool]
    """Whether the loss that keeps experts balanced is left out, as of a reference."""


class SelectLearned:
    """A collator that also tells which positions are learned, under the key `LEARNED`."""

    def __init__(
        self,
        collate: Callable[[list[Any]], dict[str, Any]],
        full: int | None = None,
        with_bounds: bool = False,
        with_real: bool = False,
    ) -> None:
        """Take the collator to ask, and what to do with packed rows.

        Args:
            collate: makes a batch of rows.
            full: the length to whose multiples packed rows are filled up (see `fill_up`).
            with_bounds: whether attention is to go by the bounds of sequences instead of a mask.
            with_real: whether to tell which tokens are real.
        """
        self.collate, self.full, self.with_bounds, self.with_real = collate, full, with_bounds, with_real

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """The batch of these rows."""
        batch = self.collate(rows)
        mask, positions = batch.get("attention_mask"), batch.get("position_ids")
        tokens = batch["labels"].numel() if mask is None else int(mask.sum())
        packed = positions is not None and bool((positions.diff(dim=1) != 1).any())
        real = None
        if self.with_real:
            real = torch.ones_like(batch["labels"], dtype=torch.bool) if mask is None else mask.bool()
        if packed and mask is None and self.full is not None:
            fill_up(batch, self.full)
        bounds = bounds_of(batch["position_ids"]) if self.with_bounds and packed and mask is None else None
        targets, positions = select_learned(batch["labels"])
        batch[LEARNED] = Learned(
            targets=targets,
            positions=positions,
            tokens=tokens,
            maskless=mask is not None and mask.dim() == 2 and bool((mask.diff(dim=1) <= 0).all()),
            packed=packed,
            bounds=bounds,
            longest=0 if bounds is None else int(bounds.diff().max()),
            real=None if real is None else F.pad(real, (0, batch["labels"].shape[1] - real.shape[1])),
        )
        return batch


def fill_up(batch: dict[str, Any], full: int) -> None:
    """Add one more sequence, of which nothing is learned, to a packed row that is nearly a multiple of `full` long.

    So that batches have one shape. The others do not see it. A row that would grow by more than `_FILL` stays.
    """
    length = batch["input_ids"].shape[1]
    missing = -length % full
    if batch["input_ids"].shape[0] != 1 or not missing or missing > _FILL * length:
        return
    added: dict[str, Any] = {
        "input_ids": torch.zeros(1, missing),
        "labels": torch.full((1, missing), IGNORED),
        "position_ids": torch.arange(missing)[None],
        "seq_idx": batch["seq_idx"][:, -1:].expand(1, missing) + 1 if "seq_idx" in batch else None,
        **{f"cu_seq_lens_{of}": torch.tensor([length + missing]) for of in "qk"},
    }
    for name in added.keys() & batch.keys():
        batch[name] = torch.cat([batch[name], added[name].to(batch[name].dtype)], dim=-1)
    for name in {"max_length_q", "max_length_k"} & batch.keys():
        batch[name] = max(batch[name], missing)


def select_learned(labels_BT: Tensor, count: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Targets and positions as in `Learned`. The token at t is predicted from the state at t - 1.

    `count` positions are chosen, at least as many as are learned; if it is None, their number rounded up.
    """
    targets_BT = torch.full_like(labels_BT, IGNORED)
    targets_BT[:, :-1] = labels_BT[:, 1:]
    flat = targets_BT.flatten()
    positions = (flat != IGNORED).nonzero().squeeze(1)
    multiple = max(1, math.ceil(flat.numel() * _SHARE / _MULTIPLE)) * _MULTIPLE
    padded = count or max(1, math.ceil(positions.numel() / multiple)) * multiple
    if padded > _MOST * flat.numel():
        return flat, None
    # The last position of the first row predicts nothing: a place for what fills up the number.
    filled = positions.new_full((padded,), labels_BT.shape[1] - 1)
    filled[: positions.numel()] = positions
    return flat[filled], filled


@dataclass(frozen=True)
class BatchSums(LossSums):
    """The sums of a batch, and what routers add to its loss."""

    balance: Tensor | None = None
    """The loss that keeps the experts of a mixture balanced, a scalar with gradient; None where there is none."""


@dataclass(frozen=True)
class Head:
    """How logits come from the last hidden states: softcap·tanh(scale·(h Wᵀ + bias)/softcap)."""

    scale: float = 1.0
    softcap: float | None = None
    maskless: bool = False
    """Whether the model gives the same without a mask where padding stands on the right."""
    balancing: Balancing | None = None
    """How the loss that keeps experts balanced comes from the routers' logits, if it is wanted."""

    def loss(self, model: PreTrainedModel, learned: Learned, *args: Any, **kwargs: Any) -> BatchSums | SequenceLosses:
        """Run the model's body on a batch and add up the losses of the learned tokens, of each sequence if asked to."""
        if self.maskless and learned["maskless"]:
            kwargs.pop("attention_mask", None)
        known = packed_rows() if learned["packed"] else whole_rows()
        if kwargs.get("attention_mask") is not None or torch.compiler.is_compiling():
            known = nullcontext()  # the mask says it all
        elif learned["bounds"] is not None:
            known = attention_by_bounds()
            kwargs[SEQUENCES] = Sequences(learned["bounds"], learned["longest"])
        balancing = None if learned.get("unbalanced") else self.balancing
        if balancing is not None:
            kwargs["output_router_logits"] = True
        with known:
            states = _body(model)(*args, **kwargs, use_cache=False)
        hidden_BTH = states.last_hidden_state
        layer: Any = model.get_output_embeddings()
        weight, bias = (t.full_tensor() if isinstance(t, DTensor) else t for t in (layer.weight, layer.bias))
        hidden_NH: Any = hidden_BTH.flatten(0, 1).to(weight.device)
        if learned["positions"] is not None:
            hidden_NH = _Rows.apply(hidden_NH, learned["positions"].to(weight.device))
        given: Any = {"bias_V": bias, "scale": self.scale, "softcap": self.softcap, "with_stats": True}
        targets, sequences = learned["targets"].to(weight.device), learned.get("sequences")
        balance = None
        if balancing is not None:
            assert learned["real"] is not None
            balance = balancing(states.router_logits, learned["real"])
        if sequences is None:
            return BatchSums(**vars(linear_cross_entropy(hidden_NH, weight, targets, **given)), balance=balance)
        tokens = linear_cross_entropy_of_tokens(hidden_NH, weight, targets, **given)
        predicting = _predicting(learned, hidden_BTH)
        sequence = _sequence_of(learned, predicting, hidden_BTH.shape[1])
        return summed(tokens, predicting + 1, sequence, sequences, balance)

    def logits(self, model: PreTrainedModel, hidden_BTH: Tensor) -> Tensor:
        """The logits that the loss stands for, all at once, float32."""
        layer: Any = model.get_output_embeddings()
        z = layer(hidden_BTH).float() * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def at_temperature(head: Head | str, temperature: float) -> Head | str:
    """The same with its logits divided by a temperature; why not, if that cannot be."""
    if isinstance(head, str) or temperature == 1:
        return head
    if head.softcap is not None:
        return "logits are capped before the temperature divides them"
    return replace(head, scale=head.scale / temperature)


def fused_loss_pays(device: torch.device) -> bool:
    """Whether the fused loss is faster there than the other ways: on GPUs with Triton."""
    return device.type == "cuda" and runs_triton(torch.empty(0, device=device))


def add_fused_loss(model: PreTrainedModel, head: Head) -> None:
    """Make `model(..., learned=...)` return the `BatchSums` of a batch. Without `learned` its forward is as before.

    Through the forward, so that wrappers of the model (for several processes, say) see it.
    """
    before = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, learned: Learned | None = None, **kwargs: Any) -> Any:
        return before(*args, **kwargs) if learned is None else head.loss(self, learned, *args, **kwargs)

    model.forward = types.MethodType(forward, model)  # pyright: ignore[reportAttributeAccessIssue]


def fused_head(model: PreTrainedModel) -> Head | str:
    """How the model computes its logits, or why the fused loss does not fit it.

    Some models scale or cap their logits, and name that in their configuration. The result is compared with the
    model's own logits on a few tokens, because another may do it and not say so.
    """
    layer: Any = model.get_output_embeddings()
    if getattr(type(layer), "forward", None) is not nn.Linear.forward or "forward" in layer.__dict__:
        return "the output head is no plain linear layer"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "the output head has hooks"
    if any(parameter.requires_grad for parameter in layer.parameters()):
        return "the output head is trained"
    if _body(model) is model:
        return f"a {type(model).__name__} does not separate its head from its body"
    text: Any = model.config.get_text_config()
    head = Head(_logit_scale(text), getattr(text, "final_logit_softcapping", None))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            maskless = tried("head", model, lambda: _compared(model, head), lambda found: isinstance(found, bool))
        return maskless if isinstance(maskless, str) else Head(head.scale, head.softcap, maskless)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        return f"the model does not run on bare tokens ({type(error).__name__}: {str(error).splitlines()[0]})"
    finally:
        model.train(was_training)


def _compared(model: PreTrainedModel, head: Head) -> bool | str:
    """Whether the model does without a mask, or why the head is another one."""
    embeddings: Any = model.get_input_embeddings()
    ids = torch.arange(3, 15, device=embeddings.weight.device).view(2, 6) % embeddings.weight.shape[0]
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    real = mask.bool()
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    hidden = _body(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    ours = head.logits(model, hidden).to(expected.device)
    if not _distance(ours[real.to(ours.device)], expected[real.to(ours.device)]) < _SAME_LOGITS:
        return f"a {type(model).__name__} computes its logits in a way of its own"
    without = _body(model)(input_ids=ids, use_cache=False).last_hidden_state
    real = real.to(hidden.device)
    return without.shape == hidden.shape and _distance(without[real], hidden[real]) < _SAME_STATES


def _distance(ours: Tensor, expected: Tensor) -> float:
    return float((ours.float() - expected.float()).norm() / expected.float().norm())


def _body(model: Any) -> Any:
    return model.base_model


def _logit_scale(text: Any) -> float:
    """The factor of the logits, by the names that transformers' configurations have for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(text, name, None) is not None:
            return float(getattr(text, name))
    scaling = getattr(text, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if text.model_type == "hyperclovax" else 1 / scaling


def _predicting(learned: Learned, hidden_BTH: Tensor) -> Tensor:
    """Where in the flattened batch the state stands that each chosen token is predicted from, (N,) int64."""
    positions = learned["positions"]
    if positions is not None:
        return positions
    return torch.arange(hidden_BTH.shape[0] * hidden_BTH.shape[1], device=hidden_BTH.device)


def _sequence_of(learned: Learned, positions: Tensor, length: int) -> Tensor:
    """The number of the sequence that each chosen position lies in, (N,) int64."""
    if learned["bounds"] is None:
        return positions // length
    return torch.searchsorted(learned["bounds"][1:].to(positions.dtype), positions, right=True)


class _Rows(torch.autograd.Function):
    """x[positions]; no position twice, but for rows without gradient. Plain indexing adds up, which is slow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.rows = x.shape[0]
        return x.index_select(0, positions)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (positions,) = ctx.saved_tensors
        return dy.new_zeros(ctx.rows, dy.shape[1]).index_copy_(0, positions, dy), None
