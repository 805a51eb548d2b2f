"""`theodora push`: a run's adapter or model, or what merge and export wrote, to the Hugging Face hub.

example:
  theodora push runs/first my-adapter
  theodora push merged my-team/my-model --public --revision v2

What is sent: the weights, their configuration, the tokenizer, the model card with its figure, and config.yaml.
Checkpoints, rows, metrics and other files that lie there are not. The list is printed before anything is sent. The card
holds a few prompts with their answers, and the name of the data file: read README.md first.

A repository that is made is private, unless --public says otherwise; one that is there stays as it is. The token is
that of hf auth login, or HF_TOKEN.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `theodora push`."""
    parser.add_argument("folder", metavar="FOLDER", help="output folder of train, merge or export")
    parser.add_argument("name", metavar="NAME", help="repository: owner/name, or a name under your own account")
    who = parser.add_mutually_exclusive_group()
    who.add_argument(
        "--private",
        action="store_true",
        default=None,
        help="refuse a repository that is public. One that is made is private anyway",
    )
    who.add_argument(
        "--public",
        action="store_false",
        dest="private",
        default=None,
        help="make the repository public, if it is not there yet",
    )
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to, made if it is missing. Default: main")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on standard output")


def run(args: argparse.Namespace) -> int:
    """Check, say what is sent, and send it."""
    from theodora.cli.console import print_json, stderr, stdout
    from theodora.files.hub import check_place, files_to_push, push_folder

    folder = Path(args.folder).expanduser()
    files_to_push(folder)  # before the hub is asked
    console = stderr() if args.json else stdout()
    place = check_place(args.name, private=args.private, revision=args.revision)
    pushed = push_folder(folder, place, lambda line: console.print(line, markup=False, soft_wrap=True))
    if args.json:
        print_json({"url": pushed.url, "files": list(pushed.files), **asdict(pushed.place)})
    else:
        stdout().print(f"Pushed: {pushed.url}", markup=False, soft_wrap=True)
    return 0
