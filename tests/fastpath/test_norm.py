"""RMSNorm on our kernel: the module's own forward runs only where the kernel does not fit."""

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from formula import DEVICE
from steps import needs_triton
from theodora import kernels
from theodora.fastpath.norm import restore_norm, speed_up_norm


@needs_triton
def test_the_kernel_gives_the_same_numbers(monkeypatch):
    module, x = LlamaRMSNorm(16).to(DEVICE), torch.randn(3, 16, device=DEVICE)
    torch.nn.init.normal_(module.weight)
    wanted = module(x)
    for _ in range(2):
        assert speed_up_norm(module)
    own, calls = LlamaRMSNorm.forward, []
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: calls.append(1) or own(self, x))
    assert torch.equal(module(x), wanted)  # the weight trains
    module.requires_grad_(False)
    with kernels.reference():
        assert torch.equal(module(x), wanted)
    assert len(calls) == 2
    torch.testing.assert_close(module(x), wanted)
    assert len(calls) == 2
    restore_norm(module)
    assert type(module) is LlamaRMSNorm


def test_other_norms_stay_as_they_are():
    module = torch.nn.LayerNorm(16)
    assert not speed_up_norm(module)
    assert type(module) is torch.nn.LayerNorm
