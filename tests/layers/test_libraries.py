"""Base weights that bitsandbytes and torchao store, against float64 on the dequantised weight. A new kind is one entry
of KINDS."""

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import formula
from formula import F64
from theodora import (
    AdapterConfig,
    ConfigError,
    adapter_disabled,
    inject_adapter,
    load_adapter,
    merge_adapter,
    remove_adapter,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)
from theodora.kernels.base_weight import PlainWeight, dora_norms, products
from theodora.kernels.library_weight import LibraryWeight
from theodora.layers import AdapterLayer, base_weight, cannot_adapt
from theodora.layers.base_weights import Unfit, base_weight_of
from theodora.layers.libraries import prepare, why_not_captured

bnb = pytest.importorskip("bitsandbytes")
ao = pytest.importorskip("torchao.quantization")

IN, OUT, RANK = 64, 96, 4
BF16 = torch.bfloat16


def bits4(table="nf4", double=False, compute=None, inputs=IN, outputs=OUT, storage=torch.uint8):
    linear = nn.Linear(inputs, outputs)
    options = {"quant_type": table, "compress_statistics": double, "compute_dtype": compute, "quant_storage": storage}
    module = bnb.nn.Linear4bit(inputs, outputs, **options)
    module.load_state_dict(linear.state_dict())
    return module.to("cpu")  # which quantises


def bits8(threshold=6.0):
    module = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=threshold)
    module.load_state_dict(nn.Linear(IN, OUT).state_dict())
    return module.to("cpu")


def torchao(config):
    net = nn.Sequential(nn.Linear(IN, OUT))
    ao.quantize_(net, config)
    return net[0]


@dataclass(frozen=True)
class Kind:
    """One way to store a weight."""

    make: Callable[[], nn.Module]
    name: str
    rounding: float = 1e-6
    """The relative error of its products."""
    inputs: int = IN
    compute: torch.dtype = torch.float32
    inner: int = 2
    """Plain tensors that it is made of."""


