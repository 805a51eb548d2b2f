"""HQQ, GPTQ, AWQ, compressed-tensors and fine-grained FP8: adapters beside the weights of the libraries' own modules.

None of these libraries is beside the tests, and the kinds of one that is not installed are left out. `make test` gives
HQQ a run of its own, and `make test-quantisers` runs them all.
"""

import copy
import importlib
import importlib.util
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import formula
from formula import F64, error
from theodora import (
    AdapterConfig,
    accelerate,
    adapter_disabled,
    inject_adapter,
    load_adapter,
    merge_adapter,
    remove_adapter,
    save_adapter,
    unmerge_adapter,
)
from theodora.adapters import quantized
from theodora.adapters.models import load_model
from theodora.errors import CheckpointError, ConfigError
from theodora.files.base_model import BaseCheckpoint
from theodora.kernels.library_weight import LibraryWeight
from theodora.kernels.packed_formats import unpacked
from theodora.layers import base_weight, cannot_adapt
from theodora.layers.base_weights import base_weight_of
from theodora.layers.libraries import prepare
from theodora.merging import merge_checkpoint
from tiny import tiny_model

IN, OUT, GROUP, RANK = 64, 96, 32, 4


def library(name):
    """A library's module, without what it says while it is imported; skips where it is not installed."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name.partition('.')[0]} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def linear(dtype=torch.float32, bias=True, shape=(OUT, IN)):
    module = nn.Linear(*shape[::-1], bias=bias)
    if bias:
        nn.init.normal_(module.bias)
    return module.to(dtype).requires_grad_(False)


# The libraries' modules, quantised by the libraries ------------------------------------------------------------------


def hqq(dtype, **options):
    quantize = library("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(**{"nbits": 4, "group_size": GROUP, **options})
    return quantize.HQQLinear(linear(), config, compute_dtype=dtype, device="cpu")


def scales_and_zeros(weight, bits):
    groups = weight.float().view(OUT, -1, GROUP)
    most, least = groups.amax(-1), groups.amin(-1)
    scale = (most - least) / (2**bits - 1)
    return scale, (-least / scale).round().clamp(0, 2**bits - 1)


def gptq(dtype, bits=4, order=False, kind=("torch", "TorchLinear")):
    found = getattr(library(f"gptqmodel.nn_modules.qlinear.{kind[0]}"), kind[1])
    module = found(bits, GROUP, False, order, IN, OUT, bias=True)
    module.optimize = lambda *_, **__: None  # it would compile with Inductor
    like = linear()
    g_idx = module.g_idx[torch.randperm(IN)] if order else module.g_idx
    module.pack_original(like, *scales_and_zeros(like.weight, bits), g_idx)
    module.post_init()
    return module


def awq(dtype):
    return _awq("torch_awq", "AwqTorchLinear")


def awq_aten(dtype):
    packed, module = awq(dtype), _awq("torch_aten_kernel_awq", "TorchAtenAwqLinear")
    for name, buffer in packed.named_buffers():
        setattr(module, name, buffer)
    return module


def _awq(file, name):
    found = getattr(library(f"gptqmodel.nn_modules.qlinear.{file}"), name)
    like, options = linear(), {"desc_act": False, "bias": True, "register_buffers": True}
    module = found(bits=4, group_size=GROUP, sym=False, in_features=IN, out_features=OUT, **options)
    if hasattr(module, "pack"):
        module.pack(like, *scales_and_zeros(like.weight, 4))
    module.post_init()
    return module


def compressed(dtype, bits=4, kind="int", symmetric=True, strategy="group", of_x=None, like=None):
    quantization = library("compressed_tensors.quantization")
    helpers = library("compressed_tensors.quantization.utils")
    group = {"group_size": GROUP} if strategy == "group" else {}
    weights = quantization.QuantizationArgs(num_bits=bits, type=kind, symmetric=symmetric, strategy=strategy, **group)
    x = None if of_x is None else quantization.QuantizationArgs(num_bits=8, type=kind, symmetric=True, **of_x)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights, input_activations=x)
    module = linear(dtype) if like is None else like.requires_grad_(False)
    library("compressed_tensors.quantization.lifecycle").initialize_module_for_quantization(module, scheme)
    groups = module.weight.view(module.out_features, -1, GROUP if group else module.in_features)
    scale, zero = helpers.calculate_qparams(groups.amin(-1), groups.amax(-1), weights)
    module.weight_scale.data = scale.to(dtype)
    module.weight_zero_point.data = zero
    if x is not None and not x.dynamic:
        module.input_scale.data.fill_(0.03)
        module.input_zero_point.data.zero_()
    module.quantization_status = quantization.QuantizationStatus.FROZEN
    library("compressed_tensors.compressors").compress_module(module)
    return module


def decompressed(dtype, **options):
    module = compressed(dtype, **options)
    library("compressed_tensors.compressors").decompress_module(module)
    return module


def float8(dtype, block=(32, 32), shape=(OUT, IN)):
    finegrained = library("transformers.integrations.finegrained_fp8")
    module = finegrained.FP8Linear(IN, OUT, block_size=block, has_bias=True)
    module.bias = nn.Parameter(torch.randn(OUT).to(dtype))
    module.weight = nn.Parameter((100 * torch.randn(OUT, IN)).to(torch.float8_e4m3fn), requires_grad=False)
    scale = torch.rand_like(module.weight_scale_inv) / 800 + 1e-4
    module.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
    return module.requires_grad_(False)


# Their weights, dequantised by the libraries, (O, I) -----------------------------------------------------------------


def of_hqq(module, dtype):
    return module.dequantize()


def of_gptq(module, dtype):
    return module.train().dequantize_weight().T.to(dtype)


def of_awq(module, dtype):
    aten = hasattr(module, "linear_mode")
    half = module.scales.dtype if aten else dtype if dtype != torch.float32 else torch.float16
    unpack = library("gptqmodel.quantization.awq.utils.packing_utils").dequantize_gemm
    return unpack(module.qweight, module.qzeros, module.scales.to(half), 4, GROUP).T.to(dtype if aten else half)


def of_compressed(module, dtype):
    module = copy.deepcopy(module)
    if module.quantization_status == "compressed":
        library("compressed_tensors.compressors").decompress_module(module)
    return module.weight.data


def of_float8(module, dtype):
    w = module.weight.to(F64)
    if module.block_size is None:
        return (w * module.weight_scale_inv.to(F64)).to(dtype)
    rows, columns = module.block_size
    scale = module.weight_scale_inv.to(F64).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return (w * scale[:OUT, :IN]).to(dtype)


@dataclass(frozen=True)
class Kind:
    make: Callable[[torch.dtype], nn.Module]
    dense: Callable[[nn.Module, torch.dtype], torch.Tensor]
    name: str
    computes: torch.dtype | None = None
    """What products are computed in, whatever x is."""


TOKEN = {"strategy": "token", "dynamic": True}
KINDS = {
    "hqq": Kind(hqq, of_hqq, "hqq 4-bit, groups of 32"),
    "hqq-8": Kind(lambda dtype: hqq(dtype, nbits=8), of_hqq, "hqq 8-bit, groups of 32"),
    "hqq-3": Kind(lambda dtype: hqq(dtype, nbits=3), of_hqq, "hqq 3-bit, groups of 32"),
    "hqq-2-columns": Kind(lambda dtype: hqq(dtype, nbits=2, axis=0), of_hqq, "hqq 2-bit, groups of 32"),
    "hqq-rows": Kind(lambda dtype: hqq(dtype, group_size=None), of_hqq, "hqq 4-bit, groups of 64"),
    "hqq-as-float": Kind(lambda dtype: hqq(dtype, view_as_float=True), of_hqq, "hqq 4-bit, groups of 32"),
    "gptq": Kind(gptq, of_gptq, "gptq 4-bit"),
    "gptq-2": Kind(lambda dtype: gptq(dtype, 2), of_gptq, "gptq 2-bit"),
    "gptq-3": Kind(lambda dtype: gptq(dtype, 3), of_gptq, "gptq 3-bit"),
    "gptq-8": Kind(lambda dtype: gptq(dtype, 8), of_gptq, "gptq 8-bit"),
    "gptq-order": Kind(lambda dtype: gptq(dtype, order=True), of_gptq, "gptq 4-bit"),
    "gptq-aten": Kind(lambda dtype: gptq(dtype, kind=("torch_aten_kernel", "TorchAtenLinear")), of_gptq, "gptq 4-bit"),
    "awq": Kind(awq, of_awq, "awq 4-bit, groups of 32", torch.float16),
    "awq-aten": Kind(awq_aten, of_awq, "awq 4-bit, groups of 32"),
    "w4a16": Kind(compressed, of_compressed, "compressed-tensors pack-quantized, 4-bit"),
    "w4a16-zeros": Kind(
        lambda dtype: compressed(dtype, symmetric=False), of_compressed, "compressed-tensors pack-quantized, 4-bit"
    ),
    "w8a16": Kind(
        lambda dtype: compressed(dtype, 8, strategy="channel"),
        of_compressed,
        "compressed-tensors pack-quantized, 8-bit",
    ),
    "w8a8": Kind(
        lambda dtype: compressed(dtype, 8, strategy="channel", of_x=TOKEN),
        of_compressed,
        "compressed-tensors int-quantized, 8-bit",
    ),
    "w8a8-static": Kind(
        lambda dtype: compressed(dtype, 8, strategy="channel", of_x={"strategy": "tensor"}),
        of_compressed,
        "compressed-tensors int-quantized, 8-bit",
    ),
    "fp8": Kind(
        lambda dtype: compressed(dtype, 8, "float", strategy="channel", of_x=TOKEN),
        of_compressed,
        "compressed-tensors float-quantized, 8-bit",
    ),
    "w8a8-decompressed": Kind(
        lambda dtype: decompressed(dtype, bits=8, strategy="channel", of_x=TOKEN),
        of_compressed,
        "compressed-tensors decompressed, 8-bit",
    ),
    "float8": Kind(float8, of_float8, "float8, blocks of 32×32"),
    "float8-odd": Kind(lambda dtype: float8(dtype, (40, 24)), of_float8, "float8, blocks of 40×24"),
    "float8-whole": Kind(lambda dtype: float8(dtype, None), of_float8, "float8, one scale"),
}
kinds = pytest.mark.parametrize("kind", KINDS)
methods = pytest.mark.parametrize("method", ["lora", "dora"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


class Model(nn.Module):
    """A layer, and something whose dtype is the model's."""

    def __init__(self, layer, dtype):
        super().__init__()
        self.proj = layer
        self.norm = nn.LayerNorm(OUT).to(dtype).requires_grad_(False)

    def forward(self, x):
        return self.proj(x)


