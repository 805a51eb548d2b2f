"""What GRPO rewards: built-in scores, functions of the user's, and all that they may give instead of numbers."""

import json
import math
import threading
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers import TrainerState

import dying
from crash.killing import fork_server
from theodora import ConfigError, DataError, TrainConfig
from theodora.data import PromptRows, load_examples
from theodora.train.arguments import sft_arguments
from theodora.train.objectives import completion_length
from theodora.train.prepare import prepare, read_data
from theodora.train.rewards import Rewards, rewards_of
from theodora.trust import grant_flags
from tiny import tiny_tokenizer

OWN = """
import asyncio
import torch

def brief(completions, **kwargs):
    return [float(len(text) < 4) for text in completions]

def same(answer, reference):
    return answer == reference

def matches(prompts, completions, completion_ids, id, more=None):
    assert len(prompts) == len(completions) == len(completion_ids) == len(id)
    assert more is None
    return [number + len(ids) for number, ids in zip(id, completion_ids)]

def talks(completions):
    return [float(turns == [{"role": "assistant", "content": "2"}]) for turns in completions]

def everything(**kwargs):
    everything.seen = sorted(kwargs)
    return [True, False]

def step(completions, trainer_state):
    return [trainer_state.global_step] * len(completions)

async def later(completions):
    await asyncio.sleep(0)
    return [0.5] * len(completions)

def tensor(completions):
    return torch.tensor([1, 2])

def spoils(completions, id):
    del completions[:], id[:]
    return [0, 0]

def neither(a, b): return 0
def swapped(reference, answer): return 0
def no_names(completions, /): return [0, 0]
def of_trls_trainer(completions, log_metric): return [0, 0]
async def metric(answer, reference): return 0
def needs(completions, difficulty): return [0, 0]
def fails(completions): return [1 / 0 for text in completions]
def leaves(completions): raise SystemExit("enough")
def given(completions): return given.value
"""


RUNS = """
with open(__file__ + ".runs", "a") as file:
    file.write("x")
"""


@pytest.fixture
def own(tmp_path):
    """What a function of the user's file is called."""
    (tmp_path / "own.py").write_text(OWN)
    return lambda name: f"{tmp_path / 'own.py'}:{name}"


@pytest.fixture
def read(tmp_path):
    def load(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return PromptRows(load_examples(path, kind="prompts"))

    return load


@pytest.fixture
def rewarded(read):
    """The rewards of two completions, by default of a text and with a reference of 2."""

    def call(*names, completions=("2", "17 "), ids=([5, 2], [5, 5, 5, 2]), prompt="1 + 1 =", state=None, **others):
        prompts, columns = read({"prompt": prompt, "answer": 2, "id": 7})([0, 0])
        return Rewards(names, **others)(prompts, completions, columns, ids, state).tolist()

    return call


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("exact_match", [1, 0]),
        ("token_f1", [1, 0]),
        (r"format:\d", [1, 0]),
        (r"format:.*\d", [1, 1]),
        ("length:4", [1, 1]),
        ("length:3", [1, 2 / 3]),
        ("length:2", [1, 0]),
        ("length:1", [0, 0]),
    ],
)
def test_built_in(name, expected, rewarded):
    assert rewarded(name) == [[pytest.approx(value)] for value in expected]


def test_blanks_around_an_answer_are_no_matter_and_a_format_may_have_lines(rewarded):
    assert rewarded("exact_match", "format:<a>.*</a>", completions=("\n2 ", " <a>x\ny</a>\n")) == [[1, 0], [0, 1]]


def test_functions_get_what_they_name(own, rewarded):
    assert rewarded(own("brief")) == [[1], [1]]
    assert rewarded(own("same")) == [[1], [0]]
    assert rewarded(own("matches")) == [[9], [11]]
    assert rewarded(own("later")) == [[0.5], [0.5]]
    assert rewarded(own("tensor")) == [[1], [2]]
    assert rewarded(own("step"), state=TrainerState(global_step=3)) == [[3], [3]]
    assert rewarded(own("everything")) == [[1], [0]]