KINDS = {
    "nf4": Kind(bits4, "bitsandbytes nf4"),
    "nf4 double": Kind(lambda: bits4(double=True), "bitsandbytes nf4, double quantised", inner=5),
    "fp4": Kind(lambda: bits4("fp4"), "bitsandbytes fp4"),
    "fp4 double": Kind(lambda: bits4("fp4", double=True), "bitsandbytes fp4, double quantised", inner=5),
    "nf4 in bfloat16": Kind(
        lambda: bits4(double=True, compute=BF16), "bitsandbytes nf4, double quantised", 1e-2, inner=5, compute=BF16
    ),
    "nf4 of odd rows": Kind(
        lambda: bits4(double=True, inputs=40), "bitsandbytes nf4, double quantised", inputs=40, inner=5
    ),
    "nf4 stored as bfloat16": Kind(lambda: bits4(storage=BF16), "bitsandbytes nf4"),
    "int8": Kind(bits8, "bitsandbytes int8"),
    "int8 without threshold": Kind(lambda: bits8(0.0), "bitsandbytes int8"),
    "torchao int8": Kind(lambda: torchao(ao.Int8WeightOnlyConfig()), "torchao Int8Tensor", inner=3),
    "torchao float8": Kind(lambda: torchao(ao.Float8WeightOnlyConfig()), "torchao Float8Tensor"),
    "torchao int4": Kind(
        lambda: torchao(ao.IntxWeightOnlyConfig(weight_dtype=torch.int4)),
        "torchao IntxUnpackedToInt8Tensor (int4)",
        inner=3,
    ),
    "torchao int8, dynamic": Kind(
        lambda: torchao(ao.Int8DynamicActivationInt8WeightConfig()), "torchao Int8Tensor", 0.05, inner=3
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS)
methods = pytest.mark.parametrize("method", ["dora", "lora"])


def module_of(kind):
    module = KINDS[kind].make().requires_grad_(False).train()
    nn.init.normal_(module.bias)
    prepare(module)
    return module


def exact_of(kind, module):
    """The numbers of the weight by the library's definition, (O, I), float64, rounded to the compute dtype."""
    w = module.weight
    if isinstance(module, bnb.nn.Linear4bit):
        state = w.quant_state
        absmax = state.absmax.double()
        if state.nested:
            absmax = state.state2.code.double()[state.absmax.long()]
            each = state.state2.absmax.double().repeat_interleave(state.state2.blocksize)[: len(absmax)]
            absmax = absmax * each + state.offset.double()
        packed = w.data.view(torch.uint8).flatten().long()
        numbers = state.code.double()[torch.stack([packed >> 4, packed & 15], 1).flatten()]
        exact = (numbers * absmax.repeat_interleave(state.blocksize)[: len(numbers)]).view(state.shape)
    elif isinstance(module, bnb.nn.Linear8bitLt):
        scale = module.state.SCB if w.SCB is None else w.SCB
        exact = w.data.double() * scale.double()[:, None] / 127
    else:
        exact = (w.qdata.double() - getattr(w, "zero_point", torch.zeros(1)).double()) * w.scale.double()
    return exact.float().to(KINDS[kind].compute).double()


def weight_of(kind):
    module = module_of(kind)
    weight = base_weight_of(module)
    assert isinstance(weight, LibraryWeight)
    return weight, exact_of(kind, module)


def factors(kind):
    a, b = torch.randn(RANK, KINDS[kind].inputs) / IN**0.5, 0.3 * torch.randn(OUT, RANK)
    return a, b


@kinds
def test_what_it_says_of_itself(kind):
    weight, exact = weight_of(kind)
    assert weight.shape == exact.shape == (OUT, KINDS[kind].inputs)
    assert weight.stored == "library"
    assert weight.format.name == KINDS[kind].name
    assert weight.dtype == KINDS[kind].compute
    assert weight.device.type == "cpu"
    assert weight.plain() is None
    assert len(weight.watched()) == KINDS[kind].inner
    assert all(type(t) in (torch.Tensor, nn.Parameter) for t in weight.watched())
    assert hash(weight.format) == hash(copy.copy(weight.format))
    for dtype in (torch.float32, BF16):
        assert weight.takes(dtype)
        assert weight.to(dtype).product(torch.ones(2, exact.shape[1], dtype=dtype)).dtype == dtype


@kinds
def test_its_numbers(kind):
    weight, exact = weight_of(kind)
    assert weight.dense().dtype == KINDS[kind].compute
    assert formula.error(weight.dense(), exact) < 2e-7
    assert formula.error(weight.dense(F64), exact) < 2e-7
    assert formula.error(weight.dense(BF16), exact) < 4e-3
    some = torch.arange(OUT) % 3 == 1
    for at in (slice(None), slice(5, 9), slice(64, None), slice(7, 7), some, some.nonzero()[:, 0]):
        assert weight.rows(at).dtype == torch.float32
        assert torch.equal(weight.rows(at), weight.dense(torch.float32)[at])
    parts = weight.split(OUT // 3)
    assert [part.shape for part in parts] == [(OUT // 3, exact.shape[1])] * 3
    assert torch.equal(torch.cat([part.dense() for part in parts]), weight.dense())
    inner = [half for part in parts for half in part.split(OUT // 6)]
    assert torch.equal(torch.cat([part.dense() for part in inner]), weight.dense())
    x = torch.randn(5, exact.shape[1])
    exactly = KINDS[kind].rounding
    assert formula.error(torch.cat([part.product(x) for part in parts], 1), x.double() @ exact.T) < exactly


@kinds
def test_products_and_their_backward(kind):
    weight, exact = weight_of(kind)
    x, dz = torch.randn(2, 5, exact.shape[1]), torch.randn(5, OUT)
    bias, rounding = torch.randn(OUT), KINDS[kind].rounding
    z, dx = x.double() @ exact.T, dz.double() @ exact
    assert formula.error(weight.product(x), z) < rounding
    assert formula.error(weight.product(x, bias), z + bias) < rounding
    assert formula.error(weight.product_backward(dz), dx) < rounding
    onto = torch.randn(5, exact.shape[1])
    expected = onto.double() + dx
    assert formula.error(weight.product_backward(dz, onto), expected) < rounding
    assert weight.product(x[:0]).shape == (0, 5, OUT)
    both = products(x, [weight, PlainWeight(torch.randn(3, exact.shape[1])), weight])
    assert torch.equal(both[0], weight.product(x))


@kinds
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_products_are_the_modules_own_to_the_bit(kind, training, dtype):
    torch.set_default_dtype(dtype if "torchao" in kind else torch.float32)
    try:
        module = module_of(kind).train(training)
    finally:
        torch.set_default_dtype(torch.float32)
    x = torch.randn(3, 5, KINDS[kind].inputs).to(dtype)
    x[1, 2, 7] = 9  # beyond the threshold of int8
    with torch.no_grad():
        own = module(x)
        assert torch.equal(base_weight(module).product(x, module.bias), own)


@kinds
def test_norms(kind):
    (weight, exact), (a, b) = weight_of(kind), factors(kind)
    assert formula.error(weight.norm_squared(), exact.square().sum(1)) < 1e-6
    assert formula.error(weight.times_a(a), exact @ a.double().T) < 1e-6
    norm, norm_sq = (exact + 0.7 * b.double() @ a.double()).norm(dim=1), weight.norm_squared()
    assert formula.error(weight.dora_norm(a, b, 0.7, norm_sq), norm) < 1e-6
    together = dora_norms([weight] * 2, torch.stack([a] * 2), torch.stack([b] * 2), 0.7, torch.stack([norm_sq] * 2))
    assert formula.error(together, torch.stack([norm] * 2)) < 1e-6


@pytest.mark.parametrize("double", [False, True])
def test_the_scales_of_some_blocks_are_a_tensor_of_their_own(double):
    """bitsandbytes' kernels read a few numbers more, which must not lie behind the end of a larger tensor."""
    weight = base_weight(bits4(double=double))
    whole = weight.format._absmax(weight._tensors)
    some = weight.format._absmax(weight._tensors, 3, len(whole))
    assert torch.equal(some, whole[3:])
    assert some.untyped_storage().nbytes() == 4 * len(some)


@kinds
def test_a_norm_is_summed_over_some_rows_at_a_time(kind, monkeypatch):
    weight, exact = weight_of(kind)
    monkeypatch.setattr("theodora.functional._PIECE", 5 * exact.shape[1])
    assert formula.error(weight.norm_squared(), exact.square().sum(1)) < 1e-6
    assert formula.error(weight.times_a(factors(kind)[0].fill_(1)), exact.sum(1, keepdim=True).expand(-1, RANK)) < 1e-5


@kinds
def test_a_weight_is_made_again_of_its_tensors_alone(kind):
    weight, _ = weight_of(kind)
    other = weight.maker()(*[t.detach().clone() for t in weight.tensors()])
    assert torch.equal(other.dense(), weight.dense())
    assert other.format == weight.format


@kinds
def test_gradients_go_around_it(kind):
    weight, exact = weight_of(kind)
    assert formula.goes_around(weight, exact, *factors(kind), max(1e-5, KINDS[kind].rounding))


# As modules ----------------------------------------------------------------------------------------------------------


def adapted(kind, method="dora", moved=True, **config):
    net = nn.Sequential(module_of(kind))
    inject_adapter(net, AdapterConfig(method=method, rank=RANK, targets=("0",), **config))
    with torch.no_grad():
        for parameter in net[0].adapters["default"].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if moved else 0)
    return net


def inputs(kind, dtype=torch.float32):
    return torch.randn(2, 5, KINDS[kind].inputs, dtype=dtype)


def exactly(net, kind, x):
    """The adapted layer by the formula."""
    layer, exact = net[0], base_weight(net[0]).dense(F64)
    adapter = layer.adapters["default"]
    values = x.double(), exact, layer.bias.double(), adapter.lora_A.double(), adapter.lora_B.double(), adapter.scale
    return formula.lora(*values) if adapter.magnitude is None else formula.dora(*values, adapter.magnitude.double())


@kinds
@methods
@pytest.mark.parametrize("init", ["default", "pissa"])
@pytest.mark.parametrize("training", [True, False])
def test_a_fresh_adapter_changes_nothing_to_the_bit(kind, method, init, training):
    net = nn.Sequential(module_of(kind)).train(training)
    x = inputs(kind)
    with torch.no_grad():
        before = net(x)
        inject_adapter(net, AdapterConfig(method=method, rank=RANK, targets=("0",), init=init))
        assert torch.equal(net(x), before)
        with adapter_disabled(net):
            assert torch.equal(net(x), before)
    assert torch.equal(net(x), before)
    if method == "dora":
        rows = base_weight(net[0]).dense(F64).norm(dim=1)
        assert formula.error(net[0].adapters["default"].magnitude, rows) < 1e-6
    with torch.no_grad():
        remove_adapter(net)
        assert torch.equal(net(x), before)


@kinds
@methods
def test_an_adapted_layer(kind, method):
    net, x = adapted(kind, method), inputs(kind).requires_grad_()
    y, rounding = net(x), max(1e-5, KINDS[kind].rounding)
    x64 = x.detach().double().requires_grad_()
    exact = exactly(net, kind, x64)
    assert formula.error(y, exact) < rounding
    parameters = list(net[0].adapters["default"].parameters())
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *parameters], dy)
    wanted = torch.autograd.grad(exact, [x64, *parameters], dy.double())
    assert len(parameters) == (3 if method == "dora" else 2)
    assert all(formula.error(f, w) < rounding for f, w in zip(found, wanted, strict=True))
    assert not net[0].weight.requires_grad


@kinds
@methods
@pytest.mark.filterwarnings("ignore:The adapter was merged into a base in:UserWarning")
def test_merging_and_back(kind, method):
    net, x = adapted(kind, method).eval(), inputs(kind)
    with torch.no_grad():
        before, exact = net(x), exactly(net, kind, x)
    own, state = net[0].weight, net.state_dict()
    base = base_weight(net[0]).dense()
    merge_adapter(net)
    assert base_weight_of(net[0]).stored == "plain"
    assert net[0].weight.dtype == KINDS[kind].compute
    assert torch.equal(base_weight(net[0]).dense(), base)
    assert formula.error(net(x), exact) < max(1e-5, 1e-2 if KINDS[kind].compute == BF16 else 0)
    if "torchao" not in kind:  # (whose layer is torch's)
        assert net(x.to(BF16)).dtype == BF16
    merged = net.state_dict()
    assert {key for key in merged if "adapters" not in key} == {"0.weight", "0.bias"}
    assert torch.equal(merged["0.weight"], net[0].weight)
    with torch.no_grad(), adapter_disabled(net):
        assert net[0].weight is own
    assert base_weight_of(net[0]).stored == "plain"
    unmerge_adapter(net)
    assert net[0].weight is own
    with torch.no_grad():
        assert torch.equal(net(x), before)
    assert net.state_dict().keys() == state.keys()


@kinds
def test_merging_says_that_the_result_is_the_quantised_one(kind):
    net = adapted(kind)
    with pytest.warns(UserWarning, match="merged into a base in") as told:
        merge_adapter(net)
    message = str(told[0].message)
    assert KINDS[kind].name in message
    assert f"widened to {str(KINDS[kind].compute).removeprefix('torch.')}" in message


@kinds
def test_saving_loading_and_switching(kind, tmp_path):
    net, x = adapted(kind).eval(), inputs(kind)
    with torch.no_grad():
        y = net(x)
        save_adapter(net, tmp_path / "a")
        set_adapter(net, None)
        base = net(x)
        load_adapter(net, tmp_path / "a", "again")
        assert torch.equal(net(x), y)
        set_adapter(net, None)
        assert torch.equal(net(x), base)
        set_adapter(net, "default")
        assert torch.equal(net(x), y)


@kinds
def test_copies_and_moves_keep_its_numbers(kind):
    net, x = adapted(kind), inputs(kind)
    with torch.no_grad():
        y, exact = net(x), base_weight(net[0]).dense()
    for other in (copy.deepcopy(net), copy.deepcopy(net).to("cpu")):
        assert torch.equal(base_weight(other[0]).dense(), exact)
        assert base_weight(other[0]).watched()[0].data_ptr() != base_weight(net[0]).watched()[0].data_ptr()
        with torch.no_grad():
            assert torch.equal(other(x), y)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "torchao" not in kind])
def test_pickled_whole(kind):
    """Torch forgets the class of the weight, and the module knows what it was."""
    net, x = adapted(kind), inputs(kind)
    stream = io.BytesIO()
    torch.save(net, stream)
    stream.seek(0)
    other = torch.load(stream, weights_only=False)
    with torch.no_grad():
        assert torch.equal(other(x), net(x))


@kinds
def test_a_state_dict_is_the_librarys_own(kind):
    module = module_of(kind)
    keys = set(module.state_dict())
    net = nn.Sequential(module)
    inject_adapter(net, AdapterConfig(rank=RANK, targets=("0",)))
    assert {key.removeprefix("0.") for key in net.state_dict() if "adapters" not in key} == keys


@kinds
def test_under_autocast(kind):
    net, x = adapted(kind), inputs(kind)
    with torch.autocast("cpu", dtype=BF16):
        y = net(x)
        y.sum().backward()
    assert y.dtype == BF16
    assert formula.error(y, exactly(net, kind, x)) < 0.05


@kinds
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(kind, reentrant):
    net, x = adapted(kind), inputs(kind).requires_grad_()
    parameters = [x, *net[0].adapters["default"].parameters()]
    wanted = torch.autograd.grad(net(x).square().sum(), parameters)
    torch.utils.checkpoint.checkpoint(net, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(p.grad, w) for p, w in zip(parameters, wanted, strict=True))


# One of each format; those of the same one differ in numbers alone.
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in ("nf4 double", "int8", "torchao int8") else pytest.mark.long)
        for kind in KINDS
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_under_compile(kind):
    net, x = adapted(kind), inputs(kind)
    torch.compiler.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    parameters = list(net[0].adapters["default"].parameters())
    found, wanted = (torch.autograd.grad(call(x).square().sum(), parameters) for call in (compiled, net))
    assert all(formula.error(f, w) < 1e-4 for f, w in zip(found, wanted, strict=True))


