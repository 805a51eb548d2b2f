"""The loss of a frozen output head straight from the hidden states: few logits at a time, and nothing waits.

    z = softcap·tanh(scale·(h Wᵀ + bias)/softcap)      nats = Σ_T logΣexp(z) − z[label]
    dz = softmax(z) − onehot(label)                    dh = dz ⊙ ∂z/∂(h Wᵀ) · W

The gradient of h is computed in the forward pass, block of tokens by block, while the block's logits are at hand; the
backward pass only multiplies it by the scalar that comes in. The number of learned tokens stays on the device: asking
for it, as fused losses elsewhere do, makes the GPU wait for the host in the middle of each step.

Legend: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from theodora.autocast import autocast_dtype
from theodora.functional import wide_dtype
from theodora.kernels.operators import operator, runs_triton

IGNORED = -100
"""The label of tokens that are not learned."""

# Logits that are held at once. 1024 tokens of a vocabulary of 128k in bfloat16: enough for products at full speed.
_MOST_BYTES = 2**28
# Rows of logits start at multiples of this many values, whatever the vocabulary: misaligned products are slow.
_ALIGNMENT = 64


@dataclass(frozen=True)
class LossSums:
    """Sums over the learned tokens, scalars; float32 (float64 for float64)."""

    nats: Tensor
    """Negative log-likelihood, with gradient."""
    entropy: Tensor
    """Of the predicted distributions, in nats; 0 if not asked for."""
    correct: Tensor
    """Tokens that were the likeliest one, the first of equals; 0 if not asked for."""
    count: Tensor
    """Learned tokens."""


def linear_cross_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORED,
    with_stats: bool = False,
) -> LossSums:
    """Add up the losses of the tokens whose label is not `ignore_index`; differentiable in the hidden states alone.

    Tokens that are not learned cost as much as others. Where the host knows which they are, select the others first.

    Args:
        hidden_TH: what the head reads at each token.
        weight_VH: the head's frozen weight.
        labels_T: the token to predict at each position, int64. One outside the vocabulary makes the loss NaN.
        bias_V: the head's frozen bias.
        scale: factor of the logits (Cohere's `logit_scale`).
        softcap: limit that the scaled logits approach by a tanh (Gemma 2's `final_logit_softcapping`).
        ignore_index: label of tokens that are not learned.
        with_stats: whether entropy and accuracy are computed, too.
    """
    options = scale, softcap, ignore_index, with_stats
    return LossSums(*_losses(_LinearCrossEntropy, hidden_TH, weight_VH, labels_T, bias_V, *options))


@dataclass(frozen=True)
class TokenLosses:
    """The same of each token, (T,), 0 where it is not learned; float32 (float64 for float64)."""

    nats: Tensor
    """Negative log-likelihood, with gradient."""
    entropy: Tensor
    correct: Tensor
    learned: Tensor


def linear_cross_entropy_of_tokens(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORED,
    with_stats: bool = False,
) -> TokenLosses:
    """`linear_cross_entropy` without the sum: whoever weighs the tokens by their losses (as DPO does) needs each.

    The gradient of h is that of each token's own loss, and the backward pass multiplies it by what comes in for it.
    """
    options = scale, softcap, ignore_index, with_stats
    return TokenLosses(*_losses(_LinearCrossEntropyOfTokens, hidden_TH, weight_VH, labels_T, bias_V, *options))


def _losses(
    function: Any, hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, bias_V: Tensor | None, *options: Any
) -> list[Tensor]:
    """[nats, entropy, correct, count], by the autograd function for sums or for tokens."""
    hidden_TH = hidden_TH.to(autocast_dtype(hidden_TH) or hidden_TH.dtype)
    nats, stats = function.apply(
        hidden_TH.contiguous(),
        weight_VH.detach().to(hidden_TH.dtype),
        labels_T.contiguous(),
        None if bias_V is None else bias_V.detach(),
        *options,
        torch.is_grad_enabled() and hidden_TH.requires_grad,
    )
    return [nats, *stats.unbind()]


def linear_cross_entropy_reference(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORED,
    with_stats: bool = False,
) -> LossSums:
    """`linear_cross_entropy` in plain torch, with all logits at once and autograd's own gradient."""
    z_TV = _logits(hidden_TH @ weight_VH.to(hidden_TH.dtype).T, bias_V, scale, softcap)
    learned_T = labels_T != ignore_index
    log_probs_TV = z_TV.log_softmax(-1)
    nats = -(_at_labels(log_probs_TV, labels_T).masked_fill(~learned_T, 0)).sum()
    zero = torch.zeros_like(nats.detach())
    if not with_stats:
        return LossSums(nats, zero, zero, learned_T.sum().to(nats.dtype))
    with torch.no_grad():
        entropy, correct = _stats(z_TV, log_probs_TV, labels_T)
        own = [entropy * learned_T, correct & learned_T, learned_T]
    return LossSums(nats, *(value.sum().to(nats.dtype) for value in own))


def _logits(raw_TV: Tensor, bias_V: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """z, in float32 or float64."""
    z = raw_TV.to(wide_dtype(raw_TV.dtype))
    z = z if bias_V is None else z + bias_V
    z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _at_labels(values_TV: Tensor, labels_T: Tensor) -> Tensor:
    inside = (labels_T >= 0) & (labels_T < values_TV.shape[1])
    found = values_TV.gather(1, labels_T.masked_fill(~inside, 0)[:, None])[:, 0]
    return found.masked_fill(~inside, float("nan"))


def _stats(z_TV: Tensor, log_probs_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy of each row, and whether its label is the first of the likeliest."""
    entropy = torch.special.entr(log_probs_TV.exp()).sum(1)
    return entropy, (z_TV == z_TV.amax(1, keepdim=True)).int().argmax(1) == labels_T


class _LinearCrossEntropy(torch.autograd.Function):
    """-> nats, (entropy, correct, count)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        labels_T: Tensor,
        bias_V: Tensor | None,
        scale: float,
        softcap: float | None,
        ignore_index: int,
        with_stats: bool,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        sums, dh = _operator(
            hidden_TH, weight_VH, labels_T, bias_V, scale, softcap, ignore_index, with_stats, with_gradient
        )
        ctx.save_for_backward(dh)
        sums = sums.sum(1)
        nats, stats = sums[0].clone(), sums[1:].clone()
        ctx.mark_non_differentiable(stats)
        return nats, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_nats: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dh,) = ctx.saved_tensors
        return _scaled(dh, d_nats), *(None,) * 8


class _LinearCrossEntropyOfTokens(torch.autograd.Function):
    """-> nats (T,), (entropy, correct, learned) (3, T)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        sums, dh = _operator(*inputs)
        ctx.save_for_backward(dh)
        nats, stats = sums[0].clone(), sums[1:].clone()
        ctx.mark_non_differentiable(stats)
        return nats, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_nats: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dh,) = ctx.saved_tensors
        return (dh * d_nats[:, None]).to(dh.dtype), *(None,) * 8


def block_rows(tokens: int, vocabulary: int, itemsize: int) -> int:
    """Tokens whose logits are held at once: a multiple of 128, and about equally many in each block."""
    most = max(128, _MOST_BYTES // (vocabulary * itemsize) // 128 * 128)
    blocks = max(1, -(-tokens // most))
    return -(-tokens // blocks // 128) * 128 if blocks > 1 else max(tokens, 1)


def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    with_stats: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """(nats, entropy, correct, count) of each token, and the gradient of the nats in h (empty if not asked for)."""
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    rows = block_rows(tokens, vocabulary, hidden.element_size())
    padded = -(-vocabulary // _ALIGNMENT) * _ALIGNMENT
    buffer = hidden.new_empty(rows, padded)
    if not hidden.is_cuda:
        # In bfloat16 oneDNN's AMX kernels read on beyond a row, and multiply what lies there, NaN perhaps, by zero.
        buffer[:, vocabulary:] = 0
    buffer = buffer[:, :vocabulary]
    sums = hidden.new_zeros(4, tokens, dtype=wide_dtype(hidden.dtype))
    dh = torch.empty_like(hidden) if with_gradient else hidden.new_empty(0)
    settle = _settle_reference
    if runs_triton(hidden):
        from theodora.kernels.triton.cross_entropy import settle
    for start in range(0, tokens, rows):
        block = slice(start, min(start + rows, tokens))
        logits = buffer[: block.stop - start]
        torch.mm(hidden[block], weight.T, out=logits)
        settle(logits, labels[block], bias, scale, softcap, ignore_index, sums[:, block], with_stats, with_gradient)
        if with_gradient:
            torch.mm(logits, weight, out=dh[block])
    return sums, dh


def _settle_reference(
    logits: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    sums: Tensor,
    with_stats: bool,
    with_gradient: bool,
) -> None:
    """Write each row's nats, entropy, correctness and count into `sums` (4, rows), and the gradient over the logits.

    Args:
        logits: h Wᵀ, (rows, V), of hidden's dtype; overwritten by the gradient of the nats in them if that is wanted.
        sums: zeros.
    """
    learned = labels != ignore_index
    z = _logits(logits, bias, scale, softcap)
    log_probs = z.log_softmax(-1)
    sums[0] = -_at_labels(log_probs, labels).masked_fill(~learned, 0)
    if with_stats:
        entropy, correct = _stats(z, log_probs, labels)
        sums[1], sums[2] = entropy.masked_fill(~learned, 0), correct & learned
    sums[3] = learned
    if with_gradient:
        dz = log_probs.exp_()
        dz -= (torch.arange(z.shape[1], device=z.device) == labels[:, None]).to(dz.dtype)
        dz *= scale if softcap is None else scale * (1 - (z / softcap).square())
        logits.copy_(dz.masked_fill_(~learned[:, None], 0))


def _scale(x: Tensor, factor: Tensor) -> Tensor:
    if runs_triton(x) and x.numel():
        from theodora.kernels.triton.cross_entropy import scaled

        return scaled(x, factor)
    return (x * factor[None]).to(x.dtype)  # [None], so that the factor keeps its float32


_operator = operator(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, float scale, float? softcap, "
    "int ignore_index, bool with_stats, bool with_gradient) -> (Tensor, Tensor)",
    _linear_cross_entropy,
    lambda hidden, weight, labels, bias, scale, softcap, ignore_index, with_stats, with_gradient: (
        hidden.new_empty(4, hidden.shape[0], dtype=wide_dtype(hidden.dtype)),
        torch.empty_like(hidden) if with_gradient else hidden.new_empty(0),
    ),
)
_scaled = operator("scaled(Tensor x, Tensor factor) -> Tensor", _scale, lambda x, factor: torch.empty_like(x))
