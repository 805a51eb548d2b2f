"""Attention by the bounds of sequences against attention on each sequence alone, in float64."""

import pytest
import torch
from torch.nn import functional as F

from formula import DEVICE
from theodora.fastpath.packed_attention import SEQUENCES, Sequences, attend, attention_apart, attention_apart_reference
from theodora.train.packed_rows import attention_by_bounds, bounds_of

GPU = DEVICE == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float64


def inputs(lengths, heads=4, kv_heads=2, features=16, dtype=DTYPE):
    tokens = sum(lengths)
    shape = (heads, kv_heads, kv_heads)
    made = [torch.randn(1, h, tokens, features, device=DEVICE).to(dtype).requires_grad_() for h in shape]
    positions = torch.cat([torch.arange(n, device=DEVICE) for n in lengths])[None]
    return made, bounds_of(positions)


def alone(query, key, value, lengths, window=None, scale=None):
    """Each sequence by itself, in float64."""
    outputs = []
    for q, k, v in zip(*(t.double().split(lengths, dim=2) for t in (query, key, value)), strict=True):
        n, groups = q.shape[2], q.shape[1] // k.shape[1]
        back = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)
        seen = (back >= 0) & (back < (window or n))
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale))
    return torch.cat(outputs, dim=2).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("lengths", [(5, 9, 1), (15,), (1,) * 15, tuple(range(1, 20))])
def test_each_sequence_is_by_itself(lengths, window):
    (query, key, value), bounds = inputs(lengths)
    found = attention_apart(query, key, value, bounds, max(lengths), 0.3, window)
    expected = alone(query, key, value, lengths, window, 0.3)
    bound = {"rtol": 2e-2, "atol": 2e-2} if GPU else {}
    torch.testing.assert_close(found.double(), expected, **bound)
    dy = torch.randn_like(expected)
    grads = torch.autograd.grad(found, (query, key, value), dy.to(found.dtype))
    wanted = torch.autograd.grad(expected, (query, key, value), dy)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want.to(grad.dtype), **bound)


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 1)])
def test_heads_that_share_keys(heads):
    (query, key, value), bounds = inputs((7, 4), *heads)
    found = attention_apart(query, key, value, bounds, 11)
    torch.testing.assert_close(found, attention_apart_reference(query, key, value, bounds, 11), rtol=2e-2, atol=2e-2)


def test_bounds_have_few_shapes():
    for lengths in ((3,), (2, 5), (1,) * 16, (1,) * 17, (1,) * 200):
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        bounds = bounds_of(positions)
        ends = torch.tensor([0, *lengths]).cumsum(0)
        assert bounds.dtype == torch.int32
        assert torch.equal(bounds[: len(ends)], ends.int())
        assert bool((bounds[len(ends) :] == sum(lengths)).all())
    assert len(bounds_of(torch.zeros(1, 1))) == len(bounds_of(torch.zeros(1, 16))) == 17
    assert len(bounds_of(torch.zeros(1, 195))) == len(bounds_of(torch.zeros(1, 220))) == 225


def test_what_would_be_left_out_is_an_error():
    (query, key, value), bounds = inputs((5, 2))
    module = torch.nn.Identity()

    def original(*_, **__):
        return "original"

    given = {SEQUENCES: Sequences(bounds, 5)}
    flash = {"cu_seq_lens_q": bounds, "max_length_q": 5}
    for others in ({}, flash):
        assert attend(original, module, query, key, value, **others) == "original"
        assert attend(original, module, query, key, value, torch.ones(7, 7), **others) == "original"
    assert attend(original, module, query, key, value, None, **given)[0].shape == (1, 7, 4, 16)
    for wrong in ({"softcap": 30.0}, {"is_causal": False}, {"attention_mask": torch.ones(7, 7)}):
        with pytest.raises(RuntimeError, match="packed rows knows no"):
            attend(original, module, query, key, value, **given, **wrong)
    with attention_by_bounds(), pytest.raises(RuntimeError, match="not told where"):
        attend(original, module, query, key, value, None, **flash)
    with pytest.raises(RuntimeError, match="packed rows"):
        attend(original, module, query.expand(2, -1, -1, -1), key, value, None, **given)


@pytest.mark.parametrize("positions", [[5, 6, 7, 0, 1, 2], [0, 1, 2, 5, 6, 7], [3, 3, 3]])
def test_a_sequence_begins_wherever_positions_do_not_go_on(positions):
    found = bounds_of(torch.tensor([positions]))
    starts = [0, 3] if len(positions) == 6 else [0, 1, 2]
    assert found.tolist() == starts + [len(positions)] * (len(found) - len(starts))
