"""What waits in the host's memory between two runs of a block comes back as it was, whenever the copies are made."""

import gc

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import late_copies
from theodora.kernels import offload
from theodora.kernels.recompute import ToHost, checkpoint_contexts, once_in_a_block

BLOCKS, WIDTH = 4, 3


@pytest.fixture
def machine(monkeypatch):
    return late_copies.install(monkeypatch)


class Blocks:
    """Checkpointed blocks, each of which needs a product by a frozen weight, and counts how often it is computed."""

    def __init__(self, count=BLOCKS):
        self.weights = [torch.randn(WIDTH, WIDTH) for _ in range(count)]
        self.scales = [torch.randn(WIDTH, requires_grad=True) for _ in range(count)]
        self.computed = 0
        self.raises_in = None

    def block(self, at, x):
        weight = self.weights[at]

        def compute():
            self.computed += 1
            return None, x.detach() @ weight.T

        _, z = once_in_a_block(("z", at), compute, 2, ToHost(1, weight))
        if self.raises_in == at:
            raise ValueError("half-way")
        return torch.tanh(x) + z * self.scales[at]

    def forward(self, x):
        for at in range(len(self.weights)):
            x = checkpoint(self.block, at, x, use_reentrant=False, context_fn=checkpoint_contexts)
        return x.square().sum()

    def gradients(self, *losses, **options):
        return [torch.autograd.grad(loss, self.scales, **options) for loss in losses]

    def wanted(self, *xs):
        """Without checkpointing."""
        losses = []
        for x in xs:
            for weight, scale in zip(self.weights, self.scales, strict=True):
                x = torch.tanh(x) + (x.detach() @ weight.T) * scale
            losses.append(x.square().sum())
        return self.gradients(*losses)


def inputs(rows=5):
    return torch.randn(rows, WIDTH)


def same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_the_order_of_waits(machine):
    blocks = Blocks(2)
    loss = blocks.forward(inputs())
    out = ["side waits for main", "out"]
    assert machine.log == [*out, "main waits for a copy", *out]
    assert not machine.joined
    machine.log.clear()
    blocks.gradients(loss)
    # The last block's is still there, and is read when its copy has been made; the first one's is fetched.
    back = ["side waits for main", "back"]
    assert machine.log == ["main waits for a copy", *back, "main waits for a copy"]
    assert machine.joined


def test_steps_use_the_same_memory(machine):
    blocks = Blocks()
    for step in range(1, 4):
        x = inputs()
        same(blocks.gradients(blocks.forward(x)), blocks.wanted(x))
        assert blocks.computed == step * BLOCKS
    assert machine.joined
    assert len(machine.memories) == BLOCKS


def test_two_forward_passes_before_a_backward(machine):
    blocks, xs = Blocks(), [inputs(), inputs()]
    for _ in range(2):
        losses = [blocks.forward(x) for x in xs]
        same(blocks.gradients(*losses), blocks.wanted(*xs))
    assert blocks.computed == 4 * BLOCKS
    assert len(machine.memories) == 2 * BLOCKS
    assert machine.joined


def test_a_graph_that_is_kept(machine):
    blocks, x = Blocks(), inputs()
    loss, wanted = blocks.forward(x), blocks.wanted(x)
    for runs in (1, 2):  # what was kept is let go at the first
        same(blocks.gradients(loss, retain_graph=True), wanted)
        assert blocks.computed == runs * BLOCKS
    other = inputs()  # in the memory of the first, which has nothing there any more
    same(blocks.gradients(blocks.forward(other), loss), [*blocks.wanted(other), *wanted])
    assert len(machine.memories) == BLOCKS


def test_without_gradients_nothing_moves(machine):
    with torch.no_grad():
        Blocks().forward(inputs())
    assert machine.log == []


