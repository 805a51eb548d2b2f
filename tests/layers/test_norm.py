"""RMSNorm on our kernel: the module's own forward runs only where the kernel does not fit."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from formula import DEVICE
from steps import needs_triton
from theodora import kernels
from theodora.layers.norm import restore_norm, speed_up_norm


@needs_triton
def test_the_kernel_gives_the_same_numbers(monkeypatch):
    module, x = LlamaRMSNorm(16).to(DEVICE), torch.randn(3, 16, device=DEVICE)
    torch.nn.init.normal_(module.weight)
    wanted = module(x)
    assert speed_up_norm(module)
    assert torch.equal(module(x), wanted)  # the weight trains
    module.requires_grad_(False)
    with kernels.reference():
        assert torch.equal(module(x), wanted)
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda *_: pytest.fail("the module's own forward ran"))
    torch.testing.assert_close(module(x), wanted)
    restore_norm(module)
    assert type(module) is LlamaRMSNorm
