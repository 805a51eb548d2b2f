"""The forms of one model: a model folder, an adapter on its base, a GGUF file, a running server.

`open_form` tells by a name which form it is, and loads it so that `predict` computes in float32: differences then come
from what the files hold, not from arithmetic in one precision or another.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from theodora.adapters import adapter_disabled, load_adapter
from theodora.adapters.models import best_device, load_model
from theodora.errors import CheckpointError, ConfigError, UsageError
from theodora.export.gguf_files import coarsest, load_gguf, read_gguf_header
from theodora.export.gguf_lora import put_gguf_lora_on
from theodora.export.predictions import Predictions
from theodora.export.served import SERVED_WEIGHTS, is_served, load_served, read_served
from theodora.export.server import Server, is_server
from theodora.files import safetensors
from theodora.files.adapter import read_adapter
from theodora.files.base_model import BaseCheckpoint, find_base, read_config
from theodora.files.folder import OpenFile
from theodora.files.model_folder import DTYPES, base_model_of, has_tokenizer, is_adapter_folder
from theodora.files.peft_config import check_continues_text
from theodora.files.quantised_store import quantisation_of
from theodora.files.tokenizer import load_tokenizer
from theodora.layers import AdapterLayer
from theodora.layers.libraries import inputs_unrounded
from theodora.merging.onto import Onto, find_start


@dataclass
class Form:
    """One form of a model, loaded."""

    name: str
    kind: str
    """model, adapter (PEFT's or MLX's), served, gguf, gguf-lora or server."""
    precision: str
    """One of `gguf_files.PRECISIONS`: what writing this form may have rounded to."""
    model: PreTrainedModel | None
    server: Server | None
    tokenizer: PreTrainedTokenizerBase | None
    """None for a server, and for a form whose tokenizer does not load."""
    note: str | None = None
    """What the comparison leaves out."""
    bits: str | None = None
    """Of a GGUF file in few bits: one of `gguf_files.FILE_TYPES`."""

    def predict(self, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Predictions:
        """Scores of the next token after each of `ids`."""
        if self.server is not None:
            return self.server.predict(ids, tokenizer)
        return self.predict_here(ids)

    def predict_here(self, ids: list[int]) -> Predictions:
        """The same of a form that is loaded."""
        assert self.model is not None
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([ids], device=self.model.device), use_cache=False).logits
        return Predictions(logits[0].float().cpu())

    def predict_base(self, ids: list[int]) -> Predictions | None:
        """The same without the adapter; None for a form that is no adapter on its base."""
        if self.kind not in ("adapter", "served", "gguf-lora") or self.model is None:
            return None
        with torch.no_grad(), adapter_disabled(self.model):
            logits = self.model(input_ids=torch.tensor([ids], device=self.model.device), use_cache=False).logits
        return Predictions(logits[0].float().cpu())

    def predict_unrounded(self, ids: list[int]) -> tuple[Predictions, Predictions] | None:
        """The same with and without the adapter, by layers that round no inputs; None where none would.

        LLM.int8() rounds x in each product, which moves predictions as far as a small adapter does, whatever W is.
        """
        if self.kind not in ("adapter", "served", "gguf-lora") or self.model is None:
            return None
        with inputs_unrounded(self.model) as any_would:
            base = self.predict_base(ids) if any_would else None
            return None if base is None else (self.predict_here(ids), base)


def kind_of(name: str) -> str:
    """What a name means, without loading it.

    Raises:
        CheckpointError: a file or folder that is none of the forms.
    """
    if is_server(name):
        return "server"
    path = Path(name).expanduser()
    if path.is_file():
        return "gguf-lora" if read_gguf_header(path).type == "adapter" else "gguf"
    if path.suffix == ".gguf" and not path.exists():
        raise CheckpointError(f"{name}: there is no such file.")
    if is_served(path):
        return "served"
    if is_adapter_folder(path):
        return "adapter"
    return "model"


def open_form(
    name: str,
    *,
    base_model: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    onto: Onto | None = None,
) -> Form:
    """Load a form of a model.

    Args:
        name: a model folder or hub name, an adapter folder, a .gguf file (of a model or an adapter), or the URL of an
            OpenAI-compatible server with the model's name after a #.
        base_model: for adapters that do not say what base they belong to, or say it wrong.
        dtype: to compute in. float32 tells what the files hold.
        trust_remote_code: run Python code that comes with the model.
        onto: for an adapter that was trained on a quantised base: whether it computes on the original weights, or on
            those of the training. Default: on the base that it names, as it is.

    Raises:
        CheckpointError: it does not load.
        UsageError: an adapter without a base model.
    """
    kind = kind_of(name)
    if kind == "server":
        return Form(name, kind, "unknown", None, Server(name), None)
    path = Path(name).expanduser()
    if kind == "gguf":
        header = read_gguf_header(path)
        model, tokenizer, note = load_gguf(path, dtype, base_model)
        return Form(name, kind, header.precision, _ready(model), None, tokenizer, note, header.kind)
    check_continues_text(path)
    base, quantize, note, rounded = name, None, None, None
    if kind == "adapter" and onto is not None:
        base, quantize, note, rounded = _base_of_training(name, onto, base_model)
    elif kind != "model":
        base = base_model or _base_of(name, kind)
    with quiet():
        model = load_model(
            base,
            dtype=rounded or dtype,
            trust_remote_code=trust_remote_code,
            quantize=quantize,
            compute=getattr(torch, DTYPES.get(dtype, dtype)) if rounded is not None else None,
            adapted=kind == "adapter",
        )
        if rounded is not None:
            _compute_in(model, getattr(torch, rounded), getattr(torch, DTYPES.get(dtype, dtype)))
        if kind == "adapter":
            load_adapter(model, name)
        elif kind == "gguf-lora":
            put_gguf_lora_on(model, path)
        elif kind == "served":
            load_served(model, path)
    tokenizer = _tokenizer(name if has_tokenizer(path) else base, trust_remote_code)
    precision = rounded or (_stored_precision(base) if kind == "model" else _adapter_precision(path, kind))
    if any(isinstance(layer, AdapterLayer) and layer.base_weight.rounds_input for layer in model.modules()):
        precision = "quantised"  # of the inputs, as they come
    return Form(name, kind, precision, _ready(model), None, tokenizer, note)  # pyright: ignore[reportArgumentType]


def release(form: Form) -> None:
    """Free a form's memory before the next one is loaded."""
    form.model = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice while a form is loaded."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        with redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if shown:
            enable_progress_bar()


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    return model.to(best_device()).eval()  # pyright: ignore[reportArgumentType]  (transformers wraps nn.Module.to)


