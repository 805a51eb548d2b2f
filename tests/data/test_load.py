"""Every kind of source and every format that people have, and what is said about files that cannot be used."""

import gzip
import json
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict

from theodora.data import load_examples
from theodora.data.left_out import LeftOut
from theodora.errors import DataError

PAIRS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(3)]
TALK = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


def rows(source, **options):
    return list(load_examples(source, **options).dataset)


def complaint(source, **options):
    with pytest.raises(DataError) as raised:
        load_examples(source, **options)
    return str(raised.value)


class TestKindsOfSource:
    def test_jsonl_with_bom_and_blank_lines(self, write):
        text = "\n\n".join(json.dumps(row) for row in PAIRS)
        assert rows(write("\ufeff" + text)) == PAIRS
        assert rows(str(write(text, "a.ndjson"))) == PAIRS
        assert rows(write(gzip.compress(text.encode()), "a.jsonl.gz")) == PAIRS

    @pytest.mark.parametrize("indent", [None, 2])
    def test_json(self, write, indent):
        assert rows(write(json.dumps(PAIRS, indent=indent), "a.json")) == PAIRS
        assert rows(write(json.dumps({"version": 1, "data": PAIRS}, indent=indent), "a.json")) == PAIRS

    def test_json_lines_under_the_name_json(self, write):
        assert rows(write(PAIRS, "a.json")) == PAIRS

    @pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t")])
    def test_csv(self, write, name, delimiter):
        text = f'prompt{delimiter}completion\r\n"two\nlines"{delimiter}"a ""b"""\r\n\r\nx{delimiter}y\r\n'
        assert rows(write(text, name)) == [
            {"prompt": "two\nlines", "completion": 'a "b"'},
            {"prompt": "x", "completion": "y"},
        ]

    def test_csv_with_a_long_field(self, write):
        assert len(rows(write("text\n" + "a" * 200_000, "a.csv"))[0]["text"]) == 200_000

    def test_parquet(self, tmp_path):
        Dataset.from_list(PAIRS).to_parquet(tmp_path / "a.parquet")
        assert rows(tmp_path / "a.parquet") == PAIRS

    def test_saved_dataset_is_left_as_it_is(self, tmp_path):
        Dataset.from_list([{"messages": TALK}]).save_to_disk(tmp_path / "d")
        before = sorted(tmp_path.rglob("*"))
        examples = load_examples(tmp_path / "d")
        examples.dataset.map(lambda row: {"n": len(row["messages"])})
        assert examples.dataset[0] == {"messages": TALK}
        assert sorted(tmp_path.rglob("*")) == before

    def test_saved_splits(self, tmp_path):
        DatasetDict(train=Dataset.from_list(PAIRS), test=Dataset.from_list(PAIRS[:1])).save_to_disk(tmp_path / "d")
        assert rows(tmp_path / "d") == PAIRS
        assert rows(tmp_path / "d", split="test") == PAIRS[:1]
        assert "split train of train, test" in load_examples(tmp_path / "d").description
        assert "has no split 'tets'; it has train, test; did you mean 'test'?" in complaint(
            tmp_path / "d", split="tets"
        )

    def test_folder_of_files(self, write):
        folder = write(PAIRS[:2], "d/a.jsonl").parent
        write("prompt,completion\np2,c2\n", "d/b/c.csv")
        write("not data", "d/README.md")
        assert rows(folder) == PAIRS
        write("{", "d/b/d.jsonl")
        assert "b/d.jsonl, line 1: is not valid JSON" in complaint(folder)

    def test_files_of_a_folder_that_are_not_read_are_said(self, write):
        folder = write(PAIRS, "d/a.jsonl").parent
        assert "files" not in load_examples(folder).description
        for name in ("README.md", "b/notes.xlsx", "dataset_info.json", ".hidden"):
            write("{}", f"d/{name}")
        assert rows(folder) == PAIRS
        assert load_examples(folder).description.endswith(
            "; files of other kinds are not read: 'README.md', 'b/notes.xlsx', 'dataset_info.json'."
        )

    def test_folder_whose_files_name_splits(self, write):
        folder = write(PAIRS[:2], "eval/data/train-00000-of-00001.jsonl").parent
        write(PAIRS[2:], "eval/data/test.jsonl")
        assert rows(folder) == PAIRS[:2]
        assert rows(folder, split="test") == PAIRS[2:]

    def test_splits_without_train_have_to_be_named(self, write):
        folder = write(PAIRS, "d/test.jsonl").parent
        assert rows(folder) == PAIRS
        write(PAIRS, "d/dev.jsonl")
        assert "has the splits validation, test and none called train" in complaint(folder)

    def test_hub_dataset(self, monkeypatch):
        asked = []

        def load_dataset_builder(*names):
            asked.append(names)
            files = {"train": ["hf://datasets/owner/name@1/train.jsonl"]}
            found = DatasetDict(train=Dataset.from_list(PAIRS))
            return SimpleNamespace(
                config=SimpleNamespace(data_files=files),
                download_and_prepare=lambda: None,
                as_dataset=lambda: found,
            )

        monkeypatch.setattr("datasets.load_dataset_builder", load_dataset_builder)
        assert rows("owner/name:config") == PAIRS
        assert rows("owner/na.me") == PAIRS
        assert asked == [("owner/name", "config"), ("owner/na.me", None)]

    def test_hub_dataset_that_cannot_be_had(self, monkeypatch):
        def load_dataset_builder(*names):
            raise ConnectionError("offline")

        monkeypatch.setattr("datasets.load_dataset_builder", load_dataset_builder)
        assert "no dataset of that name could be loaded from the Hub: offline" in complaint("owner/name")

    def test_a_changed_file_is_read_again(self, write):
        assert rows(write(PAIRS)) == PAIRS
        assert rows(write(PAIRS[::-1])) == PAIRS[::-1]

    def test_nothing_is_written_beside_the_data(self, write, tmp_path):
        examples = load_examples(write(PAIRS))
        examples.dataset.map(lambda row: {"n": 1})
        assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


