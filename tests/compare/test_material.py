"""What is read for a comparison."""

import json

from theodora.compare import CompareConfig
from theodora.compare.material import left_out, read_splits


def test_what_rows_hold_and_nothing_is_learned_from_is_named_once_for_each_file(options, tmp_path):
    rows = [{"prompt": f"{n}?", "completion": "even" if n % 2 == 0 else "odd", "id": n} for n in range(60)]
    (tmp_path / "parity.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = left_out(*read_splits(CompareConfig.from_options(options)))
    assert found == [f"the column 'id' of {tmp_path / 'parity.jsonl'}: not used (60 rows)"]
