"""Keys and values that would reach other requests: zeros in their place, marks, and nothing else changed."""

import math

import pytest
import torch

from formula import DEVICE
from theodora.kernels.finite import bound, keep_finite, keep_finite_reference


def inputs(tokens=9, heads=3, width=20, v_width=12, dtype=torch.float32):
    key, value = torch.randn(1, heads, tokens, width), torch.randn(1, tokens, heads, v_width)
    # Strides as models give them: keys as they are after rotation, values a view of the product.
    return key.to(DEVICE, dtype), value.to(DEVICE, dtype).transpose(1, 2)


def run(key, value, by=keep_finite):
    ruined = torch.zeros(key.shape[2] + 3, dtype=torch.int32, device=DEVICE)
    return *by(key.clone(), value.clone(), ruined), ruined


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by", [keep_finite, keep_finite_reference])
def test_tokens_that_are_not_finite_are_zeros_and_all_others_are_bit_for_bit(by, dtype):
    key, value = inputs(dtype=dtype)
    key[0, 0, 1, 0] = key[0, -1, 7, -1] = math.nan
    value[0, 1, 2, 3], value[0, 2, 4, -1] = math.inf, -math.inf
    kept_key, kept_value, ruined = run(key, value, by)
    wrong = [1, 2, 4, 7]
    assert ruined.nonzero().flatten().tolist() == wrong
    fine = [t for t in range(9) if t not in wrong]
    for before, after in ((key, kept_key), (value, kept_value)):
        assert after[:, :, wrong].abs().sum() == 0
        assert torch.equal(before[:, :, fine], after[:, :, fine])


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("width", [8, 700])
def test_what_is_finite_is_left_as_it_is(tokens, width):
    key, value = inputs(tokens, heads=5, width=width, v_width=width)
    kept_key, kept_value, ruined = run(key, value)
    assert torch.equal(key, kept_key)
    assert torch.equal(value, kept_value)
    assert not ruined.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keys_that_are_too_large_for_a_score_count_as_infinite(dtype):
    key, value = inputs(dtype=dtype)
    most = bound(dtype)
    key[0, 1, 3, 4], key[0, 1, 5, 4] = most, -most
    assert not run(key, value)[2].any()
    if dtype != torch.float16:  # whose largest number is the bound
        key[0, 1, 3, 4] = -4 * most
        assert run(key, value)[2].nonzero().flatten().tolist() == [3]