def model_of(kind, dtype=torch.float32):
    torch.manual_seed(0)
    return Model(KINDS[kind].make(dtype), dtype)


def exact_weight(kind, model, dtype):
    return KINDS[kind].dense(copy.deepcopy(model.proj), dtype).detach().to(F64)


def injected(kind, method, dtype=torch.float32, model=None):
    """A model with a trained adapter, and the numbers of its base."""
    model = model_of(kind, dtype) if model is None else model
    w = exact_weight(kind, model, dtype)
    inject_adapter(model, AdapterConfig(method=method, rank=RANK, targets=("proj",)))
    adapter = model.proj.adapters["default"]
    with torch.no_grad():
        adapter.lora_B.normal_(0, 0.1)
        if method == "dora":
            adapter.magnitude.mul_(1 + 0.3 * torch.rand(OUT))
    return model, adapter, w


def rounded(kind, model, x):
    """x as the base's product takes it."""
    form = base_weight(model.proj).format
    if not kind.startswith(("w8a8", "fp8")):
        return x
    forward = library("compressed_tensors.quantization.lifecycle.forward")
    return forward.forward_quantize(copy.deepcopy(KINDS[kind].make(x.dtype)), x, "input", form.scheme.input_activations)


def bits(tensor):
    """Whole numbers, which no NaN among floats that are none hides."""
    return tensor.detach().clone().reshape(-1).view(torch.uint8)