def test_a_function_that_takes_everything_gets_everything(own, read):
    rewards = Rewards([own("everything")])
    prompts, columns = read({"prompt": "Q", "answer": 2, "id": 7})([0, 0])
    rewards(prompts, ["a", "b"], columns, [[1], [1]])
    given = ["answer", "completion_ids", "completions", "id", "prompt", "prompts", "reference", "trainer_state"]
    assert rewards._rewards[0].call.args[0].seen == given


def test_completions_are_messages_where_the_prompt_is(own, rewarded):
    asked = [{"role": "user", "content": "1 + 1"}]
    assert rewarded(own("talks"), prompt=asked) == [[1], [0]]
    assert rewarded(own("talks")) == [[0], [0]]
    assert rewarded(own("same"), "exact_match", prompt=asked) == [[1, 1], [0, 0]]  # metrics get texts


def test_trls_own_functions_work_as_they_are(tmp_path, rewarded):
    (tmp_path / "trls.py").write_text(
        "from trl.rewards import get_soft_overlong_punishment, think_format_reward\n"
        "not_long = get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=2)\n"
    )
    names = [f"{tmp_path / 'trls.py'}:{name}" for name in ("think_format_reward", "not_long")]
    answers = ("<think>\n1\n</think>\n2", "2")
    found = rewarded(*names, prompt=[{"role": "user", "content": "1 + 1"}], completions=answers, ids=([5] * 3, [5, 2]))
    assert found == [[1, -0.5], [0, 0]]


def test_the_example_of_the_docs_works(tmp_path, read):
    text = (Path(__file__).parents[2] / "docs" / "preference.md").read_text()
    (tmp_path / "rewards.py").write_text(text.partition("```python\n# rewards.py\n")[2].partition("```")[0])
    names = [f"{tmp_path / 'rewards.py'}:{name}" for name in ("brief", "close", "same_start")]
    sums = {"prompt": "1 + 1 =", "solution": 2, "tolerance": 0}, {"prompt": "9 * 9 =", "solution": 81, "tolerance": 2}
    rows = read(*sums)
    rewards = Rewards(names)
    rewards.check(rows, tiny_tokenizer())
    prompts, columns = rows([0, 1])
    assert rewards(prompts, ["3", "8" + " 83" * 40], columns, [[1], [1]]).tolist() == [[1, 0, 0], [0, 1, 1]]


def test_what_one_does_to_its_lists_is_nothing_to_the_next(own, rewarded):
    assert rewarded(own("spoils"), own("matches")) == [[0, 9], [0, 11]]


def test_several_have_names_of_their_own_and_weights(own):
    rewards = Rewards(["format:a", own("brief"), "format:b", own("brief")], [1, 0.5, 2, -1])
    assert rewards.names == ["format", "brief", "format_2", "brief_2"]
    torch.testing.assert_close(rewards.weights, torch.tensor([1, 0.5, 2, -1], dtype=torch.float64))
    assert Rewards(["exact_match"]).weights.tolist() == [1]
    found = rewards(["Q"], ["a"], {}, [[1]])
    assert (found.shape, found.dtype) == ((1, 4), torch.float32)


