"""The ranks of a worker meet: over a unix socket on one host, over TCP with the cluster token between hosts."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.plan import StepPlan
from kvtransfer.messages import Probe, Probed
from worker import rank_link
from worker.rank_link import (
    Arrive,
    Expecting,
    LinkLost,
    MeetingError,
    RankLink,
    RankReady,
    default_rendezvous,
    dial_leader,
    meet_followers,
)
from worker.spec import WorkerSpec
from worker.step_codec import StepEncoder

RANKS = 3


def _spec(rank: int, rendezvous: str, **changes: Any) -> WorkerSpec:
    values: dict[str, Any] = {
        "role": "decode",
        "worker_id": "decode-0",
        "incarnation": "an-incarnation",
        "token": "the token",
        "model_path": "",
        "tensor_parallel": RANKS,
        "rank": rank,
        "rendezvous": rendezvous,
    }
    return WorkerSpec(**(values | changes))


@pytest.fixture
def pool() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    with concurrent.futures.ThreadPoolExecutor(8) as found:
        yield found


@pytest.fixture(autouse=True)
def links(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RankLink]]:
    """All links that a test makes; closed at its end."""
    made: list[RankLink] = []
    for kind in (rank_link.RingLink, rank_link.StreamLink):
        real = kind.__init__

        def keep(self: Any, *arguments: Any, real: Any = real) -> None:
            real(self, *arguments)
            made.append(self)

        monkeypatch.setattr(kind, "__init__", keep)
    yield made
    for link in made:
        link.close()


@pytest.fixture(params=["unix", "tcp"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, socket.socket | None]:
    """The rendezvous, and the listener that rank 0 is given for it."""
    if request.param == "unix":
        return str(tmp_path / "meet.sock"), None
    listener = socket.create_server(("127.0.0.1", 0))
    return f"127.0.0.1:{listener.getsockname()[1]}", listener


def _meet(
    pool: concurrent.futures.ThreadPoolExecutor, place: tuple[str, socket.socket | None]
) -> tuple[dict[int, RankLink], dict[int, RankLink], list[int]]:
    rendezvous, listener = place
    memory = os.memfd_create("collective")
    leader = pool.submit(meet_followers, _spec(0, rendezvous), listener, memory, "store:1")
    dialled = {rank: pool.submit(dial_leader, _spec(rank, rendezvous)) for rank in range(1, RANKS)}
    links = leader.result(30)
    others = {rank: future.result(30) for rank, future in dialled.items()}
    assert all(store == "store:1" for _, _, store in others.values())
    inode = os.fstat(memory).st_ino
    memories = [fd for _, fd, _ in others.values()]
    assert all(fd == -1 if listener else os.fstat(fd).st_ino == inode for fd in memories)
    return links, {rank: link for rank, (link, _, _) in others.items()}, memories


def _until(link: RankLink, count: int) -> list[Any]:
    import select

    poll = select.poll()
    for fd in link.filenos():
        poll.register(fd, select.POLLIN)
    found: list[Any] = []
    while len(found) < count:
        assert poll.poll(10_000), "nothing came"
        found += link.read()
    return found


def test_messages_cross_in_order_both_ways(
    pool: concurrent.futures.ThreadPoolExecutor, place: tuple[str, socket.socket | None]
) -> None:
    links, others, _ = _meet(pool, place)
    assert sorted(links) == [1, 2]
    step = StepEncoder().encode(StepPlan(7))
    for rank, link in links.items():
        for message in (step, Probe(f"peer {rank}"), Expecting(True)):
            link.send(message)
        assert _until(others[rank], 3) == [step, Probe(f"peer {rank}"), Expecting(True)]
    ready = RankReady(rank=2, pid=5, blocks=9, endpoint=b"here", slot_bytes=4)
    others[2].send(ready)
    others[2].send(Probed("peer", True))
    assert _until(links[2], 2) == [ready, Probed("peer", True)]


def test_the_last_words_come_before_the_loss(
    pool: concurrent.futures.ThreadPoolExecutor, place: tuple[str, socket.socket | None]
) -> None:
    links, others, _ = _meet(pool, place)
    others[1].send(Probed("peer", False))
    others[1].close()
    assert _until(links[1], 1) == [Probed("peer", False)]
    with pytest.raises(LinkLost):
        while True:
            links[1].read()
    assert links[2].read() == []


def test_strangers_and_wrong_ranks_are_sent_away(
    pool: concurrent.futures.ThreadPoolExecutor, place: tuple[str, socket.socket | None]
) -> None:
    rendezvous, listener = place
    leader = pool.submit(meet_followers, _spec(0, rendezvous), listener, os.memfd_create("collective"), "")
    with pytest.raises(
        MeetingError, match=r"incarnation another with 3 ranks, this worker an-incarnation with 3"
    ):
        dial_leader(_spec(1, rendezvous, incarnation="another"))
    with pytest.raises(MeetingError, match=r"rank 3 is not awaited: \[1, 2\] are"):
        dial_leader(_spec(3, rendezvous))
    first, _, _ = dial_leader(_spec(1, rendezvous))
    with pytest.raises(MeetingError, match=r"rank 1 is not awaited: \[2\] are"):
        dial_leader(_spec(1, rendezvous))
    family = socket.AF_INET if listener else socket.AF_UNIX
    with socket.socket(family) as stranger:
        host, _, port = rendezvous.rpartition(":")
        stranger.connect((host, int(port)) if listener else rendezvous)
        stranger.sendall(b"\x05\x00\x00\x00GET /")
    second, _, _ = dial_leader(_spec(2, rendezvous))
    assert sorted(leader.result(30)) == [1, 2]
    assert first.read() == second.read() == []


def test_between_hosts_both_sides_must_know_the_token(pool: concurrent.futures.ThreadPoolExecutor) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    rendezvous = f"127.0.0.1:{listener.getsockname()[1]}"
    leader = pool.submit(meet_followers, _spec(0, rendezvous, tensor_parallel=2), listener, -1, "")
    with pytest.raises(MeetingError, match="the connection ended"):
        dial_leader(_spec(1, rendezvous, tensor_parallel=2, token="another token"))
    dial_leader(_spec(1, rendezvous, tensor_parallel=2))
    assert list(leader.result(30)) == [1]

    impostor = socket.create_server(("127.0.0.1", 0))
    there = f"127.0.0.1:{impostor.getsockname()[1]}"
    dialled = pool.submit(dial_leader, _spec(1, there, tensor_parallel=2))
    connection, _ = impostor.accept()
    rank_link._send(connection, b"challenge")
    rank_link._receive(connection, Arrive)
    rank_link._send(connection, rank_link.Welcome(proof=b"guess"))
    with pytest.raises(MeetingError, match="does not know the cluster token"):
        dialled.result(30)
    connection.close()
    impostor.close()


def test_who_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rank_link, "MEET_TIMEOUT_S", 0.05)
    path = str(tmp_path / "meet.sock")
    with pytest.raises(MeetingError, match=r"ranks \[1, 2\] did not come within 0.05 s"):
        meet_followers(_spec(0, path), None, -1, "")
    assert not os.path.exists(path)
    with pytest.raises(MeetingError, match="rank 0 was not found at .*meet.sock"):
        dial_leader(_spec(1, path))


def test_the_default_place_is_closed_to_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    path = default_rendezvous("an-incarnation")
    assert Path(path).parent.stat().st_mode & 0o077 == 0
    assert default_rendezvous("an-incarnation") == path
    Path(path).parent.chmod(0o755)
    with pytest.raises(MeetingError, match="nobody else can enter"):
        default_rendezvous("an-incarnation")


def test_every_message_can_be_told_from_the_others() -> None:
    for union in (rank_link.ToRank, rank_link.FromRank):
        msgspec.msgpack.Decoder(union)


def test_the_bound_on_what_waits_stays_where_it_is(
    pool: concurrent.futures.ThreadPoolExecutor, place: tuple[str, socket.socket | None]
) -> None:
    links, others, _ = _meet(pool, place)
    for _ in range(20):
        links[1].send(Expecting(True))
    assert len(_until(others[1], 20)) == 20 and links[1].flush()
    kept: Any = links[1]
    assert getattr(kept, "_writer", kept)._pending_bytes == 0


def test_a_stranger_who_drips_does_not_hold_up_the_meeting(
    pool: concurrent.futures.ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_link, "HELLO_TIMEOUT_S", 0.5)
    monkeypatch.setattr(rank_link, "MEET_TIMEOUT_S", 0.5)
    listener = socket.create_server(("127.0.0.1", 0))
    rendezvous = f"127.0.0.1:{listener.getsockname()[1]}"
    leader = pool.submit(meet_followers, _spec(0, rendezvous), listener, -1, "")
    pause = threading.Event()
    with socket.create_connection(listener.getsockname()) as stranger:
        stranger.sendall((1 << 15).to_bytes(4, "little"))
        with contextlib.suppress(OSError):
            for _ in range(200):  # sent away long before these have gone
                stranger.sendall(b"x")
                pause.wait(0.05)
            pytest.fail("it was listened to all the time")
    with pytest.raises(MeetingError, match="did not come"):
        leader.result(10)
