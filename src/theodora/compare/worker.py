"""One process's part: the base model and the data once in memory, and one cell after the other on them."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from theodora.adapters import inject_adapter, remove_adapter, save_adapter
from theodora.adapters.models import load_model, move
from theodora.adapters.quantized import quantization_of
from theodora.adapters.state import trained_tensors
from theodora.autocast import computes_in_bf16
from theodora.compare.cells import Cell, Record
from theodora.compare.config import CompareConfig, is_code
from theodora.compare.material import Material, prepare, read_splits
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
from theodora.train.light import LightRunDiverged, LightSettings, Preference, train_light
from theodora.train.memory import peak_of, start_counting
from theodora.train.objectives import settings_of
from theodora.train.preference_loss import Settings
from theodora.train.reference import Reference

_CURVE_POINTS = 60  # of the training loss


class Bench:
    """The base model, the data, and how to run a cell on them. The model is as it was before, after each cell."""

    def __init__(self, config: CompareConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        splits, general = read_splits(config)
        self.bf16 = computes_in_bf16(device) if config.bf16 is None else config.bf16
        self.tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
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
        except LightRunDiverged as error:
            record.status, record.message = "diverged", str(error)
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
        self._score_general(record)

    def _train_and_score(self, cell: Cell, record: Record) -> None:
        variant = self._variants[cell.variant]
        set_seed(cell.seed)
        with self._trainable(variant) as autocast:
            record.parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            self._train(cell, variant, record, autocast)
            self._validate(cell, record)
            if cell.phase == "final":
                self._test(cell, record)
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
        inject_adapter(self.model, config)
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

    def _train(self, cell: Cell, variant: Variant, record: Record, autocast: torch.dtype | None) -> None:
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

        rows = self.material.rows(cell.data, variant.replay, cell.seed, variant.objective)
        start_counting(self.device)
        start = self._now()
        result = train_light(
            self.model,
            rows,
            settings,
            head=self.head,
            preference=self._preference(variant),
            pad_id=safe_padding(self.model, self.tokenizer),
            autocast=autocast,
            on_step=on_step if points else None,
        )
        record.train_seconds = self._now() - start - measuring
        record.peak_memory = peak_of(self.device)
        record.tokens, record.graphed_steps = result.tokens, result.graphed
        record.losses = thinned(result.losses, _CURVE_POINTS)

    def _preference(self, variant: Variant) -> Preference | None:
        """What a variant learns of pairs; None for sft."""
        if variant.objective == "sft":
            return None
        beta = {} if variant.beta is None else {"beta": variant.beta}
        options = {"model": "m", "data": "d", "output": "o", "objective": variant.objective, **beta}
        settings = settings_of(TrainConfig.from_options(options))
        assert isinstance(settings, Settings)  # (grpo is no method here)
        return Preference(settings, Reference(self.model, None) if settings.compares else None)

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
