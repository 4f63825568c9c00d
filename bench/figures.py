"""From records to figures: latencies, throughput, goodput under service-level objectives, comparisons. Pure.

Definitions are in docs/bench.md. Latencies count from when a request was due, not from when it was sent. A gap is the
time between two consecutive pieces of one answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import msgspec
import numpy as np

from bench.record import Record, Run

TAIL_SHARE = 0.1  # of a request's gaps, the longest: Mooncake's time between tokens is their mean
SLO_SCALES = (0.25, 0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)


class Distribution(msgspec.Struct, frozen=True):
    """Of values in milliseconds. Percentiles interpolate linearly between neighbours. All 0 when there is none."""

    count: int = 0
    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    max: float = 0.0

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Distribution:
        values = np.fromiter(seconds, dtype=np.float64) * 1e3
        if not len(values):
            return cls()
        p50, p90, p95, p99 = np.percentile(values, (50, 90, 95, 99)).tolist()
        return cls(len(values), float(values.mean()), p50, p90, p95, p99, float(values.max()))


@dataclass(frozen=True, slots=True)
class Latency:
    """Of one answered request, in seconds. The fields' names are the keys of an SLO."""

    ttft: float
    itl: float  # the mean of the longest tenth of its gaps, at least one; 0 without gaps
    tpot: float  # mean time of a token after the first piece; 0 without such tokens
    e2e: float


def latency(record: Record) -> Latency:
    """Raises ValueError for a request that was not answered."""
    if not record.ok or record.end is None:
        raise ValueError(f"request {record.number} was not answered: {record.error}")
    times = record.piece_times
    between = sorted(gaps(record), reverse=True)
    tail = between[: max(1, round(len(between) * TAIL_SHARE))]
    later = record.completion_tokens - record.piece_tokens[0]
    return Latency(
        ttft=times[0] - record.scheduled,
        itl=fmean(tail) if tail else 0.0,
        tpot=(times[-1] - times[0]) / later if later > 0 else 0.0,
        e2e=record.end - record.scheduled,
    )


