"""`theodora studio`: a page for data, training and runs, on this machine alone.

example:
  theodora studio
  theodora studio runs /data/other-runs --port 8765

FOLDER is a run, or a folder that holds runs (default: runs); those that were named before are remembered. A run that is
started on the page is a `theodora train` of its own: it goes on when page and studio are closed.
"""

from __future__ import annotations

import argparse

from theodora.errors import ConfigError, UsageError
from theodora.extras import pip_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the studio."""
    parser.add_argument("folder", nargs="*", metavar="FOLDER", help="runs, or folders that hold runs. Default: runs")
    parser.add_argument(
        "--port",
        type=int,
        default=7860,
        metavar="N",
        help="of this machine's loopback; 0: any. Default: 7860, or the next",
    )
    parser.add_argument("--no-browser", action="store_true", help="print the address, and open nothing")


def run(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    if not 0 <= args.port <= 65535:
        raise UsageError(f"--port is {args.port}; expected 0 to 65535")
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{error.name} is missing: {pip_line('studio')}") from error
    from theodora.cli.console import stdout
    from theodora.studio.serving import serve

    def started(address: str) -> None:
        stdout().print(f"The studio is open at\n\n  {address}\n", soft_wrap=True)
        stdout().print("Ctrl-C closes it; runs go on.", style="dim")
        if not args.no_browser:
            import webbrowser

            webbrowser.open(address)

    serve(args.folder or ["runs"], args.port, started)
    return 0
