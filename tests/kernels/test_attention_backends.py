"""When cuDNN's attention may run; what it costs is seen on a GPU alone."""

import pytest
import torch

from theodora.kernels.attention_backends import attention_of_new_lengths, repeatable_attention


def cudnn_within(context):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with context:
        within = torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    return within


def test_repeatable_attention_is_not_cudnns():
    assert not cudnn_within(repeatable_attention())


@pytest.mark.parametrize(("tokens", "runs"), [(1, False), (2047, False), (2048, True), (100_000, True)])
def test_short_rows_of_new_lengths_do_without_its_plans(tokens, runs):
    assert cudnn_within(attention_of_new_lengths(tokens)) == runs


def test_a_deterministic_run_keeps_torchs_choice():
    torch.use_deterministic_algorithms(True)
    try:
        assert cudnn_within(attention_of_new_lengths(8))
    finally:
        torch.use_deterministic_algorithms(False)
