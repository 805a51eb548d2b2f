"""Prompts for answers of the model's own: what rows of anybody's layout become, and what rewards get of them."""

import json

import pytest

from theodora.data import PromptRows, encode_prompt, load_examples, split_examples, tokenize_prompts
from theodora.errors import DataError
from theodora.kernels.cross_entropy import IGNORED
from tiny import tiny_tokenizer


def user(text):
    return {"role": "user", "content": text}


def model(text):
    return {"role": "assistant", "content": text}


ASKED = [user("Q")]


@pytest.fixture
def read(tmp_path):
    """Rows of a file, as prompts."""

    def load(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_examples(path, kind="prompts")

    return load


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "completion": [model("A")]},
        {"prompt": ASKED, "completion": "A"},
        {"prompt": ASKED, "answer": "A"},
        {"messages": [*ASKED, model("A")]},
        {"messages": ASKED, "solution": "A"},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"instruction": "Q", "input": "", "output": "A"},
        {"question": "Q", "answer": "A"},
        {"problem": "Q", "solution": "A"},
        {"prompt": json.dumps(ASKED), "ground_truth": "A"},
        {"prompt": "\n\nHuman: Q\n\nAssistant:", "reference": "A"},
    ],
)
def test_layouts_become_turns(row, read):
    examples = read(row)
    found = examples.dataset[0]
    assert (found["prompt"], found["completion"]) == (ASKED, [model("A")])
    assert json.loads(found["columns"]) == row
    assert examples.format == "prompts"
    assert examples.left_out == ()


def test_what_stands_beside_a_prompt_is_part_of_it(read):
    row = {"system": "Be brief.", "history": [["H", "I"]], "instruction": "Q", "input": "M", "answer": "A"}
    found = read(row | {"tools": [{"type": "function", "function": {"name": "f"}}]})
    turns = [{"role": "system", "content": "Be brief."}, user("H"), model("I"), user("Q\n\nM")]
    assert found.dataset[0]["prompt"] == turns
    assert json.loads(found.dataset[0]["tools"])[0]["function"]["name"] == "f"


def test_a_text_stays_as_it_stands(read):
    found = read({"prompt": "Q: ", "answer": " A"}, {"prompt": "R: ", "answer": None}).dataset
    assert [(row["prompt"], row["completion"]) for row in found] == [("Q: ", " A"), ("R: ", "")]
    found = read({"prompt": "Q", "answer": "A"}, {"prompt": "R", "system": "Be brief."}).dataset  # all become turns
    assert found[0]["prompt"] == ASKED


@pytest.mark.parametrize(
    ("row", "reference", "said"),
    [
        ({"answer": "A", "solution": "S", "reference": "R"}, "R", "'reference' (not 'answer' or 'solution')"),
        ({"solution": "S", "answer": "A"}, "A", "'answer' (not 'solution')"),
        ({"completion": "C", "label": "L"}, "C", "'completion' (not 'label')"),
        ({"label": 3}, "3", "'label' is what"),
        ({"answer": 3.0}, "3", "'answer' is what"),  # a table with gaps
        ({"answer": 2.5}, "2.5", "'answer' is what"),
        ({"answer": "", "solution": "S"}, "S", "'solution' is what"),
        ({"label": True}, "", "with nothing to compare with"),
        ({"ground_truth": ["A", "B"]}, "", "with nothing to compare with"),
        ({}, "", "with nothing to compare with"),
    ],
)
def test_the_reference_is_the_first_of_a_known_order_and_said(row, reference, said, read):
    examples = read({"prompt": "Q", **row})
    assert examples.dataset[0]["completion"] == reference
    assert said in examples.description


def test_a_reference_that_is_no_text_is_said(read):
    examples = read({"prompt": "Q", "answer": "A"}, {"prompt": "Q", "answer": ["A", "B"]})
    assert examples.dataset[1]["completion"] == ""
    assert [(part.what, part.rows) for part in examples.left_out] == [("the reference in 'answer'", 1)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "Q"}], "no prompt; there are 'text'.*These rows are text, which --objective sft learns"),
        ([{"chosen": "A", "rejected": "B"}], "no prompt.*--objective dpo learns"),
        ([{"id": 3}], "no prompt"),
        ([{"prompt": "Q"}, {"question": "Q"}], "line 2: has no 'prompt', unlike line 1"),
        ([{"prompt": 3}], "line 1: 'prompt' is"),
        ([{"messages": [model("A")]}], "'messages' asks nothing"),
        ([{"prompt": ""}], "nothing to learn from: rows without a prompt: skipped"),
    ],
)
def test_rows_that_ask_nothing_are_refused(rows, message, read):
    with pytest.raises(DataError, match=f"(?s){message}"):
        read(*rows)


