"""The core on a CUDA device: the same formula, the same gradients, training as on the CPU."""

import pytest
import torch

import formula
from theodora import (
    AdapterConfig,
    functional,
    inject_adapter,
    kernels,
    load_adapter,
    merge_adapter,
    save_adapter,
    swap_adapter_weights,
    unmerge_adapter,
)
from theodora.adapters.state import adapter_layers, trained_tensors
from tiny import FAMILIES, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

IDS = torch.arange(3, 35).view(2, 16)


def layer_values(tokens, inputs, outputs, rank, dtype):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    w = normal(outputs, inputs).to(dtype).double()
    w[0] = 0
    return {
        "x": normal(tokens, inputs),
        "w": w,
        "bias": normal(outputs),
        "a": normal(rank, inputs) / inputs**0.5,
        "b": 0.1 * normal(outputs, rank),
        "m": w.norm(dim=1) * 1.01,
    }, normal(tokens, outputs)


def run(values, dy, by, dtype, adapter_dtype, device):
    v = {
        key: value.detach()
        .clone()
        .to(device, adapter_dtype if key in "abm" else dtype)
        .requires_grad_(key not in ("w", "bias"))
        for key, value in values.items()
    }
    norm = functional.dora_norm(v["w"], v["a"], v["b"], 0.5)
    y = by.dora_linear(v["x"], v["w"], v["bias"], v["a"], v["b"], 0.5, v["m"], norm)
    y.backward(dy.to(device, dtype))
    return {"y": y.detach().cpu(), **{key: v[key].grad.cpu() for key in ("x", "a", "b", "m")}}


@pytest.mark.parametrize("shape", [(7, 33, 65, 1), (128, 576, 1536, 8), (512, 1024, 768, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients(shape, dtype):
    values, dy = layer_values(*shape, dtype)
    exact = run(values, dy.to(dtype).double(), functional, torch.float64, torch.float64, "cpu")
    fast = run(values, dy, kernels, dtype, torch.float32, "cuda")
    plain = run(values, dy, functional, dtype, torch.float32, "cuda")
    for key, value in exact.items():
        allowed = 2 * formula.error(plain[key], value) + torch.finfo(dtype).eps
        assert formula.error(fast[key], value) <= allowed, key


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_step_is_that_of_the_cpu(family, method):
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = inject_adapter(tiny_model(family), AdapterConfig(method=method, rank=4)).to(device).train()
        losses = []
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            loss = model(input_ids=IDS.to(device), labels=IDS.to(device)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        results.append(losses)
    assert results[0] == pytest.approx(results[1], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_save_load_merge_unmerge(dtype, tied, tmp_path):
    model = inject_adapter(tiny_model("llama", dtype=dtype, tied=tied).to("cuda"), AdapterConfig(rank=4))
    with torch.no_grad():
        for tensor in trained_tensors(model).values():
            tensor += 0.05 * torch.randn_like(tensor)
        expected = model(IDS.cuda()).logits
        save_adapter(model, tmp_path / "a")
        loaded = load_adapter(tiny_model("llama", dtype=dtype, tied=tied).to("cuda"), tmp_path / "a")
        torch.testing.assert_close(loaded(IDS.cuda()).logits, expected)
        merge_adapter(loaded)
        assert formula.error(loaded(IDS.cuda()).logits.cpu(), expected.cpu().double()) < (
            1e-5 if dtype == torch.float32 else 0.03
        )
        unmerge_adapter(loaded)
        torch.testing.assert_close(loaded(IDS.cuda()).logits, expected)


def test_autocast_and_half_precision_train():
    model = inject_adapter(tiny_model("llama").to("cuda"), AdapterConfig(rank=4)).train()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(input_ids=IDS.cuda(), labels=IDS.cuda()).loss
    loss.backward()
    assert all(bool(torch.isfinite(t.grad).all()) for t in trained_tensors(model).values())


# torch.jit is deprecated on the way to inductor, which also recommends TF32.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*TensorFloat32", "ignore:The .grad attribute")
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_compiled_equals_eager(method):
    model = inject_adapter(tiny_model("llama").to("cuda"), AdapterConfig(method=method, rank=4)).train()
    with torch.no_grad():
        for tensor in trained_tensors(model).values():
            tensor += 0.05 * torch.randn_like(tensor)
    ids = IDS.cuda()
    results = []
    for run in (model, torch.compile(model)):
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        results.append([loss.detach(), *(t.grad for t in trained_tensors(model).values())])
        model.zero_grad()
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recorded_graph_does_what_the_swapped_adapter_does(method, dtype, tmp_path):
    """A step of one token, recorded before the swap, reads the tensors and what is kept of them where they lie."""

    def moved(seed, rank):
        model = tiny_model(hidden_size=64, intermediate_size=128).to("cuda", dtype)
        inject_adapter(model, AdapterConfig(method=method, rank=rank))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in trained_tensors(model).values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
        return model.eval()

    other = moved(2, 2)
    save_adapter(other, tmp_path / "other")
    model = moved(1, 4)
    path, layer = next(iter(adapter_layers(model).items()))
    prompt = torch.randn(1, 5, 64, device="cuda", dtype=dtype)
    x, expected = prompt[:, :1].clone(), adapter_layers(other)[path]
    with torch.no_grad():
        layer(prompt)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
        before = y.clone()
        swap_adapter_weights(model, "default", tmp_path / "other")
        graph.replay()
        expected(prompt)
        exact = expected(x)
        assert formula.error(y, exact.double()) < (1e-4 if dtype == torch.float32 else 2e-2)
        assert formula.error(before, exact.double()) > 0.1