class TestFormats:
    @pytest.mark.parametrize(("prompt", "completion"), [("prompt", "completion"), ("Prompt ", "response")])
    def test_prompt_and_completion_stay_as_they_stand(self, write, prompt, completion):
        examples = load_examples(write([{prompt: "a ->", completion: " b", "id": 1}]))
        assert examples.dataset[0] == {"prompt": "a ->", "completion": " b"}
        assert examples.format == "prompt-completion"
        assert examples.description == (
            f"1 row read as prompt/completion rows: {prompt!r} → {completion!r}, of which the latter is learned; "
            "the column 'id': not used (1 row)."
        )

    @pytest.mark.parametrize(
        ("prompt", "completion"),
        [("question", "answer"), ("input", "output"), ("instruction", "response"), ("query", "response")],
    )
    def test_questions_become_turns(self, write, prompt, completion):
        examples = load_examples(write([{prompt: "a", completion: "b"}]))
        assert examples.dataset[0] == {
            "prompt": [{"role": "user", "content": "a"}],
            "completion": [{"role": "assistant", "content": "b"}],
        }
        assert examples.format == "prompt-completion"
        assert f"{prompt!r} → {completion!r}" in examples.description

    def test_alpaca(self, write):
        examples = load_examples(
            write(
                [
                    {"instruction": "Add.", "input": "2, 2", "output": "4"},
                    {"instruction": "Say hi.", "input": "", "output": "Hi"},
                    {"instruction": "Say hi.", "output": "Hi"},
                ]
            )
        )
        assert examples.format == "alpaca"
        assert [row["prompt"][0]["content"] for row in examples.dataset] == ["Add.\n\n2, 2", "Say hi.", "Say hi."]
        assert "'instruction' + 'input' → 'output'" in examples.description

    def test_system_column(self, write):
        row = rows(write([{"system_prompt": "Be brief.", "question": "a", "response": "b"}]))[0]
        assert row["prompt"][0] == {"role": "system", "content": "Be brief."}

    def test_messages_keep_what_templates_read(self, write):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": {}, "y": [1, "2", None]}}}
        turns = [
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "c", "name": "Ann"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "d", "tool_call_id": "1"},
            {"role": "assistant", "content": "e", "reasoning_content": "f", "weight": 1},
        ]
        examples = load_examples(write([{"messages": turns, "tools": [{"name": "f"}]}, {"messages": TALK}]))
        assert examples.format == "messages"
        assert examples.dataset[0] == {
            "messages": [
                {"role": "system", "content": "ab"},
                {"role": "user", "content": "c", "name": "Ann"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "d", "tool_call_id": "1"},
                {"role": "assistant", "content": "e", "reasoning_content": "f", "weight": 1},
            ],
            "tools": '[{"type": "function", "function": {"name": "f"}}]',
        }
        assert examples.dataset[1] == {"messages": TALK, "tools": None}

    def test_sharegpt(self, write):
        turns = [("system", "a"), ("human", "b"), ("gpt", "c"), ("observation", "e"), ("ai", "f")]
        examples = load_examples(write([{"conversations": [{"from": f, "value": v} for f, v in turns]}]))
        assert examples.format == "sharegpt"
        roles = [turn["role"] for turn in examples.dataset[0]["messages"]]
        assert roles == ["system", "user", "assistant", "tool", "assistant"]

    def test_messages_as_json_in_a_csv_cell(self, write):
        cell = json.dumps(TALK).replace('"', '""')
        assert rows(write(f'messages\n"{cell}"\n', "a.csv")) == [{"messages": TALK}]

    def test_prompts_that_are_conversations(self, write):
        examples = load_examples(write([{"prompt": TALK[:1], "completion": TALK[1:]}]))
        assert examples.dataset[0] == {"prompt": TALK[:1], "completion": TALK[1:]}
        assert rows(write([{"prompt": TALK[:1], "completion": "Hi"}])) == list(examples.dataset)

    def test_prompts_that_hold_json_are_text(self, write):
        row = {"prompt": '[{"name": "x"}]', "completion": "[1]"}
        assert rows(write([row])) == [row]

    def test_text_skips_empty_rows(self, write):
        examples = load_examples(write([{"text": "a", "label": "x"}, {"text": " \n"}, {"text": "b"}]))
        assert examples.format == "text"
        assert list(examples.dataset) == [{"text": "a"}, {"text": "b"}]
        assert examples.left_out == (
            LeftOut("the column 'label'", 1, "not used"),
            LeftOut("rows without text", 1, "skipped"),
        )
        assert "the column 'label': not used (1 row); rows without text: skipped (1 row)." in examples.description

    def test_a_question_beats_a_text(self, write):
        assert load_examples(write([{"text": "a b", "question": "a", "answer": "b"}])).format == "prompt-completion"


