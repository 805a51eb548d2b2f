"""What layers keep while no gradients flow: used in every step of one token, and never out of date."""

import copy
import pickle

import pytest
import torch

import formula
from theodora import AdapterConfig, inject_adapter, kernels, merge_adapter, set_adapter, unmerge_adapter
from theodora.kernels.base_weight import PlainWeight
from theodora.kernels.operators import interpreted, runs_triton
from theodora.kernels.recompute import checkpoint_contexts
from theodora.layers import AdapterLayer, norm_cache
from theodora.layers.norm_cache import NormCache
from theodora.synonyms import cache_argument
from tiny import tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.float16  # Triton's interpreter cuts bfloat16 off where a GPU rounds
needs_kernel = pytest.mark.skipif(not runs_triton(torch.empty(0, device=DEVICE)), reason="needs Triton")


def move(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


def adapted(method="dora", family="llama", dtype=torch.float32):
    model = inject_adapter(tiny_model(family).to(DEVICE, dtype), AdapterConfig(method=method, rank=2)).eval()
    move(model)
    return model


def layer_of(model):
    return next(m for m in model.modules() if isinstance(m, AdapterLayer) and hasattr(m, "in_features"))


def exact(layer, x):
    adapter = layer.active
    values = [None if t is None else t.detach().double() for t in (x, layer.weight, layer.bias, *adapter.factors())]
    if adapter.magnitude is None:
        return formula.lora(*values, adapter.scale)
    return formula.dora(*values, adapter.scale, adapter.magnitude.detach().double())


def one_token(layer):
    return torch.randn(3, 1, layer.in_features, device=DEVICE, dtype=layer.weight.dtype)


def prompt(layer):
    return layer(torch.randn(1, 2, layer.in_features, device=DEVICE, dtype=layer.weight.dtype))


@pytest.fixture
def work(monkeypatch):
    """How many norms were computed, and how many times values were looked at."""
    counts = {"norms": 0, "looks": 0}

    def counted(key, function):
        def run(*args):
            counts[key] += 1
            return function(*args)

        return run

    monkeypatch.setattr(AdapterLayer, "new_norm", counted("norms", AdapterLayer.new_norm))
    monkeypatch.setattr(norm_cache, "content", counted("looks", norm_cache.content))
    return counts


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_steps_of_one_token_do_no_norm_work(work, context):
    model = adapted()
    ids = torch.arange(3, 11, device=DEVICE).view(2, 4)
    with context():
        cache = model(ids, use_cache=True).past_key_values
        assert work["norms"] == sum(isinstance(m, AdapterLayer) for m in model.modules())
        before = dict(work)
        for _ in range(3):
            model(ids[:, :1], use_cache=True, **{cache_argument(model): cache})
        assert work == before
        model(ids)
        assert work["norms"] == before["norms"]
        assert work["looks"] > before["looks"]


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_where_many_answer_together_each_layer_is_looked_at_once(method, work):
    model = adapted(method)
    layer, ids = layer_of(model), torch.arange(3, 11, device=DEVICE).view(1, 8)
    with torch.no_grad():
        model(ids)
        with norm_cache.looked_at_once():
            model(ids)
            before = dict(work)
            for _ in range(3):
                model(ids)
            assert work == before
            layer.active.lora_B.add_(0.5)  # leaves a version behind
            x = torch.randn(2, 3, layer.in_features, device=DEVICE)
            assert formula.error(layer(x), exact(layer, x)) < 1e-5
        layer.active.lora_B.data.neg_()  # does not, and is looked for again
        assert formula.error(layer(x), exact(layer, x)) < 1e-5
        with norm_cache.looked_at_once():  # in the next block as well
            layer.active.lora_B.data.neg_()
            assert formula.error(layer(x), exact(layer, x)) < 1e-5


CHANGES = {
    "in place": lambda model, layer: layer.active.lora_B.add_(0.5),
    "magnitude": lambda model, layer: layer.active.magnitude.mul_(2),
    "scale": lambda model, layer: setattr(layer.active, "scale", 3 * layer.active.scale),
    "base weight": lambda model, layer: layer.weight.mul_(2),
    "new data": lambda model, layer: setattr(layer.active.lora_B, "data", layer.active.lora_B.data + 0.5),
    "train and eval": lambda model, layer: (layer.active.lora_B.data.add_(0.5), model.train().eval()),
    "state dict": lambda model, layer: model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()}),
    "dtype": lambda model, layer: model.to(torch.float64),
    "merge": lambda model, layer: unmerge_adapter(merge_adapter(model)),
    "other adapter": lambda model, layer: (
        inject_adapter(model, AdapterConfig(rank=3), "other"),
        set_adapter(model, "default"),
        move(model),
        set_adapter(model, "other"),
    ),
    "a prompt after a write that leaves no version": lambda model, layer: (
        layer.active.lora_B.data.add_(0.5),
        prompt(layer),
    ),
    "a prompt after the base weight has got other values": lambda model, layer: (
        layer.weight.data.mul_(2),
        prompt(layer),
    ),
    "a prompt after all signs have changed": lambda model, layer: (layer.active.lora_B.data.neg_(), prompt(layer)),
    "a prompt after zeros were filled": lambda model, layer: (
        layer.active.lora_B.data.zero_(),
        prompt(layer),
        layer.active.lora_B.data.fill_(0.5),
        prompt(layer),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_kept_is_never_out_of_date(change):
    model = adapted()
    layer = layer_of(model)
    with torch.no_grad():
        layer(one_token(layer))
        CHANGES[change](model, layer)
        x = one_token(layer)
        assert formula.error(layer(x), exact(layer, x)) < 1e-5


@pytest.mark.parametrize("factor", ["start_A", "start_B"])
def test_a_start_that_changes_is_seen_by_the_next_prompt(factor):
    model = inject_adapter(tiny_model().to(DEVICE), AdapterConfig(method="dora", rank=2, init="pissa")).eval()
    layer = layer_of(model)
    with torch.no_grad():
        prompt(layer)
        getattr(layer.active, factor).data.mul_(2)
        prompt(layer)
        x = one_token(layer)
        assert formula.error(layer(x), exact(layer, x)) < 1e-5


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["", "pickle"])
def test_copies_take_nothing_along(copied, work):
    layer = layer_of(adapted())
    with torch.no_grad():
        prompt(layer)
        other, before = copied(layer), work["norms"]
        layer(one_token(layer))
        assert work["norms"] == before
        other(one_token(other))
        assert work["norms"] == before + 1