@pytest.mark.parametrize("backward", [False, True])
def test_a_step_that_raises_leaves_nothing(machine, backward):
    blocks, x = Blocks(), inputs()
    loss = blocks.forward(x) if backward else None
    blocks.raises_in = 1
    with pytest.raises(ValueError, match="half-way"):
        blocks.gradients(blocks.forward(x) if loss is None else loss)
    del loss
    gc.collect()
    assert machine.joined
    blocks.raises_in = None
    for _ in range(3):
        same(blocks.gradients(blocks.forward(x)), blocks.wanted(x))
    # torch lets the graph of a backward pass that raised go at the next one: its first block is still there at first.
    assert len(machine.memories) == BLOCKS + backward
    assert machine.joined


def test_a_forward_pass_without_a_backward(machine):
    blocks = Blocks()
    for _ in range(3):
        blocks.forward(inputs())
        gc.collect()
        assert machine.joined
    assert len(machine.memories) == BLOCKS


def test_memory_is_as_large_as_the_largest_and_goes_with_the_weight(machine):
    blocks = Blocks()
    for rows in (3, 9, 5, 7, 9, 2):
        x = inputs(rows)
        same(blocks.gradients(blocks.forward(x)), blocks.wanted(x))
    assert machine.held() == [9 * WIDTH * 4] * BLOCKS
    blocks.weights.pop()
    gc.collect()
    assert len(machine.held()) == BLOCKS - 1


def test_where_none_can_be_pinned_every_second_block_keeps_it(machine, caplog):
    machine.fails = True
    blocks = Blocks()
    for steps in (1, 2):
        x = inputs()
        same(blocks.gradients(blocks.forward(x)), blocks.wanted(x))
        assert blocks.computed == steps * (BLOCKS + BLOCKS // 2)
    assert machine.log == []
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["no memory"]


def test_a_capture_has_its_own_memory(machine):
    blocks, x = Blocks(), inputs()
    blocks.gradients(blocks.forward(x))  # which pins it
    unfinished = blocks.forward(x)
    offload.land()
    machine.captures = True
    before, machine.log[:] = blocks.computed, []
    blocks.gradients(blocks.forward(x))  # somebody else's capture
    assert machine.log == []
    assert blocks.computed - before == BLOCKS + BLOCKS // 2
    machine.captures = False
    same(blocks.gradients(unfinished), blocks.wanted(x))

    machine.captures = True
    with offload.captured() as host:
        before = blocks.computed
        for _ in range(2):
            same(blocks.gradients(blocks.forward(x)), blocks.wanted(x))
        assert blocks.computed - before == 2 * BLOCKS
        blocks.forward(x)  # without a backward pass
    assert machine.joined
    assert len(machine.memories) == BLOCKS
    machine.captures = False
    same(blocks.gradients(blocks.forward(x)), blocks.wanted(x))
    assert len(machine.held()) == 2 * BLOCKS
    del host
    gc.collect()
    assert len(machine.held()) == BLOCKS


def test_nothing_crosses_the_border_of_a_capture(machine):
    blocks, x = Blocks(), inputs()
    wanted = blocks.wanted(x)
    same(blocks.gradients(blocks.forward(x)), wanted)
    outside = blocks.forward(x)
    offload.land()
    machine.captures = True
    with offload.captured():
        machine.log.clear()
        same(blocks.gradients(outside), wanted)
        assert machine.log == []
        inside = blocks.forward(x)
    machine.captures = False
    machine.log.clear()
    same(blocks.gradients(inside), wanted)
    assert machine.log == []


def test_a_capture_that_fails_is_joined(machine):
    blocks, x = Blocks(), inputs()
    blocks.gradients(blocks.forward(x))
    machine.captures, blocks.raises_in = True, 2
    with pytest.raises(ValueError, match="half-way"), offload.captured():
        blocks.forward(x)
    assert machine.joined
    machine.captures = False
    machine.log.clear()
    gc.collect()
    assert machine.log == []


def test_the_last_main_memory_is_left_alone(monkeypatch):
    monkeypatch.setattr(offload, "main_memory", lambda: 2**31)
    with pytest.raises(RuntimeError, match="only 2,147,483,648 bytes of main memory are left"):
        offload._Cuda(torch.device("cuda")).pinned(1)
