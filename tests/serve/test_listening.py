"""Ports are taken before a model is loaded, and what is wrong with them is told then."""

import socket

import pytest

from theodora.errors import ConfigError
from theodora.serve.listening import bound, port_of


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_any_port_is_one_port_of_all_addresses(host):
    with bound(host, 0) as sockets:
        assert {found.getsockname()[1] for found in sockets} == {port_of(sockets)}
        assert port_of(sockets) > 0
        with pytest.raises(ConnectionRefusedError):  # nobody waits for an answer until the model is there
            socket.create_connection(("127.0.0.1", port_of(sockets)), timeout=5)


def test_a_port_in_use_is_told():
    with bound("127.0.0.1", 0) as sockets:
        sockets[0].listen()
        port = port_of(sockets)
        match = rf"port {port} of 127.0.0.1: .*in use.* --port 0"
        with pytest.raises(ConfigError, match=match), bound("127.0.0.1", port):
            pass


def test_an_address_of_another_machine_is_told():
    with pytest.raises(ConfigError, match=r"port \d+ of 192.0.2.1"), bound("192.0.2.1", 0):
        pass
