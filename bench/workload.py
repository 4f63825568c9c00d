"""What is sent in one run, at any rate: a trace or a made-up one, cut, scaled and stretched as asked. Pure.

Called by `bench.session` once for each run; a search for the highest rate asks for the same workload at many rates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.load import Job
from bench.synthetic import Synthetic, generate
from bench.traces import Trace, TraceError


@dataclass(frozen=True, slots=True)
class Schedule:
    """One run: `jobs` with their trace. Jobs due before `warmup_s` do not count; `window_s` seconds do."""

    trace: Trace
    jobs: list[Job]
    warmup_s: float
    window_s: float


@dataclass(frozen=True, slots=True)
class Workload:
    """`source`: the whole trace, or the shape of a made-up one. Lengths of a source are scaled, then limited."""

    source: Trace | Synthetic
    seed: int = 0
    input_scale: float = 1.0
    output_scale: float = 1.0
    start_s: float = 0.0  # where in the trace it begins, in the trace's own time
    duration_s: float = 60.0  # measured
    warmup_s: float = 0.0  # before that
    requests: int = 0  # instead of a duration: so many, those of the warm-up included
    max_input: int = 0  # longer ones are dropped; 0: no limit
    max_output: int = 0
    max_total: int = 0  # of prompt and answer together
    # A rate is that of what is sent: so many requests, pressed into the duration. With this it is the mean of the whole
    # trace, and what is sent is as busy as that part of the trace was.
    own_times: bool = False

    @property
    def rate(self) -> float:
        """Mean requests a second of the source as it is."""
        return self.source.rate

    def schedule(self, rate: float) -> Schedule:
        """The run at `rate` requests a second. Raises TraceError, SpecError, ValueError."""
        asked_s = self.warmup_s + self.duration_s
        if isinstance(self.source, Synthetic):
            if self.requests:
                asked_s = self.requests / rate * 2 + 10
            trace = generate(replace(self.source, rate=rate), seed=self.seed, duration_s=asked_s)
        else:
            trace = self.source
            if self.start_s:
                trace = trace.window(self.start_s, trace.span_s - self.start_s)
            trace = trace.spread(self.seed)
        trace = self._limited(trace.scaled(self.input_scale, self.output_scale))
        if isinstance(self.source, Synthetic):
            trace = trace.first(self.requests) if self.requests else trace
        elif self.own_times:
            trace = trace.at_rate(rate)
            trace = trace.first(self.requests) if self.requests else trace.window(0.0, asked_s)
        else:
            trace = self._pressed(trace, rate, asked_s)
        window_s = trace.span_s - self.warmup_s
        jobs = [Job(each, each.arrival_s, each.arrival_s < self.warmup_s) for each in trace.requests]
        if window_s <= 0 or all(job.warmup for job in jobs):
            raise TraceError(
                trace.name,
                0,
                "",
                f"nothing is left to measure in {trace.span_s:.1f} s with {len(jobs)} requests after a warm-up of "
                f"{self.warmup_s:g} s; ask for more time or a higher rate",
            )
        return Schedule(trace, jobs, self.warmup_s, window_s)

    def _pressed(self, trace: Trace, rate: float, asked_s: float) -> Trace:
        """The first requests, as many as come in that time at that rate."""
        count = self.requests or max(1, round(rate * asked_s))
        if count > len(trace.requests):
            raise TraceError(
                trace.name,
                0,
                "",
                f"it has {len(trace.requests)} requests, enough for {len(trace.requests) / rate:.1f} s at {rate:.3g} "
                f"requests/s, but {asked_s:.1f} s are wanted; ask for less time or a lower rate",
            )
        return trace.first(count).at_rate(rate)

    def dropped(self) -> tuple[int, int]:
        """How many requests of the source are too long, and how many there are. Of a made-up one: (0, 0)."""
        if isinstance(self.source, Synthetic):
            return 0, 0
        scaled = self.source.scaled(self.input_scale, self.output_scale)
        return len(scaled.requests) - len(self._limited(scaled).requests), len(scaled.requests)

    def _limited(self, trace: Trace) -> Trace:
        most_in, most_out, most = (
            limit or 1 << 60 for limit in (self.max_input, self.max_output, self.max_total)
        )
        return trace.only(
            lambda request: (
                request.input_tokens <= most_in
                and request.output_tokens <= most_out
                and request.input_tokens + request.output_tokens <= most
            )
        )
