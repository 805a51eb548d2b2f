"""TRL's SFT trainer, corrected where an adapter or an exact record needs it.

What is overridden lies in groups, one file each; every override says of which method of transformers' or TRL's, why,
and in which versions it was read. The way of a batch, which comes by each file once:

    rows
      │  SelectLearned                 fused_loss.py      collates them, and tells what the host knows of the batch;
      │  or Flatten                    flattened.py       makes one row of them
      ▼
    training_step                      trainer_steps.py   called by transformers; guard and outcome note the batch
      │  Pieces                        out_of_memory.py   whole, or in pieces if memory does not last
      ▼
    one_pass                           trainer_passes.py
      ├─ GraphedStep                   kernels/graph.py   replays forward and backward pass: no batch, only tensors
      └─ TRL's training_step
           ▼
         compute_loss                  trainer_loss.py
           ├─ Head.loss                fused_loss.py      from the hidden states, on a GPU
           ├─ token_losses             loss.py            from the model's logits at the learned positions
           └─ TRL's compute_loss

The step ends in `_get_grad_norm` (trainer_steps.py), where the guard may refuse it, and in `_maybe_log_save_evaluate`
(trainer_logs.py), from where transformers calls `_save_checkpoint` (trainer_checkpoints.py). What is counted meanwhile
lies in step_state.py.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from transformers.trainer_callback import PrinterCallback, ProgressCallback

from theodora.train.fused_loss import Head
from theodora.train.in_step import InStep
from theodora.train.out_of_memory import Pieces, few_of
from theodora.train.processes import Processes
from theodora.train.resumed import UseOptions
from theodora.train.step_state import RestoreUnlogged
from theodora.train.trainer_checkpoints import CheckpointOverrides
from theodora.train.trainer_logs import LogOverrides
from theodora.train.trainer_steps import StepOverrides


class AdapterTrainer(LogOverrides, CheckpointOverrides, StepOverrides):
    """SFTTrainer for a model that carries one of our adapters. Differences:

    - An adapted output head trains: TRL computes the loss from `lm_head.weight` and would pass the adapter by. On CPUs
      the head's work is done at the learned positions alone.
    - On a GPU the host never waits: the loss comes from `fused_loss.py`, and what is logged is fetched while the next
      steps run, so that a line of the log is written a step or two after its own.
    - The held-out loss is the mean over tokens, not over batches.
    - Rows grouped by length come in the same order in a resumed run.
    - Checkpoints are written aside and renamed; magnitudes do not decay; nothing is reported home.
    """

    def __init__(self, *args: Any, kernels: str = "auto", **kwargs: Any) -> None:
        """Take what SFTTrainer takes, and `kernels` of `TrainConfig`."""
        self.processes = Processes.here()  # which placing the model asks
        super().__init__(*args, **kwargs)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(RestoreUnlogged(self))
        self.add_callback(UseOptions(self))
        self.say = print
        self.pieces = Pieces(self.one_pass, self.start_step_over, lambda text: self.say(text))
        if self.processes.sharding is not None:
            self.pieces.in_step = InStep(self.model, self.processes, few_of, self.untraced)
        self.defers_logs = self.args.device.type == "cuda" or not self.processes.alone
        self._under_way = deque()
        self._losses = []
        self.choose_loss(kernels)
        self.choose_graphs()

    @property
    def why_at_rest(self) -> str | None:
        """Why no step could move anything, if that is known."""
        return None

    @property
    def rows_of_epoch(self) -> int:
        """Rows that an epoch goes through, packed perhaps."""
        rows: Any = self.train_dataset
        return len(rows)

    @property
    def fast_notes(self) -> list[str]:
        """What there is to say about loss and steps where a fast path is reported."""
        if not isinstance(self.head, Head):
            return [f"TRL's loss ({self.head})"] if self.args.device.type == "cuda" else []
        graphs = "steps of a recurring shape as CUDA graphs"
        if self.shapes:
            return ["loss", "rows of a batch as one", "steps as CUDA graphs"]
        bounds = ["attention within each packed sequence"] if self.sends_bounds else []
        return ["loss", *bounds, graphs if self.why_no_graph is None else f"no CUDA graphs ({self.why_no_graph})"]
