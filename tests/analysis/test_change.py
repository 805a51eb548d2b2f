"""ΔM, ΔD and effective rank of one weight, against the paper's formulas as they are written."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from theodora.analysis import change as change_module
from theodora.analysis.change import adapter_change, effective_rank, low_rank_values, singular_values, tuned_change
from theodora.files.adapter import AdapterTensors
from theodora.functional import merged_weight


def as_written(w: torch.Tensor, tuned: torch.Tensor) -> tuple[float, float]:
    w, tuned = w.double(), tuned.double()
    magnitude = (tuned.norm(dim=1) - w.norm(dim=1)).abs().mean()
    direction = (1 - torch.cosine_similarity(w, tuned, dim=1, eps=0)).mean()
    return float(magnitude), float(direction)


def entropy_rank(difference: torch.Tensor) -> float:
    shares = torch.linalg.svdvals(difference.double())
    shares = shares[shares > 1e-9 * shares[0]] / shares.sum()
    return math.exp(-float((shares * shares.log()).sum()))


def example(out: int, inner: int, rank: int, size: float, dora: bool, seed: int) -> tuple[torch.Tensor, AdapterTensors]:
    generator = torch.Generator().manual_seed(seed)
    w, a, b = (torch.randn(shape, generator=generator) for shape in ((out, inner), (rank, inner), (out, rank)))
    m = w.norm(dim=1) * (1 + size * torch.randn(out, generator=generator)) if dora else None
    return w, AdapterTensors(a, size * b, m, 0.5)


@settings(deadline=None, max_examples=40)
@given(
    out=st.integers(1, 20),
    inner=st.integers(2, 30),
    rank=st.integers(1, 6),
    size=st.sampled_from([1e-3, 0.1, 1.0]),
    dora=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_an_adapter_is_its_merged_weight(out, inner, rank, size, dora, seed):
    w, t = example(out, inner, rank, size, dora, seed)
    merged = merged_weight(w.double(), t.a.double(), t.b.double(), t.scale, t.magnitude)
    for found in (adapter_change(w, t), tuned_change(w, merged)):
        magnitude, direction = as_written(w, merged)
        assert found.magnitude == pytest.approx(magnitude, rel=1e-9)
        assert found.direction == pytest.approx(direction, rel=1e-6, abs=1e-14)
        assert found.relative_magnitude == pytest.approx(magnitude / float(w.double().norm(dim=1).mean()), rel=1e-9)
        assert found.size == pytest.approx(float((merged - w).norm() / w.double().norm()), rel=1e-9)
        assert found.effective_rank == pytest.approx(entropy_rank(merged - w.double()), rel=1e-4)


def test_a_direction_that_hardly_moved_keeps_its_digits():
    w = torch.randn(4, 64, dtype=torch.float64)
    across = torch.randn_like(w)
    across -= (across * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True) * w
    turned = w + 1e-9 * across
    exact = float((1e-18 * across.square().sum(1) / w.square().sum(1)).mean()) / 2
    assert tuned_change(w, turned).direction == pytest.approx(exact, rel=1e-5)  # 1 - cos would be 0


@pytest.mark.parametrize("dora", [True, False])
def test_pieces_are_the_whole(monkeypatch, dora):
    w, t = example(17, 8, 3, 0.1, dora, 0)
    whole = adapter_change(w, t)
    monkeypatch.setattr(change_module, "_PIECE", 24)
    assert vars(adapter_change(w, t)) == pytest.approx(vars(whole), rel=1e-12)
    monkeypatch.setattr(change_module, "_LARGEST", 10)
    assert tuned_change(w, w + 1).effective_rank is None


def test_dora_that_only_stretches_does_not_turn():
    w, t = example(6, 8, 2, 0.0, True, 0)
    stretched = AdapterTensors(t.a, t.b, 1.5 * w.norm(dim=1), t.scale)
    found = adapter_change(w, stretched)
    assert found.relative_magnitude == pytest.approx(0.5, rel=1e-6)
    assert found.direction < 1e-14


def test_a_magnitude_that_changed_its_sign_turns_the_row_round():
    w, t = example(1, 8, 2, 0.0, True, 0)
    found = adapter_change(w, AdapterTensors(t.a, t.b, -w.norm(dim=1), t.scale))
    assert found.direction == pytest.approx(2)
    assert found.magnitude < 1e-6


def test_rows_of_zeros_have_a_length_but_no_direction():
    w = torch.zeros(2, 3)
    w[0, 0] = 1
    tuned = torch.tensor([[0.0, 1, 0], [0, 0, 2]])
    found = tuned_change(w, tuned)
    assert found.direction == pytest.approx(1)  # a right angle, of the row that has one
    assert found.magnitude == pytest.approx(1)  # 0 and 2
    nothing = tuned_change(torch.zeros(2, 3), torch.zeros(2, 3))
    assert nothing.magnitude == 0
    assert math.isnan(nothing.direction)


def test_ranks():
    assert effective_rank(torch.tensor([2.0, 2, 2, 0])) == pytest.approx(3)
    assert effective_rank(torch.zeros(3)) == 0
    assert math.isnan(effective_rank(torch.tensor([1.0, math.nan])))
    for shape in ((5, 9), (9, 5)):
        matrix = torch.randn(shape, dtype=torch.float64)
        exact = torch.linalg.svdvals(matrix)
        for scale in (1, 1e-200, 1e200):
            assert torch.allclose(singular_values(scale * matrix).sort(descending=True)[0] / scale, exact, rtol=1e-6)
    _, t = example(9, 5, 3, 1.0, False, 0)
    update = t.scale * t.b.double() @ t.a.double()
    assert torch.allclose(low_rank_values(t), torch.linalg.svdvals(update)[:3])
    assert bool(singular_values(torch.full((2, 2), math.nan)).isnan().all())


def test_nan_is_not_hidden():
    w, tuned = torch.ones(2, 2), torch.tensor([[1.0, math.nan], [1, 1]])
    found = tuned_change(w, tuned)
    assert math.isnan(found.size)
    assert math.isnan(found.magnitude)
