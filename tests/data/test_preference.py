"""Preferences in the layouts people have: what each row becomes, and what is refused, skipped or said."""

import json

import pytest

from theodora.data import as_answers, load_examples, tokenize_preferences
from theodora.errors import DataError
from theodora.kernels.cross_entropy import IGNORED
from tiny import tiny_tokenizer


def user(text):
    return {"role": "user", "content": text}


def model(text):
    return {"role": "assistant", "content": text}


ASKED, GOOD, BAD = [user("Q")], [model("good")], [model("bad")]
TALK = [user("Hello"), model("Hi"), user("Q")]


@pytest.fixture
def read(tmp_path):
    """Rows in our shape, and what was left out."""

    def load(*rows, kind="pairs"):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_examples(path, kind=kind)

    return load


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
        {"prompt": ASKED, "chosen": "good", "rejected": "bad"},
        {"prompt": ASKED, "chosen": [*ASKED, *GOOD], "rejected": [*ASKED, *BAD]},
        {"chosen": [*ASKED, *GOOD], "rejected": [*ASKED, *BAD]},
        {"prompt": "Q", "chosen": [*ASKED, *GOOD], "rejected": [*ASKED, *BAD]},  # UltraFeedback, and Argilla's mixes
        {"prompt": "Q", "chosen": GOOD, "rejected": BAD},
        {"instruction": "Q", "chosen_response": "good", "rejected_response": "bad"},
        {"question": "Q", "chosen": "good", "rejected": "bad"},
        {"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "good"}}
        | {"rejected": {"from": "gpt", "value": "bad"}},
        {"messages": [*ASKED, *GOOD], "rejected_response": "bad"},
        {"messages": ASKED, "chosen": "good", "rejected": "bad"},
        {"input": {"messages": ASKED}, "preferred_output": GOOD, "non_preferred_output": BAD},
        {"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"},
        {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " good", "rejected": " bad"},
    ],
)
def test_layouts_become_turns(row, read):
    examples = read(row)
    found = examples.dataset[0]
    said = [{key: turn[key].strip() if key == "content" else turn[key] for key in turn} for turn in found["chosen"]]
    assert found["prompt"] == ASKED
    assert said == GOOD
    assert [turn["content"].strip() for turn in found["rejected"]] == ["bad"]
    assert examples.format == "preference"
    assert examples.left_out == ()


def test_whole_conversations_are_parted_where_they_begin_to_differ(read):
    examples = read({"chosen": [*TALK, *GOOD], "rejected": [*TALK, *BAD]})
    assert examples.dataset[0]["prompt"] == TALK
    spoken = "\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: Q\n\nAssistant: "
    assert read({"chosen": spoken + "good", "rejected": spoken + "bad"}).dataset[0]["prompt"] == TALK
    same = read({"chosen": [*TALK, *GOOD], "rejected": [*TALK, *GOOD]})  # which is said when its tokens are known
    assert (same.dataset[0]["prompt"], same.dataset[0]["chosen"]) == (TALK, GOOD)


def test_texts_stay_as_they_stand(read):
    found = read({"prompt": "Q: ", "chosen": "good", "rejected": "bad"}).dataset[0]
    assert (found["prompt"], found["chosen"], found["rejected"]) == ("Q: ", "good", "bad")
    found = read({"prompt": "Q: ", "chosen": "Q: good", "rejected": "Q: bad"}).dataset[0]
    assert (found["prompt"], found["chosen"], found["rejected"]) == ("Q: ", "good", "bad")
    found = read({"chosen": "Tell me: it goes up", "rejected": "Tell me: it grows"}).dataset[0]
    assert (found["prompt"], found["chosen"], found["rejected"]) == ("Tell me: it ", "goes up", "grows")


def test_what_only_turns_can_say_makes_turns_of_all_rows(read):
    plain = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
    rows = read(plain, {**plain, "system": "Be brief."}).dataset
    assert rows[0]["prompt"] == ASKED
    assert rows[1]["prompt"] == [{"role": "system", "content": "Be brief."}, *ASKED]
    rows = read(
        {"instruction": "Q", "input": "x", "history": [["a", "b"]], "chosen": "good", "rejected": "bad"}
    ).dataset
    assert rows[0]["prompt"] == [user("a"), model("b"), user("Q\n\nx")]


