"""Made-up traces have the shape that was asked for, and the same one for the same seed."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from statistics import fmean, pstdev

import pytest

from bench.synthetic import SpecError, Synthetic, generate

SHAPE = Synthetic(rate=50, input_tokens="lognormal:200:0.5", output_tokens="exponential:40")


def test_the_same_seed_gives_the_same_trace() -> None:
    assert generate(SHAPE, seed=1, duration_s=5) == generate(SHAPE, seed=1, duration_s=5)
    assert generate(SHAPE, seed=1, duration_s=5) != generate(SHAPE, seed=2, duration_s=5)


def test_arrivals_and_lengths_have_chances_of_their_own() -> None:
    short = generate(replace(SHAPE, output_tokens="8"), seed=1, duration_s=5)
    long = generate(SHAPE, seed=1, duration_s=5)
    assert [r.arrival_s for r in short.requests] == [r.arrival_s for r in long.requests]
    assert [r.input_tokens for r in short.requests] == [r.input_tokens for r in long.requests]
    assert {r.output_tokens for r in short.requests} == {8}


def test_means_are_those_asked_for() -> None:
    trace = generate(SHAPE, seed=3, duration_s=100)
    assert trace.rate == pytest.approx(50, rel=0.05)
    assert fmean(r.input_tokens for r in trace.requests) == pytest.approx(200, rel=0.05)
    assert fmean(r.output_tokens for r in trace.requests) == pytest.approx(40, rel=0.05)
    assert trace.requests[-1].arrival_s < trace.span_s == 100


@pytest.mark.parametrize(
    ("arrivals", "cv"), [("uniform", 0.0), ("poisson", 1.0), ("gamma:2", 2.0), ("gamma:0.5", 0.5)]
)
def test_arrivals_are_as_bursty_as_asked_for(arrivals: str, cv: float) -> None:
    trace = generate(replace(SHAPE, arrivals=arrivals), seed=3, duration_s=200)
    times = [0.0, *(r.arrival_s for r in trace.requests)]
    gaps = [late - early for early, late in pairwise(times)]
    assert fmean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(cv, rel=0.1, abs=1e-6)


def test_groups_share_their_prefix() -> None:
    shape = replace(SHAPE, input_tokens="20", prefix_groups=3, prefix_tokens=40, prefix_share=0.5)
    trace = generate(shape, seed=5, duration_s=20)
    sharing = [r for r in trace.requests if r.blocks]
    assert len(sharing) / len(trace.requests) == pytest.approx(0.5, abs=0.05)
    assert {r.blocks for r in sharing} == {
        (0, 1),
        (2, 3),
        (4, 5),
    }  # 40 tokens are two and a half blocks, even: two
    assert {r.input_tokens for r in sharing} == {33}
    assert {r.input_tokens for r in trace.requests if not r.blocks} == {20}


def test_a_long_tail_is_cut() -> None:
    trace = generate(replace(SHAPE, input_tokens="lognormal:200:3", max_tokens=300), seed=1, duration_s=20)
    assert max(r.input_tokens for r in trace.requests) == 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 0.0}, "rate must be above 0"),
        ({"arrivals": "sometimes"}, "'sometimes' are no arrivals; there are poisson"),
        ({"arrivals": "gamma"}, "'gamma' are no arrivals"),
        ({"arrivals": "gamma:x"}, "'gamma:x' are no arrivals"),
        ({"input_tokens": "normal:3:4"}, "'normal:3:4' is no distribution of lengths; there are N, uniform"),
        ({"input_tokens": "uniform:9:3"}, "'uniform:9:3' is no distribution"),
        ({"output_tokens": "0"}, "'0' is no distribution"),
        ({"output_tokens": "nan"}, "'nan' is no distribution"),
        ({"prefix_groups": 2}, "2 groups with a prefix of 0 tokens share nothing"),
        ({"prefix_groups": 2, "prefix_tokens": 7}, "less than half a block of 16"),
        ({"prefix_share": 1.5}, "must be in"),
    ],
)
def test_a_shape_without_sense_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        generate(replace(SHAPE, **change), seed=1, duration_s=1)  # type: ignore[arg-type]
