"""Rows on bases that a library quantises which is not beside the tests: `make test` gives HQQ a run of its own.

Those of bitsandbytes are in test_suite.py.
"""

import pytest

from theodora.conformance import suite
from theodora.conformance.quantised import installed


@pytest.mark.parametrize(
    "operation", ["inject", "forward", "backward", "dropout-cost", "autocast", "save-load", "merge", "unmerge"]
)
@pytest.mark.parametrize("dtype", ["hqq"])
def test_ours_holds(dtype, operation):
    if not installed(dtype):
        pytest.skip(f"{dtype} is not installed")
    jobs = suite.plan(operations=[operation], variants=["lora", "dora"], dtypes=[dtype], libraries=["theodora"])
    rows = [row for job in jobs for row in suite.run_job(job)]
    assert len(rows) >= 12  # an embedding is no product
    assert [row for row in rows if row.status != "held"] == []