def gaps(record: Record) -> list[float]:
    """Seconds between its pieces."""
    return np.diff(np.asarray(record.piece_times)).tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Slo:
    """Objectives in seconds; None: none. A request meets it when it is answered and within all of them."""

    ttft: float | None = None
    itl: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    @classmethod
    def parse(cls, text: str) -> Slo:
        """From `ttft=500,itl=50`, in milliseconds. Raises ValueError."""
        known = [field.name for field in fields(cls)]
        values: dict[str, float] = {}
        for part in filter(None, text.replace(" ", "").split(",")):
            key, _, value = part.partition("=")
            try:
                number = float(value)
            except ValueError:
                number = 0.0
            if key not in known or key in values or not 0 < number < float("inf"):
                raise ValueError(
                    f"{part!r} is no objective; write e.g. ttft=500,itl=50 in ms, each once, of {', '.join(known)}"
                )
            values[key] = number / 1e3
        return cls(**values)

    def items(self) -> dict[str, float]:
        """The objectives there are, by name, in seconds."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in given.items() if value is not None}

    def scaled(self, factor: float) -> Slo:
        return replace(self, **{name: value * factor for name, value in self.items().items()})

    def missed(self, measured: Latency) -> list[str]:
        """The names of the objectives that were not met."""
        return [name for name, value in self.items().items() if getattr(measured, name) > value]

    def __str__(self) -> str:
        told = ", ".join(f"{name} {1e3 * value:g} ms" for name, value in self.items().items())
        return told or "none"


class Summary(msgspec.Struct, frozen=True):
    """One run in figures. Warm-up is left out of all of them."""

    requests: int
    answered: int
    errors: dict[str, int]  # by kind, see `bench.record.ERRORS`
    messages: dict[str, str]  # the first of each kind
    window_s: float  # in which the measured requests were due
    offered_rps: float
    answered_rps: float  # answered requests a second, from the begin of the window to the last answer
    goodput_rps: float  # requests that met the SLO, a second of the window
    attainment: float  # share of all requests that met the SLO
    missed: dict[str, int]  # answered requests that missed an objective, by its name
    slo_curve: list[tuple[float, float]]  # (scale of the SLO, attainment)
    input_tps: float  # prompt tokens of answered requests a second
    output_tps: float  # tokens of answered requests a second
    input_tokens: int
    output_tokens: int
    short_answers: int  # with fewer tokens than asked for
    tokens_per_piece: float
    cached_share: float  # of prompt tokens, as the server told
    prefilled: dict[str, int]  # where, if the server is a Baton
    ttft_ms: Distribution
    itl_ms: Distribution  # all gaps of all requests
    tpot_ms: Distribution
    e2e_ms: Distribution
    late_ms: Distribution  # from due to sent: the generator's own doing, or the bound on open requests
    lag_ms: Distribution  # by which the generator saw things too late, sampled


def measured(run: Run) -> list[Record]:
    """The records that count: not those of the warm-up."""
    return [record for record in run.records if not record.warmup]


def summarize(run: Run, slo: Slo, *, warmup_s: float, window_s: float) -> Summary:
    """`window_s`: for how long measured requests were due, after `warmup_s`."""
    records = measured(run)
    good = [record for record in records if record.ok]
    latencies = [latency(record) for record in good]
    first = run.begin + warmup_s
    busy_s = max([window_s, *(record.end - first for record in good if record.end is not None)])
    misses = [slo.missed(each) for each in latencies]
    met = sum(not miss for miss in misses)
    inputs = sum(record.prompt_tokens or record.input_tokens for record in good)
    outputs = sum(record.completion_tokens for record in good)
    pieces = sum(len(record.piece_times) for record in good)
    failed = [record for record in records if not record.ok]
    return Summary(
        requests=len(records),
        answered=len(good),
        errors=dict(Counter(record.error for record in failed)),
        messages={record.error: record.message for record in reversed(failed)},
        window_s=window_s,
        offered_rps=len(records) / window_s,
        answered_rps=len(good) / busy_s,
        goodput_rps=met / window_s,
        attainment=_share(met, len(records)),
        missed=dict(Counter(name for miss in misses for name in miss)),
        slo_curve=slo_curve(latencies, len(records), slo),
        input_tps=inputs / busy_s,
        output_tps=outputs / busy_s,
        input_tokens=inputs,
        output_tokens=outputs,
        short_answers=sum(record.completion_tokens < record.output_tokens for record in good),
        tokens_per_piece=_share(outputs, pieces),
        cached_share=_share(sum(record.cached_tokens for record in good), inputs),
        prefilled=dict(Counter(record.prefilled for record in good if record.prefilled)),
        ttft_ms=Distribution.of(each.ttft for each in latencies),
        itl_ms=Distribution.of(gap for record in good for gap in gaps(record)),
        tpot_ms=Distribution.of(each.tpot for each in latencies if each.tpot),
        e2e_ms=Distribution.of(each.e2e for each in latencies),
        late_ms=Distribution.of(
            record.sent - record.scheduled for record in records if record.sent is not None
        ),
        lag_ms=Distribution.of(run.lags_s),
    )


def slo_curve(latencies: Sequence[Latency], requests: int, slo: Slo) -> list[tuple[float, float]]:
    """(scale, share of all requests that meet the SLO times that scale), rising. Empty without an SLO."""
    if not slo.items():
        return []
    curve = []
    for scale in SLO_SCALES:
        scaled = slo.scaled(scale)
        curve.append((scale, _share(sum(not scaled.missed(each) for each in latencies), requests)))
    return curve


# What is compared: name -> how to read it from a summary. Of latencies less is better.
COMPARED: Mapping[str, Any] = {
    "goodput_rps": lambda s: s.goodput_rps,
    "attainment": lambda s: s.attainment,
    "output_tps": lambda s: s.output_tps,
    "ttft_p50_ms": lambda s: s.ttft_ms.p50,
    "ttft_p99_ms": lambda s: s.ttft_ms.p99,
    "itl_p50_ms": lambda s: s.itl_ms.p50,
    "itl_p99_ms": lambda s: s.itl_ms.p99,
    "tpot_p50_ms": lambda s: s.tpot_ms.p50,
    "e2e_p50_ms": lambda s: s.e2e_ms.p50,
}


class Comparison(msgspec.Struct, frozen=True):
    """One figure of one side against the first side, over rounds that ran in turn. Ratios, e.g. 0.1 = 10 % more."""

    side: str
    figure: str
    first: float  # median over rounds, of the first side
    other: float
    ratios: list[float]  # of each round: other / first
    change: float  # median of the ratios, minus 1
    low: float  # smallest change of a round
    high: float
    spread: float  # the largest change between two rounds of the same side: what chance alone does
    beyond_spread: (
        bool  # with three rounds or more: the change is larger than the spread, and of one sign in all rounds
    )


def compare(rounds: Sequence[Mapping[str, Summary]]) -> list[Comparison]:
    """Each side against the first one, round by round. A figure that is 0 somewhere is left out."""
    if not rounds:
        return []
    first, *others = rounds[0]
    found = []
    for side in others:
        for figure, read in COMPARED.items():
            ours = [float(read(each[first])) for each in rounds]
            theirs = [float(read(each[side])) for each in rounds]
            if not all(ours) or not all(theirs):
                continue
            ratios = [theirs[index] / ours[index] for index in range(len(rounds))]
            changes = [ratio - 1 for ratio in ratios]
            spread = max(_spread(ours), _spread(theirs))
            one_sign = min(changes) > 0 or max(changes) < 0
            found.append(
                Comparison(
                    side,
                    figure,
                    median(ours),
                    median(theirs),
                    ratios,
                    median(changes),
                    min(changes),
                    max(changes),
                    spread,
                    len(rounds) >= 3 and one_sign and abs(median(changes)) > spread,
                )
            )
    return found


def _spread(values: Sequence[float]) -> float:
    """The largest change between two runs of the same side that followed each other."""
    return max((abs(late / early - 1) for early, late in pairwise(values)), default=0.0)


class RateSearch:
    """The highest rate at which a share of requests meets the SLO: doubling, then bisection. Pure.

        rate = search.next()    # None: over
        search.tell(rate, attainment)

    Assumes that attainment falls with the rate; noise near the limit only moves the answer within it.
    """

    def __init__(
        self, start: float, *, attainment: float = 0.9, tolerance: float = 0.05, most: int = 14
    ) -> None:
        """`tolerance`: relative distance between the best rate that met and the lowest that did not."""
        if start <= 0 or not 0 < attainment <= 1 or tolerance <= 0 or most < 1:
            raise ValueError(
                "the start and the tolerance must be above 0, the attainment in (0, 1], tries from 1"
            )
        self._next = start
        self._wanted = attainment
        self._tolerance = tolerance
        self._left = most
        self.met: float | None = None  # the highest rate that met it
        self.failed: float | None = None  # the lowest rate that did not

    def next(self) -> float | None:
        """The rate to try now. None when the answer is close enough, or the tries are used up."""
        if self._left == 0 or (
            self.met is not None
            and self.failed is not None
            and self.failed <= self.met * (1 + self._tolerance)
        ):
            return None
        return self._next

    def tell(self, rate: float, attainment: float) -> None:
        self._left -= 1
        if attainment >= self._wanted:
            self.met = rate if self.met is None else max(self.met, rate)
        else:
            self.failed = rate if self.failed is None else min(self.failed, rate)
        if self.failed is None:
            self._next = rate * 2
        elif self.met is None:
            self._next = rate / 2
        else:
            self._next = (self.met * self.failed) ** 0.5


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
