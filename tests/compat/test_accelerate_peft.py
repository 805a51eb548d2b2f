"""`accelerate_peft`: PEFT's models in PEFT's own life, on our kernels, with PEFT's results."""

import copy
import io
import pickle
import re
import sys
from contextlib import contextmanager

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import theodora
from theodora import ConfigError, accelerate_peft, kernels, restore_peft
from theodora.fastpath import gated_mlp, peft_layer
from theodora.fastpath.accelerate import FastPath
from theodora.fastpath.peft_layer import FastPeftLinear
from theodora.fastpath.peft_models import Acceleration
from theodora.layers import norm_cache
from tiny import tiny_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:Merging lora module:UserWarning:peft", "ignore:Already found a `peft_config`:UserWarning:peft"
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
IDS = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(0))
_SOME = "(k_proj|down_proj|c_attn)"
METHODS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {"use_dora": True, "rank_pattern": {_SOME: 2}, "alpha_pattern": {_SOME: 7}},
    "lora dropout": {"lora_dropout": 0.3},
    "dora dropout": {"use_dora": True, "lora_dropout": 0.3},
    "trained biases": {"bias": "all", "use_dora": True},
    "its own biases": {"bias": "lora_only"},
    "pissa": {"init_lora_weights": "pissa"},
}


def peft_model(family="llama", *, dtype=torch.float32, **config):
    """A PEFT model in training mode whose adapters have already moved away from zero."""
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": "all-linear", "fan_in_fan_out": family == "gpt2"} | config
    model = get_peft_model(tiny_model(family, dtype=dtype), LoraConfig(**settings)).train()
    return moved(model)


