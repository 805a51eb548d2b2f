"""A training step on paper: the model built from its configuration on the meta device, where tensors have sizes alone.

What runs is what a run runs: the adapter's own layers, the fast path, torch's autograd and checkpointing. So what a
step keeps, and the most that it holds, come out as they are, whatever the family, and change when the code does. Of a
model whose blocks are alike a few are run, and the rest is extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from theodora.adapters import inject_adapter
from theodora.adapters.quantized import count_parameters, stored_quantization
from theodora.adapters.targets import for_text
from theodora.config import AdapterConfig
from theodora.errors import ConfigError, TheodoraError
from theodora.fastpath.accelerate import checkpoint_activations, recompute_less, restore_model, speed_up_model
from theodora.fastpath.masks import whole_rows
from theodora.files.classes import auto_classes, capped_attention
from theodora.kernels.cross_entropy import linear_cross_entropy
from theodora.kernels.operators import on_paper
from theodora.layers.libraries import PAPER
from theodora.patches import replaced
from theodora.plan.stored import store
from theodora.plan.tally import Tally

Device = Literal["cuda", "cpu"]
Stored = Literal["plain", "fp8", "nf4", "int8", "int4"]

_FEW = 2
"""Blocks, and twice as many, that are run where all are alike: what is made again comes in pairs of blocks."""
_MOST_OPERATORS = 50_000
"""Of a pass; a model of 100 blocks that are not alike takes 20,000."""
MOST_LOGITS = 2**26
"""Of a batch, up to which holding them all takes no more memory than TRL's tiles: measured on a CPU with so many."""


@dataclass(frozen=True)
class Step:
    """Bytes of a forward and backward pass, beside the weights and the adapter."""

    kept: int
    """From the forward pass for the backward pass."""
    peak: int
    """The most held at once, what is kept included; gradients of the adapter, too."""
    traced: bool = True
    """Whether the step's own code was run for it; else it is an estimate from the layers' sizes."""