@kinds
def test_saved_tensors_may_be_moved(kind):
    net, x = adapted(kind), inputs(kind).requires_grad_()
    parameters = [x, *net[0].adapters["default"].parameters()]
    wanted = torch.autograd.grad(net(x).square().sum(), parameters)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        y = net(x)
    assert all(
        torch.equal(f, w) for f, w in zip(torch.autograd.grad(y.square().sum(), parameters), wanted, strict=True)
    )


@kinds
def test_a_weight_that_is_written_to_is_noticed(kind):
    """As a plain one's is: its norm is summed anew, and a backward pass that would need the old one is refused."""
    net, x = adapted(kind).train(), inputs(kind)
    layer = net[0]
    y = net(x)
    before = layer.weight_norm_squared().clone()
    with torch.no_grad():
        inner = layer.base_weight.watched()[0] if "torchao" in kind else layer.weight
        inner.copy_(inner.flip(0))
    after = layer.base_weight.norm_squared()
    assert formula.error(before, after.double()) > 1e-3
    assert torch.equal(layer.weight_norm_squared(), after)
    if "torchao" not in kind:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_the_dtype_of_products_is_not_chosen_by_the_first_pass():
    """Where none is given: `Linear4bit` would take that of its first x for good, and round W by it."""
    net, x = nn.Sequential(bits4()), torch.randn(3, IN, dtype=BF16)
    inject_adapter(net, AdapterConfig(rank=RANK, targets=("0",)))
    dtype = net[0].base_weight.dtype
    with torch.no_grad(), adapter_disabled(net):
        net(x)
    assert net[0].base_weight.dtype == dtype


