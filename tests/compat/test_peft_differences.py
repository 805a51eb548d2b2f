"""What the README says of PEFT beside Theodora, run on the PEFT that is installed.

If one of these fails after an upgrade, PEFT has changed, and the README's table has to follow.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from theodora import AdapterConfig, inject_adapter, merge_adapter, unmerge_adapter
from tiny import tiny_model

# peft 0.21 calls a property of transformers 5.23 by its old name
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:peft")


def peft_dora(model, **options):
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, **options))


def q_proj(model):
    return next(module for path, module in model.named_modules() if path.endswith("layers.0.self_attn.q_proj"))


def with_a_row_of_zeros():
    model = tiny_model("llama")
    with torch.no_grad():
        q_proj(model).weight[3] = 0
    return model


def test_a_row_of_zeros():
    x = torch.randn(5, 32)
    expected = q_proj(with_a_row_of_zeros())(x)
    assert bool(q_proj(peft_dora(with_a_row_of_zeros()))(x)[:, 3].isnan().all())
    ours = inject_adapter(with_a_row_of_zeros(), AdapterConfig(rank=4, targets=("q_proj",)))
    torch.testing.assert_close(q_proj(ours)(x), expected)


def residue(model, weight, merge, unmerge):
    """How far a weight is from where it was after merging and unmerging, relative."""
    before = weight(model).detach().clone()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    merge(model)
    unmerge(model)
    return float((weight(model).detach() - before).float().norm() / before.float().norm())


def test_merge_and_unmerge_in_bfloat16():
    theirs = peft_dora(tiny_model("llama", dtype=torch.bfloat16))
    left = residue(
        theirs,
        lambda m: q_proj(m).base_layer.weight,
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
    )
    assert left > 0
    ours = inject_adapter(tiny_model("llama", dtype=torch.bfloat16), AdapterConfig(rank=4, targets=("q_proj",)))
    assert residue(ours, lambda m: q_proj(m).weight, merge_adapter, unmerge_adapter) == 0


def products_with_the_base_weight(model):
    """How many products of the size of x·Wᵀ one forward pass of q_proj makes."""
    count = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal count
            shapes = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]
            count += "mm" in str(func) and (50, 32) in shapes and (32, 32) in shapes
            return func(*args, **(kwargs or {}))

    with Watch():
        q_proj(model).train()(torch.randn(50, 32))
    return count


def test_dropout_and_the_base_weight():
    theirs = peft_dora(tiny_model("llama"), lora_dropout=0.5)
    ours = inject_adapter(tiny_model("llama"), AdapterConfig(rank=4, targets=("q_proj",), dropout=0.5))
    assert products_with_the_base_weight(theirs) == 2
    assert products_with_the_base_weight(ours) == 1
