"""What a merge does to the predictions, however large the model: it runs with the weights of one module at a time.

The model stands on the meta device; each module that has parameters of its own gets them, in float32, just before it
runs, and gives them back afterwards. So any weights can be tried in it: the base's, those of the formula, those that a
file holds. Each pass reads the whole model once.

Shapes: B rows, T tokens, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from theodora.errors import CheckpointError
from theodora.files.base_model import BaseCheckpoint
from theodora.files.model_folder import has_tokenizer
from theodora.files.tokenizer import load_tokenizer
from theodora.merging.plan import MergePlan
from theodora.merging.probe import PROBE_TEXT

_ROWS, _TOKENS = 4, 32
Values = Callable[[str], Tensor]
"""Gives a parameter of the model by its name."""


@dataclass(frozen=True)
class LogitsReport:
    """How far the merged model's predictions are from those of the formula, over a few rows of tokens."""

    positions: int
    kl_mean: float
    """Mean KL divergence of what was written from W', in nats."""
    kl_effect: float
    """The same of the base without the adapter from W': what the adapter does."""
    largest: float
    """Largest difference of a logit."""
    agreeing: float
    """Share of positions at which the likeliest token is the same."""

    @property
    def loss(self) -> float:
        """Which share of the adapter's effect is lost; nan where it has none."""
        return self.kl_mean / self.kl_effect if self.kl_effect > 0 else float("nan")


def probe_rows(folder: Path, vocabulary: int, *, trust_remote_code: bool = False) -> Tensor:
    """A few rows of tokens, (B, T): of a built-in page, or any where the folder has no tokenizer."""
    ids: list[int] = []
    if has_tokenizer(folder):
        try:
            tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
            ids = tokenizer.encode(PROBE_TEXT, truncation=True, max_length=_ROWS * _TOKENS)
        except CheckpointError:
            ids = []
    if len(ids) < _ROWS * 2 or max(ids) >= vocabulary:
        return torch.randint(vocabulary, (_ROWS, _TOKENS), generator=torch.Generator().manual_seed(0))
    return torch.tensor(ids[: len(ids) // _ROWS * _ROWS]).view(_ROWS, -1)


def compare_logits(adapted_TV: Tensor, written_TV: Tensor, base_TV: Tensor) -> LogitsReport:
    """Compare what three models predict after each of the same tokens; each (…, V)."""
    size = min(logits.shape[-1] for logits in (adapted_TV, written_TV, base_TV))
    a, w, b = (logits[..., :size].reshape(-1, size).double() for logits in (adapted_TV, written_TV, base_TV))
    return LogitsReport(
        positions=len(a),
        kl_mean=_kl(a, w),
        kl_effect=_kl(a, b),
        largest=float((a - w).abs().max()),
        agreeing=float((a.argmax(1) == w.argmax(1)).double().mean()),
    )


def stored_values(base: BaseCheckpoint) -> Values:
    """The parameters as a checkpoint has them, quantised ones dequantised."""

    def value(name: str) -> Tensor:
        whole = base.read_whole(name)
        if whole is None:
            raise CheckpointError(f"{name} is stored in other pieces in {base.folder}")
        return whole

    return value


def merged_values(base: BaseCheckpoint, plan: MergePlan) -> Values:
    """The parameters after the change that a plan makes of them, before any rounding."""
    outputs = {output.parameter: output for output in plan.outputs if output.parameter is not None}
    pieces = {output.key: output for output in plan.outputs if output.piece is not None and output.change is not None}
    plain = stored_values(base)

    def value(name: str) -> Tensor:
        if not pieces.keys().isdisjoint(base.pieces_of(name)):
            whole = plain(name).float()
            for key, piece in base.pieces_of(name).items():
                piece.put_into(whole, pieces[key].values(base)[1].to(whole.dtype))
            return whole
        sharing = next((other for other in (name, *base.tied_to(name)) if other in outputs), None)
        return plain(name) if sharing is None or name in base.converted else outputs[sharing].values(base)[1]

    return value


def streamed_logits(checkpoint: BaseCheckpoint, values: Values, ids_BT: Tensor) -> Tensor:
    """The logits of the next token after each one, (B, T, V) float32, on the CPU.

    Raises:
        CheckpointError: the model cannot run so; saying why.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = checkpoint.twin(torch.float32).eval()
    try:
        with torch.no_grad(), _streaming(model, values, device):
            logits: Tensor = model(input_ids=ids_BT.to(device), use_cache=False).logits
        return logits.float().cpu()
    except CheckpointError:
        raise
    except Exception as error:  # a model that reads a weight past its module's forward, a kernel that is missing, …
        raise CheckpointError(f"{type(model).__name__} does not run module by module: {error}") from error
    finally:
        checkpoint.close()


@contextmanager
def _streaming(model: PreTrainedModel, values: Values, device: torch.device) -> Iterator[None]:
    _fill_buffers(model, values, device)
    hooks: list[Any] = []
    modules: Any = model.named_modules()
    for path, module in modules:
        if module._parameters:
            held = _Held(module, path, values, device)
            hooks.append(module.register_forward_pre_hook(held.fill))
            hooks.append(module.register_forward_hook(held.empty, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Held:
    """The parameters of one module, which are there while it runs."""

    def __init__(self, module: Any, path: str, values: Values, device: torch.device) -> None:
        self._values, self._device = values, device
        self._empty: dict[str, Any] = {name: p for name, p in module._parameters.items() if p is not None}
        self._names = {name: f"{path}.{name}" if path else name for name in self._empty}

    def fill(self, module: Any, _inputs: Any) -> None:
        for name, full_name in self._names.items():
            value = self._values(full_name).to(self._device, torch.float32)
            module._parameters[name] = nn.Parameter(value, requires_grad=False)

    def empty(self, module: Any, _inputs: Any, _output: Any) -> None:
        module._parameters.update(self._empty)


def _fill_buffers(model: Any, values: Values, device: torch.device) -> None:
    """Buffers of the files come from there; those that no file holds are computed as transformers does."""
    stored = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
    for path, module in model.named_modules():
        names = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for name in names:
            full_name = f"{path}.{name}" if path else name
            given = values(full_name) if full_name in stored else torch.empty_like(module._buffers[name], device="cpu")
            module._buffers[name] = given.to(device)
        if any(name in module._non_persistent_buffers_set for name in names):
            with torch.no_grad():
                model._init_weights(module)


def _kl(p_TV: Tensor, q_TV: Tensor) -> float:
    log_p, log_q = p_TV.log_softmax(1), q_TV.log_softmax(1)
    return float((log_p.exp() * (log_p - log_q)).sum(1).clamp_min(0).mean())
