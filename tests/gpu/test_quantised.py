"""Bases that bitsandbytes quantises, on a CUDA device: kernels against float64, graphs, moves, a short run."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import formula
from theodora import AdapterConfig, TrainConfig, adapter_disabled, functional, inject_adapter, kernels, train
from theodora.adapters.state import trained_tensors
from theodora.fastpath.masks import whole_rows
from theodora.kernels import decode
from theodora.kernels.graph import GraphedStep
from theodora.kernels.library_weight import LibraryWeight
from theodora.layers import base_weight
from theodora.layers.libraries import prepare, why_not_captured
from theodora.synonyms import cache_argument
from theodora.train import trainer as trainers
from tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
bnb = pytest.importorskip("bitsandbytes")

IN, OUT, RANK, SCALE = 256, 384, 8, 0.5
BF16 = torch.bfloat16
SIZES = {"hidden_size": 64, "intermediate_size": 128}
IDS = torch.arange(3, 35).view(2, 16)


def bits4(table="nf4", double=True, dtype=BF16, device="cuda"):
    module = bnb.nn.Linear4bit(IN, OUT, quant_type=table, compress_statistics=double, compute_dtype=dtype)
    module.load_state_dict(nn.Linear(IN, OUT).state_dict())
    return module.to(dtype).to(device)


def bits8(threshold=0.0, dtype=torch.float16, device="cuda"):
    module = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=threshold)
    module.load_state_dict(nn.Linear(IN, OUT).state_dict())
    return module.to(dtype).to(device)


KINDS = {
    "nf4 double": bits4,
    "nf4": lambda: bits4(double=False),
    "fp4 double": lambda: bits4("fp4"),
    "nf4 in float16": lambda: bits4(dtype=torch.float16),
    "nf4 in float32": lambda: bits4(dtype=torch.float32),
    "int8": bits8,
    "int8 in bfloat16": lambda: bits8(dtype=BF16),
    "int8 with a threshold": lambda: bits8(6.0),
}
ROUNDING = 0.03
"""What a product of int8 loses by rounding x."""
kinds = pytest.mark.parametrize("kind", KINDS)


def weight_of(kind):
    module = KINDS[kind]().requires_grad_(False).train()
    prepare(nn.Sequential(module))
    weight = base_weight(module)
    assert isinstance(weight, LibraryWeight)
    return module, weight


def numbers_of(module, dtype):
    """The weight by the library's definition, (O, I), float64, rounded to the dtype of products."""
    w = module.weight
    if isinstance(module, bnb.nn.Linear8bitLt):
        scale = module.state.SCB if w.SCB is None else w.SCB
        exact = w.data.double() * scale.double()[:, None] / 127
    else:
        state = w.quant_state
        absmax = state.absmax.double()
        if state.nested:
            each = state.state2.absmax.double().repeat_interleave(state.state2.blocksize)[: absmax.numel()]
            absmax = state.state2.code.double()[state.absmax.long()] * each + state.offset.double()
        packed = w.data.flatten().long()
        codes = state.code.double()[torch.stack([packed >> 4, packed & 15], 1).flatten()]
        exact = (codes * absmax.repeat_interleave(state.blocksize)).view(state.shape)
    return exact.to(dtype).double()


def factors():
    return torch.randn(RANK, IN, device="cuda") / IN**0.5, 0.1 * torch.randn(OUT, RANK, device="cuda")


def within(found, exact, plain, dtype, rounds=False):
    allowed = 2 * formula.error(plain, exact) + torch.finfo(dtype).eps + (ROUNDING if rounds else 0)
    assert formula.error(found, exact) <= allowed


# One weight -----------------------------------------------------------------------------------------------------------


@kinds
def test_numbers(kind):
    module, weight = weight_of(kind)
    exact = numbers_of(module, weight.dtype)
    close = 4 * torch.finfo(weight.dtype).eps  # a last digit here and there: the library multiplies in float32
    assert formula.error(weight.dense(), exact) < close
    assert torch.equal(weight.rows(slice(64, 200)), weight.dense()[64:200].to(weight.rows(slice(0, 1)).dtype))
    assert formula.error(weight.norm_squared(), exact.square().sum(1)) < close


