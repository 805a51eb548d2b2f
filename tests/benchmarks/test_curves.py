"""What the comparisons of loss curves share: the judgement on made-up curves, the split, the picture of stored runs."""

import json

import pytest

import scripts

RESULTS = scripts.ROOT / "benchmarks" / "results"


@pytest.fixture
def curves():
    return scripts.load("benchmarks/curves.py")


def made_up(offset):
    """Three seeds of the reference that lie 0.1 apart, and another way at `offset` from each."""
    seeds = {seed: [3.0 - 0.01 * step + 0.1 * seed for step in range(24)] for seed in range(3)}
    return [
        {"seed": seed, "way": way, name: [[step, loss + change] for step, loss in enumerate(losses)]}
        for name in ("train",)
        for seed, losses in seeds.items()
        for way, change in (("bf16", 0.0), ("fp8", offset))
    ]


@pytest.mark.parametrize(("offset", "within"), [(0.02, True), (0.15, False), (-0.5, False)])
def test_the_judgement(curves, offset, within):
    judged = curves.judge(made_up(offset), "train", "bf16", "fp8")
    assert judged["within_the_spread"] is within
    assert judged["same_seed_difference"] == pytest.approx(abs(offset))
    assert judged["difference_between_seeds"] == pytest.approx(((0.01 + 0.01 + 0.04) / 3) ** 0.5)
    assert judged["final_mean_difference"] == pytest.approx(offset)


def test_the_same_rows_are_held_out_every_time(curves, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"text": "{n}"}}\n' for n in range(20)), encoding="utf-8")
    found = []
    for name in "ab":
        (tmp_path / name).mkdir()
        curves.split_rows(data, 5, tmp_path / name)
        found.append([(tmp_path / name / f"{part}.jsonl").read_text().splitlines() for part in ("held_out", "train")])
    assert found[0] == found[1]
    assert [len(part) for part in found[0]] == [5, 15]
    assert sorted(found[0][0] + found[0][1]) == sorted(data.read_text().splitlines())


def test_stored_runs_are_judged_and_drawn_as_they_were(monkeypatch, tmp_path, capsys):
    stored, figure = RESULTS / "fp8_curve.json", tmp_path / "again.png"
    script = scripts.run(monkeypatch, "benchmarks/fp8_curve.py", "--draw", stored, "--figure", figure)
    assert "fp8 stays within the seed-to-seed spread of bf16: the same seed differs by 0.37" in capsys.readouterr().out
    assert figure.read_bytes().startswith(b"\x89PNG")
    report = json.loads(stored.read_text(encoding="utf-8"))
    for name, before in report["judgement"]["fp8"].items():
        found = script["curves"].judge(report["runs"], name, "bf16", "fp8")
        assert found.pop("final") == before.pop("final")
        assert found == pytest.approx(before)
