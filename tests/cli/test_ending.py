"""`cli/ending`: a process ends quickly, and leaves nothing undone."""

import subprocess
import sys

import pytest

from theodora.cli.ending import _USERS_CODE

SCRIPT = """
import atexit, sys, threading, types
from theodora.cli.ending import end_process
class Late:
    def __del__(self): print("freed one by one")
sys.modules["torch"] = late = types.ModuleType("torch")
late.late = Late()
atexit.register(print, "at exit")
threading.Timer(0.05, print, ["thread"]).start()
print("begun", end=" ")
{before}
end_process(3)
print("Python ends")
"""


def ended(before="", *options, **environment):
    command = [sys.executable, *options, "-c", SCRIPT.format(before=before)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    assert not done.stderr
    return done.returncode, done.stdout.split("\n")[:-1]


def test_what_was_asked_for_is_done_and_nothing_freed():
    assert ended() == (3, ["begun thread", "at exit"])


@pytest.mark.parametrize(
    ("before", "options", "environment"),
    [
        ("del sys.modules['torch']", [], {}),
        ("sys.setprofile(lambda *_: None)", [], {}),
        ("sys.settrace(lambda *_: None)", [], {}),
        ("", [], {"WORLD_SIZE": "2"}),
        ("", ["-X", "dev"], {}),
        ("sys.monitoring = types.SimpleNamespace(get_tool=[None, None, 'cProfile', *[None] * 3].__getitem__)", [], {}),
        ("sys.modules['theodora_metric_1'] = types", [], {}),
        ("sys.modules['transformers_modules'] = types", [], {}),
    ],
)
def test_python_ends_by_itself_what_is_watched_quick_a_users_or_one_of_several(before, options, environment):
    code, lines = ended(before, *options, **environment)
    assert (code, lines[0]) == (0, "begun Python ends")
    assert "freed one by one" in lines


@pytest.mark.parametrize("mode", ["w", "wb", "r+b"])
def test_files_that_are_left_open_are_written_out(tmp_path, mode):
    file = tmp_path / "log"
    file.touch()
    what = "'kept'" if mode == "w" else "b'kept'"
    assert ended(f"late.file = open({str(file)!r}, {mode!r}); late.file.write({what})")[0] == 3
    assert file.read_text() == "kept"


def test_a_users_metric_is_told_by_its_name(tmp_path):
    from theodora.evaluate.metrics import load_metric

    (tmp_path / "mine.py").write_text("def same(answer, reference):\n    return answer == reference\n")
    assert load_metric(f"{tmp_path}/mine.py:same").__module__.startswith(_USERS_CODE)
