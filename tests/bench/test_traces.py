"""Readers, cuts and scales of traces."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.traces import Trace, TraceError, TraceRequest, load, read_azure, read_mooncake

MOONCAKE = [
    '{"timestamp": 1000, "input_length": 700, "output_length": 5, "hash_ids": [0, 1]}\n',
    "\n",
    '{"timestamp": 1000, "input_length": 1024, "output_length": 6, "hash_ids": [0, 2]}\n',
    '{"timestamp": 4000, "input_length": 10, "output_length": 7}\n',
]
AZURE = [
    "TIMESTAMP,ContextTokens,GeneratedTokens\n",
    "2023-11-16 18:15:46.6805900,374,44\n",
    "2023-11-16 18:15:50.9051690,396,109\n",
]
HEADING = AZURE[0]


def test_mooncake() -> None:
    trace = read_mooncake(MOONCAKE, "chat")
    assert [request.arrival_s for request in trace.requests] == [0.0, 0.0, 3.0]
    assert trace.requests[1] == TraceRequest(1, 0.0, 1024, 6, (0, 2))
    assert trace.requests[2].blocks == ()
    assert (trace.block_tokens, trace.span_s) == (512, 4.5)
    assert trace.rate == pytest.approx(3 / 4.5)
    assert trace.edges(trace.requests[0]) == [512, 700]


def test_azure() -> None:
    trace = read_azure(AZURE, "azure")
    assert [(r.input_tokens, r.output_tokens, r.blocks) for r in trace.requests] == [
        (374, 44, ()),
        (396, 109, ()),
    ]
    assert trace.requests[1].arrival_s == pytest.approx(4.224579)


def test_azure_of_2024_has_a_time_zone() -> None:
    trace = read_azure([HEADING, "2024-05-10 00:00:00.009930+00:00,2162,5\n"], "azure")
    assert (trace.requests[0].arrival_s, trace.span_s) == (0.0, 1.0)


def test_rows_out_of_order_are_sorted() -> None:
    trace = read_mooncake([MOONCAKE[3], MOONCAKE[0]], "chat")
    assert [request.input_tokens for request in trace.requests] == [700, 10]


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ('{"timestamp": 0, "input_length": 5}', "output_length"),
        ('{"timestamp": 0, "input_length": "5", "output_length": 1}', "input_length"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 1}', "input_length"),
        ('{"timestamp": -1, "input_length": 1, "output_length": 1}', "timestamp"),
        ('{"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": [1, "x"]}', "hash_ids"),
        ('{"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [1, 2]}', "hash_ids"),
        ('{"timestamp": 0, ', ""),
    ],
)
def test_a_bad_mooncake_line_is_named_with_its_field(line: str, field: str) -> None:
    with pytest.raises(TraceError) as error:
        read_mooncake([*MOONCAKE[:2], line], "chat")
    assert (error.value.line, error.value.field) == (3, field)
    assert "chat, line 3" in str(error.value)


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ("2023-11-16 18:15:46,374", "GeneratedTokens"),
        ("2023-11-16 18:15:46,many,4", "ContextTokens"),
        ("2023-11-16 18:15:46,3,-4", "GeneratedTokens"),
        ("2023-11-16 18:15:46,0,4", "ContextTokens"),
        ("yesterday,3,4", "TIMESTAMP"),
        ("2023-11-16 18:15:46+00:00,3,4", "TIMESTAMP"),
    ],
)
def test_a_bad_azure_row_is_named_with_its_field(row: str, field: str) -> None:
    with pytest.raises(TraceError) as error:
        read_azure([*AZURE[:2], row + "\n"], "azure")
    assert (error.value.line, error.value.field) == (3, field)


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="heading must be TIMESTAMP"):
        read_azure(["time,in,out\n"], "azure")
    with pytest.raises(TraceError, match="no requests"):
        read_azure([HEADING], "azure")
    with pytest.raises(TraceError, match="no requests"):
        read_mooncake([], "chat")
    with pytest.raises(TraceError, match=r"'\.txt' is unknown"):
        load(tmp_path / "trace.txt")
    (tmp_path / "trace.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(TraceError, match="UTF-8"):
        load(tmp_path / "trace.csv")


def test_load_goes_by_the_ending(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(MOONCAKE))
    (tmp_path / "a.csv").write_text("".join(AZURE))
    assert len(load(tmp_path / "a.jsonl").requests) == 3
    assert len(load(tmp_path / "a.csv").requests) == 2


def steady(count: int, gap_s: float = 1.0) -> Trace:
    requests = tuple(TraceRequest(n, n * gap_s, 100 + n, 10) for n in range(count))
    return Trace("steady", requests, count * gap_s)


def test_first_and_window() -> None:
    trace = steady(10)
    first = trace.first(4)
    assert (len(first.requests), first.span_s, first.rate) == (4, 4.0, 1.0)
    cut = trace.window(2.5, 4)
    assert [request.number for request in cut.requests] == [3, 4, 5, 6]
    assert [request.arrival_s for request in cut.requests] == [0.5, 1.5, 2.5, 3.5]
    assert cut.span_s == 4
    assert trace.window(0, 10) == trace
    with pytest.raises(TraceError, match="it lasts 10.0 s at 1 requests/s, but 4.0 s from 7.0 s"):
        trace.window(7, 4)
    with pytest.raises(TraceError, match="11 requests are wanted, but there are 10"):
        trace.first(11)


def test_the_first_of_a_crowd_have_a_rate() -> None:
    crowd = read_mooncake([MOONCAKE[0]] * 3 + [MOONCAKE[3]], "crowd")
    assert crowd.first(2).span_s == crowd.span_s / 2


def test_only_keeps_times_and_numbers() -> None:
    kept = steady(10).only(lambda request: request.input_tokens >= 108)
    assert [(request.number, request.arrival_s) for request in kept.requests] == [(8, 8.0), (9, 9.0)]
    assert kept.span_s == 10


@given(st.floats(0.01, 100), st.integers(1, 50))
def test_at_rate_keeps_the_shape_of_the_arrivals(rate: float, count: int) -> None:
    trace = steady(count, 0.3).at_rate(rate)
    assert trace.rate == pytest.approx(rate)
    assert trace.span_s == pytest.approx(count / rate)
    for request in trace.requests:
        assert request.arrival_s == pytest.approx(request.number / rate)


@pytest.mark.parametrize("call", ["at_rate", "sped"])
def test_no_time_without_a_rate(call: str) -> None:
    with pytest.raises(ValueError, match="above 0"):
        getattr(steady(2), call)(0.0)
    with pytest.raises(ValueError, match="above 0"):
        steady(2).scaled(1, 0)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4000)), min_size=1, max_size=8),
    st.floats(0.002, 2),
)
def test_scaled_lengths_keep_what_is_shared(shape: list[tuple[int, int]], scale: float) -> None:
    requests = tuple(
        TraceRequest(n, n, tokens, tokens, tuple(range(min(shared, -(-tokens // 512)))))
        for n, (shared, tokens) in enumerate(shape)
    )
    before = Trace("t", requests, len(requests), 512)
    after = before.scaled(scale, 1.0)
    assert after.block_tokens == pytest.approx(512 * scale)
    for old, new in zip(before.requests, after.requests, strict=True):
        assert new.input_tokens == max(1, round(old.input_tokens * scale))
        assert (new.output_tokens, new.blocks, new.number) == (old.output_tokens, old.blocks, old.number)
    # The same place has the same edge in every prompt, unless the prompt ends before it.
    for left in after.requests:
        for right in after.requests:
            for a, b in zip(after.edges(left), after.edges(right), strict=False):
                assert a == b or min(a, b) == min(left.input_tokens, right.input_tokens)


def test_spread_keeps_groups_apart_and_the_order() -> None:
    rows = [
        f'{{"timestamp": {3000 * (n // 5)}, "input_length": {n + 1}, "output_length": 1}}' for n in range(20)
    ]
    trace = read_mooncake(rows, "chat")
    spread = trace.spread(7)
    assert spread == trace.spread(7) != trace.spread(8)
    assert [request.number for request in spread.requests] == list(range(20))
    times = [request.arrival_s for request in spread.requests]
    assert times == sorted(times) and len(set(times)) == 20 and times[-1] <= spread.span_s
    for old, new in zip(trace.requests, spread.requests, strict=True):
        assert old.arrival_s <= new.arrival_s < old.arrival_s + 3.0
    assert steady(3).spread(1) == steady(3)
