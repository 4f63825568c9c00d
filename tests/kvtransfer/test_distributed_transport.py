"""What torch.distributed's transport adds to the contract: who may call, liars, broken connections, other hosts."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from kvtransfer import distributed_transport as module
from kvtransfer import processes
from kvtransfer.distributed_transport import DistributedTransport, call
from kvtransfer.gloo_pair import Line, Pair
from kvtransfer.transport import Rows, TransportError
from tests.kvtransfer.peer import PeerProcess

KIB = 1 << 10
LIMIT_S = 60.0


@pytest.fixture
def endpoints() -> Iterator[list[DistributedTransport]]:
    opened: list[DistributedTransport] = []
    yield opened
    for endpoint in opened:
        endpoint.close()


@pytest.fixture
def peer() -> Iterator[PeerProcess]:
    process = PeerProcess()
    yield process
    process.end()


def opened(endpoints: list[DistributedTransport], name: str, **others: Any) -> DistributedTransport:
    staging = np.random.default_rng(1).integers(0, 256, 256 * KIB, np.uint8)
    endpoints.append(DistributedTransport(name, staging, np.zeros(256 * KIB, np.uint8), **others))
    return endpoints[-1]


def rows_of(*rows: tuple[int, int, int]) -> Rows:
    return np.array(rows, dtype=np.uint64).reshape(-1, 3)


def until(done: Callable[[], object], what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not done():
        assert time.monotonic() < end, f"not within {LIMIT_S} s: {what}"


def settled(endpoint: DistributedTransport, ticket: int) -> str:
    got: list[Any] = []

    def there() -> bool:
        got.extend(endpoint.poll())
        return bool(got)

    until(there, f"ticket {ticket}")
    assert [each.ticket for each in got] == [ticket]
    return str(got[0].error)


def describe(of: DistributedTransport, **changes: Any) -> bytes:
    about = msgspec.msgpack.decode(of.describe())
    return msgspec.msgpack.encode(about | changes)


def elsewhere(process: PeerProcess, description: bytes) -> bytes:
    """The same endpoint, as another host's would describe itself."""
    about = msgspec.msgpack.decode(description)
    return msgspec.msgpack.encode(about | {"process": ["another host/pid:[1]", process.process.pid, 1]})


def test_only_who_knows_the_secret_is_let_in(endpoints: list[DistributedTransport]) -> None:
    here, there = opened(endpoints, "here"), opened(endpoints, "there")
    for wrong in ({"secret": b"\0" * 16}, {"endpoint": "there/another"}):
        with pytest.raises(TransportError, match="another endpoint is here"):
            here.connect("there", describe(there, **wrong))
    here.connect("there", there.describe())
    assert settled(here, here.write("there", rows_of((0, 0, KIB)))) == ""