class PaperModel:
    """A model with an adapter, on paper."""

    def __init__(
        self,
        config: PreTrainedConfig,
        adapter: AdapterConfig,
        *,
        dtype: torch.dtype = torch.bfloat16,
        stored: Stored = "plain",
        device: Device = "cuda",
        kernels: str = "auto",
        name: object = "the model",
        trust_remote_code: bool = False,
    ) -> None:
        """Build it, whole.

        Args:
            config: the model's.
            adapter: what is put on it.
            dtype: of the plain weights, and of the products.
            stored: what the frozen linear layers are put into.
            device: where the run is going to be.
            kernels: as in `TrainConfig`.
            name: the model's, for messages.
            trust_remote_code: whether code that comes with the model may run.

        Raises:
            ConfigError: the adapter does not fit the model.
            CheckpointError: it is no causal language model.
        """
        self.config, self.dtype, self.device, self.stored = config, dtype, device, stored
        self.fast = device == "cuda" and kernels == "auto" and adapter.method != "full"
        self.notes: list[str] = []
        with self._paper():
            model = _build(config, dtype, name, trust_remote_code)
            self.parameters = count_parameters(model)
            fields = stored_quantization(config)
            if fields is not None:
                store(model, "bits", adapter.modules_to_save, fields)
            elif stored != "plain":
                store(model, stored, adapter.modules_to_save)
            if adapter.method == "full":
                model.requires_grad_(True)
            else:
                adapter, self.notes = for_text(model, adapter)
                inject_adapter(model, adapter)
        self.model = model
        self.blocks = blocks_of(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.trained, self.trained_bytes = sum(p.numel() for p in trained), _bytes(trained)
        self.weight_bytes = _bytes(_frozen(model))
        self.block_bytes = [_bytes(_frozen(block)) for block in self.blocks or ()]
        self._steps: dict[tuple[int, int, bool], Step] = {}
        self._cut: dict[int, Any] = {}

    @property
    def root_bytes(self) -> int:
        """Of the frozen weights outside the blocks: embeddings, head, the last norm."""
        return self.weight_bytes - sum(self.block_bytes)

    def step(self, batch: int, length: int, recomputes: bool) -> Step:
        """A pass over a batch, all of whose tokens are learned.

        Args:
            batch: rows.
            length: tokens of each.
            recomputes: whether blocks are run again in the backward pass.
        """
        key = batch, length, recomputes
        if key not in self._steps:
            try:
                self._steps[key] = self._extrapolated(*key)
            except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, KeyError, IndexError):
                # (whatever a stranger's forward does with tensors that have no numbers)
                self._steps[key] = self._guessed(*key)
        return self._steps[key]

    def _extrapolated(self, batch: int, length: int, recomputes: bool) -> Step:
        count = len(self.blocks or ())
        if self.blocks is None or count <= 2 * _FEW or not alike(self.blocks):
            return self._run(count, batch, length, recomputes)
        first = _FEW + (count % _FEW)
        few, more = (self._run(blocks, batch, length, recomputes) for blocks in (first, first + _FEW))
        times = (count - first) / _FEW
        kept, peak = (round(a + (b - a) * times) for a, b in ((few.kept, more.kept), (few.peak, more.peak)))
        return Step(kept, peak)

    def _run(self, blocks: int, batch: int, length: int, recomputes: bool) -> Step:
        """The step of a model with so many of the blocks."""
        with self._paper(), _few_blocks(self.model, self.blocks, blocks), _recomputed(self.model, recomputes):
            if self.fast:
                speed_up_model(self.model)
            try:
                if recomputes and self.fast:
                    recompute_less(self.model)
                return self._counted(batch, length)
            finally:
                restore_model(self.model)
                for parameter in self.model.parameters():
                    parameter.grad = None

    def _counted(self, batch: int, length: int) -> Step:
        model, tally = self.model, Tally(_MOST_OPERATORS)
        ids_BT = torch.zeros(batch, length, dtype=torch.long, device="meta")
        labels_N = torch.zeros(batch * length, dtype=torch.long, device="meta")
        tally.hold(*model.parameters(), *model.buffers(), *_packed(model))
        held = tally.live
        hook = model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True))
        was_training, use_cache = model.training, model.config.use_cache
        try:
            model.train()
            attention = _attention if self.device == "cuda" else _attention_of_cpu
            with replaced(F, scaled_dot_product_attention=attention), tally:
                loss = self._loss(ids_BT, labels_N)
                kept = tally.live - held
                torch.autograd.backward(loss)
        finally:
            hook.remove()
            model.train(was_training)
            model.config.use_cache = use_cache
        return Step(kept, tally.peak - held)

    def _loss(self, ids_BT: Tensor, labels_N: Tensor) -> Tensor:
        model: Any = self.model
        head: Any = model.get_output_embeddings()
        text = model.config.get_text_config()
        trained = head is None or any(p.requires_grad for p in head.parameters())
        few = labels_N.numel() * text.vocab_size <= MOST_LOGITS  # more go through TRL's tiles, or through ours
        if (self.fast or not few) and not trained and model.base_model is not model:
            with whole_rows():
                hidden_NH = model.base_model(input_ids=ids_BT, use_cache=False)[0].flatten(0, 1)
            cap = getattr(text, "final_logit_softcapping", None)
            weight_VH, bias_V = (getattr(head, name) for name in ("weight", "bias"))
            return linear_cross_entropy(hidden_NH, weight_VH, labels_N, bias_V=bias_V, softcap=cap).nats
        with whole_rows():
            logits_NV = model(input_ids=ids_BT, use_cache=False).logits.flatten(0, 1).float()
        return F.cross_entropy(logits_NV, labels_N)

    def _guessed(self, batch: int, length: int, recomputes: bool) -> Step:
        """From the layers' sizes, where the model's code does not run on paper: inputs and outputs are kept once."""
        tokens, size = batch * length, self.dtype.itemsize
        text: Any = self.config.get_text_config()
        hidden, vocabulary = int(text.hidden_size), int(text.vocab_size)
        blocks = self.blocks or [self.model]
        each = max(_widths(block) for block in blocks) * tokens * size
        boundary = tokens * hidden * size
        logits = min(2 * tokens * vocabulary * 4, 2**30) + 2 * boundary
        kept = len(blocks) * boundary + each if recomputes else len(blocks) * (each + 2 * boundary)
        return Step(kept, kept + max(logits, each) + self.trained_bytes, traced=False)

    @contextmanager
    def _paper(self) -> Iterator[None]:
        with on_paper(self.device if self.fast else "cpu"):
            yield


