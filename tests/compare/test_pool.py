"""A worker of a comparison from inside: it loads once, answers each cell, and says what keeps it from beginning."""

import sys

import pytest
import torch

from theodora.compare import pool
from theodora.errors import TheodoraError


@pytest.fixture
def serve(monkeypatch):
    """Run a worker here, with a bench of the test's own, on cells that were sent beforehand."""
    monkeypatch.setattr(pool.signal, "signal", lambda *_: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)

    def run(bench, *cells):
        import theodora.compare.worker

        monkeypatch.setattr(sys.modules[theodora.compare.worker.__name__], "Bench", bench)
        left, found = list(cells), []

        class Pipe:
            send = staticmethod(found.append)

            @staticmethod
            def recv():
                if not left:
                    raise EOFError  # the parent has gone
                return left.pop(0)

        pool._serve(Pipe(), None, "cpu", 1)
        return found

    return run


class Bench:
    def __init__(self, config, device):
        assert device == torch.device("cpu")

    def run(self, cell):
        return f"record of {cell}"


def test_it_loads_once_and_answers_each_cell(serve):
    assert serve(Bench, "a", "b") == ["ready", "record of a", "record of b"]


def test_it_says_why_it_cannot_begin(serve):
    def missing(config, device):
        raise TheodoraError("There is no model")

    def broken(config, device):
        raise ZeroDivisionError("a bug")

    assert serve(missing) == ["There is no model"]
    (said,) = serve(broken)
    assert said.startswith("A worker on cpu failed:\nTraceback")
    assert "ZeroDivisionError: a bug" in said
