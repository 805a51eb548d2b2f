"""Attention with sinks against the softmax that has one more score, in float64: outputs and all gradients.

Without a GPU, flash attention's two operators are played in float64: what is tested there is what is made of them.
"""

import pytest
import torch

from formula import DEVICE, F64, error
from theodora.kernels import sink_attention as file
from theodora.kernels.operators import on_paper
from theodora.kernels.sink_attention import sink_attention, sink_attention_reference, takes

GPU = DEVICE == "cuda"
DTYPE = torch.bfloat16 if GPU else F64
ROUNDING = 2e-2 if GPU else 1e-12
LENGTHS = [None, (5, 9, 1), (15,), (1,) * 15, (4, 0, 0, 11)]


def by_the_formula(q, k, v, sinks, scale, window=None, lengths=None):
    """Each sequence of each row alone, by a softmax over its scores and the sink."""
    groups, rows = q.shape[1] // k.shape[1], []
    for row in zip(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), strict=True):
        parts = []
        for q1, k1, v1 in zip(*(t.split(lengths or t.shape[1], dim=1) for t in row), strict=True):
            at = torch.arange(q1.shape[1], device=q.device)
            back = at[:, None] - at
            scores = (scale * q1 @ k1.mT).masked_fill((back < 0) | (back >= (window or len(at) + 1)), -torch.inf)
            p = torch.exp(scores) / (torch.exp(scores).sum(-1, keepdim=True) + torch.exp(sinks)[:, None, None])
            parts.append(p @ v1)
        rows.append(torch.cat(parts, 1))
    return torch.stack(rows).transpose(1, 2)


def played(query, cum_seq, causal, left, right):
    """Which key a query sees, (B, 1, T, T) or (1, T, T), in flash attention's words."""
    assert causal
    tokens = query.shape[-3]
    at = torch.arange(tokens)
    back = at[:, None] - at
    seen = (back >= 0) & ((back <= left) if left is not None else back >= 0)
    assert right == (None if left is None else 0)
    if cum_seq is not None:
        assert cum_seq.dtype == torch.int32
        sequence = torch.searchsorted(cum_seq.long(), at, right=True)
        seen &= sequence[:, None] == sequence
    return seen


def heads_first(query, *keys):
    groups = query.shape[-2] // keys[0].shape[-2]
    return query.transpose(-3, -2), *(t.repeat_interleave(groups, -2).transpose(-3, -2) for t in keys)


def forward(q, k, v, cum_q, cum_k, max_q, max_k, dropout, causal, debug, *, scale, window_size_left, window_size_right):
    assert (cum_q is cum_k, max_q, dropout, debug) == (True, max_k, 0.0, False)
    assert q.dim() == (4 if cum_q is None else 3)
    seen = played(q, cum_q, causal, window_size_left, window_size_right)
    q, k, v = heads_first(q, k, v)
    scores = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(-3, -2), scores.logsumexp(-1), torch.zeros(2), torch.zeros(()), None


def backward(
    dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, rng, unused,
    *, scale, window_size_left, window_size_right,
):  # fmt: skip
    """As the kernel does it: from `out` and `lse` as they are given, whatever they are."""
    assert (rng.shape, unused.shape) == ((2,), ())
    seen = played(q, cum_q, causal, window_size_left, window_size_right)
    shape = (*k.shape[:-1], -1, k.shape[-1])
    q, k, v = heads_first(q, k, v)
    dout, out = dout.transpose(-3, -2), out.transpose(-3, -2)
    p = torch.exp((q @ k.mT * scale).masked_fill(~seen, -torch.inf) - lse[..., None])
    ds = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True))
    dq, dk, dv = (t.transpose(-3, -2) for t in (scale * ds @ k, scale * ds.mT @ q, p.mT @ dout))
    dk, dv = (t.unflatten(-2, (shape[-3], -1)).sum(-2) for t in (dk, dv))
    return dq, dk, dv


