"""The frozen model of a workload: loaded, or drawn at random in any shape; quantised as it comes, if it is to be.

A random model that is quantised is built block by block: each decoder block is drawn on the device, quantised, and
only then the next one. 70 billion weights in 4 bits never take more than that, and one block in the model's dtype.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto

from theodora.adapters import quantize_base
from theodora.adapters.models import load_model, move
from theodora.adapters.quantized import loading_options
from theodora.bench.variants import Workload
from theodora.errors import CheckpointError, ConfigError
from theodora.files.classes import check_kernels
from theodora.files.model_folder import check_model_folder
from theodora.layers import libraries


def load_base(workload: Workload) -> Any:
    """The model of a workload, frozen, on its device, without a cache of keys and values."""
    model: Any = _drawn_model(workload) if wants_random_weights(workload) else _loaded_model(workload)
    model.config.use_cache = False
    return model.requires_grad_(False)


def wants_random_weights(workload: Workload) -> bool:
    """Whether weights are drawn: asked for, or the model is a bare configuration."""
    if workload.random_weights or not isinstance(workload.model, str):
        return True
    folder = Path(workload.model).expanduser()
    weights = ("*.safetensors", "*.bin", "*.gguf")
    return (folder / "config.json").is_file() and not any(any(folder.glob(pattern)) for pattern in weights)


def random_model(
    config: Any,
    *,
    dtype: torch.dtype,
    device: str,
    quantize: str | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    sharded: bool = False,
) -> Any:
    """A causal language model with random weights, frozen.

    Args:
        config: transformers' configuration.
        dtype: of the weights; of a quantised model, of those that stay plain, and of its products.
        device: where it is built.
        quantize: what the linear layers of its decoder blocks are quantised to: nf4, int8, int4, fp8, or none.
        seed: of the weights.
        trust_remote_code: run Python code that the configuration names.
        sharded: whether the weights are going to be cut over processes, which packed ones are stored for.

    Raises:
        ConfigError: the quantiser or what it takes is not there, or the blocks are not alike, so that they cannot be
            built one by one.
    """
    if quantize not in (None, "none"):
        return _quantized_by_blocks(config, dtype, device, quantize, seed, trust_remote_code, sharded)
    torch.manual_seed(seed)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.requires_grad_(False)


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The repeated blocks of a model: its longest list of modules of one class.

    Raises:
        ConfigError: it has no such list.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(Counter(map(type, m))) == 1]
    if not lists:
        raise ConfigError(f"{type(model).__name__} has no list of decoder blocks to take one by one")
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))


def _drawn_model(workload: Workload) -> Any:
    return random_model(
        _config(workload),
        dtype=getattr(torch, workload.dtype),
        device=workload.device,
        quantize=workload.quantize,
        seed=workload.seed,
        trust_remote_code=workload.trust_remote_code,
        sharded=workload.sharded,
    )


def _loaded_model(workload: Workload) -> Any:
    assert isinstance(workload.model, str)
    device = torch.device(workload.device)
    model = load_model(
        workload.model,
        dtype=workload.dtype,
        trust_remote_code=workload.trust_remote_code,
        model_kwargs={"config": _config(workload)} if workload.layers else None,
        quantize=workload.quantize,
        device=device,
        adapted=True,
    )
    model = move(model, device)
    # Weights are mapped lazily: touch each page, so that no step reads the disk. (Quantised ones have been computed.)
    plain = [p.detach() for p in model.parameters() if type(p) is nn.Parameter and p.is_floating_point()]
    assert all(p.view(-1)[::512].float().sum().isfinite() for p in plain), "weights are not finite"
    return model


def _config(workload: Workload) -> Any:
    if isinstance(workload.model, str):
        check_model_folder(workload.model)
        try:
            config = AutoConfig.from_pretrained(workload.model, trust_remote_code=workload.trust_remote_code)
            check_kernels(config, workload.model, trust_remote_code=workload.trust_remote_code)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{workload.model} has no configuration of a model: {error}") from error
    else:
        config = AutoConfig.for_model(**workload.model)
    if workload.layers:
        count = config.get_text_config().num_hidden_layers
        if workload.layers > count:
            raise ConfigError(f"layers is {workload.layers}; the model has {count}")
        _keep_layers(config.get_text_config(), workload.layers)
    return config


def _keep_layers(text: Any, count: int) -> None:
    text.num_hidden_layers = count
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:count]


# Block by block -------------------------------------------------------------------------------------------------------


def _quantized_by_blocks(
    config: Any, dtype: torch.dtype, device: str, quantize: str, seed: int, trust_remote_code: bool, sharded: bool
) -> Any:
    # What speaks against it is said before anything is built.
    options = loading_options(
        config,
        "the random model",
        quantize=quantize,
        dtype=dtype,
        compute=None,
        device=torch.device(device),
        keep=(),
        trust_remote_code=trust_remote_code,
        auto_class=AutoModelForCausalLM,
        adapted=True,
        sharded=sharded,
    )
    whole, first = config.get_text_config(), deepcopy(config)
    _keep_layers(first.get_text_config(), 1)
    model = random_model(first, dtype=dtype, device=device, seed=seed, trust_remote_code=trust_remote_code)
    text = model.config.get_text_config()
    text.num_hidden_layers = whole.num_hidden_layers
    if getattr(whole, "layer_types", None):
        text.layer_types = whole.layer_types
    blocks = decoder_blocks(model)
    kind: Any = type(blocks[0])
    quantizer = None
    if quantize != "fp8":
        quantizer = auto.AutoHfQuantizer.from_config(options["quantization_config"], pre_quantized=False)
    for index in range(whole.num_hidden_layers):
        if index:
            torch.manual_seed(seed + index)
            with torch.device(device), _default_dtype(dtype):
                try:
                    block = kind(text, index)
                except TypeError as error:
                    raise ConfigError(
                        f"The {kind.__name__} of a {type(model).__name__} cannot be built alone ({error}), so random "
                        "weights cannot be quantised block by block; expected a model folder with weights."
                    ) from error
            blocks.append(block.apply(model._init_weights).requires_grad_(False))
        if quantizer is None:
            quantize_base(model)  # passes over what is float8 already
        else:
            _quantize_block(model, blocks[index], quantizer)
    if quantizer is not None:
        model.is_quantized, model.quantization_method = True, quantizer.quantization_config.quant_method
        model.hf_quantizer = quantizer
        model = quantizer.postprocess_model(model)
        libraries.prepare(model)
    return model


def _quantize_block(model: Any, block: nn.Module, quantizer: Any) -> None:
    """Quantise the linear layers of a block of the model in place, by transformers' own operation for that library."""
    prefix = next(name for name, module in model.named_modules() if module is block)
    layers: dict[str, Any] = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    if quantizer.quantization_config.quant_method == "bitsandbytes":
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear

        replace_with_bnb_linear(block, quantization_config=quantizer.quantization_config)
    operation = quantizer.get_quantize_ops()
    for path, plain in layers.items():
        module: Any = block.get_submodule(path)
        name = f"{prefix}.{path}.weight"
        made = operation.convert({name: plain.weight.data}, model=model, full_layer_name=name, missing_keys=set[str]())
        if name in made:  # torchao's stands in the module already
            module.weight = made[name]
        if plain.bias is not None:
            module.bias = plain.bias
        module.requires_grad_(False)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
