"""Whether a model in transformers' batches says what it says alone: tried out before the first request.

Not every model that transformers puts into batches reads paged keys and values, or the mask between sequences: Bloom
and GPT-J attend to whoever else is in the batch, and nothing says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LENGTH, _COUNT = 6, 4  # tokens of a prompt, and of an answer
_EXACT = 1e-3  # nats in float32, where rounding makes some 1e-5
_ROUNDED = 0.1  # nats in half precision, whose logits are multiples of 1/8 above 16
_SHARE = 0.3  # of what the context makes; keys and values that are not read come near 1


@dataclass(frozen=True)
class Trial:
    """Two short prompts, and what a model says to them outside any batch of transformers' own.

    Shapes: prompts of L tokens, answers of C, a vocabulary of V.
    """

    prompts: list[list[int]]
    logprobs_2CV: Tensor
    """Before each of the likeliest tokens, of all tokens; float32, on the CPU."""
    context: float
    """Mean change of those tokens' log-probabilities, in nats, when the model is shown the token before alone."""
    exact: bool
    """Whether the model computes in float32."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, window: int) -> Trial:
        """Ask the model, which must not be in a batching manager's hands yet.

        Args:
            model: a causal language model.
            window: tokens that prompt and answer may have together; at least 2.
        """
        count = min(_COUNT, window - 1)
        length = min(_LENGTH, window - count)
        vocabulary = model.get_input_embeddings().num_embeddings
        # From the middle of the vocabulary, because special tokens (an image's, say) stand at its ends.
        ids = torch.arange(2 * length) * 7919 % max(1, vocabulary // 2) + vocabulary // 4
        prompts_2L = ids.view(2, length)
        tokens, rows = prompts_2L.to(model.device), []
        for _ in range(count):
            rows.append(model(input_ids=tokens, use_cache=False).logits[:, -1].float().log_softmax(-1))
            tokens = torch.cat((tokens, rows[-1].argmax(-1, keepdim=True)), 1)
        logprobs_2CV = torch.stack(rows, 1)
        blind = model(input_ids=tokens[:, length - 1 : -1].reshape(-1, 1), use_cache=False).logits[:, -1]
        picked = tokens[:, length:, None]
        with_, without = logprobs_2CV.gather(2, picked), blind.float().log_softmax(-1).view_as(logprobs_2CV)
        context = float((with_ - without.gather(2, picked)).abs().mean())
        # Products of float32 may be those of a coarser type (TF32).
        exact = (
            model.dtype == torch.float32
            and torch.get_float32_matmul_precision() == "highest"
            and not torch.is_autocast_enabled(model.device.type)
            and "_original_forward" not in vars(model)  # accelerate's autocast is within `forward`
        )
        return cls(prompts_2L.tolist(), logprobs_2CV.cpu(), context, exact)

    @property
    def count(self) -> int:
        """Tokens to ask for."""
        return self.logprobs_2CV.shape[1]

    @property
    def finite(self) -> bool:
        """Whether the model says anything at all."""
        return bool(self.logprobs_2CV.logsumexp(-1).isfinite().all())

    @property
    def bound(self) -> float:
        """Mean distance of log-probabilities, in nats, from which on something else than rounding is at work."""
        return _EXACT if self.exact else max(_ROUNDED, _SHARE * self.context)

    def distance(self, answers: list[tuple[list[int], list[float]]]) -> float:
        """Mean distance of log-probabilities, in nats, over the tokens of both answers.

        Args:
            answers: to each prompt, greedy tokens and their log-probabilities. After the first token that is another
                one than expected (rounding may make it so) the contexts differ, and nothing is compared.
        """
        distances: list[float] = []
        for row_CV, (tokens, logprobs) in zip(self.logprobs_2CV, answers, strict=True):
            for expected_V, token, logprob in zip(row_CV, tokens, logprobs, strict=True):
                distances.append(abs(float(expected_V[token]) - logprob))
                if token != int(expected_V.argmax()):
                    break
        return sum(distances) / len(distances)


def heads_differ(config: Any) -> bool:
    """Whether layers have heads of different sizes (Gemma 4), which transformers says by refusing to name one."""
    try:
        getattr(config, "head_dim", None)
    except Exception:  # its AmbiguousGlobalPerLayerAttributeError, which older versions have not
        return True
    return False
