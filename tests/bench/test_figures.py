"""Figures against numpy, against sums done by hand, and against what they must obey."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.figures import (
    SLO_SCALES,
    Comparison,
    Distribution,
    RateSearch,
    Slo,
    Summary,
    compare,
    gaps,
    latency,
    summarize,
)
from bench.record import Record, Run

seconds = st.floats(1e-6, 1e3)


def record(
    number: int, scheduled: float, times: list[float], tokens: list[int] | None = None, **more: object
) -> Record:
    """An answered request, times after it was due; `more` goes over its fields."""
    made = Record(number, scheduled, input_tokens=10, output_tokens=len(times))
    made.sent = scheduled + 0.001
    for at, count in zip(times, tokens or [1] * len(times), strict=True):
        made.piece(scheduled + at, count)
    made.completion_tokens = sum(made.piece_tokens)
    made.end = scheduled + (times[-1] if times else 0.0) + 0.5
    for name, value in more.items():
        setattr(made, name, value)
    return made


@given(st.lists(seconds, min_size=1, max_size=200))
def test_percentiles_are_numpys(values: list[float]) -> None:
    found = Distribution.of(iter(values))
    in_ms = np.asarray(values) * 1e3
    assert found.count == len(values)
    assert found.mean == pytest.approx(np.mean(in_ms))
    assert found.max == pytest.approx(max(in_ms))
    for name, percent in (("p50", 50), ("p90", 90), ("p95", 95), ("p99", 99)):
        assert getattr(found, name) == pytest.approx(np.percentile(in_ms, percent))


def test_percentiles_by_hand() -> None:
    found = Distribution.of([0.4, 0.1, 0.2, 0.3, 0.5])
    assert (found.p50, found.p90, found.mean, found.max) == pytest.approx((300, 460, 300, 500))
    assert Distribution.of([]) == Distribution()


def test_latencies_count_from_when_a_request_was_due() -> None:
    one = record(0, 100.0, [0.2, 0.3, 0.6])
    one.sent = 100.15  # held back: that is no excuse
    found = latency(one)
    assert found.ttft == pytest.approx(0.2)
    assert found.tpot == pytest.approx(0.2)
    assert found.itl == pytest.approx(0.3)
    assert found.e2e == pytest.approx(1.1)
    assert gaps(one) == pytest.approx([0.1, 0.3])


def test_the_tail_of_the_gaps_is_their_longest_tenth() -> None:
    times = np.cumsum([0.5, *[0.01] * 28, 0.05, 0.11]).tolist()  # 30 gaps: the three longest count
    assert latency(record(0, 0.0, times)).itl == pytest.approx((0.11 + 0.05 + 0.01) / 3)


def test_pieces_of_several_tokens() -> None:
    found = latency(record(0, 0.0, [0.1, 0.3, 0.5], [2, 3, 3]))
    assert found.tpot == pytest.approx(0.4 / 6)  # six tokens after the first piece
    assert found.itl == pytest.approx(0.2)
    alone = latency(record(0, 0.0, [0.1], [7]))
    assert (alone.tpot, alone.itl) == (0.0, 0.0)
    with pytest.raises(ValueError, match="not answered: reset"):
        latency(record(0, 0.0, [0.1], error="reset"))


def test_slo() -> None:
    slo = Slo.parse("ttft=500, itl=50")
    assert slo == Slo(ttft=0.5, itl=0.05)
    assert str(slo) == "ttft 500 ms, itl 50 ms"
    assert slo.scaled(2) == Slo(ttft=1.0, itl=0.1)
    slow = latency(record(0, 0.0, [0.6, 0.61, 0.7]))
    assert slo.missed(slow) == ["ttft", "itl"]
    assert slo.scaled(2).missed(slow) == []
    assert Slo.parse("").items() == {} and str(Slo()) == "none"


@pytest.mark.parametrize(
    "text", ["ttft", "ttft=x", "ttft=-1", "ttft=nan", "tbt=5", "ttft=1,ttft=2", "ttft=inf"]
)
def test_what_is_no_slo(text: str) -> None:
    with pytest.raises(ValueError, match="is no objective; write e.g. ttft=500,itl=50 in ms"):
        Slo.parse(text)


def the_run() -> Run:
    """Two of warm-up, then six in [10, 16): four answered, of which three are quick enough; one of those is short."""
    quick = [0.1, 0.11, 0.12]
    records = [
        record(0, 5.0, [9.0], warmup=True),
        record(1, 6.0, [], error="connect", warmup=True),
        record(2, 10.0, quick, prompt_tokens=12, cached_tokens=6, prefilled="remote"),
        record(3, 11.0, quick, output_tokens=4),
        record(4, 12.0, [0.9, 0.91, 0.92], prefilled="local"),
        record(5, 13.0, [], error="no_room", message="full", status=429),
        record(6, 14.0, [0.1], error="broken_stream", message="closed"),
        record(7, 15.0, quick, prefilled="remote"),
    ]
    return Run(records, begin=5.0, end=20.0, cpu_s=0.1)


def test_a_summary_by_hand() -> None:
    found = summarize(the_run(), Slo(ttft=0.5, itl=0.05), warmup_s=5.0, window_s=6.0)
    assert (found.requests, found.answered) == (6, 4)
    assert found.errors == {"no_room": 1, "broken_stream": 1}
    assert found.messages == {"no_room": "full", "broken_stream": "closed"}
    assert found.offered_rps == 1.0
    assert found.attainment == 3 / 6
    assert found.goodput_rps == 3 / 6  # three in six seconds
    assert found.missed == {"ttft": 1}
    assert found.answered_rps == pytest.approx(4 / 6)  # the last answer came within the window
    assert (found.input_tokens, found.output_tokens) == (12 + 10 + 10 + 10, 12)
    assert found.output_tps == pytest.approx(12 / 6)
    assert found.short_answers == 1
    assert found.tokens_per_piece == 1.0
    assert found.cached_share == pytest.approx(6 / 42)
    assert found.prefilled == {"remote": 2, "local": 1}
    assert found.ttft_ms.count == 4 and found.ttft_ms.p50 == pytest.approx(100)
    assert found.itl_ms.count == 8 and found.itl_ms.max == pytest.approx(10)
    assert found.late_ms.p50 == pytest.approx(1)


def test_answers_after_the_window_lengthen_what_throughput_is_divided_by() -> None:
    late = Run([record(0, 0.0, [7.5])], begin=0.0, end=9.0, cpu_s=0.0)
    found = summarize(late, Slo(), warmup_s=0.0, window_s=2.0)
    assert found.answered_rps == pytest.approx(1 / 8)
    assert found.goodput_rps == 0.5  # no objective: an answer is enough


def test_a_run_without_answers() -> None:
    found = summarize(
        Run([record(0, 0.0, [], error="connect")], 0.0, 1.0, 0.0), Slo(ttft=1), warmup_s=0, window_s=1
    )
    assert (found.answered, found.attainment, found.ttft_ms.count, found.tokens_per_piece) == (0, 0.0, 0, 0.0)
    assert {share for _, share in found.slo_curve} == {0.0}


@given(
    st.lists(st.lists(st.floats(0.001, 2), min_size=1, max_size=6), min_size=1, max_size=12),
    st.integers(0, 5),
)
def test_looser_objectives_are_met_by_no_fewer_requests(gap_lists: list[list[float]], failed: int) -> None:
    records = [record(n, 0.0, np.cumsum(each).tolist()) for n, each in enumerate(gap_lists)]
    records += [record(100 + n, 0.0, [], error="reset") for n in range(failed)]
    found = summarize(Run(records, 0.0, 1.0, 0.0), Slo(ttft=0.5, itl=0.2), warmup_s=0, window_s=2)
    shares = [share for _, share in found.slo_curve]
    assert all(tight <= loose for tight, loose in pairwise(shares))
    assert [scale for scale, _ in found.slo_curve] == list(SLO_SCALES)
    assert dict(found.slo_curve)[1.0] == pytest.approx(found.attainment)
    assert max(shares) <= len(gap_lists) / len(records)


def test_a_summary_survives_json() -> None:
    found = summarize(the_run(), Slo(ttft=0.5), warmup_s=5.0, window_s=6.0)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Summary) == found


def rounds(ours: list[float], theirs: list[float]) -> list[dict[str, Summary]]:
    """Rounds of two sides that differ in output_tps alone."""
    base = summarize(the_run(), Slo(), warmup_s=5.0, window_s=6.0)
    return [
        {"A": msgspec.structs.replace(base, output_tps=a), "B": msgspec.structs.replace(base, output_tps=b)}
        for a, b in zip(ours, theirs, strict=True)
    ]


def throughput(found: list[Comparison]) -> Comparison:
    return next(each for each in found if each.figure == "output_tps")


def test_sides_are_compared_round_by_round() -> None:
    found = throughput(compare(rounds([100, 102, 101], [120, 122, 122])))
    assert (found.side, found.first, found.other) == ("B", 101, 122)
    assert found.ratios == pytest.approx([1.2, 122 / 102, 122 / 101])
    assert found.change == pytest.approx(0.2)
    assert found.spread == pytest.approx(0.02)
    assert found.beyond_spread


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([100, 102], [150, 150]),  # two rounds say nothing
        ([100, 130, 101], [120, 121, 122]),  # the first side differs as much from itself
        ([100, 100, 100], [101, 99, 101]),  # now more, now less
        ([100, 100, 100], [110, 110, 99.9]),  # once less
        ([100, 100, 100], [120, 60, 120]),  # the other side differs from itself
    ],
)
def test_chance_is_told_from_difference(ours: list[float], theirs: list[float]) -> None:
    assert not throughput(compare(rounds(ours, theirs))).beyond_spread


def test_what_cannot_be_compared_is_left_out() -> None:
    assert compare([]) == []
    assert all(each.figure != "output_tps" for each in compare(rounds([0, 1, 1], [1, 1, 1])))


@given(st.floats(0.05, 500), st.floats(0.1, 50))
def test_the_search_finds_the_limit(limit: float, start: float) -> None:
    search = RateSearch(start, tolerance=0.05, most=40)
    while (rate := search.next()) is not None:
        search.tell(rate, 1.0 if rate <= limit else 0.5)
    assert search.met is not None and search.failed is not None
    assert search.met <= limit < search.failed <= search.met * 1.0501


def test_the_search_is_bounded() -> None:
    for attainment in (0.0, 1.0):
        search = RateSearch(1.0, most=5)
        tried = 0
        while (rate := search.next()) is not None:
            search.tell(rate, attainment)
            tried += 1
        assert tried == 5
        assert (search.met is None) == (attainment == 0.0)
    with pytest.raises(ValueError, match="above 0"):
        RateSearch(0.0)
