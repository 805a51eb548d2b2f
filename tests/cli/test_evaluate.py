import json
import re
import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest

from theodora.cli.main import main

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(6)]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def evaluate(capsys):
    """Run the command with --json; gives what it printed on standard output, which must be JSON alone."""

    def run(*arguments):
        code = main(["evaluate", *map(str, arguments), "--json"])
        output = capsys.readouterr()
        assert code == 0, output.err
        return json.loads(output.out)

    return run


def test_json_stands_alone_on_standard_output(data, tiny_model_dir, evaluate):
    scores = evaluate("--model", tiny_model_dir("llama"), "--data", data, "--max-new-tokens", "12")
    assert (scores["rows"], scores["exact_match"]) == (6, 0.0)
    assert scores["tokens"] == 6 * (len("answer 0") + 1)  # a byte each, and the end of the turn
    assert scores["loss"] > 0
    assert scores["data"] == str(data)


def test_the_table_is_for_people(data, tiny_model_dir, capsys):
    assert main(["evaluate", "--model", str(tiny_model_dir("llama")), "--data", str(data)]) == 0
    printed = capsys.readouterr()
    assert "exact match" in printed.out
    assert "0.0%" in printed.out
    assert "6 rows read as" in printed.err


def test_an_adapter_is_scored_by_either_name(data, adapter, tiny_model_dir, evaluate):
    base = tiny_model_dir()
    arguments = ("--data", data, "--no-exact-match")
    alone = evaluate("--model", base, *arguments)
    adapted = evaluate("--model", base, "--adapter", adapter, *arguments)
    found = evaluate("--model", adapter, *arguments)
    assert adapted["loss"] == found["loss"] != alone["loss"]
    assert adapted["exact_match"] is None


def test_limit_and_template(data, tiny_model_dir, evaluate):
    model = ("--model", tiny_model_dir("llama"), "--data", data, "--no-exact-match")
    assert evaluate(*model, "--limit", "2")["rows"] == 2
    assert evaluate(*model, "--no-chat-template")["loss"] != evaluate(*model)["loss"]


def test_plain_text_has_a_loss_and_no_exact_match(tmp_path, tiny_model_dir, evaluate):
    (tmp_path / "texts.jsonl").write_text('{"text": "some text"}\n{"text": "more of it"}\n', encoding="utf-8")
    scores = evaluate("--model", tiny_model_dir("gpt2"), "--data", tmp_path / "texts.jsonl")
    assert scores["exact_match"] is None
    assert scores["perplexity"] > 1


def test_warnings_are_said_on_standard_error(data, tiny_model_dir, capsys):
    model = str(tiny_model_dir("llama"))
    assert main(["evaluate", "--model", model, "--data", str(data), "--json", "--max-new-tokens", "4"]) == 0
    printed = capsys.readouterr()
    assert "Warning: 6 of 6 reference answers are longer than max_new_tokens (4)" in printed.err
    assert json.loads(printed.out)["exact_match"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--data", "missing.jsonl"], 1), (["--limit", "0"], 2), (["--dtype", "int3"], 2), (["--batch-sizes", "3"], 2)],
)
def test_bad_usage(arguments, code, data, tiny_model_dir, capsys):
    given = {"--model": str(tiny_model_dir("llama")), "--data": str(data), **dict([arguments])}
    assert main(["evaluate", *(word for pair in given.items() for word in pair)]) == code
    assert capsys.readouterr().out == ""


def test_labels_words_and_own_metrics(evaluate, tiny_model_dir, data, tmp_path):
    metric = tmp_path / "own.py"
    metric.write_text("def length(answer, reference):\n    return len(reference)\n")
    scores = evaluate(
        "--model", tiny_model_dir(), "--data", data, "--labels", "auto", "--f1", "--metric", f"{metric}:length",
        "--max-new-tokens", "9",
    )  # fmt: skip
    assert 0 <= scores["label_accuracy"] <= 1
    assert 0 <= scores["token_f1"] <= 1
    assert scores["metrics"] == {"length": 8.0}


def test_lm_eval_is_asked_for_by_name(evaluate, tiny_model_dir, data, monkeypatch, capsys):
    import_module("theodora.evaluate.harness")
    monkeypatch.setattr(sys.modules["theodora.evaluate.harness"], "find_spec", lambda name: None)
    assert main(["evaluate", "--model", str(tiny_model_dir()), "--data", str(data), "--lm-eval", "arc_easy"]) == 2
    assert "pip install 'lm-eval" in capsys.readouterr().err


@pytest.fixture
def lm_eval(monkeypatch):
    """A package of that name, which records what it is asked; its answer, or its error, is set by the test."""
    asked = SimpleNamespace(answer={}, seen=None)

    def simple_evaluate(**given):
        asked.seen = given
        if isinstance(asked.answer, Exception):
            raise asked.answer
        return {"results": asked.answer}

    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lm_eval"].simple_evaluate = simple_evaluate
    sys.modules["lm_eval.models.huggingface"].HFLM = lambda **given: SimpleNamespace(**given)
    import_module("theodora.evaluate.harness")
    monkeypatch.setattr(sys.modules["theodora.evaluate.harness"], "find_spec", lambda name: True)
    return asked


