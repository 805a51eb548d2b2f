"""The sockets of a server, taken before anything is loaded: a port that is in use is told at once."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from theodora.errors import ConfigError


@contextmanager
def bound(host: str, port: int) -> Iterator[list[socket.socket]]:
    """A socket for each address of a host, bound and not listening yet, so that who connects is refused until then.

    Args:
        host: a name or an address.
        port: 0 takes any that is free, the same for all addresses.

    Raises:
        ConfigError: the host has no address here, or the port cannot be taken.
    """
    with ExitStack() as opened:
        try:
            places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"host is {host}, which is no address of this machine ({error})") from error
        sockets: list[socket.socket] = []
        for family, kind, protocol, _, address in dict.fromkeys(places):
            found = opened.enter_context(socket.socket(family, kind, protocol))
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:  # IPv4 has a socket of its own
                found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                found.bind((address[0], port_of(sockets) if sockets else port, *address[2:]))
            except OSError as error:
                raise ConfigError(
                    f"Nothing can listen on port {port} of {address[0]}: {error.strerror or error}. Another port is "
                    "chosen with --port N; --port 0 takes any that is free."
                ) from error
            sockets.append(found)
        yield sockets


def port_of(sockets: list[socket.socket]) -> int:
    """The port that they are bound to."""
    return sockets[0].getsockname()[1]
