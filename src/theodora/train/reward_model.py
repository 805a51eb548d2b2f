"""The trainer of reward models: a head on the language model's states gives an answer one number.

The way of a batch is that of `trainer.py`, and so are guards, pieces, logs and checkpoints; a pass gives the scores of
all answers of a batch (padded on the right, chosen and rejected in turn), and `reward_loss` makes a loss of each pair.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from theodora.train.pairs import MARGIN, Sequences
from theodora.train.reward_loss import ScoreSettings, score_losses
from theodora.train.sequence_trainer import SequenceTrainer
from theodora.train.step_state import Metrics

_MEANS = ("accuracy", "margin", "mean_reward")
_LEAST, _MOST = "min_reward", "max_reward"


class RewardTrainer(SequenceTrainer):
    """Learns scores from pairs.

    Args:
        settings: of the objective.
        **kwargs: as of `SequenceTrainer`; rows are those of `tokenize_preferences`.
    """

    def __init__(self, *args: Any, settings: ScoreSettings, **kwargs: Any) -> None:
        self.settings = settings
        model: PreTrainedModel = kwargs["model"]
        model.generation_config = GenerationConfig()  # pyright: ignore[reportAttributeAccessIssue]  (TRL writes to it)
        super().__init__(*args, reference=None, **kwargs)
        del model.generation_config
        self.data_collator = Sequences(self.data_collator, judged=False)

    @property
    def figures(self) -> tuple[str, ...]:
        """What is recorded of each pass as sums, by TRL's names."""
        return _MEANS

    @property
    def sequences_per_row(self) -> int:
        """A better and a worse one."""
        return 2

    def choose_loss(self, kernels: str) -> None:
        """Overrides `LossOverrides.choose_loss`: there is no output head to compute a loss at."""
        self.model_accepts_loss_kwargs = True
        self.head = "a reward model's"

    @property
    def fast_notes(self) -> list[str]:
        """Overrides `AdapterTrainer.fast_notes`: rows stay apart, each with a last token of its own."""
        if self.args.device.type != "cuda":
            return []
        return ["rows of a batch padded", f"no CUDA graphs ({self.why_no_graph})"]

    def _why_no_graph(self) -> str:
        """Overrides `PassOverrides._why_no_graph`."""
        return "a head that scores"

    def loss_of(
        self, model: nn.Module, given: dict[str, Any], own: dict[str, Any], items: Any, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Overrides `SequenceTrainer.loss_of`: the mean over pairs."""
        inputs = {name: value for name, value in given.items() if name != "labels"}
        score_S = model(**inputs, use_cache=False).logits[:, 0].float()
        better, worse, margin = score_S[::2], score_S[1::2], own.get(MARGIN)
        real = (given["labels"] != -100).any(1)[::2]
        each = score_losses(better, worse, None if margin is None else margin[::2], self.settings)
        total = torch.where(real, each, torch.zeros_like(each)).sum()
        rows = real.sum() if items is None else torch.as_tensor(items, device=total.device)
        self._extremes(score_S)
        return total / rows.clamp(min=1), self.stacked(
            {
                "accuracy": (((better > worse) & real).sum(), real.sum()),
                "margin": (((better - worse) * real).sum(), real.sum()),
                "mean_reward": (((better + worse) * real).sum(), 2 * real.sum()),
            }
        )

    def _extremes(self, score_S: Tensor) -> None:
        metrics = self.metrics_of(self.mode)
        metrics[_LEAST].append(score_S.detach().min())
        metrics[_MOST].append(score_S.detach().max())

    def _of_all(self, metrics: Metrics, loss: Tensor) -> tuple[Metrics, Tensor]:
        """Overrides `LogOverrides._of_all`: the least and the largest score of all processes."""
        if not self.processes.alone:
            for name, none in ((_LEAST, torch.inf), (_MOST, -torch.inf)):
                own = torch.stack([torch.as_tensor(v, device=loss.device).float() for v in metrics.get(name) or [none]])
                each = torch.zeros(self.processes.count, device=loss.device)
                each[self.processes.index] = own.min() if name == _LEAST else own.max()
                metrics = {**metrics, name: list(self.processes.sum(each))}
        return super()._of_all(metrics, loss)

    def settle(self, metrics: Metrics) -> None:
        """Overrides `SequenceTrainer.settle`: the least and the largest score of all."""
        super().settle(metrics)
        for name, choose in ((_LEAST, min), (_MOST, max)):
            if metrics.get(name):
                metrics[name] = [choose(metrics[name])]