def blocks_of(model: nn.Module) -> nn.ModuleList | None:
    """The decoder's blocks: the list of modules with the most weights; None if there is none."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=None)


def alike(blocks: nn.ModuleList) -> bool:
    """Whether all blocks are of one class and hold tensors of the same sizes, trained and frozen alike."""
    forms = {
        (type(block), *((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters()))
        for block in blocks
    }
    return len(forms) == 1


def _build(config: PreTrainedConfig, dtype: torch.dtype, name: object, trust_remote_code: bool) -> Any:
    config = deepcopy(config)
    for part in (config, config.get_text_config()):  # the folder's packed form is put on by `store`
        if hasattr(part, "quantization_config"):
            delattr(part, "quantization_config")
    kind = auto_classes(config, name, trust_remote_code=trust_remote_code)[0]
    try:
        with torch.device("meta"):
            model = kind.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code, **capped_attention(config)
            )
    except TheodoraError:
        raise
    except Exception as error:  # whatever a strange configuration leads a model's code to
        raise ConfigError(f"{name} has a configuration that no model can be built from: {error}") from error
    return model.requires_grad_(False)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, *_: Any, **__: Any
) -> Tensor:
    """As large as what fused attention makes and keeps: the output, and a number for each row of scores."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, True)[0]


def _attention_of_cpu(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, *_: Any, **__: Any
) -> Tensor:
    """Likewise; with dropout a CPU has no fused attention, and all scores are kept."""
    if not dropout_p:
        return _attention(query, key, value)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = F.softmax(query @ key.transpose(-1, -2) * 0.1, -1)
    return F.dropout(scores, dropout_p) @ value


@contextmanager
def _few_blocks(model: Any, blocks: nn.ModuleList | None, count: int) -> Iterator[None]:
    """Let the model run the first blocks alone."""
    if blocks is None or count == len(blocks):
        yield
        return
    text, kept = model.config.get_text_config(), dict(blocks._modules)  # pyright: ignore[reportPrivateUsage]
    layers = text.num_hidden_layers
    for name in list(kept)[count:]:
        del blocks._modules[name]  # pyright: ignore[reportPrivateUsage]
    text.num_hidden_layers = count
    try:
        yield
    finally:
        text.num_hidden_layers = layers
        blocks._modules.clear()  # pyright: ignore[reportPrivateUsage]
        blocks._modules.update(kept)  # pyright: ignore[reportPrivateUsage]


@contextmanager
def _recomputed(model: Any, recomputes: bool) -> Iterator[None]:
    if not recomputes:
        yield
        return
    checkpoint_activations(model)
    try:
        yield
    finally:
        (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()


def _frozen(model: nn.Module) -> list[Tensor]:
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    return [t for t in (*model.parameters(), *model.buffers(), *_packed(model)) if id(t) not in trained]


def _packed(model: nn.Module) -> list[Tensor]:
    """The scales beside packed numbers, which no module holds."""
    weights = [getattr(p, PAPER, None) for p in model.parameters()]
    return [t for weight in weights if weight is not None for t in weight.tensors()[1:]]


def _bytes(tensors: Any) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _widths(block: nn.Module) -> int:
    """Numbers that a token leaves in a block: what its linear layers read and give; of experts, those that it takes."""
    return sum(
        int(m.in_features) + int(m.out_features)  # pyright: ignore[reportArgumentType]
        for path, m in block.named_modules()
        if hasattr(m, "in_features") and hasattr(m, "out_features") and _counts(path)
    ) or math.ceil(sum(p.numel() for p in block.parameters()) ** 0.5)


def _counts(path: str) -> bool:
    """Of experts in a list, the first two alone."""
    parts = path.split(".")
    return not any(part == "experts" and parts[i + 1 : i + 2] not in (["0"], ["1"]) for i, part in enumerate(parts))
