"""Models on the fast path against the reference; for real on a GPU or with TRITON_INTERPRET=1, else its fallbacks."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

from formula import DEVICE
from steps import IDS, Calls, adapted, expected, moved, needs_triton, other_defaults, same, step
from theodora import (
    AdapterConfig,
    adapter_disabled,
    inject_adapter,
    kernels,
    load_adapter,
    merge_adapter,
    remove_adapter,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)
from theodora.adapters.state import trained_tensors
from theodora.fastpath.accelerate import checkpoint_activations, recompute_less, restore_model, speed_up_model
from theodora.fastpath.gated_mlp import GatedMLP, fuse_mlp
from theodora.kernels import gated_mlp
from theodora.kernels.operators import interpreted, runs_triton
from theodora.layers.float8 import quantize
from tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_the_references(family, method):
    model = adapted(family, method, blocks=2)
    wanted = expected(model)
    speed_up_model(model)
    same(step(model), wanted)
    same(step(model), wanted)


@pytest.mark.parametrize(
    "config",
    [
        {"targets": ["q_proj", "v_proj"]},
        {"targets": ["up_proj", "o_proj"]},
        {"targets": ["down_proj"]},
        {"dropout": 0.3},
        {"init": "pissa"},
    ],
    ids=str,
)
def test_some_layers_dropout_and_start_factors(config):
    model = adapted(blocks=2, **config)
    torch.manual_seed(1)
    wanted = expected(model)
    speed_up_model(model)
    torch.manual_seed(1)
    same(step(model), wanted)


def test_inference_mode_is_as_before():
    """Attention, which is replaced for the whole process, meets tensors that keep no version."""
    model = adapted().eval()
    with torch.inference_mode():
        wanted = model(input_ids=IDS).logits
        speed_up_model(model)
        torch.testing.assert_close(model(input_ids=IDS).logits, wanted)


def test_what_is_found():
    models = {
        "2 MLPs, 2 groups, 5 norms, rotary embeddings": adapted(blocks=2),
        "2 activations": adapted("gpt2", blocks=2),
        "nothing": nn.Linear(2, 2),
    }
    assert [str(speed_up_model(model)) for model in models.values()] == [*models]
    for model in models.values():
        restore_model(model)
    with other_defaults():
        assert [str(speed_up_model(model)) for model in models.values()] == [*models]


@needs_triton
@pytest.mark.parametrize(
    "config", [{}, {"targets": ["down_proj"]}, {"targets": ["gate_up_proj"]}, {"rank": 20}], ids=str
)
def test_gate_and_up_in_one_layer(config):
    model = tiny_model("phi3", num_hidden_layers=1).to(DEVICE)
    model = moved(inject_adapter(model, AdapterConfig(**{"method": "dora", "rank": 3} | config)))
    wanted = expected(model)
    assert speed_up_model(model).mlps == 1
    mlp = model.model.layers[0].mlp
    stack = mlp._theodora_stacks[0]
    calls = []
    whole, stack.holds = stack.holds, lambda *args: calls.append(whole(*args)) or calls[-1]
    same(step(model), wanted)
    assert calls == [True]
    restore_model(model)
    same(step(model), wanted)


def other_model(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = {"vocab_size": 272, "initializer_range": 0.2}
        if kind == "t5":
            config = AutoConfig.for_model(
                "t5", **small, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
                feed_forward_proj="gated-gelu", decoder_start_token_id=0,
            )  # fmt: skip
            return AutoModelForSeq2SeqLM.from_config(config)
        config = AutoConfig.for_model(
            "whisper", **small, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=10, pad_token_id=0,
            num_mel_bins=8, max_target_positions=32, decoder_start_token_id=1, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return AutoModelForSpeechSeq2Seq.from_config(config)


@pytest.mark.parametrize("kind", ["t5", "whisper"])
def test_cross_attention_reads_another_tensor(kind):
    targets = ["q", "k", "v", "o"] if kind == "t5" else "all-linear"
    model = moved(inject_adapter(other_model(kind).to(DEVICE), AdapterConfig(rank=3, targets=targets)))
    inputs = {"input_ids": IDS} if kind == "t5" else {"input_features": torch.randn(2, 8, 20, device=DEVICE)}
    wanted = expected(model, **inputs)
    assert speed_up_model(model).groups == 6
    for _ in range(2):
        same(step(model, **inputs), wanted)


def test_experts():
    config = AutoConfig.for_model(
        "mixtral", vocab_size=272, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, initializer_range=0.2,
    )  # fmt: skip
    model = AutoModel.from_config(config).to(DEVICE)
    model = moved(inject_adapter(model, AdapterConfig(rank=3, targets=["q_proj", "k_proj", "v_proj", "o_proj"])))

    def outputs():
        model.zero_grad()
        y = model(input_ids=IDS).last_hidden_state
        (y * torch.linspace(-1, 1, y.shape[-1], device=DEVICE)).sum().backward()  # y² is what the last norm makes 1
        return {"y": y.detach(), **{name: t.grad.clone() for name, t in trained_tensors(model).items()}}

    with kernels.reference():
        wanted = outputs()
    speed_up_model(model)
    same(outputs(), wanted)


def state(model):
    return (
        {name: (id(module), type(module)) for name, module in model.named_modules()},
        {name: id(p) for name, p in model.named_parameters()},
        {name: t.clone() for name, t in model.state_dict().items()},
    )


@pytest.mark.parametrize("tied", [False, True])
def test_undone_it_leaves_no_trace(tied):
    model = adapted(tied=tied, targets="all-linear")
    modules, parameters, tensors = state(model)
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    wanted = expected(model)
    for _ in range(2):
        speed_up_model(model)
        step(model)
        assert state(model)[1] == parameters
        assert all(torch.equal(t, tensors[name]) for name, t in model.state_dict().items())
        assert model.state_dict().keys() == tensors.keys()
    restore_model(model)
    assert state(model)[:2] == (modules, parameters)
    assert all(torch.equal(t, tensors[name]) for name, t in model.state_dict().items())
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    storages = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    assert len(storages) == len(tensors) - tied
    same(step(model), wanted)


def test_adapters_come_and_go():
    model = adapted()
    speed_up_model(model)
    step(model)
    remove_adapter(model)
    with torch.no_grad():
        torch.testing.assert_close(
            model(IDS).logits, tiny_model(num_hidden_layers=1).to(DEVICE)(IDS).logits, rtol=1e-4, atol=1e-4
        )
    for targets in (["q_proj"], "all-linear"):  # without another call of accelerate
        moved(inject_adapter(model, AdapterConfig(rank=40, targets=targets), name="other"))
        same(step(model), expected(model))
        remove_adapter(model)


def test_two_adapters_of_which_one_is_active():
    model = adapted()
    speed_up_model(model)
    inject_adapter(model, AdapterConfig(method="lora", rank=20, targets=["k_proj", "up_proj"]), name="other")
    moved(model)
    for name in ("other", "default", "other"):
        set_adapter(model, name)
        same(step(model), expected(model))
    with adapter_disabled(model), torch.no_grad():
        base = model(IDS).logits
    torch.testing.assert_close(base, tiny_model(num_hidden_layers=1).to(DEVICE)(IDS).logits, rtol=1e-4, atol=1e-4)


def test_merged_and_unmerged():
    model = adapted()
    wanted = expected(model)
    speed_up_model(model)
    tensors = state(model)[2]
    with torch.no_grad():
        logits = model(IDS).logits
        merge_adapter(model)
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-4)
        unmerge_adapter(model)
    assert all(torch.equal(t, tensors[name]) for name, t in model.state_dict().items())
    same(step(model), wanted)


def test_files(tmp_path):
    model = adapted()
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    speed_up_model(model)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(tiny_model(num_hidden_layers=1).to(DEVICE), tmp_path / "adapter", trainable=True).train()
    same(step(again), step(model))
    save_file(model.state_dict(), tmp_path / "all.safetensors")
    assert all(torch.equal(t.to(DEVICE), weights[name]) for name, t in load_file(tmp_path / "all.safetensors").items())
    whole = io.BytesIO()
    torch.save(model.state_dict(), whole)
    assert whole.tell() < 1.3 * sum(t.nbytes for t in weights.values()) + 20_000
    remove_adapter(model)
    model.save_pretrained(tmp_path / "base")
    base = type(model).from_pretrained(tmp_path / "base").to(DEVICE)
    plain = tiny_model(num_hidden_layers=1).to(DEVICE).state_dict()
    assert all(torch.equal(t, plain[name]) for name, t in base.state_dict().items())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["", "pickle"])
def test_copies_stand_alone(copied):
    model = adapted()
    wanted = expected(model)
    speed_up_model(model)
    step(model)
    other = copied(model)
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in pointers for p in other.parameters())
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    same(step(model), wanted)
    same(step(other), expected(other))
    restore_model(other)
    same(step(model), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_moved_to_another_dtype(dtype):
    model = adapted()
    speed_up_model(model)
    step(model)
    model.to(dtype)
    same(step(model), expected(model), within=0.1 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_the_reference(dtype):
    found_errors, plain_errors = 0.0, 0.0
    draws, blocks = (2, 1) if interpreted() else (4, 2)
    for _ in range(draws):  # one model's errors are one draw
        model = adapted(dtype=dtype, blocks=blocks)
        exact, plain = expected(copy.deepcopy(model).double()), expected(model)
        speed_up_model(model)
        found = step(model)
        assert found["loss"].item() == pytest.approx(exact["loss"].item(), abs=0.05)
        names = [name for name in exact if name != "loss"]
        found_errors += sum((found[name].double() - exact[name]).square().sum() for name in names)
        plain_errors += sum((plain[name].double() - exact[name]).square().sum() for name in names)
    assert found_errors**0.5 <= (5 if dtype == torch.bfloat16 and DEVICE == "cpu" else 2) * plain_errors**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    model = adapted(dtype=dtype)
    with torch.autocast(DEVICE, torch.bfloat16):
        wanted = expected(model)
        speed_up_model(model)
        same(step(model), wanted, within=0.1)


@pytest.mark.parametrize(
    "name",
    ["self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj", "mlp.act_fn", "mlp", "input_layernorm"],
)
def test_hooks_fire(name):
    model = adapted()
    calls = []

    def double(module, args, output):
        calls.append(name)
        return 2 * output

    speed_up_model(model)
    step(model)
    hook = model.get_submodule(f"model.layers.0.{name}").register_forward_hook(double)
    wanted = expected(model)
    calls.clear()
    for _ in range(2):
        same(step(model), wanted)
    assert len(calls) == 2
    hook.remove()
    same(step(model), expected(model))


def test_hooks_that_write_and_backward_hooks():
    model = adapted(blocks=2)
    calls = []
    second = model.model.layers[1]
    second.input_layernorm.register_forward_hook(lambda module, args, y: y.mul_(3))
    second.self_attn.k_proj.register_full_backward_hook(lambda *_: calls.append("k"))
    second.mlp.up_proj.register_full_backward_hook(lambda *_: calls.append("up"))
    wanted = expected(model)
    speed_up_model(model)
    calls.clear()
    same(step(model), wanted)
    assert sorted(calls) == ["k", "up"]


def test_a_forward_that_was_replaced():
    model = adapted(targets=["q_proj", "v_proj", "gate_proj"])
    for layer in (model.model.layers[0].self_attn.v_proj, model.model.layers[0].mlp.up_proj):
        layer.forward = lambda x, own=layer.forward: 2 * own(x)
    wanted = expected(model)
    speed_up_model(model)
    same(step(model), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    model = adapted()
    wanted = expected(model)
    speed_up_model(model)
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    else:  # its name in older versions of transformers
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for _ in range(2):
        same(step(model), wanted)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_blocks_that_recompute_less(method, monkeypatch):
    monkeypatch.setattr(gated_mlp, "_MOST_DH_IN_A_BLOCK", 1024)  # in slices of some tokens
    model = adapted(method=method)
    wanted = expected(model)
    speed_up_model(model)
    checkpoint_activations(model)
    recompute_less(model)
    model.enable_input_require_grads()
    for _ in range(2):
        norms, activations = Calls(torch.ops.theodora.dora_norm.default), Calls(torch.ops.theodora.gated.default)
        with norms, activations:
            same(step(model), wanted)
        assert norms.count == len({name for name, _ in model.named_parameters() if name.endswith(".magnitude")})
        if runs_triton(next(model.parameters())):  # else a product of its own adds down's update to z, which is remade
            assert activations.count == len(model.model.layers) * (1 if method == "dora" else 2)


def test_what_a_checkpointed_block_keeps():
    """Two forward passes before one backward, a graph that is kept, blocks inside blocks."""
    from theodora.kernels.recompute import checkpoint_contexts, once_in_a_block

    computed = []

    def tripled(x, key="k"):
        factor = once_in_a_block(key, lambda: computed.append(1) or torch.full((), 3.0))
        return torch.sin(factor * x)

    def run(function, x):
        return checkpoint(function, x, use_reentrant=False, context_fn=checkpoint_contexts)

    x = torch.tensor(0.5, requires_grad=True)
    slope = 3 * torch.cos(torch.tensor(1.5))
    first, second = run(tripled, x), run(tripled, x)
    torch.testing.assert_close(torch.autograd.grad(second + first, x)[0], 2 * slope)
    assert len(computed) == 2
    y = run(tripled, x)
    for runs in (1, 2):  # what was kept is let go at the first backward
        torch.testing.assert_close(torch.autograd.grad(y, x, retain_graph=runs == 1)[0], slope)
        assert len(computed) == 2 + runs
    torch.autograd.grad(run(lambda x: run(tripled, x) + tripled(x, "other"), x), x)
    assert tripled(x) == torch.sin(torch.tensor(1.5))


def test_checkpointed_mlps_alone_and_saved_tensors_elsewhere():
    model = adapted()
    wanted = expected(model)
    speed_up_model(model)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        same(step(model), wanted)
    for layer in model.model.layers:
        layer.mlp.forward = lambda x, own=layer.mlp.forward: checkpoint(own, x, use_reentrant=False)
    same(step(model), wanted)


# torch does both itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning", "ignore:The .grad attribute")
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_compiled_blocks(method):
    model = adapted(method=method)
    wanted = expected(model)
    speed_up_model(model)
    step(model)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    same(step(model), wanted)


def test_made_and_used_without_gradients_and_then_trained():
    model = adapted()
    wanted = expected(model)
    with kernels.reference(), torch.no_grad():
        logits = model(IDS).logits
    with torch.inference_mode():
        speed_up_model(model)
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    same(step(model), wanted)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-4)


def test_generation_is_the_references():
    model = adapted().eval()
    with kernels.reference():
        wanted = model.generate(IDS[:, :4], max_new_tokens=5, do_sample=False)
    speed_up_model(model)
    assert torch.equal(model.generate(IDS[:, :4], max_new_tokens=5, do_sample=False), wanted)


def test_biases_and_norms_that_train():
    model = adapted("qwen2", blocks=2)
    for name, parameter in model.named_parameters():
        if name.endswith("k_proj.bias") or "layernorm" in name or name.endswith("layers.1.mlp.up_proj.weight"):
            parameter.requires_grad_()
    wanted = expected(model)
    assert any(name.endswith("k_proj.bias") for name in wanted)
    speed_up_model(model)
    same(step(model), wanted)


@needs_triton
def test_readers_that_take_turns_get_their_own():
    """Threads that share a model, or replicas of it, which share groups and stacks."""
    attention = adapted().model.layers[0].self_attn
    speed_up_model(attention)
    other = copy.copy(attention)
    other.__dict__["_modules"] = {name: copy.copy(child) for name, child in attention._modules.items()}
    xs = torch.randn(2, 3, 32, device=DEVICE).unbind()
    with kernels.reference():
        wanted = [[layer(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)] for x in xs]
    for one, two in ((attention, other), (attention, attention), (attention, attention)):
        found = [[], []]
        for name in ("q_proj", "k_proj", "v_proj"):
            for module, x, outputs in ((one, xs[0], found[0]), (two, xs[1], found[1])):
                outputs.append(getattr(module, name)(x))
        for outputs, values in zip(found, wanted, strict=True):
            for y, value in zip(outputs, values, strict=True):
                torch.testing.assert_close(y, value, rtol=1e-4, atol=1e-5)


class MLP(nn.Module):
    def __init__(self, limit=None, dropout=0.0, bias=False):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 12, bias=bias), nn.Linear(8, 12, bias=bias)
        self.down_proj, self.drop, self.limit = nn.Linear(12, 8, bias=bias), nn.Dropout(dropout), limit

    def forward(self, hidden_states, other=None):
        gate, up = nn.functional.silu(self.gate_proj(hidden_states)), self.up_proj(hidden_states)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        y = self.drop(self.down_proj(gate * up))
        return y if other is None else y + other


@pytest.mark.parametrize("training", [False, True])
def test_what_is_a_gated_mlp(training):
    for mlp, is_one in ((MLP(), True), (MLP(limit=16.0), False), (MLP(limit=100.0), False), (MLP(dropout=0.5), False)):
        rng = torch.get_rng_state()
        assert fuse_mlp(mlp.train(training)) is is_one
        assert isinstance(mlp, GatedMLP) is is_one
        assert torch.equal(torch.get_rng_state(), rng)
        assert all(module.training is training for module in mlp.modules())


def test_a_fused_mlp_takes_the_arguments_of_its_own_forward():
    mlp = MLP().to(DEVICE).requires_grad_(False)
    x, other = torch.randn(3, 8, device=DEVICE), torch.randn(3, 8, device=DEVICE)
    wanted = mlp(x), mlp(x, other)
    fuse_mlp(mlp)
    for found, value in ((mlp(hidden_states=x), wanted[0]), (mlp(x), wanted[0]), (mlp(x, other=other), wanted[1])):
        torch.testing.assert_close(found, value)


@needs_triton
@pytest.mark.parametrize("float8", [False, True])
def test_a_fused_mlp_of_which_one_layer_has_an_adapter(float8, monkeypatch):
    """The biases and the float8 scales of the others count."""
    net, x = nn.Sequential(MLP(bias=True)).to(DEVICE), torch.randn(3, 8, device=DEVICE)
    if float8:
        quantize(net[0].down_proj)
    inject_adapter(net, AdapterConfig(rank=2, targets=("gate_proj",)))
    with kernels.reference():
        wanted = net(x)
    assert fuse_mlp(net[0])
    monkeypatch.setattr(MLP, "forward", lambda *_: pytest.fail("it did not run as one step"))
    # In float8 the fast way rounds x to 4 bits, the reference does not.
    same({"y": net(x)}, {"y": wanted}, within=0.05 if float8 else 1e-5)


@needs_triton
def test_memory_of_stacked_weights_is_free_when_they_move():
    model = adapted()
    speed_up_model(model)
    stack = model.model.layers[0].mlp._theodora_stacks[0]
    storage = stack.weight_OI.untyped_storage()
    seen = storage._weak_ref()
    del storage
    assert not torch.UntypedStorage._expired(seen)
    model.to(torch.bfloat16)
    assert torch.UntypedStorage._expired(seen)
