"""Rank 0 and the others: what it tells comes in order, what they report is joined, and a loss ends the worker."""

from __future__ import annotations

import queue
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from engine.plan import BlockTable, Row, StepPlan, StepResult
from kvtransfer.join import Join
from kvtransfer.messages import MoverReport, Probe, Probed
from worker import ring
from worker.messages import Fatal, Shutdown
from worker.rank_link import Expecting, FromRank, RankReady, RingLink, ToRank
from worker.ranks import GroupMover, GroupRunner, RankGroup, RankLost
from worker.step_codec import StepDelta

LIMIT_S = 10.0


class Other:
    """Another rank's end of its link."""

    def __init__(self) -> None:
        here, there = socket.socketpair()
        out, into = ring.create(), ring.create()
        self.leader_link = RingLink(out, into, FromRank, here)
        self.link = RingLink(into, out, ToRank, there)


@pytest.fixture
def others() -> Iterator[dict[int, Other]]:
    made = {1: Other(), 2: Other()}
    yield made
    for other in made.values():
        other.link.close()
        other.leader_link.close()


@pytest.fixture
def group(others: dict[int, Other]) -> RankGroup:
    return RankGroup({rank: other.leader_link for rank, other in others.items()})


class Own:
    """Rank 0's own runner and mover, which note when they were called."""

    def __init__(self, others: dict[int, Other]) -> None:
        self.others = others
        self.heard: list[list[Any]] = []

    def run(self, plan: StepPlan) -> StepResult:
        self.heard.append([other.link.read() for other in self.others.values()])
        return StepResult([5] * len(plan.rows))

    def submit(self, job: Any) -> None:
        self.heard.append([job])

    def expecting(self, on: bool) -> None:
        self.heard.append([on])


def _ready(rank: int) -> RankReady:
    return RankReady(rank=rank, pid=rank, blocks=8, endpoint=bytes([rank]), slot_bytes=1)


def test_a_job_never_overtakes_the_step_that_it_follows(group: RankGroup, others: dict[int, Other]) -> None:
    own = Own(others)
    runner, mover = GroupRunner(own, group), GroupMover(own, group)
    table = BlockTable()
    table.extend([3])
    plan = StepPlan(1, [Row(0, [7], table, None)])
    assert runner.run(plan).sampled == [5]
    assert all(isinstance(told[0], StepDelta) for told in own.heard[0]), (
        "the others hear before rank 0 computes"
    )
    mover.submit(Probe("peer"))
    mover.expecting(True)
    runner.run(StepPlan(2))
    for told in own.heard[-1]:
        assert [type(message) for message in told] == [Probe, Expecting, StepDelta]
    assert own.heard[1:3] == [[Probe("peer")], [True]]


def test_reports_of_all_ranks_make_one(group: RankGroup, others: dict[int, Other]) -> None:
    reports: queue.Queue[MoverReport] = queue.Queue()
    lost: queue.Queue[BaseException] = queue.Queue()
    join = Join(3, reports.put, lambda peer, done: None)
    group.watch(join, lost.put)
    join.put(0, Probed("peer", True))
    others[2].link.send(Probed("peer", True))
    others[1].link.send(Probed("peer", False))
    assert reports.get(timeout=LIMIT_S) == Probed("peer", False)
    assert reports.empty() and lost.empty()


@pytest.mark.parametrize("words", [None, "no memory"])
def test_a_lost_rank_is_named(group: RankGroup, others: dict[int, Other], words: str | None) -> None:
    lost: queue.Queue[BaseException] = queue.Queue()
    group.watch(Join(3, lambda report: None, lambda peer, done: None), lost.put)
    if words:
        others[2].link.send(Fatal(words))
    else:
        others[2].link.close()
    error = lost.get(timeout=LIMIT_S)
    assert isinstance(error, RankLost)
    assert str(error) == ("rank 2: no memory" if words else "rank 2 died: its process is gone")


def test_all_must_be_ready(group: RankGroup, others: dict[int, Other]) -> None:
    for rank, other in others.items():
        other.link.send(_ready(rank))
    assert group.wait_ready() == {1: _ready(1), 2: _ready(2)}
    others[1].link.send(_ready(1))
    others[2].link.send(Fatal("ModelError: no such tensor"))
    with pytest.raises(RankLost, match="rank 2: ModelError: no such tensor"):
        group.wait_ready()


def test_the_end_is_told_and_is_no_loss(group: RankGroup, others: dict[int, Other]) -> None:
    lost: queue.Queue[BaseException] = queue.Queue()
    group.watch(Join(3, lambda report: None, lambda peer, done: None), lost.put)
    group.close()
    for other in others.values():
        assert other.link.read() == [Shutdown()]
        other.link.close()
    assert group._thread is not None
    group._thread.join(LIMIT_S)
    assert lost.empty() and not group._thread.is_alive()


def test_a_rank_that_does_not_read_is_stuck(
    group: RankGroup, others: dict[int, Other], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "PENDING_LIMIT", 1 << 20)
    job = Probe("x" * (1 << 20))
    with pytest.raises(ring.RingFull):
        for _ in range(8):
            group.submit(job)
