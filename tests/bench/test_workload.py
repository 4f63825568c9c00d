"""The same workload at any rate."""

from __future__ import annotations

import pytest

from bench.synthetic import Synthetic
from bench.traces import Trace, TraceError, TraceRequest
from bench.workload import Workload

TRACE = Trace("t", tuple(TraceRequest(n, n * 2.0, 64 * (n + 1), 8) for n in range(100)), 200.0)


def test_a_trace_at_a_rate() -> None:
    made = Workload(TRACE, duration_s=10, warmup_s=5).schedule(4.0)
    assert (made.warmup_s, made.window_s) == (5, 10)
    assert len(made.jobs) == 60
    assert [job.warmup for job in made.jobs] == [job.at_s < 5 for job in made.jobs]
    assert [job.at_s for job in made.jobs] == pytest.approx([n / 4 for n in range(60)])


def test_a_rate_is_exact_unless_the_traces_own_times_count() -> None:
    early = tuple(TraceRequest(n, n * 1.0 if n < 60 else 60 + (n - 60) * 3.5, 9, 9) for n in range(100))
    busy_first = Trace("t", early, 200.0)
    assert len(Workload(busy_first, duration_s=20).schedule(1.0).jobs) == 20
    assert len(Workload(busy_first, duration_s=20, own_times=True).schedule(1.0).jobs) == 40


def test_lengths_are_scaled_and_then_limited() -> None:
    workload = Workload(TRACE, duration_s=1, input_scale=0.5, output_scale=0.25, max_input=64, max_total=60)
    made = workload.schedule(1.0)
    assert [(job.request.input_tokens, job.request.output_tokens) for job in made.jobs] == [(32, 2)]
    assert workload.dropped() == (99, 100)
    assert Workload(TRACE, max_output=7).dropped() == (100, 100)


def test_a_rate_is_that_of_what_is_sent_also_when_some_are_dropped() -> None:
    mixed = Trace("t", tuple(TraceRequest(n, n * 2.0, 64 + n % 2, 8) for n in range(100)), 200.0)
    half = Workload(mixed, duration_s=10, max_input=64).schedule(2.0)
    assert len(half.jobs) == 20


def test_requests_of_the_same_instant_are_spread_and_the_seed_says_how() -> None:
    crowd = Trace("t", tuple(TraceRequest(n, 3.0 * (n // 10), 9, 9) for n in range(40)), 12.0)
    made = Workload(crowd, duration_s=10, seed=1).schedule(3.0)
    assert len({job.at_s for job in made.jobs}) == 30
    assert made == Workload(crowd, duration_s=10, seed=1).schedule(3.0)
    assert made != Workload(crowd, duration_s=10, seed=2).schedule(3.0)


def test_a_later_part_of_the_trace() -> None:
    made = Workload(TRACE, duration_s=2, start_s=100.0).schedule(1.0)
    assert [job.request.number for job in made.jobs] == [50, 51]
    assert [job.at_s for job in made.jobs] == pytest.approx([0, 1])


def test_a_number_of_requests_instead_of_a_time() -> None:
    made = Workload(TRACE, requests=40, warmup_s=5).schedule(4.0)
    assert (len(made.jobs), made.window_s) == (40, 5.0)
    made = Workload(Synthetic(1.0), requests=40).schedule(4.0)
    assert len(made.jobs) == 40
    assert made.window_s > made.jobs[-1].at_s


def test_made_up_traces_come_at_the_rate_of_the_run() -> None:
    workload = Workload(Synthetic(1.0), duration_s=30, seed=4)
    assert len(workload.schedule(20.0).jobs) == pytest.approx(600, rel=0.15)
    assert workload.schedule(20.0) == workload.schedule(20.0)
    assert workload.dropped() == (0, 0)


def test_too_little_is_an_error_before_anything_is_sent() -> None:
    with pytest.raises(
        TraceError, match="it has 100 requests, enough for 50.0 s at 2 requests/s, but 60.0 s"
    ):
        Workload(TRACE, duration_s=60).schedule(2.0)
    with pytest.raises(TraceError, match="it lasts 50.0 s at 2 requests/s, but 60.0 s"):
        Workload(TRACE, duration_s=60, own_times=True).schedule(2.0)
    with pytest.raises(TraceError, match="nothing is left to measure"):
        Workload(TRACE, requests=3, warmup_s=9).schedule(1.0)
    with pytest.raises(TraceError, match="it has 100 requests"):
        Workload(TRACE, requests=101).schedule(1.0)