def test_a_file_is_run_once(tmp_path):
    (tmp_path / "once.py").write_text(RUNS + OWN)
    Rewards([f"{tmp_path / 'once.py'}:brief", f"{tmp_path / 'once.py'}:same"])
    assert (tmp_path / "once.py.runs").read_text() == "x"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact", "'exact' is no reward; expected exact_match, token_f1, format:REGEX"),
        ("length:0", "expected length:TOKENS"),
        ("length:few", "expected length:TOKENS"),
        ("format:(", "is no regular expression"),
        ("format:", "is no reward"),
        ("format:((a{999}){999}){999}", "repeats more than"),
        ("nowhere.py:f", "there is no file nowhere.py"),
    ],
)
def test_what_is_no_reward_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        Rewards(["exact_match", name])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "has no function nothing"),
        ("neither", r"neither takes \(a, b\); expected completions .* or answer, reference"),
        ("swapped", r"swapped takes \(reference, answer\)"),
        ("no_names", "expected no / in it"),
        ("of_trls_trainer", "there is no log_metric here: give it a default of None"),
        ("metric", "is async"),
    ],
)
def test_functions_of_neither_kind_are_refused(name, message, own):
    with pytest.raises(ConfigError, match=message):
        Rewards([own(name)])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            [math.nan, 1],
            "gave nan for completion 1 of 2 .*prompt '1 \\+ 1 =', completion '2'.*expected a finite number",
        ),
        ([1, -math.inf], "gave -inf for completion 2 of 2"),
        ([1, 1e39], r"gave 1e\+39 for completion 2"),  # of which float32 makes infinity
        ([None, None], r"gave None for completion 1 of 2 \(and 1 more\).*gives 0, which is what None adds in TRL"),
        (["1", 1], "gave '1' for completion 1"),
        ([[1], [1]], r"gave \[1\] for completion 1"),
        ([1], "gave 1 values for 2 completions"),
        ([1, 2, 3], "gave 3 values for 2 completions"),
        (1.0, "gave 1.0 for 2 completions; expected a list"),
        (None, "gave None for 2 completions; expected a list"),
        ("12", "gave '12' for 2 completions; expected a list"),
        ({0: 1, 1: 2}, "gave {0: 1, 1: 2} for 2 completions; expected a list"),
    ],
)
def test_what_is_no_list_of_finite_numbers_is_refused(value, message, own, read):
    rewards = Rewards([own("given")])
    rewards._rewards[0].call.args[0].value = value
    prompts, columns = read({"prompt": "1 + 1 ="})([0, 0])
    with pytest.raises(DataError, match=f"(?s)The reward .*own.py:given {message}"):
        rewards(prompts, ["2", "17"], columns, [[1], [1]])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", r"fails for 2 completions: ZeroDivisionError: division by zero \(line \d+: def fails.*1 / 0"),
        ("leaves", "fails for 2 completions: SystemExit: enough"),
    ],
)
def test_what_raises_is_an_error_that_shows_the_line(name, message, own, rewarded):
    with pytest.raises(DataError, match=message):
        rewarded(own(name))


def test_a_metric_that_fails_shows_its_row(own, read, tmp_path):
    (tmp_path / "metric.py").write_text("def f(answer, reference): return None if answer == 'b' else 1")
    prompts, columns = read({"prompt": "Q", "answer": "A"})([0, 0])
    with pytest.raises(DataError, match=r"metric.py:f gave None at row 2 \(answer 'b', reference 'A'\)"):
        Rewards([f"{tmp_path / 'metric.py'}:f"])(prompts, ["a", "b"], columns, [[1], [1]])


def test_what_hangs_ends_the_run_with_its_line(tmp_path):
    (tmp_path / "hangs.py").write_text(
        "import threading\nover = threading.Event()\ndef f(completions):\n    over.wait()\n    return [1]\n"
    )
    rewards = Rewards([f"{tmp_path / 'hangs.py'}:f"], timeout=0.05)
    function = rewards._rewards[0].call.args[0]
    with pytest.raises(DataError, match=r"has not returned after 0.05 s, for 1 completions \(line 4: over.wait\(\)\)"):
        rewards(["Q"], ["A"], {}, [[1]])
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "theodora-reward"]
    assert thread.daemon  # so that the process need not wait for it
    function.__globals__["over"].set()
    thread.join()
    assert Rewards([f"{tmp_path / 'hangs.py'}:f"], timeout=60).timeout == 60