def test_products_that_wait_for_the_device_are_named(monkeypatch):
    assert why_not_captured(nn.Sequential(nn.Linear(IN, OUT), bits4(), bits8(0.0)).eval()) is None
    net = nn.Sequential(bits4(), bits8())
    assert why_not_captured(net.train()) is None  # (on a CPU it multiplies no whole numbers in training)
    inject_adapter(net, AdapterConfig(rank=RANK, targets=("0", "1")))
    assert "llm_int8_threshold=0" in why_not_captured(net.eval())


# What is refused, and what a library does that must not reach us -----------------------------------------------------


def test_rows_that_the_library_dequantises_wrongly_are_told_of_once(caplog):
    """On CPUs (bitsandbytes 0.50.2), where a row is no multiple of a block."""
    inner = nn.Sequential(bits4(inputs=96), bits4(inputs=IN), bits4(inputs=96, double=True))
    forms = [base_weight(module) for module in inner]
    if forms[0].format.off(forms[0].tensors()) < 1e-3:
        pytest.skip("it dequantises them rightly here")
    assert forms[1].format.off(forms[1].tensors()) == 0
    net = nn.ModuleDict({"mlp": inner})
    for _ in range(2):
        inject_adapter(net, AdapterConfig(rank=RANK, targets=("mlp.0", "mlp.1")))
        remove_adapter(net)
    [record] = [record.message for record in caplog.records if "computes wrongly" in record.message]
    assert "in 2 of the model's layers (mlp.0, mlp.2)" in record
    assert "llm_int8_skip_modules" in record