class TestBadInput:
    def test_all_problems_are_named_with_their_lines(self, write):
        message = complaint(
            write(
                '{"prompt": "a", "completion": "b"}\n'
                '{"prompt": "a", "completion": " "}\n'
                '{"prompt": "a", "completion": "b"\n'
                '{"prompt": {"a": 1}, "completion": null}\n'
                "[1]\n"
                '{"prompt": "a", "prompt": "b", "completion": "c"}\n'
                '{"text": "a"}\n'
                '{"prompt": "a", "completion": "\\ud800"}\n'
                '{"prompt": ["a"], "completion": "b"}\n'
            )
        )
        assert message.startswith(str(write("")) + ": 9 problems:")
        for expected in (
            "line 2: 'completion' is empty",
            "line 3: is not valid JSON (Expecting ',' delimiter at column 34)",
            "line 4: 'prompt' is the dict {'a': 1}; expected text",
            "line 4: 'completion' is null; expected text",
            "line 5: is a JSON list; expected an object",
            "line 6: is not valid JSON (it has the key 'prompt' twice)",
            "line 7: has no 'prompt' and no 'completion', unlike line 1; it has 'text'",
            "line 8: 'completion' holds half a character",
            "line 9: 'prompt' is the list ['a']; expected text",
        ):
            assert f"\n  - {expected}" in message

    def test_many_problems_are_counted(self, write):
        message = complaint(write([{"prompt": "a", "completion": ""}] * 1234))
        assert ": 1234 problems:" in message
        assert message.endswith("  - and 1224 more")

    def test_conversations(self, write):
        message = complaint(
            write(
                [
                    {"messages": TALK},
                    {"messages": TALK[:1]},
                    {"messages": []},
                    {"messages": [{"role": "asistant", "content": "a"}]},
                    {"messages": [TALK[0], {"role": "assistant", "content": ""}]},
                    {"messages": [TALK[0], {"content": "a"}, "b", {"role": "user", "content": {}}]},
                    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, TALK[1]]},
                    {"messages": "Hello"},
                    {"messages": [TALK[0], {**TALK[1], "weight": 0}]},
                ]
            )
        )
        for expected in (
            "line 2: 'messages' has no assistant turn",
            "line 3: 'messages' is the list []; expected a list of turns",
            "line 4: turn 1 of 'messages' has the role 'asistant'; expected system, user, assistant, tool "
            "(or human, gpt, …); did you mean 'assistant'?",
            "line 5: turn 2 of 'messages' is an empty assistant turn",
            "line 6: turn 2 of 'messages' has the role None; expected system, user, assistant, tool "
            "(or human, gpt, …); its keys are 'content'",
            "line 6: turn 3 of 'messages' is the str 'b'; expected an object with role and content",
            "line 6: turn 4 of 'messages' (user) is the dict {}; expected text",
            "line 7: turn 1 of 'messages' (user) has parts of type image_url; only text",
            "line 8: 'messages' is the str 'Hello'",
            "line 9: 'messages' has no assistant turn",
        ):
            assert expected in message

    def test_no_usable_column(self, write):
        message = complaint(write("qestion,answer\na,b\nc,d\n", "a.csv"))
        assert "line 2: no usable column; there are 'qestion', 'answer'. Looked for:" in message
        assert "'qestion'; did you mean 'question'?" in message
        assert "'answer' lacks its partner: one of prompt, question" in message
        assert "line 3" not in message

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
    @pytest.mark.parametrize("content", ["", "\n \n"])
    def test_empty_files(self, write, name, content):
        assert "is empty; expected at least one row" in complaint(write(content, name))

    def test_only_a_header(self, write):
        assert "is empty" in complaint(write("prompt,completion\n", "a.csv"))

    def test_encodings(self, write):
        latin = '{"prompt": "a", "completion": "b"}\n{"prompt": "é", "completion": "b"}\n'.encode("latin-1")
        assert "line 2: is not UTF-8 (byte 0xe9 at position 13); save the file as UTF-8" in complaint(write(latin))
        assert "is encoded in UTF-16; save it as UTF-8" in complaint(write("text\na".encode("utf-16"), "a.csv"))

    def test_csv(self, write):
        message = complaint(write('prompt,completion\na\n"b"x,c\nd,e\nf,g,h\n"i', "a.csv"))
        assert "line 2: has 1 cells; the header has 2 columns" in message
        assert "line 3: is not valid CSV" in message
        assert "line 5: has 3 cells" in message
        assert "line 6: is not valid CSV (unexpected end of data)" in message
        assert "line 1: names the column 'text' twice" in complaint(write("text,text\na,b\n", "a.csv"))

    def test_json(self, write):
        assert "line 3: is not valid JSON" in complaint(write('[\n{"text": "a"},\n{"text" "b"}\n]', "a.json"))
        assert "holds an object with 'rows'; expected a list" in complaint(write('{\n"rows": []}', "a.json"))
        assert "item 2: is a JSON string" in complaint(write('[{"text": "a"}, "b"]', "a.json"))
        assert "it is nested too deeply" in complaint(write("[" * 100_000, "a.json"))

    def test_damaged_files(self, write):
        assert "is not a whole Parquet file" in complaint(write("PAR1", "a.parquet"))
        assert "cannot be read" in complaint(write(gzip.compress(b"a" * 99)[:-9], "a.jsonl.gz"))
        write("{}", "d/state.json")
        assert "is a saved dataset that cannot be read" in complaint(write("{", "d/dataset_info.json").parent)

    def test_missing_files(self, write, tmp_path, monkeypatch):
        write(PAIRS, "train.jsonl")
        assert f"There is no file or folder {tmp_path / 'trian.jsonl'}; near it are train.jsonl" in complaint(
            tmp_path / "trian.jsonl"
        )
        assert "There is no folder" in complaint(tmp_path / "nowhere" / "train.jsonl")
        monkeypatch.chdir(tmp_path)
        assert "There is no file or folder train" in complaint("train")
        (tmp_path / "data").mkdir()
        assert "There is no file or folder data/x" in complaint("data/x")

    def test_unknown_kinds(self, write, tmp_path):
        assert "ends in .txt, which cannot be read; expected .jsonl" in complaint(write("a", "a.txt"))
        assert "is a folder without data files" in complaint(tmp_path)
        assert "is one file, which has no split 'test'" in complaint(write(PAIRS), split="test")

    def test_no_code_runs_and_nothing_is_unpickled(self, write, tmp_path):
        write("raise SystemExit('ran')", "d/d.py")
        write(b"cos\nsystem\n(S'true'\ntR.", "d/a.pkl")
        assert rows(write(PAIRS, "d/train.jsonl").parent) == PAIRS
        assert "ends in .pkl" in complaint(tmp_path / "d" / "a.pkl")