@pytest.mark.parametrize(("stuck", "code", "said"), [(False, 7, "has not returned"), (True, 1, "in stuck")])
def test_what_hangs_keeps_no_process_from_ending(stuck, code, said, tmp_path):
    (tmp_path / "own.py").write_text(
        "import re, time\ndef waits(completions):\n    while True:\n        time.sleep(0.01)\n"
        "def stuck(completions):\n    re.match('(a|aa)+$', 'a' * 99 + 'b')\n"  # holds Python's lock for years
    )
    process = fork_server().Process(
        target=dying.rewards_that_hang, args=(tmp_path / "own.py", stuck, tmp_path / "errors")
    )
    process.start()
    process.join(60)
    assert process.exitcode == code
    assert said in (tmp_path / "errors").read_text()


def test_an_expression_that_searches_for_years_is_ended(rewarded):
    with pytest.raises(DataError, match=r"takes more than 0.05 s \(reward_timeout\), at completion 1"):
        rewarded("format:(a|aa|a?a)+$", completions=("a" * 99 + "b", "a"), timeout=0.05)


class TestCheck:
    def test_good_ones_pass(self, own, read):
        rows = read({"prompt": "Q", "answer": "A", "id": 1}, {"prompt": "R", "answer": "B", "id": 2})
        for name in ("exact_match", "length:1", own("matches"), own("same"), own("step"), own("everything")):
            Rewards([name]).check(rows, tiny_tokenizer())

    def test_columns_that_rows_lack_are_all_named_at_once(self, own, read):
        rows = read({"prompt": "Q", "more": 1})
        with pytest.raises(DataError, match=r"(?s)needs 'difficulty'; the rows have prompt, more.*needs 'id'"):
            Rewards([own("needs"), own("matches")]).check(rows, tiny_tokenizer())

    def test_every_row_has_what_answers_are_compared_with(self, own, read):
        rows = read({"prompt": "Q", "answer": "A"}, {"prompt": "Q", "answer": ""})
        for name in ("exact_match", "token_f1", own("same")):
            with pytest.raises(DataError, match=r"a reference, which 1 of 2 rows do not have \(the first: row 2\)"):
                Rewards([name]).check(rows, tiny_tokenizer())
        Rewards(["length:4"]).check(rows, tiny_tokenizer())

    def test_a_function_is_tried_on_the_references(self, own, read):
        with pytest.raises(DataError, match=r"(?s)ZeroDivisionError.*a try before training, on the first rows of"):
            Rewards([own("fails")]).check(read({"prompt": "Q"}), tiny_tokenizer())

    def test_a_column_that_hides_what_the_model_said_is_refused(self, own, read):
        with pytest.raises(DataError, match=r"there is a column 'completions'.*rename it"):
            Rewards([own("brief")]).check(read({"prompt": "Q", "completions": 3}), tiny_tokenizer())


