"""The command line against a server that is not there: one line that says so, over either door."""

from __future__ import annotations

import socket

import pytest

from cluster import client
from cluster.client import Ask, ClientError


@pytest.mark.parametrize("door", [client.chat, client.generate])
def test_a_server_that_is_not_there_is_named(door: object) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    assert callable(door)
    with pytest.raises(ClientError, match=f"(?i){address}|unavailable"):
        door(address, Ask(prompt="hi", timeout_s=5.0), lambda text: None)