def expected(kind, method, model, adapter, w, x):
    bias = model.proj.bias.detach().to(F64)
    a, b = adapter.lora_A.detach().to(F64), adapter.lora_B.detach().to(F64)
    base, x = rounded(kind, model, x).to(F64), x.detach().to(F64)
    if method == "lora":
        return formula.lora(base, w, bias, a, b, adapter.scale, x)
    return formula.dora(base, w, bias, a, b, adapter.scale, adapter.magnitude.detach().to(F64), x)


def tolerance(kind, dtype):
    """Twice the rounding of a few steps in what products are computed in."""
    return (
        1e-5 if dtype == torch.float32 and KINDS[kind].computes is None else 2e-3 if dtype == torch.float32 else 1.2e-2
    )


# One weight ----------------------------------------------------------------------------------------------------------


@kinds
@dtypes
def test_the_weight_is_the_librarys(kind, dtype):
    model = model_of(kind, dtype)
    prepare(model)
    weight = base_weight_of(model.proj)
    assert isinstance(weight, LibraryWeight)
    assert (weight.shape, weight.format.name) == ((OUT, IN), KINDS[kind].name)
    w = exact_weight(kind, model, dtype)
    assert torch.equal(weight.dense(dtype).to(F64), w)
    for at in (slice(None), slice(5, 40), slice(90, None), slice(3, 3), torch.tensor([1, 95, 4])):
        assert torch.equal(weight.rows(at).to(F64), w[at])
    assert error(weight.norm_squared(), w.square().sum(1)) < 1e-6
    a = torch.randn(RANK, IN)
    assert error(weight.times_a(a), w @ a.to(F64).T) < 1e-6
    again = weight.maker()(*weight.tensors())
    assert torch.equal(again.dense(dtype), weight.dense(dtype))
    halves = weight.split(OUT // 2)
    assert torch.equal(torch.cat([half.dense(dtype) for half in halves]), weight.dense(dtype))


@kinds
@dtypes
def test_the_product_is_the_modules_own(kind, dtype):
    if kind.startswith("float8"):
        pytest.skip("its kernel runs on GPUs alone")
    model, x = model_of(kind, dtype).eval(), torch.randn(2, 7, IN, dtype=dtype)
    if getattr(model.proj, "linear_mode", "") is None:
        model.proj.linear_mode = "train"
    prepare(model)
    if kind.startswith(("hqq", "gptq", "awq")) or "decompressed" in kind:
        y = copy.deepcopy(model)(x)
    else:  # the hook of a whole model decompresses it first
        own = copy.deepcopy(model.proj)
        library("compressed_tensors.compressors").decompress_module(own)
        y = own(x)
    inject_adapter(model, AdapterConfig(method="dora", rank=RANK, targets=("proj",)))
    assert error(model(x), y.to(F64)) <= torch.finfo(dtype).eps
    with torch.no_grad(), adapter_disabled(model):
        assert error(model(x), y.to(F64)) <= torch.finfo(dtype).eps


# Adapters beside it --------------------------------------------------------------------------------------------------


@kinds
@methods
@dtypes
def test_forward_and_backward(kind, method, dtype):
    model, adapter, w = injected(kind, method, dtype)
    x = torch.randn(3, 5, IN, dtype=dtype, requires_grad=True)
    y = model(x)
    exact_x = x.detach().to(F64).requires_grad_()
    leaves = [adapter.lora_A, adapter.lora_B, *([adapter.magnitude] if method == "dora" else [])]
    wide = [leaf.detach().to(F64).requires_grad_() for leaf in leaves]
    base = exact_x + (rounded(kind, model, x).to(F64) - x.to(F64)).detach()  # rounding lets gradients through
    bias = model.proj.bias.detach().to(F64)
    if method == "lora":
        exact = formula.lora(base, w, bias, *wide, adapter.scale, exact_x)
    else:
        exact = formula.dora(base, w, bias, wide[0], wide[1], adapter.scale, wide[2], exact_x)
    assert y.dtype == dtype
    assert error(y, exact) < tolerance(kind, dtype)
    dy = torch.randn_like(y)
    y.backward(dy)
    exact.backward(dy.to(F64))
    for found, of in zip([x, *leaves], [exact_x, *wide], strict=True):
        assert error(found.grad, of.grad) < 2 * tolerance(kind, dtype)


@kinds
def test_a_fresh_magnitude_is_the_norm_and_changes_nothing(kind):
    model = model_of(kind)
    w, x = exact_weight(kind, model, torch.float32), torch.randn(4, IN)
    inject_adapter(model, AdapterConfig(method="dora", rank=RANK, targets=("proj",)))
    assert error(model.proj.adapters["default"].magnitude, w.norm(dim=1)) < 1e-6
    with torch.no_grad(), adapter_disabled(model):
        bare = model(x)
    assert error(model(x), bare.to(F64)) < tolerance(kind, torch.float32)


@kinds
@methods
def test_merge_unmerge_remove(kind, method):
    model, adapter, w = injected(kind, method)
    model.eval()
    x = torch.randn(4, IN)
    before = [bits(tensor) for tensor in base_weight(model.proj).tensors()]
    with torch.no_grad():
        first = model(x)
    with pytest.warns(UserWarning, match="widened"):
        merge_adapter(model)
    a, b = adapter.lora_A.detach().to(F64), adapter.lora_B.detach().to(F64)
    adapted = w + adapter.scale * b @ a
    if method == "dora":
        adapted = adapter.magnitude.detach().to(F64)[:, None] * adapted / adapted.norm(dim=1, keepdim=True)
    merged = model.proj.weight
    half = merged.dtype != torch.float32
    assert type(merged) is nn.Parameter
    assert error(merged, adapted) < (1e-3 if half else 1e-6)
    with torch.no_grad():
        y = model(x)
    assert error(y, x.to(F64) @ adapted.T + model.proj.bias.to(F64)) < (2e-3 if half else 1e-5)
    unmerge_adapter(model)
    after = [bits(tensor) for tensor in base_weight(model.proj).tensors()]
    assert all(torch.equal(now, then) for now, then in zip(after, before, strict=True))
    with torch.no_grad():
        assert torch.equal(model(x), first)
    remove_adapter(model)
    assert type(model.proj) is type(KINDS[kind].make(torch.float32))
    assert torch.equal(exact_weight(kind, model, torch.float32), w)


@kinds
@methods
def test_saved_adapters_load(kind, method, tmp_path):
    model, _, _ = injected(kind, method)
    x = torch.randn(4, IN)
    save_adapter(model, tmp_path)
    other = load_adapter(model_of(kind), tmp_path)
    with torch.no_grad():
        assert torch.equal(other.eval()(x), model.eval()(x))


@kinds
def test_copies_are_apart(kind):
    model, _, _ = injected(kind, "dora")
    twin, x = copy.deepcopy(model), torch.randn(4, IN)
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))
        twin.proj.adapters["default"].lora_B.zero_()
        assert not torch.equal(twin(x), model(x))


