"""A rank beside rank 0, without a model: what it reports gets there, and what it prints hinders nobody."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from kvtransfer.messages import MoverReport, Probed
from worker import follower, ring
from worker.messages import Shutdown
from worker.rank_link import FromRank, RankReady, RingLink, ToRank
from worker.spec import WorkerSpec

LIMIT_S = 10.0
SPEC = WorkerSpec(
    role="decode",
    worker_id="decode-0",
    incarnation="i",
    token="",
    model_path="",
    rank=1,
    tensor_parallel=2,
)


def test_what_did_not_fit_when_it_was_reported_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mover's thread reports while the other one waits for rank 0, which says nothing more."""
    here, there = socket.socketpair()
    out, into = ring.create(), ring.create()
    leader, link = RingLink(out, into, FromRank, here), RingLink(into, out, ToRank, there)
    mover: list[Callable[[MoverReport], None]] = []

    def start_mover(on_report: Callable[[MoverReport], None], on_fatal: object) -> SimpleNamespace:
        mover.append(on_report)
        return SimpleNamespace(close=lambda: None)

    parts = SimpleNamespace(start_mover=start_mover, blocks=8, endpoint=b"", slot_bytes=1)
    monkeypatch.setattr(follower, "open_collective", lambda *arguments: None)
    monkeypatch.setattr(follower, "open_parts", lambda *arguments: parts)
    serving = threading.Thread(target=follower._serve, args=(SPEC, link, -1, ""))
    serving.start()
    poll = select.poll()
    poll.register(leader.filenos()[0], select.POLLIN)
    assert poll.poll(1000 * LIMIT_S)
    assert isinstance(leader.read()[0], RankReady)
    while not _waits(serving):
        pass
    reports = [Probed("x" * (1 << 20), True) for _ in range(6)]  # more than the ring holds
    for report in reports:
        mover[0](report)
    found: list[object] = []
    ends = time.monotonic() + LIMIT_S
    while len(found) < len(reports) and time.monotonic() < ends:
        poll.poll(100)
        found += leader.read()
    leader.send(Shutdown())
    serving.join(LIMIT_S)
    assert found == reports and not serving.is_alive()
    for each in (leader, link):
        each.close()


def test_a_broken_mover_ends_it_also_when_rank_0_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended(Exception):
        pass

    class FullLink:
        def send(self, message: object) -> None:
            raise ring.RingFull("many bytes wait")

    def start_mover(on_report: object, on_fatal: Callable[[BaseException], None]) -> None:
        on_fatal(MemoryError("odd"))

    def exit_now(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(follower, "open_collective", lambda *arguments: None)
    monkeypatch.setattr(follower, "open_parts", lambda *arguments: SimpleNamespace(start_mover=start_mover))
    monkeypatch.setattr(os, "_exit", exit_now)
    with pytest.raises(Ended):
        follower._serve(SPEC, FullLink(), -1, "")  # type: ignore[arg-type]


_CHATTY = """
import os, sys
from worker import follower

follower.dial_leader = lambda spec: (None, -1, "")
follower._die_with_leader = lambda link: None
follower._serve = lambda *arguments: [os.write(1, b"x" * 65536) for _ in range(16)]
follower.main()
"""


def test_a_library_that_prints_does_not_block_it(tmp_path: Path) -> None:
    """Who started it reads one line and no more, as the actor of a rank does."""
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _CHATTY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
    with process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(msgspec.json.encode(SPEC) + b"\n")
        process.stdin.flush()
        started = msgspec.json.decode(process.stdout.readline(), type=follower.FollowerStarted)
        assert started.pid == process.pid
        try:
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert (tmp_path / "log").stat().st_size >= 1 << 20


def _waits(thread: threading.Thread) -> bool:
    """Whether it sleeps in the kernel."""
    with open(f"/proc/self/task/{thread.native_id}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "S"