def test_files_that_unfold_to_far_more_than_there_is(write, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from theodora.data import files, unfolded_size

    monkeypatch.setattr(files, "LONGEST_LINE", 1000)
    assert "line 1: is longer than 1,000 bytes; one line holds one row" in complaint(
        write(json.dumps({"text": "a" * 2000}), "long.jsonl")
    )
    table = pa.table({"text": ["a" * 3_000_000]})
    monkeypatch.setattr(unfolded_size, "MOST_COMPRESSED", 2)
    monkeypatch.setattr(unfolded_size, "ANY_FILE", 0)
    pq.write_table(table, tmp_path / "bomb.parquet", compression="zstd", use_dictionary=False)
    assert "bytes and unfolds to 3,0" in complaint(tmp_path / "bomb.parquet")
    monkeypatch.undo()
    monkeypatch.setattr(files, "LARGEST_UNPACKED", 1 << 20)
    packed = gzip.compress(json.dumps([{"text": "a" * 1000}] * 2000, indent=1).encode())
    assert "unfolds to more than 1 MB of JSON; write one row a line, as .jsonl.gz" in complaint(
        write(packed, "bomb.json.gz")
    )


def test_a_parquet_file_that_names_a_column_twice(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "twice.parquet")
    assert "names the column 'text' twice" in complaint(tmp_path / "twice.parquet")


def test_many_rows_are_written_as_they_come(write, monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules["theodora.data.load"], "_BATCH_BYTES", 100)
    many = [{"prompt": f"question {n}", "completion": "a" * 30} for n in range(20)]
    assert rows(write(many)) == many


def test_a_full_disk_is_told(write, monkeypatch):
    import errno
    import sys

    class Full:
        def __init__(self, **_):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys.modules["theodora.data.load"], "ArrowWriter", Full)
    assert "No space is left in" in complaint(write(PAIRS))
    monkeypatch.setattr(Full, "__init__", lambda self, **_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output")))
    with pytest.raises(OSError, match="Input/output"):
        load_examples(write(PAIRS))


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        ({"weight": 0.5}, "weight of turn 2 of 'messages' is the float 0.5; expected 0 (not learned) or 1"),
        ({"tool_calls": "search"}, "tool_calls of turn 2 of 'messages' is the str 'search'; expected a list of calls"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": {"x": float("nan")}}}]}, "nothing that JSON can say"),
    ],
)
def test_turns_that_hold_what_no_template_can_write(write, turn, says):
    assert says in complaint(write([{"messages": [TALK[0], TALK[1] | turn]}] * 2))


def test_a_source_that_cannot_be_one():
    assert "is no file or folder" in complaint("~nobody-of-that-name/rows.jsonl")


def test_a_split_of_a_dataset_that_has_none(tmp_path):
    Dataset.from_list(PAIRS).save_to_disk(tmp_path / "one")
    assert "is one dataset, which has no split 'test'; leave the split out" in complaint(tmp_path / "one", split="test")


def test_what_stands_beside_the_rows_of_a_json_file(write):
    rows = '[{"text": "a"}, {"text": "b"}]'
    path = write(f'{{"data": {rows}, "version": "1", "test": [{{"text": "c"}}], "more": {{}}}}', "a.json")
    assert load_examples(path).left_out == (
        LeftOut("'version' beside 'data'", 2, "not used"),
        LeftOut("'test' beside 'data'", 1, "not used"),
    )
    assert load_examples(path.parent).left_out == load_examples(path).left_out