def _base_of(name: str, kind: str) -> str:
    if kind == "adapter":
        return base_model_of(name)
    if kind == "served" and (base := read_served(name)[0].get("base_model")):
        return str(base)
    raise UsageError(f"{name} does not say where its base model is: name it with --base-model")


def _compute_in(model: PreTrainedModel, stored: torch.dtype, dtype: torch.dtype) -> None:
    """Widen what is not quantised from `stored`, which the quantised weights were made from, to `dtype`."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == stored and type(tensor) in (Tensor, nn.Parameter):
            tensor.data = tensor.data.to(dtype)


def _base_of_training(name: str, onto: Onto, base_model: str | None) -> tuple[str, str | None, str | None, str | None]:
    """Of the weights that an adapter is to compute on: folder or hub name, what they are quantised to, a note, and the
    dtype that they were rounded to before, if that is half a precision."""
    file = read_adapter(name)
    try:
        start = find_start(file, onto, base_model=base_model)
    except ConfigError:  # nothing was quantised
        return base_model or base_model_of(name), None, None, None
    if start.method is None:
        return start.name, None, None, None
    if onto == "original":
        note = f"{name} computes on the original weights ({start.name}), onto which the other form was merged."
        return start.name, None, note, None
    rounded = start.dtype if start.dtype != torch.float32 else None
    kind = file.trained_on.quantize if start.quantised_as is not None and file.trained_on is not None else None
    note = f"{name} computes on its base in {start.method}, as it was trained."
    return start.name, kind, note, None if rounded is None or kind is None else str(rounded).removeprefix("torch.")


def _tokenizer(name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(name, trust_remote_code=trust_remote_code)
    except CheckpointError:
        return None


def _adapter_precision(path: Path, kind: str) -> str:
    """Of the adapter's own tensors: the base is the same in both forms."""
    if kind == "gguf-lora":
        return read_gguf_header(path).precision
    weights = path / SERVED_WEIGHTS if kind == "served" else read_adapter(path).weights
    try:
        with OpenFile.at(weights) as file:
            return coarsest({tensor.kind for tensor in safetensors.read_header(file).tensors.values()})
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{weights} cannot be read: {error}") from error


def _stored_precision(name: str) -> str:
    try:
        folder = find_base(name)
        if quantisation_of(read_config(folder)) is not None:
            return "quantised"
        stored = BaseCheckpoint(folder)
    except CheckpointError:
        return "unknown"
    return coarsest({tensor.dtype for tensor in stored.tensors.values()})
