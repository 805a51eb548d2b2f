"""A training step on a base that bitsandbytes stores in four bits: right, and no dequantising beyond the base's own."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import late_copies
from formula import DEVICE
from steps import Calls, calls_of, expected, moved, needs_triton, same, step
from theodora import AdapterConfig, inject_adapter
from theodora.adapters.state import trained_tensors
from theodora.fastpath.accelerate import checkpoint_activations, recompute_less, speed_up_model
from theodora.kernels import fused, gated_mlp, library_weight, offload
from theodora.kernels.formats import Bits4
from theodora.synonyms import cache_argument
from tiny import tiny_model

bnb = pytest.importorskip("bitsandbytes")
pytestmark = needs_triton

WIDTH, HIDDEN = 64, 128


def quantized(dtype=torch.float32, blocks=2, biased=False, **config):
    """A tiny Llama whose layers are quantised twice, with DoRA; if `biased` they multiply in any dtype of x."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "mlp_bias": biased}
    model = tiny_model("llama", dtype=dtype, num_hidden_layers=blocks, **sizes)
    for parent in list(model.model.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear):
                options = {"bias": linear.bias is not None, "compute_dtype": None if biased else dtype}
                options |= {"compress_statistics": True, "quant_type": "nf4"}
                packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, **options)
                packed.load_state_dict(linear.state_dict())
                setattr(parent, name, packed)
    return moved(inject_adapter(model.to(DEVICE), AdapterConfig(rank=3, **config)))


@pytest.fixture
def from_outputs(monkeypatch):
    """Counts the layers whose gradients came from outputs."""
    return calls_of(monkeypatch, fused, "compose_backward_with_output")


def test_a_step(from_outputs):
    model = quantized()
    wanted = expected(model)
    speed_up_model(model)
    same(step(model), wanted)
    assert from_outputs[0] == 6  # q, k and v keep nothing that attention does not keep


def test_rows_whose_magnitude_is_zero(from_outputs):
    model = quantized(blocks=1)
    with torch.no_grad():
        for name, tensor in trained_tensors(model).items():
            if "magnitude" in name and ("q_proj" in name or "v_proj" in name):
                tensor[[0, 2]] = 0
    wanted = expected(model)
    speed_up_model(model)
    same(step(model), wanted)
    assert from_outputs[0] == 3


class Counted(TorchDispatchMode):
    """Counts the library's operators, and float32 tensors as large as a weight."""

    def __init__(self):
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func.namespace == "bitsandbytes":
            self.count[func._schema.name.removeprefix("bitsandbytes::")] += 1
        if isinstance(found, torch.Tensor) and found.dtype == torch.float32:
            sizes = {(WIDTH, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN), (WIDTH // 2, WIDTH)}
            self.count["float32"] += tuple(found.shape) in sizes
        return found


@pytest.mark.parametrize("slices", [1, 5])
def test_each_weight_is_dequantised_once_in_each_direction(slices, monkeypatch):
    model = quantized(torch.bfloat16)
    speed_up_model(model)
    wanted = step(model)  # ‖W‖² is known from here on
    if slices > 1:
        monkeypatch.setattr(gated_mlp, "_MOST_DH", 2 * HIDDEN * 2)
    with Counted() as counted:
        found = step(model)
    same(found, wanted, within=3e-2)
    # The layers that read the embeddings have no dx to find.
    assert counted.count["gemm_4bit"] == 14
    assert counted.count["dequantize_4bit"] == 11
    assert counted.count["float32"] == 0


@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("tokens", [0, 10**6])
def test_many_tokens_are_multiplied_by_stacks(tokens, method, monkeypatch, from_outputs):
    monkeypatch.setattr(library_weight, "_FEW_TOKENS", tokens)
    into = calls_of(monkeypatch, Bits4, "dense_into")
    model = quantized(method=method)
    wanted = expected(model)
    speed_up_model(model)
    same(step(model), wanted)
    # Gate and up, forward and backward, and with magnitudes q, k and v, whose first block reads the embeddings.
    stacked = 2 * 2 * 2 + (3 * 2 + 3 if method == "dora" else 0)
    assert into[0] == (stacked if tokens == 0 else 0)
    assert from_outputs[0] == (6 if method == "dora" and tokens else 0)
    speed_up_model(model)
    monkeypatch.setattr(library_weight, "in_a_block", lambda: True)
    into[0] = 0
    same(step(model), wanted)
    assert into[0] == 0


@pytest.mark.parametrize(("slices", "moves"), [(1, False), (3, True)])
def test_what_checkpointed_blocks_keep_of_what_down_gives(slices, moves, monkeypatch):
    """Every second one keeps it on the device, or all in the host's memory."""
    monkeypatch.setattr(offload, "machine_of", lambda _: None)
    machine = late_copies.install(monkeypatch) if moves else None
    model = quantized(blocks=4)
    wanted = expected(model)
    if slices > 1:
        monkeypatch.setattr(gated_mlp, "_slices", lambda *_: slices)
    speed_up_model(model)
    checkpoint_activations(model)
    recompute_less(model)
    model.enable_input_require_grads()
    with Calls(torch.ops.theodora.gated.default) as activations:
        same(step(model), wanted)
    assert activations.count == (4 + (0 if moves else 2)) * slices
    if machine is not None:
        assert machine.log.count("out") == len(machine.memories) == 4
        assert machine.log.count("back") == 3  # the last one has not left yet
        assert machine.joined


def test_downs_bias_is_added_once_in_slices_too(monkeypatch):
    """It is in float32, as the numbers that W stands for are, and x is not."""
    model = quantized(torch.bfloat16, blocks=1, biased=True, method="lora")
    torch.nn.init.normal_(model.model.layers[0].mlp.down_proj.bias)
    speed_up_model(model)
    checkpoint_activations(model)
    recompute_less(model)
    model.enable_input_require_grads()
    wanted = step(model)
    monkeypatch.setattr(gated_mlp, "_slices", lambda *_: 3)
    same(step(model), wanted, within=5e-2)


def test_decoding_reads_the_packed_weights():
    model = quantized(torch.bfloat16, blocks=1).eval()
    ids = torch.arange(3, 9, device=DEVICE).view(1, 6)
    with torch.no_grad():
        known = model(ids, use_cache=True)
        model(ids[:, :1], **{cache_argument(model): known.past_key_values})
        with Counted() as counted:
            model(ids[:, :1], **{cache_argument(model): known.past_key_values})
    assert counted.count == {"float32": 0}
