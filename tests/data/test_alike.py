"""Near copies between training and held-out rows: those that are, with their rows; and not what a template shares."""

import random

import numpy as np
import pytest

from theodora.data import load_examples, near_copies
from theodora.data.alike import NearCopies, NearCopy, told
from theodora.data.split import parts_of

DRAWN = random.Random(0)
WORDS = ["".join(DRAWN.choice("abcdefghijklmnoprstuvw") for _ in range(DRAWN.randint(3, 9))) for _ in range(3000)]


def drawn(count):
    return DRAWN.choices(WORDS, k=count)


@pytest.fixture
def read(write):
    return lambda rows, **more: load_examples(
        write([{"text": row} if isinstance(row, str) else row for row in rows]), **more
    )


def found(training, held_out):
    return {copy.row: (copy.of, round(copy.share, 2)) for copy in near_copies(training, held_out).found}


def test_rows_with_few_words_changed_are_found_with_the_row_that_they_are_near(read):
    rows = [drawn(60) for _ in range(40)]
    one, far = rows[7].copy(), rows[9].copy()
    one[30] = "changed"
    far[::4] = drawn(15)  # every triple but a few
    shuffled = rows[11].copy()
    DRAWN.shuffle(shuffled)
    within = rows[20][10:50]
    held_out = [drawn(60), one, far, shuffled, within, rows[3], drawn(60)]
    assert found(read([" ".join(row) for row in rows]), read([" ".join(row) for row in held_out])) == {
        1: (7, 0.95),  # three of 58 triples hold the word
        4: (20, 1.0),
        5: (3, 1.0),
    }


def test_case_marks_and_white_space_do_not_count_but_signs_do(read):
    training = read(["Straße und Bäume, sagte der Mann: „So ist es“, und ging.", "x + 1 = 2 - y * 3 / z", *WORDS[:9]])
    same = "STRASSE und  BÄUME\nsagte der Mann so ist es und ging"
    assert found(training, read([same, "x - 1 = 2 + y * 3 / z"])) == {0: (0, 1.0)}


@pytest.mark.parametrize("chat", [False, True])
def test_a_shared_instruction_makes_nothing_a_copy(read, chat):
    """Each row is 200 words of instruction, the same in all, and a few of its own."""
    instruction = " ".join(drawn(200))

    def row(words):
        question, answer = f"{instruction}\n{' '.join(words[:10])}", " ".join(words[10:])
        if not chat:
            return {"prompt": question, "completion": answer}
        turns = [{"role": "system", "content": instruction}, {"role": "user", "content": " ".join(words[:10])}]
        return {"messages": [*turns, {"role": "assistant", "content": answer}]}

    rows = [drawn(14) for _ in range(120)]
    near = rows[50].copy()
    near[13] = "changed"  # one of the twelve triples of its own, and of those that begin in the instruction
    assert found(read([row(words) for words in rows]), read([row(drawn(14)), row(near), row(drawn(14))])) == {
        1: (50, 0.93)
    }


def test_templates_of_many_tasks_make_nothing_a_copy(read):
    """Thirty rows have each instruction; what fills it in is a number and a word."""
    tasks = [" ".join(drawn(40)) for _ in range(20)]

    def row(number):
        return {"prompt": f"{tasks[number % 20]} {number} {DRAWN.choice(WORDS)}", "completion": f"{number * 7} it is"}

    assert found(read([row(n) for n in range(600)]), read([row(n) for n in range(600, 640)])) == {}


def test_scripts_without_spaces(read):
    text = "机器学习是人工智能的一个分支它使用数据和算法来模仿人类学习的方式并逐步提高准确性"
    other = "昨天我们去了海边看日出然后在小镇吃了早饭下午坐火车回家路上下起了大雨"
    assert found(read([other, text, *WORDS[:20]]), read([text.replace("数据", "资料"), other[::-1]])) == {0: (1, 0.89)}


def test_prompts_alone_are_compared_where_completions_are_the_models(read):
    question = " ".join(drawn(30))
    training = read(
        [{"prompt": question, "answer": "1"}, *({"prompt": w, "answer": "2"} for w in WORDS[:9])], kind="prompts"
    )
    assert found(training, read([{"prompt": question.upper(), "answer": "3"}], kind="prompts")) == {0: (0, 1.0)}


@pytest.mark.parametrize("texts", [["", "?!"], ["a", "b b"], ["\ud800 x".encode("utf-8", "replace").decode()]])
def test_rows_with_next_to_nothing(read, texts):
    rows = read([*(text or " . " for text in texts), "other words"])
    assert {copy.share for copy in near_copies(rows, rows).found} <= {1.0}


def test_places_in_the_source_and_what_is_said(read):
    rows = [" ".join(drawn(30)) for _ in range(40)]
    examples = read([*rows, rows[5] + " indeed"])
    chosen = np.zeros(41, bool)
    chosen[[3, 40]] = True
    training, held_out = parts_of(examples, chosen)
    copies = near_copies(training, held_out, (np.flatnonzero(~chosen), np.flatnonzero(chosen)))
    (copy,) = copies.found
    assert (copy.row, copy.of) == (40, 5)
    assert told(copies, ("", ""), (2, 39)) == (
        "near copies: 1 of 2 held-out rows is nearly in what is trained on, so their loss is too good "
        "(row 41 is 97% row 6)"
    )
    assert told(NearCopies((), 2, 39), ("", ""), (2, 39)) == ""
    many = NearCopies(tuple(NearCopy(n, n, 0.9) for n in range(5)), 2000, 50_000)
    assert told(many, (" of b", " of a"), (3000, 50_000), most=1).endswith(
        "(row 1 of b is 90% row 1 of a; …); looked at 2,000 of 3,000 held-out rows"
    )


def test_of_many_rows_some_are_looked_at(read, monkeypatch):
    monkeypatch.setattr("theodora.data.alike._MOST_TRAINING", 10)
    monkeypatch.setattr("theodora.data.alike._MOST_HELD_OUT", 5)
    rows = [" ".join(drawn(30)) for _ in range(40)]
    copies = near_copies(read(rows), read(rows[::2]))
    assert (copies.held_out, copies.training) == (5, 10)
    assert [(copy.row, copy.of) for copy in copies.found] == [(0, 0), (4, 8), (8, 16), (12, 24), (16, 32)]
