import pytest
import torch

from theodora.kernels import onednn
from theodora.kernels.base_weight import PlainWeight


@pytest.fixture
def calls(monkeypatch):
    """What oneDNN was asked, on a machine where it is the faster one."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN here")
    seen, real = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(onednn, "_mkl_is_slow", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *args: seen.append(args) or real(*args))
    return seen


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_the_same(calls, transposed):
    weight, dz = torch.randn(40, 24), torch.randn(2, 25, 40)
    stored = weight.T.contiguous() if transposed else weight
    with torch.no_grad():
        w = PlainWeight(torch.nn.Parameter(stored), transposed)
        torch.testing.assert_close(w.product_backward(dz), dz @ weight)
        onto = torch.randn(50, 24)
        expected = onto + dz[0].repeat(2, 1) @ weight
        given = w.product_backward(dz[0].repeat(2, 1), onto)
    torch.testing.assert_close(given, expected)
    assert given is onto
    assert len(calls) == 2


@pytest.mark.parametrize("case", ["half", "few", "gradients", "compiling", "subclass", "off", "autocast"])
def test_what_onednn_is_not_for_goes_the_usual_way(calls, case, monkeypatch):
    dz, weight = torch.randn(20, 24), torch.randn(24, 40)
    if case == "half":
        dz, weight = dz.bfloat16(), weight.bfloat16()
    if case == "few":
        dz = dz[:3]
    if case == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    if case == "subclass":
        weight = weight.as_subclass(type("Own", (torch.Tensor,), {}))
    if case == "off":
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with torch.set_grad_enabled(case == "gradients"), torch.autocast("cpu", enabled=case == "autocast"):
        assert onednn.input_gradient(dz, weight) is None
        torch.testing.assert_close(PlainWeight(weight).product_backward(dz), dz @ weight)
    assert not calls


@pytest.mark.parametrize(("name", "slow"), [("AMD EPYC", True), ("Intel(R) Xeon(R)", False), ("", False)])
def test_the_maker_decides(name, slow, monkeypatch):
    for library in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(library, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name})
    assert onednn._mkl_is_slow.__wrapped__() is slow


def test_a_thin_product_is_the_product():
    left, right = torch.randn(50, 24), torch.randn(24, 3)
    given = onednn.thin_product(left, right)
    torch.testing.assert_close(given, left @ right)
    assert given.is_contiguous()