@kinds
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_products_are_the_modules_own_to_the_bit(kind, tokens):
    module, weight = weight_of(kind)
    x = torch.randn(tokens, IN, device="cuda", dtype=weight.dtype)
    for training in (True, False):
        module.train(training)
        with torch.no_grad():
            own, ours = module(x), base_weight(module).product(x, module.bias)
        assert torch.equal(ours, own)
    dz = torch.randn(tokens, OUT, device="cuda", dtype=weight.dtype)
    w = weight.dense()
    within(weight.product_backward(dz), dz.double() @ w.double(), dz @ w, weight.dtype)


@kinds
def test_the_norms_kernel_reads_packed_numbers(kind):
    _, weight = weight_of(kind)
    assert weight.packed() is not None
    (a, b), squared, w = factors(), weight.norm_squared(), weight.dense().double()
    a[0], b[7] = -w[7].float() / SCALE * 0.999, 0  # a row whose terms cancel
    b[7, 0] = 1
    exact = (w + SCALE * b.double() @ a.double()).norm(dim=1)
    found = weight.dora_norm(a, b, SCALE, squared)
    assert float(((found - exact).abs() / exact)[torch.arange(OUT, device="cuda") != 7].max()) < 1e-5
    assert float((found - exact).abs()[7] / exact[7]) < 1e-3
    several = type(weight).dora_norms([weight] * 2, a[None].repeat(2, 1, 1), b[None].repeat(2, 1, 1), SCALE,
                                      squared[None].repeat(2, 1))  # fmt: skip
    torch.testing.assert_close(several, found[None].repeat(2, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "float32" not in kind])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_decoding(kind, tokens):
    module, weight = weight_of(kind)
    module.eval()
    weight = base_weight(module)
    assert decode.runs(weight)
    a, b = (t.to(weight.dtype) for t in factors())
    g, bias = torch.rand(OUT, device="cuda") + 0.5, module.bias.to(weight.dtype)
    x, w = torch.randn(tokens, IN, device="cuda").to(weight.dtype), weight.dense()
    exact = (x.double() @ w.double().T + (x.double() @ a.double().T) @ b.double().T) * g + bias
    plain = decode.decode_linear_reference(x, w, a, b, g, bias)
    y = decode.decode(x, weight, a, b, g, bias)
    within(y, exact, plain, weight.dtype, weight.rounds_input)
    assert torch.equal(decode.decode(x, weight, a, b, g, bias), y)


@kinds
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_an_adapted_layer_and_its_gradients(kind, method):
    module, _ = weight_of(kind)
    net = nn.Sequential(module)
    inject_adapter(net, AdapterConfig(method=method, rank=RANK, alpha=RANK * SCALE, targets=("0",)))
    weight, adapter = base_weight(module), module.adapters["default"]
    dtype = weight.dtype
    with torch.no_grad(), adapter_disabled(net):
        x = torch.randn(70, IN, device="cuda", dtype=dtype)
        bare = net(x)
    with torch.no_grad():
        fresh = net(x)
        if method == "lora":
            assert torch.equal(fresh, bare)
        else:
            # The library adds its bias before it rounds, DoRA after; and g = m/‖W‖ is 1 to rounding.
            assert formula.error(fresh, bare.double()) <= 2 * torch.finfo(dtype).eps
        adapter.lora_B.copy_(factors()[1])
    dy = torch.randn(70, OUT, device="cuda", dtype=dtype)
    found = gradients_of(lambda v: net(v["x"]), {"x": x.requires_grad_(), **dict(adapter.named_parameters())}, dy)
    results = []
    for wide in (torch.float64, dtype):
        v = {"x": x, **dict(adapter.named_parameters())}
        v = {key: t.detach().to(torch.float64 if wide == torch.float64 else t.dtype) for key, t in v.items()}
        w, bias = weight.dense().to(wide), module.bias.to(wide)
        results.append(gradients_of(lambda v, w=w, bias=bias: layer(v, w, bias), v, dy.to(wide)))
    exact, plain = results
    for key, value in exact.items():
        within(found[key], value, plain[key], dtype, "int8" in kind)


def layer(v, w, bias):
    a, b, m = v["lora_A"], v["lora_B"], v.get("magnitude")
    if m is None:
        return functional.lora_linear(v["x"], w, bias, a, b, SCALE)
    return functional.dora_linear(v["x"], w, bias, a, b, SCALE, m, functional.dora_norm(w, a, b, SCALE))


