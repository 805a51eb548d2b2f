"""The studio's server: one at a time, on loopback, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Sequence

from theodora.errors import UsageError
from theodora.files.alone import alone_in
from theodora.studio.known import Memory, studio_folder
from theodora.studio.runs import Runs
from theodora.studio.worker import Worker

_TRIED = 20  # ports from the wanted one on


def serve(folders: Sequence[str], port: int, started: Callable[[str], object]) -> None:
    """Serve the page.

    Args:
        folders: runs, and folders that hold some; they are remembered.
        port: of the loopback; where it is taken, one of the next. 0: any.
        started: is told the address, with the token in it.

    Raises:
        UsageError: another studio of this user is open, or no port is free.
    """
    import uvicorn

    from theodora.studio.app import create_app

    folder = studio_folder()
    with alone_in(folder), _listening(port) as listening:
        folder.chmod(0o700)
        port, token = listening.getsockname()[1], secrets.token_urlsafe(32)
        app = create_app(Runs(Memory(folder), folders), Worker(), folder, token=token, port=port)
        settings = uvicorn.Config(
            app, log_level="error", access_log=False, server_header=False, ws="none", timeout_graceful_shutdown=2
        )

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                if self.started:
                    started(f"http://127.0.0.1:{port}/?token={token}")

        Server(settings).run(sockets=[listening])


def _listening(port: int) -> socket.socket:
    """A socket on the port, or on the next that is free."""
    for wanted in range(port, min(port + _TRIED, 65536)) if port else (0,):
        found = socket.socket()
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(("127.0.0.1", wanted))
        except OSError:
            found.close()
            continue
        return found
    raise UsageError(f"The ports {port} to {port + _TRIED - 1} are taken; --port 0 takes any that is free.")
