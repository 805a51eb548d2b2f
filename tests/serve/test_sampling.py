"""Which tokens the filters leave: against transformers' own, one after the other."""

import pytest
import torch
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from theodora.serve.sampling import pick

ROWS, SIZE = 4096, 24


@pytest.mark.parametrize(("top_p", "top_k", "min_p"), [(0.6, 0, 0.0), (0.7, 5, 0.0), (1.0, 0, 0.15), (0.8, 9, 0.1)])
def test_only_what_the_filters_leave_is_picked_and_as_often(top_p, top_k, min_p):
    logits = 1.5 * torch.randn(1, SIZE, generator=torch.Generator().manual_seed(3))
    kept = MinPLogitsWarper(min_p)(None, logits) if min_p else logits
    kept = TopKLogitsWarper(top_k)(None, kept) if top_k else kept
    kept = TopPLogitsWarper(top_p)(None, kept) if top_p < 1 else kept
    chances = torch.arange(ROWS, dtype=torch.int32) * (2**23 // ROWS)  # evenly
    columns = (
        torch.ones(ROWS),
        chances,
        torch.full((ROWS,), top_p),
        torch.full((ROWS,), top_k),
        torch.full((ROWS,), min_p),
    )
    found = pick(logits.expand(ROWS, -1), *columns, True).bincount(minlength=SIZE) / ROWS
    assert torch.allclose(found, kept.softmax(-1)[0], atol=2 / ROWS)
    assert (found[kept[0].isinf()] == 0).all()


@pytest.mark.parametrize("filters", [True, False])
def test_a_row_of_nan_changes_no_other_and_still_gets_a_token(filters):
    logits = torch.randn(4, 50)
    given = torch.full((4,), 0.7), torch.arange(4) * 2_000_000, torch.full((4,), 0.9), torch.full((4,), 8)
    right = pick(logits, *given, torch.full((4,), 0.01), filters)
    logits[2] = torch.nan
    found = pick(logits, *given, torch.full((4,), 0.01), filters)
    assert found[[0, 1, 3]].tolist() == right[[0, 1, 3]].tolist()
    assert 0 <= found[2] < 50