@pytest.fixture(params=["kernel", "reference"])
def attention(request, monkeypatch):
    """The fast way, on a GPU by flash attention itself; and the reference."""
    if request.param == "reference":
        return sink_attention_reference
    if not GPU:
        monkeypatch.setattr(file, "on_gpu", lambda _: True)
        monkeypatch.setattr(file, "_flash", forward)
        monkeypatch.setattr(file, "_flash_backward", backward)
    return sink_attention


def inputs(rows=1, tokens=15, heads=4, kv_heads=2, features=16):
    shapes = [(rows, h, tokens, features) for h in (heads, kv_heads, kv_heads)]
    made = [torch.randn(shape, device=DEVICE).to(DTYPE) for shape in shapes]
    return [t.requires_grad_() for t in [*made, torch.randn(heads, device=DEVICE).to(DTYPE)]]


def check(attention, made, scale, window=None, lengths=None):
    ends = None if lengths is None else torch.tensor((0, *lengths), device=DEVICE).cumsum(0).int()
    found = attention(*made, scale, window, ends, max(lengths or [0]))
    exact = [t.detach().double().requires_grad_() for t in made]
    expected = by_the_formula(*exact, scale, window, lengths)
    assert found.dtype == DTYPE
    assert error(found, expected) < ROUNDING
    dy = torch.randn_like(expected)
    grads = torch.autograd.grad(found, made, dy.to(found.dtype))
    for grad, want, leaf in zip(grads, torch.autograd.grad(expected, exact, dy.to(DTYPE).double()), made, strict=True):
        assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)
        assert error(grad, want) < ROUNDING


@pytest.mark.parametrize("window", [None, 1, 3, 40])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_sink_is_one_more_score(attention, lengths, window):
    check(attention, inputs(), 0.3, window, lengths)


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("rows", [1, 3])
def test_heads_that_share_keys(attention, heads, rows):
    check(attention, inputs(rows, 9, *heads), 0.25, 4)


@pytest.mark.parametrize("sink", [-30.0, 30.0])
def test_sinks_that_take_nothing_or_nearly_all(attention, sink):
    made = inputs(2)
    with torch.no_grad():
        made[3].fill_(sink)
    check(attention, made, 0.3, 5)


def test_frozen_sinks_get_no_gradient(attention):
    made = inputs()
    made[3].requires_grad_(False)
    attention(*made, 0.3).sum().backward()
    assert made[3].grad is None
    assert all(t.grad is not None for t in made[:3])


@pytest.mark.parametrize("bounds", [None, (0, 4, 9)])
def test_on_paper(bounds):
    """Flash attention's own signatures, layouts of its sums and of gradients, as torch's fake kernels have them."""
    made = [t.detach().to("meta", torch.bfloat16).requires_grad_() for t in inputs(1 if bounds else 3, 9)]
    with on_paper("cuda"):
        y = sink_attention(*made, 0.3, 4, bounds and torch.tensor(bounds, device="meta", dtype=torch.int32), 5)
        y.sum().backward()
    assert (y.shape, y.dtype) == ((1 if bounds else 3, 9, 4, 16), torch.bfloat16)
    assert y.is_contiguous()
    assert all(t.grad.shape == t.shape for t in made)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({}, True),
        ({"features": 256}, True),
        ({"features": 20}, False),
        ({"features": 264}, False),
        ({"tokens": 1}, False),
        ({"rows": 0}, False),
        ({"heads": 6, "kv_heads": 4}, False),
        ({"dtype": torch.float32}, False),
        ({"key": {"tokens": 8}}, False),
        ({"value": {"features": 32}}, False),
        ({"value": {"dtype": torch.float16}}, False),
    ],
)
def test_what_flash_attention_takes(others, expected):
    def tensor(heads, rows=2, tokens=9, features=16, dtype=torch.bfloat16, **_):
        return torch.empty(rows, heads, tokens, features, dtype=dtype, device="meta")

    kv_heads = others.get("kv_heads", 2)
    made = [tensor(**{"heads": 4} | others), *(tensor(kv_heads, **_kv(others, name)) for name in ("key", "value"))]
    assert not takes(*made)  # on a device without it
    with on_paper("cuda"):
        assert takes(*made) is expected


def _kv(others, name):
    return {key: value for key, value in {**others, **others.get(name, {})}.items() if key != "heads"}