def moved(model):
    """Every adapter somewhere away from its start, so that B·A ≠ 0 and m ≠ ‖W‖; equal for equal models."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
                p.add_(noise.to(p.dtype), alpha=0.05)
    return model


def pair(*args, **config):
    """The same model twice: as PEFT runs it, and accelerated."""
    slow, fast = peft_model(*args, **config), peft_model(*args, **config)
    report = accelerate_peft(fast)
    assert not report.left_alone, report
    return slow, fast


def train(model, steps=4, lr=1e-2):
    """Losses of some steps of AdamW, and the last gradients."""
    torch.manual_seed(1)
    ids = IDS.to(next(model.parameters()).device)
    # The large epsilon keeps AdamW from turning the rounding of gradients that are zero (a key's bias) into steps.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, eps=1e-4)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def logits(model, **more):
    torch.manual_seed(1)
    return model(input_ids=IDS.to(next(model.parameters()).device), **more).logits


def layer_of(model, path="layers.0.mlp.up_proj"):
    return next(module for name, module in model.named_modules() if name.endswith(path))


@pytest.fixture
def calls(monkeypatch):
    """How many adapted layers our kernels have run, alone or together (on a GPU, or under Triton's interpreter)."""
    count = {"lora": 0, "dora": 0}

    def counted(run):
        def call(x, *layers, **kwargs):
            for layer in layers[0] if isinstance(layers[0], list) else layers[:3]:
                if layer.a_RI is not None:
                    count["lora" if layer.magnitude_O is None else "dora"] += 1
            return run(x, *layers, **kwargs)

        return call

    monkeypatch.setattr(kernels, "adapted_linears", counted(kernels.adapted_linears))
    monkeypatch.setattr(gated_mlp, "gated_mlp", counted(gated_mlp.gated_mlp))
    return count


@contextmanager
def said(caplog):
    """Reasons for falling back that are said inside the block."""
    peft_layer._say_once.cache_clear()
    caplog.clear()
    reasons: list[str] = []
    yield reasons
    reasons += [record.getMessage() for record in caplog.records if record.name == peft_layer.__name__]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("device", DEVICES)
def test_training_is_the_same(device, family, method, calls):
    slow, fast = (model.to(device) for model in pair(family, **METHODS[method]))
    expected, expected_grads = train(slow)
    assert not any(calls.values())
    found, grads = train(fast)
    assert any(calls.values())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, atol=2e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    for (name, p), q in zip(fast.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_is_as_close_to_the_truth_as_peft(device, use_dora):
    """With PEFT's default of float32 adapters on a bfloat16 model, and its own float32 model as the truth."""
    exact = peft_model(use_dora=use_dora)
    with torch.no_grad():
        for p in exact.parameters():
            if not p.requires_grad:
                p.copy_(p.bfloat16())
    slow = peft_model(use_dora=use_dora, dtype=torch.bfloat16)
    for model in (exact, slow):
        model.load_state_dict(
            {k: v for k, v in peft_model(use_dora=use_dora).state_dict().items() if "lora_" in k}, False
        )
    fast = copy.deepcopy(slow)
    accelerate_peft(fast)
    truth, expected, found = (logits(model.to(device)) for model in (exact, slow, fast))
    assert found.dtype == expected.dtype
    assert (found - truth).norm() <= 1.3 * (expected - truth).norm()


@pytest.mark.parametrize("use_dora", [False, True])
def test_autocast(use_dora):
    slow, fast = pair(use_dora=use_dora)
    truth = logits(slow)
    layers = layer_of(slow), layer_of(fast)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = logits(slow), logits(fast)
        assert {layer(torch.randn(3, 32)).dtype for layer in layers} == {torch.bfloat16}
    assert found.dtype == expected.dtype
    assert (found - truth).norm() <= 1.3 * (expected - truth).norm()
    found.sum().backward()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # the new name is of 5.2x
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["dora", "dora dropout"])
def test_activation_checkpointing(method, reentrant, calls):
    slow, fast = pair(**METHODS[method])
    for model in (slow, fast):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    expected, _ = train(slow)
    found, _ = train(fast)
    assert calls["dora"] == 2 * 4 * 14  # forward and recomputation, steps, layers
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora", "dora dropout"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.13 does it itself
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # and 2.11 this, where it was built for a GPU
def test_torch_compile_without_a_graph_break(method):
    slow, fast = pair(**METHODS[method])
    x = torch.randn(3, 32)
    for layer in (layer_of(fast), layer_of(fast.eval())):
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.manual_seed(2)
        found = compiled(x)
        torch.manual_seed(2)
        expected = layer_of(slow.train(layer.training))(x)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        torch._dynamo.reset()


def saved(model, folder):
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_nothing_but_the_class_changes(tmp_path):
    model = peft_model(use_dora=True, modules_to_save=["lm_head"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    parameters, state = dict(model.named_parameters()), model.state_dict()
    trained = {name: p.requires_grad for name, p in parameters.items()}
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    files = saved(model, tmp_path / "before")

    def unchanged(where):
        assert {name: id(p) for name, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
        assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
        assert [id(p) for p in model.parameters() if p.requires_grad] == held
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert saved(model, tmp_path / where) == files

    accelerate_peft(model)
    unchanged("accelerated")
    logits(model)
    unchanged("run")
    assert accelerate_peft(model) == accelerate_peft(model)
    restore_peft(model)
    unchanged("restored")
    assert not any(isinstance(module, FastPeftLinear) for module in model.modules())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    restore_peft(model)  # restoring twice, or what was never accelerated, does nothing
    restore_peft(nn.Linear(2, 2))


@pytest.mark.parametrize("of", ["the model", "the PeftModel"])
@pytest.mark.parametrize("way", ["merge_and_unload", "unload"])
def test_restored_after_the_adapters_have_gone(way, of):
    _, model = pair(use_dora=True)
    plain = getattr(model, way)()
    restore_peft(plain if of == "the model" else model)
    assert [type(module) for module in plain.modules()] == [type(module) for module in tiny_model().modules()]


def test_theodoras_own_adapters_stay_on_the_fast_path():
    _, model = pair()
    own = theodora.inject_adapter(model.unload(), theodora.AdapterConfig(rank=2))
    classes = [type(module) for module in own.modules()]
    restore_peft(own)
    assert [type(module) for module in own.modules()] == classes
    assert any(isinstance(module, gated_mlp.GatedMLP) for module in own.modules())


def test_restored_in_the_middle_of_training():
    slow, fast = pair(use_dora=True)
    torch.testing.assert_close(train(fast)[0], train(slow)[0], atol=1e-5, rtol=1e-5)
    restore_peft(fast)
    torch.testing.assert_close(train(fast)[0], train(slow)[0], atol=2e-5, rtol=1e-4)


def test_saved_and_loaded_again(tmp_path):
    slow, fast = pair(use_dora=True)
    train(slow)
    train(fast)
    fast.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert accelerate_peft(again).fast
    torch.testing.assert_close(logits(again), logits(slow.eval()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_accelerated_too(way):
    model = peft_model(use_dora=True)
    accelerate_peft(model)
    expected = logits(model)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, buffer := io.BytesIO())
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert isinstance(layer_of(twin), FastPeftLinear)
    assert torch.equal(logits(twin), expected)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merging(family, use_dora, calls):
    _, model = pair(family, use_dora=use_dora)
    model.eval()
    with torch.no_grad():
        expected = logits(model)
        before = sum(calls.values())
        model.merge_adapter()
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
        with model.disable_adapter():  # PEFT unmerges on the way
            base = logits(tiny_model(family))
            torch.testing.assert_close(logits(model), base, atol=1e-4, rtol=1e-4)
        assert sum(calls.values()) == before
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
        assert sum(calls.values()) == 2 * before
        plain = model.merge_and_unload()
        assert not any(isinstance(module, Linear) for module in plain.modules())
        torch.testing.assert_close(logits(plain), expected, atol=1e-4, rtol=1e-4)


def test_the_norm_follows_the_base_weight():
    """PEFT writes to the weight through `.data`; torch's loaders and `.to` do as they like."""
    slow, fast = pair(use_dora=True)
    logits(fast)
    other = tiny_model(seed=5).state_dict()
    for model in (slow, fast):
        weights = {
            k: other[k.removeprefix("base_model.model.").replace(".base_layer", "")]
            for k in model.state_dict()
            if "lora_" not in k
        }
        model.load_state_dict(weights, strict=False)
    torch.testing.assert_close(logits(fast), logits(slow), atol=1e-4, rtol=1e-4)
    for model in (slow, fast):
        torch.manual_seed(2)
        model.add_adapter("second", LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa"))  # moves W
    torch.testing.assert_close(logits(fast), logits(slow), atol=1e-4, rtol=1e-4)
    for model in (slow, fast):
        model.double()
    torch.testing.assert_close(logits(fast), logits(slow))


def test_the_norm_follows_writes_through_data():
    """They leave no version behind (a base weight that a trainer sends to the model that generates, say)."""
    slow, fast = pair(use_dora=True)
    with torch.no_grad():
        for model in (slow.eval(), fast.eval()):
            logits(model)
            for name, module in model.named_modules():
                if name.endswith("base_layer"):
                    module.weight.data.mul_(1.5)
        layer = layer_of(fast)
        a, b, s = layer.lora_A.default.weight, layer.lora_B.default.weight, layer.scaling["default"]
        norm = torch.linalg.vector_norm(layer.base_layer.weight + s * b @ a, dim=1)
        torch.testing.assert_close(layer.parts().norm_O, norm)  # which gated MLPs and groups ask for on a GPU
        torch.testing.assert_close(logits(fast), logits(slow), atol=1e-4, rtol=1e-4)


def test_a_training_step_looks_at_no_values(monkeypatch):
    """It would wait for the GPU in each layer."""
    model = peft_model(use_dora=True)
    accelerate_peft(model)
    train(model, steps=1)
    monkeypatch.setattr(norm_cache, "content", None)
    train(model, steps=1)
    with torch.no_grad():
        model(input_ids=IDS[:, :1])  # nor does a step of one token
    with pytest.raises(TypeError), torch.no_grad():
        logits(model)


def test_switching_adapters(calls, caplog):
    slow, fast = pair(use_dora=True)
    for model in (slow, fast):
        torch.manual_seed(2)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
        moved(model)

    def same():
        torch.testing.assert_close(logits(fast), logits(slow), atol=1e-4, rtol=1e-4)

    with said(caplog) as reasons:
        same()
        assert calls == {"lora": 0, "dora": 14}
        for model in (slow, fast):
            model.set_adapter("second")
        same()
        assert calls == {"lora": 2, "dora": 14}  # the head is new, and PEFT's until accelerated
        assert "base_model.model.lm_head" in accelerate_peft(fast).fast
        same()
        assert calls == {"lora": 5, "dora": 14}
        with slow.disable_adapter(), fast.disable_adapter():
            same()
        assert calls == {"lora": 5, "dora": 14}
    assert reasons == []

    with said(caplog) as reasons:
        for model in (slow, fast):
            model.base_model.set_adapter(["default", "second"])
        same()
        same()
    assert len(reasons) == 1
    assert "several adapters" in reasons[0]
    for model in (slow, fast):
        model.delete_adapter("default")
        model.set_adapter("second")
    same()


def test_adapters_per_row():
    slow, fast = pair()
    for model in (slow, fast):
        torch.manual_seed(2)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
        moved(model).eval()
    names = {"adapter_names": ["second", "__base__"]}
    torch.testing.assert_close(logits(fast, **names), logits(slow, **names), atol=1e-5, rtol=1e-5)


def test_scales_set_later():
    slow, fast = pair(use_dora=True)
    for model in (slow, fast):
        for module in model.modules():
            if isinstance(module, Linear):
                module.set_scale("default", 3.0)
    torch.testing.assert_close(logits(fast), logits(slow), atol=1e-4, rtol=1e-4)


def test_hooks_are_never_bypassed(caplog):
    slow, fast = pair(use_dora=True)
    for path in ("base_layer", "lora_A.default", "lora_B.default", "lora_magnitude_vector.default", ""):
        handles = [layer_of(m).get_submodule(path).register_forward_hook(lambda _m, _i, y: 2 * y) for m in (slow, fast)]
        torch.testing.assert_close(logits(fast), logits(slow), atol=1e-4, rtol=1e-4)
        assert path == "" or len(accelerate_peft(fast).left_alone) == 1
        assert layer_of(fast).parts() is None
        for handle in handles:
            handle.remove()
    assert not accelerate_peft(fast).left_alone

    replaced = peft_model()
    layer_of(replaced).base_layer.forward = lambda x: torch.zeros(*x.shape[:-1], 48)
    (path, reason), *others = accelerate_peft(replaced).left_alone.items()
    assert path.endswith("layers.0.mlp.up_proj")
    assert "forward method was replaced" in reason
    assert not others


def test_a_base_weight_that_trains():
    slow, fast = pair(use_dora=True)
    for model in (slow, fast):
        layer_of(model).base_layer.weight.requires_grad_(True)
    assert "trained" in next(iter(accelerate_peft(fast).left_alone.values()))
    expected, found = train(slow), train(fast)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    assert found[1].keys() == expected[1].keys()


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")  # a layer's output is a view: no in-place adds
@pytest.mark.parametrize("way", ["ddp", "fsdp2", "fsdp2, adapters apart"])
def test_data_parallel(way, method, one_process, calls, caplog):
    slow, fast = pair(**METHODS[method])
    expected, _ = train(slow)
    model = DistributedDataParallel(fast) if way == "ddp" else fast
    with said(caplog) as reasons:
        if way != "ddp":
            mesh = init_device_mesh("cpu", (1,))
            for layer in fast.get_base_model().model.layers:
                if way.endswith("apart"):
                    fully_shard(layer.mlp.up_proj.lora_A["default"], mesh=mesh)
                    fully_shard(layer.mlp.down_proj, mesh=mesh)
                fully_shard(layer, mesh=mesh)
            fully_shard(fast, mesh=mesh)
        found, _ = train(model)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert calls[method] == 4 * (12 if way.endswith("apart") else 14)
    assert len(reasons) == way.endswith("apart")
    if way.endswith("apart"):
        with pytest.raises(ConfigError, match="fully_shard"):
            restore_peft(fast)
    else:
        restore_peft(fast)
        train(model)
    if way == "fsdp2":
        assert all("before the model is sharded" in reason for reason in accelerate_peft(fast).left_alone.values())


def test_deepspeed_gathers_its_own_way():
    """ZeRO-3 partitions parameters (they carry `ds_id`) and gathers them as each module is called."""
    model = peft_model()
    accelerate_peft(model)
    layer = layer_of(model)
    layer.base_layer.weight.ds_id = 0
    assert "ZeRO-3" in accelerate_peft(model).left_alone["base_model.model.model.layers.0.mlp.up_proj"]
    assert layer.parts() is None


LEFT_ALONE = {
    "lora_bias": ({"lora_bias": True, "target_modules": ["q_proj"]}, "lora_bias"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "Embedding is not PEFT's plain LoRA layer"),
    "alora": ({"alora_invocation_tokens": [5], "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}, "(ALora)"),
    "experts": ({"target_parameters": ["mlp.up_proj.weight"], "target_modules": []}, "ParamWrapper is not"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")
def test_what_is_left_alone_is_named(name, caplog):
    config, reason = LEFT_ALONE[name]
    slow, fast = (peft_model("qwen2", **config) for _ in range(2))
    report = accelerate_peft(fast)
    assert set(report.left_alone) | set(report.fast) == {
        name for name, module in fast.named_modules() if isinstance(module, peft_layer.BaseTunerLayer)
    }
    assert all(reason in found for found in report.left_alone.values())
    assert f"{len(report.fast)} of {len(report.fast) + len(report.left_alone)}" in str(report)
    assert bool(report.fast) == bool(report.around.norms) == ("norms" in str(report))
    assert reason in str(report)
    assert reason in caplog.text
    assert torch.equal(logits(fast), logits(slow)) or report.fast


def test_other_methods_are_left_alone():
    model = get_peft_model(tiny_model(), peft.LoHaConfig(target_modules=["q_proj"]))
    report = accelerate_peft(model)
    assert report.fast == ()
    assert set(report.left_alone.values()) == {"loha.layer.Linear is not PEFT's plain LoRA layer (lora.layer.Linear)"}


def test_quantised_weights_are_left_alone():
    model = peft_model()
    layer = layer_of(model)
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.to(torch.int8), requires_grad=False)
    assert "quantised" in next(iter(accelerate_peft(model).left_alone.values()))


def test_models_injected_in_place():
    torch.manual_seed(0)
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), tiny_model())
    assert accelerate_peft(model).fast == ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
    logits(model)


def test_models_without_adapters_of_peft_are_refused():
    with pytest.raises(ConfigError, match=r"after peft\.get_peft_model"):
        accelerate_peft(tiny_model())
    with pytest.raises(ConfigError, match="Theodora's own"):
        accelerate_peft(theodora.inject_adapter(tiny_model(), theodora.AdapterConfig(rank=2)))
    prompts = get_peft_model(tiny_model(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="PROMPT_TUNING"):
        accelerate_peft(prompts)


def test_a_missing_peft_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape("pip install peft")):
        accelerate_peft(tiny_model())
    restore_peft(tiny_model())


def test_an_old_peft_is_named(monkeypatch):
    monkeypatch.delattr("theodora.fastpath.peft_layer")
    monkeypatch.setitem(sys.modules, "theodora.fastpath.peft_layer", None)  # as where one of its imports fails
    with pytest.raises(ConfigError, match=re.escape(f"0.21 or later, found {peft.__version__}")):
        accelerate_peft(tiny_model())


def test_reports_say_what_was_found():
    assert str(FastPath()) == "nothing"
    assert str(FastPath(groups=4, mlps=2, rotary=True)) == "2 MLPs, 4 groups, rotary embeddings"
    left = dict.fromkeys("abcd", "frozen") | dict.fromkeys("efg", "merged")
    assert str(Acceleration(("h",), left)) == (
        "1 of 8 PEFT layers run on Theodora's kernels.\nLeft to PEFT:"
        "\n  - a, b, c and 1 more: frozen\n  - e, f, g: merged"
    )


@pytest.mark.parametrize("method", ["lora", "dora", "lora dropout", "dora dropout", "trained biases"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias:UserWarning:peft")
def test_parts_are_the_layer(family, method):
    _, model = pair(family, **METHODS[method])
    layer = layer_of(model, "layers.0.mlp.up_proj" if family == "qwen2" else "h.0.mlp.c_fc")
    x = torch.randn(3, 32)
    parts = layer.parts()
    if method in ("dora dropout", "trained biases") and (family == "gpt2" or method == "dora dropout"):
        assert parts is None
        layer.eval().base_layer.requires_grad_(False)
        parts = layer.parts()
    assert parts is not None
    if parts.drops:
        layer.eval()
    y = (
        torch.nn.functional.linear(x, parts.weight.dense(), parts.bias_O)
        + parts.scale * (x @ parts.a_RI.T) @ parts.b_OR.T
    )
    if parts.magnitude_O is not None:
        bias = 0 if parts.bias_O is None else parts.bias_O
        y = (y - bias) * parts.magnitude_O / parts.norm_O + bias
    torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        base = layer.parts()
        assert base.a_RI is None
        assert base.weight.plain().data_ptr() == layer.base_layer.weight.data_ptr()
    model.merge_adapter()
    merged = layer.parts()
    torch.testing.assert_close(
        torch.nn.functional.linear(x, merged.weight.dense(), merged.bias_O), y, atol=1e-4, rtol=1e-4
    )
    with model.disable_adapter():
        assert layer.parts() is None
