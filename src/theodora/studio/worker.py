"""A process that loads torch and the tokenizers, so that the server need not, and none of its requests waits for them.

It reads a request a line from its standard input, and writes an answer a line to its standard output, until the input
ends. What a hostile file does to it, the server survives.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

from theodora.errors import TheodoraError
from theodora.parse import to_json

_PATIENCE = 180.0
"""Seconds for an answer, the imports of a first one included."""
_REST = 900.0
"""Seconds without a question after which the process, and the memory that its libraries take, goes."""


class Failed(TheodoraError):
    """The request came to nothing; the message is for people."""


class Worker:
    """The server's side: starts the process when it is first asked, and anew after it has died."""

    def __init__(self, patience: float = _PATIENCE) -> None:
        self._patience, self._turn = patience, threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._rest: threading.Timer | None = None

    def wake(self) -> None:
        """Have the process load its libraries while nobody waits."""
        if self._turn.acquire(blocking=False):
            try:
                self._started()
                self._rest_later()
            finally:
                self._turn.release()

    def ask(self, what: str, **arguments: Any) -> Any:
        """The answer to a request; others wait meanwhile.

        Raises:
            Failed: it has none; with what the function said, or that it took too long.
        """
        with self._turn:
            process = self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            late = threading.Timer(self._patience, process.kill)
            late.start()
            try:
                process.stdin.write(json.dumps([what, arguments]) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:
                line = ""
            finally:
                late.cancel()
            if not line:
                process.wait()
                raise Failed(
                    f"Looking at it took more than {self._patience:g} s, or more memory than there is, and was ended."
                )
            answer = json.loads(line)
            self._rest_later()
            if "error" in answer:
                raise Failed(answer["error"])
            return answer["value"]

    def _rest_later(self) -> None:
        if self._rest is not None:
            self._rest.cancel()
        self._rest = threading.Timer(_REST, self._rest_now)
        self._rest.daemon = True
        self._rest.start()

    def _rest_now(self) -> None:
        if self._turn.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._turn.release()

    def stop(self) -> None:
        """End the process, also in the midst of an answer."""
        if self._rest is not None:
            self._rest.cancel()
        self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                with suppress(OSError):
                    if stream is not None:
                        stream.close()
            self._process = None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "theodora.studio.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for the server, at whose end the input here ends
            )
        return self._process


def main() -> None:
    """Answer until the input ends."""
    # Libraries print as they like; answers have a stream of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from theodora.cli.imports import imports

    with imports():
        from theodora.studio.look import look_at_data, look_at_plan
    functions = {"data": look_at_data, "plan": look_at_plan}
    for line in sys.stdin:
        what, arguments = json.loads(line)
        try:
            answer = {"value": functions[what](**arguments)}
        except TheodoraError as error:
            answer = {"error": str(error)}
        except Exception as error:  # of any library's kind: the page shows it, and the next request is another one
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(to_json(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
