"""Batches of many adapters against float64: the kernel on a GPU or under Triton's interpreter, else grouped."""

import pytest
import torch

import formula
from formula import DEVICE, within_budget
from theodora.kernels.routed import BASE, routed, routed_reference, routes

# Name -> slots of the tokens.
MIXES = {
    "one token": [2],
    "base": [0, 0, 0],
    "one adapter": [3] * 21,
    "few": [0] * 5 + [1] * 40 + [4] * 2,
    "many": [0, 0, *range(1, 12)],
    "several each": [s for s in range(1, 9) for _ in range(3)],
    "uneven": [1, 2, 2, 3, 4, 4, 5, 6],
    "gaps": [1, 5, 9, 11],
    "in no order": [7, 0, 3, 7, 1, 0, 3, 2, 11, 7, 5],
    "all but even": [s for s in range(12) for _ in range(1 + (s == 4) * 60)],
}
SLOTS = 12


def inputs(slots, dtype=torch.float32, outputs=70, features=90, rank=5, scaled=True, biased=True):
    tokens = len(slots)
    x, z = torch.randn(tokens, features), torch.randn(tokens, outputs)
    a, b = torch.randn(SLOTS, rank, features) / features**0.5, torch.randn(SLOTS, rank, outputs)
    a[BASE], b[BASE] = 0, 0
    g = torch.rand(SLOTS, outputs) + 0.5 if scaled else None
    if g is not None:
        g[BASE] = 1
    bias = torch.randn(outputs).to(DEVICE, dtype) if biased else None
    z, x, a, b = (t.to(DEVICE, dtype) for t in (z, x, a, b))
    return z, x, a, b, None if g is None else g.to(DEVICE), bias


def exact(z, x, a, b, g, bias, slots):
    z, x, a, b, g, bias = (None if t is None else t.double() for t in (z, x, a, b, g, bias))
    rows = []
    for t, s in enumerate(slots):
        y = z[t] + (x[t] @ a[s].T) @ b[s]
        y = y if g is None else g[s] * y
        rows.append(y if bias is None else y + bias)
    return torch.stack(rows)


def run(given, slots):
    z, *others = given
    return routed(z.clone(), *others, routes(torch.tensor(slots, device=DEVICE), SLOTS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mix", MIXES)
def test_agrees_with_float64(mix, dtype):
    slots = MIXES[mix]
    for scaled, biased in ((True, True), (False, False)):
        given = inputs(slots, dtype, scaled=scaled, biased=biased)
        plain = routed_reference(*given, torch.tensor(slots, device=DEVICE))
        assert within_budget(run(given, slots), plain, exact(*given, slots), dtype)


@pytest.mark.parametrize(("outputs", "features", "rank"), [(16, 300, 1), (200, 16, 16), (33, 700, 65), (64, 128, 130)])
def test_any_shape(outputs, features, rank):
    for slots in (MIXES["in no order"], MIXES["few"]):
        given = inputs(slots, outputs=outputs, features=features, rank=rank)
        plain = routed_reference(*given, torch.tensor(slots, device=DEVICE))
        assert within_budget(run(given, slots), plain, exact(*given, slots), torch.float32)


def test_a_token_of_the_base_is_left_alone():
    slots = [0, 3, 0, 3]
    given = inputs(slots, biased=False)
    assert torch.equal(run(given, slots)[::2], given[0][::2])
    assert not torch.equal(run(given, slots)[1::2], given[0][1::2])


def test_a_token_s_output_does_not_depend_on_the_others():
    given = inputs(MIXES["many"])
    together = run(given, MIXES["many"])
    z, x, *others = given
    for t in (0, 2, 7):
        alone = run((z[t : t + 1], x[t : t + 1], *others), MIXES["many"][t : t + 1])
        assert formula.error(alone[0], together[t].double()) < 1e-6


def test_tiles_are_of_one_slot_and_hold_every_token(monkeypatch):
    # What the kernel is given, also where there is no GPU: no shape depends on the slots.
    from theodora.kernels import routed as module

    monkeypatch.setattr(module, "interpreted", lambda: True)
    for slots in MIXES.values():
        to = module.routes(torch.tensor(slots), SLOTS)
        assert len(to.tiles) == min(len(slots), len(slots) // 16 + min(len(slots), SLOTS))
        seen = []
        for slot, start, stop in to.tiles.tolist():
            assert stop - start <= module.TILE
            tokens = to.order_T[start:stop].tolist()
            assert all(slots[t] == slot for t in tokens)
            seen += tokens
        assert sorted(seen) == list(range(len(slots)))


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1, 64, 256])
def test_in_a_cuda_graph(tokens):
    slots = torch.zeros(tokens, dtype=torch.int32, device=DEVICE)
    given = inputs([0] * tokens, torch.bfloat16, 1024, 4096, 16)
    z, *others = given

    def step():
        return routed(z.clone(), *others, routes(slots, SLOTS))

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            y = step()
    for _ in range(5):
        slots.copy_(torch.randint(0, SLOTS, (tokens,)))
        graph.replay()
        plain = routed_reference(*given, slots.long())
        assert formula.error(y, plain.double()) < 5e-3


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, under the interpreter
@pytest.mark.parametrize("mix", MIXES)
def test_a_slot_that_is_not_finite_changes_no_bit_of_other_rows(mix):
    slots = MIXES[mix]
    z, x, a, b, g, bias = inputs(slots)
    right = run((z, x, a, b, g, bias), slots)
    unused = sorted(set(range(SLOTS)) - set(slots))
    for bad in {slots[0], slots[len(slots) // 2], *unused[:1], *unused[-1:]}:
        its = torch.tensor([slot == bad for slot in slots], device=DEVICE)
        ruined = [t.clone() for t in (z, x, a, b, g)]
        ruined[0][its], ruined[1][its] = torch.nan, torch.inf
        for tensor in ruined[2:]:
            tensor[bad] = torch.nan
        assert torch.equal(run((*ruined, bias), slots)[~its], right[~its])