def test_what_is_not_used_is_named(read):
    row = {"prompt": "Q", "chosen": "good", "rejected": "bad", "score_chosen": 9.0, "id": "7"}
    examples = read(row, {"prompt": "Q", "chosen": "good", "rejected": ""})
    assert len(examples) == 1
    assert {part.what: part.rows for part in examples.left_out} == {
        "the column 'score_chosen'": 1,
        "the column 'id'": 1,
        "pairs with an empty answer": 1,
    }
    assert "'chosen' is to become likelier than 'rejected'" in examples.description


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "Q", "completion": "A"}, "which --objective sft learns"),
        ({"chosen": [user("a"), *GOOD], "rejected": [user("b"), *BAD]}, "differ in turn 1 already, which is no answer"),
        ({"prompt": "Q", "chosen": [user("a")], "rejected": GOOD}, "begins with a turn of 'user'"),
        ({"prompt": "", "chosen": GOOD, "rejected": BAD}, "has no prompt that the answers reply to"),
        ({"prompt": "Q", "chosen": 7, "rejected": BAD}, "'chosen'"),
    ],
)
def test_what_is_no_pair_is_refused(row, told, read):
    with pytest.raises(DataError, match=told):
        read(row)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "completion": GOOD, "label": True},
        {"messages": [*ASKED, *GOOD], "label": "true"},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "good"}], "kto_tag": 1},
        {"instruction": "Q", "output": "good", "label": True},
    ],
)
def test_judged_answers(row, read):
    examples = read(row, kind="judged")
    found = examples.dataset[0]
    assert (found["prompt"], found["completion"], found["label"]) == (ASKED, GOOD, True)
    assert examples.format == "unpaired"


def test_a_verdict_is_true_or_false(read):
    with pytest.raises(DataError, match="'label' is 'perhaps'; expected true"):
        read({"prompt": "Q", "completion": "A", "label": "perhaps"}, kind="judged")
    texts = read({"prompt": "Q", "completion": "A", "label": False}, kind="judged").dataset[0]
    assert (texts["prompt"], texts["completion"], texts["label"]) == ("Q", "A", False)


class TestTokens:
    def test_both_sequences_stand_in_a_row(self, read):
        tokenizer = tiny_tokenizer()
        row = tokenize_preferences(read({"prompt": "Q", "chosen": "good", "rejected": "no"}), tokenizer, max_length=99)[
            0
        ]
        cut = row["lengths"][0]
        assert sum(row["lengths"]) == len(row["input_ids"]) == len(row["labels"])
        for part, answer in ((slice(cut), "good"), (slice(cut, None), "no")):
            text = tokenizer.decode(row["input_ids"][part])
            assert text == f"<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
            learned = [token for token in row["labels"][part] if token != IGNORED]
            assert tokenizer.decode(learned) == f"{answer}<|im_end|>"

    def test_pairs_of_no_use_are_counted(self, read):
        pairs = [("Q", "good", "bad"), ("Q", "same", "same"), ("x" * 60, "good", "bad"), ("Q", "g" * 90, "bad")]
        examples = read(*({"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs))
        rows = tokenize_preferences(examples, tiny_tokenizer(), max_length=40, use_chat_template=False)
        assert len(rows) == 2
        told = rows.info.description
        assert "1 pairs dropped: both answers are the same tokens" in told
        assert "1 rows dropped: nothing to learn within max_length=40" in told
        assert "rows cut at max_length=40" in told
        assert max(map(max, rows["lengths"])) == 40

    def test_a_judged_answer_stays_with_one_to_another_prompt(self, read):
        tokenizer = tiny_tokenizer()
        examples = read(
            *({"prompt": f"{n}", "completion": f"a{n}", "label": n % 2 == 0} for n in range(4)), kind="judged"
        )
        rows = tokenize_preferences(examples, tokenizer, max_length=99, use_chat_template=False)
        for n, row in enumerate(rows):
            cut = row["lengths"][0]
            assert tokenizer.decode(row["input_ids"][:cut]) == f"{n}a{n}<|im_end|>"
            assert tokenizer.decode(row["input_ids"][cut:]) == f"{n}a{(n + 2) % 4}<|im_end|>"
        assert rows["label"] == [True, False, True, False]
        alone = read({"prompt": "Q", "completion": "A", "label": True}, kind="judged")
        with pytest.raises(DataError, match="expected two at least"):
            tokenize_preferences(alone, tokenizer, max_length=99)

    def test_pairs_as_answers(self, read):
        pairs = read({"prompt": "Q", "chosen": "good", "rejected": "bad"})
        assert as_answers(pairs).dataset[0] == {"prompt": "Q", "completion": "good"}
        assert as_answers(read({"prompt": "Q", "completion": "A"}, kind="answers")).dataset[0]["completion"] == "A"