def test_figures_of_lm_eval_stand_in_the_table(lm_eval, tiny_model_dir, data, capsys):
    lm_eval.answer = {"arc_easy": {"alias": "arc_easy", "acc,none": 0.25, "acc_stderr,none": "N/A"}}
    model = str(tiny_model_dir())
    asked = ("--data", str(data), "--lm-eval", "arc_easy", "--limit", "2", "--batch-size", "3", "--labels", "auto")
    assert main(["evaluate", "--model", model, *asked]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"arc_easy acc,none +0\.25", shown)
    assert "stderr" not in shown  # no number
    assert "right label likeliest" in shown
    assert lm_eval.seen["tasks"] == ["arc_easy"]
    assert lm_eval.seen["limit"] == 2
    assert lm_eval.seen["model"].batch_size == 3


def test_a_task_that_lm_eval_does_not_know(lm_eval, tiny_model_dir, data, capsys):
    lm_eval.answer = KeyError("arc_hard")
    assert main(["evaluate", "--model", str(tiny_model_dir()), "--data", str(data), "--lm-eval", "arc_hard"]) == 1
    assert "lm-eval cannot run arc_hard" in capsys.readouterr().err


def test_what_rows_hold_and_nothing_is_learned_from_is_in_the_result(tmp_path, tiny_model_dir, evaluate):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "id": 7}\n', encoding="utf-8")
    scores = evaluate("--model", tiny_model_dir("llama"), "--data", path, "--no-exact-match")
    assert scores["left_out"] == [{"what": "the column 'id'", "rows": 1, "why": "not used"}]


def test_each_row_before_and_after(data, adapter, tiny_model_dir, evaluate, tmp_path, capsys):
    words = ("--data", data, "--max-new-tokens", "5")
    both = evaluate("--model", adapter, "--base", "--rows", tmp_path / "rows.jsonl2", *words)
    alone = evaluate("--model", tiny_model_dir(), *words)
    assert both["base"]["loss"] == pytest.approx(alone["loss"])
    assert both["loss"] != pytest.approx(alone["loss"], rel=0.01)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl2").read_text().splitlines()]
    assert [row["row"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["prompt"][-1]["content"] if isinstance(row["prompt"], list) else row["prompt"] for row in rows] == [
        row["prompt"] for row in ROWS
    ]
    assert [row["expected"] for row in rows] == [row["completion"] for row in ROWS]
    for whole, of in ((both, rows), (both["base"], [row["base"] for row in rows])):
        sums = sum(line["loss"] * row["tokens"] for line, row in zip(of, rows, strict=True))
        assert sums / whole["tokens"] == pytest.approx(whole["loss"])
        assert all(line["right"] is False and isinstance(line["answer"], str) for line in of)
        assert any(len(line["answer"]) > 1 for line in of)  # whole, and not broken off where they are wrong
    assert main(["evaluate", "--model", str(adapter), "--base", "--data", str(data), "--no-exact-match"]) == 0
    assert re.search(r"base +model\n.*loss per token +[\d.]+ +[\d.]+\n", capsys.readouterr().out)


def test_another_model_as_the_base_is_asked_with_the_same_prompts(data, adapter, tiny_model_dir, evaluate, tmp_path):
    words = ("--data", data, "--no-exact-match")
    found = evaluate("--model", adapter, "--base", tiny_model_dir("gpt2"), "--rows", tmp_path / "rows", *words)
    assert found["base"]["loss"] == pytest.approx(evaluate("--model", tiny_model_dir("gpt2"), *words)["loss"])
    first = json.loads((tmp_path / "rows").read_text().splitlines()[0])
    assert first["answer"] is first["right"] is first["base"]["answer"] is None


def test_rows_of_which_nothing_is_left_and_texts_of_several_pieces_keep_their_numbers(
    tiny_model_dir, evaluate, tmp_path
):
    short, long = {"prompt": "a", "completion": "b"}, {"prompt": "a" * 200, "completion": "b"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (short, long, short)))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": "word " * n}) + "\n" for n in (1, 40, 2)))
    model = ("--model", tiny_model_dir("llama"), "--max-length", "60", "--max-new-tokens", "2")
    evaluate(*model, "--data", tmp_path / "rows.jsonl", "--rows", tmp_path / "a")
    first, cut, last = [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()]
    assert (cut["loss"], cut["tokens"]) == (None, 0)
    assert first["loss"] == pytest.approx(last["loss"])
    whole = evaluate(*model, "--data", tmp_path / "texts.jsonl", "--rows", tmp_path / "b")
    texts = [json.loads(line) for line in (tmp_path / "b").read_text().splitlines()]
    assert [text["prompt"] for text in texts] == ["word " * n for n in (1, 40, 2)]
    assert sum(text["tokens"] for text in texts) == whole["tokens"]
    assert texts[1]["tokens"] > 60


def test_what_cannot_be_written_or_compared_is_said_before_long_work(data, tiny_model_dir, tmp_path, capsys):
    words = ["evaluate", "--model", str(tiny_model_dir("llama")), "--data", str(data)]
    (tmp_path / "taken").write_text("mine")
    for more, told in (
        (["--rows", str(tmp_path / "taken")], "already"),
        (["--rows", str(tmp_path / "nowhere" / "rows")], "no folder"),
        (["--base"], "no adapter"),
    ):
        assert main([*words, *more]) == 2
        assert told in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "mine"


def test_where_no_terminal_is_progress_is_told_by_tenths(data, adapter, tmp_path, capfd):
    rows = ["--base", "--rows", str(tmp_path / "rows"), "--max-new-tokens", "2"]
    assert main(["evaluate", "--model", str(adapter), "--data", str(data), *rows]) == 0
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("base: ", "model: "))]
    assert lines == [f"{whose}: {what} 6/6" for whose in ("base", "model") for what in ("loss", "answers")]
