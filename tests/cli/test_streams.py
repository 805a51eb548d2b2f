"""Standard streams that nobody reads, that are full, closed, or in another encoding."""

import io
import os
import sys
from types import SimpleNamespace

import pytest

from theodora.cli import main as cli


@pytest.fixture
def out(monkeypatch):
    """Let a descriptor be standard output, as it is for a process."""
    streams = []

    def put(descriptor: int, encoding: str = "utf-8") -> None:
        stream = os.fdopen(descriptor, "w", encoding=encoding)
        streams.append(stream)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "__stdout__", stream)

    yield put
    for stream in streams:
        stream.close()


def told(monkeypatch, run, *argv: str) -> int:
    module = SimpleNamespace(__doc__="x", add_arguments=lambda parser: None, run=run)
    monkeypatch.setattr(cli, "import_module", lambda name: module)
    return cli.main(list(argv))


def say_much(args: object) -> int:
    for _ in range(10_000):
        print("a line that takes some room in the buffer")
    return 0


def a_closed_pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize(("command", "code"), [("info", 141), ("evaluate", 141), ("train", 0), ("merge", 0)])
def test_a_reader_that_has_gone_ends_no_work(command, code, out, monkeypatch, capsys):
    out(a_closed_pipe())
    assert told(monkeypatch, say_much, command) == code
    assert capsys.readouterr().err == ""


def test_a_failure_is_a_failure_also_if_nobody_reads(out, monkeypatch):
    out(a_closed_pipe())
    assert told(monkeypatch, lambda args: say_much(args) or 1, "verify") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["info", "train"])
def test_a_full_disk_below_standard_output_is_said(command, out, monkeypatch, capsys):
    out(os.open("/dev/full", os.O_WRONLY))
    assert told(monkeypatch, say_much, command) == 1
    assert "Standard output could not be written: No space left on device" in capsys.readouterr().err


def test_help_to_a_reader_that_has_gone_is_quiet(out, capsys):
    out(a_closed_pipe())
    assert cli.main(["--help"]) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_names_of_any_script_and_of_none_go_to_any_stream(encoding, out, monkeypatch):
    reading, writing = os.pipe()
    out(writing, encoding)

    def run(args: object) -> int:
        from theodora.cli.console import print_json, stdout

        print("‖ΔW‖ \udcff")
        stdout().print("‖ΔW‖ \udcff")
        print_json({"‖": float("nan")})
        return 0

    assert told(monkeypatch, run, "info") == 0
    sys.stdout.close()
    with os.fdopen(reading, encoding=encoding) as pipe:
        found = pipe.read()
    assert "||dW|| \\udcff" in found
    assert found.endswith('{\n  "\\u2016": null\n}\n')


def test_the_streams_are_as_before_afterwards(out, monkeypatch):
    reading, writing = os.pipe()
    out(writing)
    before = sys.stdout
    assert told(monkeypatch, lambda args: 0, "info") == 0
    assert sys.stdout is before
    os.close(reading)


def test_a_closed_standard_output_is_no_failure(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert told(monkeypatch, say_much, "info") == 0


def test_warnings_and_log_lines_cannot_steer_a_terminal(monkeypatch, capsys):
    import logging
    import warnings

    stream = io.StringIO()
    handler = logging.StreamHandler(stream)

    def run(args: object) -> int:
        logger = logging.getLogger("theodora.test")
        logger.addHandler(handler)
        logger.error("%s", "a\x1b[2J")
        logger.removeHandler(handler)
        sys.stderr.write(warnings.formatwarning("b\x1b[2J", UserWarning, "file.py", 1))
        return 0

    assert told(monkeypatch, run, "info") == 0
    assert stream.getvalue() == "a\\x1b[2J\n"
    assert "b\\x1b[2J" in capsys.readouterr().err
