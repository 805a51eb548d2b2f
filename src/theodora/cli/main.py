"""The command `theodora`: finds the subcommand, imports that one alone, and turns errors into messages."""

from __future__ import annotations

import argparse
import difflib
import logging
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from theodora.cli.ending import end_process
from theodora.cli.import_notes import without_import_notes
from theodora.cli.streams import steady_streams
from theodora.errors import TheodoraError
from theodora.safe_text import plain_lines

# Heading -> command -> (module, one-line summary). A module has `add_arguments(parser)` and `run(args) -> exit code`;
# one that sets PASSES_OPTIONS_ON gets the arguments that its parser does not know in `args.other_options`.
COMMANDS = {
    "Train": {
        "train": ("theodora.cli.train", "fine-tune a model on your data with DoRA or LoRA"),
        "plan": ("theodora.cli.plan", "say what fits your GPU before anything is loaded, and how to run it"),
        "studio": ("theodora.cli.studio", "do all of this on a page in the browser, on this machine"),
        "demo": ("theodora.cli.demo", "see the whole method at work on a small model, in minutes"),
    },
    "Look": {
        "evaluate": ("theodora.cli.evaluate", "score a model or adapter on a file: loss, exact match"),
        "chat": ("theodora.cli.chat", "talk to base and adapted model side by side"),
        "compare": ("theodora.cli.compare", "find out which method is best on your data, with several seeds"),
        "info": ("theodora.cli.info", "say what an adapter is, and how far it has moved"),
        "inspect": (
            "theodora.cli.inspect",
            "show how runs changed magnitudes and directions, checkpoint by checkpoint",
        ),
        "conformance": ("theodora.cli.conformance", "hold every operation on adapters against the float64 formula"),
        "bench": ("theodora.cli.bench", "time a training step on your model and machine, against PEFT's"),
    },
    "Ship": {
        "merge": ("theodora.cli.merge", "write a plain model folder that any engine loads"),
        "combine": ("theodora.cli.combine", "make one adapter out of several"),
        "export": ("theodora.cli.export", "write an adapter in another program's form, and compare"),
        "verify": ("theodora.cli.verify", "compare two forms of one model: adapter, merged, GGUF, a server"),
        "push": ("theodora.cli.push", "send an adapter or model to the Hugging Face hub"),
        "serve": ("theodora.cli.serve", "serve a model and many adapters over HTTP, as OpenAI does"),
    },
    "Set up": {
        "doctor": ("theodora.cli.doctor", "say what is installed, what this machine can do, and what is missing"),
        "import": ("theodora.cli.import_recipe", "read a recipe of Axolotl, LLaMA-Factory or Unsloth into ours"),
        "schema": ("theodora.cli.schema", "write a JSON Schema of the YAML, with which editors complete it"),
        "completion": ("theodora.cli.completion", "write what a shell reads to complete commands and flags by Tab"),
    },
}
# Commands whose result is on the disk, or with those they serve: whoever reads what they print may go away.
_RESULT_ELSEWHERE = {"train", "demo", "compare", "merge", "combine", "export", "push", "serve", "studio"}
_INTERRUPTED = 130  # the status of what SIGINT ends
_BROKEN_PIPE = 141  # the status of what SIGPIPE ends, as of other programs in a pipe
_MODULES = {name: module for group in COMMANDS.values() for name, (module, _) in group.items()}
_SUMMARIES = {name: summary for group in COMMANDS.values() for name, (_, summary) in group.items()}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors name the nearest real flag, and that knows `--max_steps` as `--max-steps`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, add_help=False, **kwargs)
        options = self.add_argument_group("This command")
        options.add_argument("-h", "--help", action="help", help="show this help and exit")
        options.add_argument("--debug", action="store_true", help="show tracebacks")

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]  (it is overloaded there)
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        """Parse what is known, and give the rest back."""
        args = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([_with_hyphens(arg) for arg in args], namespace)

    def error(self, message: str) -> NoReturn:
        """Print the message, not the whole usage, and exit with 2."""
        self.exit(2, f"{self.prog}: {plain_lines(message)}\nSee {self.prog} --help.\n")

    def unknown(self, arguments: list[str]) -> NoReturn:
        """Exit for arguments that no option takes."""
        self.error(
            "; ".join(self._describe(argument) for argument in arguments if argument.startswith("-"))
            or f"unexpected argument {arguments[0]!r}"
        )

    def _describe(self, argument: str) -> str:
        flag = argument.split("=")[0]
        close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        return f"unknown option {flag}" + (f" (did you mean {close[0]}?)" if close else "")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 for failures, 2 for usage, 130 for Ctrl-C.

    141 if whoever reads the output went away, unless the result is elsewhere (a trained adapter is on the disk).

    Args:
        argv: the arguments; the process may go on afterwards. Default: the process's own, with which it ends.
    """
    try:
        code = _steadily(sys.argv[1:] if argv is None else list(argv))
    except KeyboardInterrupt:  # another one, while the first was being answered
        code = _INTERRUPTED
    finally:
        if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            # What is left is Python's own end, which takes seconds with torch and answers Ctrl-C with a traceback.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    if argv is None:
        end_process(code)
    return code


def _steadily(argv: list[str]) -> int:
    with steady_streams() as streams, _fit_for_terminals(), without_import_notes():
        try:
            code = _main(argv)
        except KeyboardInterrupt as stop:  # 0 after SIGTERM that ended a run: no failure
            code = _fail(str(stop) or "Interrupted.", getattr(stop, "exit_code", _INTERRUPTED))
        elsewhere = bool(_RESULT_ELSEWHERE & {*argv[:1], *argv[1:2]})
        if (lost := streams.lost()) is not None:
            done = " The command itself ended well." if elsewhere and not code else ""
            told = f"Standard output could not be written: {lost.strerror}. What was to stand there is lost.{done}"
            return _fail(told, code or 1)
        return code or (_BROKEN_PIPE if streams.unread() and not elsewhere else 0)


def _main(argv: list[str]) -> int:
    debug = argv[:1] == ["--debug"]
    argv = argv[debug:]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from theodora import __version__

        print(f"theodora {__version__}")
        return 0
    name = argv[0]
    if name not in _MODULES:
        close = difflib.get_close_matches(name, _MODULES, n=1)
        return _fail(
            f"There is no command {name!r}"
            + (f": did you mean {close[0]}?" if close else ".")
            + " See theodora --help.",
            2,
        )
    try:
        args = _parse(name, argv[1:])
    except SystemExit as stop:  # argparse ends so after --help and after errors
        return int(stop.code or 0)
    return _run(args, debug or args.debug)


def _parse(name: str, argv: list[str]) -> argparse.Namespace:
    module = import_module(_MODULES[name])
    summary = _SUMMARIES[name]
    parser = Parser(
        prog=f"theodora {name}",
        description=summary[0].upper() + summary[1:] + ".",
        epilog=module.__doc__ and module.__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    args, others = parser.parse_known_args(argv)
    if getattr(module, "PASSES_OPTIONS_ON", False):
        args.other_options = others
    elif others:
        parser.unknown(others)
    args.run = module.run
    return args


def _run(args: argparse.Namespace, debug: bool) -> int:
    try:
        return args.run(args)
    except TheodoraError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except Exception as error:
        if debug:
            raise
        return _fail(f"{type(error).__name__}: {error}\nThis is unexpected; --debug shows where it happened.", 1)


def _fail(message: str, code: int) -> int:
    from theodora.cli.console import stderr

    stderr().print(message, style="red" if code else "yellow", soft_wrap=True)
    return code


@contextmanager
def _fit_for_terminals() -> Iterator[None]:
    """Warnings and log lines of this process and its libraries name what is in files: they are made fit, too."""
    formatted, record = warnings.formatwarning, logging.getLogRecordFactory()

    class FitRecord(logging.LogRecord):
        def getMessage(self) -> str:
            return plain_lines(super().getMessage())

    ours = str(Path(__file__).parents[1])

    def fit(message: Warning | str, category: type[Warning], filename: str, *args: Any, **kwargs: Any) -> str:
        if filename.startswith(ours):  # written for users: the line of code is none of their business
            return plain_lines(f"Warning: {message}\n")
        return plain_lines(formatted(message, category, filename, *args, **kwargs))

    warnings.formatwarning = fit
    logging.setLogRecordFactory(FitRecord)
    try:
        yield
    finally:
        warnings.formatwarning = formatted
        logging.setLogRecordFactory(record)


def _help() -> str:
    width = max(map(len, _MODULES))
    lines = [
        "usage: theodora COMMAND ...",
        "",
        "Exact, fast LoRA and DoRA fine-tuning of language models, from data to a merged model.",
    ]
    for heading, commands in COMMANDS.items():
        lines += ["", f"{heading}:", *(f"  {name:{width}}  {summary}" for name, (_, summary) in commands.items())]
    return "\n".join([*lines, "", "theodora COMMAND --help says more; theodora --version says which this is."])


def _with_hyphens(argument: str) -> str:
    """`--max_steps=10` -> `--max-steps=10`; TRL's and transformers' users write either."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value


if __name__ == "__main__":
    sys.exit(main())