def test_an_optimizer_that_leaves_no_version():
    class Hidden(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.add_(0.3)

    model = adapted()
    layer, other = layer_of(model), copy.deepcopy(layer_of(adapted()))
    with torch.no_grad():
        for each in (layer, other):
            each(one_token(each))
    Hidden(layer.active.parameters(), lr=1.0).step()
    with torch.no_grad():
        x = one_token(layer)
        assert formula.error(layer(x), exact(layer, x)) < 1e-5
        assert formula.error(other(x), exact(other, x)) < 1e-5


def test_a_tensor_is_not_taken_for_the_one_that_lay_there_before():
    """Where a weight is made in each pass (`torch.nn.utils.parametrize`), the next one gets its address, and its id."""
    cache = NormCache()
    for value in range(20):
        weight = PlainWeight(torch.full((64, 64), float(value)))
        assert cache.weight_norm_squared(weight, weight.norm_squared)[0] == 64 * value**2
        del weight


@pytest.fixture
def swapping():
    """Moves and loads swap tensors, as they always do for some of torch's subclasses."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize(
    "change", [lambda model: model.to(torch.float64), lambda model: model.load_state_dict(model.state_dict())]
)
def test_weights_can_be_swapped(swapping, change):
    """`torch.utils.swap_tensors` refuses a tensor to which there is a weak reference, whoever holds it."""
    model = tiny_model(tied=True).to(DEVICE)
    inject_adapter(model, AdapterConfig(rank=2, targets="lm_head"))
    move(model)
    layer = layer_of(model.eval())
    with torch.no_grad():
        prompt(layer)
        change(model)
        x = one_token(layer)
        assert formula.error(layer(x), exact(layer, x)) < 1e-5


def test_what_a_pass_computes_is_its_own_though_another_thread_invalidates_the_cache():
    class Disturbed(NormCache):
        def __hash__(self):  # asked for once the result is in the cache
            self.invalidate()
            return id(self)

    layer = layer_of(adapted())
    norm = layer.new_norm(*layer.active.factors(), layer.active.scale)
    with torch.no_grad():
        found = Disturbed().get("a", layer.base_weight, layer.active, lambda: (norm, None), one_token=False)
    assert found is not None
    assert found.norm_O is norm


@needs_kernel
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_generating_runs_the_decode_kernel(method, family, monkeypatch):
    calls = []
    run = kernels.decode.decode_linear
    monkeypatch.setattr(kernels.decode, "decode_linear", lambda *args: calls.append(1) or run(*args))
    model = adapted(method, family, HALF)
    ids = torch.arange(3, 11, device=DEVICE).view(2, 4)
    with torch.no_grad():
        found = model(ids).logits
        assert len(calls) == sum(isinstance(m, AdapterLayer) for m in model.modules())
        with kernels.reference():
            plain = model(ids).logits
        truth = copy.deepcopy(model).double()(ids).logits
    assert formula.error(found, truth) <= 2 * formula.error(plain, truth)
    calls.clear()
    model(ids).logits.sum().backward()
    assert not calls


def decode_places(layer):
    tensors = layer.inference_tensors(layer.active, one_token=True).decode
    return [None if t is None else t.data_ptr() for t in (tensors.a_RI, tensors.b_OR, tensors.g_O)]


@needs_kernel
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_prompt_refreshes_what_decoding_reads_where_it_lies(method):
    layer = layer_of(adapted(method, dtype=HALF))
    with torch.no_grad():
        for tokens in (2, 100):  # with the kernel, and without it
            layer(torch.randn(1, tokens, layer.in_features, device=DEVICE, dtype=HALF))
            places = decode_places(layer)
            layer.active.lora_B.data.add_(0.5)
            layer(torch.randn(1, tokens, layer.in_features, device=DEVICE, dtype=HALF))
            assert decode_places(layer) == places
            x = one_token(layer)
            assert formula.error(layer(x), exact(layer, x)) < 2e-3


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_compiled_steps_read_what_is_kept(method, dtype):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    layer = layer_of(adapted(method, dtype=dtype))
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x, budget = one_token(layer), 1e-5 if dtype == torch.float32 else 2e-3
    with torch.no_grad():
        assert formula.error(compiled(x), exact(layer, x)) < budget  # nothing is kept yet
        layer(x.expand(-1, 2, -1))
        compiled(x)
        assert formula.error(compiled(x), exact(layer, x)) < budget
        layer.active.lora_B.add_(0.5)
        layer(x.expand(-1, 2, -1))
        assert formula.error(compiled(x), exact(layer, x)) < budget
        assert len(graphs) == (1 if method == "lora" and not decodes(layer) else 2)
        several = torch.randn(1, 3, layer.in_features, device=DEVICE, dtype=dtype)
        assert formula.error(compiled(several), exact(layer, several)) < budget
    last = graphs[1 if len(graphs) > 2 else 0]
    if decodes(layer):
        called = [node.target for node in last.graph.nodes if node.op == "call_function"]
        assert torch.ops.theodora.decode_linear.default in called
    # CUDA graphs copy every input of another kind in each step
    metas = [node.meta for node in last.graph.nodes if node.op == "placeholder"]
    kinds = [meta["tensor_dict"] for meta in metas if "tensor_dict" in meta]
    assert sum("_dynamo_static_input_type" not in kind for kind in kinds) <= 1


def decodes(layer):
    return layer.weight.dtype == HALF and (DEVICE == "cuda" or interpreted())


def test_a_checkpointed_block_may_run_its_layers_in_another_order():
    one, other = (layer_of(adapted()) for _ in range(2))
    first, again = checkpoint_contexts()
    with first:
        norms = [layer.norm(layer.active) for layer in (one, other)]
    with again:
        turned = [layer.norm(layer.active) for layer in (other, one)]
    assert all(torch.equal(*pair) for pair in zip(norms, reversed(turned), strict=True))


@needs_kernel
def test_a_prompt_between_a_forward_pass_and_its_backward():
    """What decoding reads may be the parameter itself, which nothing but training may write to."""
    layer = layer_of(adapted("lora", dtype=HALF).to(HALF))
    x = torch.randn(1, 2, layer.in_features, device=DEVICE, dtype=HALF)
    with torch.no_grad():
        prompt(layer)
    y = layer(x)
    with torch.no_grad():
        prompt(layer)
    y.sum().backward()
    assert layer.active.lora_A.grad.abs().max() > 0
