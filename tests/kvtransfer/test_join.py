"""Reports of all ranks become one a job, whatever order they come in; `ChunkDone` leaves only for a whole chunk."""

from __future__ import annotations

import random
import threading
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.join import Join
from kvtransfer.messages import ChunkDone, Connected, Copied, Measured, MoverReport, Probed, Sent


class Joined:
    def __init__(self, ranks: int) -> None:
        self.reports: list[MoverReport] = []
        self.controls: list[tuple[str, ChunkDone]] = []
        self.broken = False
        self.join = Join(ranks, self.reports.append, self._send)

    def _send(self, peer: str, done: ChunkDone) -> None:
        if self.broken:
            raise OSError("no stream")
        self.controls.append((peer, done))


def sent(pieces: list[int], **changes: Any) -> Sent:
    digests = [bytes([piece]) * 16 for piece in pieces]
    report = Sent("d", 7, 100, 3, 10 * len(pieces), epoch=2, pieces=pieces, digests=digests)
    return msgspec.structs.replace(report, **changes)


def test_a_chunk_is_done_when_the_last_rank_has_sent_its_part() -> None:
    joined = Joined(3)
    joined.join.put(1, sent([2, 0]))
    joined.join.put(2, sent([]))
    assert not joined.reports and not joined.controls
    joined.join.put(0, sent([1]))
    digests = [bytes([piece]) * 16 for piece in range(3)]
    assert joined.controls == [("d", ChunkDone(7, 100, 2, 3, 30, digests))]
    assert joined.reports == [Sent("d", 7, 100, 3, 30, epoch=2, pieces=[0, 1, 2], digests=digests)]


def test_one_rank_is_joined_too() -> None:
    joined = Joined(1)
    joined.join.put(0, sent([0], size_bytes=5))
    assert joined.controls[0][1].size_bytes == 5 and joined.reports == [sent([0], size_bytes=5)]


@pytest.mark.parametrize(
    ("reports", "words"),
    [
        ([sent([0]), sent([], error="lost", size_bytes=0)], "rank 1: lost"),
        ([sent([], error="a"), sent([], error="b")], "rank 0: a; rank 1: b"),
        ([sent([0]), sent([2])], "[0, 2]"),
        ([sent([0]), sent([0])], "[0, 0]"),
        ([sent([]), sent([])], "[]"),
        ([sent([0, 1], digests=[bytes(16)]), sent([])], "[0]"),  # a digest is missing
        ([sent([0]), sent([1], digests=[])], "[0]"),
    ],
)
def test_no_chunk_done_for_what_is_no_whole_chunk(reports: list[Sent], words: str) -> None:
    joined = Joined(2)
    for rank, report in enumerate(reports):
        joined.join.put(rank, report)
    (one,) = joined.reports
    assert isinstance(one, Sent)
    assert words in one.error and not joined.controls and not one.digests
    assert (one.peer, one.handoff_id, one.lease_id, one.epoch) == ("d", 7, 100, 2)


def test_chunk_done_that_cannot_be_sent_is_reported() -> None:
    joined = Joined(1)
    joined.broken = True
    joined.join.put(0, sent([0]))
    (report,) = joined.reports
    assert isinstance(report, Sent) and "no stream" in report.error


def test_the_others() -> None:
    joined = Joined(2)
    put = joined.join.put
    for rank in range(2):
        put(rank, Connected("p"))
        put(rank, Copied(7, 1, True))
        put(rank, Copied(7, 2, rank == 0))
        put(rank, Probed("p", True))
        put(rank, Probed("q", rank == 1))
    put(0, Connected("q"))
    put(1, Connected("q", "unreachable"))
    assert joined.reports == [
        Connected("p"),
        Copied(7, 1, True),
        Copied(7, 2, False),
        Probed("p", True),
        Probed("q", False),
        Connected("q", "rank 1: unreachable"),
    ]


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**32))
def test_every_job_gives_one_report_in_any_order_of_ranks(ranks: int, seed: int) -> None:
    """Ranks are ahead of each other by many jobs; the same peer is connected and probed again and again."""
    rng = random.Random(seed)
    jobs: list[list[MoverReport]] = []  # of each job, by rank
    expected: list[MoverReport] = []
    for number in range(12):
        kind = rng.randrange(3)
        if kind == 0:
            errors = ["" if rng.random() < 0.5 else f"e{number}" for _ in range(ranks)]
            jobs.append([Connected("p", error) for error in errors])
            text = "; ".join(f"rank {rank}: {error}" for rank, error in enumerate(errors) if error)
            expected.append(Connected("p", text if ranks > 1 else errors[0]))
        elif kind == 1:
            gone = [rng.random() < 0.7 for _ in range(ranks)]
            jobs.append([Probed("p", one) for one in gone])
            expected.append(Probed("p", all(gone)))
        else:
            verified = [rng.random() < 0.7 for _ in range(ranks)]
            jobs.append([Copied(7, number, one) for one in verified])
            expected.append(Copied(7, number, all(verified)))
    joined = Joined(ranks)
    left = [0] * ranks
    while any(at < len(jobs) for at in left):
        rank = rng.choice([rank for rank in range(ranks) if left[rank] < len(jobs)])
        joined.join.put(rank, jobs[left[rank]][rank])
        left[rank] += 1
    for of in (Connected, Probed, Copied):
        assert [r for r in joined.reports if isinstance(r, of)] == [r for r in expected if isinstance(r, of)]
    assert not joined.join._open


def test_ranks_report_from_threads_of_their_own() -> None:
    joined = Joined(4)

    def report(rank: int) -> None:
        for lease in range(200):
            joined.join.put(rank, sent([rank], lease_id=lease))

    threads = [threading.Thread(target=report, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done.lease_id for _, done in joined.controls) == list(range(200))
    assert all(len(done.digests) == 4 for _, done in joined.controls) and len(joined.reports) == 200


def test_a_rank_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError):
        Joined(0)
    for rank in (-1, 2):
        with pytest.raises(ValueError):
            Joined(2).join.put(rank, Connected("p"))


def test_a_link_of_ranks_is_as_fast_as_the_slowest() -> None:
    joined = Joined(2)
    fast, slow = Measured(bytes_per_s=9.0, latency_s=1.0), Measured(bytes_per_s=5.0, latency_s=2.0)
    joined.join.put(0, Connected("p", "", fast, "cma/memory, tcp/lo"))
    joined.join.put(1, Connected("p", "", slow, "tcp/lo, tcp/eth0", "slow"))
    both = Measured(bytes_per_s=5.0, latency_s=2.0)
    assert joined.reports == [Connected("p", "", both, "cma/memory, tcp/lo, tcp/eth0", "slow")]