def gradients_of(run, values, dy):
    values = {key: t if t.requires_grad else t.requires_grad_() for key, t in values.items()}
    y = run(values)
    grads = torch.autograd.grad(y, list(values.values()), dy)
    return {"y": y.detach(), **dict(zip(values, grads, strict=True))}


# Models ---------------------------------------------------------------------------------------------------------------

LOADED = {
    "nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=BF16
    ),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "int8 without threshold": lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
}


@pytest.fixture
def load(tmp_path):
    tiny_model("llama", dtype=BF16, **SIZES).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")

    def loaded(kind, device="cuda", method="dora"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=LOADED[kind](), dtype=BF16, device_map=device
        )
        torch.manual_seed(0)
        inject_adapter(model, AdapterConfig(method=method, rank=4))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for tensor in trained_tensors(model).values():
                tensor += 0.05 * torch.randn(tensor.shape, generator=generator).to(tensor)
        return model

    return loaded


def step_of(model):
    def step(inputs):
        with whole_rows():  # transformers asks the GPU whether there are several sequences in a row
            loss = model(input_ids=inputs["ids"], labels=inputs["ids"], use_cache=False).loss
        loss.backward()
        return loss.detach()

    return step


@pytest.mark.parametrize("kind", LOADED)
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_a_graphed_step_is_the_plain_one(kind, method, load):
    plain, model = load(kind, method=method).train(), load(kind, method=method).train()
    graphed = GraphedStep(step_of(model), list(model.parameters()))
    for seed in range(5):
        ids = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(seed)).cuda()
        expected, found = step_of(plain)({"ids": ids}), graphed({"ids": ids})
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        for key, tensor in trained_tensors(model).items():
            assert formula.error(tensor.grad, trained_tensors(plain)[key].grad.double()) < 2e-2, key
        for both in (plain, model):
            both.zero_grad()
    waits = kind == "int8"
    assert (why_not_captured(model) is not None) == waits
    # What cannot be captured runs as it is.
    assert (graphed.replays == 0 and graphed.why_not is not None) if waits else graphed.replays == 3, graphed.why_not


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_to_the_cpu_and_back(kind, load):
    model = load(kind).eval()
    ids, state = IDS.cuda(), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        there = model(ids).logits
        model.to("cpu")
        here = model(IDS).logits
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        model.to("cuda")
        again = model(ids).logits
    assert formula.error(again, there.double()) < 1e-2
    assert formula.error(here, there.cpu().double()) < 0.05
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_one_token_at_a_time_is_the_whole_row(kind, load):
    model = load(kind).eval()
    ids = IDS[:1].cuda()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache, rows = None, []
        for at in range(ids.shape[1]):
            output = model(ids[:, at : at + 1], use_cache=True, **{cache_argument(model): cache})
            cache = output.past_key_values
            rows.append(output.logits)
        with kernels.reference():
            exact = model(ids, use_cache=False).logits
    allowed = 0.03 if kind == "nf4" else 0.1  # x rounded to eight bits in each layer
    assert formula.error(torch.cat(rows, 1), exact.double()) < allowed
    assert formula.error(whole, exact.double()) < allowed


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_short_run(kind, tmp_path, monkeypatch):
    """Its steps are CUDA graphs on NF4, and say why not where the library waits for the device."""
    made, init = [], trainers.AdapterTrainer.__init__

    def remember(self, *args, **kwargs):
        made.append(self)
        init(self, *args, **kwargs)

    monkeypatch.setattr(trainers.AdapterTrainer, "__init__", remember)
    tiny_model("llama", dtype=BF16, **SIZES).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    data = tmp_path / "rows.jsonl"
    rows = [{"text": f"{a} + {b:02} = {a + b:02}"} for a in range(8) for b in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"model": str(tmp_path / "base"), "data": str(data), "output": str(tmp_path / "run"), "quantize": kind}
    settings = {
        "max_steps": 24,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "train_on": "all",
        "warmup_steps": 0,
    }
    train(TrainConfig.from_options(options | settings))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-3:]) < sum(losses[:3])
    if kind == "nf4":
        assert made[-1].graph_replays >= 8, made[-1].why_no_graph
    else:
        assert made[-1].graph_replays == 0
        assert "llm_int8_threshold=0" in made[-1].why_no_graph
