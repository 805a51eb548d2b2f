"""What the files of other tools mean here: each key and column is used, refused with its place, or said."""

import json
from datetime import date, datetime
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from theodora.data import load_examples, tokenize
from theodora.data.left_out import LeftOut
from theodora.data.notes import Notes
from theodora.data.tools import NULLS, ORDER
from theodora.data.words import read_words
from theodora.errors import DataError

Q = {"role": "user", "content": "Q"}
A = {"role": "assistant", "content": "A"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.fixture
def read(write):
    """Rows → the first row as it is read, and what is left out of all."""

    def read(*rows):
        examples = load_examples(write(list(rows)))
        return dict(examples.dataset[0]), examples.left_out

    return read


@pytest.fixture
def turns(read):
    """Turns → the messages that come of them; everything in them is used."""

    def turns(*given, **columns):
        row, left_out = read({"messages": list(given), **columns})
        assert left_out == ()
        return row["messages"]

    return turns


@pytest.fixture
def complaint(write):
    """Rows → what is wrong with the file."""

    def complaint(*rows):
        with pytest.raises(DataError) as raised:
            load_examples(write(list(rows)))
        return str(raised.value)

    return complaint


def learned(tokenizer, examples):
    """The words that each row of the tokenised examples teaches."""
    rows = tokenize(examples, tokenizer, max_length=512)
    return [
        tokenizer.decode([token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100])
        for row in rows
    ]


class TestColumnsBesideTheText:
    @pytest.mark.parametrize("column", ["system", "system_prompt", "System"])
    @pytest.mark.parametrize("conversation", [[Q, A], [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]])
    def test_a_system_prompt_begins_the_conversation(self, read, column, conversation):
        row, left_out = read({"conversations": conversation, column: "S"})
        assert row["messages"] == [{"role": "system", "content": "S"}, Q, A]
        assert left_out == ()

    def test_a_system_prompt_that_the_conversation_begins_with(self, turns, complaint):
        system = {"role": "system", "content": "S"}
        assert turns(system, Q, A, system=" S\n") == [system, Q, A]
        assert turns(system, Q, A, system="") == [system, Q, A]
        assert "line 2: begins with a system turn and has another text in 'system'; keep one of the two" in complaint(
            {"messages": [Q, A]}, {"messages": [system, Q, A], "system": "T"}
        )

    def test_a_system_prompt_before_turns_to_answer(self, read):
        row, _ = read({"prompt": [Q], "completion": [A], "system": "S"})
        assert row["prompt"] == [{"role": "system", "content": "S"}, Q]

    def test_a_system_prompt_in_a_later_row_makes_turns_of_all(self, read):
        row, left_out = read({"prompt": "Q", "completion": "A"}, {"prompt": "B", "completion": "C", "system": "S"})
        assert row == {"prompt": [Q], "completion": [A]}
        assert left_out == ()

    @pytest.mark.parametrize("as_text", [False, True])
    def test_earlier_turns_are_learned(self, write, make_tokenizer, as_text):
        history = [["Of France?", "Paris"], ["Of Spain?", "Madrid"]]
        row = {"instruction": "And of Italy?", "input": "", "output": "Rome", "system": "S"}
        examples = load_examples(write([row | {"history": json.dumps(history) if as_text else history}]))
        assert [turn["content"] for turn in examples.dataset[0]["prompt"]] == [
            *("S", "Of France?", "Paris", "Of Spain?", "Madrid", "And of Italy?")
        ]
        assert learned(make_tokenizer(template="chatml"), examples) == ["Paris<|im_end|>Madrid<|im_end|>Rome<|im_end|>"]
        assert "'output', of which the latter and the answers in 'history' are learned" in examples.description

    def test_earlier_turns_that_are_none(self, complaint):
        row = {"query": "Q", "response": "A"}
        assert "line 1: item 1 of 'history' is the str 'Paris'; expected a [question, answer] pair" in complaint(
            row | {"history": ["Paris"]}
        )
        assert "'history' is the str 'Paris'; expected a list" in complaint(row | {"history": "Paris"})

    @pytest.mark.parametrize(
        "tools",
        [
            [{"name": "f", "parameters": {}}],
            [{"type": "function", "name": "f", "parameters": {}}],
            [{"function": {"parameters": {}, "name": "f"}, "type": "function"}],
            ['{"name": "f", "parameters": {}}'],
            '[{"name": "f", "parameters": {}}]',
        ],
    )
    def test_tools_in_any_spelling(self, read, tools):
        row, _ = read({"conversations": [Q, A], "tools": tools})
        assert row["tools"] == '[{"type": "function", "function": {"name": "f", "parameters": {}}}]'

    def test_tools_that_are_none(self, complaint):
        assert "line 1: tool 1 of 'tools' is the str 'f'; expected an object" in complaint(
            {"messages": [Q, A], "tools": ["f"]}
        )

    def test_preferences(self, complaint, read):
        for names in ({"chosen": "A", "rejected": "B"}, {"preferred_output": "A", "non_preferred_output": "B"}):
            message = complaint({"prompt": "Q", **names})
            assert f"{next(iter(names))!r} belongs to preferences, which --objective dpo learns" in message
            assert "rename it to 'completion'" in message
        assert "rename it to 'messages'" in complaint({"chosen": [Q, A], "rejected": [Q, A]})
        assert (
            "line 1: 'conversations' ends without an answer, and 'chosen' and 'rejected' hold preferences"
            in complaint(
                {
                    "conversations": [Q],
                    "chosen": {"from": "gpt", "value": "A"},
                    "rejected": {"from": "gpt", "value": "B"},
                }
            )
        )
        for name in ("rejected", "rejected_response"):
            _, left_out = read({"prompt": "Q", "completion": "A", name: "B"})
            assert left_out == (LeftOut(f"the column {name!r}", 1, "not used; --objective dpo learns preferences"),)

    def test_answers_that_are_called_bad_are_said(self, read):
        _, left_out = read({"prompt": "Q", "completion": "A", "label": False}, {"prompt": "Q", "completion": "B"})
        assert left_out == (
            LeftOut(
                "the column 'label'",
                1,
                "not used; what it calls bad is learned like the rest (--objective kto learns both)",
            ),
        )

    @pytest.mark.parametrize("column", ["System Prompt", "system-prompt", " SYSTEM_PROMPT "])
    def test_columns_however_they_are_spelt(self, read, column):
        row, left_out = read({column: "S", "Question": "Q", "ANSWER": "A"})
        assert row == {"prompt": [{"role": "system", "content": "S"}, Q], "completion": [A]}
        assert left_out == ()

    @pytest.mark.parametrize("missing", [{"instruction": ""}, {"instruction": None}, {}])
    def test_an_instruction_and_its_material_may_each_be_missing(self, write, missing):
        rows = [{"instruction": "I", "input": "M", "output": "A"}, {"input": "N", "output": "A"} | missing]
        for given, expected in ((rows, ["I\n\nM", "N"]), (rows[::-1], ["N", "I\n\nM"])):
            examples = load_examples(write(given))
            assert [row["prompt"][0]["content"] for row in examples.dataset] == expected
            assert examples.left_out == ()

    def test_neither_an_instruction_nor_material(self, complaint):
        row = {"instruction": "I", "input": "M", "output": "A"}
        assert "line 2: 'instruction' is empty" in complaint(row, {"instruction": "", "input": " ", "output": "A"})
        assert "line 2: has no 'instruction'; it has 'output'" in complaint(row, {"output": "A"})

    def test_pictures_are_said(self, read):
        row, left_out = read({"messages": [{**Q, "content": "<image>Q"}, A], "images": ["a.png"]})
        assert row["messages"][0]["content"] == "<image>Q"
        assert [str(part) for part in left_out] == [
            "the column 'images': not used; the text beside it is learned as it stands, placeholders such as <image> "
            "included (1 row)"
        ]

    @pytest.mark.parametrize(
        ("row", "says"),
        [
            ({"segments": [{"label": True, "text": "A"}]}, "'segments' is Axolotl's input_output, which is not read"),
            ({"input_ids": [1], "labels": [1]}, "'input_ids' holds tokens, and rows are read as text here"),
        ],
    )
    def test_layouts_that_are_not_read(self, complaint, row, says):
        assert says in complaint(row)

    def test_what_is_not_used_is_counted(self, read):
        rows = [{"messages": [Q, A], "id": i or None, "text": "" if i else "Q A"} for i in range(3)]
        rows.append({"messages": [Q, {**A, "score": 1}, {**A, "score": 2}], "images": [], "source": {"a": None}})
        assert read(*rows)[1] == (
            LeftOut("the column 'text'", 1, "not used"),
            LeftOut("the column 'id'", 2, "not used"),
            LeftOut("the key 'score' of turns", 1, "not used"),
        )

    def test_a_file_with_a_thousand_names(self, write, monkeypatch):
        import sys

        monkeypatch.setattr(sys.modules["theodora.data.load"], "_MOST_LEFT_OUT", 2)
        rows = [{"text": "a", f"b{i}": 1, f"c{i}": 1} for i in range(3)]
        assert [str(part) for part in load_examples(write(rows)).left_out] == [
            "the column 'b0': not used (1 row)",
            "the column 'c0': not used (1 row)",
            "further columns and keys: not used (2 rows)",
        ]

    def test_nothing_is_held_by_null_nan_and_blanks(self, read):
        row, left_out = read({"messages": [Q, A], "system": float("nan"), "a": None, "b": " ", "c": [[], {"d": None}]})
        assert row == {"messages": [Q, A]}
        assert left_out == ()

    def test_a_cell_that_says_a_key_twice(self, write):
        cell = '[{"role": "user", "role": "user", "content": "Q"}]'.replace('"', '""')
        with pytest.raises(DataError, match="expected a list of turns"):
            load_examples(write(f'messages\n"{cell}"\n', "a.csv"))


class TestNumbers:
    def test_numbers_are_read_as_their_text(self, read):
        rows = [{"prompt": "a", "completion": value} for value in (4, 4.0, 0.5, True, -3, 10**20)]
        examples, left_out = [read(row)[0]["completion"] for row in rows], read(*rows)[1]
        assert examples == ["4", "4", "0.5", "true", "-3", "1" + "0" * 20]
        assert left_out == (
            LeftOut("numbers in place of text", 6, "read as their text (4, 0.5, true), whole ones without a fraction"),
        )

    def test_numbers_wherever_words_stand(self, turns, read):
        assert read({"text": 4})[0] == {"text": "4"}
        assert read({"instruction": 1, "input": 2, "output": 3, "system": 4})[0] == {
            "prompt": [{"role": "system", "content": "4"}, {"role": "user", "content": "1\n\n2"}],
            "completion": [{"role": "assistant", "content": "3"}],
        }
        assert read({"messages": [Q, {**A, "content": 4}]})[0]["messages"][1]["content"] == "4"

    def test_flags_are_no_reasoning(self, complaint):
        assert "reasoning of turn 2 of 'messages' is the bool True; expected text" in complaint(
            {"messages": [Q, {**A, "reasoning": True}]}
        )

    def test_numbers_of_tables(self, tmp_path):
        columns = {
            "4.50": [Decimal("4.50")],
            "1": pa.array([1], pa.int8()),
            "0.25": pa.array([0.25], pa.float32()),
            "4": [4.0],
        }
        for text, column in columns.items():
            pq.write_table(pa.table({"prompt": ["a"], "completion": column}), tmp_path / "a.parquet")
            assert load_examples(tmp_path / "a.parquet").dataset[0]["completion"] == text

    @pytest.mark.parametrize(
        ("value", "kind"),
        [
            (date(2026, 1, 2), "date"),
            (datetime(2026, 1, 2, 3), "datetime"),
            (b"4", "bytes"),
            (float("inf"), "float"),
            (Decimal("NaN"), None),
        ],
    )
    def test_values_that_are_no_text(self, tmp_path, value, kind):
        if kind is None:
            assert read_words(value, "'x'", notes := Notes()) == ""
            assert notes.problems == ["'x' is the Decimal Decimal('NaN'); expected text"]
            return
        pq.write_table(pa.table({"prompt": ["a"], "completion": [value]}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=f"row 1: 'completion' is the {kind} .*; expected text"):
            load_examples(tmp_path / "a.parquet")


class TestKeysOfTurns:
    def test_turns_behind_the_last_answer_are_said(self, read):
        _, left_out = read({"messages": [Q, A, Q]}, {"messages": [Q, A]})
        assert left_out == (LeftOut("turns behind the model's last", 1, "nothing is learned from them"),)

    @pytest.mark.parametrize(
        ("asked", "answered"),
        [
            ({"Role": "USER", "Content": "Q"}, {"ROLE": "Assistant", "CONTENT": "A"}),
            ({"From": "Human", "Value": "Q"}, {"From": "GPT", "Value": "A"}),
            ({"from": "input", "value": "Q"}, {"from": "output", "value": "A"}),
            ({"role": "human", "value": "Q"}, {"role": "bot", "value": "A"}),
        ],
    )
    def test_turns_however_they_are_spelt(self, turns, asked, answered):
        assert turns(asked, answered) == [Q, A]

    def test_keys_however_they_are_spelt(self, turns, read):
        assert turns({"Human": "Q", "Assistant": "A"}) == [Q, A]
        assert turns(Q, {**A, "Reasoning Content": "Hm.", "Weight": 1})[1] == {
            **A,
            "reasoning_content": "Hm.",
            "weight": 1,
        }
        row, left_out = read({"messages": [{**Q, "Content": "B"}, A]})
        assert row["messages"] == [Q, A]
        assert [part.what for part in left_out] == ["the key 'Content' of turns"]

    @pytest.mark.parametrize(
        ("turn", "says"),
        [
            ({**Q, "from": "gpt"}, "turn 1 of 'messages' has the role 'user' and is from 'gpt'; keep one of the two"),
            ({**Q, "value": "R"}, "turn 1 of 'messages' (user) has both content and value, not the same"),
            ({"role": "tool_call", "content": "{}", "function_call": {"name": "f"}}, "has function_call beside"),
        ],
    )
    def test_turns_that_say_a_thing_twice(self, complaint, turn, says):
        assert says in complaint({"messages": [turn, A]})

    def test_turns_that_say_the_same_twice(self, turns):
        assert turns({**Q, "from": "human", "value": "Q"}, {**A, "content": "", "value": "A"}) == [Q, A]
        assert turns(Q, {**A, "content": "", "refusal": "No."})[1]["content"] == "No."

    @pytest.mark.parametrize("key", ["tool_calls", "function_call"])
    @pytest.mark.parametrize("role", ["user", "tool"])
    def test_calls_of_others_are_said(self, read, role, key):
        call = {"name": "f", "arguments": "{}"}
        _, left_out = read({"messages": [Q, A, {"role": role, "content": "4", key: call}, A]})
        assert [part.what for part in left_out] == [f"the key {key!r} of turns that are not the model's"]

    def test_slips_of_the_pen_are_guessed(self, read):
        _, left_out = read({"messages": [Q, {**A, "wieght": 1, "emotion": "joy"}], "sytem": "S", "topic": "t"})
        assert {part.what: part.why for part in left_out} == {
            "the key 'wieght' of turns": "not used; did you mean 'weight'?",
            "the key 'emotion' of turns": "not used",
            "the column 'sytem'": "not used; did you mean 'system'?",
            "the column 'topic'": "not used",
        }

    def test_a_turn_without_content_names_its_keys(self, complaint):
        message = complaint({"messages": [{"role": "user", "text": "Q"}, A]})
        assert "turn 1 of 'messages' (user) has no content; its keys are 'role', 'text'" in message
        assert "(user) is null; expected text" in complaint({"messages": [{"role": "user", "content": None}, A]})

    def test_turns_that_are_all_hidden(self, complaint):
        assert "has no assistant turn that is to be learned (their weight is 0)" in complaint(
            {"messages": [Q, {**A, "weight": 0}]}
        )
        assert "has no assistant turn, so there is nothing" in complaint(
            {"messages": [{"role": "system", "content": "S"}]}
        )

    def test_parts_of_turns_are_learned_like_the_rest_and_that_is_said(self, read):
        parts = [{"type": "text", "text": "A", "train": False}, {"type": "text", "text": "B"}]
        row, left_out = read({"messages": [Q, {**A, "content": parts}, Q, {**A, "train_detail": [{"train": False}]}]})
        assert row["messages"][1]["content"] == "AB"
        assert [(part.what, part.why) for part in left_out] == [
            ("the key 'train' of parts of turns", "not used; a turn is learned whole or not at all"),
            ("the key 'train_detail' of turns", "not used; a turn is learned whole or not at all"),
        ]

    @pytest.mark.parametrize(("key", "no"), [("train", False), ("weight", 0)])
    def test_parts_that_all_say_whether_they_are_learned(self, turns, key, no):
        parts = [{"type": "text", "text": word, key: no} for word in "BC"]
        assert turns(Q, {**A, "content": parts}, Q, A)[1] == {**A, "content": "BC", "weight": 0}

    @pytest.mark.parametrize("key", ["text", "content", "value"])
    def test_the_words_of_a_part(self, turns, key):
        thought = [{"type": "reasoning", key: "Hm."}, {"type": "text", key: "A"}]
        assert turns(Q, {**A, "content": thought}) == [Q, {**A, "reasoning_content": "Hm."}]
        part = [{"type": "text", key: "A"}]
        assert turns({**Q, "content": part}, {**A, "content": part}) == [{**Q, "content": "A"}, A]

    @pytest.mark.parametrize("role", ["Tool Response", "tool-result", "FUNCTION_RESPONSE ", "observations"])
    def test_roles_however_they_are_spelt(self, turns, role):
        assert turns(Q, {**A, "tool_calls": [CALL]}, {"role": role, "content": "4"}, A)[2]["role"] == "tool"

    @pytest.mark.parametrize(
        ("key", "no", "yes"),
        [
            *(
                (key, no, yes)
                for key in ("weight", "train", "training", "loss", "loss_scale")
                for no, yes in ((0, 1), (False, True))
            ),
            ("masked", True, False),
            ("mask", True, False),
        ],
    )
    def test_whether_a_turn_is_learned(self, write, make_tokenizer, key, no, yes):
        rows = [{"messages": [Q, {**A, "content": "B", key: no}, Q, {**A, key: yes}]}]
        examples = load_examples(write(rows))
        assert [turn.get("weight") for turn in examples.dataset[0]["messages"]] == [None, 0, None, 1]
        assert learned(make_tokenizer(template="chatml"), examples) == ["A<|im_end|>"]

    def test_whether_a_turn_is_learned_cannot_be_told(self, complaint):
        assert "line 1: weight of turn 2 of 'messages' is the float 0.5; expected 0" in complaint(
            {"messages": [Q, {**A, "weight": 0.5}]}
        )
        assert "mask of turn 2 of 'messages' is the int 1; expected true (hidden from the loss) or false" in complaint(
            {"messages": [Q, {**A, "mask": 1}]}
        )
        assert "turn 2 of 'messages' is to be learned by one and not by another of weight, train" in complaint(
            {"messages": [Q, {**A, "weight": 0, "train": True}]}
        )

    def test_turns_of_others_are_not_learned(self, read):
        row, left_out = read({"messages": [{**Q, "train": True}, A]}, {"messages": [{**Q, "train": False}, A]})
        assert row["messages"] == [Q, A]
        assert left_out == (
            LeftOut("'train' of turns that are not the model's", 1, "only the model's turns are learned"),
        )

    @pytest.mark.parametrize("key", ["thinking", "reasoning", "reasoning_content"])
    def test_reasoning(self, turns, key):
        assert turns(Q, {**A, key: "Hm."}) == [Q, {**A, "reasoning_content": "Hm."}]

    def test_reasoning_in_several_places(self, turns, complaint):
        assert turns(Q, {**A, "thinking": "Hm.", "reasoning": "Hm."})[1]["reasoning_content"] == "Hm."
        assert "turn 2 of 'messages' has reasoning in several places (thinking, reasoning), not the same".replace(
            "thinking, reasoning", "reasoning, thinking"
        ) in complaint({"messages": [Q, {**A, "thinking": "Hm.", "reasoning": "So."}]})

    def test_content_in_parts(self, turns, complaint):
        parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": "A"}]
        assert turns(Q, {**A, "content": parts}) == [Q, {**A, "reasoning_content": "Hm."}]
        assert turns(Q, {"role": "assistant", "content": None, "refusal": "No."})[1]["content"] == "No."
        assert "(user) has parts of type image_url; only text" in complaint(
            {"messages": [{**Q, "content": [{"type": "image_url", "image_url": {}}]}, A]}
        )

    def test_pairs_of_ms_swift(self, read):
        row, _ = read({"conversation": [{"human": "Q", "assistant": "A"}, {"human": "B", "assistant": "C"}]})
        assert [turn["content"] for turn in row["messages"]] == ["Q", "A", "B", "C"]


class TestToolCalls:
    @pytest.mark.parametrize(
        "turn",
        [
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
            {"role": "assistant", "tool_calls": json.dumps([CALL])},
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "function_call", "value": '[{"name": "f", "arguments": "{\\"x\\": 1}"}]'},
            {"role": "tool_call", "content": {"name": "f", "arguments": {"x": 1}}},
        ],
    )
    def test_a_call_in_any_spelling(self, turns, turn):
        assert turns(Q, turn)[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}

    def test_blocks_of_anthropic(self, turns):
        used = [{"type": "tool_use", "id": identity, "name": "f", "input": {"x": 1}} for identity in ("7", "8")]
        results = [
            {"type": "tool_result", "tool_use_id": "7", "content": "4"},
            {"type": "tool_result", "tool_use_id": "8", "content": [{"type": "text", "text": "5"}]},
        ]
        calls = [CALL | {"id": "7"}, CALL | {"id": "8"}]
        assert turns(
            Q,
            {"role": "assistant", "content": [{"type": "text", "text": "A"}, *used]},
            {"role": "user", "content": [*results, {"type": "text", "text": "Q"}]},
            {"role": "assistant", "content": used},
            {"role": "user", "content": results},
            A,
        ) == [
            Q,
            {**A, "tool_calls": calls},
            {"role": "tool", "content": "4", "tool_call_id": "7"},
            {"role": "tool", "content": "5", "tool_call_id": "8"},
            Q,
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "content": "4", "tool_call_id": "7"},
            {"role": "tool", "content": "5", "tool_call_id": "8"},
            A,
        ]

    def test_blocks_that_no_turn_can_hold(self, complaint, read):
        used = {"type": "tool_use", "id": "7", "name": "f", "input": {"x": 1}}
        assert "has parts of type tool_use" in complaint(
            {"messages": [Q, {**A, "content": [used, {"type": "text", "text": "A"}]}]}
        )
        result = {"type": "tool_result", "tool_use_id": "7", "content": "4", "is_error": True}
        _, left_out = read({"messages": [Q, {**A, "content": [used]}, {"role": "user", "content": [result]}, A]})
        assert [part.what for part in left_out] == ["the key 'is_error' of turns"]

    def test_results_that_are_no_text(self, read):
        rows = [
            {"messages": [Q, {**A, "tool_calls": [CALL]}, {"role": "tool", "content": content}, A]}
            for content in ({"b": 1.0, "a": None}, [1, {"c": "é"}], 22)
        ]
        found = [read(row) for row in rows]
        assert [row["messages"][2]["content"] for row, _ in found] == ['{"b": 1}', '[1, {"c": "é"}]', "22"]
        assert [part.what for part in found[0][1]] == [NULLS[0]]

    def test_parameters_in_text(self, read, complaint):
        tool = {"type": "function", "function": {"name": "f", "parameters": '{"properties": {"x": {}}}'}}
        row, _ = read({"messages": [Q, A], "tools": [tool]})
        assert json.loads(row["tools"])[0]["function"]["parameters"] == {"properties": {"x": {}}}
        assert "the parameters of tool 1 of 'tools' are the str 'x'; expected an object" in complaint(
            {"messages": [Q, A], "tools": [{"name": "f", "parameters": "x"}]}
        )

    def test_words_and_several_calls_are_one_turn(self, turns):
        call = {"role": "tool_call", "content": '<think>Hm.</think>\n{"name": "f", "arguments": {"x": 1}}'}
        result = {"role": "tool_response", "content": "4"}
        assert turns(Q, A, call, {**call, "content": '{"name": "f", "arguments": {"x": 1}}'}, result, result, A) == [
            Q,
            {**A, "reasoning_content": "Hm.", "tool_calls": [CALL, CALL]},
            {"role": "tool", "content": "4"},
            {"role": "tool", "content": "4"},
            A,
        ]

    def test_ids_and_names(self, turns):
        result = {"role": "tool", "content": "4", "tool_call_id": "7", "name": "f"}
        assert turns(Q, {**A, "tool_calls": [CALL | {"id": "7"}]}, result, A) == [
            Q,
            {**A, "tool_calls": [CALL | {"id": "7"}]},
            result,
            A,
        ]

    @pytest.mark.parametrize(
        ("turn", "says"),
        [
            (
                {"role": "tool_call", "content": "f(1)"},
                "turn 2 of 'messages' (tool_call) is the str 'f(1)'; expected JSON",
            ),
            (
                {**A, "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]},
                "the arguments of tool_calls of turn 2",
            ),
            (
                {**A, "tool_calls": [{"function": {"name": None, "arguments": {"x": 1}}}]},
                "tool_calls of turn 2 of 'messages' is the dict",
            ),
            ({**A, "tool_calls": [{"type": "custom", "custom": {"name": "f"}}]}, 'expected {"function": {"name"'),
            ({**A, "tool_calls": [CALL], "function_call": {"name": "f"}}, "has both tool_calls and function_call"),
        ],
    )
    def test_a_call_that_cannot_be_one(self, complaint, turn, says):
        assert says in complaint({"messages": [Q, turn]})

    def test_what_is_changed_so_that_all_files_are_alike_is_said(self, read):
        call = {"function": {"name": "f", "arguments": {"y": None, "x": 1.0, "w": 2}}, "index": 3}
        row, left_out = read({"messages": [Q, {**A, "tool_calls": [call]}]})
        assert json.dumps(row["messages"][1]["tool_calls"][0]["function"]["arguments"]) == '{"w": 2, "x": 1}'
        assert [part.what for part in left_out] == [
            "null values in tools, in the arguments of calls and in results",
            "the order of keys in tools, in the arguments of calls and in results",
            "the key 'index' of tool calls",
        ]

    def test_arguments_in_text_stay_as_they_stand(self, write, tmp_path):
        """Also when the rows that are held out are written down and read again."""
        text = '{"y": null, "x": 1.0, "w": {"b": 1, "a": 2}}'
        call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": text}}]}
        examples = load_examples(write([{"messages": [Q, call]}]))
        assert examples.left_out == ()
        examples.dataset.to_json(tmp_path / "again.jsonl")
        again = load_examples(tmp_path / "again.jsonl")
        assert list(again.dataset) == list(examples.dataset)
        (read,) = json.loads(again.dataset[0]["messages"][1]["tool_calls"])
        assert json.dumps(read["function"]["arguments"]) == text

    def test_arguments_follow_the_order_of_the_tool(self, read):
        tool = {
            "name": "f",
            "parameters": {"properties": {"z": {}, "b": {}, "a": {"type": "string", "enum": ["c"]}}, "required": ["b"]},
        }
        calls = [{"name": "f", "arguments": {"z": 1, "a": 2, "b": 3, "y": 4}}]
        row, left_out = read({"messages": [Q, {**A, "tool_calls": calls}], "tools": [tool]})
        assert list(row["messages"][1]["tool_calls"][0]["function"]["arguments"]) == ["b", "a", "z", "y"]
        assert list(json.loads(row["tools"])[0]["function"]["parameters"]["properties"]) == ["b", "a", "z"]
        assert [part.what for part in left_out] == [ORDER[0]]


class TestSpreadsheets:
    @pytest.mark.parametrize(
        "text",
        [
            "\nprompt;completion\nA, B;C\n",
            "\ufeff\r\n;;\r\nprompt;completion;;\r\nA, B;C;;\r\n;;;\r\n",
            "sep=;\nprompt;completion\nA, B;C\n",
            'prompt,completion,,\n"A, B",C,,\n',
            'prompt,completion\n"A, B",C,,\n',
            'prompt,completion,,\n"A, B",C\n',
            'prompt,,completion\n"A, B",,C\n',
            'prompt,completion,"note; to self"\n"A, B",C,\n',
            "prompt|completion\nA, B|C\n",
            'prompt,completion,system\n"A, B",C,\n',
        ],
    )
    def test_what_spreadsheets_write(self, write, text):
        examples = load_examples(write(text, "a.csv"))
        assert list(examples.dataset) == [{"prompt": "A, B", "completion": "C"}]
        assert examples.left_out == ()

    def test_one_column_of_a_tsv_file(self, write):
        assert list(load_examples(write("text\nA, B\n", "a.tsv")).dataset) == [{"text": "A, B"}]

    def test_values_without_a_name_are_said(self, write):
        examples = load_examples(write(",prompt,completion,\n0,A,B,\n1,A,C,x\n", "a.csv"))
        assert [str(part) for part in examples.left_out] == [
            "the column '(column 1)': not used (2 rows)",
            "the column '(column 4)': not used (1 row)",
        ]

    def test_places_count_the_lines_in_front(self, write):
        with pytest.raises(DataError, match="line 4: has 3 cells; the header has 2 columns"):
            load_examples(write("\n\nprompt,completion\nA,B,C\n", "a.csv"))
        with pytest.raises(DataError, match="line 2: names the column 'a' twice"):
            load_examples(write("\na,a\n1,2\n", "a.csv"))
