"""Which experts a run's tokens are sent to: counted on the device as they pass, read when the log is written.

Shares are what is told, not numbers of tokens: a checkpointed block that runs again counts its tokens twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from theodora.adapters.state import adapter_layers
from theodora.layers.experts import AdaptedExperts, ExpertParameter, routing, takes_sorted_rows
from theodora.train.fused_loss import LEARNED, Learned
from theodora.train.processes import Processes

_ROWS_OF_EACH = 64  # rows for each expert in a look: fewer, and chance alone looks like a preference
_FEW = 0.1  # of the way from as few experts as a token can have to all of them
_FALLEN = 0.5
_BARELY = 0.01  # of the median change of its parameter's experts


@dataclass(frozen=True)
class ExpertLoad:
    """The experts of one layer in a run."""

    path: str
    """Of the experts module."""
    experts: int
    chosen: int
    """Experts for each token; all of them where tokens go through all, weighted."""
    reached: int
    """Experts that had tokens."""
    busiest: float
    """Share of the rows (a token once for each expert that it goes to) which the busiest expert had."""
    effective: float
    """e to the entropy of the shares: as many experts with equal shares would be as even."""
    unmoved: tuple[int, ...] = ()
    """Experts whose adapter changes their weights by less than a hundredth of what the median expert's does."""


