"""Measuring a transport with a small budget: what is written, when it ends, what is concluded."""

from __future__ import annotations

import numpy as np
import pytest

from kvtransfer import preflight
from kvtransfer.loopback import LoopbackFabric, LoopbackFaults
from kvtransfer.messages import Measured
from kvtransfer.preflight import AREA_BYTES, LIMIT_S, Preflight, refusal, run, summary
from kvtransfer.transport import Rows
from kvtransfer.trial import trial

MIB = 1 << 20


class Link:
    """Writes take `latency_s`, and `size / bytes_per_s`, of virtual time. Keeps their rows."""

    def __init__(self, bytes_per_s: float, latency_s: float = 0.0, warm_up_s: float = 0.0) -> None:
        self.bytes_per_s, self.latency_s, self.warm_up_s = bytes_per_s, latency_s, warm_up_s
        self.now = 100.0
        self.writes: list[tuple[int, int, int]] = []

    def measure(self, measurement: Preflight) -> Measured:
        rows: Rows | None = measurement.begin(self.now)
        while rows is not None:
            source, landing, size = rows[0].tolist()
            self.writes.append((source, landing, size))
            self.now += self.latency_s + size / self.bytes_per_s + self.warm_up_s * (len(self.writes) == 1)
            rows = measurement.settled("", self.now)
        assert measurement.measured is not None
        return measurement.measured


@pytest.mark.parametrize(
    ("gb_per_s", "latency_s"), [(10.0, 5e-6), (1.0, 50e-6), (0.0125, 1e-3), (0.00125, 0.02)]
)
def test_what_is_measured_is_what_the_link_does(gb_per_s: float, latency_s: float) -> None:
    link = Link(gb_per_s * 1e9, latency_s, warm_up_s=0.3)
    measured = link.measure(Preflight())
    assert measured.error == ""
    # The connection's set-up counts nowhere; a large write has its latency in it.
    assert measured.latency_s == pytest.approx(latency_s + 4096 / (gb_per_s * 1e9))
    assert 0.5 * gb_per_s < measured.gb_per_s <= gb_per_s
    assert measured.moved_bytes == sum(size for _, _, size in link.writes)


def test_it_is_short_and_small_whatever_the_link() -> None:
    for bytes_per_s in (1e6, 1e8, 1e9, 1e11):
        link = Link(bytes_per_s)
        link.measure(Preflight())
        assert sum(size for _, _, size in link.writes) <= preflight.BUDGET_BYTES + AREA_BYTES
        if bytes_per_s >= 1e8:
            assert link.now - 100.0 <= 3 * preflight.BUDGET_S
        assert link.now - 100.0 <= LIMIT_S


def test_writes_stay_in_their_areas() -> None:
    link = Link(1e10)
    link.measure(Preflight(staging_at=5 * MIB, landing_at=7 * MIB, area_bytes=MIB))
    assert {(source, landing) for source, landing, _ in link.writes} == {(5 * MIB, 7 * MIB)}
    assert max(size for _, _, size in link.writes) == MIB
    tiny = Link(1e10)
    assert tiny.measure(Preflight(area_bytes=100)).gb_per_s > 0
    assert {size for _, _, size in tiny.writes} == {100}
    with pytest.raises(ValueError, match="area_bytes=0"):
        Preflight(area_bytes=0)


def test_a_write_that_fails_ends_it() -> None:
    measurement = Preflight()
    measurement.begin(0.0)
    assert measurement.settled("", 0.1) is not None
    assert measurement.settled("the peer is gone", 0.2) is None
    assert measurement.measured == Measured(moved_bytes=4096, error="the peer is gone")
    assert measurement.settled("", 0.3) is None and measurement.measured.error == "the peer is gone"


def test_a_peer_that_hangs_is_overdue() -> None:
    measurement = Preflight(limit_s=2.0)
    measurement.begin(10.0)
    assert not measurement.overdue(11.9) and measurement.overdue(12.0)
    measurement.give_up("hangs")
    assert not measurement.overdue(99.0)
    assert measurement.measured is not None and measurement.measured.error == "hangs"


def test_over_an_endpoint() -> None:
    fabric = LoopbackFabric(seed=1, faults=LoopbackFaults(delay=(0, 3)))
    here = fabric.open("here", staging_bytes=2 * MIB, landing_bytes=0)
    there = fabric.open("there", staging_bytes=0, landing_bytes=3 * MIB)
    here.connect("there", there.describe())
    here.staging[MIB:] = 7
    measured = run(here, "there", Preflight(staging_at=MIB, landing_at=2 * MIB, area_bytes=MIB))
    assert measured.error == "" and measured.bytes_per_s > 0 and measured.latency_s > 0
    assert not there.landing[: 2 * MIB].any() and there.landing[2 * MIB] == 7


def test_over_an_endpoint_that_hangs_fails_or_is_not_there() -> None:
    fabric = LoopbackFabric(seed=1, faults=LoopbackFaults(delay=(5, 5)))
    here = fabric.open("here", staging_bytes=MIB, landing_bytes=0)
    there = fabric.open("there", staging_bytes=0, landing_bytes=MIB)
    assert "not connected" in run(here, "there", Preflight(area_bytes=MIB)).error
    here.connect("there", there.describe())
    assert "outside" in run(here, "there", Preflight(area_bytes=2 * MIB)).error
    fabric.hang("there")
    now = iter(np.arange(0.0, 1000.0, 0.5).tolist())
    assert "hangs" in run(here, "there", Preflight(area_bytes=MIB), clock=lambda: next(now)).error
    fabric.kill("there")
    assert "gone" in run(here, "there", Preflight(area_bytes=MIB)).error


def test_the_verdict_names_both_values() -> None:
    slow = Measured(latency_s=1e-4, bytes_per_s=0.4e9)
    assert refusal(slow, 0.0) == "" and refusal(slow, 0.4) == ""
    said = refusal(slow, 2.5)
    assert "0.4 GB/s" in said and "kvtransfer.min_bandwidth = 2.5 GB/s" in said and "baton doctor" in said
    unknown = Measured(error="it hangs")
    assert refusal(unknown, 0.0) == "" and "it hangs" in refusal(unknown, 1.0)


def test_the_line_for_people() -> None:
    assert summary(Measured(latency_s=35e-6, bytes_per_s=4.12e9), "nixl/UCX", "cma/memory") == (
        "nixl/UCX (cma/memory): 4.12 GB/s, 35 us"
    )
    assert summary(Measured(error="it hangs"), "shm", "") == "shm: not measured: it hangs"


@pytest.mark.parametrize("kind", ["shm", "distributed"])
def test_a_trial_between_two_processes(kind: str) -> None:
    tried = trial(kind)
    assert tried.error == "" and tried.name.startswith(kind) and tried.devices
    assert tried.measured.gb_per_s > 0 and tried.measured.latency_s > 0


def test_a_trial_that_goes_wrong_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "carrier pigeon" in trial("carrier pigeon").error
    assert "nothing came back within 0.001 s" in trial("shm", limit_s=0.001).error
    monkeypatch.setattr("sys.executable", "/bin/kill-me")
    assert "could not be started" in trial("shm").error
