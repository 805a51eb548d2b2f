"""TRL's SFT trainer, corrected where an adapter or an exact record needs it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PreTrainedModel
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from theodora.adapters.state import trained_tensors
from theodora.errors import ConfigError
from theodora.files.atomic import atomic_directory
from theodora.files.read_back import write_text
from theodora.kernels.cross_entropy import LossSums
from theodora.kernels.graph import GraphedStep
from theodora.layers.token_rows import is_adapted
from theodora.train.checkpoints import rotate
from theodora.train.deferred_metrics import Figures
from theodora.train.fused_loss import LEARNED, Head, SelectLearned, add_fused_loss, fused_head, fused_loss_pays
from theodora.train.graphed import batch_of, graph_inputs, graphs_pay, reads_bounds, why_no_graph
from theodora.train.guard import StepGuard
from theodora.train.loss import can_choose_positions, logits_fit, token_losses, trl_reads_logits
from theodora.train.movement import fingerprints
from theodora.train.order import SeededByEpoch
from theodora.train.out_of_memory import Pieces
from theodora.train.outcome import Outcome
from theodora.train.packed_rows import keeps_apart
from theodora.train.processes import Processes, is_spread
from theodora.train.resumed import OPTIONS_FILE, AsAsked, UseOptions
from theodora.train.step_state import RestoreUnlogged, StepState, write_unlogged
from theodora.train.wholeness import list_in_place, list_when_all_have_written

_LOGS_UNDER_WAY = 2  # steps that the host may be ahead of the figures it logs


class AdapterTrainer(SFTTrainer):
    """SFTTrainer for a model that carries one of our adapters. Differences:

    - An adapted output head trains: TRL computes the loss from `lm_head.weight` and would pass the adapter by. On CPUs
      the head's work is done at the learned positions alone.
    - On a GPU the host never waits: the loss comes from `fused_loss.py`, and what is logged is fetched while the next
      steps run, so that a line of the log is written a step or two after its own.
    - The held-out loss is the mean over tokens, not over batches, so it does not depend on the batch size. (With
      several processes a few rows may count twice: accelerate gives each of them equally many.)
    - Rows grouped by length come in the same order in a resumed run.
    - Checkpoints are written aside and renamed; magnitudes do not decay; nothing is reported home.
    """

    args: SFTConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    model: PreTrainedModel

    def __init__(self, *args: Any, kernels: str = "auto", **kwargs: Any) -> None:
        self._staging: Path | None = None
        self.resumed_from: str | None = None
        self.saved_at: int | None = None
        self._last_step: StepState | None = None
        self.fingerprints_at_end: dict[str, int] | None = None
        self._eval_nats = self._eval_tokens = 0.0
        self._parameters_that_multiply: int | None = None
        super().__init__(*args, **kwargs)
        self.processes = Processes.of(self.args)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(RestoreUnlogged(self))
        self.add_callback(UseOptions(self))
        self.options: str | None = None
        self.guard: StepGuard | None = None
        self.outcome: Outcome | None = None
        self.say: Callable[[str], None] = print
        self.pieces = Pieces(self._one_pass, self._start_step_over, lambda text: self.say(text))
        self.pieces.halves = self.processes.alone
        self.adapts_head = is_adapted(self.model.get_output_embeddings()) or not trl_reads_logits(self)
        self._plain_loss = self.args.loss_type == "nll" and self.label_smoother is None and not self.aux_loss_enabled
        if self.adapts_head and not self._plain_loss:
            raise ConfigError(
                "An adapter on the output head, or a head that TRL cannot read, trains with the plain loss alone. "
                "Leave it out of targets, or set loss_type: nll, label_smoothing_factor: 0 and router_aux_loss_coef: 0."
            )
        self._takes_positions = can_choose_positions(self.model)
        # All ways to compute the loss scale it by the tokens of all micro-batches, whatever the model itself accepts.
        self.model_accepts_loss_kwargs = True
        self._defers_logs = self.args.device.type == "cuda"
        self._logs_under_way: deque[tuple[int, float, int, Figures]] = deque()
        self.head = self._fused_head(kernels)
        if isinstance(self.head, Head):
            add_fused_loss(self.model, self.head)
        self._graphed: GraphedStep | None = None
        self.graph_replays, self.why_no_graph = 0, self._why_no_graph()
        self._reads_bounds = self.why_no_graph is not None or not self.padding_free or reads_bounds(self.model)
        self.keeps_apart = not self._reads_bounds and self._keeps_apart()
        if isinstance(self.head, Head):
            full = None if self._reads_bounds or not self.args.packing else self.args.max_length
            self.data_collator = SelectLearned(self.data_collator, full, self.keeps_apart)

    def _keeps_apart(self) -> bool:
        with self.compute_loss_context_manager():
            return keeps_apart(self.model, self.args.max_length)

    def _why_no_graph(self) -> str | None:
        if not isinstance(self.head, Head):
            return "TRL's loss"
        return why_no_graph(self) if graphs_pay(self.args.device) else f"not on {self.args.device.type}"

    def _fused_head(self, kernels: str) -> Head | str:
        """How the fused loss is to read the model's head, or why it is not used."""
        if kernels == "reference":
            return "kernels: reference"
        if not fused_loss_pays(self.args.device):
            return f"not on {self.args.device.type}"
        if not self._plain_loss:
            return "the loss is not the plain one"
        if is_spread(self):
            return "the model or its batches are spread over processes"
        return fused_head(self.model)

    @property
    def fast_notes(self) -> list[str]:
        """What there is to say about loss and steps where a fast path is reported."""
        if not isinstance(self.head, Head):
            return [f"TRL's loss ({self.head})"] if self.args.device.type == "cuda" else []
        graphs = "steps of a recurring shape as CUDA graphs"
        apart = ["attention within each packed sequence"] if self.keeps_apart else []
        return ["loss", *apart, graphs if self.why_no_graph is None else f"no CUDA graphs ({self.why_no_graph})"]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss per token: ours from the hidden states, the model's own at the learned positions, or TRL's."""
        learned = inputs.pop(LEARNED, None)
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if learned is not None:
            labels = inputs.pop("labels")
            found, tokens = model(**inputs, **{LEARNED: learned}), learned["tokens"]
            inputs["labels"] = labels
        elif self._chooses_positions(inputs["labels"]):
            mask = inputs.get("attention_mask")
            found = token_losses(model, inputs, self._takes_positions)
            tokens = inputs["input_ids"].numel() if mask is None else mask.sum()
        else:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._record(_stats(found), tokens)
        return self._mean(found, num_items_in_batch)

    def _mean(self, found: LossSums, num_items_in_batch: Tensor | int | None) -> Tensor:
        """The loss per token of the whole step."""
        items = num_items_in_batch if num_items_in_batch is not None else found.count
        loss = found.nats / torch.as_tensor(items).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The number counts the tokens of all processes, whose gradients are averaged.
            loss = loss * self.processes.count
        return loss

    def _chooses_positions(self, labels: Tensor) -> bool:
        if self.adapts_head:
            return True
        vocabulary = self.model.config.get_text_config().vocab_size
        faster = self.args.device.type == "cpu" and logits_fit(labels, vocabulary)
        return faster and self._plain_loss and self._takes_positions

    def _record(self, sums: Any, tokens: Tensor | int) -> None:
        """Keep the metrics that TRL keeps, on the device; `log` fetches them. `sums` are `_stats`."""
        mode = "train" if self.model.training else "eval"
        metrics: dict[str, list[Any]] = self._metrics[mode]
        if not self.processes.alone:
            sums = self.processes.sum(sums)
            tokens = self.processes.sum(torch.as_tensor(tokens, device=sums.device))
        entropy, correct, count = sums
        metrics["entropy"].append(entropy / count.clamp(min=1))
        metrics["mean_token_accuracy"].append(correct / count.clamp(min=1))
        if mode == "train":
            self._total_train_tokens = self._total_train_tokens + tokens
        metrics["num_tokens"] = [self._total_train_tokens]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            return SeededByEpoch(sampler, self.args.seed if self.args.data_seed is None else self.args.data_seed)
        return sampler

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; graphs do not outlive it."""
        self.resumed_from = resume_from_checkpoint or None
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self._graphed is not None:
                self.graph_replays, self.why_no_graph = self._graphed.replays, self._graphed.why_not
                self._graphed.release("training has ended")
                self._graphed = None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Also have the learning rate, decay and betas of now, which the checkpoint would put back as they were."""
        asked = AsAsked(self.optimizer, self.lr_scheduler)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            asked.put_into(self.optimizer, self.lr_scheduler)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As the base class, unless the run goes on from a checkpoint that is its end: not a step more then."""
        if self.state.global_step >= self.state.max_steps or self.has_stopped_early:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    @property
    def has_stopped_early(self) -> bool:
        """Whether held-out losses have not improved for so long that the run is to end."""
        found = [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        return any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in found)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward pass: a CUDA graph, or the base class's.

        Without `model.train()` where it is in that mode already: it walks through all modules, and adapter layers look
        at their weights for changes.
        """
        if not (model.training and self.model.training):  # a wrapper for several processes has a mode of its own
            model.train()
        model.__dict__["train"] = lambda mode=True: model
        try:
            whole = dict(inputs)  # computing a loss takes things out
            loss = self.pieces(inputs, model, num_items_in_batch)
            if self.guard is not None:
                self.guard.note(whole, loss)
            if self.outcome is not None:
                self.outcome.note(whole)
            return loss
        finally:
            model.__dict__.pop("train", None)

    def _one_pass(self, inputs: dict[str, Any], model: nn.Module, num_items_in_batch: Any) -> Tensor:
        """The forward and backward pass of a batch, or of a piece of one."""
        tensors = self._graph_inputs(inputs, num_items_in_batch)
        if tensors is None or self._graphed is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if callable(getattr(self.optimizer, "train", None)):  # some keep other weights for evaluation
            self.optimizer.train()  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        loss, sums = self._graphed(tensors)
        self._record(sums.clone(), inputs[LEARNED]["tokens"])  # the next replay writes there again
        return loss.clone()

    def _start_step_over(self) -> None:
        """Forget what the step at hand has done so far, and let go of memory."""
        if self._graphed is not None:
            self._graphed.release("batches do not fit into memory as they are")
        for parameter in self.model.parameters():
            parameter.grad = None
        if self._last_step is not None:
            self._last_step.restore_metrics_to(self)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Also let the guard look at the step, which ends here; a bad one leaves no trace."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.pieces.end_step()
        if self.guard is None or self.guard.may_be_taken(self.state.global_step + 1, grad_norm):
            if self.outcome is not None:
                self.outcome.take()
            return grad_norm
        if self.accelerator.scaler is None:  # which leaves such steps out by itself
            model.zero_grad()
        if self._last_step is not None:
            self._last_step.restore_metrics_to(self)
            self._tr_loss.copy_(self._last_step.loss)
        self._globalstep_last_logged += 1  # losses are means over the steps that were taken
        self.say(f"Step {self.state.global_step + 1} was skipped; its rows are in {self.guard.file}.")
        return None

    def _graph_inputs(self, inputs: dict[str, Any], num_items_in_batch: Any) -> dict[str, Tensor] | None:
        if self.why_no_graph is not None or not isinstance(self.head, Head):
            return None
        if self._graphed is None:
            self._graphed = GraphedStep(self._forward_backward, list(self.model.parameters()))
        return graph_inputs(self._prepare_inputs(inputs), num_items_in_batch, self.head, self._reads_bounds)

    def _forward_backward(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A training step on tensors alone: the loss, and what is recorded of it."""
        inputs, num_items_in_batch = batch_of(tensors, self.args.max_length)
        with self.compute_loss_context_manager():
            found = self.model(**inputs)
            loss = self._mean(found, num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach(), _stats(found)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As the base class counts, but walking through the parameters once."""
        if self._parameters_that_multiply is None:
            self._parameters_that_multiply = self.model.num_parameters(exclude_embeddings=True)
        return 6 * inputs["input_ids"].numel() * self._parameters_that_multiply

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """Send for the figures of this step and log those that have come; wait where something depends on them."""
        if self.guard is not None and (self.control.should_save or self.control.should_evaluate):
            self.guard.look()
        if self._defers_logs:
            if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
                self._send_for_figures(tr_loss, grad_norm, kwargs.get("learning_rate"))
                self.control.should_log = False
            control = self.control
            self._log_arrived(control.should_save or control.should_evaluate or control.should_training_stop)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        self.note_step()

    def note_step(self) -> None:
        """Take down the state at the end of a step."""
        accumulates = self.args.gradient_accumulation_steps > 1 and self.processes.alone
        self._last_step = StepState.of(self, with_random_states=accumulates)

    def _send_for_figures(self, tr_loss: Tensor, grad_norm: Any, learning_rate: float | None) -> None:
        step, metrics = self.state.global_step, self._metrics["train"]
        loss = self.processes.mean(tr_loss.clone())
        tr_loss.zero_()
        figures: dict[str, Any] = {**metrics, "loss": [loss], "grad_norm": [] if grad_norm is None else [grad_norm]}
        figures["learning_rate"] = [self._get_learning_rate() if learning_rate is None else learning_rate]
        metrics.clear()
        steps = step - self._globalstep_last_logged
        self._logs_under_way.append((step, self.state.epoch or 0.0, steps, Figures(figures)))
        self._globalstep_last_logged = step

    def _log_arrived(self, all_of_them: bool) -> None:
        """Log in order, each under its own step."""
        now = self.state.global_step, self.state.epoch or 0.0
        while self._logs_under_way:
            step, epoch, steps, figures = self._logs_under_way[0]
            if not (all_of_them or figures.ready() or len(self._logs_under_way) > _LOGS_UNDER_WAY):
                break
            self._logs_under_way.popleft()
            metrics = figures.read()
            own = {name: metrics.pop(name) for name in ("loss", "grad_norm", "learning_rate")}
            self._total_loss_scalar += own["loss"][0]
            logs = {name: values[0] for name, values in own.items() if values}
            newer = dict(self._metrics["train"])
            self._metrics["train"].clear()
            self._metrics["train"].update(metrics)
            self.state.global_step, self.state.epoch = step, epoch
            try:
                self.store_flos()
                self.log({**logs, "loss": logs["loss"] / steps})
            finally:
                self.state.global_step, self.state.epoch = now
            self._metrics["train"].update(newer)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Fetch the metrics from the device first, all at once."""
        metrics: dict[str, list[Any]] = self._metrics["train" if self.model.training else "eval"]
        metrics.update(Figures(metrics).read())
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Also add up the loss over tokens."""
        try:
            # (A copy, because the loss takes things out.)
            loss, logits, labels = super().prediction_step(model, dict(inputs), prediction_loss_only, ignore_keys)
        except torch.OutOfMemoryError:
            if self._graphed is None or not self._graphed.release("evaluation needs the memory"):
                raise
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        tokens = (inputs["labels"][..., 1:] != -100).sum().item()
        if loss is not None and tokens:
            self._eval_nats += loss.item() * tokens
            self._eval_tokens += tokens
        return loss, logits, labels

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Also replace the mean over batches by the mean over tokens."""
        self._eval_nats = self._eval_tokens = 0.0
        # A data loader draws a seed for its workers: an evaluation must not change what training draws after it.
        with torch.random.fork_rng(devices=[]):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = torch.tensor([self._eval_nats, self._eval_tokens], device=self.args.device)
        nats, tokens = self.processes.sum(sums).tolist()
        if tokens and output.metrics is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = nats / tokens
        return output

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """Also look for the best where an evaluation that a stopped run owed is made at the start of the next."""
        self.note_step()  # the step is logged already, and an evaluation may be left
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if skip_scheduler and self.state.global_step > 0:
            self._determine_best_metric(metrics, trial)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Also save what is the best so far, if the best is to be kept."""
        best = super()._determine_best_metric(metrics, trial)
        if best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return best

    def _load_best_model(self) -> None:
        """Also note where training itself ended: the best adapter may be one from before it had moved everything."""
        if self.outcome is not None:
            self.outcome.check()
        self.fingerprints_at_end = fingerprints(trained_tensors(self.model))
        super()._load_best_model()

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All but biases, norms, and DoRA's magnitudes, whose decay would shrink the base weight itself."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(".magnitude")]

    @property
    def tokens_seen(self) -> int:
        """Tokens trained on so far, prompts included, padding not."""
        return int(self._total_train_tokens)

    @tokens_seen.setter
    def tokens_seen(self, tokens: int) -> None:
        self._total_train_tokens = tokens

    @property
    def folder(self) -> Path:
        """Where checkpoints go."""
        assert self.args.output_dir is not None
        return Path(self.args.output_dir)

    def save_now(self) -> None:
        """Write a checkpoint of the last step that was finished, unless there is one."""
        step = self.state.global_step
        if not step or self.saved_at == step or self.resumed_from == str(self.folder / f"checkpoint-{step}"):
            return
        if self._last_step is not None:
            self._last_step.restore_to(self)
        self._save_checkpoint(self.model, None)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run writes a card of its own."""

    def _send_telemetry(self) -> None:
        """Nothing: TRL would tell its makers about the run."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save into a hidden sibling folder that takes its final name when it is whole; nothing that is ruined."""
        if self.outcome is not None:
            self.outcome.check()
        folder = self.folder / f"checkpoint-{self.state.global_step}"
        if not self.processes.alone:
            # Several processes write into one folder; there is no moment at which one of them could rename it.
            super()._save_checkpoint(model, trial)
            self._write_options(folder)
            list_when_all_have_written(self, folder)
            return
        with atomic_directory(folder, overwrite=True) as partial, self._writing_to(partial):
            super()._save_checkpoint(model, trial)
            inner = partial / folder.name
            self._name_best_checkpoint(folder)
            write_unlogged(self, inner)
            self._write_options(inner)
            self.state.save_to_json(str(inner / "trainer_state.json"))
            list_in_place(self, inner)
        self.saved_at = self.state.global_step
        rotate(self.folder, self.saved_at, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _write_options(self, folder: Path) -> None:
        if self.options is not None and self.processes.writes:
            write_text(folder / OPTIONS_FILE, self.options)

    def _name_best_checkpoint(self, current: Path) -> None:
        """Record the best checkpoint under its final name, not that of the folder it is written to."""
        if not self.state.best_global_step:
            return
        best = current.with_name(f"checkpoint-{self.state.best_global_step}")
        self.state.best_model_checkpoint = str(best) if best == current or best.is_dir() else None

    @contextmanager
    def _writing_to(self, folder: Path) -> Iterator[None]:
        self._staging = folder
        try:
            yield
        finally:
            self._staging = None


def _stats(found: LossSums) -> Tensor:
    """Entropy, correct and count, in float32."""
    return torch.stack([value.detach().float() for value in (found.entropy, found.correct, found.count)])
