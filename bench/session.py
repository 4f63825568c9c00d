"""One invocation of the bench: opens the servers, runs the workload on them once, in turn, or at rising rates, reports.

Called by `bench.command`. Rounds go A B A B, so that what drifts on a machine hits all sides alike. Every run has
prompts of its own (another salt): no run finds in a cache what an earlier one has put there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace

from bench.door import Door, DoorError, Facts
from bench.figures import RateSearch, Slo, Summary, compare, summarize
from bench.load import Load
from bench.record import Run
from bench.report import Generator, Report, RunReport, Try
from bench.traces import TraceError
from bench.workload import Schedule, Workload

# At the 99th percentile; a generator that is slower than this measures itself.
LATE_MS = 20.0
LAG_MS = 10.0
LENGTH_TOLERANCE = 0.05

Show = Callable[[Load, str, int], AbstractAsyncContextManager[None]]


@dataclass(frozen=True, slots=True)
class Side:
    name: str
    door: Door


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a run, see `bench.load.Load`."""

    timeout_s: float = 300.0
    drain_s: float = 300.0
    max_open: int = 0


@dataclass
class Session:
    """`show` is entered around each run, with its load, a label and the number of requests."""

    sides: Sequence[Side]
    workload: Workload
    slo: Slo
    limits: Limits
    salt: str
    show: Show
    keep: Callable[[str, Run], None] = lambda label, run: None  # takes each run's records
    clock: Callable[[], float] = time.perf_counter
    report: Report = field(default_factory=Report)
    _load: Load | None = None
    _interrupted: bool = False

    def interrupt(self) -> None:
        """Ends the run that is under way; `report` keeps what there is."""
        self._interrupted = True
        if self._load is not None:
            self._load.interrupt()

    async def open(self) -> None:
        """Asks every server what it takes. Raises DoorError."""
        self.report.slo = str(self.slo)
        self.report.salt = self.salt
        longest: list[int] = []
        for side in self.sides:
            facts = await side.door.open()
            self.report.servers[side.name] = facts
            longest += [facts.max_model_len] if facts.max_model_len else []
        if longest and (not self.workload.max_total or min(longest) < self.workload.max_total):
            self.workload = replace(self.workload, max_total=min(longest))
        dropped, among = self.workload.dropped()
        if dropped == among and among:
            raise DoorError(
                f"all {among} requests of the trace are longer than allowed ({self.workload.max_total} tokens with "
                "the answer at this server); scale the lengths down"
            )
        if dropped:
            self.report.note(
                f"{dropped} of {among} requests of the trace were dropped: too long, at most "
                f"{self.workload.max_total or 'any'} tokens with the answer"
            )

    async def close(self) -> None:
        for side in self.sides:
            await side.door.close()

    async def rounds(self, count: int, rate: float) -> None:
        """Every side in turn, `count` times."""
        schedule = self.workload.schedule(rate)
        done: list[dict[str, Summary]] = []
        for number in range(count):
            row: dict[str, Summary] = {}
            for side in self.sides:
                if self._stopped():
                    break
                row[side.name] = (await self._run(side, number, f"#{number}", rate, schedule)).summary
            if self._stopped():  # half a round compares nothing
                break
            done.append(row)
        self.report.comparison = compare(done)

    async def search(self, search: RateSearch) -> None:
        """The highest rate that meets the SLO, on the first side."""
        while (rate := search.next()) is not None and not self._stopped():
            try:
                summary = await self._try(rate)
            except TraceError as error:  # what was found so far is not lost
                self.report.note(f"the search ended at {rate:.3g} requests/s: {error}")
                break
            if self._stopped():
                break
            search.tell(rate, summary.attainment)
        self.report.best_rate = search.met
        if search.met is None:
            self.report.note(
                "no rate that was tried meets the SLO; is it below what one request alone takes?"
            )
        elif search.failed is None:
            self.report.note("every rate that was tried meets the SLO: the highest one is not the limit")

    async def sweep(self, rates: Sequence[float]) -> None:
        """The first side at each rate."""
        for rate in rates:
            if self._stopped():
                break
            await self._try(rate)

    async def _try(self, rate: float) -> Summary:
        """The first side at one rate."""
        schedule = self.workload.schedule(rate)
        run = await self._run(self.sides[0], len(self.report.runs), f"{rate:.3g}/s", rate, schedule)
        self.report.tries.append(Try(rate, run.summary.attainment, run.summary.goodput_rps))
        return run.summary

    def _stopped(self) -> bool:
        return self._interrupted

    async def _run(self, side: Side, number: int, which: str, rate: float, schedule: Schedule) -> RunReport:
        """`which`: what tells this run from the others of its side."""
        facts = self.report.servers[side.name]
        # Of the two sides of a round too: both may be one server under two headers.
        tag = f"{self.salt}-{len(self.report.runs)}"
        target = side.door.target(facts.prompts(schedule.trace, tag), f"bench-{tag}")
        load = self._load = Load(
            target,
            schedule.jobs,
            clock=self.clock,
            timeout_s=self.limits.timeout_s,
            drain_s=self.limits.drain_s,
            max_open=self.limits.max_open,
        )
        label = f"{side.name} {which}"
        async with self.show(load, label, len(schedule.jobs)):
            run = await load.run()
        self._load = None
        self._interrupted = self._interrupted or run.interrupted
        summary = summarize(run, self.slo, warmup_s=schedule.warmup_s, window_s=schedule.window_s)
        made = RunReport(label, side.name, number, rate, run.interrupted, summary, _generator(run))
        self.report.runs.append(made)
        self._judge(made, schedule, facts)
        self.keep(label, run)
        return made

    def _judge(self, run: RunReport, schedule: Schedule, facts: Facts) -> None:
        """Says what makes the figures of a run doubtful."""
        summary, where = run.summary, f"{run.label}: "
        note = self.report.note
        if run.interrupted:
            note(
                where
                + "interrupted; requests that were open count as cancelled, the window is shorter than said"
            )
        late_ms = 0.0 if self.limits.max_open else summary.late_ms.p99
        if late_ms > LATE_MS or summary.lag_ms.p99 > LAG_MS:
            note(
                where
                + f"the generator was short of CPU (p99: sent {late_ms:.0f} ms, woke {summary.lag_ms.p99:.0f} ms too "
                "late): part of every latency is its own, and single gaps mean little"
            )
        if summary.answered and summary.short_answers:
            note(where + f"{summary.short_answers} answers are shorter than the trace wants")
        wanted = sum(job.request.input_tokens for job in schedule.jobs) / len(schedule.jobs)
        counted = summary.input_tokens / summary.answered if summary.answered else wanted
        # Who fails is not drawn by lot, so means can be compared only where all were answered.
        if not summary.errors and not schedule.warmup_s and abs(counted / wanted - 1) > LENGTH_TOLERANCE:
            note(where + f"prompts have {counted:.0f} tokens on average, {wanted:.0f} were wanted")


def _generator(run: Run) -> Generator:
    """What the generator itself took, warm-up included."""
    pieces = sum(len(record.piece_times) for record in run.records)
    elapsed_s = max(run.end - run.begin, 1e-9)
    return Generator(
        cpu_s=run.cpu_s,
        cpu_share=run.cpu_s / elapsed_s,
        cpu_us_per_piece=1e6 * run.cpu_s / pieces if pieces else 0.0,
    )