def test_an_empty_prompt_is_skipped_and_said(read):
    examples = read({"prompt": "Q"}, {"prompt": " "})
    assert len(examples) == 1
    assert "rows without a prompt: skipped (1 row)" in examples.description


def test_pictures_are_not_used_and_said(read):
    examples = read({"prompt": "Q", "image": "cat.png"})
    assert json.loads(examples.dataset[0]["columns"]) == {"prompt": "Q"}
    assert [part.what for part in examples.left_out] == ["the column 'image'"]


def test_what_json_cannot_say_is_said(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"prompt": ["Q"], "raw": [b"\xff"], "id": [3]}), tmp_path / "rows.parquet")
    examples = load_examples(tmp_path / "rows.parquet", kind="prompts")
    assert json.loads(examples.dataset[0]["columns"]) == {"prompt": "Q", "id": 3}
    assert [part.what for part in examples.left_out] == ["the column 'raw'"]


@pytest.mark.parametrize("template", [None, False])
@pytest.mark.parametrize("prompt", ["1 + 1 =", ASKED])
def test_tokens_end_where_the_answer_begins(prompt, template, read):
    examples = read({"prompt": prompt, "answer": "2"}, {"prompt": prompt, "answer": "2"})
    tokenizer = tiny_tokenizer()
    rows = tokenize_prompts(examples, tokenizer, max_prompt=99, use_chat_template=template)
    assert list(rows["input_ids"]) == 2 * [encode_prompt(examples.dataset[0], tokenizer, template)]
    assert list(rows["row"]) == [0, 1]  # equal prompts stay
    assert all(set(labels) == {IGNORED} for labels in rows["labels"])


def test_prompts_that_leave_no_room_are_left_out_and_said(read):
    examples = read(*({"prompt": "Q" * length} for length in (3, 60, 5)))
    rows = tokenize_prompts(examples, tiny_tokenizer(), max_prompt=40)
    assert list(rows["row"]) == [0, 2]
    assert "1 prompt left out: more than 40 tokens" in rows.info.description
    with pytest.raises(DataError, match="none of 3 prompts leaves room for an answer"):
        tokenize_prompts(examples, tiny_tokenizer(), max_prompt=20)


def test_what_the_template_does_not_show_or_refuses_is_said(read):
    tokenizer = tiny_tokenizer()
    examples = read({"messages": ASKED, "tools": [{"type": "function", "function": {"name": "f"}}]})
    rows = tokenize_prompts(examples, tokenizer, max_prompt=99)
    assert "tools on offer: left out by the chat template" in rows.info.description
    tokenizer.chat_template = "{{ raise_exception('only users speak') }}"
    with pytest.raises(DataError, match=r"row 1 \(user: Q\): .*only users speak"):
        tokenize_prompts(examples, tokenizer, max_prompt=99)


def test_rewards_get_rows_by_their_number(read):
    rows = PromptRows(read({"prompt": "Q", "answer": 2, "id": "a"}, {"prompt": "R", "answer": None, "more": [1]}))
    assert rows.names == ("prompt", "answer", "id", "more", "reference")
    assert rows.unanswered == [1]
    prompts, columns = rows([1, 0, 0])
    assert prompts == ["R", "Q", "Q"]
    assert columns["answer"] == [None, 2, 2]
    assert columns["id"] == [None, "a", "a"]
    assert columns["more"] == [[1], None, None]
    assert columns["reference"] == [None, "2", "2"]
    assert rows.references([0, 1]) == ["2", ""]


def test_a_column_of_that_name_is_the_reference_as_it_stands(read):
    _, columns = PromptRows(read({"prompt": "Q", "reference": 2}))([0])
    assert columns["reference"] == [2]


def test_equal_prompts_are_held_out_together(read):
    examples = read(*({"prompt": f"{n % 4}", "id": n} for n in range(8)))
    training, held_out = split_examples(examples, 2, seed=0)
    assert len(held_out) == 2
    assert not {row["prompt"] for row in training.dataset} & {row["prompt"] for row in held_out.dataset}
