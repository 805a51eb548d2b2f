"""`cli/ending`: a process ends quickly, and leaves nothing undone."""

import subprocess
import sys

import pytest

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
    ],
)
def test_python_ends_by_itself_what_is_watched_quick_or_one_of_several(before, options, environment):
    code, lines = ended(before, *options, **environment)
    assert (code, lines[0]) == (0, "begun Python ends")
    assert "freed one by one" in lines
