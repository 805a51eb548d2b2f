"""What checkpointed blocks on a quantised base send to the host's memory, on a CUDA device: to the bit, and away."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import formula
from theodora import AdapterConfig, inject_adapter
from theodora.adapters.state import trained_tensors
from theodora.fastpath.accelerate import accelerate, checkpoint_activations, recompute_less
from theodora.fastpath.masks import whole_rows
from theodora.kernels import gated_mlp, offload
from theodora.kernels.graph import GraphedStep
from tiny import tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
bnb = pytest.importorskip("bitsandbytes")

BLOCKS, WIDTH, ROWS, LENGTH = 6, 256, 8, 512
SIZES = {"hidden_size": WIDTH, "intermediate_size": 512, "num_hidden_layers": BLOCKS}
Z = ROWS * LENGTH * WIDTH * 2
WAYS = {"device": ((), 1), "second": ((), 2), "host": (("library",), 2)}


@pytest.fixture(autouse=True)
def attention_that_adds_up_in_one_order():
    with sdpa_kernel(SDPBackend.MATH):
        yield


def built():
    """A checkpointed Llama of NF4 with DoRA; the same one each time."""
    torch.manual_seed(0)
    model = tiny_model("llama", dtype=torch.bfloat16, **SIZES)
    for parent in list(model.model.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear):
                options = {"bias": False, "compute_dtype": torch.bfloat16, "quant_type": "nf4"}
                packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, **options)
                packed.load_state_dict(linear.state_dict())
                setattr(parent, name, packed)
    model = inject_adapter(model.cuda(), AdapterConfig(rank=4))
    with torch.no_grad():
        for tensor in trained_tensors(model).values():
            tensor += 0.05 * torch.randn_like(tensor)
    accelerate(model)
    checkpoint_activations(model)
    recompute_less(model)
    model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True))
    return model.train()


def ids(seed=0, length=LENGTH):
    return torch.randint(3, 250, (ROWS, length), generator=torch.Generator().manual_seed(seed)).cuda()


def loss_of(model, batch):
    with whole_rows():
        return model(input_ids=batch, labels=batch, use_cache=False).loss


def step_of(model):
    def step(inputs):
        loss = loss_of(model, inputs["ids"])
        loss.backward()
        return loss.detach()

    return step


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.fixture
def way(monkeypatch):
    """Run the block in one of WAYS, and tell how many copies were begun and the most memory, in a list."""
    copies, own = [0], offload._Cuda.copy

    def counting(*args, **options):
        copies[0] += 1
        own(*args, **options)

    monkeypatch.setattr(offload._Cuda, "copy", counting)
    monkeypatch.setattr(offload, "_LANES", {})

    @contextmanager
    def using(name):
        to_host, every = WAYS[name]
        monkeypatch.setattr(gated_mlp, "_Z_TO_HOST", to_host)
        monkeypatch.setitem(gated_mlp._BLOCKS_TO_A_Z, "library", every)
        copies[0], told = 0, []
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield told
        told += [copies[0], torch.cuda.max_memory_allocated() - before]

    return using


@pytest.mark.parametrize("graphed", [False, True])
def test_gradients_are_the_same_to_the_bit_in_less_memory(graphed, way):
    results, told = {}, {}
    for name in WAYS:
        model = built()
        step_of(model)({"ids": ids()})  # kernels are compiled, ‖W‖² is known
        gradients(model)
        step = GraphedStep(step_of(model), list(model.parameters())) if graphed else step_of(model)
        with way(name) as told[name]:
            results[name] = []
            for seed in range(5):
                loss = step({"ids": ids(seed)}).clone()
                results[name].append({"loss": loss, **gradients(model)})
        if graphed:
            assert step.why_not is None
            assert step.replays == 3
        del model, step
        torch.cuda.empty_cache()
    for name in ("second", "host"):
        for found, wanted in zip(results[name], results["device"], strict=True):
            equal(found, wanted)
    assert told["device"][0] == told["second"][0] == 0
    passes = 3 if graphed else 5  # two as they are, and the capture
    assert told["host"][0] == passes * (2 * BLOCKS - 1)
    assert told["host"][1] < told["second"][1]
    assert told["host"][1] <= told["device"][1] - (BLOCKS - 2) * Z


def test_passes_that_overlap(way):
    """Two forward passes before a backward, a graph that is kept, another length, a forward pass that nobody ends."""
    results = []
    for name in ("device", "host"):
        model, found = built(), []
        with way(name):
            first, second = loss_of(model, ids(1)), loss_of(model, ids(2))
            loss_of(model, ids(3))
            (first + second).backward(retain_graph=True)
            found.append(gradients(model))
            second.backward()
            found.append(gradients(model))
            for length in (LENGTH + 64, LENGTH // 2):
                loss_of(model, ids(4, length)).backward()
                found.append(gradients(model))
        results.append(found)
    for wanted, found in zip(*results, strict=True):
        equal(found, wanted)


def test_a_graph_shares_its_memory_with_nobody(way):
    model = built()
    graphed = GraphedStep(step_of(model), list(model.parameters()))
    with way("host"):
        loss_of(model, ids(9)).backward()
        wanted = gradients(model)
        for seed in range(3):
            graphed({"ids": ids(seed)})
            gradients(model)
        assert graphed.replays == 1, graphed.why_not
        unfinished = loss_of(model, ids(9))
        alone = graphed({"ids": ids(1)}).clone()
        of_graph = gradients(model)
        unfinished.backward()
        equal(gradients(model), wanted)
        assert torch.equal(graphed({"ids": ids(1)}), alone)
        equal(gradients(model), of_graph)


def test_somebody_elses_capture_moves_nothing(way):
    model, batch = built(), ids()
    with way("host") as told:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                loss_of(model, batch).backward()
                wanted = gradients(model)
        torch.cuda.current_stream().wait_stream(side)
        model.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            loss_of(model, batch).backward()
        graph.replay()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert formula.error(found[name], value.double()) < 2e-2, name
    assert told[0] == 2 * (2 * BLOCKS - 1)


def test_evaluation_moves_nothing(way):
    model = built()
    with way("host") as told, torch.no_grad():
        loss_of(model, ids())
    assert told[0] == 0
