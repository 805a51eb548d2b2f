"""Objectives side by side: pairs for all, of which sft learns the better answer."""

import json

import pytest

from theodora.compare import CompareConfig
from theodora.errors import ConfigError

METHODS = ["lora", {"method": "lora", "objective": "dpo"}, {"method": "dora", "objective": "simpo", "beta": 1.0}]


@pytest.fixture
def pairs(tmp_path):
    words = ("even", "odd")
    rows = [{"prompt": f"{n}?", "chosen": words[n % 2], "rejected": words[1 - n % 2]} for n in range(60)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(path), "validation": 8, "test": 16, "score": "labels"}
    return {"data": {"parity": data}, "methods": METHODS, "learning_rates": [1e-2], "reference": ["lora"]}


def test_objectives_are_compared(run, pairs, undrawn):
    records = run(**pairs, steps=12)
    finals = {record.method: record for record in records.values() if record.phase == "final"}
    assert finals.keys() == {"lora", "lora-dpo", "dora-simpo"}
    assert {record.status for record in finals.values()} == {"ok"}, finals
    for record in finals.values():
        assert 0 <= record.score <= 1
        assert record.general_loss > 0
    first = {name: record.losses[0][1] for name, record in finals.items()}
    assert first["lora-dpo"] == pytest.approx(0.6931472, abs=1e-5)
    assert finals["lora-dpo"].losses[-1][1] < first["lora-dpo"]
    assert first["lora"] > 1  # of a token, not of a pair


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ({"method": "lora", "objective": "kto"}, "objective is 'kto'; expected one of sft, dpo"),
        ({"method": "full", "objective": "dpo"}, "no adapter to switch off"),
        ({"method": "lora", "beta": 0.1}, "of an objective other than sft"),
        ({"method": "lora", "objective": "dpo", "replay": 0.1}, "replay is of sft"),
    ],
)
def test_what_makes_no_sense_is_refused(method, told, options):
    with pytest.raises(ConfigError, match=told):
        CompareConfig.from_options(options | {"methods": [method]})