class ExpertLoads(TrainerCallback):
    """Counts, and warns once of each router that collapses: most of its tokens go to few experts.

    Args:
        model: carries adapters; of its experts those that are adapted are watched.
        say: takes a warning.
    """

    def __init__(self, model: nn.Module, say: Callable[[str], None]) -> None:
        self.say = say
        self._model = model
        self.warned: list[str] = []
        """Paths of the modules that were warned of."""
        modules = {path: module for path, module in model.named_modules() if isinstance(module, AdaptedExperts)}
        self._counts = {path: _Counts(module) for path, module in modules.items()}
        self._seen = {path: torch.zeros(counts.experts, dtype=torch.float64) for path, counts in self._counts.items()}
        self._first: dict[str, float] = {}
        self._under_way: tuple[int, Tensor, Any] | None = None

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within the block the model's passes in training mode are counted, without padding."""
        hooks = [counts.watch() for counts in self._counts.values()]
        if hooks:
            hooks.append(self._model.register_forward_pre_hook(self._note_padding, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note_padding(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        learned: Learned | None = kwargs.get(LEARNED)
        mask = kwargs.get("attention_mask") if learned is None else learned["real"]
        for counts in self._counts.values():
            if counts.off:
                continue
            counts.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Look at the counts that were sent for at an earlier log, if they have come, and send for those of now."""
        if not self._counts or "loss" not in (logs or {}):
            return
        if self._under_way is not None:
            step, copied, event = self._under_way
            if event is not None and not event.query():
                return
            self._look(copied, step)
        now = self._together()
        event = torch.cuda.Event() if now.is_cuda else None
        copied = now.to("cpu", non_blocking=True)
        if event is not None:
            event.record()
        self._under_way = state.global_step, copied, event

    def _look(self, counts: Tensor, step: int) -> None:
        """Judge what came since the last look that saw enough of a layer."""
        for path, now in zip(self._counts, self._split(counts.double()), strict=True):
            rows = now - self._seen[path]
            load = load_of(path, rows, self._counts[path].chosen)
            if rows.sum() < _ROWS_OF_EACH * load.experts:
                continue
            self._seen[path] = now
            first = self._first.setdefault(path, load.effective)
            if path not in self.warned and has_collapsed(load, first):
                self.warned.append(path)
                fell = "" if first <= load.effective else f", {first:.1f} when the run began"
                self.say(
                    f"Step {step}: the router of {path} sends most tokens to few of its {load.experts} experts: the "
                    f"busiest has {load.busiest:.0%} of the rows, and they are as even as {load.effective:.1f} equal "
                    f"experts would be{fell}. A lower learning_rate helps, or the balancing loss "
                    "(router_aux_loss_coef)."
                )

    def _together(self) -> Tensor:
        """The counts of all layers, one after the other, on the device of the first."""
        counts = [each.counts_E1[:-1] for each in self._counts.values()]
        return torch.cat([each.to(counts[0].device, non_blocking=True) for each in counts])

    def _split(self, counts: Tensor) -> tuple[Tensor, ...]:
        return counts.split([each.experts for each in self._counts.values()])

    def loads(self, processes: Processes) -> tuple[ExpertLoad, ...]:
        """The whole run in all processes, each of which calls this."""
        if not self._counts:
            return ()
        of_each = self._split(processes.sum(self._together()).cpu())
        unmoved = _unmoved(self._counts)
        return tuple(
            replace(load_of(path, rows, counts.chosen), unmoved=unmoved[path])
            for (path, counts), rows in zip(self._counts.items(), of_each, strict=True)
        )


class _Counts:
    """Rows of each expert of a module; the last number is of rows that go to none."""

    def __init__(self, module: Any) -> None:
        self.module, self.experts, self.chosen = module, int(module.num_experts), int(module.num_experts)
        device = next(module.parameters()).device
        self.mask: Tensor | None = None
        """Of the batch at hand, (rows, tokens): 0 for padding."""
        self.counts_E1 = torch.zeros(self.experts + 1, dtype=torch.int64, device=device)

    @property
    def off(self) -> bool:
        """Whether the adapter is switched off: the reference of preferences runs."""
        return all(place.active is None for place in self.module.adapted.values())

    def watch(self) -> Any:
        return self.module.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training or self.off:
            return
        with torch.no_grad():
            if takes_sorted_rows(module):
                x = args[0] if args else kwargs["hidden_states"]
                rows_ET = x.reshape(self.experts, -1, x.shape[-1]).any(-1)  # tokens that another expert has are zeros
                self.counts_E1[:-1] += (rows_ET * self._counting(rows_ET[0])).sum(1)
                return
            index_TK = routing(args[1:], kwargs)[0]
            self.chosen = index_TK.shape[-1]
            counting_T1 = self._counting(index_TK[:, 0])[:, None]
            expert_S = index_TK.clamp(max=self.experts).reshape(-1)
            self.counts_E1.scatter_add_(0, expert_S, counting_T1.expand(index_TK.shape).reshape(-1))

    def _counting(self, like_T: Tensor) -> Tensor:
        """1 for each token, 0 for padding, (T,) int64."""
        if self.mask is None or self.mask.numel() != like_T.numel():
            return torch.ones_like(like_T, dtype=torch.int64)
        return self.mask.reshape(-1).to(like_T.device, torch.int64)


def load_of(path: str, rows_E: Tensor, chosen: int) -> ExpertLoad:
    """What rows of each expert come to."""
    shares = rows_E.double() / rows_E.sum().clamp(min=1)
    effective = torch.special.entr(shares).sum().exp() if rows_E.any() else shares.sum()
    reached, busiest = int((rows_E > 0).sum()), float(shares.max())
    return ExpertLoad(path, len(rows_E), min(chosen, len(rows_E)), reached, busiest, float(effective))


def has_collapsed(load: ExpertLoad, first: float) -> bool:
    """Whether most tokens go to few experts: nearly as few as can be, or much fewer than when the run began.

    Args:
        load: of some steps.
        first: the effective number of experts when the run began.
    """
    least = load.chosen if load.chosen < load.experts else 1
    over, at_first = load.effective - least, first - least
    few = _FEW * (load.experts - least)
    return over <= few or (over <= 3 * few and over < _FALLEN * at_first)


def _unmoved(modules: Mapping[str, _Counts]) -> dict[str, tuple[int, ...]]:
    """Path of each module → its experts that the adapter barely changes, in none of their parameters."""
    found: dict[str, tuple[int, ...]] = {}
    for path, counts in modules.items():
        places = [place for place in counts.module.adapted.values() if place.active is not None]
        changes = [expert_changes(place) for place in places]
        still = [change <= _BARELY * change.median() for change in changes]
        both = torch.stack(still).all(0) if still else torch.zeros(counts.experts, dtype=torch.bool)
        found[path] = tuple(both.nonzero().flatten().tolist())
    return found


@torch.no_grad()
def expert_changes(place: ExpertParameter) -> Tensor:
    """‖s·B·A‖ of each expert, (E,), float64, by Gram matrices of R x R: B·A is not formed."""
    adapter = place.active
    assert adapter is not None
    a, b = (factor.cpu().double() for factor in adapter.factors())
    squares = ((b.mT @ b) * (a @ a.mT)).sum((1, 2)).clamp(min=0)
    return abs(adapter.scale) * squares.sqrt()


@dataclass(frozen=True)
class TrainedExperts:
    """What is trained of one parameter of experts."""

    shape: tuple[int, ...]
    """Of the parameter, (E, O, I)."""
    numbers: int
    bytes: int


def trained_experts(model: nn.Module) -> dict[str, TrainedExperts]:
    """Path of each adapted parameter of experts → what is trained of it."""
    found: dict[str, TrainedExperts] = {}
    for path, layer in adapter_layers(model).items():
        if isinstance(layer, ExpertParameter) and layer.active is not None:
            trained = [p for p in layer.active.parameters() if p.requires_grad]
            numbers = sum(p.numel() for p in trained), sum(p.numel() * p.element_size() for p in trained)
            found[path] = TrainedExperts(tuple(layer.base_weight.shape), *numbers)
    return found


def described(loads: Sequence[ExpertLoad]) -> list[str]:
    """Sentences on all layers: how many experts had tokens, how evenly, which barely moved."""
    if not loads:
        return []
    reached, of = sum(load.reached for load in loads), sum(load.experts for load in loads)
    even = [load.effective for load in loads]
    busiest = max(loads, key=lambda load: load.busiest)
    layers = f"{len(loads)} layer{'s' * (len(loads) > 1)}"
    least, most = (f"{number:.1f}" for number in (min(even), max(even)))
    lines = [
        f"{reached:,} of {of:,} experts in {layers} had tokens, in each as evenly as "
        f"{least if least == most else f'{least} to {most}'} equal experts would; the busiest had "
        f"{busiest.busiest:.1%} of the rows of {busiest.path}"
    ]
    still = [f"{load.path} {', '.join(map(str, load.unmoved[:6]))}" for load in loads if load.unmoved]
    if still:
        count = sum(len(load.unmoved) for load in loads)
        lines.append(
            f"{count:,} experts barely moved (less than {_BARELY:.0%} of the median): {'; '.join(still[:4])}"
            + (" …" if len(still) > 4 or any(len(load.unmoved) > 6 for load in loads) else "")
        )
    return lines