class TestRuns:
    @pytest.fixture
    def settings(self, options, tmp_path):
        rows = [{"prompt": f"{a} + {b} =", "answer": a + b, "id": a} for a in range(8) for b in range(5)]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {
            "data": str(tmp_path / "prompts.jsonl"),
            "objective": "grpo",
            "reward": "exact_match",
            "max_length": 60,
            "num_generations": 4,
        }
        return {**options, **given}

    @pytest.fixture
    def data(self, settings, tmp_path):
        """What is read and made of the rows."""

        def made(window=None, max_completion_length=16, **others):
            config = TrainConfig.from_options(settings | others, granted=["reward"])
            arguments = sft_arguments(config, tmp_path / "checkpoints")
            config.trainer["max_completion_length"] = max_completion_length
            return read_data(config, arguments, rewards_of(config), window)

        return made

    def test_prompts_are_read_and_held_out(self, data):
        found = data(held_out=4)
        assert (len(found.train_rows), len(found.held_out_rows)) == (36, 4)
        assert "'answer' is what answers are compared with" in found.training.description
        row = found.held_out_rows[2]
        (prompt,), columns = PromptRows(found.held_out)([row["row"]])
        assert prompt == f"{columns['id'][0]} + {columns['answer'][0] - columns['id'][0]} ="

    def test_held_out_prompts_are_kept_with_their_columns(self, data, tmp_path):
        found = data(held_out=4).held_out
        import_module("theodora.train.run")._write_held_out(found, tmp_path / "held_out.jsonl")
        again = load_examples(tmp_path / "held_out.jsonl", kind="prompts")
        assert list(again.dataset) == list(found.dataset)

    def test_prompts_without_room_beside_a_completion_are_left_out_and_said(self, data, tmp_path):
        with (tmp_path / "prompts.jsonl").open("a") as file:
            file.write(json.dumps({"prompt": "Q" * 26, "answer": "A", "id": 0}) + "\n")
        found = data(held_out=0)  # 60 - 16 tokens, of which the template takes 19
        assert len(found.train_rows) == 40
        assert "1 prompt left out: more than 44 tokens, which leaves no room for max_completion_length" in found.notes
        with pytest.raises(DataError, match="none of 41 prompts leaves room"):
            data(held_out=0, max_completion_length=50)
        with pytest.raises(ConfigError, match="max_completion_length is 16, and the model takes 10 tokens"):
            data(window=10)

    @pytest.mark.parametrize(("length", "message"), [(60, "less than max_length"), (0, "at least 1"), ("x", "a whole")])
    def test_a_length_that_is_none_is_refused(self, length, message, settings):
        config = TrainConfig.from_options(settings | {"max_completion_length": length})
        with pytest.raises(ConfigError, match=message):
            completion_length(config)

    def test_broken_functions_and_rows_fail_before_the_model_loads(self, settings, own, tmp_path, monkeypatch):
        monkeypatch.setitem(prepare.__globals__, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))

        def begin(**others):
            config = TrainConfig.from_options(settings | others, granted=["reward"])
            prepare(config, sft_arguments(config, tmp_path / "checkpoints"))

        with pytest.raises(DataError, match="ZeroDivisionError"):
            begin(reward=own("fails"))
        with pytest.raises(ConfigError, match="has no function"):
            begin(reward=own("nothing"), model=str(tmp_path / "no model"))
        (tmp_path / "plain.jsonl").write_text('{"text": "Q"}\n')
        with pytest.raises(DataError, match="no prompt; there are 'text'"):
            begin(data=str(tmp_path / "plain.jsonl"))

    @pytest.mark.parametrize(
        ("others", "message"),
        [
            ({"reward": []}, "reward is missing, and the objective is grpo; expected some of exact_match"),
            ({"objective": "sft"}, "only grpo has rewards"),
            ({"objective": "dpo"}, "only grpo has rewards"),
            ({"reward_weights": [1, 2]}, "reward_weights holds 2 numbers for 1 rewards"),
            ({"reward_weights": ["much"]}, "reward_weights holds 'much'; expected finite numbers"),
            ({"reward_weights": [math.inf]}, "expected finite numbers"),
            ({"reward_timeout": 0}, "reward_timeout is 0.0; expected more than 0"),
            ({"reward": [3]}, "reward holds 3; expected names of rewards"),
            ({"packing": True}, "packing is on, and the objective is grpo"),
        ],
    )
    def test_options_that_make_no_sense_are_refused(self, others, message, settings):
        with pytest.raises(ConfigError, match=message):
            TrainConfig.from_options(settings | others)

    def test_a_recipe_cannot_have_a_file_run(self, settings):
        given = {"reward": ["exact_match", "own.py:f"]}
        with pytest.raises(
            ConfigError, match=r"pass --reward exact_match own.py:f \(in Python: granted=\['reward'\]\)"
        ):
            TrainConfig.from_options(settings | given)
        config = TrainConfig.from_options(settings | given, granted=["reward"])
        assert config.reward == ("exact_match", "own.py:f")
        assert grant_flags(config.to_options()) == " --reward exact_match own.py:f"
        built_in = {"reward": ["exact_match", "token_f1", "format:a:b", "length:9"]}
        assert grant_flags(TrainConfig.from_options(settings | built_in).to_options()) == ""
