"""General text among the rows trained on."""

import json

import pytest

from theodora.data.replay import mix
from theodora.errors import ConfigError


def test_the_share_is_one_of_all_rows():
    rows, texts = list(range(90)), [f"text {i}" for i in range(4)]
    mixed = mix(rows, texts, 0.1, seed=0)
    assert mixed[:90] == rows
    assert len(mixed) == 100
    assert {mixed.count(text) for text in texts} == {2, 3}  # ten of four, each about as often
    assert mix(rows, texts, 0.0, seed=0) == rows
    assert mix(rows, texts, 0.1, seed=0) == mixed
    with pytest.raises(ConfigError, match="no general text"):
        mix(rows, [], 0.1, seed=0)


def test_training_takes_it(run, tmp_path):
    texts = tmp_path / "general.jsonl"
    texts.write_text("".join(json.dumps({"text": f"Some text number {i}."}) + "\n" for i in range(30)))
    plain = run(output=str(tmp_path / "plain"), held_out=0, max_steps=10)
    mixed = run(output=str(tmp_path / "mixed"), held_out=0, max_steps=10, replay=str(texts), replay_share=0.5)
    assert mixed.tokens != plain.tokens
    assert f"replay: {texts}" in (tmp_path / "mixed" / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"replay_share is 1.0"):
        run(replay=str(texts), replay_share=1.0)
