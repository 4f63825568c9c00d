"""Links are measured when workers are connected: between a mover's other work, into areas of their own, and bounded."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvtransfer.handshake import PREFLIGHT
from kvtransfer.linking import Linking
from kvtransfer.loopback import LoopbackFabric, LoopbackFaults
from kvtransfer.memory import Sizes, TransferMemory
from kvtransfer.messages import Connected, Hello, Measured, MoverReport
from kvtransfer.peers import Peer
from kvtransfer.plan import plan
from kvtransfer.preflight import AREA_BYTES, LIMIT_S, worst
from tests.kvtransfer.pools import kv_spec

SLOTS = 2


class Pair:
    """A prefill rank here and the two ranks of a decode worker, over a loopback; the clock stands until it is set."""

    def __init__(
        self, faults: LoopbackFaults | None = None, capabilities: tuple[str, ...] = (PREFLIGHT,)
    ) -> None:
        self.now = 0.0
        self.fabric = LoopbackFabric(seed=1, faults=faults)
        mine, theirs = kv_spec(kv_heads=2), kv_spec(kv_heads=2, tensor_parallel=2)
        sizes = Sizes.of(mine, 0, role="prefill", pool_bytes=0)
        self.endpoint = self.fabric.open(
            "p", staging_bytes=sizes.staging_bytes, landing_bytes=sizes.landing_bytes
        )
        self.memory = TransferMemory.over(self.endpoint, sizes)
        self.sizes = [Sizes.of(theirs, rank, role="decode", slots=SLOTS) for rank in range(2)]
        self.there = [
            self.fabric.open(f"d/{rank}", staging_bytes=0, landing_bytes=each.landing_bytes)
            for rank, each in enumerate(self.sizes)
        ]
        for rank, endpoint in enumerate(self.there):
            self.endpoint.connect(f"d/{rank}", endpoint.describe())
        hello = Hello(
            worker_id="decode-0",
            incarnation="d",
            kv=theirs,
            transport="loopback",
            endpoints=[endpoint.describe() for endpoint in self.there],
            capabilities=list(capabilities),
            slot_count=SLOTS,
            slot_bytes=[each.slot_bytes for each in self.sizes],
        )
        made = plan(mine, hello.kv)
        self.peer = Peer(hello, made, made.targets(0))
        self.reports: list[MoverReport] = []
        self.linking = Linking(self.memory, self.reports.append, clock=self._clock)

    def _clock(self) -> float:
        self.now += 1e-4
        return self.now

    def run(self, until: Callable[[], bool], polls: int = 10_000) -> None:
        for _ in range(polls):
            if until():
                return
            for settled in self.endpoint.poll():
                assert self.linking.settled(settled)
            self.linking.tick()
        raise AssertionError("not within so many polls")

    def connected(self) -> Connected:
        assert len(self.reports) == 1
        report = self.reports.pop()
        assert isinstance(report, Connected)
        return report


def test_every_rank_is_measured_and_only_the_areas_are_touched() -> None:
    pair = Pair(LoopbackFaults(delay=(0, 3)))
    assert pair.peer.partners == (0, 1)
    pair.endpoint.staging[pair.memory.area_at :] = 7
    pair.endpoint.staging[: pair.memory.area_at] = 9
    busy = [pair.linking.busy]
    pair.linking.measure(pair.peer)
    busy.append(pair.linking.busy and not pair.reports)
    pair.run(lambda: bool(pair.reports))
    busy.append(pair.linking.busy)
    assert busy == [False, True, False]
    report = pair.connected()
    assert report.peer == "d" and report.error == "" and report.devices == "none"
    assert report.measured is not None and report.measured.error == "" and report.measured.bytes_per_s > 0
    for endpoint, sizes in zip(pair.there, pair.sizes, strict=True):
        slots = SLOTS * sizes.slot_bytes
        assert endpoint.landing.nbytes == slots + AREA_BYTES
        assert not endpoint.landing[:slots].any() and endpoint.landing[slots] == 7
        assert set(np.unique(endpoint.landing[slots:])) <= {0, 7}


def test_a_release_that_has_no_room_to_measure_is_connected_all_the_same() -> None:
    pair = Pair(capabilities=())
    pair.linking.measure(pair.peer)
    report = pair.connected()
    assert (
        report.error == "" and report.measured is not None and "no room to measure" in report.measured.error
    )
    assert not any(endpoint.landing.any() for endpoint in pair.there)


def test_a_rank_that_hangs_is_given_up_and_its_late_write_is_still_ours() -> None:
    pair = Pair(LoopbackFaults(delay=(2, 2)))
    pair.fabric.hang("d/1")
    pair.linking.measure(pair.peer)
    pair.run(lambda: bool(pair.reports), polls=10 * int(LIMIT_S / 1e-4))
    report = pair.connected()
    assert report.error == "" and report.measured is not None and "hangs" in report.measured.error
    assert report.measured.bytes_per_s == 0 and not pair.linking.busy
    pair.fabric.resume("d/1")
    late = [settled for _ in range(10) for settled in pair.endpoint.poll()]
    assert len(late) == 1 and pair.linking.settled(late[0]) and not pair.reports
    assert not pair.linking.settled(late[0]), "once"


def test_a_rank_that_dies_or_refuses_ends_it() -> None:
    pair = Pair(LoopbackFaults(delay=(2, 2)))
    pair.linking.measure(pair.peer)
    pair.fabric.kill("d/0")
    pair.run(lambda: bool(pair.reports))
    assert "gone" in (pair.connected().measured or Measured()).error
    pair.linking.measure(pair.peer)  # now the write itself is refused
    assert "gone" in (pair.connected().measured or Measured()).error


def test_disconnected_or_connected_again_in_the_middle_is_reported_once() -> None:
    pair = Pair(LoopbackFaults(delay=(2, 2)))
    pair.linking.measure(pair.peer)
    pair.linking.forget("d", "it was disconnected")
    pair.linking.forget("d", "it was disconnected")
    assert pair.connected() == Connected("d", "it was disconnected")
    pair.linking.measure(pair.peer)
    pair.run(lambda: bool(pair.reports))
    measured = pair.connected().measured
    assert measured is not None and measured.error == ""
    pair.linking.measure(pair.peer)
    pair.linking.close("the mover was closed")
    assert pair.connected() == Connected("d", "the mover was closed")


def test_the_worst_of_two_links() -> None:
    fast, slow = (
        Measured(latency_s=2, bytes_per_s=9, moved_bytes=1),
        Measured(latency_s=1, bytes_per_s=5, moved_bytes=2),
    )
    assert worst(None, None) is None and worst(fast, None) is fast and worst(None, slow) is slow
    assert worst(fast, slow) == Measured(latency_s=2, bytes_per_s=5, moved_bytes=3)
    assert worst(fast, Measured(error="hangs")) == Measured(latency_s=2, moved_bytes=1, error="hangs")
