"""One suite for all transports: loopback within this process; shm, torch.distributed and NIXL (on its own choice, and
held to TCP, as between hosts) against real other processes, which serve one test after another while they live."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import pytest

from kvtransfer import processes
from kvtransfer.loopback import LoopbackFabric, LoopbackFaults, LoopbackTransport
from kvtransfer.rows import OPERATION_BYTES, OPERATION_ROWS, operations
from kvtransfer.transport import Region, Rows, TransportError
from kvtransfer.transports import Endpoint, allocate_region, open_transport
from tests.kvtransfer.peer import PeerProcess

MIB = 1 << 20
LIMIT_S = 60.0

needs_nixl = [
    pytest.mark.nixl,
    pytest.mark.skipif(importlib.util.find_spec("nixl_cu13") is None, reason="nixl_cu13 is not installed"),
]


class Remote(Protocol):
    """The other endpoint, wherever it lives."""

    description: bytes

    def connect(self, peer: str, description: bytes) -> None: ...
    def fill(self, seed: int) -> None: ...
    def write(self, peer: str, rows: list[list[int]]) -> int: ...
    def settled(self) -> list[tuple[int, str]]: ...
    def gone(self, peer: str) -> bool: ...
    def landing(self) -> Region: ...
    def kill(self) -> None: ...
    def stop(self) -> None: ...
    def resume(self) -> None: ...


class LoopbackRemote:
    def __init__(self, fabric: LoopbackFabric, endpoint: LoopbackTransport) -> None:
        self.fabric, self.endpoint = fabric, endpoint
        self.description = endpoint.describe()

    def connect(self, peer: str, description: bytes) -> None:
        self.endpoint.connect(peer, description)

    def fill(self, seed: int) -> None:
        fill(self.endpoint.staging, seed)

    def write(self, peer: str, rows: list[list[int]]) -> int:
        return self.endpoint.write(peer, np.array(rows, dtype=np.uint64))

    def settled(self) -> list[tuple[int, str]]:
        return [(settled.ticket, settled.error) for settled in self.endpoint.poll()]

    def gone(self, peer: str) -> bool:
        return self.endpoint.gone(peer)

    def landing(self) -> Region:
        return self.endpoint.landing.copy()

    def kill(self) -> None:
        self.fabric.kill(self.endpoint.incarnation)

    def stop(self) -> None:
        self.fabric.hang(self.endpoint.incarnation)

    def resume(self) -> None:
        self.fabric.resume(self.endpoint.incarnation)


class ProcessRemote:
    def __init__(self, peer: PeerProcess, kind: str, staging: int, landing: int, incarnation: str) -> None:
        self.peer = peer
        self.description = self.peer.call("open", kind, staging, landing, incarnation)

    def connect(self, peer: str, description: bytes) -> None:
        self.peer.call("connect", peer, description)

    def fill(self, seed: int) -> None:
        self.peer.call("fill", seed)

    def write(self, peer: str, rows: list[list[int]]) -> int:
        return int(self.peer.call("write", peer, rows))

    def settled(self) -> list[tuple[int, str]]:
        return [(ticket, error) for ticket, error in self.peer.call("settled")]

    def gone(self, peer: str) -> bool:
        return bool(self.peer.call("gone", peer))

    def landing(self) -> Region:
        return np.frombuffer(self.peer.call("landing"), dtype=np.uint8)

    def kill(self) -> None:
        self.peer.signal(signal.SIGKILL)

    def stop(self) -> None:
        self.peer.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.peer.signal(signal.SIGCONT)


class World:
    """Opens endpoints of one kind, and ends them."""

    def __init__(self, kind: str, idle: dict[str, list[PeerProcess]]) -> None:
        self.kind = kind
        self.idle = idle.setdefault(kind, [])
        self.fabric = LoopbackFabric(seed=1, faults=LoopbackFaults(delay=(0, 5), reorder=True))
        self.remotes: list[ProcessRemote] = []
        self.locals: list[Endpoint] = []

    @property
    def passive_peer_must_run(self) -> bool:
        """Whether a write needs the receiver to make progress, so that one to a stopped peer stays in flight."""
        return self.kind in ("loopback", "nixl-tcp", "distributed")

    def local(self, staging: int = MIB, landing: int = MIB, incarnation: str = "here") -> Endpoint:
        if self.kind == "loopback":
            return self.fabric.open(incarnation, staging_bytes=staging, landing_bytes=landing)
        endpoint = open_transport(self.kind.removesuffix("-tcp"), staging, landing, incarnation)
        self.locals.append(endpoint)
        return endpoint

    def remote(self, staging: int = MIB, landing: int = MIB, incarnation: str = "there") -> Remote:
        if self.kind == "loopback":
            endpoint = self.fabric.open(incarnation, staging_bytes=staging, landing_bytes=landing)
            return LoopbackRemote(self.fabric, endpoint)
        peer = self.idle.pop() if self.idle else PeerProcess()
        remote = ProcessRemote(peer, self.kind.removesuffix("-tcp"), staging, landing, incarnation)
        self.remotes.append(remote)
        return remote

    def end(self, *, well: bool) -> None:
        """Peers that still answer are kept for the next test."""
        for endpoint in self.locals:
            endpoint.close()
        for remote in self.remotes:
            if well and remote.peer.sound:
                remote.peer.call("close")
                self.idle.append(remote.peer)
            else:
                remote.peer.end()


@pytest.fixture(scope="module")
def idle() -> Iterator[dict[str, list[PeerProcess]]]:
    """Peer processes that wait for their next test, by kind."""
    peers: dict[str, list[PeerProcess]] = {}
    yield peers
    for peer in [peer for those in peers.values() for peer in those]:
        peer.end()


@pytest.fixture(
    params=[
        "loopback",
        "shm",
        "distributed",
        pytest.param("nixl", marks=needs_nixl),
        pytest.param("nixl-tcp", marks=needs_nixl),
    ]
)
def world(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, idle: dict[str, list[PeerProcess]]
) -> Iterator[World]:
    if request.param == "nixl-tcp":
        monkeypatch.setenv("UCX_TLS", "tcp")
    world = World(request.param, idle)
    failed = request.session.testsfailed
    yield world
    world.end(well=request.session.testsfailed == failed)


def fill(region: Region, seed: int) -> None:
    region[:] = np.random.default_rng(seed).integers(0, 256, region.nbytes, np.uint8)


def rows_of(*rows: tuple[int, int, int]) -> Rows:
    return np.array(rows, dtype=np.uint64).reshape(-1, 3)


def until(done: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    end = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < end, f"not within {limit_s} s: {what}"


def settle(endpoint: Endpoint, *tickets: int, limit_s: float = LIMIT_S) -> dict[int, str]:
    """Polls until all tickets have settled; each only once, and no others."""
    results: dict[int, str] = {}

    def all_in() -> bool:
        for settled in endpoint.poll():
            assert settled.ticket in tickets and settled.ticket not in results
            results[settled.ticket] = settled.error
        return len(results) == len(tickets)

    until(all_in, f"tickets {tickets}, got {results}", limit_s)
    return results


def connected(world: World, staging: int = MIB, landing: int = MIB) -> tuple[Endpoint, Remote]:
    """An endpoint here and one there, each connected to the other, staging filled."""
    here, there = world.local(staging, landing), world.remote(staging, landing)
    here.connect("there", there.description)
    there.connect("here", here.describe())
    fill(here.staging, 1)
    return here, there


def test_bytes_arrive_before_the_write_settles(world: World) -> None:
    here, there = connected(world)
    ticket = here.write("there", rows_of((10, 1000, 5000)))
    assert settle(here, ticket) == {ticket: ""}
    expected = np.zeros(MIB, dtype=np.uint8)
    expected[1000:6000] = here.staging[10:5010]
    assert np.array_equal(there.landing(), expected)
    assert here.poll() == []


def test_both_ways_at_once(world: World) -> None:
    here, there = connected(world)
    there.fill(2)
    mine = [here.write("there", rows_of((at, at, 4096))) for at in range(0, 65536, 4096)]
    theirs = {there.write("here", [[at, at + 4096, 4096]]) for at in range(0, 65536, 4096)}
    assert set(settle(here, *mine).values()) == {""}
    got: list[tuple[int, str]] = []

    def all_in() -> bool:
        here.poll()
        got.extend(there.settled())
        return len(got) == len(theirs)

    until(all_in, "writes of the other side")
    assert {ticket for ticket, _ in got} == theirs and {error for _, error in got} == {""}
    sent = np.random.default_rng(2).integers(0, 256, MIB, np.uint8)
    assert np.array_equal(here.landing[4096 : 4096 + 65536], sent[:65536])
    assert np.array_equal(there.landing()[:65536], here.staging[:65536])


def test_many_descriptors_are_one_ticket(world: World) -> None:
    here, there = connected(world)
    rng = np.random.default_rng(3)
    count, size = 3 * OPERATION_ROWS + 7, 700
    rows = np.zeros((count, 3), dtype=np.uint64)
    rows[:, 0] = rng.permutation(MIB // 1024)[:count] * 1024
    rows[:, 1] = rng.permutation(MIB // 1024)[:count] * 1024
    rows[:, 2] = size
    ticket = here.write("there", rows)
    assert settle(here, ticket) == {ticket: ""}
    expected = np.zeros(MIB, dtype=np.uint8)
    for source, landing, _ in rows.tolist():
        expected[landing : landing + size] = here.staging[source : source + size]
    assert np.array_equal(there.landing(), expected)


def test_a_large_write_is_one_ticket(world: World) -> None:
    here, there = connected(world, 40 * MIB, 40 * MIB)
    ticket = here.write("there", rows_of((0, 5, 40 * MIB - 5)))
    assert settle(here, ticket) == {ticket: ""}
    landing = there.landing()
    assert np.array_equal(landing[5:], here.staging[:-5]) and not landing[:5].any()


def test_what_cannot_be_written_is_refused_and_nothing_is_posted(world: World) -> None:
    here, there = connected(world)
    huge = 2**64 - 1
    bad: list[Any] = [
        rows_of(),
        rows_of((0, 0, 0)),
        rows_of((0, 0, 8), (8, 8, 0)),
        rows_of((MIB - 4, 0, 5)),
        rows_of((0, MIB - 4, 5)),
        rows_of((0, 0, MIB + 1)),
        rows_of((huge, 0, 5)),
        rows_of((0, huge, 5)),
        rows_of((0, 8, huge)),
        rows_of((0, 0, 8))[:, :2],
        rows_of((0, 0, 8)).astype(np.int64),
    ]
    for rows in bad:
        with pytest.raises(TransportError):
            here.write("there", rows)
    with pytest.raises(TransportError):
        here.write("nobody", rows_of((0, 0, 8)))
    assert here.poll() == []
    assert not there.landing().any()
    ticket = here.write("there", rows_of((0, MIB - 8, 8)))
    assert settle(here, ticket) == {ticket: ""}


def test_a_description_that_is_none_is_refused(world: World) -> None:
    here, there = connected(world)
    foreign = msgspec.msgpack.encode({"type": "carrier pigeon", "landing_bytes": MIB})
    for garbage in (b"", b"\x00" * 64, there.description[:-20], here.describe(), foreign):
        with pytest.raises(TransportError):
            here.connect("other", garbage)
        with pytest.raises(TransportError):
            here.write("other", rows_of((0, 0, 8)))
    ticket = here.write("there", rows_of((0, 0, 8)))
    assert settle(here, ticket) == {ticket: ""}


def test_regions_may_be_empty(world: World) -> None:
    here, there = world.local(staging=MIB, landing=0), world.remote(staging=0, landing=MIB)
    here.connect("there", there.description)
    there.connect("here", here.describe())
    fill(here.staging, 1)
    ticket = here.write("there", rows_of((0, 0, MIB)))
    assert settle(here, ticket) == {ticket: ""}
    assert np.array_equal(there.landing(), here.staging)
    with pytest.raises(TransportError):
        there.write("here", [[0, 0, 8]])


def test_two_peers(world: World) -> None:
    here, there = connected(world)
    other = world.remote(incarnation="other")
    here.connect("other", other.description)
    first, second = here.write("there", rows_of((0, 0, 64))), here.write("other", rows_of((64, 0, 64)))
    assert settle(here, first, second) == {first: "", second: ""}
    assert np.array_equal(there.landing()[:64], here.staging[:64])
    assert np.array_equal(other.landing()[:64], here.staging[64:128])


def test_writes_of_all_sizes_posted_together_land_exactly(world: World) -> None:
    here, there = connected(world, 4 * MIB, 8 * MIB)
    rng = np.random.default_rng(5)
    expected = np.zeros(8 * MIB, dtype=np.uint8)
    tickets, at = [], 0
    for size in rng.permutation([1, 7, 4096, 65536, 100_001, 1 << 19] * 5).tolist():
        source = int(rng.integers(0, 4 * MIB - size))
        # Two rows for each write, in falling order, and a byte between them that nobody may touch.
        half, whole = size // 2, at + size + 1
        rows = [(source, at, half)] * bool(half) + [(source + half, at + half + 1, size - half)]
        tickets.append(here.write("there", rows_of(*rows[::-1])))
        expected[at : at + half] = here.staging[source : source + half]
        expected[at + half + 1 : whole] = here.staging[source + half : source + size]
        at = whole + 1
    assert set(settle(here, *tickets).values()) == {""}
    assert np.array_equal(there.landing(), expected)


def test_a_settled_write_does_not_depend_on_staging_any_more(world: World) -> None:
    here, there = connected(world)
    sent = here.staging.copy()
    ticket = here.write("there", rows_of((0, 0, MIB)))
    assert settle(here, ticket) == {ticket: ""}
    here.staging[:] = 0
    for _ in range(100):
        here.poll()
    assert np.array_equal(there.landing(), sent)


def test_peers_that_write_at_once_each_reach_their_own_slots(world: World) -> None:
    here, one = world.local(staging=MIB, landing=16 * MIB), world.remote(staging=8 * MIB)
    two = world.remote(staging=8 * MIB, incarnation="other")
    for seed, (name, remote) in enumerate((("one", one), ("two", two))):
        here.connect(name, remote.description)
        remote.connect("here", here.describe())
        remote.fill(seed)
    sizes = [MIB] * 7 + [MIB - 3]
    for slot, size in enumerate(sizes):  # turn by turn: even slots are one's, odd ones two's
        one.write("here", [[slot * MIB, 2 * slot * MIB, size]])
        two.write("here", [[slot * MIB, (2 * slot + 1) * MIB, size]])
    mine = [here.write(name, rows_of((0, 0, MIB))) for name in ("one", "two")]
    assert set(settle(here, *mine).values()) == {""}
    got: dict[str, list[tuple[int, str]]] = {"one": [], "two": []}

    def all_in() -> bool:
        here.poll()
        got["one"] += one.settled()
        got["two"] += two.settled()
        return all(len(settled) == len(sizes) for settled in got.values())

    until(all_in, "both have settled")
    assert {error for settled in got.values() for _, error in settled} == {""}
    for seed in (0, 1):
        sent = np.random.default_rng(seed).integers(0, 256, 8 * MIB, np.uint8)
        for slot, size in enumerate(sizes):
            at = (2 * slot + seed) * MIB
            assert np.array_equal(here.landing[at : at + size], sent[slot * MIB : slot * MIB + size])
            assert not here.landing[at + size : at + MIB].any()


def test_connecting_again_replaces_the_description(world: World) -> None:
    here, there = connected(world)
    there.kill()
    new = world.remote(landing=2 * MIB, incarnation="there-2")
    here.connect("there", new.description)
    for _ in range(2):
        ticket = here.write("there", rows_of((0, MIB + 9, 64)))
        assert settle(here, ticket) == {ticket: ""}
        here.connect("there", new.description)  # the same again: as after a broken control stream
    assert np.array_equal(new.landing()[MIB + 9 : MIB + 73], here.staging[:64])


def test_after_disconnect_a_peer_is_unknown_until_it_is_connected_again(world: World) -> None:
    here, there = connected(world)
    here.disconnect("there")
    here.disconnect("there")
    here.disconnect("nobody")
    with pytest.raises(TransportError):
        here.write("there", rows_of((0, 0, 8)))
    assert not here.gone("there")
    here.connect("there", there.description)
    ticket = here.write("there", rows_of((0, 0, 8)))
    assert settle(here, ticket) == {ticket: ""}


def test_writes_in_flight_settle_after_disconnect(world: World) -> None:
    here, there = connected(world, 40 * MIB, 40 * MIB)
    there.stop()
    tickets = [here.write("there", rows_of((at, at, 8 * MIB))) for at in range(0, 40 * MIB, 8 * MIB)]
    early = [settled for _ in range(100) for settled in here.poll()]
    here.disconnect("there")
    early += [settled for _ in range(100) for settled in here.poll()]
    if world.passive_peer_must_run:
        assert len(early) < len(tickets)
    there.resume()
    late = settle(here, *(set(tickets) - {settled.ticket for settled in early}))
    assert {settled.error for settled in early} | set(late.values()) == {""}
    assert np.array_equal(there.landing(), here.staging)
    here.connect("there", there.description)
    ticket = here.write("there", rows_of((0, 5, 8)))
    assert settle(here, ticket) == {ticket: ""}


def test_a_stopped_peer_is_not_gone(world: World) -> None:
    here, there = connected(world)
    assert not here.gone("there") and not here.gone("nobody")
    there.stop()
    ticket = here.write("there", rows_of((0, 0, MIB)))
    settled = []
    for _ in range(200):
        assert not here.gone("there")
        settled += here.poll()
    there.resume()
    if not settled:
        assert settle(here, ticket) == {ticket: ""}
    assert not here.gone("there")


def test_a_dead_peer_is_gone_and_another_is_not(world: World) -> None:
    here, there = connected(world)
    other = world.remote(incarnation="other")
    here.connect("other", other.description)
    there.kill()
    until(lambda: here.poll() == [] and here.gone("there"), "gone")
    assert here.gone("there") and not here.gone("other")
    ticket = here.write("other", rows_of((0, 0, 64)))
    assert settle(here, ticket) == {ticket: ""}
    with pytest.raises(TransportError):
        here.connect("there again", there.description)


def write_until_error(here: Endpoint) -> None:
    """Writes all of staging to `there`, again and again, until one write fails or is refused."""
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        try:
            ticket = here.write("there", rows_of((0, 0, here.staging.nbytes)))
        except TransportError:
            return
        if settle(here, ticket)[ticket]:
            return
    pytest.fail("writes to a dead peer do not fail")


@pytest.mark.parametrize("round_", range(3))
def test_a_peer_killed_in_the_middle_harms_nobody_else(world: World, round_: int) -> None:
    here, there = connected(world, 64 * MIB, 64 * MIB)
    other = world.remote(landing=64 * MIB, incarnation="other")
    here.connect("other", other.description)
    ticket = here.write("there", rows_of((0, 0, MIB)))  # the connection is up
    assert settle(here, ticket) == {ticket: ""}
    killer = threading.Timer(0.002 + 0.01 * round_, there.kill)
    killer.start()
    try:
        write_until_error(here)
    finally:
        killer.join()
    until(lambda: here.poll() == [] and here.gone("there"), "gone")
    here.disconnect("there")
    ticket = here.write("other", rows_of((0, 0, 64 * MIB)))
    assert settle(here, ticket) == {ticket: ""}
    assert np.array_equal(other.landing(), here.staging)
    assert not here.gone("other")


def test_a_sender_killed_in_the_middle_is_gone_only_when_its_bytes_have_stopped(world: World) -> None:
    here, there = connected(world, 64 * MIB, 64 * MIB)
    there.fill(7)
    for at in range(0, 64 * MIB, 16 * MIB):
        there.write("here", [[at, at, 16 * MIB]])
    there.kill()
    until(lambda: here.poll() == [] and here.gone("there"), "gone")
    before = here.landing.copy()
    for _ in range(2000):
        here.poll()
    assert np.array_equal(here.landing, before)


def test_whatever_becomes_of_a_sender_its_bytes_are_only_where_it_was_told_to_write(world: World) -> None:
    here, there = world.local(0, 64 * MIB), world.remote(32 * MIB, 0)
    here.connect("there", there.description)
    there.connect("here", here.describe())
    there.fill(9)
    here.landing[:] = 0xA5
    slots = range(0, 64 * MIB, 8 * MIB)  # it may write to the second half of each
    for number, at in enumerate(slots):
        there.write("here", [[number * 4 * MIB, at + 4 * MIB, 4 * MIB]])
    killer = threading.Timer(0.004, there.kill)
    killer.start()
    killer.join()
    until(lambda: here.poll() == [] and here.gone("there"), "gone")
    sent = np.random.default_rng(9).integers(0, 256, 32 * MIB, np.uint8)
    for number, at in enumerate(slots):
        assert (here.landing[at : at + 4 * MIB] == 0xA5).all()
        slot, due = here.landing[at + 4 * MIB : at + 8 * MIB], sent[number * 4 * MIB :][: 4 * MIB]
        assert ((slot == due) | (slot == 0xA5)).all()


def test_closing_with_writes_in_flight_does_not_wait_for_them(world: World) -> None:
    here, there = connected(world, 8 * MIB, 8 * MIB)
    other = world.remote(incarnation="other")
    other.connect("there", there.description)
    there.stop()
    for at in range(0, 8 * MIB, MIB):
        here.write("there", rows_of((at, at, MIB)))
    here.poll()
    began = time.monotonic()
    here.close()
    assert time.monotonic() - began < LIMIT_S
    there.resume()
    ticket = other.write("there", [[0, 0, 64]])
    got: list[tuple[int, str]] = []

    def arrived() -> bool:
        got.extend(other.settled())
        return bool(got)

    until(arrived, "another's write")
    assert got == [(ticket, "")] and not other.gone("there")


@pytest.mark.parametrize(
    "lengths", [[8] * 1000, [40 * MIB], [9 * MIB] * 5, [1, 16 * MIB, 1], [100, 33 * MIB, 7]]
)
def test_operations_are_bounded_and_move_the_same_bytes(lengths: list[int]) -> None:
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    rows = np.array(
        [[at, at + 5, length] for at, length in zip(starts, lengths, strict=True)], dtype=np.uint64
    )
    parts = operations(rows)
    assert all(len(part) <= OPERATION_ROWS and part[:, 2].sum() <= OPERATION_BYTES for part in parts)
    pieces = np.concatenate(parts)
    assert (pieces[:, 1] == pieces[:, 0] + 5).all() and (pieces[:, 2] > 0).all()
    ends = pieces[:, 0] + pieces[:, 2]
    assert pieces[0, 0] == 0 and (pieces[1:, 0] == ends[:-1]).all() and ends[-1] == sum(lengths)


def test_a_process_is_dead_only_when_that_is_certain() -> None:
    me = processes.this_process()
    assert processes.dead(me) is False
    assert processes.dead(msgspec.structs.replace(me, started=me.started - 1)) is True  # its id was reused
    assert processes.dead(msgspec.structs.replace(me, namespace="another host")) is None
    assert processes.dead(msgspec.structs.replace(me, namespace="")) is None
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    stat = Path(f"/proc/{child.pid}/stat").read_text()
    identity = processes.ProcessIdentity(
        me.namespace, child.pid, int(stat[stat.rindex(")") + 2 :].split()[19])
    )
    assert processes.dead(identity) is False
    child.kill()
    until(lambda: processes.dead(identity) is True, "a zombie, not yet waited for, is dead")
    child.communicate()
    assert processes.dead(identity) is True


def test_regions_are_page_aligned_and_zero() -> None:
    for size in (1, 4096, 3 * MIB):
        region = allocate_region(size)
        assert region.nbytes == size and region.ctypes.data % 4096 == 0 and not region.any()
    assert allocate_region(0).nbytes == 0


def test_an_unknown_transport_is_an_error() -> None:
    with pytest.raises(ValueError, match="nixl"):
        open_transport("carrier pigeon", 0, 0, "x")
    with pytest.raises(ValueError):
        open_transport("shm", -1, 0, "x")


def test_without_nixl_the_error_says_what_to_install_and_auto_says_what_it_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kvtransfer.nixl_transport._MODULES", ("no_such_module",))
    with pytest.raises(TransportError, match=r"nixl-cu13.*no_such_module"):
        open_transport("nixl", 0, 0, "x")
    endpoint = open_transport("auto", 0, 0, "x")
    assert endpoint.name == "shm" and "no_such_module" in caplog.text
    endpoint.close()
