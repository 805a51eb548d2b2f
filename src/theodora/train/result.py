"""What a run comes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from theodora.data.left_out import LeftOut
from theodora.train.expert_loads import ExpertLoad
from theodora.train.samples import Sample


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The outcome of `train`. Losses are means per predicted token, in nats."""

    output: Path
    """The folder that holds the adapter and its record."""
    steps: int
    """Optimizer steps taken, those before a resume included."""
    train_loss: float
    """Mean training loss over the last tenth of the steps."""
    train_reward: float | None = None
    """Mean reward of the answers drawn in the last tenth of the steps; None where nothing is rewarded."""
    eval_loss_before: float | None
    """Held-out loss before training; None without held-out rows."""
    eval_loss: float | None
    """Held-out loss of the adapter that was saved (of grpo the reward, negative); None without held-out rows."""
    general_loss_before: float | None = None
    """Loss on general text where training began; None where none was given, or the run went on from a record without
    it."""
    general_loss: float | None = None
    """Loss on general text of the adapter that was saved."""
    trainable_parameters: int
    """How many numbers were trained."""
    total_parameters: int
    """How many numbers the model has, the adapter's included."""
    tokens: int
    """Tokens seen, prompts included, padding not."""
    seconds: float
    """Time of training and evaluation, without loading; since the resume, if there was one."""
    tokens_per_second: float
    """Tokens over the time spent in optimizer steps, evaluation and saving left out."""
    warm_tokens_per_second: float
    """Likewise without the first logged step, if there are others: it makes ready what they use."""
    peak_memory: int
    """Most bytes held: of the GPU if there is one, else of main memory."""
    processes: int = 1
    """How many trained together."""
    bytes_per_step: int = 0
    """What each of them sent to others in an optimizer step: the adapter's gradients, in a ring."""
    sharding: str | None = None
    """How the frozen weights were cut over them; None: each had all."""
    gathered_bytes_per_step: int = 0
    """What each of them sent so that others had its parts of the frozen weights, in the passes of a step."""
    moved: Mapping[str, tuple[int, int]]
    """For each part of the adapter (lora_A, lora_B, magnitude) how many tensors training moved, of how many. All are
    finite, or there would be an error."""
    left_out: tuple[LeftOut, ...] = ()
    """What rows of the data hold and nothing is learned from, with how many rows it concerns."""
    experts: tuple[ExpertLoad, ...] = ()
    """For each layer of adapted experts which had tokens and how evenly, since the resume, if there was one."""
    objective: str = "sft"
    """What was learned: losses of all but sft are means per pair or answer."""
    figures: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """Of objectives that compare or reward answers: margins, accuracy, rewards, log-likelihoods, lengths of held-out
    rows, by TRL's names, before and after."""
    samples: tuple[Sample, ...] = ()
    """Of such: answers to a few prompts before and after."""
    stops: tuple[int, int] | None = None
    """In how many of how many answers to its own prompts the model stopped by itself; None for plain text, and where it
    was not asked."""
    model: PreTrainedModel = field(repr=False)
    """The model with its adapter, in eval mode."""
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    """Its tokenizer."""

    def to_dict(self) -> dict[str, Any]:
        """All figures and what was left out, ready for JSON."""
        figures = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("model", "tokenizer")}
        figures = {name: None if value != value else value for name, value in figures.items()}  # JSON has no NaN
        moved = {part: {"moved": moved, "of": total} for part, (moved, total) in self.moved.items()}
        return {
            **figures,
            "output": str(self.output),
            "moved": moved,
            "left_out": [asdict(part) for part in self.left_out],
            "samples": [asdict(sample) for sample in self.samples],
            "experts": [asdict(load) for load in self.experts],
        }
