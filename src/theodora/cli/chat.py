"""`theodora chat`: talk to a model and to what fine-tuning made of it, side by side.

example:
  theodora chat runs/first
  theodora chat --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter runs/first --temperature 0.7
  echo "What is a cataract?" | theodora chat runs/first

An adapter's folder is enough: it names its base model. Only one model is in memory; the adapter is switched off for
the base's answers. Each side keeps its own conversation. Ctrl-C stops the answer, /exit or Ctrl-D the chat.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from theodora.cli.arguments import add_quantize
from theodora.cli.imports import imports
from theodora.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from theodora.cli.conversation import Conversation

_COMMANDS = {
    "/both": "let both answer",
    "/base": "let only the base model answer",
    "/adapted": "let only the adapted model answer",
    "/reset": "begin a new conversation",
    "/system TEXT": "begin a new conversation with this system message (none without TEXT)",
    "/help": "show these commands",
    "/exit": "leave",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `theodora chat`."""
    parser.add_argument("folder", nargs="?", metavar="MODEL", help="an adapter's folder, or a model folder or hub name")
    parser.add_argument("--model", help="model folder or hub name (the same as MODEL)")
    parser.add_argument("--adapter", help="folder of the adapter to put on the model")
    parser.add_argument("--system", default="", help="system message")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0: the likeliest words; above: sampled. Default: 0.",
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest P. Default: 1."
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling. Default: 0.")
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="tokens of the longest answer. Default: 512."
    )
    parser.add_argument(
        "--no-chat-template", action="store_true", help="give the model what you type as it stands, each time anew"
    )
    parser.add_argument(
        "--dtype", default="auto", help="of the weights: auto (as stored), fp32, bf16, fp16. Default: auto."
    )
    add_quantize(parser)
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the hub")


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends."""
    model = _checked(args)
    with imports(gpu=True):
        from transformers import set_seed
        from transformers.utils.logging import disable_progress_bar

        from theodora.adapters.models import best_device, load_model_and_tokenizer
        from theodora.cli.console import say_base, stderr, stdout
        from theodora.cli.conversation import Conversation
        from theodora.kernels.ahead import begin_with_gpu

    begin_with_gpu(best_device())
    disable_progress_bar()
    with stderr().status("Loading the model ..."):
        loaded, tokenizer = load_model_and_tokenizer(
            model,
            adapter=args.adapter,
            dtype=args.dtype,
            trust_remote_code=args.trust_remote_code,
            revision=args.revision,
            quantize=args.quantize,
        )
    say_base(loaded)
    set_seed(args.seed)
    conversation = Conversation(
        loaded,
        tokenizer,
        system=args.system,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        use_chat_template=False if args.no_chat_template else None,
    )
    greet(stdout(), model, args.adapter, conversation)
    talk(stdout(), conversation)
    return 0


def _checked(args: argparse.Namespace) -> str:
    """The model to load, once what was asked for makes sense."""
    if args.folder and args.model and args.adapter:
        raise UsageError(f"Both MODEL ({args.folder}) and --model ({args.model}) are given; expected one of them")
    if args.folder and args.model:
        # `theodora chat runs/first --model other-base`: the folder can only be the adapter
        args.adapter = args.folder
    model = args.model or args.folder
    if not model:
        raise UsageError("No model is named; expected `theodora chat FOLDER`, or --model and, if you like, --adapter")
    problems = [
        f"--temperature is {args.temperature}; expected at least 0" if args.temperature < 0 else "",
        f"--top-p is {args.top_p}; expected more than 0 and at most 1" if not 0 < args.top_p <= 1 else "",
        f"--max-new-tokens is {args.max_new_tokens}; expected at least 1" if args.max_new_tokens < 1 else "",
    ]
    if any(problems):
        raise UsageError("\n".join(filter(None, problems)))
    return model


def greet(console: Console, model: str, adapter: str | None, conversation: Conversation) -> None:
    """Say at a terminal who answers, and which commands there are."""
    from rich.text import Text

    if not _is_interactive(console):
        return
    console.print(Text.assemble((adapter or model, "bold"), f" on {model}" if adapter else ""))
    if not conversation.has_adapter:
        console.print("There is no adapter: the base model answers alone.", style="dim")
    if not conversation.has_template:
        console.print("There is no chat template: the model goes on from what you type, each time anew.", style="dim")
    console.print("  ".join(name.split()[0] for name in _COMMANDS) + "\n", style="dim")


def talk(console: Console, conversation: Conversation) -> None:
    """Read questions and commands, and answer, until the input ends."""
    from theodora.cli.conversation_view import show_answers

    while True:
        try:
            line = _read(console)
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print("\n(/exit or Ctrl-D leaves)", style="dim")
            continue
        if line in ("/exit", "/quit"):
            return
        if line.startswith("/"):
            _obey(console, conversation, line)
        elif line:
            try:
                show_answers(console, conversation, line)
            except ConfigError as error:
                console.print(str(error), style="yellow", markup=False, soft_wrap=True)
            except KeyboardInterrupt:  # between two answers: there is nothing left to stop
                continue


def _read(console: Console) -> str:
    if _is_interactive(console):
        # Importing it gives input() a history and arrow keys; Windows has its own.
        if sys.platform != "win32":
            import readline  # noqa: F401
        return input("> ").strip()
    line = input().strip()
    if line:
        console.print(f"> {line}", markup=False, soft_wrap=True)
    return line


def _obey(console: Console, conversation: Conversation, line: str) -> None:
    from rich.text import Text

    command, _, text = line.partition(" ")
    if command == "/help":
        width = max(map(len, _COMMANDS))
        for name, meaning in _COMMANDS.items():
            console.print(Text.assemble(f"{name:{width}}  ", (meaning, "dim")))
    elif command in ("/both", "/base", "/adapted"):
        if not conversation.has_adapter:
            console.print("There is no adapter: the base model answers alone.", style="dim")
            return
        conversation.speakers = ("base", "adapted") if command == "/both" else (command[1:],)
        who = "Both models answer" if command == "/both" else f"Only the {command[1:]} model answers"
        console.print(f"{who} now.", style="dim")
    elif command == "/reset":
        conversation.reset()
        console.print("A new conversation.", style="dim")
    elif command == "/system":
        conversation.reset(system=text.strip())
        console.print(
            "A new conversation, " + ("with" if text.strip() else "without") + " a system message.", style="dim"
        )
    else:
        console.print(f"There is no {command}. Commands: {', '.join(_COMMANDS)}", style="yellow", markup=False)


def _is_interactive(console: Console) -> bool:
    return console.is_terminal and sys.stdin.isatty()
