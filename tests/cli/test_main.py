"""The command itself: finding subcommands, exit codes, messages, and how quickly it answers."""

import resource
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

import theodora
from theodora.cli import main as cli
from theodora.errors import CheckpointError, ConfigError


@pytest.fixture
def command(monkeypatch):
    """Make `theodora info` run the given function, with one positional argument and one flag."""

    def install(run):
        def add_arguments(parser):
            parser.add_argument("folder", nargs="?")
            parser.add_argument("--max-rows", type=int)

        monkeypatch.setattr(
            cli, "import_module", lambda name: SimpleNamespace(add_arguments=add_arguments, run=run, __doc__="")
        )

    return install


def raising(error):
    def run(args):
        raise error

    return run


def test_help_lists_every_command_by_group(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for group, commands in cli.COMMANDS.items():
        assert f"{group}:" in text
        assert all(f"  {name} " in text for name in commands)


def test_every_command_has_its_module():
    for name in ("train", "evaluate", "merge", "chat", "info", "demo"):
        assert cli.main([name, "--help"]) == 0


def test_lists_of_numbers_ask_for_numbers(capsys):
    cli.main(["train", "--help"])
    shown = capsys.readouterr().out
    assert "--trainable-token-indices N [N ...]" in shown
    assert "--targets NAME [NAME ...]" in shown


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from theodora.cli.main import main; main(['--help']); main(['train', '--help']);"
        "print(sorted({'torch', 'transformers', 'datasets', 'rich', 'yaml'} & set(sys.modules)), file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr.strip() == "[]"
    assert (
        resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2
    )  # 0.1 s; its own time, however busy others


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"theodora {theodora.__version__}"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("rank is 0"), 2, "rank is 0"),
        (CheckpointError("[damaged]"), 1, "[damaged]"),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (KeyboardInterrupt("Go on with X"), 130, "Go on with X"),
        (RuntimeError("odd"), 1, "RuntimeError: odd"),
    ],
)
def test_errors_become_messages_and_exit_codes(error, code, message, command, capsys):
    command(raising(error))
    assert cli.main(["info"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_ctrl_c_while_a_command_is_imported(command, monkeypatch, capsys):
    monkeypatch.setattr(cli, "import_module", raising(KeyboardInterrupt()))
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_a_second_ctrl_c_while_the_first_is_answered(command, monkeypatch):
    command(raising(KeyboardInterrupt()))
    monkeypatch.setattr(cli, "_fail", lambda *_: raising(KeyboardInterrupt())(None))
    assert cli.main(["info"]) == 130


# The command with another in place of `info`, which gets SIGINT at the moment named.
_CHILD = """
import atexit, os, signal, sys, types
moment = sys.argv.pop()
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
class Module(types.ModuleType):
    def __getattribute__(self, name):
        if name == "add_arguments":
            now("parsing")
        return super().__getattribute__(name)
def now(which):
    if which == moment:
        os.kill(os.getpid(), signal.SIGINT)
def add_arguments(parser): pass
def run(args):
    now("running")
    return 0
module = Module("theodora.cli.info")
module.__dict__.update(add_arguments=add_arguments, run=run)
sys.modules[module.__name__] = module
atexit.register(now, "ending")
import theodora.cli.main
sys.exit(theodora.cli.main.main())
"""


@pytest.mark.parametrize("moment", ["parsing", "running", "ending", "never"])
def test_ctrl_c_at_any_moment_leaves_no_traceback(moment):
    command = [sys.executable, "-c", _CHILD, "info", moment]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    # Of what ends while Python itself ends, a shell says 130, too.
    assert ended.returncode == {"never": 0, "ending": -signal.SIGINT}.get(moment, 130), ended.stderr
    assert ended.stderr == ("Interrupted.\n" if ended.returncode == 130 else "")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("evaluate", "--limit", "few"), "argument --limit: 'few' is no whole number of at least 1"),
        (("evaluate", "--limit", "0"), "'0' is no whole number"),
        (("verify", "a", "b", "--bound", "low"), "argument --bound: 'low' is no number of at least 0"),
        (("verify", "a", "b", "--kl-bound", "nan"), "'nan' is no number"),
        (("train", "--rank-pattern", "q_proj"), "'q_proj' is not KEY=VALUE"),
        (("train", "--rank-pattern", "q_proj=few"), "'q_proj=few' has no number after the ="),
    ],
)
def test_values_that_a_flag_cannot_take(argv, says, capsys):
    assert cli.main(list(argv)) == 2
    assert says in capsys.readouterr().err


def test_debug_shows_where_the_unexpected_happened(command):
    command(raising(RuntimeError("odd")))
    with pytest.raises(RuntimeError, match="odd"):
        cli.main(["--debug", "info"])


@pytest.mark.parametrize("argv", [["--debug", "info"], ["info", "--debug"]])
def test_debug_shows_the_traceback(argv, command):
    command(raising(ConfigError("rank is 0")))
    with pytest.raises(ConfigError):
        cli.main(argv)


def test_hyphens_and_underscores_are_the_same(command):
    seen = []
    command(lambda args: seen.append(args.max_rows) or 0)
    assert cli.main(["info", "--max_rows", "3"]) == cli.main(["info", "--max-rows=3"]) == 0
    assert seen == [3, 3]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inof"], "did you mean info?"),
        (["info", "--max-row", "3"], "unknown option --max-row (did you mean --max-rows?)"),
        (["info", "a", "b"], "unexpected argument 'b'"),
        (["info", "--max-rows", "x"], "--max-rows"),
    ],
)
def test_usage_errors_name_what_was_meant(argv, message, command, capsys):
    command(lambda args: 0)
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err


def test_no_command_is_a_usage_error(capsys):
    assert cli.main([]) == 2
    assert "usage: theodora" in capsys.readouterr().out