def test_an_embedding_that_is_quantised():
    net = nn.Sequential(nn.Embedding(IN, OUT))
    config = ao.IntxWeightOnlyConfig(weight_dtype=torch.int8)
    ao.quantize_(net, config, lambda module, _: isinstance(module, nn.Embedding))
    assert "read in linear layers alone" in cannot_adapt(net[0])
    assert "forward pass of its own" in cannot_adapt(bnb.nn.EmbeddingNF4(IN, OUT))


def test_a_weight_that_is_not_quantised_yet():
    for module in (bnb.nn.Linear4bit(IN, OUT), bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)):
        found = base_weight_of(module)
        assert isinstance(found, Unfit)
        assert "has not quantised its weight yet" in found.reason
        assert "has not quantised" in cannot_adapt(module)
    net = nn.Sequential(bnb.nn.Linear4bit(IN, OUT))
    with pytest.raises(ConfigError, match="not quantised its weight yet"):
        inject_adapter(net, AdapterConfig(targets=("0",)))


def test_a_weight_that_is_trained_in_16_bits():
    module = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=True)
    assert "has_fp16_weights=False" in cannot_adapt(module)


@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_packing_for_inference_on_a_cpu(double, caplog):
    """It rounds the largest number of each block to bfloat16, and its own way back goes wrong."""
    if not bnb.functional.has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16")
    module, x = bits4(double=double, compute=torch.float32).eval(), torch.randn(3, IN)
    exact = exact_of("nf4", module)
    net = nn.Sequential(module)
    with torch.no_grad():
        packed = net(x)
    assert module.weight.quant_state.packing_format_for_cpu
    inject_adapter(net, AdapterConfig(rank=RANK, targets=("0",)))
    assert "rounded" in caplog.text
    assert not module.weight.quant_state.packing_format_for_cpu
    assert 0 < formula.error(base_weight(net[0]).dense(), exact) < 4e-3
    with torch.no_grad():
        y = net(x)
        assert formula.error(y, packed.double()) < 1e-2
        with adapter_disabled(net):
            assert torch.equal(net(x), y)
    assert not module.weight.quant_state.packing_format_for_cpu
    other = bits4(double=double)
    other.load_state_dict(module.state_dict(), strict=False)


