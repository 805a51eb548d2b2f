"""oneDNN is left alone where its products keep rows apart, and switched off, said, while an engine runs where not."""

import pytest
import torch

import tiny
from theodora.serve import row_mixing
from theodora.serve.row_mixing import NoRowMixing, mixing_widths


def test_float32_products_keep_rows_apart():
    assert mixing_widths(tiny.tiny_model()) == []


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")
def test_products_that_mix_rows_are_not_used_while_an_engine_runs(monkeypatch, caplog):
    model = tiny.tiny_model().to(torch.bfloat16)
    monkeypatch.setattr(row_mixing, "mixes", lambda width, dtype: width == model.config.intermediate_size)
    no_mixing = NoRowMixing(model)
    assert not torch.backends.mkldnn.enabled
    assert f"products of {model.config.intermediate_size} features in bfloat16" in caplog.text
    monkeypatch.setattr(row_mixing, "mixes", lambda width, dtype: False)  # as it looks without oneDNN
    another = NoRowMixing(model)
    no_mixing.end()
    assert not torch.backends.mkldnn.enabled
    another.end()
    assert torch.backends.mkldnn.enabled


def test_what_keeps_rows_apart_is_left_alone(monkeypatch, caplog):
    monkeypatch.setattr(row_mixing, "mixes", lambda width, dtype: False)
    NoRowMixing(tiny.tiny_model().to(torch.bfloat16)).end()
    assert torch.backends.mkldnn.enabled == torch.backends.mkldnn.is_available()
    assert caplog.text == ""


@pytest.mark.parametrize("width", [8, 40, 48, 64, 100])
def test_a_product_that_passes_the_look_gives_the_same_rows_beside_nan(width):
    """What is looked at stands for what is computed: where `mixes` finds nothing, other numbers mix neither."""
    if row_mixing.mixes(width, torch.bfloat16):
        pytest.skip("this CPU's products mix rows, and the engine does not use them")
    x, w = torch.randn(33, width).bfloat16(), torch.randn(48, width).bfloat16()
    beside = x.clone()
    beside[1::3] = torch.nan
    found, expected = (torch.nn.functional.linear(rows, w) for rows in (beside, x))
    others = torch.arange(33) % 3 != 1
    assert torch.equal(found[others], expected[others])
