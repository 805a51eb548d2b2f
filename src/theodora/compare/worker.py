"""One process's part: the base model and the data once in memory, and one cell after the other on them."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, set_seed

from theodora.adapters import inject_adapter, remove_adapter, save_adapter
from theodora.adapters.load import load_to_train
from theodora.adapters.models import load_model, move
from theodora.adapters.quantized import quantization_of
from theodora.adapters.state import trained_tensors
from theodora.autocast import computes_in_bf16
from theodora.compare.cells import Cell, Record
from theodora.compare.config import CompareConfig, is_code
from theodora.compare.material import Material, check_rewards, policy_config, prepare, read_splits, rewards_of
from theodora.compare.methods import Variant
from theodora.config import TrainConfig
from theodora.data.vocabulary import safe_padding
from theodora.errors import ConfigError, TheodoraError
from theodora.evaluate import Scores
from theodora.evaluate.metrics import load_metric
from theodora.evaluate.questions import Questions
from theodora.evaluate.scores import LossNotFinite, score
from theodora.fastpath.accelerate import restore_model, speed_up_model
from theodora.files.tokenizer import load_tokenizer
from theodora.train.full import rounded
from theodora.train.fused_loss import fused_head
from theodora.train.grpo_loss import PolicySettings
from theodora.train.light import LightRunDiverged, LightSettings, Preference, train_light
from theodora.train.light_policy import Policy, judge, train_policy
from theodora.train.memory import peak_of, start_counting
from theodora.train.objectives import settings_of
from theodora.train.preference_loss import Settings
from theodora.train.reference import Reference
from theodora.train.rollouts import OutputNotFinite

_CURVE_POINTS = 60  # of the training loss


class Bench:
    """The base model, the data, and how to run a cell on them. The model is as it was before, after each cell."""

    def __init__(self, config: CompareConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        splits, general = read_splits(config, with_rewards=False)  # which come next
        self.rewards = rewards_of(config, device)
        self.bf16 = computes_in_bf16(device) if config.bf16 is None else config.bf16
        self.tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
        if self.rewards is not None:
            check_rewards(self.rewards, splits, self.tokenizer)
        loaded = load_model(
            config.model,
            dtype="bfloat16" if self.bf16 else "float32",
            trust_remote_code=config.trust_remote_code,
            quantize=config.quantize,
            device=device,
            adapted=True,
        )
        stored = quantization_of(loaded)
        if stored is not None and any(variant.adapter is None for variant in config.variants):
            raise ConfigError(
                f"{config.model} is quantised ({stored.name}), and a method (full) trains weights themselves. "
                "Leave it out, or name the model of plain weights."
            )
        self.model: Any = move(loaded, device).eval()
        self.model.requires_grad_(False)
        if self.model.generation_config is not None:
            self.model.generation_config.use_cache = True
        self.head = fused_head(self.model)
        self.material: Material = prepare(config, splits, general, self.model, self.tokenizer)
        self._trains_all = False
        self._variants = {variant.key: variant for variant in config.variants}

    def run(self, cell: Cell) -> Record:
        """Run a cell. What goes wrong in it stands in the record."""
        record = Record.of(cell, self.config)
        record.device = device_name(self.device)
        start = time.perf_counter()
        try:
            if cell.phase == "base":
                self._score_base(record)
            else:
                self._train_and_score(cell, record)
        except (LightRunDiverged, OutputNotFinite) as error:
            record.status, record.message = "diverged" if cell.phase != "base" else "failed", str(error)
        except LossNotFinite as error:
            # The base model has not been trained here: it came so.
            record.status = "failed" if cell.phase == "base" else "diverged"
            record.message = str(error) if cell.phase == "base" else f"Training diverged: {error}"
        except (torch.OutOfMemoryError, MemoryError) as error:
            record.status, record.message = "out of memory", str(error).splitlines()[0] if str(error) else "main memory"
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # how torch says it of main memory
                record.status, record.message = "failed", f"{type(error).__name__}: {error}"
            else:
                record.status, record.message = "out of memory", str(error).splitlines()[0]
        except TheodoraError as error:
            record.status, record.message = "failed", str(error)
        record.seconds = time.perf_counter() - start
        if record.status == "out of memory":
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return record

    def _score_base(self, record: Record) -> None:
        for name, task in self.material.tasks.items():
            record.sizes[name] = task.sizes
            scores = self._score(name, task.test)
            record.other_losses[name] = scores.loss
            if (value := score_of(scores)) is not None:
                record.other_scores[name] = value
            self._judge(name, record, None)
        self._score_general(record)

    def _train_and_score(self, cell: Cell, record: Record) -> None:
        variant = self._variants[cell.variant]
        set_seed(cell.seed)
        with self._trainable(variant) as autocast:
            record.parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            reference = self._reference(variant)
            self._train(cell, variant, record, autocast, reference)
            self._validate(cell, record)
            if cell.phase == "final":
                self._test(cell, record)
                self._judge(cell.data, record, reference)
                if self.config.keep_adapters and variant.adapter is not None:
                    save_adapter(self.model, Path(self.config.output) / "adapters" / cell.key)

    @contextmanager
    def _trainable(self, variant: Variant) -> Iterator[torch.dtype | None]:
        """The model with what the variant trains; afterwards without. Yields the dtype of autocast, if any."""
        config = variant.adapter
        if config is None:
            with full_weights(self.model):
                self._trains_all = True
                try:
                    yield torch.bfloat16 if self.bf16 else None
                finally:
                    self._trains_all = False
            return
        if variant.from_adapter is None:
            inject_adapter(self.model, config)
        else:
            load_to_train(self.model, variant.from_adapter, dropout=config.dropout, dtype=config.adapter_dtype)
        try:
            if variant.trains:
                for name, tensor in trained_tensors(self.model).items():
                    tensor.requires_grad_(name.endswith(tuple(f".{part}" for part in variant.trains)))
            if self.device.type == "cuda":
                speed_up_model(self.model)
            yield None
        finally:
            restore_model(self.model)
            remove_adapter(self.model)

    def _reference(self, variant: Variant) -> Reference | None:
        """What answers are compared with, as it is before training: the base model, or the adapter gone on from."""
        place = variant.from_adapter
        return None if variant.adapter is None else Reference(self.model, place, place)

    def _train(
        self,
        cell: Cell,
        variant: Variant,
        record: Record,
        autocast: torch.dtype | None,
        reference: Reference | None,
    ) -> None:
        config = self.config
        settings = LightSettings(
            steps=config.steps,
            batch_size=config.batch_size,
            learning_rate=cell.learning_rate,
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_steps=config.warmup_steps,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            seed=cell.seed,
            b_ratio=variant.b_ratio,
        )
        points = config.curve_points if cell.phase == "final" else 0
        watched = {round(config.steps * (i + 1) / points) for i in range(points)}
        measuring = 0.0

        def on_step(step: int) -> None:
            nonlocal measuring
            if step in watched:
                begun = self._now()
                record.curve.append((step, self._loss(self.material.tasks[cell.data].curve)))
                measuring += self._now() - begun

        shared: dict[str, Any] = {
            "head": self.head,
            "pad_id": safe_padding(self.model, self.tokenizer),
            "on_step": on_step if points else None,
        }
        start_counting(self.device)
        start = self._now()
        # As in `theodora train`: dropout would be noise wherever answers are compared.
        with nullcontext() if variant.objective == "sft" else without_dropout(self.model):
            if variant.objective == "grpo":
                policy = self._policy(cell, variant, reference)
                result = train_policy(self.model, policy, settings, tokenizer=self.tokenizer, **shared)
            else:
                rows = self.material.rows(cell.data, variant.replay, cell.seed, variant.objective)
                preference = self._preference(variant, reference)
                result = train_light(self.model, rows, settings, preference=preference, autocast=autocast, **shared)
        record.train_seconds = self._now() - start - measuring
        record.peak_memory = peak_of(self.device)
        record.tokens, record.drawn, record.graphed_steps = result.tokens, result.drawn, result.graphed
        record.losses = thinned(result.losses, _CURVE_POINTS)

    def _policy(self, cell: Cell, variant: Variant, reference: Reference | None) -> Policy:
        """What a variant of objective grpo learns from."""
        settings = settings_of(policy_config(self.config, self.config.data[cell.data], variant))
        prompts, rewards = self.material.tasks[cell.data].asked, self.rewards
        assert isinstance(settings, PolicySettings)
        assert prompts is not None
        assert rewards is not None
        own = variant.reward_weights
        weights = torch.tensor(own, dtype=torch.float64) if own else rewards.weights
        return Policy(settings=settings, prompts=prompts, rewards=rewards, weights=weights, reference=reference)

    def _judge(self, data: str, record: Record, reference: Reference | None) -> None:
        """Have the model answer test prompts, and note what that is worth."""
        prompts = self.material.tasks[data].judged
        if prompts is None or self.rewards is None:
            return
        with self._as_served():
            found = judge(
                self.model,
                prompts,
                self.rewards,
                self.tokenizer,
                head=self.head,
                most=self.config.data[data].max_new_tokens,
                rows=self.config.eval_batch_size,
                reference=reference,
                pad_id=safe_padding(self.model, self.tokenizer),
            )
        functions = {f"rewards/{name}": value for name, value in found.rewards.items()}
        kl = {} if found.kl is None else {"kl": found.kl}
        record.judged[data] = {"reward": found.reward, **functions, "length": found.length, **kl}

    def _preference(self, variant: Variant, reference: Reference | None) -> Preference | None:
        """What a variant learns of pairs; None for sft."""
        if variant.objective == "sft":
            return None
        beta = {} if variant.beta is None else {"beta": variant.beta}
        options = {"model": "m", "data": "d", "output": "o", "objective": variant.objective, **beta}
        settings = settings_of(TrainConfig.from_options(options))
        assert isinstance(settings, Settings)
        return Preference(settings, reference if settings.compares else None)

    def _validate(self, cell: Cell, record: Record) -> None:
        scores = self._score(cell.data, self.material.tasks[cell.data].validation)
        record.validation_score, record.validation_loss = score_of(scores), scores.loss

    def _test(self, cell: Cell, record: Record) -> None:
        scores = self._score(cell.data, self.material.tasks[cell.data].test)
        record.score, record.loss = score_of(scores), scores.loss
        self._score_general(record)
        for name, task in self.material.tasks.items():
            if name != cell.data and task.other is not None:
                other = self._score(name, task.other)
                record.other_losses[name] = other.loss
                if (value := score_of(other)) is not None:
                    record.other_scores[name] = value

    def _score_general(self, record: Record) -> None:
        if self.material.general is not None:
            record.general_loss = self._loss(self.material.general)

    def _loss(self, asked: Questions) -> float:
        size = self.config.eval_batch_size
        with self._as_served():
            return score(self.model, self.tokenizer, asked, batch_size=size, exact_match=False).loss

    def _score(self, data: str, asked: Questions) -> Scores:
        wanted = self.config.data[data]
        own = {wanted.score.rpartition(":")[2]: load_metric(wanted.score)} if is_code(wanted.score) else None
        with self._as_served():
            return score(
                self.model,
                self.tokenizer,
                asked,
                batch_size=self.config.eval_batch_size,
                max_new_tokens=wanted.max_new_tokens,
                exact_match=wanted.score == "exact-match",
                f1=wanted.score == "f1",
                metrics=own,
            )

    @contextmanager
    def _as_served(self) -> Iterator[None]:
        """Weights that were trained wider than the base are scored in the base's dtype, as they would be saved."""
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        with rounded(self.model, dtype) if self._trains_all else nullcontext():
            yield

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@contextmanager
def full_weights(model: PreTrainedModel) -> Iterator[None]:
    """All weights trained, on float32 copies; afterwards the model has its own tensors again, untouched.

    A parameter stays the same object, so that ties and names are as they were.
    """
    before = {parameter: parameter.data for parameter in model.parameters()}
    try:
        for parameter, data in before.items():
            if data.is_floating_point():
                parameter.data = data.to(torch.promote_types(data.dtype, torch.float32), copy=True)
                parameter.requires_grad_(True)
        yield
    finally:
        for parameter, data in before.items():
            parameter.requires_grad_(False)
            parameter.grad = None
            parameter.data = data


@contextmanager
def without_dropout(model: PreTrainedModel) -> Iterator[None]:
    """No module drops anything while it lasts."""
    before = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    try:
        for module in before:
            module.p = 0.0
        yield
    finally:
        for module, p in before.items():
            module.p = p


def score_of(scores: Scores) -> float | None:
    """The score that a data set asked for; None where it is the loss alone."""
    own = next(iter(scores.metrics.values()), None)
    return next((v for v in (scores.label_accuracy, scores.exact_match, scores.token_f1, own) if v is not None), None)


def thinned(values: list[float], points: int) -> list[tuple[int, float]]:
    """At most `points` means of neighbouring values, each at the last of its steps."""
    size = -(-len(values) // points)
    parts = ((at, values[at : at + size]) for at in range(0, len(values), size))
    return [(at + len(part), sum(part) / len(part)) for at, part in parts]


def device_name(device: torch.device) -> str:
    """What runs, for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