def test_once_prepared_a_base_is_not_packed():
    module, x = bits4(compute=torch.float32).eval(), torch.randn(3, IN)
    exact = exact_of("nf4", module)
    inject_adapter(nn.Sequential(module), AdapterConfig(rank=RANK, targets=("0",)))
    with torch.no_grad():
        module(x)
    assert formula.error(base_weight(module).dense(), exact) < 2e-7


# In transformers' models ---------------------------------------------------------------------------------------------

LOADED = {
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao": lambda: TorchAoConfig(ao.Int8WeightOnlyConfig()),
}


@pytest.fixture
def load(tiny_model, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "plain")

    def load(kind):
        options = {"quantization_config": LOADED[kind](), "dtype": torch.float32, "device_map": "cpu"}
        return AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **options)

    return load


@pytest.mark.parametrize("kind", LOADED)
@pytest.mark.filterwarnings("ignore:The adapter was merged into a base in:UserWarning")
def test_a_model_from_start_to_end(kind, load, tmp_path):
    model, ids = load(kind), torch.randint(50, (2, 9))
    inject_adapter(model, AdapterConfig(rank=RANK, exclude=("k_proj",)))
    layers = [layer for layer in model.modules() if isinstance(layer, AdapterLayer)]
    assert {layer.base_weight.stored for layer in layers} == {"library"}
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    model.eval()
    with torch.no_grad():
        before = model(ids).logits
        model.save_pretrained(tmp_path / "adapter")
        other = load(kind)
        load_adapter(other, tmp_path / "adapter")
        assert torch.equal(other.eval()(ids).logits, before)
        merge_adapter(model)
        merged = model(ids).logits
        # (int8 products round x, and merged layers do not.)
        assert formula.error(merged, before.double()) < (0.05 if kind == "int8" else 1e-5)
        model.save_pretrained(tmp_path / "merged")
        unmerge_adapter(model)
        assert torch.equal(model(ids).logits, before)
    assert model.config.quantization_config is not None
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert all(type(module) is not type(layers[0]) for module in plain.modules())
    with torch.no_grad():
        assert formula.error(plain(ids).logits, merged.double()) < (0.05 if kind == "int8" else 1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_checkpointed_blocks_of_a_model(load):
    model, ids = load("nf4").train(), torch.randint(50, (2, 9))
    inject_adapter(model, AdapterConfig(rank=RANK))
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(model(ids, labels=ids).loss, parameters)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = torch.autograd.grad(model(ids, labels=ids, use_cache=False).loss, parameters)
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))