@pytest.mark.parametrize("kind", ["hqq", "gptq", "awq", "w4a16", "w8a8", "float8"])
@methods
def test_under_autocast(kind, method):
    model, adapter, w = injected(kind, method)
    x = torch.randn(4, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        with adapter_disabled(model):
            model(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    exact = expected(kind, method, model, adapter, w, x.detach())
    assert error(y, exact) < 2e-2
    assert x.grad is not None


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpacking_is_a_stream_of_bits(bits):
    numbers = torch.randint(2**bits, (32, 3))
    stream = [sum(int(n) << (bits * i) for i, n in enumerate(column)) for column in numbers.T]
    words = torch.tensor([[(s >> (32 * i)) & 0xFFFFFFFF for s in stream] for i in range(bits)])
    signed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    assert torch.equal(unpacked(signed, bits, 32, 32).long(), numbers)


# Whole models --------------------------------------------------------------------------------------------------------


def quantised_llama(kind, dtype=torch.float32):
    """A tiny Llama whose layers are of `kind`, in place of its own."""
    model = tiny_model("llama", hidden_size=64, intermediate_size=96, head_dim=16, dtype=dtype)
    torch.manual_seed(1)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj"):
            own = KINDS[kind].make(dtype)
            own.bias = None
            setattr(layer.mlp, name, own)
    return model


WHOLE = ["hqq", "gptq", "awq", "w4a16", "w8a8", "float8"]


@pytest.mark.parametrize("kind", WHOLE)
def test_the_fast_path_gives_the_same(kind):
    ids = torch.randint(3, 200, (2, 9))
    results = []
    for fast in (False, True):
        model = quantised_llama(kind)
        torch.manual_seed(2)
        inject_adapter(model, AdapterConfig(method="dora", rank=RANK))
        for layer in model.model.layers:
            nn.init.normal_(layer.mlp.gate_proj.adapters["default"].lora_B, std=0.1)
        if fast:
            accelerate(model)
        logits = model.train()(ids).logits
        logits.square().sum().backward()
        gradient = model.model.layers[0].mlp.gate_proj.adapters["default"].lora_A.grad
        results.append((logits.detach(), gradient))
    tolerance = 1e-2 if kind in ("awq", "w8a8") else 1e-5  # (half precision; rounding of x to eight bits)
    for fast, plain in zip(*results[::-1], strict=True):
        assert error(fast, plain.to(F64)) < tolerance


@pytest.mark.parametrize("kind", WHOLE)
def test_a_merged_model_is_saved_as_a_plain_one(kind, tmp_path):
    ids = torch.randint(3, 200, (2, 9))
    model = inject_adapter(quantised_llama(kind), AdapterConfig(method="dora", rank=RANK, targets=("gate_proj",)))
    for layer in model.model.layers:
        nn.init.normal_(layer.mlp.gate_proj.adapters["default"].lora_B, std=0.1)
    with pytest.warns(UserWarning, match="widened"):
        merge_adapter(model)
    if kind == "float8":  # the library's own layers, without an adapter, run on GPUs alone
        for layer in model.model.layers:
            up = layer.mlp.up_proj
            layer.mlp.up_proj = linear(bias=False)
            layer.mlp.up_proj.weight.data = of_float8(up, torch.float32)
    with torch.no_grad():
        logits = model(ids).logits
        model.save_pretrained(tmp_path)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert type(plain.model.layers[0].mlp.gate_proj) is nn.Linear
        assert error(plain(ids).logits, logits.to(F64)) < (2e-2 if kind in ("awq", "w8a8") else 1e-5)


@pytest.mark.parametrize("kind", WHOLE)
def test_checkpoints_of_trainers_hold_the_adapter(kind):
    model = inject_adapter(quantised_llama(kind), AdapterConfig(method="dora", rank=RANK, targets=("gate_proj",)))
    state = model.state_dict()
    assert "model.layers.1.mlp.gate_proj.adapters.default.lora_A" in state


# compressed-tensors as transformers loads it -------------------------------------------------------------------------


@pytest.fixture(params=["w4a16", "w8a8", "fp8"])
def compressed_folder(request, tmp_path):
    quantization = library("compressed_tensors.quantization")
    model = tiny_model("llama", hidden_size=64, intermediate_size=96, head_dim=16)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            own = compressed_like(module, request.param)
            model.set_submodule(name, own)
    library("compressed_tensors.compressors")
    scheme = own.quantization_scheme
    config = quantization.QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=["lm_head"],
        format=scheme.format.value,
        quantization_status="compressed",
    )
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    told = {**config.model_dump(), "quant_method": "compressed-tensors"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": told}))
    return tmp_path / "model"


def compressed_like(module, kind):
    options = {
        "w4a16": {},
        "w8a8": {"bits": 8, "strategy": "channel", "of_x": TOKEN},
        "fp8": {"bits": 8, "kind": "float", "strategy": "channel", "of_x": TOKEN},
    }[kind]
    return compressed(torch.float32, like=module, **options)


def test_adapted_layers_stay_compressed(compressed_folder):
    ids = torch.randint(3, 200, (2, 9))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(compressed_folder)(ids).logits
    model = AutoModelForCausalLM.from_pretrained(compressed_folder)
    inject_adapter(model, AdapterConfig(method="dora", rank=RANK, targets=("q_proj", "down_proj")))
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        assert error(model(ids).logits, expected.to(F64)) < 1e-6
    assert mlp.down_proj.weight.dtype in (torch.int32, torch.int8, torch.float8_e4m3fn)
    assert mlp.up_proj.weight.dtype == torch.float32  # decompressed by the library, as it is used
    assert type(model.model.layers[0].input_layernorm._parameters) is dict  # and nothing else was touched
    remove_adapter(model)
    with torch.no_grad():
        assert error(model(ids).logits, expected.to(F64)) < 1e-6
    assert mlp.down_proj.weight.dtype == torch.float32


def test_a_model_that_compressed_tensors_has_taken_over_is_refused(compressed_folder):
    model = AutoModelForCausalLM.from_pretrained(compressed_folder)
    model(torch.randint(3, 200, (2, 9)))
    with pytest.raises(ConfigError, match="Put the adapter on before"):
        inject_adapter(model, AdapterConfig(rank=RANK))


GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": GROUP,
    "desc_act": False,
    "sym": False,
    "backend": "gptq_torch",
    "modules_in_block_to_quantize": [["mlp.gate_proj", "mlp.up_proj"]],
    "checkpoint_format": "gptq_v2",
}


def on_disk(model, folder, quantization):
    """A model as it is saved, with that quantization_config in its config.json; and a copy that transformers loads."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))
    return folder


def merged_onto_dequantised(folder, tmp_path, targets):
    """Merge an adapter of the model in `folder`; the report, and the logits before and after."""
    ids = torch.randint(3, 200, (2, 9))
    model = load_model(folder, adapted=True, dtype="float32")
    inject_adapter(model, AdapterConfig(method="dora", rank=RANK, targets=targets))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
        logits = model(ids).logits
        read = BaseCheckpoint(folder, dequantise=True)
        for path, module in model.named_modules():
            if path.endswith(targets):
                assert torch.equal(read.read(f"{path}.weight"), base_weight(module).dense(model.dtype)), path
    save_adapter(model, tmp_path / "adapter")
    report = merge_checkpoint(tmp_path / "adapter", tmp_path / "merged", onto="dequantised", base_model=folder)
    with torch.no_grad():
        after = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(ids).logits
    return report, logits, after


def test_compressed_tensors_merge_onto_their_numbers(compressed_folder, tmp_path):
    report, logits, after = merged_onto_dequantised(compressed_folder, tmp_path, ("q_proj", "down_proj"))
    assert len(report.layers) == 4
    assert report.layers[0].error < 1e-6
    assert report.logits.kl_mean < 1e-9 < report.logits.kl_effect
    if json.loads((compressed_folder / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized":
        assert error(after, logits.to(F64)) < 1e-5  # (the others round x, too, which is in no weight)


def test_awq_merges_onto_its_numbers(tmp_path):
    model = quantised_llama("awq")
    told = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    plain = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    told |= {"backend": "auto_trainable", "modules_to_not_convert": plain}
    folder = on_disk(model, tmp_path / "model", told)
    report, logits, after = merged_onto_dequantised(folder, tmp_path, ("gate_proj", "up_proj"))
    assert len(report.layers) == 4
    assert report.layers[0].error < 1e-6
    assert report.logits.kl_mean < 1e-9 < report.logits.kl_effect
    assert error(after, logits.to(F64)) < 2e-3


@pytest.mark.parametrize("looked", [True, False], ids=["in the folder", "as it is loaded"])
def test_gptq_whose_groups_have_no_scales_is_refused(tmp_path, monkeypatch, looked):
    library("optimum.gptq")
    model = quantised_llama("gptq")
    model.model.layers[1].mlp.up_proj.g_idx[3] = 77  # on a GPU: memory of others
    folder = on_disk(model, tmp_path / "model", GPTQ)
    if not looked:  # (a model of the hub)
        monkeypatch.setattr(quantized, "check_layout_folder", lambda folder, fields: None)
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.up_proj: its g_idx names groups from 0 to 77"):
        load_model(folder, adapted=True, dtype="float32")


def test_gptq_as_transformers_loads_it(tmp_path):
    library("optimum.gptq")
    model = quantised_llama("gptq")
    on_disk(model, tmp_path / "model", GPTQ)
    ids = torch.randint(3, 200, (2, 9))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    inject_adapter(loaded, AdapterConfig(method="dora", rank=RANK))
    assert type(loaded.model.layers[0].mlp.gate_proj).__name__ == "AdaptedTorchLinear"
    with torch.no_grad():
        assert error(loaded(ids).logits, model(ids).logits.to(F64)) < 1e-5
    report, logits, after = merged_onto_dequantised(tmp_path / "model", tmp_path, ("gate_proj", "up_proj"))
    assert report.layers[0].error < 1e-6
    assert report.logits.kl_mean < 1e-9 < report.logits.kl_effect
    assert error(after, logits.to(F64)) < 1e-5


# What cannot be adapted ----------------------------------------------------------------------------------------------


def pretended(module, name):
    """An object of a class that bears a library's name."""
    made = type(name, (nn.Module,), {"__module__": module, "forward": lambda self, x: x})()
    made.in_features, made.out_features, made.weight = IN, OUT, nn.Parameter(torch.zeros(OUT, IN), requires_grad=False)
    return made


@pytest.mark.parametrize(
    ("module", "name", "told"),
    [
        ("transformers.integrations.eetq", "EetqLinear", "EETQ.*--quantize"),
        ("transformers.integrations.bitnet", "BitLinear", "BitNet.*--quantize"),
        ("transformers.integrations.fbgemm_fp8", "FbgemmFp8Linear", r"FBGEMM.*dequantize=True"),
        ("transformers.integrations.higgs", "HiggsLinear", r"HIGGS.*model.dequantize\(\)"),
        ("transformers.integrations.mxfp4", "Mxfp4GptOssExperts", r"MXFP4.*Mxfp4Config\(dequantize=True\)"),
        ("aqlm.inference", "QuantizedLinear", "AQLM.*--quantize"),
        ("spqr_quant.inference", "QuantizedLinear", "SpQR.*--quantize"),
        ("vptq.layers.vqlinear", "VQuantLinear", "VPTQ.*--quantize"),
        ("optimum.quanto.nn.qlinear", "QLinear", "quanto.*--quantize"),
        ("gptqmodel.nn_modules.qlinear.marlin", "MarlinLinear", "MarlinLinear.*inference alone.*auto_trainable"),
    ],
)
def test_others_are_refused_by_name(module, name, told):
    model = Model(pretended(module, name), torch.float32)
    assert cannot_adapt(model.proj) is not None
    for targets in ("all-linear", ("proj",)):
        with pytest.raises(ConfigError, match=told):
            inject_adapter(model, AdapterConfig(rank=RANK, targets=targets))


def test_layers_that_are_not_ready_say_why():
    module = gptq(torch.float32)
    module.online_full_had = True
    assert "rotates its input" in cannot_adapt(module)
    module = gptq(torch.float32, kind=("torch_aten_kernel", "TorchAtenLinear")).eval()
    module(torch.randn(2, IN, dtype=torch.float16))
    assert "before the model first runs" in cannot_adapt(module)
    module = compressed(torch.float32)
    module.quantization_status = type(module.quantization_status).FROZEN
    assert "anew in each pass (it is frozen)" in cannot_adapt(module)


def test_hqq_that_is_not_ready_says_why():
    quantize = library("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=GROUP)
    module = quantize.HQQLinear(linear(), config, compute_dtype=torch.float32, device="cpu", initialize=False)
    assert "call its initialize()" in cannot_adapt(module)
    module.initialize()
    del module.meta["scale"]
    assert "quant_scale=False" in cannot_adapt(module)


def test_what_is_saved_of_hqq_loads_nowhere_and_is_refused_by_name(tmp_path):
    library("hqq.core.quantize")
    quantised_llama("hqq").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"quantised with HQQ, and transformers \S+ loads no such folder"):
        load_model(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)[1]["missing_keys"]  # (still so)