def test_strangers_do_no_harm(endpoints: list[DistributedTransport], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STRANGERS", 2)
    monkeypatch.setattr(module, "_HANDSHAKE_S", 0.5)
    here, there = opened(endpoints, "here"), opened(endpoints, "there")
    port = msgspec.msgpack.decode(there.describe())["port"]
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
    # Who is too many is sent away; who talks nonsense too.
    silent[0].sendall(b"\xff" * 100)
    silent[1].sendall((5).to_bytes(8, "little") + b"\xc1\xc1\xc1\xc1\xc1")
    for sock in silent:
        sock.settimeout(LIMIT_S)
        assert sock.recv(1) == b""
        sock.close()

    def connects() -> bool:
        try:
            here.connect("there", there.describe())
        except TransportError:
            return False
        return True

    until(connects, "there is room again")
    assert settled(here, here.write("there", rows_of((0, 0, KIB)))) == ""


@pytest.mark.parametrize("rows", [[(0, 256 * KIB - 7, 8)], [(0, 0, 0)], [(0, 2**64 - 1, 8)], []])
def test_a_peer_that_would_write_elsewhere_is_refused_by_the_receiver(
    endpoints: list[DistributedTransport], rows: list[tuple[int, int, int]]
) -> None:
    there = opened(endpoints, "there")
    about = msgspec.msgpack.decode(there.describe(), type=module._Description)
    line = call(about, "liar", True, LIMIT_S)
    Pair(line, rank=0)
    line.send(module._Header(7, rows_of(*rows).tobytes()))
    receipt = line.receive(module._Receipt)
    assert receipt.ticket == 7 and receipt.error.startswith("refused")
    with pytest.raises(TransportError):
        line.receive(module._Receipt)  # and it hangs up
    line.close()
    assert not there.landing.any()


def test_offsets_in_a_writers_staging_are_its_own_business(endpoints: list[DistributedTransport]) -> None:
    here, there = (
        opened(endpoints, "here"),
        DistributedTransport("small", np.zeros(0, np.uint8), np.zeros(8, np.uint8)),
    )
    endpoints.append(there)
    here.connect("small", there.describe())
    assert settled(here, here.write("small", rows_of((255 * KIB, 0, 8)))) == ""
    assert (there.landing == here.staging[255 * KIB :][:8]).all()


def test_a_broken_connection_fails_its_write_and_the_next_one_calls_again(
    endpoints: list[DistributedTransport], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = opened(endpoints, "here"), opened(endpoints, "there")
    here.connect("there", there.describe())
    assert settled(here, here.write("there", rows_of((0, 0, KIB)))) == ""
    lines: list[Line] = list(there._writers)
    assert len(lines) == 1
    there._dismiss(lines[0])
    assert settled(here, here.write("there", rows_of((0, 0, KIB)))) != ""
    assert settled(here, here.write("there", rows_of((KIB, KIB, KIB)))) == ""
    assert (there.landing[: 2 * KIB] == here.staging[: 2 * KIB]).all()


def test_connecting_to_a_hung_peer_is_bounded(
    endpoints: list[DistributedTransport], peer: PeerProcess
) -> None:
    here = opened(endpoints, "here")
    description = peer.call("open", "distributed", 0, KIB, "there")
    peer.signal(signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(TransportError, match="cannot be reached"):
        here.connect("there", description)
    assert time.monotonic() - began < 10 * module._CONNECT_S
    peer.signal(signal.SIGCONT)
    here.connect("there", description)
    assert settled(here, here.write("there", rows_of((0, 0, KIB)))) == ""


def test_a_peer_on_another_host_is_gone_when_nothing_listens_there_any_more(
    endpoints: list[DistributedTransport], peer: PeerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CONNECT_S", 0.2)
    here = opened(endpoints, "here")
    there = elsewhere(peer, peer.call("open", "distributed", KIB, KIB, "there"))
    here.connect("there", there)
    peer.call("connect", "here", here.describe())
    asked: list[bool | None] = []
    real = module.listens

    def listens(*arguments: Any) -> bool | None:
        answer = real(*arguments)
        asked.append(answer)
        return answer

    monkeypatch.setattr(module, "listens", listens)
    until(lambda: here.gone("there") or asked.count(True) > 2, "it answers")
    assert not here.gone("there")
    peer.signal(signal.SIGSTOP)
    until(lambda: here.gone("there") or None in asked, "it does not answer")
    assert not here.gone("there"), "hung is not gone"
    peer.signal(signal.SIGKILL)
    peer.process.wait()
    monkeypatch.setattr(module, "_DOUBT_S", 3600.0)
    until(lambda: here.gone("there") or asked.count(False) > 2, "it is refused")
    assert not here.gone("there"), "one refusal could be a mishap"
    monkeypatch.setattr(module, "_DOUBT_S", 0.05)
    until(lambda: here.gone("there"), "gone")
    assert not here._writers


def test_who_was_taken_for_gone_is_fenced_until_it_is_connected_again(
    endpoints: list[DistributedTransport], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = opened(endpoints, "here"), opened(endpoints, "there")
    here.connect("there", there.describe())
    there.connect("here", here.describe())
    assert settled(there, there.write("here", rows_of((0, 0, KIB)))) == ""
    monkeypatch.setattr(processes, "dead", lambda process: True)
    assert here.gone("there")
    here.landing[:] = 0
    for _ in range(2):  # over the connection that it had, and over a new one
        assert settled(there, there.write("here", rows_of((0, 0, KIB)))) != ""
    with pytest.raises(TransportError, match="takes this endpoint for gone"):
        there.connect("here", here.describe())
    assert not here.landing.any()
    here.connect("there", there.describe())
    there.connect("here", here.describe())
    assert settled(there, there.write("here", rows_of((0, 0, KIB)))) == ""


def test_where_it_listens() -> None:
    with pytest.raises(TransportError, match="cannot listen at 'no such host'"):
        DistributedTransport("x", np.zeros(0, np.uint8), np.zeros(0, np.uint8), "no such host")
    # An address that is not this host's own, as behind address translation: it listens at all of its own.
    endpoint = DistributedTransport("x", np.zeros(0, np.uint8), np.zeros(8, np.uint8), "192.0.2.1")
    about = msgspec.msgpack.decode(endpoint.describe(), type=module._Description)
    call(msgspec.structs.replace(about, host="127.0.0.1"), "y", False, LIMIT_S).close()
    endpoint.close()
    endpoint.close()


def test_a_loopback_address_of_another_host_is_named_as_the_mistake(
    endpoints: list[DistributedTransport],
) -> None:
    here, there = opened(endpoints, "here"), opened(endpoints, "there")
    there.close()
    with pytest.raises(TransportError, match="advertise"):
        here.connect("there", describe(there, process=["another host/pid:[1]", 1, 1]))
    with pytest.raises(TransportError) as error:
        here.connect("there", there.describe())
    assert "advertise" not in str(error.value)
