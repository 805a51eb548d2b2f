"""Data as a model will see them: which tokens are learned, seen, cut; the same process by way of the page."""

import json

import pytest

from theodora.data import load_examples, tokenize
from theodora.errors import TheodoraError
from theodora.studio.look import look_at_data, look_at_plan


def texts(part, kind):
    return "".join(piece["text"] for piece in part["pieces"] if piece["kind"] == kind)


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def test_learned_tokens_are_those_of_training(tmp_path, tiny_model_dir, tiny_tokenizer):
    path = write(
        tmp_path / "a.jsonl", {"prompt": "Héllo?", "completion": "Wörld 🙂"}, {"prompt": "b", "completion": "c"}
    )
    found = look_at_data(path, str(tiny_model_dir()))
    assert (found["format"], found["rows"], found["copies"]) == ("prompt-completion", 2, 0)
    (part,) = found["shown"][0]["parts"]
    assert (
        texts(part, "seen") == "<|im_start|>user\nHéllo?<|im_end|>\n<|im_start|>assistant\n\n"
    )  # the last of them behind the answer
    assert texts(part, "learned").startswith("Wörld 🙂<|im_end|>")
    rows = tokenize(load_examples(path), tiny_tokenizer, max_length=1024)
    assert part["tokens"] == len(rows[0]["input_ids"])
    assert part["learned"] == sum(label != -100 for label in rows[0]["labels"])
    assert found["lengths"]["tokens"] == sum(map(len, rows["input_ids"]))
    assert sum(found["lengths"]["bins"]) == 2


def test_what_is_cut_is_shown_and_a_row_without_anything_to_learn_is_named(tmp_path, tiny_model_dir):
    rows = (
        {"prompt": "a", "completion": "b" * 60},
        {"prompt": "a" * 60, "completion": "b"},
        {"prompt": "a", "completion": "b" * 60},
    )
    found = look_at_data(write(tmp_path / "a.jsonl", *rows), str(tiny_model_dir()), max_length=50)
    first, second, _ = found["shown"]
    assert texts(first["parts"][0], "cut")
    assert first["parts"][0]["learned"] > 0
    assert first["problem"] == ""
    assert "nothing to learn" in second["problem"]
    assert found["copies"] == 1
    assert (found["lengths"]["cut"], found["lengths"]["of"]) == (3, 3)
    assert found["lengths"]["longest"] > 50
    assert "dropped" in found["note"]


LONG = "The {} of the river is nine miles from here by the old road, and nobody has ever walked it {} in a day."


def test_near_copies_are_shown_side_by_side(tmp_path):
    rows = [{"prompt": f"number {n} of them {n * n}", "completion": f"so {n * 7} it is, {n}"} for n in range(60)]
    near = [
        {"prompt": "Where?", "completion": LONG.format(*words)} for words in (("mouth", "twice"), ("mouth", "here"))
    ]
    held_out = write(tmp_path / "b.jsonl", *rows[:3], near[1])
    found = look_at_data(write(tmp_path / "a.jsonl", *rows[3:], near[0]), eval_data=held_out)["near"]
    assert (found["count"], found["held_out"], found["training"], found["totals"]) == (1, 4, 58, [4, 58])
    (pair,) = found["pairs"]
    assert (pair["row"], pair["of"]) == (4, 58)
    assert 0.8 <= pair["share"] < 1
    assert [side[1]["pieces"][0]["text"] for side in pair["sides"]] == [near[1]["completion"], near[0]["completion"]]
    # Of one file those that a run would hold out, by their rows in the file.
    texts = [LONG.format(f"spring{n} and the far end{n} with all{n}", f"round{n} back{n} home{n}") for n in range(30)]
    twice = write(tmp_path / "c.jsonl", *({"text": text + more} for text in texts for more in ("", " Truly.")))
    found = look_at_data(twice)["near"]
    assert found["count"] == found["held_out"] == 3
    assert all((pair["row"] - 1) // 2 == (pair["of"] - 1) // 2 and pair["row"] != pair["of"] for pair in found["pairs"])
    assert look_at_data(write(tmp_path / "d.jsonl", rows[0], rows[0]))["near"] is None


def test_pairs_and_judged_answers_and_prompts(tmp_path, tiny_model_dir):
    model = str(tiny_model_dir())
    pairs = write(tmp_path / "p.jsonl", {"prompt": "q", "chosen": "good", "rejected": "bad"})
    (row,) = look_at_data(pairs, model, objective="dpo")["shown"]
    assert [(part["name"], texts(part, "learned")[:3]) for part in row["parts"]] == [
        ("better answer", "goo"),
        ("worse answer", "bad"),
    ]
    long = {"prompt": "q", "chosen": "good", "rejected": "bad" * 20}
    ranked = write(tmp_path / "r.jsonl", *[{"prompt": "q", "chosen": "good", "rejected": "bad"}, long])
    shown = look_at_data(ranked, model, objective="reward", max_length=64)["shown"]
    assert [row["problem"] for row in shown] == ["", "dropped: longer than 64 tokens"]
    judged = write(tmp_path / "j.jsonl", *({"prompt": "q", "completion": f"a{i}", "label": i == 0} for i in range(3)))
    names = [row["parts"][0]["name"] for row in look_at_data(judged, model, objective="kto")["shown"]]
    assert names == ["good answer", "bad answer", "bad answer"]
    (row,) = look_at_data(write(tmp_path / "g.jsonl", {"prompt": "q", "answer": "a"}), model, objective="grpo")["shown"]
    assert row["parts"][0]["learned"] == 0


def test_without_a_model_rows_are_text(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"messages": [{"role": "user", "content": "<b>hi</b>"}, {"role": "assistant", "content": "yo"}]},
    )
    (row,) = look_at_data(path)["shown"]
    assert [(part["name"], part["pieces"]) for part in row["parts"]] == [
        ("user", [{"text": "<b>hi</b>", "kind": "plain"}]),
        ("assistant", [{"text": "yo", "kind": "plain"}]),
    ]


def test_whether_it_fits(options):
    found = look_at_plan(options | {"rank": 2, "max_steps": 4, "held_out": 4})
    assert (found["fits"], found["family"]) == (True, "llama")
    with pytest.raises(TheodoraError, match="rank"):
        look_at_plan(options | {"rank": 0})


def test_the_page_asks_a_process_of_its_own(studio_of, rows, options, tmp_path):
    studio = studio_of()
    found = studio.post("/api/data", {"path": str(rows), "model": options["model"], "max_length": 200})
    assert found["rows"] == 24
    assert found["shown"][0]["parts"][0]["learned"] > 0
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt":\n')
    assert "line 2" in studio.post("/api/data", {"path": str(tmp_path / "bad.jsonl")}, status=422)["error"]
    assert "empty" in studio.post("/api/data", {"path": " "}, status=400)["error"]
    assert studio.post("/api/plan", options)["fits"]
    studio.worker._process.kill()  # by the system, say, for its memory
    studio.worker._process.wait()
    assert studio.post("/api/data", {"path": str(rows)})["rows"] == 24
