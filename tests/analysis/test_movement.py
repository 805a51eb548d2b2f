"""Row movement without B·A, against the written-out weights in float64."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from theodora.analysis.movement import measure, update_norm
from theodora.files.adapter import AdapterTensors
from theodora.functional import merged_weight


def tensors(out: int, inner: int, rank: int, *, size: float, dora: bool, seed: int = 0) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    w, a, b = (torch.randn(shape, generator=generator) for shape in ((out, inner), (rank, inner), (out, rank)))
    magnitude = w.norm(dim=1) * (1 + 0.1 * torch.randn(out, generator=generator)) if dora else None
    return w, AdapterTensors(a, size * b, magnitude, 0.5)


def written_out(w: torch.Tensor, t: AdapterTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Relative change of the rows' length and the angle in degrees, by Kahan's formula for angles."""
    magnitude = None if t.magnitude is None else t.magnitude.double()
    merged = merged_weight(w.double(), t.a.double(), t.b.double(), t.scale, magnitude)
    u = w.double() / w.double().norm(dim=1, keepdim=True)
    v = merged / merged.norm(dim=1, keepdim=True)
    angle = 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))
    return merged.norm(dim=1) / w.double().norm(dim=1) - 1, torch.rad2deg(angle)


@settings(deadline=None, max_examples=40)
@given(
    out=st.integers(1, 20),
    inner=st.integers(2, 40),
    rank=st.integers(1, 8),
    size=st.sampled_from([1e-6, 1e-3, 0.1, 1.0]),
    dora=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(out=13, inner=2, rank=8, size=1e-3, dora=False, seed=2)  # a row that changes nearly along itself
def test_movement_is_that_of_the_merged_weight(out, inner, rank, size, dora, seed):
    w, t = tensors(out, inner, rank, size=size, dora=dora, seed=seed)
    moved = measure(w, t)
    change, angle = written_out(w, t)
    # Also tiny movements keep their leading digits, of which 1 - cos would have none.
    assert torch.allclose(moved.angle.double(), angle, rtol=1e-3, atol=1e-5 * float(angle.max()) + 1e-9)
    assert torch.allclose(moved.magnitude.double(), change, rtol=1e-3, atol=2e-7 if dora else 1e-5 * size)
    update = 0.5 * (t.b.double() @ t.a.double()).norm()
    assert update_norm(t) == pytest.approx(float(update))
    assert moved.relative_update == pytest.approx(float(update / w.double().norm()), rel=1e-4)
    assert not moved.magnitude_rests


def test_a_negative_magnitude_turns_the_row_round():
    w, t = tensors(3, 8, 2, size=0.1, dora=True)
    assert t.magnitude is not None
    t.magnitude[1] *= -1
    assert torch.allclose(measure(w, t).angle.double(), written_out(w, t)[1], rtol=1e-4)
    assert measure(w, t).angle[1] > 150


def test_rows_of_zeros_have_no_direction_and_are_left_out():
    w, t = tensors(4, 8, 2, size=0.1, dora=True)
    w[2] = 0
    moved = measure(w, t)
    assert len(moved.angle) == len(moved.magnitude) == 3
    assert torch.isfinite(moved.angle).all()
    nothing = measure(torch.zeros(4, 8), t)
    assert not len(nothing.angle)
    assert math.isnan(nothing.relative_update)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_magnitudes_at_rest_are_recognised(dtype, stored):
    w, t = tensors(16, 64, 2, size=0.1, dora=True)
    # Training may have held the base in bfloat16, whatever the file holds.
    m = w.to(dtype).float().norm(dim=1).to(stored)
    assert measure(w, AdapterTensors(t.a, t.b, m, t.scale)).magnitude_rests
    one_moved = torch.cat([m[:1] * 1.02, m[1:]])
    assert not measure(w, AdapterTensors(t.a, t.b, one_moved, t.scale)).magnitude_rests
